""" Layer norm of a chunk of tokens inside of a fused operator, and its backward. """
from typing import Tuple

import torch

__all__ = ['chunk_size', 'normalize', 'normalize_backward']

# bytes of tokens worked on at a time, so that they stay in the second-level cache beside what they are multiplied with
_CACHE = 3 << 19
# other devices hide their latency behind large launches
_DEVICE_CHUNK = 16384

Statistics = Tuple[torch.Tensor, torch.Tensor]


def chunk_size(tokens: torch.Tensor) -> int:
    """Number of tokens (T, E) to work on at a time."""
    if tokens.device.type != 'cpu':
        return _DEVICE_CHUNK
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
