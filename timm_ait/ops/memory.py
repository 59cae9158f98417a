""" The small algebra of the memory itself, (M, D): its update, in at least float32, and its statistics. """
import math
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F

from .graph import is_recomputed

# Polynomials a x + b x^3 + c x^5 that in turn take singular values to one. These take all in [1e-12, 1] there in the
# fewest steps, each as close to one as possible on the results of those before (The Polar Express, arXiv 2505.16932).
_FAST = (
    (8.43, -24.53822, 17.85658), *[(4.215, -3.06728, 0.55802)] * 12,
    (4.21487, -3.06719, 0.55801), (4.21445, -3.06690, 0.55798), (4.21266, -3.06569, 0.55784),
    (4.20516, -3.06060, 0.55727), (4.17391, -3.03938, 0.55490), (4.04836, -2.95370, 0.54532),
    (3.61097, -2.64924, 0.51133), (2.68564, -1.99706, 0.45483), (1.96292, -1.34457, 0.38458),
    (1.87521, -1.25023, 0.37502), (1.875, -1.25, 0.375),
)
# For derivatives, on [1e-6, 1]. Those that overshoot lose digits on the way, which float64 can spare.
_OF_DERIVATIVE = {torch.float64: _FAST[:1] + _FAST[11:], torch.float32: ((1.875, -1.25, 0.375),) * 27}


def _polar_by_products(matrix: torch.Tensor) -> torch.Tensor:
    """Polar factor of a wide matrix (M, D), M <= D, by products only: nothing waits for the device.

    In float64 where the device has it. What a matrix lacks to full rank is taken from cosines.
    """
    dtype = matrix.dtype if matrix.device.type == 'mps' else torch.float64
    rows, columns = (torch.arange(n, device=matrix.device, dtype=dtype) for n in matrix.shape)
    cosines = (math.pi / len(columns) * rows.unsqueeze(-1) * (columns + 0.5)).cos()
    x = matrix.to(dtype)
    x = x / x.norm().clamp_min(torch.finfo(dtype).tiny) + 1e-8 * cosines
    # the fourth root of sum(s^4): at least the largest singular value, and tight where few dominate
    x = x / (1.01 * (x @ x.T).norm().sqrt())
    for a, b, c in _FAST:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrix.dtype)


