import copy
import json
import pickle

import huggingface_hub
import pytest
import torch
import torch.nn as nn
from safetensors.torch import save
from torch.utils.hooks import RemovableHandle

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

import tests.models
import timm_ait
from tests.layers import written_by
from tests.models import BODY, WORKSPACE, images, logits, open_gates
from timm_ait.layers import GlobalWorkspace

FAMILIES = {
    'test_vit': BODY,
    'deit_tiny_distilled_patch16_224': BODY,
    'beit_base_patch16_224': BODY,
    'eva02_tiny_patch14_224': BODY,
    'vit_small_patch14_dinov2': BODY,
    'vit_giant_patch14_dinov2': dict(BODY, mlp_ratio=4),
    'vit_base_patch16_siglip_224': BODY,
    'swin_tiny_patch4_window7_224': dict(
        img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=5),
}


def make_model(name='test_vit', **kwargs):
    return tests.models.make_model(name, **{**FAMILIES[name], **kwargs})


def make_ait(name='test_vit', blocks=None, **kwargs):
    return open_gates(timm_ait.add_workspace(make_model(name, **kwargs), blocks, **WORKSPACE))


def workspaces(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, GlobalWorkspace)}


@pytest.mark.parametrize('name', FAMILIES)
class TestFamilies:

    @pytest.mark.parametrize('training', [False, True])
    def test_a_closed_gate_changes_nothing(self, name, training):
        model = make_model(name).train(training)
        expected = model(images())
        output = timm_ait.add_workspace(model, **WORKSPACE)(images())
        if isinstance(output, tuple):  # the two heads of a distilled model
            output, expected = torch.stack(output), torch.stack(expected)
        assert torch.equal(output, expected)

    def test_keys_are_kept_and_those_of_the_workspaces_added(self, name):
        model = make_model(name)
        before = {key: value.shape for key, value in model.state_dict().items()}
        after = {key: value.shape for key, value in timm_ait.add_workspace(model, **WORKSPACE).state_dict().items()}
        added = {key for key in after if '.mlp.workspace.' in key}
        assert {key: after[key] for key in after.keys() - added} == before
        assert {key.rpartition('.workspace.')[0] for key in added} == {
            key.rpartition('.fc2.weight')[0] for key in before if 'blocks.' in key and key.endswith('.mlp.fc2.weight')}

    def test_a_saved_model_comes_back_with_its_workspaces(self, name, tmp_path):
        model = make_ait(name, blocks=[-1])
        model.reset_classifier(3)
        save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
        assert torch.equal(logits(loaded, images()), logits(model, images()))
        assert list(workspaces(loaded)) == list(workspaces(model))
        assert loaded.num_classes == 3


def test_the_first_step_opens_the_gates_and_the_second_moves_the_rest():
    model = timm_ait.add_workspace(make_model(), balance_weight=0., **WORKSPACE).train()
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.)
    layers = list(workspaces(model).values())
    start = copy.deepcopy(layers)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
        optimizer.step()
        moved.append([[key for (key, p), q in zip(layer.named_parameters(), before.parameters())
                       if not torch.equal(p, q)] for layer, before in zip(layers, start)])
    assert moved == [[['gate']] * 2, [[key for key, _ in layers[0].named_parameters()]] * 2]


def test_unpickled_in_another_process_the_workspace_is_not_displaced_by_a_later_hook(monkeypatch):
    model = make_ait()
    expected = logits(model, images())
    pickled = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, 'next_id', 0)  # where every process starts to count its hooks
    loaded = pickle.loads(pickled)
    for _ in range(50):
        loaded.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: None)
    assert torch.equal(logits(loaded, images()), expected)


