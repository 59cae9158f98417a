""" Fused bottleneck write.

Scores are linear in the tokens, so the key projection folds into the A * M queries and no key is made; only k tokens
per query carry weight, so tokens are pooled before the value projection and no value is made. What is kept for backward
is the k selected indices and weights per query.

Where more than a quarter of all pairs of query and token is selected, as in small batches, dense products beat fetching
what is selected, and plain PyTorch computes them.
"""
from typing import Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .naive import TokenNorm, WriteWeights
from .norm import is_fused, normalize, normalize_backward
from .selection import chunks, dots, pool, positions, select, send

__all__ = ['write']


@torch.library.custom_op('timm_ait::select', mutates_args=())
def _select(
        queries: torch.Tensor,
        tokens: torch.Tensor,
        token_mask: Optional[torch.Tensor],
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        k: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    scores, indices = select(queries, tokens, k, token_mask, norm_weight, norm_bias, eps)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)), indices


@_select.register_fake
def _(queries, tokens, token_mask, norm_weight, norm_bias, eps, k):
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.new_empty((queries.shape[0], k), dtype=dtype), queries.new_empty((len(queries), k), dtype=torch.long)


@torch.library.custom_op('timm_ait::pool', mutates_args=())
def _pool(
        tokens: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        weights: torch.Tensor,
        indices: torch.Tensor,
) -> torch.Tensor:
    pooled = weights.new_zeros((len(weights), tokens.shape[1]))
    for chunk in chunks(indices, tokens):
        normed, _ = normalize(tokens[chunk.start:chunk.stop], norm_weight, norm_bias, eps)
        pooled += pool(chunk, normed, weights.view(-1).index_select(0, chunk.selections))
    return pooled


@_pool.register_fake
def _(tokens, norm_weight, norm_bias, eps, weights, indices):
    return weights.new_empty((weights.shape[0], tokens.shape[1]))


