""" The write and the read of the workspace, in few passes over the tokens.

The key projection folds into the A * M queries, so no keys are made; tokens are pooled before the value projection, so
no values are made; residual and gate are part of the last product. Scores, top-k, pooling and read are one function of
plain PyTorch operators, which `torch.compile` takes whole.

Source: the equations of `naive.py`, whose functions have the same names and arguments.
"""
from typing import Any, Optional, Tuple, Union

import torch
import torch.nn.functional as F

from .naive import WriteWeights, num_kept


def _attend(
        scores: torch.Tensor,
        bottleneck: Union[int, float],
        token_mask: Optional[torch.Tensor],
        ranks: Optional[Any],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weights (R, k), in at least float32, and indices (R, k) of the tokens that each query keeps by its scores (R, T).

    Weights are zero where a query keeps fewer than k tokens, since the others are masked or another rank's are better.
    """
    num_tokens = scores.shape[1]
    lowest = torch.finfo(scores.dtype).min  # not -inf: a query whose tokens are all masked must not become nan
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask, lowest)
    if ranks is None:
        k = num_kept(bottleneck, num_tokens)
    elif isinstance(bottleneck, int):
        k = num_kept(bottleneck, bottleneck)
    else:
        num_valid = torch.tensor(num_tokens, device=scores.device) if token_mask is None else token_mask.sum()
        k = num_kept(bottleneck, max(int(ranks.sum(num_valid)), 1))
    is_share_of_valid = token_mask is not None and ranks is None and not isinstance(bottleneck, int)
    best, indices = scores.topk(min(k, num_tokens), dim=-1, sorted=is_share_of_valid)
    best = best.to(torch.promote_types(best.dtype, torch.float32))
    if token_mask is None and ranks is None:
        return best.softmax(dim=-1), indices

    kept = torch.ones_like(indices, dtype=torch.bool) if token_mask is None else token_mask[indices]
    if is_share_of_valid:  # k is a shape, which must not depend on the mask: keep the first of it
        kept = kept & (torch.arange(k, device=best.device) < num_kept(bottleneck, token_mask.sum().clamp_min(1)))
    if ranks is None:
        return best.masked_fill(~kept, lowest).softmax(dim=-1) * kept, indices
    # ranks may have different numbers of tokens
    offered = ranks.gather(F.pad(best.detach(), (0, k - best.shape[1]), value=float('-inf')))
    best_of_all, indices_of_all = offered.topk(k, dim=-1)
    kept_of_all = torch.zeros_like(offered, dtype=torch.bool).scatter_(1, indices_of_all, True)
    first = ranks.rank * k
    kept = kept & kept_of_all[:, first:first + best.shape[1]]
    weights = (best - best_of_all[:, :1]).exp() * kept
    total = ranks.sum(weights.sum(dim=-1, keepdim=True))
    return weights / total.clamp_min(torch.finfo(total.dtype).tiny), indices


def _balance(
        selected: torch.Tensor,
        indices: torch.Tensor,
        num_slots: int,
        num_tokens: int,
        token_mask: Optional[torch.Tensor],
        ranks: Optional[Any],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Union[int, torch.Tensor]]:
    """What `naive.balance_loss` is made of, only from the weights and tokens of the selections, both (A, M * k).

    Returns:
        Sums of squared deviations of this rank's tokens in importance and load, (2, A); what to divide them by for
        squared coefficients of variation, (2, A); coverage (scalar) and number of tokens, both of all ranks.
    """
    zeros = selected.new_zeros((selected.shape[0], num_tokens))
    importance = zeros.scatter_add(1, indices, selected)
    with torch.no_grad():
        load = zeros.scatter_add(1, indices, (selected > 0).to(selected.dtype))
        counts, num_covered = load.sum(dim=1), load.any(dim=0).sum().to(load.dtype)
        num_valid: Union[int, torch.Tensor] = num_tokens if token_mask is None else token_mask.sum()
        if ranks is not None:
            num_valid = torch.full_like(num_covered, num_tokens) if token_mask is None else num_valid.to(num_covered)
            counts, sizes = ranks.sum(torch.cat([counts, num_covered[None], num_valid[None]])).split([len(counts), 2])
            num_covered, num_valid = sizes.unbind()
        num_present = max(num_valid, 1) if isinstance(num_valid, int) else num_valid.clamp_min(1)
        # the weights of a slot sum to one
        means = torch.stack([torch.full_like(counts, num_slots), counts]) / num_present
        divisors = (means.square() + 1e-10) * (num_present - 1 + (num_present == 1))
    deviations = torch.stack([importance, load]) - means.unsqueeze(-1)
    if token_mask is not None:
        deviations = deviations * token_mask
    return deviations.square().sum(dim=-1), divisors, num_covered / num_present, num_valid


def write(
        tokens: torch.Tensor,
        memory: torch.Tensor,
        weights: WriteWeights,
        num_heads: int,
        bottleneck: Union[int, float],
        token_mask: Optional[torch.Tensor] = None,
        ranks: Optional[Any] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `naive.write`; the tokens, at least one, may be of lower precision than the memory and the weights.

    With ranks, every rank sends its k best scores per query to all others, A * M * k numbers, and what ranks pool adds
    up where it is smallest, after the output projection: sums of A * M, of A + 2 and of M * D + 2 * A numbers in the
    forward, and of the first and the last again in its backward.

    Args:
        ranks: Processes whose tokens compete together, see `ranks.ProcessGroups`. T is the number of all of them, and
            all get the same result.
    """
    num_tokens, (num_slots, slot_dim) = tokens.shape[0], memory.shape
    if token_mask is not None:  # padding may be anything, also nan
        tokens = tokens.masked_fill(~token_mask.unsqueeze(-1), 0.)
    queries = F.linear(memory, weights.query).view(num_slots, num_heads, slot_dim).transpose(0, 1)
    folded = (queries * slot_dim ** -0.5 @ weights.key.view(num_heads, slot_dim, -1)).flatten(0, 1)
    scores = folded.to(tokens.dtype) @ tokens.T
    selected, indices = _attend(scores, bottleneck, token_mask, ranks)
    attention = torch.zeros_like(scores).scatter(1, indices, selected.to(scores.dtype))
    pooled = (attention @ tokens).to(memory.dtype).view(num_heads, num_slots, -1)
    values = pooled @ weights.value.view(num_heads, slot_dim, -1).transpose(1, 2)
    written = F.linear(values.transpose(0, 1).flatten(1), weights.output)

    squares, divisors, coverage, num_valid = _balance(
        selected.view(num_heads, -1), indices.view(num_heads, -1), num_slots, num_tokens, token_mask, ranks)
    if ranks is not None:
        written, squares = ranks.sum(torch.cat([written.flatten(), squares.flatten()])).split(
            [written.numel(), squares.numel()])
        written, squares = written.view_as(memory), squares.view_as(divisors)
    candidate = F.layer_norm(written + memory, (slot_dim,), weights.norm_weight, weights.norm_bias, eps=1e-6)
    if isinstance(num_valid, torch.Tensor):
        candidate = torch.where(num_valid > 0, candidate, memory)
    return candidate, (squares / divisors).sum(), coverage


def read(
        tokens: torch.Tensor,
        attractors: torch.Tensor,
        beta: float = 1.,
        num_steps: int = 1,
        residual: Optional[torch.Tensor] = None,
        gate: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """As `naive.read`, in the dtype of the tokens."""
    # beta and the gate on the few attractors are fewer passes over the tokens
    keys = (beta * attractors).to(tokens.dtype)
    values = (attractors if gate is None else attractors * gate).to(tokens.dtype)
    state = tokens
    for _ in range(num_steps - 1):
        state = F.linear(state, keys).softmax(dim=-1) @ attractors.to(tokens.dtype)
    association = F.linear(state, keys).softmax(dim=-1)
    return torch.addmm(tokens if residual is None else residual, association, values)
