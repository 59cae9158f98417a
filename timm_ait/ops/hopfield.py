""" Fused Hopfield read for training.

Two skinny GEMMs and a softmax over the slots, done in chunks of tokens that stay in cache. Tokens are normed where they
are used, and backward recomputes norm and softmax from them, so that nothing else of the tokens' size is kept.
"""
from typing import Optional, Tuple

import torch

from . import triton_switch
from .matmul import mm
from .norm import chunk_size, normalize, normalize_backward

__all__ = ['norm_read', 'read']


def _association(state: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.softmax(mm(state, keys.T), dim=-1)


@torch.library.custom_op('timm_ait::read', mutates_args=())
def _read(
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        residual: Optional[torch.Tensor],
        norm_weight: Optional[torch.Tensor],
        norm_bias: Optional[torch.Tensor],
        eps: float,
        gated: bool,
) -> torch.Tensor:
    """residual + softmax(state keys^T) values, of the state norm(x) or x.

    The residual is x if gated, else what is given, else the state.
    """
    if triton_switch.is_on(x):
        from . import triton
        state, _ = normalize(x, norm_weight, norm_bias, eps)
        return triton.read(state, keys, values, x if gated else residual)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = chunk_size(x)
    for start in range(0, x.shape[0], size):
        chunk = slice(start, start + size)
        state, _ = normalize(x[chunk], norm_weight, norm_bias, eps)
        base = x[chunk] if gated else state if residual is None else residual[chunk]
        torch.add(base, mm(_association(state, keys), values), out=output[chunk])
    return output


@_read.register_fake
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op('timm_ait::read_backward', mutates_args=())
def _read_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        norm_weight: Optional[torch.Tensor],
        norm_bias: Optional[torch.Tensor],
        eps: float,
        gated: bool,
        state_is_residual: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, keys, values and norm (2, E)."""
    # sums over chunks stay in float32
    grad_keys = torch.zeros_like(keys, dtype=torch.promote_types(keys.dtype, torch.float32))
    grad_values = torch.zeros_like(grad_keys)
    grad_norm = grad_keys.new_zeros((2, x.shape[1]))
    if triton_switch.is_on(x):
        from . import triton
        state, statistics = normalize(x, norm_weight, norm_bias, eps)
        grad_state, grad_keys, grad_values = triton.read_backward(grad, state, keys, values, state_is_residual)
        grad_x = normalize_backward(grad_state, x, norm_weight, norm_bias, statistics, grad_norm).to(x.dtype)
        return grad_x + grad if gated else grad_x, grad_keys, grad_values, grad_norm
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = chunk_size(x)
    for start in range(0, x.shape[0], size):
        chunk = slice(start, start + size)
        state, statistics = normalize(x[chunk], norm_weight, norm_bias, eps)
        association = _association(state, keys)
        grad_values += mm(association.T, grad[chunk])
        grad_association = mm(grad[chunk], values.T)
        mean = (association * grad_association).sum(dim=-1, keepdim=True)
        grad_scores = association * (grad_association - mean)
        grad_keys += mm(grad_scores.T, state)
        grad_state = grad_x[chunk]
        if state_is_residual:
            torch.add(grad[chunk], mm(grad_scores, keys), out=grad_state)
        else:
            grad_state.copy_(mm(grad_scores, keys))
        if norm_weight is not None:
            grad_state.copy_(normalize_backward(grad_state, x[chunk], norm_weight, norm_bias, statistics, grad_norm))
        if gated:
            grad_x[chunk] += grad[chunk]
    return grad_x, grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_norm


@_read_backward.register_fake
def _(grad, x, keys, values, *_):
    grad_norm = keys.new_empty((2, x.shape[1]), dtype=torch.promote_types(keys.dtype, torch.float32))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(keys), torch.empty_like(values), grad_norm


def _setup_context(ctx, inputs, output) -> None:
    x, keys, values, residual, norm_weight, norm_bias, ctx.eps, ctx.gated = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, keys, values, norm_weight, norm_bias)


def _backward(ctx, grad):
    *tensors, norm_weight, norm_bias = ctx.saved_tensors
    state_is_residual = not ctx.gated and not ctx.has_residual
    grad_x, grad_keys, grad_values, grad_norm = _read_backward(
        grad, *tensors, norm_weight, norm_bias, ctx.eps, ctx.gated, state_is_residual)
    grad_weight, grad_bias = (None, None) if norm_weight is None else grad_norm.to(norm_weight.dtype)
    grad_residual = grad if ctx.has_residual else None
    return grad_x, grad_keys, grad_values, grad_residual, grad_weight, grad_bias, None, None


_read.register_autograd(_backward, setup_context=_setup_context)


def read(
        state: torch.Tensor,
        attractors: torch.Tensor,
        beta: float = 1.,
        residual: Optional[torch.Tensor] = None,
        gate: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """As `naive.read`. Attractors and gate may be of higher precision than state and residual."""
    values = attractors if gate is None else attractors * gate
    keys = beta * attractors
    return torch.ops.timm_ait.read(
        state, keys.to(state.dtype), values.to(state.dtype), residual, None, None, 0., False)


def norm_read(
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        attractors: torch.Tensor,
        beta: float = 1.,
        gate: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`read` of the layer-normed x, or with a gate `x + gate * retrieve(norm(x))`, in one pass over x.

    Args:
        x: (T, E).
        norm_weight: Scale of the layer norm (E,).
        norm_bias: Shift of the layer norm (E,).
        eps: That of the layer norm.
        attractors: (M, E), may be of higher precision than x.
        beta: Inverse temperature.
        gate: (E,), for the gated residual.

    Returns:
        Same shape and dtype as x.
    """
    values = attractors if gate is None else attractors * gate
    keys = beta * attractors
    return torch.ops.timm_ait.read(
        x, keys.to(x.dtype), values.to(x.dtype), None, norm_weight, norm_bias, eps, gate is not None)
