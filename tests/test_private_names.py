""" Private names of torch and timm that the package uses without a fallback: what breaks when they go says so here. """
import pickle

import torch

import timm
from timm.models._features import feature_take_indices
from timm.models._input import get_pretrained_grid_size


def test_dot_products_with_selected_rows():
    a, b = torch.randn(2, 3), torch.randn(4, 3)
    rows, tokens, offsets = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1], [3, 0, 2], [0, 1]))
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, tokens, offsets, rows, 0)
    torch.testing.assert_close(dots, torch.stack([a[0] @ b[3], a[1] @ b[0], a[1] @ b[2]]))


def test_layer_norm_backward():
    x, weight, bias, grad = torch.randn(4, 3, requires_grad=True), torch.ones(3), torch.zeros(3), torch.randn(4, 3)
    output, *statistics = torch.native_layer_norm(x, (3,), weight, bias, 1e-5)
    grads = torch.ops.aten.native_layer_norm_backward(grad, x, (3,), *statistics, weight, bias, [True] * 3)
    torch.testing.assert_close(grads[0], torch.autograd.grad(output, x, grad)[0])


def test_a_running_backward_is_known():
    x = torch.zeros(1, requires_grad=True)
    y, seen = x * 1., []
    y.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
    y.backward()
    assert torch._C._current_graph_task_id() == -1 and seen[0] != -1


def test_changes_of_a_tensor_are_counted():
    x = torch.zeros(1)
    before = x._version
    x.detach().add_(1.)
    assert x._version > before


def test_tensors_of_a_transform_are_known():
    seen = []
    torch.func.vmap(lambda x: seen.append(torch._C._functorch.is_functorch_wrapped_tensor(x)) or x)(torch.zeros(2))
    assert seen == [True] and not torch._C._functorch.is_functorch_wrapped_tensor(torch.zeros(2))


def test_an_export_is_known():
    seen = []

    class Module(torch.nn.Module):

        def forward(self, x):
            seen.append(torch.compiler._is_exporting_flag)
            return x + 1.

    torch.export.export(Module(), (torch.zeros(2),), strict=False)
    assert all(seen) and seen and not torch.compiler._is_exporting_flag


def test_nodes_of_a_graph_carry_metadata():
    y = torch.zeros(1, requires_grad=True) * 1.
    y.grad_fn.metadata['name'] = 'value'
    assert y.grad_fn.metadata['name'] == 'value'


def test_timm_saves_what_a_model_was_created_with():
    model = timm.create_model('test_vit', num_classes=3)
    assert model._model_args['num_classes'] == 3
    assert pickle.loads(pickle.dumps(model))._model_args == model._model_args


def test_timm_resolves_indices_of_intermediates():
    assert feature_take_indices(4, 2) == ([2, 3], 3)


def test_timm_knows_the_grid_of_a_checkpoint():
    model = timm.create_model('test_vit')
    assert get_pretrained_grid_size(model, torch.empty(64, 3, 16, 16), 100) == (10, 10)
    assert get_pretrained_grid_size(model, torch.empty(64, 3, 16, 16), 99) is None
