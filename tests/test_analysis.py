import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune

import timm

import timm_ait
from timm_ait import analysis
from timm_ait.layers import GlobalWorkspace

FIRST = 'blocks.0.mlp.workspace'


@pytest.fixture
def model():
    return timm.create_model('test_ait', num_classes=3).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


class TestTokens:

    @pytest.mark.parametrize('compiled', [False, True])
    def test_are_the_normed_inputs_of_the_workspaces(self, model, images, compiled):
        if compiled:
            model.compile(backend='eager')
            model(images)
        tokens = analysis.collect_tokens(model, images)
        assert list(tokens) == [f'blocks.{i}.mlp.workspace' for i in range(3)]
        block = model.blocks[0]
        with torch.no_grad():
            x = model.patch_embed(images) + model.pos_embed
            x = x + block.attn(block.norm1(x))
            mlp = block.mlp
            expected = mlp.workspace.norm(mlp.fc2(mlp.act(mlp.fc1(block.norm2(x)))))
        torch.testing.assert_close(tokens[FIRST], expected)

    def test_leave_the_model_as_it_was(self, model, images):
        model.train()
        model.blocks[1].eval()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        analysis.analyse(model, [images])
        assert [module.training for module in model.modules()] == modes
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_in_threads_wait_for_each_other(self, model):
        model.train()
        entered, left = threading.Event(), threading.Event()

        def observe():
            with analysis.observed(model, {}):
                entered.set()
                left.wait(2)

        with ThreadPoolExecutor(1) as pool:
            with analysis.observed(model, {}):
                other = pool.submit(observe)
                assert not entered.wait(0.2)
            left.set()
            other.result()
        assert model.training

    def test_need_workspaces(self, images):
        with pytest.raises(ValueError, match='^model: VisionTransformer has no workspaces'):
            analysis.collect_tokens(timm.create_model('test_vit'), torch.randn(1, 3, 160, 160))

    def test_refuse_masks_and_workspaces_that_a_forward_uses_twice(self, model, images):
        with pytest.raises(ValueError, match='masks are not'):
            analysis.analyse(model, [dict(patches=images)])
        for workspace in analysis.workspaces(model).values():
            workspace.retrieves = False
        model.blocks[2].mlp.workspace = model.blocks[0].mlp.workspace
        with pytest.raises(ValueError, match='used several times'):
            analysis.analyse(model, [images])

    def test_are_in_float32_under_autocast(self, model, images):
        workspace, weights = model.blocks[0].mlp.workspace, []
        with torch.autocast('cpu', torch.bfloat16):
            analysis.read_shares(model, images, lambda _, x: weights.append(analysis.write_attention(workspace, x)))
        assert {x.dtype for x in weights} == {torch.float32}

    def test_need_the_question_of_question_models(self, images):
        model = timm.create_model('test_ait', question_dim=3)
        with pytest.raises(TypeError, match='question'):
            analysis.analyse(model, [images])
        assert analysis.collect_tokens(model, images, question=torch.randn(4, 3))[FIRST].shape == (4, 65, 64)


