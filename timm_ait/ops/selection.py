""" Which tokens the queries select, and what flows between the two, chunk by chunk of tokens.

Tokens are normed where they are used, so that working memory does not grow with their number. Selections are worked on
in the order of their chunks, so that the tokens they fetch stay in cache.
"""
from typing import Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .matmul import mm
from .norm import chunk_size, normalize

__all__ = ['Chunk', 'chunks', 'dots', 'pool', 'positions', 'select', 'send']

# tokens among whose scores the best are looked for at a time
_SELECTION_CHUNK = 8192


def _top_k(scores: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Largest k of each row of scores (R, n), unsorted, and their indices."""
    num_rows, n = scores.shape
    if n % 4 or n < 8 * k:
        return torch.topk(scores, k, dim=-1, sorted=False)
    # the k largest are among the k groups of largest maximum: two searches in a quarter each are faster than one in all
    num_groups = n // 4
    groups = torch.topk(scores.view(num_rows, 4, num_groups).amax(dim=1), k, dim=-1, sorted=False).indices
    candidates = torch.cat([groups + i * num_groups for i in range(4)], dim=1)
    scores, kept = torch.topk(scores.gather(1, candidates), k, dim=-1, sorted=False)
    return scores, candidates.gather(1, kept)


def select(
        queries: torch.Tensor,
        tokens: torch.Tensor,
        k: int,
        token_mask: Optional[torch.Tensor],
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scores (R, k), minus infinity where masked, and indices (R, k) of the tokens that each query scores highest."""
    num_tokens, size = tokens.shape[0], chunk_size(tokens)
    best = indices = None
    for first in range(0, num_tokens, _SELECTION_CHUNK):
        last = min(first + _SELECTION_CHUNK, num_tokens)
        scores = queries.new_empty((queries.shape[0], last - first))
        for start in range(first, last, size):
            stop = min(start + size, last)
            normed, _ = normalize(tokens[start:stop], norm_weight, norm_bias, eps)
            scores[:, start - first:stop - first] = mm(queries, normed.T)
        if token_mask is not None:
            scores.masked_fill_(~token_mask[first:last], float('-inf'))
        more, more_indices = _top_k(scores, min(k, last - first))
        if best is None:
            best, indices = more, more_indices
            continue
        best = torch.cat([best, more], dim=1)
        indices = torch.cat([indices, more_indices + first], dim=1)
        best, kept = torch.topk(best, min(k, best.shape[1]), dim=-1, sorted=False)
        indices = indices.gather(1, kept)
    return best, indices


class Chunk(NamedTuple):
    """The selections (n,) of a chunk of C tokens, in the order of their queries."""
    start: int
    stop: int
    selections: torch.Tensor  # where they are among all R * k
    rows: torch.Tensor  # their queries
    tokens: torch.Tensor  # their tokens, counted from the start of the chunk
    row_offsets: torch.Tensor  # (R,), where those of each query begin


def positions(sorted_values: torch.Tensor, num_values: int) -> torch.Tensor:
    """Where each of the values 0, 1, … begins."""
    values = torch.arange(num_values, device=sorted_values.device, dtype=sorted_values.dtype)
    return torch.searchsorted(sorted_values, values, out_int32=True)


def chunks(indices: torch.Tensor, tokens: torch.Tensor) -> Iterator[Chunk]:
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
    offsets = positions(by_chunk.int() * num_queries + rows, len(starts) * num_queries)
    bounds = [*offsets[::num_queries].tolist(), len(indices)]
    for i, start in enumerate(starts):
        stop = min(start + size, num_tokens)
        chunk = slice(bounds[i], bounds[i + 1])
        yield Chunk(
            start,
            stop,
            order[chunk],
            rows[chunk],
            indices[chunk] - start,
            offsets[i * num_queries:(i + 1) * num_queries] - bounds[i],
        )


def pool(chunk: Chunk, table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums (R, E) of the rows of a table (C, E) that the queries selected."""
    return F.embedding_bag(
        chunk.tokens, table, chunk.row_offsets, mode='sum', per_sample_weights=weights.to(table.dtype))


def dots(chunk: Chunk, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products (n,) of rows of a (R, E) with those of b (C, E) that they selected, in the dtype of a."""
    # which is what the gradient of the weights of an embedding bag is
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, b.to(a.dtype), chunk.tokens, chunk.row_offsets, chunk.rows, 0)


def send(
        rows: torch.Tensor,
        token_offsets: torch.Tensor,
        table: torch.Tensor,
        weights: Tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Sums (C, E) of what the queries that selected a token send to it.

    Args:
        rows: Queries of the selections (n,), in the order of their tokens.
        token_offsets: Where those of each token begin, (C,).
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
