""" What holds for every family of models: a timm model of images, and of questions about them. """
import copy
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn as nn

import timm
from timm.models._features_fx import GraphExtractNet
from timm.optim import param_groups_layer_decay
from timm.utils import AttentionExtract

from tests.models import BODY, WORKSPACE, images, load, make_and_ask, make_model
from tests.models.equations import randomize
from timm_ait import AssociativeTransformer, balance_loss
from timm_ait.models import CentroidTransformer, Coordination, Perceiver, SetTransformer

SETS = ['test_set_transformer', 'test_perceiver']
VITS = ['test_coordination', 'test_centroid_transformer']  # with what a ViT's blocks have
BASELINES = SETS + VITS
FAMILIES = ['test_ait', *BASELINES]
WITH_GRIDS = ['test_ait', 'test_set_transformer', *VITS]
ASKED = [(name, dict(question_dim=5)) for name in FAMILIES]
FLAT = ('test_ait', dict(global_pool='flat'))
# by `add_workspace`, which takes MLPs of timm's ViTs and of other kinds in different ways
CONVERTED = [
    ('ait_from_timm', dict(BODY, model=model, **WORKSPACE)) for model in ('test_vit', 'eva02_tiny_patch14_224')]
# all of the package that need no further argument
REGISTERED = [
    name for module in ('associative_transformer', 'ait_vit', 'set_transformer', 'perceiver', 'coordination',
                        'centroid_transformer') for name in timm.list_models(module=module)]

# tokens after each block, or latents after each iteration, of images of 32 px
NUM_FEATURES = {
    'test_ait': [64, 64, 64],
    'test_set_transformer': [64, 64, 64],
    'test_perceiver': [8, 8, 8],
    'test_coordination': [64, 64, 64],
    'test_centroid_transformer': [64, 16, 16],
}
# arguments that change shapes
OWN_SHAPES = {
    'test_ait': dict(num_slots=4),
    'test_set_transformer': dict(num_inducing=4),
    'test_perceiver': dict(num_latents=4),
    'test_coordination': dict(num_slots=2),
    'test_centroid_transformer': dict(centroid_pool=4),
}
# parameters in the order of their layers, those of one layer together
STEM = ['cls_token', 'patch_embed.proj.weight', 'question_embed.proj.weight']
IN_STEM = {'test_perceiver': ['blocks.0.latents'], 'test_coordination': ['norm_pre.memory.slots']}
LAYERS = {
    'test_ait': [
        ['blocks.0.mlp.workspace.k.weight', 'blocks.0.mlp.fc1.weight'],
        ['blocks.2.mlp.workspace.k.weight', 'blocks.2.mlp.fc1.weight'], ['fc_norm.weight', 'head.weight']],
    'test_set_transformer': [
        ['blocks.0.inducing_points'], ['blocks.2.attend.rff.0.weight'], ['attn_pool.seeds', 'head.weight']],
    'test_perceiver': [
        [f'blocks.0.{name}'] for name in (
            'cross_attns.0.attn.kv.weight', 'latent_transformers.0.0.mlp.fc1.weight',
            'latent_transformers.0.1.mlp.fc1.weight', 'cross_attns.1.attn.kv.weight')] + [['head.weight']],
    'test_coordination': [['blocks.0.attn.gates.weight'], ['blocks.2.mlp.fc1.weight'], ['head.weight']],
    'test_centroid_transformer': [['blocks.0.mlp.fc1.weight'], ['blocks.1.attn.qkv.weight'], ['head.weight']],
}
# beside position embeddings, biases and what is in the stem
UNDECAYED = {'test_ait': [
    f'blocks.0.mlp.workspace.{name}' for name in ('norm.weight', 'slot_norm.bias', 'attractors.bias', 'gate')]}
