""" Layer norm of a chunk of tokens inside of a fused operator, and its backward. """
from typing import Tuple

import torch

__all__ = ['chunk_size', 'is_fused', 'normalize', 'normalize_backward']

# bytes of tokens worked on at a time, so that they stay in the second-level cache beside what they are multiplied with
_CACHE = 3 << 19

Statistics = Tuple[torch.Tensor, torch.Tensor]


def is_fused(tokens: torch.Tensor) -> bool:
    """Whether the fused operators compute on tokens.

    They save passes over memory by many small steps. On a GPU it is the steps that cost, so there, and on every other
    device, plain PyTorch computes the same.
    """
    return tokens.device.type == 'cpu'


def chunk_size(tokens: torch.Tensor) -> int:
    """Number of tokens (T, E) to work on at a time."""
    return max(64, _CACHE // (tokens.shape[1] * tokens.element_size()))


def normalize(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, Statistics]:
    """Layer norm in the precision of its weight.

    Args:
        x: (C, E).
        weight: (E,).
        bias: (E,).
        eps: Added to the variance.

    Returns:
        The normed x in the dtype of x, and mean and inverse deviation for `normalize_backward`.
    """
    normed, mean, inverse_deviation = torch.native_layer_norm(
        x.contiguous().to(weight.dtype), weight.shape, weight, bias, eps)
    return normed.to(x.dtype), (mean, inverse_deviation)


def normalize_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        statistics: Statistics,
        grad_norm: torch.Tensor,
) -> torch.Tensor:
    """Gradient for x (C, E); adds those for weight and bias to the rows of grad_norm (2, E)."""
    grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(weight.dtype), x.contiguous().to(weight.dtype), weight.shape, *statistics, weight, bias, [True] * 3)
    grad_norm[0] += grads[1]
    grad_norm[1] += grads[2]
    return grads[0]
