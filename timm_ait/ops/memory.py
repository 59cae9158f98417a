""" The small float32 algebra of the memory itself, (M, D): its update and its statistics. """
from typing import Dict

import torch
import torch.nn.functional as F

__all__ = ['in_backward', 'keep_', 'polar', 'project_memory', 'slot_statistics', 'update_memory']


def polar(matrix: torch.Tensor, num_iterations: int = 12) -> torch.Tensor:
    """Nearest matrix with orthonormal rows (M <= D) or columns (M > D), by Newton-Schulz iterations.

    A singular value decomposition would be exact, but its gradient is singular where singular values are equal, which
    is where this function lands. Twelve iterations reach float32 rounding up to a condition number of about 15;
    above, the directions of the smallest singular values stay shorter than the others.

    Args:
        matrix: (M, D), float32.
        num_iterations: Each grows small singular values by half and squares the error of those near one.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # the fourth root of sum(s^4): at least the largest singular value, and tight when few dominate
    x = wide / (wide @ wide.T).norm().sqrt().clamp_min(1e-20)
    for _ in range(num_iterations):
        x = torch.addmm(x, x @ x.T, x, beta=1.5, alpha=-0.5)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def project_memory(memory: torch.Tensor, rule: str = 'orthogonal', num_iterations: int = 12) -> torch.Tensor:
    """Nearest memory (M, D) that the update rule allows: orthonormal slots, or (rule 'normalize') of unit norm."""
    if rule == 'orthogonal':
        memory = polar(memory, num_iterations)
    return F.normalize(memory, dim=-1)


def update_memory(
        memory: torch.Tensor,
        candidate: torch.Tensor,
        momentum: float = 0.9,
        rule: str = 'orthogonal',
) -> torch.Tensor:
    """As `naive.update_memory`, with the polar factor by Newton-Schulz."""
    return project_memory(momentum * memory + (1. - momentum) * candidate, rule)


def in_backward() -> bool:
    """Whether a backward is running: a forward inside of it is one that gradient checkpointing computes again."""
    return getattr(torch._C, '_current_graph_task_id', lambda: -1)() != -1


@torch.library.custom_op('timm_ait::keep_', mutates_args=('pending',))
def keep_(pending: torch.Tensor, written: torch.Tensor) -> None:
    """Keep a written memory (M, D) in place of a pending one, unless its forward is computed again.

    Backward computes the forwards of a step again in another order, and the last one is to win. An operator, since
    compiled code cannot ask whether it runs inside of backward.
    """
    if not in_backward():
        pending.copy_(written)


@keep_.register_fake
def _(pending: torch.Tensor, written: torch.Tensor) -> None:
    pass


def slot_statistics(memory: torch.Tensor) -> Dict[str, float]:
    """How distinct the slots of a memory (M, D) are.

    Returns:
        'effective_rank': exp of the entropy of the normalised singular values, 1 (collapsed) to min(M, D).
        'mean_cosine': mean cosine of distinct slots, 1 when collapsed; nan for a single slot.
    """
    memory = F.normalize(memory.detach().float(), dim=-1)
    s = torch.linalg.svdvals(memory)
    s = s / s.sum()
    num_pairs = memory.shape[0] * (memory.shape[0] - 1)
    cosines = memory @ memory.T
    return {
        'effective_rank': float(torch.exp(-torch.special.xlogy(s, s).sum())),
        'mean_cosine': float(cosines.sum() - cosines.trace()) / num_pairs if num_pairs else float('nan'),
    }