OPTIONS = [
    dict(drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2),
    dict(in_chans=1), dict(img_size=48, patch_size=8), dict(num_classes=0), dict(global_pool='max'),
    dict(question_dim=5),
]
VIT_OPTIONS = [
    dict(class_token=True, global_pool='token'), dict(class_token=True, reg_tokens=2), dict(global_pool='map'),
    dict(init_values=1e-4), dict(qkv_bias=False, proj_bias=False), dict(weight_init='jax'),
]
OWN_OPTIONS = {
    'test_ait': [*VIT_OPTIONS, FLAT[1], dict(patch_drop_rate=0.5), dict(gated=True)],
    'test_set_transformer': [dict(global_pool='avg'), dict(norm_layer='rmsnorm', act_layer='gelu')],
    'test_perceiver': [dict(mlp_ratio=4.), dict(norm_layer='rmsnorm', act_layer='relu')],
    'test_coordination': [*VIT_OPTIONS, dict(patch_drop_rate=0.5), dict(bottleneck=1000)],
    'test_centroid_transformer': [*VIT_OPTIONS, dict(qk_norm=True, scale_attn_norm=True)],
}
# values that a family has no use for, or that are out of range
REFUSED = {
    'test_set_transformer': [
        ('depth', 0), ('num_inducing', 0), ('num_heads', 3), ('init_values', 1e-4), ('mlp_ratio', 2.)],
    'test_perceiver': [
        ('depth', 0), ('num_latents', 0), ('num_iterations', 0), ('global_pool', 'token'), ('reg_tokens', 2),
        ('qk_norm', True), ('qkv_bias', False), ('no_embed_class', False)],
    'test_coordination': [
        ('num_slots', 0), ('slot_dim', -1), ('slot_heads', 3), ('bottleneck', 0), ('bottleneck', 0.5),
        ('qk_norm', True), ('attn_layer', 'diff')],
    'test_centroid_transformer': [
        ('centroid_index', -1), ('centroid_index', 3), ('centroid_pool', 0), ('patch_drop_rate', 0.5),
        ('dynamic_img_size', True), ('attn_layer', 'diff')],
}


def assert_gradients_reach_every_parameter(model, output):
    (output.square().sum() + balance_loss(model)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


class TestRegistry:

    @pytest.mark.parametrize('family, millions', [
        ('set_transformer', {'small': 15.5, 'base': 90.6}), ('perceiver', {'small': 14.3, 'base': 88.4}),
        ('coordination', {'small': 15.0, 'base': 89.4}), ('centroid_transformer', {'small': 14.8, 'base': 85.1}),
    ])
    @pytest.mark.parametrize('size', ['small', 'base'])
    def test_parameters_are_about_as_many_as_in_the_ait_of_that_size(self, family, millions, size):
        models = [timm.create_model(f'{name}_{size}', num_classes=0, device='meta') for name in (family, 'ait')]
        count, ait = (sum(p.numel() for p in model.parameters()) / 1e6 for model in models)
        assert count == pytest.approx(millions[size], abs=0.051)
        assert count == pytest.approx(ait, rel=0.06)

    @pytest.mark.parametrize('model_cls, kwargs', [
        (AssociativeTransformer, dict(class_token=False)), (SetTransformer, dict()), (Perceiver, dict()),
        (Coordination, dict(class_token=False, slot_dim=16, slot_heads=2)),
        (CentroidTransformer, dict(class_token=False, centroid_index=0)),
    ])
    def test_the_class_takes_what_a_vit_takes(self, model_cls, kwargs):
        model = model_cls(32, 8, 3, 5, 'avg', embed_dim=32, depth=1, num_heads=2, **kwargs)
        assert model(images()).shape == (4, 5)
        with pytest.raises(TypeError, match='img_size is given twice'):
            model_cls(32, 8, img_size=16, **kwargs)


@pytest.mark.parametrize('name', REGISTERED)
def test_every_registered_model_is_made_on_a_device_and_in_a_dtype(name):
    model = timm.create_model(name, device='meta', dtype=torch.float16)
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {('meta', torch.float16)}


class TestOptions:

    @pytest.mark.parametrize('name, argument, value', [
        (name, *given) for name, arguments in REFUSED.items() for given in arguments])
    def test_a_bad_argument_is_named(self, name, argument, value):
        with pytest.raises(ValueError, match=f'{argument}.*{value}'):
            make_model(name, **{argument: value})

    @pytest.mark.parametrize('name, misspelt, nearest', [
        ('test_ait', 'num_slot', 'num_slots'), ('test_set_transformer', 'num_inducings', 'num_inducing'),
        ('test_perceiver', 'num_latent', 'num_latents'), ('test_coordination', 'slots_dim', 'slot_dim'),
        ('test_centroid_transformer', 'centroid_indx', 'centroid_index'),
        *((name, 'drop_path', 'drop_path_rate') for name in FAMILIES),
    ])
    @pytest.mark.parametrize('question_dim', [0, 5])
    def test_a_misspelt_argument_is_named_with_the_nearest_and_the_list(self, name, misspelt, nearest, question_dim):
        with pytest.raises(TypeError, match=rf"'{misspelt}'.*Did you mean {nearest}\?.*help\(timm_ait\.models\."):
            make_model(name, question_dim=question_dim, **{misspelt: 4})

    @pytest.mark.parametrize('name', BASELINES)
    @pytest.mark.parametrize('mask', [dict(attn_mask=torch.ones(64, 64, dtype=torch.bool)), dict(is_causal=True)])
    def test_masks_are_refused_without_self_attention_throughout(self, name, mask):
        model, x = make_model(name), images()
        for call in (model, model.forward_features, partial(model.forward_intermediates, output_fmt='NLC')):
            with pytest.raises(ValueError, match=f'{next(iter(mask))} is not supported'):
                call(x, **mask)

    @pytest.mark.parametrize('name', FAMILIES)
    def test_an_empty_batch_has_no_logits(self, name):
        assert all(make_model(name).train(mode)(images(0)).shape == (0, 10) for mode in (True, False))

    @pytest.mark.parametrize('name, kwargs', [
        (name, kwargs) for name in FAMILIES for kwargs in OPTIONS + OWN_OPTIONS[name]])
    def test_options_train_every_parameter(self, name, kwargs):
        model, x, asked = make_and_ask(name, **kwargs)
        output = model.train()(x, **asked)
        assert output.shape == (4, model.num_classes or model.num_features)
        assert_gradients_reach_every_parameter(model, output)

    @pytest.mark.parametrize('name', FAMILIES)
    @pytest.mark.parametrize('rate', [
        'drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate'])
    def test_every_dropout_acts_in_training_alone(self, name, rate):
        model, x = make_model(name, **{rate: 0.5}), images()
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))

    @pytest.mark.parametrize('name, kwargs', [*ASKED, FLAT])
    def test_weights_are_initialised_after_the_meta_device(self, name, kwargs):
        model = make_model(name, device='meta', **kwargs).to_empty(device='cpu')
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(float('nan'))
        model.init_weights()
        made = make_model(name, **kwargs).state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor.std(), made[name].std(), rtol=0.5, atol=1e-3, msg=name)
            torch.testing.assert_close(tensor.mean(), made[name].mean(), rtol=0., atol=0.2, msg=name)


