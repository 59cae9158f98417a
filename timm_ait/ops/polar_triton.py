""" The polar factor of a small matrix and its derivative, a kernel each: as products one by one they are hundreds of
launches. A single program holds all of it, padded with zeros to powers of two, in float64. """
import torch
import triton
import triton.language as tl

from .memory import _FAST, _ridge

__all__ = ['MAX_SIZE', 'polar_derivative_kernel', 'polar_kernel']

MAX_SIZE = 64  # rows or columns
# Those of `_FAST` that take [1e-6, 1] to one. They are not monotone: derivatives lose digits that float64 can spare.
_FAST_DERIVATIVE = _FAST[:1] + _FAST[10:]


@triton.jit
def _load(pointer, M, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + rows * D + columns, mask=(rows < M) & (columns < D), other=0.).to(tl.float64)


@triton.jit
def _store(pointer, x, M, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(pointer + rows * D + columns, x.to(pointer.dtype.element_ty), mask=(rows < M) & (columns < D))


@triton.jit
def _product(x, y):
    return tl.dot(x, y, input_precision='ieee', out_dtype=tl.float64)


@triton.jit
def _norm(x):
    return tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0))


@triton.jit
def _nonzero_norm(x):
    norm = _norm(x)
    return tl.where(norm == 0, 1., norm)


@triton.jit
def _bound(x):
    """The fourth root of sum(s^4), with a margin: at least the largest singular value."""
    return 1.01 * tl.sqrt(_norm(_product(x, tl.trans(x))))


@triton.jit
def _select(i, VALUES: tl.constexpr):
    value = tl.full((), 0., tl.float32)
    for j in tl.static_range(len(VALUES)):
        value = tl.where(i == j, VALUES[j], value)
    return value


@triton.jit
def _polar(matrix, out, M, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = _load(matrix, M, D, ROWS, COLUMNS)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    cosines = tl.cos(rows.to(tl.float64) * (columns.to(tl.float64) + 0.5) * 3.141592653589793 / D)
    x = x / _nonzero_norm(x) + tl.where((rows < M) & (columns < D), 1e-8 * cosines, 0.)
    x = x / _bound(x)
    for i in range(len(A)):
        a, b, c = _select(i, A), _select(i, B), _select(i, C)
        gram = _product(x, tl.trans(x))
        x = a * x + _product(b * gram + c * _product(gram, gram), x)
    _store(out, x, M, D, ROWS, COLUMNS)


@triton.jit
def _polar_derivative(matrix, factor, direction, out, M, D, ridge, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                      A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    x = _load(matrix, M, D, ROWS, COLUMNS)
    norm = _nonzero_norm(x)
    x = x / norm + ridge * _load(factor, M, D, ROWS, COLUMNS)
    dx = _load(direction, M, D, ROWS, COLUMNS) / norm
    bound = _bound(x)
    x, dx = x / bound, dx / bound
    for i in range(len(A)):
        a, b, c = _select(i, A), _select(i, B), _select(i, C)
        gram = _product(x, tl.trans(x))
        half = _product(dx, tl.trans(x))
        dgram = half + tl.trans(half)
        half = _product(dgram, gram)
        dp = b * dgram + c * (half + tl.trans(half))
        p = b * gram + c * _product(gram, gram)
        dx = a * dx + _product(p, dx) + _product(dp, x)
        x = a * x + _product(p, x)
    _store(out, dx, M, D, ROWS, COLUMNS)


def _layout(matrix: torch.Tensor, polynomials) -> dict:
    """Options of a launch, from a matrix (M, D) and the polynomials to apply."""
    rows, columns = (max(16, triton.next_power_of_2(n)) for n in matrix.shape)
    a, b, c = zip(*polynomials)
    return dict(ROWS=rows, COLUMNS=columns, A=a, B=b, C=c, num_warps=4 if columns <= 32 else 8, num_stages=1)


def polar_kernel(matrix: torch.Tensor) -> torch.Tensor:
    """As `memory._polar_by_products`, of a matrix on a GPU with M <= D <= MAX_SIZE."""
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    with torch.cuda.device_of(matrix):
        _polar[(1,)](matrix.contiguous(), out, *matrix.shape, **_layout(matrix, _FAST))
    return out


def polar_derivative_kernel(matrix: torch.Tensor, factor: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """As `memory._polar_derivative_by_products`, of a matrix on a GPU with M <= D <= MAX_SIZE. Not differentiable."""
    out = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    inputs = [x.contiguous() for x in (matrix, factor, direction)]
    ridge = max(_ridge(matrix.dtype), 1e-6)
    with torch.cuda.device_of(matrix):
        _polar_derivative[(1,)](*inputs, out, *matrix.shape, ridge, **_layout(matrix, _FAST_DERIVATIVE))
    return out
