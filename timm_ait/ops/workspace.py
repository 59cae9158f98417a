""" Fused training step of the workspace: tokens write, then read what was written. """
from fractions import Fraction
from typing import Callable, Optional, Tuple, Union

import torch

from .bottleneck import write
from .hopfield import read
from .memory import update_memory
from .naive import TokenNorm, WriteWeights

__all__ = ['num_kept', 'write_and_read']


def num_kept(bottleneck: Union[int, float], num_tokens: int) -> int:
    """Number k of tokens that each slot and head keep: at least 1, at most all.

    Args:
        bottleneck: k itself if an int; a float is a share of the tokens, rounded half up.
        num_tokens: Number of tokens that compete, T.
    """
    if isinstance(bottleneck, int):
        return max(1, min(bottleneck, num_tokens))
    # in integers, since compilers do not carry a float into a shape
    share = Fraction(bottleneck).limit_denominator(2 ** 20)
    kept = (2 * num_tokens * share.numerator + share.denominator) // (2 * share.denominator)
    return max(1, min(kept, num_tokens))


def write_and_read(
        x: torch.Tensor,
        norm: TokenNorm,
        memory: torch.Tensor,
        weights: WriteWeights,
        num_heads: int,
        bottleneck: int,
        lift: Callable[[torch.Tensor], torch.Tensor],
        momentum: float = 0.9,
        rule: str = 'orthogonal',
        beta: float = 1.,
        gate: Optional[torch.Tensor] = None,
        token_mask: Optional[torch.Tensor] = None,
        global_batch: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `naive.write_and_read`. Tokens may be of lower precision than the memory and the weights.

    With a global batch, the tokens of all ranks of the process group compete, see `bottleneck.write`.
    """
    # the read gets the tokens from the write, which in backward adds its gradient to the one that the read has made
    candidate, balance, coverage, tokens = write(
        x, norm, memory, weights, num_heads, bottleneck, token_mask, global_batch)
    written = update_memory(memory, candidate, momentum, rule)
    output = read(tokens, norm, lift(written), beta, gate)
    return output, written, candidate, balance, coverage