class TestQuestions:

    @pytest.mark.parametrize('name', FAMILIES)
    def test_the_question_is_added_to_the_class_token(self, name):
        model = randomize(make_model(name, question_dim=5))
        x, question = images(dtype=torch.float64), torch.randn(1, 5)
        answer = model(x, question=question.expand(4, -1))
        with torch.no_grad():
            model.cls_token += model.question_embed.proj(question.double())
            model.question_embed.proj.bias.zero_()
        torch.testing.assert_close(model(x, question=torch.zeros(4, 5)), answer)

    @pytest.mark.parametrize('shape', [(5,), (4, 6), (3, 5), (4, 1, 5)])
    def test_a_misshapen_question_raises(self, shape):
        with pytest.raises(ValueError, match=r'question must have the shape \(4, 5\)'):
            make_model('test_ait', question_dim=5)(images(), question=torch.randn(shape))

    @pytest.mark.parametrize('question_dim, kwargs', [(5, {}), (0, dict(question=torch.zeros(4, 5)))])
    def test_a_missing_or_unwanted_question_raises(self, question_dim, kwargs):
        with pytest.raises(TypeError, match="argument:? 'question'"):
            make_model('test_ait', question_dim=question_dim)(images(), **kwargs)

    @pytest.mark.parametrize('name', FAMILIES)
    def test_the_classifier_is_what_timm_leaves_out_as_the_head(self, name):
        model = make_model(name, question_dim=5)
        others = dict(model.named_parameters()).keys() - {'head.weight', 'head.bias'}
        left = {id(parameter) for parameter in timm.models.model_parameters(model, exclude_head=True)}
        assert {name for name, parameter in model.named_parameters() if id(parameter) in left} == others

    @pytest.mark.parametrize('name', FAMILIES)
    def test_intermediates_take_the_question_and_do_not_return_it(self, name):
        model, x, asked = make_and_ask(name, question_dim=5)
        final, intermediates = model.eval().forward_intermediates(x, output_fmt='NLC', **asked)
        assert [tuple(y.shape) for y in intermediates] == [(4, n, 64) for n in NUM_FEATURES[name]]
        torch.testing.assert_close(final, model.forward_features(x, **asked))
        mask = torch.ones(65, 65, dtype=torch.bool) if name == 'test_ait' else None
        (last,) = model.get_intermediate_layers(x, 1, False, False, True, mask, **asked)  # with the norm
        torch.testing.assert_close(last, final[:, -last.shape[1]:])

    @pytest.mark.parametrize('name', WITH_GRIDS)
    def test_features_only_takes_no_question(self, name):
        with pytest.raises(ValueError, match='features_only'):
            make_model(name, question_dim=5, features_only=True)

    def test_threads_do_not_mix_their_questions(self):
        model, x = make_model('test_ait', question_dim=5).eval(), images(1)
        questions = torch.randn(40, 1, 5)

        def answer(question):
            return model.forward_intermediates(x, output_fmt='NLC', question=question)[0]

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(answer, questions))
        assert all(torch.equal(answer(question), given) for question, given in zip(questions, answers))