class TestWriteAttention:

    def test_is_that_of_the_write(self, model, images):
        tokens = analysis.collect_tokens(model, images)[FIRST]
        workspace = model.blocks[0].mlp.workspace
        attention = analysis.write_attention(workspace, tokens)
        assert attention.shape == (4, 8, 4 * 64)
        model.train()(images)
        # what training measures in the same forward
        assert analysis.competition(attention)['coverage'] == pytest.approx(float(workspace.coverage))

    @pytest.mark.parametrize('bottleneck, kept', [(3, 3), (0.25, 16), (1000, 64), (1e-6, 1), (None, 16)])
    def test_keeps_the_bottleneck(self, model, images, bottleneck, kept):
        tokens = analysis.collect_tokens(model, images[:1])[FIRST]
        attention = analysis.write_attention(model.blocks[0].mlp.workspace, tokens, bottleneck)
        assert ((attention > 0).sum(dim=-1) == kept).all()
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(4, 8))

    def test_of_a_layer_in_double_precision(self):
        workspace, tokens = GlobalWorkspace(64, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
        expected = analysis.write_attention(copy.deepcopy(workspace).float(), tokens.float())
        torch.testing.assert_close(analysis.write_attention(workspace, tokens), expected)

    @pytest.mark.parametrize('bottleneck', [0, -1, 1.5])
    def test_refuses_other_bottlenecks(self, model, bottleneck):
        with pytest.raises(ValueError, match='^bottleneck'):
            analysis.write_attention(model.blocks[0].mlp.workspace, torch.randn(5, 64), bottleneck)

    def test_is_the_softmax_of_the_largest_scores(self, model, images):
        tokens = analysis.collect_tokens(model, images)[FIRST]
        workspace = model.blocks[0].mlp.workspace
        prune.identity(workspace.q, 'weight')
        torch.nn.init.normal_(workspace.q.weight_orig)
        attention = analysis.write_attention(workspace, tokens, 3)[1, 5]
        query = (workspace.q() @ workspace.stored_memory()[5])[16:32]
        scores = tokens.flatten(0, 1) @ workspace.k.weight[16:32].T @ query / 4.
        kept = scores.topk(3)
        torch.testing.assert_close(attention[kept.indices], kept.values.softmax(dim=-1))
        assert attention.count_nonzero() == 3


@pytest.mark.parametrize('selected, coverage, overlap', [((2, 2, 2), 0.25, 1.), ((0, 1, 2, 3), 1., 0.)])
def test_competition_of_slots_that_give_all_their_weight_to_one_of_four_tokens(selected, coverage, overlap):
    figures = analysis.competition(F.one_hot(torch.tensor([selected]), 4).float())
    assert (figures['coverage'], figures['overlap']) == (coverage, overlap)
    assert figures['chance_overlap'] == pytest.approx(1 / 4)
    assert figures['effective_tokens'] == pytest.approx(1.)


def test_overlap_by_chance_is_the_mean_over_all_selections():
    selections = [set(kept) for kept in itertools.combinations(range(7), 5)]
    overlaps = [len(a & b) / len(a | b) for a in selections for b in selections]
    figures = analysis.competition(F.one_hot(torch.arange(5), 7).sum(0).expand(1, 2, 7) / 5)
    assert figures['chance_overlap'] == pytest.approx(sum(overlaps) / len(overlaps))


class TestFixedPoints:

    def test_a_state_near_a_pattern_goes_there_at_high_beta(self):
        patterns = torch.eye(4, 8)
        state = 0.9 * patterns[2:3] + 0.1 * patterns[:1]
        end = analysis.fixed_points(state, patterns, beta=50.)
        torch.testing.assert_close(end, patterns[2:3], atol=1e-4, rtol=0.)

    def test_another_step_leaves_it_where_it_is(self):
        state, patterns = torch.randn(20, 16), torch.randn(6, 16)
        end = analysis.fixed_points(state, patterns, 0.3)
        torch.testing.assert_close(end, analysis.fixed_points(state, patterns, 0.3, num_steps=101))
        assert not torch.allclose(end, analysis.fixed_points(state, patterns, 0.3, num_steps=1))


class TestRetrieval:

    def test_weights_reproduce_what_the_layer_adds(self, model, images):
        workspace = model.blocks[0].mlp.workspace
        x = torch.randn(2, 5, 64)
        tokens = workspace.norm(x)
        read = analysis.read_weights(workspace, tokens) @ analysis.attractors(workspace)
        torch.testing.assert_close(workspace(x), tokens + read)

    def test_of_sharp_attractors(self):
        workspace = GlobalWorkspace(8, num_slots=4, slot_dim=4, beta=200., memory_init='identity')
        torch.nn.init.eye_(workspace.attractors.weight)
        torch.nn.init.zeros_(workspace.attractors.bias)
        figures = analysis.retrieval(workspace, torch.eye(4, 8))
        assert figures['effective_slots'] == pytest.approx(1.)
        assert figures['num_fixed_points'] == 4
        assert figures['distance'] == pytest.approx(0., abs=1e-5)


@pytest.mark.parametrize('name, kwargs', [
    ('vit_tiny_patch16_224', dict(img_size=32, init_values=1e-3)),
    ('beit_base_patch16_224', dict(img_size=32, init_values=1e-5)),
    ('eva02_tiny_patch14_224', dict(img_size=28)),
    ('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=2, embed_dim=24, num_heads=(1, 1, 1, 1))),
])
def test_read_shares_are_those_of_the_blocks_output(name, kwargs):
    model = timm_ait.add_workspace(timm.create_model(name, **kwargs), blocks=[0]).eval()
    (layer, workspace), = analysis.workspaces(model).items()
    torch.nn.init.normal_(workspace.gate, std=100.)  # a reading that shows in float32
    block, outputs = model.get_submodule(layer.removesuffix('.mlp.workspace')), []
    block.register_forward_hook(lambda block, inputs, output: outputs.append(output.flatten(0, -2)))
    images = torch.randn(2, 3, kwargs['img_size'], kwargs['img_size'])
    shares = analysis.read_shares(model, images)[layer]
    torch.nn.init.zeros_(workspace.gate)
    model(images)
    read = outputs[0] - outputs[1]
    ratios = read.norm(dim=-1) / outputs[0].norm(dim=-1)
    assert shares['residual_share'] == pytest.approx(ratios.mean().item(), rel=1e-2)
    in_the_mean = read.mean(dim=0).square().sum() / read.square().sum(dim=-1).mean()
    assert shares['constant_share'] == pytest.approx(in_the_mean.item(), rel=1e-2)


def test_gates_of_zero_read_nothing():
    model = timm_ait.add_workspace(timm.create_model('test_vit', img_size=32))
    shares, *_ = analysis.read_shares(model, torch.randn(2, 3, 32, 32)).values()
    assert shares['residual_share'] == 0. and math.isnan(shares['constant_share'])


def test_a_reading_that_half_precision_rounds_away_is_still_measured():
    model = timm_ait.add_workspace(timm.create_model('test_vit', img_size=32), blocks=[0]).eval()
    (layer, workspace), = analysis.workspaces(model).items()
    torch.nn.init.normal_(workspace.gate, std=1e-4)
    images = torch.randn(2, 3, 32, 32)
    expected = analysis.read_shares(model, images)[layer]
    assert analysis.read_shares(model.bfloat16(), images.bfloat16())[layer] == pytest.approx(expected, rel=0.05)


def test_read_shares_of_other_blocks_are_unknown():
    model = timm.create_model('swinv2_cr_tiny_224', img_size=32, window_size=2, embed_dim=24, num_heads=(1, 1, 1, 1))
    shares = analysis.read_shares(timm_ait.add_workspace(model, blocks=[-1]), torch.randn(1, 3, 32, 32))
    assert [math.isnan(share['residual_share']) for share in shares.values()] == [True]


class TestAnalyse:

    def test_batches_are_averaged(self, model, images):
        parts = [analysis.analyse(model, [batch])[FIRST] for batch in (images[:2], images[2:])]
        both = analysis.analyse(model, [images[:2], images[2:]])[FIRST]
        for key, value in both.items():
            assert value == pytest.approx((parts[0][key] + parts[1][key]) / 2)

    def test_layers_that_only_read_or_only_write(self, images):
        only_read = analysis.analyse(timm.create_model('test_ait', write=False), [images])[FIRST]
        only_write = analysis.analyse(timm.create_model('test_ait', retrieval=False), [images])[FIRST]
        assert 'coverage' not in only_read and 'distance' in only_read
        assert 'coverage' in only_write and 'distance' not in only_write

    def test_needs_a_batch(self, model):
        with pytest.raises(ValueError, match='^batches'):
            analysis.analyse(model, [])