class TestMasks:
    """A body that masks tokens tells its workspaces, or is not trained on masked tokens."""

    def test_padding_of_naflex_neither_writes_nor_counts(self):
        torch.manual_seed(0)
        model = timm.create_model('naflexvit_base_patch16_gap', depth=2, embed_dim=64, num_heads=2, num_classes=5)
        model = timm_ait.add_workspace(model, **WORKSPACE).train()
        patches = torch.randn(2, 12, 16 * 16 * 3)
        coord = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing='ij'), -1).reshape(1, 12, 2)
        valid = torch.arange(12) < torch.tensor([[12], [8]])
        written = []
        for padding in (0., 1.):
            patches[~valid] = padding
            output = model(dict(patches=patches, patch_coord=coord.expand(2, -1, -1), patch_valid=valid))
            memories = [written_by(workspace) for workspace in workspaces(model).values()]
            written.append([output.detach(), timm_ait.balance_loss(model).detach(), *memories])
        assert all(torch.equal(a, b) for a, b in zip(*written))
        patches[1, :8] += 1.
        model(dict(patches=patches, patch_coord=coord.expand(2, -1, -1), patch_valid=valid))
        assert not torch.equal(written_by(model.blocks[0].mlp.workspace), written[0][2])

    @pytest.mark.parametrize('name', ['eva02_tiny_patch14_224', 'vit_giant_patch14_dinov2'])
    def test_where_they_would_be_written_training_refuses_them(self, name):
        model, x = make_ait(name).train(), images()
        num_tokens = model.patch_embed.num_patches + 1
        mask = torch.arange(num_tokens).expand(1, 1, 1, -1) < num_tokens - 3
        for masks in (dict(attn_mask=mask), dict(is_causal=True)):
            with pytest.raises(ValueError, match=f'{next(iter(masks))} is not supported: in training'):
                model(x, **masks)
        before = [None] if 'eva' in name else []  # rope
        with pytest.raises(ValueError, match='attn_mask is not supported: in training'):
            model.blocks[0](torch.zeros(4, num_tokens, model.embed_dim), *before, mask)
        assert model.eval()(x, attn_mask=mask).isfinite().all()

    def test_a_block_of_unknown_kind_that_takes_masks_is_refused(self):
        class OtherBlock(type(make_model().blocks[0])):
            pass

        model = make_model()
        model.blocks[1].__class__ = OtherBlock
        with pytest.raises(ValueError, match='blocks.1.mlp .*OtherBlock.*attn_mask'):
            timm_ait.add_workspace(model, **WORKSPACE)
        assert not workspaces(model)