@pytest.mark.parametrize('name', SETS)
def test_without_a_position_embedding_the_order_of_the_patches_does_not_matter(name):
    model = randomize(make_model(name, pos_embed='none'))
    x, order = images(dtype=torch.float64), torch.randperm(64)
    logits, features = model(x), model.forward_features(x)
    expected = features[:, order] if name == 'test_set_transformer' else features  # tokens, or latents
    model.patch_embed.register_forward_hook(lambda module, inputs, patches: patches[:, order])
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.forward_features(x), expected, rtol=0, atol=1e-10)
    assert (features[1:] - features[:-1]).abs().max() > 1e-3


@pytest.mark.parametrize('name', FAMILIES)
def test_attention_maps_are_the_same_by_hooks_and_by_tracing(name, monkeypatch):
    monkeypatch.setattr(timm.layers.config, '_USE_FUSED_ATTN', 0)
    kwargs = dict(num_iterations=1) if name == 'test_perceiver' else {}  # iterations share their layers
    model, x = make_model(name, **kwargs).eval(), images()
    hooked, traced = [
        {name.rpartition('.')[0]: weights for name, weights in AttentionExtract(model, method=method)(x).items()}
        for method in ('hook', 'fx')]
    assert len(hooked) >= 3
    torch.testing.assert_close(hooked, traced)


class TestIntermediates:

    @pytest.mark.parametrize('name', WITH_GRIDS)
    def test_prefix_tokens_are_returned_beside_the_grid(self, name):
        model, x, asked = make_and_ask(name, reg_tokens=2, global_pool='token', question_dim=5)
        layers = model.eval().get_intermediate_layers(x, 3, reshape=True, return_prefix_tokens=True, norm=True, **asked)
        assert [tuple(grid.flatten(2).shape) for grid, _ in layers] == [(4, 64, n) for n in NUM_FEATURES[name]]
        assert [prefix.shape[1] for _, prefix in layers] == [model.num_prefix_tokens] * 3
        last = torch.cat([layers[-1][1], layers[-1][0].flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(last, model.forward_features(x, **asked))

    @pytest.mark.parametrize('name', WITH_GRIDS)
    def test_features_only(self, name):
        model = make_model(name, depth=2, features_only=True).eval()
        sides = [int(n ** 0.5) for n in NUM_FEATURES[name][:2]]
        assert [tuple(f.shape) for f in model(images())] == [(4, 64, side, side) for side in sides]
        assert model.feature_info.reduction() == [32 // side for side in sides]
        assert all(f.is_contiguous() for f in model(images()))

    @pytest.mark.parametrize('name', BASELINES)
    @pytest.mark.parametrize('index', [0, 1])
    def test_the_last_that_is_asked_for_is_final_with_stop_early(self, name, index):
        model, x = make_model(name).eval(), images()
        expected = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)[index]
        final, last = model.forward_intermediates(x, [index], False, False, True, 'NLC')
        assert torch.equal(final[:, model.num_prefix_tokens:], expected)
        assert len(last) == 1 and torch.equal(last[0], expected)

    @pytest.mark.parametrize('name', FAMILIES)
    @pytest.mark.parametrize('index', [0, 1, 2])
    def test_pruned_model_keeps_its_features_and_no_idle_parameters(self, name, index):
        model, x = make_model(name).eval(), images()
        expected = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)[index]
        assert model.prune_intermediate_layers([index], prune_norm=True) == [index]
        assert torch.equal(model(x)[:, model.num_prefix_tokens:], expected)
        assert_gradients_reach_every_parameter(model, model.train()(x))


@pytest.mark.parametrize('name', BASELINES)
def test_reset_classifier(name):
    model, x = make_model(name).eval(), images()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(3)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(3, 'max')
    maximum = model.forward_features(x)[:, model.num_prefix_tokens:].amax(dim=1)
    torch.testing.assert_close(model(x), model.head(getattr(model, 'fc_norm', torch.nn.Identity())(maximum)))


class TestState:

    @pytest.mark.parametrize('name', ['test_ait', 'test_centroid_transformer'])
    def test_keys_of_a_plain_vit_match_one_to_one(self, name):
        model = make_model(name)
        vit = timm.create_model(
            'test_vit', img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, mlp_ratio=4, num_classes=10,
            class_token=False, global_pool='avg')
        vit.load_state_dict({key: value for key, value in model.state_dict().items() if '.workspace.' not in key})

    @pytest.mark.parametrize('name', ['test_ait', *SETS, 'test_coordination'])
    def test_jax_weights_which_lack_some_of_its_own_are_refused(self, name):
        with pytest.raises(ValueError, match='JAX weights'):
            timm.models.load_checkpoint(make_model(name), 'B_16.npz')

    @pytest.mark.parametrize('name', BASELINES)
    def test_a_checkpoint_is_resampled_to_another_size(self, name):
        source = make_model(name, question_dim=5).state_dict()
        model = load(name, source, question_dim=5, img_size=48, patch_size=8, in_chans=1, num_classes=5).eval()
        assert model(images(size=48, in_chans=1), question=torch.randn(4, 5)).shape == (4, 5)
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, source[key])}
        assert changed == {'pos_embed', 'patch_embed.proj.weight', 'head.weight', 'head.bias'}

    @pytest.mark.parametrize('name', FAMILIES)
    def test_a_saved_model_of_another_input_size_and_pooling_is_the_same_again(self, name, tmp_path):
        source = make_model(name, question_dim=5, num_classes=7, **OWN_SHAPES[name]).eval()
        source.set_input_size(img_size=(48, 48), patch_size=(8, 8))
        source.reset_classifier(7, 'avg')
        x, question = images(size=48), torch.randn(4, 5)
        timm.models.save_for_hf(source, tmp_path, model_args=source._model_args, safe_serialization=True)
        model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert torch.equal(model(x, question=question), source(x, question=question))


