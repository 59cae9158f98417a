""" The Triton kernels against naive.py: on a GPU where there is one, otherwise in Triton's interpreter. """
import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from timm_ait.layers import GlobalWorkspace, balance_loss
from timm_ait.ops import naive, triton_switch

pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is optional')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCE = {
    torch.float32: dict(atol=2e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=2e-2, rtol=2e-2),
    torch.float16: dict(atol=3e-3, rtol=3e-3),
}

# queries, width, tokens, bottleneck
POOL_GRID = [
    (6, 24, 20, 7),
    (6, 24, 19, 1),
    (5, 13, 11, 10),
    (5, 13, 11, 11),
    (4, 24, 9, 512),
    (1, 24, 20, 10),
    (5, 24, 1, 4),
    (2, 130, 41, 35),
    (20, 16, 5, 4),
]
# tokens, width, slots
READ_GRID = [(64, 24, 8), (1, 24, 8), (0, 24, 8), (129, 13, 5), (37, 130, 40), (20, 8, 1), (33, 16, 100)]


@pytest.fixture(scope='module')
def run():
    """Calls a function where kernels can run.

    Without a GPU that is a process of its own: the interpreter must be asked for before Triton is first imported, and
    what else imports it in this process must not get it.
    """
    if DEVICE == 'cuda':
        yield lambda function, *args: function(*args)
        return
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context('spawn')) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('TRITON_INTERPRET', '1')
            pool.submit(int).result()  # starts the process
        yield lambda function, *args: pool.submit(function, *args).result()


def kernels():
    return importlib.import_module('timm_ait.ops.triton')


def randn(*shape, dtype=torch.float32, transposed=False, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.T.contiguous().T if transposed else x


def exact(x):
    return x.detach().double().requires_grad_()


def check_close(actual, expected, dtype):
    assert actual.shape == expected.shape and actual.isfinite().all()
    scale = expected.abs().max().clamp_min(1e-3) if expected.numel() else 1.
    torch.testing.assert_close(actual.double() / scale, expected / scale, **TOLERANCE[dtype])


def check_pool(num_queries, width, num_tokens, k, dtype, transposed=False):
    """Values, and gradients with weights that are exponentials of scores, against the equation in float64."""
    queries = randn(num_queries, width, dtype=dtype, transposed=transposed, seed=3) / width ** 0.5
    tokens = randn(num_tokens, width, dtype=dtype, transposed=transposed, seed=4)
    k = min(k, num_tokens)
    indices = torch.rand(num_queries, num_tokens, generator=torch.Generator().manual_seed(5)).topk(k).indices.to(DEVICE)
    exact_queries, exact_tokens = exact(queries), exact(tokens)
    expected_weights = (exact_queries @ exact_tokens.T).gather(1, indices).exp()
    expected = torch.einsum('rk,rke->re', expected_weights, exact_tokens[indices])
    weights = expected_weights.detach().float()
    pooled = kernels().pool(tokens, weights, indices)
    assert pooled.dtype == torch.float32
    check_close(pooled, expected.detach(), dtype)

    grad_pooled = randn(num_queries, width, dtype=dtype, seed=1)
    grad_weights = randn(num_queries, k, seed=2)
    grads = kernels().pool_backward(grad_pooled, grad_weights, queries, tokens, weights, indices)
    expected_grads = torch.autograd.grad(
        (expected, expected_weights), (exact_queries, exact_tokens), (grad_pooled.double(), grad_weights.double()))
    for grad, wanted in zip(grads, expected_grads):
        assert grad.dtype == dtype
        check_close(grad, wanted, dtype)


def check_read(num_tokens, width, num_slots, dtype, with_residual, transposed=False):
    state = randn(num_tokens, width, dtype=dtype, transposed=transposed)
    keys = randn(num_slots, width, dtype=dtype, transposed=transposed, seed=1) / 2
    values = randn(num_slots, width, dtype=dtype, transposed=transposed, seed=2)
    residual = randn(num_tokens, width, dtype=dtype, transposed=transposed, seed=3) if with_residual else state
    grad = randn(num_tokens, width, dtype=dtype, transposed=transposed, seed=4)

    output = kernels().read(state, keys, values, residual)
    inputs = [exact(x) for x in (state, keys, values)]
    # keys that differ from values stand for a temperature or a gate, which naive.read applies itself
    expected = (inputs[0] @ inputs[1].T).softmax(dim=-1) @ inputs[2]
    expected = expected + (residual.double() if with_residual else inputs[0])
    assert output.dtype == dtype
    check_close(output, expected.detach(), dtype)

    grads = kernels().read_backward(grad, state, keys, values, not with_residual)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, inputs, grad.double())):
        assert actual.dtype == dtype
        check_close(actual, wanted, dtype)


