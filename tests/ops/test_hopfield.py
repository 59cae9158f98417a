""" The fused read against naive.py. """
import pytest
import torch

from timm_ait.ops import hopfield, naive

TOLERANCE = {
    torch.float64: dict(atol=1e-10, rtol=1e-8),
    torch.float32: dict(atol=1e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=5e-2, rtol=5e-2),
    torch.float16: dict(atol=1e-2, rtol=1e-2),
}
SHAPES = [(64, 24, 8), (1, 24, 8), (1025, 12, 5), (2048, 8, 1), (37, 13, 40)]


def make_inputs(num_tokens, dim, num_slots, dtype, residual=False, gate=False):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return dict(
        state=randn(num_tokens, dim),
        attractors=randn(num_slots, dim),
        residual=randn(num_tokens, dim) if residual else None,
        gate=randn(dim) if gate else None,
    )


def run(read, inputs, beta):
    output = read(**inputs, beta=beta)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    output.backward(cotangent)
    grads = {name: value.grad for name, value in inputs.items() if value is not None}
    return output.detach(), grads


@pytest.mark.parametrize('residual, gate', [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_read_matches_naive(shape, dtype, residual, gate):
    output, grads = run(hopfield.read, make_inputs(*shape, dtype, residual, gate), beta=0.7)
    exact = {
        name: value if value is None else value.detach().double().requires_grad_()
        for name, value in make_inputs(*shape, dtype, residual, gate).items()
    }
    expected, expected_grads = run(naive.read, exact, beta=0.7)
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().clamp_min(1e-3)
        torch.testing.assert_close(
            grad.double() / scale, expected_grads[name] / scale, **TOLERANCE[dtype], msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('residual, gate', [(False, False), (True, True)])
def test_read_has_the_gradient_of_its_definition(residual, gate):
    inputs = make_inputs(7, 5, 3, torch.float64, residual, gate)
    names = [name for name, value in inputs.items() if value is not None]
    assert torch.autograd.gradcheck(
        lambda *args: hopfield.read(**dict(zip(names, args)), beta=0.7), [inputs[name] for name in names])


def test_read_is_a_well_formed_operator():
    inputs = make_inputs(7, 5, 3, torch.float32, residual=True)
    args = (
        inputs['state'], inputs['attractors'], inputs['attractors'].detach().clone(), inputs['residual'], None, None,
        0., False)
    torch.library.opcheck(torch.ops.timm_ait.read, args)


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('shape', SHAPES + [(0, 12, 5)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm_read_is_a_layer_norm_and_the_naive_read(shape, dtype, gated):
    inputs = make_inputs(*shape, dtype, residual=True, gate=True)
    x, attractors, bias, gate = (inputs[name].detach() for name in ('state', 'attractors', 'residual', 'gate'))
    weight = torch.linspace(0.5, 2., x.shape[1], dtype=dtype)
    bias = bias[0] if len(bias) else torch.zeros_like(weight)
    output = hopfield.norm_read(x, weight, bias, 1e-5, attractors, 0.7, gate if gated else None)
    assert output.dtype == dtype
    exact = [value.double() for value in (x, weight, bias, attractors, gate)]
    x, weight, bias, attractors, gate = exact
    state = torch.nn.functional.layer_norm(x, x.shape[1:], weight, bias, 1e-5)
    expected = naive.read(state, attractors, 0.7, x if gated else None, gate if gated else None)
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize('gated', [False, True])
def test_norm_read_is_a_well_formed_operator(gated):
    x, weight, keys = (torch.randn(*shape, requires_grad=True) for shape in ((7, 5), (5,), (3, 5)))
    bias, values = weight.detach().clone().requires_grad_(), keys.detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.timm_ait.read, (x, keys, values, None, weight, bias, 1e-5, gated))


@pytest.mark.parametrize('gated', [False, True])
def test_norm_read_has_the_gradient_of_its_definition(gated):
    shapes = [(7, 5), (5,), (5,), (3, 5), (5,)]
    x, weight, bias, attractors, gate = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, attractors, gate: hopfield.norm_read(
            x, weight, bias, 1e-5, attractors, 0.7, gate if gated else None),
        (x, weight, bias, attractors, gate) if gated else (x, weight, bias, attractors, gate.detach()))


def test_non_contiguous_state():
    state, attractors = torch.randn(12, 37).T, torch.randn(5, 12)
    torch.testing.assert_close(hopfield.read(state, attractors), naive.read(state, attractors))


def test_no_tokens():
    assert hopfield.read(torch.zeros(0, 12), torch.randn(5, 12)).shape == (0, 12)


def test_a_closed_gate_is_the_identity():
    residual = torch.randn(37, 12)
    output = hopfield.read(torch.randn(37, 12), torch.randn(5, 12), 1., residual, torch.zeros(12))
    assert torch.equal(output, residual)


def test_an_attractor_is_nearly_retrieved_at_large_beta():
    attractors = torch.eye(4)
    torch.testing.assert_close(naive.retrieve(attractors, attractors, 50.), attractors)
