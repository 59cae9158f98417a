from functools import partial

import pytest
import torch
import torch.nn as nn

import timm
from timm.layers import SwiGLU

from tests.layers import written_by
from tests.models import images, make_model
from timm_ait import balance_loss, memory_statistics
from timm_ait.models.associative_transformer import attended_tokens

make_model = partial(make_model, 'test_ait')


class TestRegistry:

    @pytest.mark.parametrize('name, size, num_patches', [
        ('ait_small', 32, 64), ('ait_medium', 32, 64), ('ait_base', 32, 64), ('ait_small_patch32_64', 64, 4),
        ('ait_small_patch16_224', 224, 196), ('ait_medium_patch16_224', 224, 196), ('ait_base_patch16_224', 224, 196)])
    def test_input_size(self, name, size, num_patches):
        model = timm.create_model(name, depth=1, device='meta')
        assert timm.data.resolve_model_data_config(model)['input_size'] == (3, size, size)
        assert model.patch_embed.num_patches == num_patches


def test_an_mlp_may_be_wrapped():
    model, wrapped = make_model(), make_model()
    for block in wrapped.blocks:
        block.mlp = nn.Sequential(block.mlp)
    for training in (True, False):
        assert torch.equal(wrapped.train(training)(images()), model.train(training)(images()))


def test_a_workspace_may_be_replaced():
    model, without = make_model(gated=True), make_model(gated=True)  # gates are zero
    without.blocks[0].mlp.workspace = nn.Identity()
    for training in (True, False):
        assert torch.equal(without.train(training)(images()), model.train(training)(images()))


def test_workspace_arguments_arrive():
    kwargs = dict(
        num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=0.5, beta=2., retrieval_steps=2, memory_momentum=0.5,
        memory_init='identity', memory_update='normalize', balance_weight=0.1)
    workspace = make_model(**kwargs).blocks[0].mlp.workspace
    assert {name: getattr(workspace, name) for name in kwargs} == kwargs


class TestState:

    def test_logits_of_an_image_depend_on_it_alone(self):
        model = make_model().eval()
        x = images(6)
        together = model(x)
        # bit for bit the same only if the kernels see the same shapes: images change places and neighbours
        swapped = model(torch.cat([images(3, seed=2), x[3:]]))
        assert torch.equal(swapped[3:], together[3:])
        torch.testing.assert_close(model(x[3:4]), together[3:4], atol=1e-5, rtol=1e-5)

    def test_memory_statistics_by_block(self):
        model = make_model().train()
        model(images())
        statistics = memory_statistics(model)
        assert list(statistics) == [f'blocks.{i}.mlp.workspace' for i in range(3)]
        for layer in statistics.values():
            assert layer['effective_rank'] == pytest.approx(8., rel=1e-3)
            assert 0 < layer['coverage'] <= 1


