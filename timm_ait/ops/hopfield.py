""" Fused Hopfield read for training.

Two skinny GEMMs and a softmax over the slots, done in chunks of tokens that stay in cache. Tokens are normed where they
are used, and backward recomputes norm and softmax from them, so that nothing else of the tokens' size is kept.
"""
from typing import Optional, Tuple

import torch

from .matmul import mm
from .naive import TokenNorm
from .norm import chunk_size, is_fused, normalize, normalize_backward

__all__ = ['read']


def _association(state: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.softmax(mm(state, keys.T), dim=-1)


@torch.library.custom_op('timm_ait::read', mutates_args=())
def _read(
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        gated: bool,
) -> torch.Tensor:
    """residual + softmax(state keys^T) values, of the state norm(x), which is the residual too unless gated: then x."""
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = chunk_size(x)
    for start in range(0, x.shape[0], size):
        chunk = slice(start, start + size)
        state, _ = normalize(x[chunk], norm_weight, norm_bias, eps)
        torch.add(x[chunk] if gated else state, mm(_association(state, keys), values), out=output[chunk])
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
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        gated: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for x, keys, values and norm (2, E)."""
    # sums over chunks stay in float32
    grad_keys = torch.zeros_like(keys, dtype=torch.promote_types(keys.dtype, torch.float32))
    grad_values = torch.zeros_like(grad_keys)
    grad_norm = grad_keys.new_zeros((2, x.shape[1]))
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
        grad_state = mm(grad_scores, keys)
        if not gated:
            grad_state += grad[chunk]
        grad_x[chunk] = normalize_backward(grad_state, x[chunk], norm_weight, norm_bias, statistics, grad_norm)
        if gated:
            grad_x[chunk] += grad[chunk]
    return grad_x, grad_keys.to(keys.dtype), grad_values.to(values.dtype), grad_norm


@_read_backward.register_fake
def _(grad, x, keys, values, *_):
    grad_norm = keys.new_empty((2, x.shape[1]), dtype=torch.promote_types(keys.dtype, torch.float32))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(keys), torch.empty_like(values), grad_norm


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.gated = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x, keys, values, norm_weight, norm_bias = ctx.saved_tensors
    grad_x, grad_keys, grad_values, grad_norm = _read_backward(
        grad, x, keys, values, norm_weight, norm_bias, ctx.eps, ctx.gated)
    return grad_x, grad_keys, grad_values, *grad_norm.to(norm_weight.dtype), None, None


_read.register_autograd(_backward, setup_context=_setup_context)


def read(
        x: torch.Tensor,
        norm: TokenNorm,
        attractors: torch.Tensor,
        beta: float = 1.,
        gate: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`naive.read` of the layer-normed x, or with a gate `x + gate * retrieve(norm(x))`, in one pass over x.

    Args:
        x: (T, E).
        norm: That layer norm.
        attractors: (M, E), may be of higher precision than x.
        beta: Inverse temperature.
        gate: (E,), for the gated residual.

    Returns:
        Same shape and dtype as x.
    """
    values = (attractors if gate is None else attractors * gate).to(x.dtype)
    keys = (beta * attractors).to(x.dtype)
    if is_fused(x):
        return torch.ops.timm_ait.read(x, keys, values, *norm, gate is not None)
    state, _ = normalize(x, *norm)
    return torch.addmm(state if gate is None else x, torch.softmax(state @ keys.T, dim=-1), values)