def check_read_is_naive():
    state, attractors = randn(37, 12), randn(5, 12, seed=1)
    check_close(
        kernels().read(state, 0.7 * attractors, attractors, state),
        naive.read(state.double(), attractors.double(), 0.7),
        torch.float32,
    )


def check_refusals():
    double = randn(8, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match='float64'):
        kernels().pool(double, double, torch.zeros(8, 4, dtype=torch.long))
    with pytest.raises(TypeError, match='float64'):
        kernels().read(double, double, double, double)
    with pytest.raises(ValueError, match='at most 512 slots, got 513'):
        kernels().read(randn(8, 4), randn(513, 4), randn(513, 4), randn(8, 4))


def check_layer(gated):
    layers = []
    for switch in ('0', '1'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('TIMM_AIT_TRITON', switch)
            torch.manual_seed(0)
            layer = GlobalWorkspace(24, num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=10, gated=gated)
            layer.to(DEVICE)
            if gated:
                torch.nn.init.ones_(layer.gate)
            x = randn(4, 9, 24).requires_grad_()
            output = layer(x)
            (output.square().sum() + balance_loss(layer)).backward()
            layers.append((output, x.grad, layer.pending, *(parameter.grad for parameter in layer.parameters())))
    for actual, expected in zip(*reversed(layers)):
        check_close(actual, expected.double(), torch.float32)


def check_switch():
    tensors = [torch.zeros(1, device=DEVICE, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    results = []
    for switch in ('0', '1'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('TIMM_AIT_TRITON', switch)
            results.append([triton_switch.is_on(x) for x in tensors])
    assert results == [[False, False], [True, False]]


@pytest.mark.parametrize('gated', [False, True])
def test_layer_with_triton_is_the_layer_with_torch(run, gated):
    run(check_layer, gated)


def test_the_environment_turns_the_kernels_on(run):
    run(check_switch)


@pytest.mark.parametrize('shape, dtype', [
    *((shape, torch.float32) for shape in POOL_GRID),
    *((shape, dtype) for shape in (POOL_GRID[0], POOL_GRID[7]) for dtype in (torch.bfloat16, torch.float16))])
def test_pool_matches_its_equation(run, shape, dtype):
    run(check_pool, *shape, dtype)


def test_pool_of_non_contiguous_inputs(run):
    run(check_pool, 5, 13, 11, 4, torch.float32, True)


@pytest.mark.parametrize('with_residual', [False, True])
@pytest.mark.parametrize('shape, dtype', [
    *((shape, torch.float32) for shape in READ_GRID),
    *((shape, dtype) for shape in (READ_GRID[0], READ_GRID[4]) for dtype in (torch.bfloat16, torch.float16))])
def test_read_matches_its_equation(run, shape, dtype, with_residual):
    run(check_read, *shape, dtype, with_residual)


def test_read_matches_naive(run):
    run(check_read_is_naive)


@pytest.mark.parametrize('with_residual', [False, True])
def test_read_of_non_contiguous_inputs(run, with_residual):
    run(check_read, 37, 13, 5, torch.float32, with_residual, True)


def test_what_kernels_cannot_compute_is_refused(run):
    run(check_refusals)


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(RuntimeError, match='CUDA'):
        kernels().read(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, 4))


def test_missing_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.delitem(sys.modules, 'timm_ait.ops.triton', raising=False)
    with pytest.raises(ImportError, match='pip install triton'):
        kernels()
