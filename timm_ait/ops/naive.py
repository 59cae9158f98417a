""" The global workspace, written to be read.

These functions are the executable specification: plain dense equations of `Associative Transformer`
(https://arxiv.org/abs/2309.12862), one line an equation. The lean versions beside this file take the same arguments
and are tested against it.

Shapes: T = B * N squashed tokens of width E; a memory of M slots of width D; A heads; k the bottleneck.
"""
from fractions import Fraction
from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F


class WriteWeights(NamedTuple):
    """Parameters of the write, heads outermost."""
    query: torch.Tensor  # (A * D, D)
    key: torch.Tensor  # (A * D, E)
    value: torch.Tensor  # (A * D, E)
    output: torch.Tensor  # (D, A * D)
    norm_weight: torch.Tensor  # (D,), of the slots' LayerNorm
    norm_bias: torch.Tensor  # (D,)


def num_kept(bottleneck: Union[int, float], num_tokens: Union[int, torch.Tensor]) -> Union[int, torch.Tensor]:
    """Number k of tokens that each slot and head keep.

    Args:
        bottleneck: Number of tokens, or a float in (0, 1]: a fraction of them, rounded half up.
        num_tokens: Number T of tokens, at least one; for a fraction also an integer tensor, which is not waited for.

    Returns:
        1 to T.

    Raises:
        ValueError: The bottleneck is out of its range, or of another type.
    """
    if type(bottleneck) is int and bottleneck >= 1:
        return min(bottleneck, num_tokens)
    if not (isinstance(bottleneck, float) and 0. < bottleneck <= 1.):
        raise ValueError(f'bottleneck must be an integer of at least 1 or a float in (0, 1], got {bottleneck!r}.')
    # in integers, since compilers do not carry a float into a shape
    share = Fraction(bottleneck).limit_denominator(2 ** 20)
    kept = (2 * num_tokens * share.numerator + share.denominator) // (2 * share.denominator)
    return kept.clamp_min(1) if isinstance(kept, torch.Tensor) else max(1, kept)


def attend(
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bottleneck: Union[int, float],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Bottleneck attention: each query (A, M, D) attends to the k tokens it scores highest, by keys (A, T, D).

    Returns:
        Pooled values (A, M, D) and attention (A, M, T), zero outside the kept tokens.
    """
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
    kept = scores.topk(num_kept(bottleneck, scores.shape[-1]), dim=-1)
    attention = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(dim=-1).to(scores.dtype))
    return attention @ values, attention


def balance_loss(attention: torch.Tensor) -> torch.Tensor:
    """Squared coefficients of variation of importance and load over the tokens, summed over heads.

    Load counts, so it carries no gradient. Fewer than two tokens are balanced.

    Args:
        attention: Bottleneck attention, (A, M, T).
    """
    importance = attention.sum(dim=1)
    load = (attention > 0).sum(dim=1).to(attention.dtype)
    if attention.shape[-1] < 2:
        return importance.sum() * 0.
    return sum((x.var(dim=-1) / (x.mean(dim=-1) ** 2 + 1e-10)).sum() for x in (importance, load))


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Nearest matrix with orthonormal rows (M <= D) or columns (M > D), (M, D), by singular value decomposition."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def update_memory(
        memory: torch.Tensor,
        candidate: torch.Tensor,
        momentum: float = 0.9,
        rule: str = 'orthogonal',
) -> torch.Tensor:
    """Moving average of the memory before a write and what it proposes, put back where slots have unit norm, (M, D).

    The rule 'orthogonal' keeps the slots orthonormal, 'normalize' (the published one) only their norms at one.
    """
    memory = momentum * memory + (1. - momentum) * candidate
    if rule == 'orthogonal':
        memory = polar(memory)
    return F.normalize(memory, dim=-1)


def write(
        tokens: torch.Tensor,
        memory: torch.Tensor,
        weights: WriteWeights,
        num_heads: int,
        bottleneck: Union[int, float],
        token_mask: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the tokens propose to write into the memory.

    Args:
        tokens: Squashed tokens, (T, E).
        memory: Memory before the write, (M, D).
        bottleneck: As `num_kept`.
        token_mask: Valid tokens, (T,); the others neither write nor count.

    Returns:
        Candidate for `update_memory` (M, D), unweighted balance loss (scalar), and coverage (scalar): the share of
        tokens that at least one slot selected. Without tokens the candidate is the memory.
    """
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)

    if token_mask is not None:
        tokens = tokens[token_mask]
    if tokens.shape[0] == 0:
        return memory, tokens.new_zeros(()), tokens.new_zeros(())
    pooled, attention = attend(
        heads(memory @ weights.query.T), heads(tokens @ weights.key.T), heads(tokens @ weights.value.T), bottleneck)
    written = pooled.transpose(0, 1).flatten(1) @ weights.output.T
    candidate = F.layer_norm(written + memory, memory.shape[1:], weights.norm_weight, weights.norm_bias, eps=1e-6)
    coverage = (attention > 0).any(dim=1).any(dim=0).to(tokens.dtype).mean()
    return candidate, balance_loss(attention), coverage


def retrieve(state: torch.Tensor, attractors: torch.Tensor, beta: float = 1.) -> torch.Tensor:
    """One step of continuous Hopfield retrieval, softmax(beta state attractors^T) attractors, (T, E)."""
    return (beta * state @ attractors.T).softmax(dim=-1) @ attractors


def read(
        tokens: torch.Tensor,
        attractors: torch.Tensor,
        beta: float = 1.,
        num_steps: int = 1,
        residual: Optional[torch.Tensor] = None,
        gate: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Retrieval by normed tokens (T, E) from attractors (M, E) at inverse temperature beta, added to a residual,
    `residual + gate * retrieve(tokens)`.

    Args:
        residual: (T, E), the tokens themselves if None.
        gate: Factor per channel, (E,), one if None.
    """
    state = tokens
    for _ in range(num_steps):
        state = retrieve(state, attractors, beta)
    return (tokens if residual is None else residual) + (state if gate is None else gate * state)