class TestMasks:
    """Tokens that no other may attend to are padding, in every form of mask that timm's attention takes."""
    kept = torch.tensor([[True] * 64, [True] * 40 + [False] * 24])
    keys = kept[:, None, None, :]
    pairs = keys & kept[:, None, :, None]
    additive = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)  # NaFlexVit's

    @pytest.mark.parametrize('mask, kwargs', [
        (keys, dict()), (keys, dict(attention=False)), (keys.expand(-1, 2, 64, -1), dict()),
        (torch.zeros(keys.shape).masked_fill(~keys, float('-inf')), dict()),
        (torch.zeros(keys.shape).masked_fill(~keys, -1e4), dict()),
        (torch.zeros(keys.shape).masked_fill(~keys, -100.), dict()), (additive, dict()),
    ], ids=['keys', 'without attention', 'keys of each head', 'infinite', 'large', 'as in Swin', 'additive pairs'])
    def test_masked_tokens_neither_write_nor_count(self, mask, kwargs):
        model, x = make_model(**kwargs).train(), images(2)
        changed = x.clone()
        changed[1, :, 20:] += 1.  # the last 24 patches of the second image
        written = []
        for y in (x, changed):
            features = model.forward_features(y, attn_mask=mask)[self.kept]
            written.append([features, balance_loss(model), *(written_by(b.mlp.workspace) for b in model.blocks)])
            written[-1] = [value.detach().clone() for value in written[-1]]
        assert all(torch.equal(a, b) for a, b in zip(*written))
        assert not torch.equal(model.forward_features(changed)[self.kept], written[0][0])
        assert not torch.equal(written_by(model.blocks[0].mlp.workspace), written[0][2])

    def test_in_training_no_token_reads_what_a_later_one_writes(self):
        model, x = make_model(), images(2)
        with pytest.raises(ValueError, match='is_causal is not supported: in training'):
            model.train()(x, is_causal=True)
        assert model.eval()(x, is_causal=True).isfinite().all()

    @pytest.mark.parametrize('mask, num_tokens', [
        (torch.ones(2, 1, 64, 1, dtype=torch.bool), 64), (torch.full((64, 64), -50.), 64),
        (torch.arange(64) < 40, 40), (torch.arange(64).expand(64, 64) < 40, 40),
        (torch.arange(64).expand(1, 64, 64) < 40, 40)])
    def test_tokens_that_a_mask_of_another_shape_or_a_bias_leaves(self, mask, num_tokens):
        assert attended_tokens(mask, 2, 64).sum(dim=1).tolist() == [num_tokens] * 2

    @pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
    def test_scripted(self):
        model, x = make_model().eval(), images(2)
        torch.testing.assert_close(torch.jit.script(model)(x, attn_mask=self.keys), model(x, attn_mask=self.keys))


@pytest.mark.parametrize('name', ['ait_small_patch15_75', 'ait_tiny_hybrid_75'])
def test_models_for_sort_of_clevr(name):
    model = timm.create_model(name).eval()
    assert model.patch_embed.num_patches == 25
    assert model(images(2, 75), question=torch.zeros(2, 18)).shape == (2, 10)


class TestAblations:

    def test_without_workspaces_it_is_the_vit_of_the_same_size(self):
        model = make_model(workspace=False).eval()
        vit = timm.create_model(
            'vit_base_patch16_224', img_size=32, patch_size=4, class_token=False, global_pool='avg', num_classes=10,
            embed_dim=64, depth=3, num_heads=2).eval()
        vit.load_state_dict(model.state_dict(), strict=True)
        x = images()
        assert torch.equal(vit(x), model(x))
        assert balance_loss(model) == 0

    @pytest.mark.parametrize('kwargs, message', [
        (dict(workspace=False, attention=False), 'attention.*workspace'),
        (dict(workspace='false'), "workspace must be one of .*'false'"),  # as a command line gives it
        (dict(attention='false'), "attention must be one of .*'false'"),
        (dict(mlp_layer=SwiGLU), 'mlp_layer=.*SwiGLU.*workspace=False'),
        (dict(attention=False, qk_norm=True), 'qk_norm.*attention=False'),
        (dict(attention=False, attn_drop_rate=0.1), 'attn_drop_rate.*attention=False'),
        (dict(attention=False, attn_layer='diff'), 'attn_layer.*attention=False'),
        (dict(attention=False, qkv_bias=False), 'qkv_bias.*attention=False'),
    ], ids=str)
    def test_arguments_that_do_not_go_together_are_named(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_model(**kwargs)

    def test_without_attention_there_is_no_order_of_tokens(self):
        with pytest.raises(ValueError, match='is_causal is not supported'):
            make_model(attention=False).eval()(images(), is_causal=True)

    def test_without_attention_tokens_meet_in_the_workspace_alone(self):
        model = make_model(attention=False)
        assert not [name for name, _ in model.named_parameters() if 'attn' in name or 'norm1' in name]
        # without self-attention, and the memory frozen, a token's features depend on its own patch
        x = images(1)
        changed = x.clone()
        changed[:, :, -4:, -4:] += 1.
        difference = (model.eval().forward_features(x) - model.forward_features(changed)).abs().amax(-1)
        assert (difference > 0).nonzero()[:, 1].tolist() == [63]
        # in training, what it wrote reaches the others
        difference = (model.train().forward_features(x) - model.forward_features(changed)).abs().amax(-1)
        assert (difference > 0).all()