@torch.library.custom_op('timm_ait::pool_backward_', mutates_args=('grad_tokens',))
def _pool_backward_(
        grad_tokens: torch.Tensor,
        grad_pooled: torch.Tensor,
        grad_weights: torch.Tensor,
        queries: torch.Tensor,
        tokens: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        weights: torch.Tensor,
        indices: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient for the tokens to grad_tokens (T, E); returns those for queries and norm (2, E)."""
    grad_norm = weights.new_zeros((2, tokens.shape[1]))
    grad_pooled, grad_weights = grad_pooled.contiguous(), grad_weights.contiguous()
    grad_queries = torch.zeros_like(grad_pooled)
    # a token's gradient sums weight * grad_pooled + grad_score * query over the queries that selected it
    table = torch.cat([grad_pooled.to(queries.dtype), queries])
    flat_weights, flat_grad_weights = weights.view(-1), grad_weights.view(-1)
    grad_scores = torch.empty_like(flat_weights)
    # the selections in the order of their tokens, and where those of each token begin
    sorted_tokens, by_token = indices.flatten().int().sort(stable=True)
    token_offsets = positions(sorted_tokens, len(tokens))
    end = 0
    for chunk in chunks(indices, tokens):
        first, end = end, end + len(chunk.selections)
        x = tokens[chunk.start:chunk.stop]
        normed, statistics = normalize(x, norm_weight, norm_bias, eps)
        weight = flat_weights.index_select(0, chunk.selections)
        # a weight is the exponential of its score
        grad_score = weight * (
            dots(chunk, grad_pooled, normed) + flat_grad_weights.index_select(0, chunk.selections))
        grad_queries += pool(chunk, normed, grad_score)
        grad_scores.scatter_(0, chunk.selections, grad_score)
        selections = by_token[first:end]
        grad_normed = send(
            selections.int() // indices.shape[1],
            token_offsets[chunk.start:chunk.stop] - first,
            table,
            (flat_weights.index_select(0, selections), grad_scores.index_select(0, selections)),
        )
        grad_tokens[chunk.start:chunk.stop] += normalize_backward(
            grad_normed, x, norm_weight, norm_bias, statistics, grad_norm)
    return grad_queries.to(queries.dtype), grad_norm


@_pool_backward_.register_fake
def _(grad_tokens, grad_pooled, grad_weights, queries, tokens, *_):
    return torch.empty_like(queries), grad_pooled.new_empty((2, tokens.shape[1]))


class _Pool(torch.autograd.Function):
    """Differentiable `timm_ait::pool`, whose weights are exponentials of the products of queries and tokens.

    The tokens pass through. The gradient that comes back for them is added to in place, so that there is only one of
    the tokens' size: it must be nobody else's, which `ops.workspace` sees to.
    """

    @staticmethod
    def forward(ctx, queries, tokens, norm_weight, norm_bias, eps, weights, indices):
        ctx.eps = eps
        ctx.save_for_backward(queries, tokens, norm_weight, norm_bias, weights, indices)
        ctx.set_materialize_grads(False)
        pooled = _pool(tokens, norm_weight, norm_bias, eps, weights, indices)
        return pooled, weights.view_as(weights), tokens.view_as(tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_pooled, grad_weights, grad_tokens):
        queries, tokens, norm_weight, norm_bias, weights, indices = ctx.saved_tensors
        if grad_tokens is None:
            grad_tokens = torch.zeros_like(tokens)
        if grad_pooled is None:
            grad_pooled = weights.new_zeros((len(weights), tokens.shape[1]))
        if grad_weights is None:
            grad_weights = torch.zeros_like(weights)
        grad_queries, grad_norm = _pool_backward_(
            grad_tokens, grad_pooled, grad_weights, queries, tokens, norm_weight, norm_bias, ctx.eps, weights, indices)
        grad_norm = grad_norm.to(norm_weight.dtype)
        return grad_queries, grad_tokens, grad_norm[0], grad_norm[1], None, None, None


class _AllReduce(torch.autograd.Function):
    """Sum over the ranks. So is its gradient, since the loss of every rank depends on what each of them gave."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _AllReduce.apply(grad)


def _all_reduce(x: torch.Tensor) -> torch.Tensor:
    return _AllReduce.apply(x)


def _keep_global_best(scores: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scores (R, n) of this rank, minus infinity where not among the k best of all ranks; the best of all (R, 1)."""
    # ranks may have different numbers of tokens
    offered = F.pad(scores.detach(), (0, k - scores.shape[1]), value=float('-inf'))
    all_offered = [torch.empty_like(offered) for _ in range(dist.get_world_size())]
    dist.all_gather(all_offered, offered)
    all_offered = torch.cat(all_offered, dim=1)
    best, indices = all_offered.topk(k, dim=-1)
    kept = torch.zeros_like(all_offered, dtype=torch.bool).scatter_(1, indices, True)
    first = dist.get_rank() * k
    return scores.masked_fill(~kept[:, first:first + scores.shape[1]], float('-inf')), best[:, :1]


def _attend(
        queries: torch.Tensor,
        tokens: torch.Tensor,
        bottleneck: int,
        token_mask: Optional[torch.Tensor],
        norm: TokenNorm,
        global_batch: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-k attention of the queries (R, E), scaled and of the tokens' dtype, to the normed tokens.

    Returns:
        Pooled tokens (R, E), with a global batch this rank's share of them, and weights (R, k), both in at least
        float32, indices (R, k) of the kept tokens, and the tokens passed on.
    """
    k = min(bottleneck, tokens.shape[0])
    fused = is_fused(tokens) and 4 * k <= tokens.shape[0]
    if fused:
        with torch.no_grad():
            scores, indices = _select(queries, tokens, token_mask, *norm, k)
    else:
        normed, _ = normalize(tokens, *norm)
        scores = (queries @ normed.T).to(torch.promote_types(tokens.dtype, torch.float32))
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask, float('-inf'))
        scores, indices = scores.topk(k, dim=-1, sorted=False)
    if global_batch:
        scores, shift = _keep_global_best(scores, bottleneck)
    else:
        shift = scores.detach().amax(dim=-1, keepdim=True)
    # where nothing may be selected there is no finite score
    weights = (scores - shift.clamp_min(torch.finfo(shift.dtype).min)).exp()
    if fused:
        pooled, weights, tokens = _Pool.apply(queries, tokens, *norm, weights, indices)
    else:
        attention = normed.new_zeros((len(queries), len(tokens))).scatter(1, indices, weights.to(normed.dtype))
        pooled = (attention @ normed).to(weights.dtype)
    total = weights.sum(dim=-1, keepdim=True)
    if global_batch:
        total = _all_reduce(total)
    total = total.clamp_min(torch.finfo(total.dtype).tiny)
    return pooled / total, weights / total, indices, tokens


def _spread(
        weights: torch.Tensor,
        indices: torch.Tensor,
        num_slots: int,
        num_tokens: int,
        token_mask: Optional[torch.Tensor],
        global_batch: bool,
) -> Tuple[torch.Tensor, torch.Tensor, Union[int, torch.Tensor], torch.Tensor]:
    """How the tokens of this rank differ in importance and in load; the means are those of all tokens.

    Args:
        weights: Of the selections, (A, M * k).
        indices: Their tokens, (A, M * k).
        num_slots: M.
        num_tokens: Of this rank, masked ones too.
        token_mask: As `naive.write`.
        global_batch: As `write`.

    Returns:
        Sums of squared deviations (2, A) and means (2, A) of importance and load; number of tokens there are, and the
        share of them that at least one slot selected, both of all ranks.
    """
    num_heads = weights.shape[0]
    zeros = weights.new_zeros((num_heads, num_tokens))
    importance = zeros.scatter_add(1, indices, weights)
    load = zeros.scatter_add(1, indices, (weights.detach() > 0).to(weights.dtype))
    # selections per head, and tokens with any
    counts = torch.cat([load.sum(dim=1), (load > 0).any(dim=0).sum().view(1).to(load.dtype)])
    num_valid: Union[int, torch.Tensor] = num_tokens
    if token_mask is not None or global_batch:
        num_valid = counts.new_tensor(num_tokens) if token_mask is None else token_mask.sum().to(counts.dtype)
        if global_batch:
            counts = torch.cat([counts, num_valid.view(1)])
            dist.all_reduce(counts)
            num_valid = counts[-1]
    divisor = num_valid if isinstance(num_valid, int) else num_valid.clamp_min(1)
    # the weights of a slot sum to one
    means = torch.stack([torch.full_like(counts[:num_heads], num_slots), counts[:num_heads]]) / divisor
    deviations = [x - mean.unsqueeze(-1) for x, mean in zip((importance, load), means)]
    if token_mask is not None:
        deviations = [x * token_mask for x in deviations]
    squares = torch.stack([x.square().sum(dim=-1) for x in deviations])
    return squares, means, num_valid, counts[num_heads] / divisor


def write(
        tokens: torch.Tensor,
        norm: TokenNorm,
        memory: torch.Tensor,
        weights: WriteWeights,
        num_heads: int,
        bottleneck: int,
        token_mask: Optional[torch.Tensor] = None,
        global_batch: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`naive.write` of the normed tokens, which are never there as a whole.

    With a global batch, every rank sends its k best scores per query to all others, A * M * k numbers, and what ranks
    pool adds up where it is smallest, after the output projection: sums of A * M, of A + 2 and of M * D + 2 * A numbers
    in the forward, and of the first and the last again in its backward.

    Args:
        tokens: Tokens ahead of their norm, (T, E).
        norm: That norm.
        memory: This and all others as `naive.write`; tokens may be of lower precision.
        global_batch: The tokens of all ranks of the process group compete, T is their sum, and all ranks get the same
            result.

    Returns:
        As `naive.write`, and the tokens passed on, whose gradient is added to in place.
    """
    num_tokens = tokens.shape[0]
    if num_tokens == 0:
        return memory, memory.new_zeros(()), memory.new_zeros(()), tokens
    num_slots, slot_dim = memory.shape
    queries = F.linear(memory, weights.query).view(num_slots, num_heads, slot_dim).transpose(0, 1)
    folded = queries @ weights.key.view(num_heads, slot_dim, -1) * slot_dim ** -0.5
    pooled, attention, indices, tokens = _attend(
        folded.flatten(0, 1).to(tokens.dtype), tokens, bottleneck, token_mask, norm, global_batch)
    pooled = pooled.to(memory.dtype).view(num_heads, num_slots, -1)
    values = pooled @ weights.value.view(num_heads, slot_dim, -1).transpose(1, 2)
    written = F.linear(values.transpose(0, 1).flatten(1), weights.output)

    squares, means, num_valid, coverage = _spread(
        attention.view(num_heads, -1), indices.view(num_heads, -1), num_slots, num_tokens, token_mask, global_batch)
    if global_batch:
        reduced = _all_reduce(torch.cat([written.flatten(), squares.flatten().to(written.dtype)]))
        written, squares = reduced[:written.numel()].view_as(written), reduced[written.numel():].view_as(squares)
    may_be_none = not isinstance(num_valid, int)
    num_free = (num_valid - 1).clamp_min(1) if may_be_none else max(num_valid - 1, 1)
    balance = (squares / num_free / (means.square() + 1e-10)).sum()
    candidate = F.layer_norm(written + memory, (slot_dim,), weights.norm_weight, weights.norm_bias, eps=1e-6)
    if may_be_none:
        candidate = torch.where(num_valid > 0, candidate, memory)
    return candidate, balance, coverage, tokens
