""" The paper's classifier, `global_pool='flat'`: a norm and a linear layer over the features of all tokens. """
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import timm
from timm.models import save_for_hf

from tests.models import images, load, make_model
from tests.models.equations import randomize

E, N = 64, 64

make_flat = partial(make_model, 'test_ait', global_pool='flat')


@pytest.mark.parametrize('name, paper', [('ait_small', 15.8), ('ait_medium', 45.9), ('ait_base', 91.0)])
def test_parameters_are_as_many_as_in_the_paper(name, paper):
    model = timm.create_model(name, global_pool='flat', num_classes=10, device='meta')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(paper, rel=0.005)


class TestForward:

    def test_logits_are_a_linear_map_of_all_normed_features(self):
        model, x = randomize(make_flat()), images(dtype=torch.float64)
        tokens = model.forward_features(x)
        assert tokens.shape == (4, N, E)
        flat = F.layer_norm(tokens.flatten(1), (N * E,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), flat)
        torch.testing.assert_close(model(x), flat @ model.head.weight.T + model.head.bias)
        assert (model.num_features, model.head_hidden_size) == (E, N * E)

    def test_fc_norm_false_puts_the_norm_there(self):
        model = make_flat(fc_norm=False)
        assert isinstance(model.fc_norm, torch.nn.Identity) and model.norm.normalized_shape == (E,)
        assert model(images()).shape == (4, 10)

    @pytest.mark.parametrize('include, num_tokens', [(False, N), (True, N + 3)])
    def test_prefix_tokens_are_flattened_if_they_are_to_be_pooled(self, include, num_tokens):
        model = make_flat(class_token=True, reg_tokens=2, pool_include_prefix=include)
        assert model.head_hidden_size == num_tokens * E
        assert model(images()).shape == (4, 10)

    def test_first_logits_are_of_a_size_that_does_not_grow_with_the_tokens(self):
        assert 0.2 < make_flat().eval()(images(16)).std() < 1.


@pytest.mark.parametrize('name, value', [('dynamic_img_size', True), ('patch_drop_rate', 0.5)])
def test_where_the_number_of_tokens_varies_it_is_refused(name, value):
    with pytest.raises(ValueError, match=f"'flat'.*{name}"):
        make_flat(**{name: value})
    model = make_flat(global_pool='avg', **{name: value})
    with pytest.raises(ValueError, match=f"'flat'.*{name}"):
        model.reset_classifier(3, 'flat')
    assert (model.global_pool, model.num_classes) == ('avg', 10)


class TestResetClassifier:

    def test_to_average_pooling_and_back(self):
        model, x = make_flat().eval(), images()
        model.reset_classifier(3, 'avg')
        assert (model.head_hidden_size, model.fc_norm.normalized_shape) == (E, (E,))
        expected = model.head(model.fc_norm(model.forward_features(x).mean(1)))
        torch.testing.assert_close(model(x), expected)
        model.reset_classifier(5, 'flat')
        assert not any(module.training for module in model.modules())
        assert (model.head_hidden_size, model.fc_norm.normalized_shape) == (N * E, (N * E,))
        assert model(x).shape == (4, 5)

    @pytest.mark.parametrize('first, second', [('flat', 'avg'), ('avg', 'flat'), ('flat', None)])
    def test_a_saved_model_has_the_new_one(self, tmp_path, first, second):
        model = make_flat(global_pool=first).eval()
        model.reset_classifier(3, second)
        save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert loaded.global_pool == (second or first)
        x = images()
        assert torch.equal(loaded(x), model(x))


def test_features_only():
    model = make_flat(features_only=True)
    assert [tuple(f.shape) for f in model(images())] == [(4, E, 8, 8)] * 3
    assert [name for name, _ in model.named_parameters() if 'head' in name or 'fc_norm' in name] == []


def test_another_image_size_is_refused():
    model = make_flat()
    with pytest.raises(ValueError, match="'flat'.*set_input_size"):
        model.set_input_size((64, 64))
    model.reset_classifier(3, 'avg')
    model.set_input_size((64, 64))
    assert model(images(size=64)).shape == (4, 3)


class TestCheckpoints:

    @pytest.mark.parametrize('saved, kwargs', [
        ('flat', dict(global_pool='avg')), ('avg', dict(global_pool='flat')),
        ('flat', dict(global_pool='flat', img_size=64)),
    ])
    def test_of_another_classifier_are_refused(self, saved, kwargs):
        message = r'global_pool or question_dim\?\), nothing was loaded: another shape: .*head.weight \(10, '
        with pytest.raises(RuntimeError, match=message):
            load('test_ait', make_flat(global_pool=saved).state_dict(), **kwargs)

    @pytest.mark.parametrize('saved', ['flat', 'avg'])
    @pytest.mark.parametrize('pool', ['flat', 'avg'])
    def test_of_any_pooling_serve_other_classes_at_another_size(self, saved, pool):
        weights = make_flat(global_pool=saved).state_dict()
        model = load('test_ait', weights, global_pool=pool, num_classes=3, img_size=64)
        assert torch.equal(model.blocks[0].mlp.fc1.weight, weights['blocks.0.mlp.fc1.weight'])
        assert model(images(size=64)).shape == (4, 3)
