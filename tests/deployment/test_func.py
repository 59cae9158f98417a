""" Derivatives of evaluation by `torch.func`. """
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.deployment import images, make_ait, other_memory, workspaces


@pytest.fixture(autouse=True)
def differentiable_attention():
    """PyTorch's attention of equations; its fused kernels have no second derivatives, in a ViT neither."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def make_double(**kwargs):
    return make_ait(**kwargs).double()


def doubles(batch_size=2, seed=1):
    return images(batch_size, seed=seed, dtype=torch.float64)


def finite_difference(function, x, direction, step=1e-5):
    with torch.no_grad():
        return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


class TestJvp:

    @pytest.mark.parametrize('requires_grad', [True, False])
    def test_of_images(self, requires_grad):
        model, x, direction = make_double().requires_grad_(requires_grad), doubles(), doubles(seed=2)
        _, tangent = jvp(model, (x,), (direction,))
        expected = finite_difference(model, x, direction)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(tangent, expected, atol=1e-7, rtol=1e-5)

    @pytest.mark.parametrize('kwargs', [dict(gated=True), dict(beta=2., retrieval_steps=2)], ids=['gated', 'two_steps'])
    def test_of_a_workspace_of_another_kind(self, kwargs):
        layer = workspaces(make_double(**kwargs))[0]
        x, direction = torch.randn(2, 3, 5, 64, dtype=torch.float64)
        _, tangent = jvp(layer, (x,), (direction,))
        torch.testing.assert_close(tangent, finite_difference(layer, x, direction), atol=1e-7, rtol=1e-5)


class TestVmap:

    def test_gradients_of_each_image(self):
        model, x, labels = make_double(), doubles(3), torch.arange(3)
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(p, image, label):
            return F.cross_entropy(functional_call(model, p, image[None]), label[None])
        per_image = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
        for i in range(3):
            expected = torch.autograd.grad(
                F.cross_entropy(model(x[i:i + 1]), labels[i:i + 1]), list(model.parameters()), allow_unused=True)
            for gradients, wanted in zip(per_image.values(), expected):
                torch.testing.assert_close(gradients[i], torch.zeros_like(gradients[i]) if wanted is None else wanted)

    def test_over_an_ensemble_with_different_memories(self):
        models = [make_double() for _ in range(2)]
        other_memory(models[1])
        parameters, buffers = stack_module_state(models)
        base = copy.deepcopy(models[0])
        x = doubles()
        logits = vmap(lambda p, b: functional_call(base, (p, b), x))(parameters, buffers)
        for actual, model in zip(logits, models):
            torch.testing.assert_close(actual, model(x))
