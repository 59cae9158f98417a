""" The Triton kernels against naive.py: on a GPU where there is one, otherwise in Triton's interpreter. """
import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from timm_ait.layers import GlobalWorkspace
from timm_ait.ops import naive

pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is optional')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: dict(atol=2e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=2e-2, rtol=2e-2),
    torch.float16: dict(atol=3e-3, rtol=3e-3),
}

# queries, width, tokens, bottleneck
ATTEND_GRID = [
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


def check_attend(queries, tokens, bottleneck):
    """Selection against a dense top-k, then values and gradients of the selected tokens against naive.attend."""
    num_queries, width = queries.shape
    k = min(bottleneck, tokens.shape[0])
    pooled, weights, indices = kernels().attend(queries, tokens, bottleneck)
    assert pooled.dtype == weights.dtype == torch.float32 and indices.dtype == torch.long
    exact_queries, exact_tokens = exact(queries), exact(tokens)

    scores = (exact_queries @ exact_tokens.T).detach()
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)
    assert selected.sum(dim=1).eq(k).all()
    # rounding may swap tokens whose scores are that close
    slack = torch.finfo(queries.dtype).eps * scores.abs().max()
    assert (scores.gather(1, indices) >= scores.topk(k).values[:, -1:] - slack).all()

    # each query is a head of one slot, and has its own tokens; naive.attend divides scores by the root of the width
    own = exact_tokens[indices]
    expected_pooled, expected_weights = naive.attend(exact_queries.unsqueeze(1) * width ** 0.5, own, own, k)
    check_close(pooled, expected_pooled.squeeze(1), queries.dtype)
    check_close(weights, expected_weights.squeeze(1), queries.dtype)

    grad_pooled = randn(num_queries, width, dtype=queries.dtype, seed=1)
    grad_weights = randn(num_queries, k, seed=2)
    grads = kernels().attend_backward(grad_pooled, grad_weights, queries, tokens, weights, indices)
    expected_grads = torch.autograd.grad(
        (expected_pooled.squeeze(1), expected_weights.squeeze(1)),
        (exact_queries, exact_tokens),
        (grad_pooled.double(), grad_weights.double()),
    )
    for grad, expected in zip(grads, expected_grads):
        assert grad.dtype == queries.dtype
        check_close(grad, expected, queries.dtype)


def check_random_attend(num_queries, width, num_tokens, bottleneck, dtype, transposed=False, chunk=None):
    queries = randn(num_queries, width, dtype=dtype, transposed=transposed, seed=3) / width ** 0.5
    tokens = randn(num_tokens, width, dtype=dtype, transposed=transposed, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels(), '_CHUNK', chunk or kernels()._CHUNK)
        check_attend(queries, tokens, bottleneck)


def check_tied_attend(dtype):
    tokens = randn(4, 24, dtype=dtype).repeat(5, 1)
    check_attend(randn(4, 24, dtype=dtype, seed=1) / 5, tokens, 7)


def check_read(num_tokens, width, num_slots, dtype, with_residual, transposed=False):
    state = randn(num_tokens, width, dtype=dtype, transposed=transposed)
    keys = randn(num_slots, width, dtype=dtype, transposed=transposed, seed=1) / 2
    values = randn(num_slots, width, dtype=dtype, transposed=transposed, seed=2)
    residual = randn(num_tokens, width, dtype=dtype, transposed=transposed, seed=3) if with_residual else None
    grad = randn(num_tokens, width, dtype=dtype, transposed=transposed, seed=4)

    output = kernels().read(state, keys, values, residual)
    inputs = [exact(x) for x in (state, keys, values)]
    # keys that differ from values stand for a temperature or a gate, which naive.read applies itself
    expected = (inputs[0] @ inputs[1].T).softmax(dim=-1) @ inputs[2]
    expected = expected + (inputs[0] if residual is None else residual.double())
    assert output.dtype == dtype
    check_close(output, expected.detach(), dtype)

    grads = kernels().read_backward(grad, state, keys, values, residual is None)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, inputs, grad.double())):
        assert actual.dtype == dtype
        check_close(actual, wanted, dtype)


def check_read_is_naive():
    state, attractors = randn(37, 12), randn(5, 12, seed=1)
    check_close(
        kernels().read(state, 0.7 * attractors, attractors),
        naive.read(state.double(), attractors.double(), 0.7),
        torch.float32,
    )


def check_refusals():
    double = randn(8, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match='float64'):
        kernels().attend(double, double, 2)
    with pytest.raises(TypeError, match='float64'):
        kernels().read(double, double, double)
    with pytest.raises(ValueError, match='at most 512 slots, got 513'):
        kernels().read(randn(8, 4), randn(513, 4), randn(513, 4))


def check_layer(gated):
    layers = []
    for backend in ('torch', 'triton'):
        torch.manual_seed(0)
        layer = GlobalWorkspace(
            24, num_slots=8, slot_dim=16, num_heads=4, bottleneck=10, gated=gated, backend=backend).to(DEVICE)
        if gated:
            torch.nn.init.ones_(layer.gate)
        x = randn(4, 9, 24).requires_grad_()
        output = layer(x)
        (output.square().sum() + layer.balance_loss).backward()
        layers.append((output, x.grad, layer.memory, *(parameter.grad for parameter in layer.parameters())))
    for actual, expected in zip(*reversed(layers)):
        check_close(actual, expected.double(), torch.float32)


@pytest.mark.parametrize('gated', [False, True])
def test_layer_with_triton_is_the_layer_with_torch(run, gated):
    run(check_layer, gated)


@pytest.mark.parametrize('shape', ATTEND_GRID)
@pytest.mark.parametrize('dtype', DTYPES)
def test_attend_matches_naive(run, shape, dtype):
    run(check_random_attend, *shape, dtype)


@pytest.mark.parametrize('dtype', DTYPES)
def test_tied_scores(run, dtype):
    run(check_tied_attend, dtype)


def test_attend_of_non_contiguous_inputs(run):
    run(check_random_attend, 5, 13, 11, 4, torch.float32, True)


@pytest.mark.parametrize('num_tokens, k', [(20, 3), (20, 10), (24, 8), (13, 16)])
def test_selection_streams_over_chunks(run, num_tokens, k):
    run(check_random_attend, 3, 24, num_tokens, k, torch.float32, False, 8)


@pytest.mark.parametrize('with_residual', [False, True])
@pytest.mark.parametrize('shape', READ_GRID)
@pytest.mark.parametrize('dtype', DTYPES)
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
        kernels().read(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4))


def test_missing_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.delitem(sys.modules, 'timm_ait.ops.triton', raising=False)
    with pytest.raises(ImportError, match='pip install triton'):
        kernels()
