""" The fused read against naive.py. """
import pytest
import torch
import torch.nn.functional as F

from timm_ait.ops import hopfield, naive

TOLERANCE = {
    torch.float64: dict(atol=1e-10, rtol=1e-8),
    torch.float32: dict(atol=1e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=5e-2, rtol=5e-2),
    torch.float16: dict(atol=1e-2, rtol=1e-2),
}
SHAPES = [(64, 24, 8), (1, 24, 8), (1025, 12, 5), (2048, 8, 1), (37, 13, 40)]


def make_inputs(num_tokens, dim, num_slots, dtype):
    """x, weight and bias of the norm, attractors, gate."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, attractors, gate = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((num_tokens, dim), (dim,), (dim,), (num_slots, dim), (dim,)))
    attractors /= dim ** 0.5  # associations with gradients well above rounding
    return [value.to(dtype).requires_grad_() for value in (x, weight, bias, attractors, gate)]


def fused_read(x, weight, bias, attractors, gate, gated):
    return hopfield.read(x, naive.TokenNorm(weight, bias, 1e-5), attractors, 0.7, gate if gated else None)


def naive_read(x, weight, bias, attractors, gate, gated):
    state = F.layer_norm(x, weight.shape, weight, bias, 1e-5)
    return naive.read(state, attractors, 0.7, x if gated else None, gate if gated else None)


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_read_is_a_layer_norm_and_the_naive_read(shape, dtype, gated):
    inputs = make_inputs(*shape, dtype)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    output, expected = fused_read(*inputs, gated), naive_read(*exact, gated)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])

    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(cotangent), expected.backward(cotangent.double())
    for value, exact_value in zip(inputs[:4 + gated], exact):
        scale = exact_value.grad.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(value.grad.double() / scale, exact_value.grad / scale, **TOLERANCE[dtype])


@pytest.mark.usefixtures('on_every_device')
@pytest.mark.parametrize('gated', [False, True])
def test_read_has_the_gradient_of_its_definition(gated):
    *inputs, gate = make_inputs(7, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *args: fused_read(*args, gated), [*inputs, gate if gated else gate.detach()])


@pytest.mark.parametrize('gated', [False, True])
def test_read_is_a_well_formed_operator(gated):
    x, weight, bias, keys, _ = make_inputs(7, 5, 3, torch.float32)
    values = keys.detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.timm_ait.read, (x, keys, values, weight, bias, 1e-5, gated))


@pytest.mark.usefixtures('on_every_device')
def test_non_contiguous_tokens():
    x, *others = make_inputs(37, 12, 5, torch.float32)
    torch.testing.assert_close(fused_read(x.T.contiguous().T, *others, True), naive_read(x, *others, True))


@pytest.mark.usefixtures('on_every_device')
def test_no_tokens():
    assert fused_read(*make_inputs(0, 12, 5, torch.float32), False).shape == (0, 12)


@pytest.mark.usefixtures('on_every_device')
def test_a_closed_gate_is_the_identity():
    x, *others, gate = make_inputs(37, 12, 5, torch.float32)
    assert torch.equal(fused_read(x, *others, torch.zeros_like(gate), True), x)


def test_an_attractor_is_nearly_retrieved_at_large_beta():
    attractors = torch.eye(4)
    torch.testing.assert_close(naive.retrieve(attractors, attractors, 50.), attractors)
