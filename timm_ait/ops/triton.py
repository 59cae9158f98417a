""" Triton kernels of the fused ops, for CUDA. Opt-in by TIMM_AIT_TRITON=1, and not yet timed on a GPU.

To time them, run `python benchmarks/workspace.py --device cuda` with that variable and without.

Same contracts as the operators of `bottleneck.py` and `hopfield.py`, forward and backward. Inputs are float32, bfloat16
or float16; sums are float32. Every output element is written by one program in a fixed order, without atomics, so
results repeat bit for bit.
"""
import os
from typing import Any, Dict, Tuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("TIMM_AIT_TRITON=1 needs Triton: pip install triton") from error

__all__ = ['pool', 'pool_backward', 'read', 'read_backward']

# selected tokens and channels a program holds at a time
_BLOCK_K = 32
_BLOCK_E = 128
# what shared memory holds
_MAX_SLOTS = 512


def _interpreting() -> bool:
    return os.environ.get('TRITON_INTERPRET') == '1'


def _check(*tensors: torch.Tensor) -> None:
    for x in tensors:
        if not x.is_cuda and not _interpreting():
            raise RuntimeError(f"Triton needs CUDA tensors or TRITON_INTERPRET=1, got {x.device}.")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"Triton computes in float32, bfloat16 and float16, got {x.dtype}.")