class TestTraining:

    @pytest.mark.parametrize('name, kwargs', ASKED + CONVERTED)
    def test_gradient_checkpointing_changes_no_gradient(self, name, kwargs):
        plain, x, asked = make_and_ask(name, **kwargs)
        checkpointed = copy.deepcopy(plain)
        checkpointed.set_grad_checkpointing()
        calls = []
        for model in (plain, checkpointed):
            layer = next(module for module in model.blocks.modules() if isinstance(module, nn.LayerNorm))
            layer.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
            (model.train()(x, **asked).square().sum() + balance_loss(model)).backward()
        assert calls.count(layer) > len(calls) / 2  # also in the backward
        for (key, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f'{key}: {m}')

    @pytest.mark.parametrize('name', FAMILIES)
    def test_layer_decay_follows_depth(self, name):
        model = make_model(name, question_dim=5, **({'gated': True} if name == 'test_ait' else {}))
        groups = param_groups_layer_decay(
            model, layer_decay=0.5, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
        group_of = {id(p): group for group in groups for p in group['params']}
        scales = [
            {group_of[id(model.get_parameter(parameter))]['lr_scale'] for parameter in layer}
            for layer in [[*STEM, *IN_STEM.get(name, [])], *LAYERS[name]]]
        assert all(len(scale) == 1 for scale in scales), scales
        scales = [scale.pop() for scale in scales]
        assert scales == sorted(set(scales)) and scales[-1] == 1.
        undecayed = ['pos_embed', 'head.bias', *IN_STEM.get(name, []), *UNDECAYED.get(name, [])]
        assert {group_of[id(model.get_parameter(parameter))]['weight_decay'] for parameter in undecayed} == {0.}


def compiled_without_graph_breaks(model, x, asked):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend='eager')


def exported(model, x, asked):
    return torch.export.export(model, (x,), asked).module()


def scripted(model, x, asked):
    script = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    if asked:  # said in docs/deployment.md
        with pytest.raises(RuntimeError):
            torch.jit.load(buffer)
        return script
    return torch.jit.load(buffer)


def traced_by_fx(model, x, asked):
    return GraphExtractNet(model, ['head']).eval()


@pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning')
@pytest.mark.parametrize('compiler, name, kwargs', [
    (compiler, *case) for compiler, cases in {
        compiled_without_graph_breaks: [*ASKED, CONVERTED[1]],
        exported: ASKED + CONVERTED,
        scripted: [*ASKED, ('test_perceiver', {}), FLAT, *CONVERTED],
        traced_by_fx: CONVERTED,
    }.items() for case in cases])
def test_a_compiler_computes_the_same(compiler, name, kwargs):
    model, x, asked = make_and_ask(name, **{**kwargs, 'depth': 2})
    program = compiler(model.eval(), x, asked)
    torch.testing.assert_close(program(x, **asked), model(x, **asked), atol=1e-4, rtol=1e-4)
