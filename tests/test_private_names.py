""" Private names of torch and timm that the package uses without a fallback: what breaks when they go says so here. """
import pickle

import torch

import timm
from timm.models._features import feature_take_indices


def test_an_export_is_known():
    seen = []

    class Module(torch.nn.Module):

        def forward(self, x):
            seen.append(torch.compiler._is_exporting_flag)
            return x + 1.

    torch.export.export(Module(), (torch.zeros(2),), strict=False)
    assert all(seen) and seen and not torch.compiler._is_exporting_flag


def test_timm_saves_what_a_model_was_created_with():
    model = timm.create_model('test_vit', num_classes=3)
    assert model._model_args['num_classes'] == 3
    assert pickle.loads(pickle.dumps(model))._model_args == model._model_args


def test_timm_resolves_indices_of_intermediates():
    assert feature_take_indices(4, 2) == ([2, 3], 3)


def test_tensors_of_a_transform_are_known():
    seen = []
    torch.func.vmap(lambda x: seen.append(torch._C._functorch.is_functorch_wrapped_tensor(x)) or x)(torch.zeros(2))
    assert seen == [True] and not torch._C._functorch.is_functorch_wrapped_tensor(torch.zeros(2))