class TestArguments:

    @pytest.mark.parametrize('blocks, expected', [
        (None, [0, 1, 2]), ([1], [1]), ((-1, 0, 2), [0, 2]), (range(2), [0, 1]), (-1, [2]), (torch.arange(2), [0, 1])])
    def test_blocks_are_selectable(self, blocks, expected):
        model = make_ait(blocks=blocks, depth=3)
        assert list(workspaces(model)) == [f'blocks.{i}.mlp.workspace' for i in expected]
        json.dumps(model._model_args)
        model.train()(images())
        assert {workspace.num_writes for workspace in workspaces(model).values()} == {1}

    def test_blocks_of_stages_are_counted_through(self):
        model = timm_ait.add_workspace(timm.create_model('twins_svt_small', device='meta'), blocks=[-1])
        mlps = [key for key, _ in model.named_modules() if key.endswith('.mlp')]
        assert len(mlps) == 18
        assert list(workspaces(model)) == [mlps[-1] + '.workspace']

    def test_device_dtype_and_mode_are_those_of_the_model(self):
        model = make_model().to('meta', torch.bfloat16).eval()
        workspace = timm_ait.add_workspace(model).blocks[0].mlp.workspace
        assert {(t.device.type, t.dtype) for t in workspace.state_dict().values()} == {('meta', torch.bfloat16)}
        assert not workspace.training

    @pytest.mark.parametrize('name, kwargs, message', [
        ('resnet18', {}, r'ResNet has no MLPs of transformer blocks: .* \[….\]blocks.<number>.mlp'),
        ('mixer_s32_224', {}, 'MlpMixer has no MLPs of transformer blocks'),
        ('convnext_atto', {}, r'stages.0.blocks.0.mlp of ConvNeXt, a Mlp, .* named fc2 and found a \S*Conv2d'),
        ('levit_128', {}, r'of LevitDistilled, a LevitMlp, .* found none'),
        ('test_ait', {}, 'AssociativeTransformer has a workspace already, blocks.0.mlp.workspace'),
        ('test_vit', dict(blocks=[6]), r'block numbers from -6 to 5, got \[6\]'),
        ('test_vit', dict(blocks=[-7]), r'from -6 to 5, got \[-7\]'),
        ('test_vit', dict(blocks=[]), r'got \[\]'), ('test_vit', dict(blocks=True), 'got True'),
        ('test_vit', dict(blocks=[1.5]), r'got \[1.5\]'), ('test_vit', dict(blocks='all'), "got 'all'"),
        ('test_vit', dict(num_slots=0), 'num_slots must be an integer of at least 1, got 0'),
    ])
    def test_what_does_not_fit_raises_and_changes_nothing(self, name, kwargs, message):
        model = timm.create_model(name, device='meta')
        before, cfg = list(model.named_modules()), dict(model.pretrained_cfg)
        with pytest.raises(ValueError, match=message):
            timm_ait.add_workspace(model, **kwargs)
        assert list(model.named_modules()) == before
        assert model.pretrained_cfg == cfg

    @pytest.mark.parametrize('wrap', [
        torch.compile, nn.DataParallel, lambda model: model.compile() or model,
        lambda model: timm.create_model('test_vit', features_only=True, feature_cls='fx'),
        *(type(name, (nn.Sequential,), {}) for name in ('DistributedDataParallel', 'FSDPVisionTransformer'))])
    def test_compiled_traced_or_distributed_models_are_refused(self, wrap):
        with pytest.raises(ValueError, match='is compiled, traced or distributed'):
            timm_ait.add_workspace(wrap(make_model()))

    def test_a_misspelt_argument_is_named_with_the_nearest_and_the_list(self):
        model = make_model()
        message = r"'num_slot'.*Did you mean num_slots\?.*help\(timm_ait.GlobalWorkspace\)"
        with pytest.raises(TypeError, match=message):
            timm_ait.add_workspace(model, num_slot=4)
        assert not workspaces(model)
        with pytest.raises(TypeError, match=message):
            timm.create_model('ait_from_timm', model='test_vit', num_slot=4)

    @pytest.mark.parametrize('gated', [True, False])
    def test_added_workspaces_are_always_gated(self, gated):
        with pytest.raises(TypeError, match='gated.*always gated'):
            timm_ait.add_workspace(make_model(), gated=gated)