def _polar_derivative_by_products(matrix: torch.Tensor, factor: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Derivative of `_polar_by_products` in a direction (M, D), given the polar factor (M, D)."""
    dtype = matrix.dtype if matrix.device.type == 'mps' else torch.float64
    norm = matrix.detach().to(dtype).norm().clamp_min(torch.finfo(dtype).tiny)
    # a ridge on the singular values, by which derivatives divide, leaves the polar factor as it is
    ridge = max(10 * torch.finfo(matrix.dtype).eps, 1e-6)
    x, dx = matrix.to(dtype) / norm + ridge * factor, direction.to(dtype) / norm
    scale = 1.01 * (x.detach() @ x.detach().T).norm().sqrt()
    x, dx = x / scale, dx / scale
    for a, b, c in _OF_DERIVATIVE[dtype]:
        gram = x @ x.T
        half = dx @ x.T
        dgram = half + half.T
        half = dgram @ gram
        p, dp = torch.addmm(gram, gram, gram, beta=b, alpha=c), b * dgram + c * (half + half.T)
        x, dx = torch.addmm(x, p, x, beta=a), torch.addmm(dp @ x, p, dx) + a * dx
    return dx.to(matrix.dtype)


def _singular_values(matrix: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular values s (M,), left vectors U (M, M) and the polar factor (M, D) of a wide matrix, on the CPU.

    They come from the eigenvectors of its Gram matrix in float64, which for a small matrix cost less than its singular
    vectors, most of all where other threads are busy; for a badly conditioned matrix from its singular vectors.
    """
    wide = matrix.double()
    squares, u = torch.linalg.eigh(wide @ wide.T)
    s = squares.clamp_min(0.).sqrt()
    # squaring loses half of the digits
    if s[0] > s[-1] * (1e-3 if matrix.dtype == torch.float64 else 1e-5):
        return s, u, u @ (u.T @ wide / s.unsqueeze(1))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    return s, u, u @ vh


@torch.library.custom_op('timm_ait::polar', mutates_args=())
def _polar(matrix: torch.Tensor) -> torch.Tensor:
    """Polar factor of a wide matrix."""
    if matrix.device.type != 'cpu' or not matrix.isfinite().all():
        return _polar_by_products(matrix)
    return _singular_values(matrix)[2].to(matrix.dtype)


@torch.library.custom_op('timm_ait::polar_backward', mutates_args=())
def _polar_backward(matrix: torch.Tensor, factor: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient for a wide matrix with polar factor X: the derivative in the direction of the given gradient G.

    It is U Y U^T X + U diag(1/s) U^T (G - G X^T X), with Y_ij = (U^T (G X^T - X G^T) U)_ij / (s_i + s_j).
    """
    if matrix.device.type != 'cpu' or not (factor.isfinite().all() and grad.isfinite().all()):
        return _polar_derivative_by_products(matrix, factor, grad)
    s, u, x = _singular_values(matrix)
    s = s + 10 * torch.finfo(matrix.dtype).eps * s.norm().clamp_min(torch.finfo(s.dtype).tiny)
    g = grad.double()
    rotation = g @ x.T
    y = u.T @ (rotation - rotation.T) @ u / (s.unsqueeze(0) + s.unsqueeze(1))
    return (u @ (y @ (u.T @ x) + u.T @ (g - rotation @ x) / s.unsqueeze(1))).to(matrix.dtype)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _double_backward(ctx, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
    matrix, factor, direction, _ = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x if create_graph and x.requires_grad else x.detach().requires_grad_() for x in (matrix, direction)]
        derivative = _polar_derivative_by_products(inputs[0], factor.detach(), inputs[1])
        grad_matrix, grad_direction = torch.autograd.grad(derivative, inputs, grad, create_graph=create_graph)
    return grad_matrix, None, grad_direction


def _like(matrix: torch.Tensor, *_) -> torch.Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


_polar.register_fake(_like)
_polar.register_autograd(lambda ctx, grad: _polar_backward(*ctx.saved_tensors, grad), setup_context=_save)
_polar_backward.register_fake(_like)
_polar_backward.register_autograd(_double_backward, setup_context=_save)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Nearest matrix with orthonormal rows (M <= D) or columns (M > D), (M, D), in float32 or float64.

    Whatever the matrix, the result is orthonormal to 1e-4, also where the nearest one is not unique. A matrix that is
    not finite has a result of nan.
    """
    return _polar(matrix) if matrix.shape[0] <= matrix.shape[1] else _polar(matrix.T).T


def project_memory(memory: torch.Tensor, rule: str = 'orthogonal') -> torch.Tensor:
    """Nearest memory (M, D) that the update rule allows: orthonormal slots, or (rule 'normalize') of unit norm."""
    if rule == 'orthogonal':
        memory = polar(memory)
        if memory.shape[0] <= memory.shape[1]:
            return memory
    return F.normalize(memory, dim=-1)


def update_memory(
        memory: torch.Tensor,
        candidate: torch.Tensor,
        momentum: float = 0.9,
        rule: str = 'orthogonal',
) -> torch.Tensor:
    """As `naive.update_memory`."""
    return project_memory(torch.lerp(candidate, memory, momentum), rule)


@torch.library.custom_op('timm_ait::add_written_', mutates_args=('total', 'count'))
def add_written_(total: torch.Tensor, count: torch.Tensor, written: torch.Tensor) -> None:
    """Add a written memory (M, D) to a sum and count it, unless it is not finite, or its forward is computed again.

    An operator, since compiled code cannot ask whether it runs inside of backward.
    """
    if not is_recomputed():
        is_finite = written.isfinite().all()
        total.add_(torch.where(is_finite, written, 0.))
        count.add_(is_finite)


def slot_statistics(memory: torch.Tensor) -> Dict[str, float]:
    """How distinct the slots of a memory (M, D) are.

    Returns:
        'effective_rank': exp of the entropy of the normalised singular values, 1 (collapsed) to min(M, D).
        'mean_cosine': mean cosine of distinct slots, 1 when collapsed; nan for a single slot.
    """
    memory = F.normalize(memory.detach().float().cpu(), dim=-1)  # not every device has singular values
    s = torch.linalg.svdvals(memory)
    s = s / s.sum()
    num_pairs = memory.shape[0] * (memory.shape[0] - 1)
    cosines = memory @ memory.T
    return {
        'effective_rank': float(torch.exp(-torch.special.xlogy(s, s).sum())),
        'mean_cosine': float(cosines.sum() - cosines.trace()) / num_pairs if num_pairs else float('nan'),
    }
