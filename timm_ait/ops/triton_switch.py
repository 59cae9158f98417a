""" Whether the Triton kernels run: opt-in until a GPU has timed them. """
import os

import torch

__all__ = ['is_on']


def is_on(x: torch.Tensor) -> bool:
    """Whether Triton works on a tensor: on CUDA, or in Triton's interpreter, where TIMM_AIT_TRITON is 1."""
    on_device = x.is_cuda or os.environ.get('TRITON_INTERPRET') == '1'
    return on_device and os.environ.get('TIMM_AIT_TRITON') == '1' and x.dtype != torch.float64
