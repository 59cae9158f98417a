""" Fused bottleneck write.

Scores are linear in the tokens, so the key projection folds into the A * M queries and no key is made; only k tokens
a query carry weight, so tokens are pooled before the value projection and no value is made. What is kept for backward
is the k selected indices and weights a query.

Everything streams over chunks of tokens, which are normed where they are used, so that working memory does not grow
with their number. Selections are worked on in the order of their chunks, so that the tokens they fetch stay in cache;
in chunks of which more than a quarter of all pairs of query and token is selected, as in small batches, dense GEMMs
take the place of fetching.
"""
from typing import Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .matmul import mm
from .norm import chunk_size, normalize, normalize_backward

__all__ = ['attend', 'write', 'write_unnormed']

# tokens among whose scores the best are looked for at a time
_SELECTION_CHUNK = 8192


def _accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _top_k(scores: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Largest k of each row of scores (R, n), unsorted, and their indices."""
    num_rows, n = scores.shape
    if scores.device.type != 'cpu' or n % 4 or n < 8 * k:
        return torch.topk(scores, k, dim=-1, sorted=False)
    # the k largest are among the k groups of largest maximum: two searches in a quarter each are faster than one in all
    num_groups = n // 4
    groups = torch.topk(scores.view(num_rows, 4, num_groups).amax(dim=1), k, dim=-1, sorted=False).indices
    candidates = torch.cat([groups + i * num_groups for i in range(4)], dim=1)
    scores, kept = torch.topk(scores.gather(1, candidates), k, dim=-1, sorted=False)
    return scores, candidates.gather(1, kept)


def _select(
        queries: torch.Tensor,
        tokens: torch.Tensor,
        k: int,
        norm_weight: Optional[torch.Tensor],
        norm_bias: Optional[torch.Tensor],
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scores and indices (R, k) of the tokens that each query scores highest."""
    num_tokens, size = tokens.shape[0], chunk_size(tokens)
    scores = indices = None
    for first in range(0, num_tokens, _SELECTION_CHUNK):
        last = min(first + _SELECTION_CHUNK, num_tokens)
        chunk = queries.new_empty((queries.shape[0], last - first))
        for start in range(first, last, size):
            stop = min(start + size, last)
            normed, _ = normalize(tokens[start:stop], norm_weight, norm_bias, eps)
            chunk[:, start - first:stop - first] = mm(queries, normed.T)
        more_scores, more_indices = _top_k(chunk, min(k, last - first))
        if scores is None:
            scores, indices = more_scores, more_indices
            continue
        scores = torch.cat([scores, more_scores], dim=1)
        indices = torch.cat([indices, more_indices + first], dim=1)
        scores, kept = torch.topk(scores, min(k, scores.shape[1]), dim=-1, sorted=False)
        indices = indices.gather(1, kept)
    return scores, indices


class _Chunk(NamedTuple):
    """The selections (n,) of a chunk of C tokens, in the order of their queries."""
    start: int
    stop: int
    selections: torch.Tensor  # where they are among all R * k
    rows: torch.Tensor  # their queries
    tokens: torch.Tensor  # their tokens, counted from the start of the chunk
    row_offsets: torch.Tensor  # (R,), where each query's begin
    is_dense: bool  # so much is selected that full GEMMs beat fetching it

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """Values (n,) at their queries and tokens, zero elsewhere, (R, C)."""
        matrix = values.new_zeros((len(self.row_offsets), self.stop - self.start))
        return matrix.index_put_((self.rows, self.tokens), values)


def _positions(sorted_values: torch.Tensor, num_values: int) -> torch.Tensor:
    """Where each of the values 0, 1, … begins."""
    values = torch.arange(num_values, device=sorted_values.device, dtype=sorted_values.dtype)
    return torch.searchsorted(sorted_values, values, out_int32=True)


def _chunks(indices: torch.Tensor, tokens: torch.Tensor) -> Iterator[_Chunk]:
    """Split the selections by the chunk of tokens that they fetch."""
    num_queries, k = indices.shape
    num_tokens, size = tokens.shape[0], chunk_size(tokens)
    starts = range(0, num_tokens, size)
    indices = indices.flatten().int()
    # small integers sort fastest
    by_chunk = (indices // size).to(torch.int16 if len(starts) < 2 ** 15 else torch.int32)
    if len(starts) > 1:
        by_chunk, order = by_chunk.sort(stable=True)
        indices = indices.index_select(0, order)
    else:
        order = torch.arange(len(indices), device=indices.device)
    rows = order.int() // k
    offsets = _positions(by_chunk.int() * num_queries + rows, len(starts) * num_queries)
    bounds = [*offsets[::num_queries].tolist(), len(indices)]
    for i, start in enumerate(starts):
        stop = min(start + size, num_tokens)
        chunk = slice(bounds[i], bounds[i + 1])
        yield _Chunk(
            start,
            stop,
            order[chunk],
            rows[chunk],
            indices[chunk] - start,
            offsets[i * num_queries:(i + 1) * num_queries] - bounds[i],
            4 * (bounds[i + 1] - bounds[i]) > num_queries * (stop - start),
        )


def _pool(chunk: _Chunk, table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums (R, E) of the rows of a table (C, E) that the queries selected."""
    weights = weights.to(table.dtype)
    if chunk.is_dense:
        return mm(chunk.scatter(weights), table)
    return F.embedding_bag(chunk.tokens, table, chunk.row_offsets, mode='sum', per_sample_weights=weights)


def _dots(chunk: _Chunk, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products (n,) of rows of a (R, E) with those of b (C, E) that they selected, in the dtype of a."""
    if chunk.is_dense:
        return mm(a.to(b.dtype), b.T)[chunk.rows, chunk.tokens].to(a.dtype)
    # which is what the gradient of an embedding bag's weights is
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, b.to(a.dtype), chunk.tokens, chunk.row_offsets, chunk.rows, 0)


def _send(
        rows: torch.Tensor,
        token_offsets: torch.Tensor,
        table: torch.Tensor,
        weights: Tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Sums (C, E) of what the queries that selected a token send to it.

    Args:
        rows: Queries of the selections (n,), in the order of their tokens.
        token_offsets: Where each token's begin, (C,).
        table: What the queries send, two rows each, (2 R, E).
        weights: Of either row, (n,).
    """
    return F.embedding_bag(
        torch.stack([rows, rows + len(table) // 2], dim=1).flatten(),
        table,
        2 * token_offsets,
        mode='sum',
        per_sample_weights=torch.stack(weights, dim=1).flatten().to(table.dtype),
    )


@torch.library.custom_op('timm_ait::attend', mutates_args=())
def _attend(
        queries: torch.Tensor,
        tokens: torch.Tensor,
        norm_weight: Optional[torch.Tensor],
        norm_bias: Optional[torch.Tensor],
        eps: float,
        bottleneck: int,
        backend: str,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == 'triton':
        from . import triton
        return triton.attend(queries, normalize(tokens, norm_weight, norm_bias, eps)[0], bottleneck)
    k = min(bottleneck, tokens.shape[0])
    scores, indices = _select(queries, tokens, k, norm_weight, norm_bias, eps)
    weights = scores.to(_accumulate_dtype(scores)).softmax(dim=-1)
    pooled = torch.zeros_like(queries, dtype=weights.dtype)
    for chunk in _chunks(indices, tokens):
        normed, _ = normalize(tokens[chunk.start:chunk.stop], norm_weight, norm_bias, eps)
        pooled += _pool(chunk, normed, weights.view(-1).index_select(0, chunk.selections))
    return pooled, weights, indices


@_attend.register_fake
def _(queries, tokens, norm_weight, norm_bias, eps, bottleneck, backend):
    k = min(bottleneck, tokens.shape[0])
    weights = queries.new_empty((queries.shape[0], k), dtype=_accumulate_dtype(queries))
    return torch.empty_like(queries, dtype=weights.dtype), weights, torch.empty_like(weights, dtype=torch.long)


@torch.library.custom_op('timm_ait::attend_backward_', mutates_args=('grad_tokens',))
def _attend_backward_(
        grad_tokens: torch.Tensor,
        grad_pooled: torch.Tensor,
        grad_weights: torch.Tensor,
        queries: torch.Tensor,
        tokens: torch.Tensor,
        norm_weight: Optional[torch.Tensor],
        norm_bias: Optional[torch.Tensor],
        eps: float,
        pooled: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        backend: str,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient for the tokens to grad_tokens (T, E); returns those for queries and norm (2, E)."""
    grad_norm = weights.new_zeros((2, tokens.shape[1]))
    if backend == 'triton':
        from . import triton
        normed, statistics = normalize(tokens, norm_weight, norm_bias, eps)
        grad_queries, grad_normed = triton.attend_backward(
            grad_pooled, grad_weights, queries, normed, weights, indices)
        grad_tokens += normalize_backward(grad_normed, tokens, norm_weight, norm_bias, statistics, grad_norm)
        return grad_queries, grad_norm
    grad_pooled = grad_pooled.contiguous()
    grad_queries = torch.zeros_like(pooled)
    table = torch.cat([grad_pooled.to(queries.dtype), queries])
    # softmax's backward subtracts from each gradient of a query's weights their weighted mean
    mean = (grad_pooled * pooled).sum(dim=-1) + (grad_weights * weights).sum(dim=-1)
    flat_weights, flat_grad_weights = weights.view(-1), grad_weights.reshape(-1)
    grad_scores = torch.empty_like(flat_weights)
    sorted_tokens, by_token = indices.flatten().int().sort(stable=True)
    token_offsets = _positions(sorted_tokens, len(tokens))
    end = 0
    for chunk in _chunks(indices, tokens):
        first, end = end, end + len(chunk.selections)
        x = tokens[chunk.start:chunk.stop]
        normed, statistics = normalize(x, norm_weight, norm_bias, eps)
        weight = flat_weights.index_select(0, chunk.selections)
        grad = _dots(chunk, grad_pooled, normed) + flat_grad_weights.index_select(0, chunk.selections)
        grad_score = weight * (grad - mean.index_select(0, chunk.rows))
        grad_queries += _pool(chunk, normed, grad_score)
        if chunk.is_dense:
            scattered = torch.cat([chunk.scatter(weight), chunk.scatter(grad_score)]).to(table.dtype)
            grad_normed = mm(scattered.T, table)
        else:
            grad_scores.scatter_(0, chunk.selections, grad_score)
            selections = by_token[first:end]
            grad_normed = _send(
                selections.int() // indices.shape[1],
                token_offsets[chunk.start:chunk.stop] - first,
                table,
                (flat_weights.index_select(0, selections), grad_scores.index_select(0, selections)),
            )
        grad_tokens[chunk.start:chunk.stop] += normalize_backward(
            grad_normed, x, norm_weight, norm_bias, statistics, grad_norm)
    return grad_queries.to(queries.dtype), grad_norm


@_attend_backward_.register_fake
def _(grad_tokens, grad_pooled, grad_weights, queries, tokens, norm_weight, *_):
    return torch.empty_like(queries), grad_pooled.new_empty((2, tokens.shape[1]))


class _Attend(torch.autograd.Function):
    """Differentiable `timm_ait::attend` that passes its tokens on.

    What reads the tokens it passes on has to return a gradient that is nobody else's: that of the write is added to it
    in place, so that there is only one of the tokens' size.
    """

    @staticmethod
    def forward(ctx, queries, tokens, norm_weight, norm_bias, eps, bottleneck, backend):
        pooled, weights, indices = _attend(queries, tokens, norm_weight, norm_bias, eps, bottleneck, backend)
        ctx.eps, ctx.backend = eps, backend
        ctx.save_for_backward(queries, tokens, norm_weight, norm_bias, pooled, weights, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return pooled, weights, indices, tokens.view_as(tokens)

    @staticmethod
    def backward(ctx, grad_pooled, grad_weights, _, grad_tokens):
        queries, tokens, norm_weight, norm_bias, pooled, weights, indices = ctx.saved_tensors
        if grad_tokens is None:
            grad_tokens = torch.zeros_like(tokens)
        if grad_pooled is None:
            grad_pooled = torch.zeros_like(pooled)
        if grad_weights is None:
            grad_weights = torch.zeros_like(weights)
        grad_queries, grad_norm = _attend_backward_(
            grad_tokens, grad_pooled, grad_weights, queries, tokens, norm_weight, norm_bias, ctx.eps, pooled, weights,
            indices, ctx.backend)
        if norm_weight is None:
            return grad_queries, grad_tokens, None, None, None, None, None
        grad_norm = grad_norm.to(norm_weight.dtype)
        return grad_queries, grad_tokens, grad_norm[0], grad_norm[1], None, None, None


def attend(
        queries: torch.Tensor,
        tokens: torch.Tensor,
        bottleneck: int,
        backend: str = 'torch',
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-k attention of queries to the tokens themselves.

    Args:
        queries: Scaled queries in token space, (R, E).
        tokens: (T, E), T >= 1, of the queries' dtype.
        bottleneck: Number k of tokens a query keeps; k >= T keeps all.
        backend: 'torch' or 'triton'.

    Returns:
        Pooled tokens (R, E) and weights (R, k), both in at least float32, and indices (R, k) of the kept tokens.
    """
    return _Attend.apply(queries, tokens, None, None, 0., bottleneck, backend)[:3]


def _squared_cv(x: torch.Tensor) -> torch.Tensor:
    return (x.var(dim=-1) / (x.mean(dim=-1).square() + 1e-10)).sum()


def write(
        tokens: torch.Tensor,
        memory: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
        output_weight: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        num_heads: int,
        bottleneck: int,
        backend: str = 'torch',
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `naive.write`. Tokens may be of lower precision than the memory and the weights."""
    return write_unnormed(
        tokens, None, None, 0., memory, query_weight, key_weight, value_weight, output_weight, norm_weight, norm_bias,
        num_heads, bottleneck, backend)[:3]


def write_unnormed(
        x: torch.Tensor,
        token_norm_weight: Optional[torch.Tensor],
        token_norm_bias: Optional[torch.Tensor],
        token_norm_eps: float,
        memory: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
        output_weight: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        num_heads: int,
        bottleneck: int,
        backend: str = 'torch',
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`write` of the layer-normed x, which is never there as a whole.

    Args:
        x: Tokens ahead of their norm, (T, E).
        token_norm_weight: Scale of the layer norm (E,); None for no norm.
        token_norm_bias: Shift of the layer norm (E,).
        token_norm_eps: That of the layer norm.
        memory: This and all others as `naive.write`.

    Returns:
        As `naive.write`, and x itself, to be handed to `norm_read` and to nothing else: the gradient of the write is
        added in place to that of the read.
    """
    num_tokens = x.shape[0]
    if num_tokens == 0:
        return memory, memory.new_zeros(()), memory.new_zeros(()), x
    num_slots, slot_dim = memory.shape
    query = F.linear(memory, query_weight).view(num_slots, num_heads, slot_dim).transpose(0, 1)
    folded = query @ key_weight.view(num_heads, slot_dim, -1) * slot_dim ** -0.5
    pooled, weights, indices, x = _Attend.apply(
        folded.flatten(0, 1).to(x.dtype), x, token_norm_weight, token_norm_bias, token_norm_eps, bottleneck, backend)
    pooled = pooled.to(memory.dtype).view(num_heads, num_slots, -1)
    pooled = pooled @ value_weight.view(num_heads, slot_dim, -1).transpose(1, 2)
    written = F.linear(pooled.transpose(0, 1).flatten(1), output_weight)
    candidate = F.layer_norm(written + memory, (slot_dim,), norm_weight, norm_bias, eps=1e-6)

    weights, indices = weights.view(num_heads, -1), indices.view(num_heads, -1)
    zeros = weights.new_zeros((num_heads, num_tokens))
    importance = zeros.scatter_add(1, indices, weights)
    load = zeros.scatter_add(1, indices, (weights.detach() > 0).to(weights.dtype))
    balance = _squared_cv(importance) + _squared_cv(load) if num_tokens > 1 else importance.sum() * 0.
    coverage = (load > 0).any(dim=0).to(weights.dtype).mean()
    return candidate, balance, coverage, x