class TestSaved:

    @pytest.fixture
    def saved(self, tmp_path):
        model = make_ait(global_pool='avg', num_classes=3)
        save_for_hf(model, tmp_path, safe_serialization=True)
        return model, tmp_path

    def test_the_config_says_how_to_build_it(self, saved):
        config = json.loads((saved[1] / 'config.json').read_text())
        assert config['architecture'] == 'ait_from_timm'
        assert config['model_args'] == {
            **BODY, 'num_classes': 3, 'in_chans': 3, 'img_size': [32, 32], 'global_pool': 'avg', 'model': 'test_vit',
            **WORKSPACE}

    def test_the_data_config_is_that_of_the_body_at_the_size_it_was_built_for(self, saved):
        body = timm.data.resolve_model_data_config(make_model())
        for model in (saved[0], timm.create_model(f'local-dir:{saved[1]}')):
            config = timm.data.resolve_model_data_config(model)
            assert json.dumps(config) == json.dumps({**body, 'input_size': (3, 32, 32)})

    def test_saved_once_more_it_is_the_same(self, saved, tmp_path):
        model, folder = saved
        save_for_hf(timm.create_model(f'local-dir:{folder}', pretrained=True), tmp_path / 'again')
        again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True)
        first, second = (json.loads((path / 'config.json').read_text()) for path in (folder, tmp_path / 'again'))
        assert first == second
        assert torch.equal(logits(again, images()), logits(model, images()))

    @pytest.mark.parametrize('kwargs', [
        dict(num_classes=7), dict(num_classes=0), dict(img_size=64), dict(in_chans=1), dict(patch_size=16)])
    def test_adapted_as_any_timm_model(self, saved, kwargs):
        model, folder = saved
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)
        size = kwargs.get('img_size', 32)
        x = images(size=size, in_chans=kwargs.get('in_chans', 3))
        assert logits(loaded, x).shape == (4, kwargs.get('num_classes', 3) or 64)
        assert torch.equal(loaded.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
        assert torch.equal(loaded.blocks[1].mlp.workspace.gate, model.blocks[1].mlp.workspace.gate)

    @pytest.mark.parametrize('kwargs', [dict(depth=3), dict(blocks=[0]), dict(num_slots=3)])
    def test_weights_of_another_model_are_not_loaded(self, saved, kwargs):
        with pytest.raises(RuntimeError, match='nothing was loaded'):
            timm.create_model(f'local-dir:{saved[1]}', pretrained=True, **kwargs)


class TestArchitecture:
    """`ait_from_timm` by name, as scripts create it."""
    kwargs = dict(BODY, model='test_vit', **WORKSPACE)

    @pytest.fixture
    def body(self, hub):
        """A ViT whose weights the Hub has."""
        body = tests.models.make_model('test_vit')
        hub('timm/test_vit.r160_in1k', {'model.safetensors': save(body.state_dict())})
        return body

    @pytest.mark.parametrize('name', ['test_vit', 'test_vit.r160_in1k'])
    def test_pretrained_weights_are_those_of_the_body(self, body, name):
        model = timm.create_model('ait_from_timm', model=name, pretrained=True)
        assert torch.equal(logits(model, images(size=160)), logits(body, images(size=160)))
        assert len(workspaces(model)) == 6
        assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(body)

    def test_an_emptied_source_leaves_that_of_the_body(self, body):
        model = timm.create_model(
            'ait_from_timm', model='test_vit', pretrained=True, pretrained_cfg_overlay=dict(url=''))
        assert torch.equal(model.blocks[0].mlp.fc1.weight, body.blocks[0].mlp.fc1.weight)

    def test_a_new_classifier_begins_as_that_of_the_body(self, body):
        model = timm.create_model('ait_from_timm', model='test_vit', pretrained=True, num_classes=7).eval()
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2) and not model.head.bias.any()
        assert torch.equal(model.forward_features(images(size=160)), body.eval().forward_features(images(size=160)))

    @pytest.mark.parametrize('features_only', [False, True])
    def test_weights_from_another_cache(self, body, features_only, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'empty'))
        model = timm.create_model(
            'ait_from_timm', model='test_vit', pretrained=True, features_only=features_only,
            cache_dir=tmp_path / 'hub_cache')
        blocks = model.model.blocks if features_only else model.blocks
        assert torch.equal(blocks[0].mlp.fc1.weight, body.blocks[0].mlp.fc1.weight)

    @pytest.mark.parametrize('kwargs', [dict(depth=7), dict(depth=5)])
    @pytest.mark.parametrize('num_classes', [1000, 7])
    def test_a_body_of_another_size_is_not_loaded(self, body, kwargs, num_classes):
        with pytest.raises(RuntimeError, match='Missing key|Unexpected key|size mismatch'):
            timm.create_model(
                'ait_from_timm', model='test_vit', pretrained=True, num_classes=num_classes, **kwargs)

    @pytest.mark.parametrize('give', [
        lambda cfg: dict(pretrained_cfg_overlay=cfg), lambda cfg: dict(pretrained_cfg=cfg),
        lambda cfg: dict(pretrained_cfg=timm.models.PretrainedCfg(**cfg, architecture='test_vit'))])
    @pytest.mark.parametrize('with_workspaces', [True, False])
    def test_weights_of_ones_own(self, with_workspaces, give):
        model = make_ait() if with_workspaces else make_model()
        cfg = dict(state_dict=model.state_dict(), num_classes=5)
        loaded = timm.create_model('ait_from_timm', pretrained=True, **give(cfg), **self.kwargs)
        assert torch.equal(logits(loaded, images()), logits(model, images()))

    @pytest.mark.parametrize('pretrained', [True, False])
    def test_a_config_of_ones_own_holds_where_it_gives_a_default_too(self, pretrained):
        cfg = dict(mean=IMAGENET_DEFAULT_MEAN, num_classes=5)
        if pretrained:
            cfg['state_dict'] = make_model().state_dict()
        loaded = timm.create_model('ait_from_timm', pretrained, pretrained_cfg=cfg, **self.kwargs)
        assert loaded.pretrained_cfg['mean'] == IMAGENET_DEFAULT_MEAN
        assert loaded.pretrained_cfg['architecture'] == 'ait_from_timm'
        assert timm.models.get_model_args(loaded)['model'] == 'test_vit'

    def test_a_tag_is_refused_since_it_belongs_to_the_body(self):
        with pytest.raises(RuntimeError, match='Invalid pretrained tag .augreg'):
            timm.create_model('ait_from_timm.augreg', model='test_vit', pretrained=True)

    def test_weights_of_a_checkpoint_of_train_and_the_size_it_is_trained_at(self, tmp_path):
        source = timm.create_model('vit_small_patch14_dinov2', **dict(BODY, img_size=37 * 4, patch_size=4))
        torch.save({'state_dict': source.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
        model = timm.create_model(
            'ait_from_timm', pretrained=True, **dict(self.kwargs, model='vit_small_patch14_dinov2', img_size=16 * 4,
                                                     patch_size=4, num_classes=7),
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'last.pth.tar'), num_classes=-1))  # as train.py's
        assert timm.data.resolve_data_config({}, model=model)['input_size'] == (3, 64, 64)
        assert logits(model, images(size=64)).shape == (4, 7)
        assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)

    def test_resolved_as_scripts_do(self, body):
        arguments = timm.models.resolve_model_input_args(
            'ait_from_timm', dict(img_size=64), model='test_vit', **WORKSPACE,
            pretrained_cfg_overlay=dict(std=IMAGENET_DEFAULT_STD))
        model = timm.create_model(**arguments, pretrained=True)
        config = timm.data.resolve_model_data_config(model)
        assert (config['mean'], config['std']) == ((0.5, 0.5, 0.5), IMAGENET_DEFAULT_STD)
        assert torch.equal(model.blocks[0].mlp.fc1.weight, body.blocks[0].mlp.fc1.weight)

    def test_a_body_of_any_size_takes_the_size_that_scripts_give(self):
        arguments = timm.models.resolve_model_input_args(
            'ait_from_timm', dict(img_size=64), model='pvt_v2_b0', num_classes=3, **WORKSPACE)
        assert logits(timm.create_model(**arguments), images(size=64)).shape == (4, 3)

    def test_features_only(self, body):
        arguments = dict(model='test_vit', pretrained=True, blocks=[-1], **WORKSPACE)
        features = timm.create_model('ait_from_timm', features_only=True, out_indices=[1, -1], **arguments).eval()
        model = timm.create_model('ait_from_timm', **arguments).eval()
        assert list(workspaces(features)) == [f'model.{name}' for name in workspaces(model)]
        expected = model.forward_intermediates(images(size=160), [1, -1], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features(images(size=160)), expected))

    @pytest.mark.parametrize('name, kwargs', [
        ('swin_tiny_patch4_window7_224', {}), ('vit_tiny_patch16_224', dict(depth=4)), ('crossvit_tiny_240', {}),
        ('pit_ti_224', {}), ('swinv2_cr_tiny_224', dict(feature_cls='list')),
        ('swin_tiny_patch4_window7_224', dict(out_indices=[1]))])
    def test_features_are_those_of_the_body(self, name, kwargs):
        body, model = [
            timm.create_model(**architecture, features_only=True, **kwargs).eval()
            for architecture in (dict(model_name=name), dict(model_name='ait_from_timm', model=name))]
        model.load_state_dict(body.state_dict(), strict=False)
        x = torch.randn(1, *body.pretrained_cfg['input_size'])
        assert all(torch.equal(y, expected) for y, expected in zip(model(x), body(x), strict=True))

    @pytest.mark.parametrize('name', [None, 'no_such_model', 'hf-hub:timm/test_vit.r160_in1k', 3])
    def test_a_missing_or_unknown_body_is_named(self, name):
        with pytest.raises(ValueError, match='model='):
            timm.create_model('ait_from_timm', model=name)
