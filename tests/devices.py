""" Operators as the CPU computes them, and as other devices do. """
import contextlib
from typing import Iterator
from unittest import mock

from timm_ait.ops import bottleneck, hopfield


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Compute as on a device other than the CPU, in plain PyTorch."""
    with contextlib.ExitStack() as stack:
        for module in (bottleneck, hopfield):
            stack.enter_context(mock.patch.object(module, 'is_fused', lambda tokens: False))
        yield