@triton.jit
def _pool_kernel(
        weights,  # (R, k)
        indices,  # (R, k)
        tokens,  # (T, E)
        pooled,  # out (R, E)
        k,
        width,
        BLOCK_K: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """A block of channels of the weighted sum of what one query selected."""
    query = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    result = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        weight = tl.load(weights + query * k + j, mask=j < k, other=0.)
        index = tl.load(indices + query * k + j, mask=j < k, other=0)
        mask = (j < k)[:, None] & (columns < width)[None, :]
        token = tl.load(tokens + index[:, None] * width + columns[None, :], mask=mask, other=0.).to(tl.float32)
        result += tl.sum(weight[:, None] * token, axis=0)
    tl.store(pooled + query * width + columns, result.to(pooled.dtype.element_ty), mask=columns < width)


@triton.jit
def _grad_scores_kernel(
        grad_pooled,  # (R, E)
        grad_weights,  # (R, k), what reaches the weights directly
        weights,  # (R, k), exponentials of the scores
        indices,  # (R, k)
        tokens,  # (T, E)
        grad,  # out (R, k)
        k,
        width,
        BLOCK_K: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """Gradient of a block of the scores of one query."""
    query = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    index = tl.load(indices + query * k + j, mask=j < k, other=0)
    result = tl.load(grad_weights + query * k + j, mask=j < k, other=0.).to(tl.float32)
    for start in range(0, width, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        mask = (j < k)[:, None] & (columns < width)[None, :]
        token = tl.load(tokens + index[:, None] * width + columns[None, :], mask=mask, other=0.).to(tl.float32)
        upstream = tl.load(grad_pooled + query * width + columns, mask=columns < width, other=0.).to(tl.float32)
        result += tl.sum(token * upstream[None, :], axis=1)
    weight = tl.load(weights + query * k + j, mask=j < k, other=0.)
    tl.store(grad + query * k + j, weight * result, mask=j < k)


@triton.jit
def _grad_tokens_kernel(
        weights,  # (R, k)
        grad_scores,  # (R, k)
        grad_pooled,  # (R, E)
        queries,  # (R, E)
        order,  # (R * k,), selections sorted by their token
        offsets,  # (T + 1,), where the selections of each token start in it
        grad_tokens,  # out (T, E)
        k,
        width,
        BLOCK_N: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """A block of channels of what all of one token's selections send to it."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    end = tl.load(offsets + token + 1)
    result = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(tl.load(offsets + token), end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        selection = tl.load(order + n, mask=n < end, other=0)
        weight = tl.load(weights + selection, mask=n < end, other=0.)
        grad_score = tl.load(grad_scores + selection, mask=n < end, other=0.)
        rows = (selection // k)[:, None] * width + columns[None, :]
        mask = (n < end)[:, None] & (columns < width)[None, :]
        upstream = tl.load(grad_pooled + rows, mask=mask, other=0.).to(tl.float32)
        query = tl.load(queries + rows, mask=mask, other=0.).to(tl.float32)
        result += tl.sum(weight[:, None] * upstream + grad_score[:, None] * query, axis=0)
    tl.store(grad_tokens + token * width + columns, result.to(grad_tokens.dtype.element_ty), mask=columns < width)


def pool(tokens: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the tokens that the queries selected, (R, E) in float32; as `timm_ait::pool`.

    Args:
        tokens: (T, E).
        weights: (R, k), float32.
        indices: (R, k).

    Raises:
        RuntimeError: Tensors are not on a CUDA device.
        TypeError: Tensors are of another dtype than float32, bfloat16 and float16.
    """
    _check(tokens, weights)
    pooled = weights.new_empty((len(weights), tokens.shape[1]))
    _launch_pool(tokens.contiguous(), weights.contiguous(), indices, pooled)
    return pooled


def _launch_pool(tokens: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, pooled: torch.Tensor) -> None:
    (num_queries, k), width = weights.shape, tokens.shape[1]
    _pool_kernel[(num_queries, triton.cdiv(width, _BLOCK_E))](
        weights,
        indices,
        tokens,
        pooled,
        k,
        width,
        BLOCK_K=_BLOCK_K,
        BLOCK_E=_BLOCK_E,
    )


def pool_backward(
        grad_pooled: torch.Tensor,
        grad_weights: torch.Tensor,
        queries: torch.Tensor,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `pool`, whose weights are exponentials of scores, for queries (R, E) and tokens (T, E).

    Args:
        grad_pooled: (R, E).
        grad_weights: (R, k).
        queries: (R, E), whose products with the tokens are the scores.
        tokens: As given to `pool`.
        weights: As given to `pool`.
        indices: As given to `pool`.
    """
    _check(queries, tokens)
    grad_pooled, grad_weights = grad_pooled.contiguous(), grad_weights.contiguous()
    queries, tokens, weights = queries.contiguous(), tokens.contiguous(), weights.contiguous()
    num_queries, k = indices.shape
    num_tokens, width = tokens.shape
    grad_scores = torch.empty_like(weights)
    _grad_scores_kernel[(num_queries, triton.cdiv(k, _BLOCK_K))](
        grad_pooled,
        grad_weights,
        weights,
        indices,
        tokens,
        grad_scores,
        k,
        width,
        BLOCK_K=_BLOCK_K,
        BLOCK_E=_BLOCK_E,
    )
    grad_queries = torch.empty_like(queries)
    _launch_pool(tokens, grad_scores, indices, grad_queries)
    by_token, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(by_token, torch.arange(num_tokens + 1, device=tokens.device))
    grad_tokens = torch.empty_like(tokens)
    _grad_tokens_kernel[(num_tokens, triton.cdiv(width, _BLOCK_E))](
        weights,
        grad_scores,
        grad_pooled,
        queries,
        order,
        offsets,
        grad_tokens,
        k,
        width,
        BLOCK_N=_BLOCK_K // 2,
        BLOCK_E=_BLOCK_E,
    )
    return grad_queries, grad_tokens


@triton.jit
def _association(
        state,  # (T, E)
        keys,  # (M, E)
        rows,
        slots,
        num_tokens,
        num_slots,
        width,
        DOT_DTYPE: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """Products of a block of rows of state with the keys."""
    result = tl.zeros((rows.shape[0], slots.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        row_mask = (rows < num_tokens)[:, None] & (columns < width)[None, :]
        slot_mask = (slots < num_slots)[:, None] & (columns < width)[None, :]
        x = tl.load(state + rows[:, None] * width + columns[None, :], mask=row_mask, other=0.)
        key = tl.load(keys + slots[:, None] * width + columns[None, :], mask=slot_mask, other=0.)
        # not the tensor cores' rounding of float32: PyTorch does not use it by default either
        result = tl.dot(x.to(DOT_DTYPE), tl.trans(key).to(DOT_DTYPE), result, input_precision='ieee')
    return result


@triton.jit
def _softmax(scores, slots, num_slots):
    scores = tl.where((slots < num_slots)[None, :], scores, float('-inf'))
    scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return scores / tl.sum(scores, axis=1)[:, None]


@triton.jit
def _add_product(
        x,  # block of rows (BLOCK_T, BLOCK_M)
        table,  # (M, E)
        base,  # (T, E), read if HAS_BASE
        output,  # out (T, E)
        rows,
        slots,
        num_tokens,
        num_slots,
        width,
        HAS_BASE: tl.constexpr,
        DOT_DTYPE: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """Rows of output = base + x table."""
    for start in range(0, width, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        row_mask = (rows < num_tokens)[:, None] & (columns < width)[None, :]
        slot_mask = (slots < num_slots)[:, None] & (columns < width)[None, :]
        block = tl.load(table + slots[:, None] * width + columns[None, :], mask=slot_mask, other=0.)
        result = tl.dot(x.to(DOT_DTYPE), block.to(DOT_DTYPE), input_precision='ieee')
        at = rows[:, None] * width + columns[None, :]
        if HAS_BASE:
            result += tl.load(base + at, mask=row_mask, other=0.).to(tl.float32)
        tl.store(output + at, result.to(output.dtype.element_ty), mask=row_mask)


@triton.jit
def _read_kernel(
        state,  # (T, E)
        keys,  # (M, E)
        values,  # (M, E)
        residual,  # (T, E)
        output,  # out (T, E)
        num_tokens,
        num_slots,
        width,
        DOT_DTYPE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """Retrieval of a block of tokens."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_M)
    scores = _association(state, keys, rows, slots, num_tokens, num_slots, width, DOT_DTYPE, BLOCK_E)
    p = _softmax(scores, slots, num_slots)
    _add_product(p, values, residual, output, rows, slots, num_tokens, num_slots, width, True, DOT_DTYPE, BLOCK_E)


@triton.jit
def _read_backward_kernel(
        grad,  # (T, E)
        state,  # (T, E)
        keys,  # (M, E)
        values,  # (M, E)
        association,  # out (T, M)
        grad_scores,  # out (T, M)
        grad_state,  # out (T, E)
        num_tokens,
        num_slots,
        width,
        STATE_IS_RESIDUAL: tl.constexpr,
        DOT_DTYPE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_E: tl.constexpr,
):
    """Gradients of a block of tokens, and of their scores."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_M)
    scores = _association(state, keys, rows, slots, num_tokens, num_slots, width, DOT_DTYPE, BLOCK_E)
    p = _softmax(scores, slots, num_slots)
    dp = _association(grad, values, rows, slots, num_tokens, num_slots, width, DOT_DTYPE, BLOCK_E)
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])
    at = rows[:, None] * num_slots + slots[None, :]
    mask = (rows < num_tokens)[:, None] & (slots < num_slots)[None, :]
    tl.store(association + at, p.to(association.dtype.element_ty), mask=mask)
    tl.store(grad_scores + at, ds.to(grad_scores.dtype.element_ty), mask=mask)
    _add_product(
        ds,
        keys,
        grad,
        grad_state,
        rows,
        slots,
        num_tokens,
        num_slots,
        width,
        STATE_IS_RESIDUAL,
        DOT_DTYPE,
        BLOCK_E,
    )


def _read_options(keys: torch.Tensor) -> Dict[str, Any]:
    """Launch options that keep a block of tokens by slots in registers."""
    num_slots = keys.shape[0]
    if num_slots > _MAX_SLOTS:
        raise ValueError(f"Triton reads from at most {_MAX_SLOTS} slots, got {num_slots}.")
    # the interpreter would multiply the bits of bfloat16 as integers
    dtype = torch.float32 if _interpreting() else keys.dtype
    block = 32 if num_slots <= 64 else 16
    return dict(
        DOT_DTYPE=getattr(tl, str(dtype).removeprefix('torch.')),
        BLOCK_T=block,
        BLOCK_M=max(16, triton.next_power_of_2(num_slots)),
        BLOCK_E=block,
        num_warps=4 if num_slots <= 64 else 8,
    )


def read(
        state: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        residual: torch.Tensor,
) -> torch.Tensor:
    """Retrieval added to a residual, `residual + softmax(state keys^T) values`, (T, E); as `timm_ait::read`.

    Args:
        state: (T, E).
        keys: (M, E), of the state's dtype as all others.
        values: (M, E).
        residual: (T, E).

    Raises:
        RuntimeError: Tensors are not on a CUDA device.
        TypeError: Tensors are of another dtype than float32, bfloat16 and float16.
        ValueError: More than 512 slots.
    """
    _check(state, keys, values)
    state, keys, values, residual = state.contiguous(), keys.contiguous(), values.contiguous(), residual.contiguous()
    num_tokens, width = state.shape
    output = torch.empty_like(state)
    options = _read_options(keys)
    _read_kernel[(triton.cdiv(num_tokens, options['BLOCK_T']),)](
        state,
        keys,
        values,
        residual,
        output,
        num_tokens,
        keys.shape[0],
        width,
        **options,
    )
    return output


def read_backward(
        grad: torch.Tensor,
        state: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        state_is_residual: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `read` for state (T, E), keys (M, E) and values (M, E).

    Args:
        grad: (T, E).
        state: As given to `read`.
        keys: As given to `read`.
        values: As given to `read`.
        state_is_residual: Whether the state was its own residual.
    """
    _check(state, keys, values)
    grad, state, keys, values = grad.contiguous(), state.contiguous(), keys.contiguous(), values.contiguous()
    num_tokens, width = state.shape
    association = state.new_empty((num_tokens, keys.shape[0]))
    grad_scores = torch.empty_like(association)
    grad_state = torch.empty_like(state)
    options = _read_options(keys)
    _read_backward_kernel[(triton.cdiv(num_tokens, options['BLOCK_T']),)](
        grad,
        state,
        keys,
        values,
        association,
        grad_scores,
        grad_state,
        num_tokens,
        keys.shape[0],
        width,
        STATE_IS_RESIDUAL=state_is_residual,
        **options,
    )
    # sums over tokens: what a GEMM does best, and in a fixed order
    return grad_state, grad_scores.T @ state, association.T @ grad
