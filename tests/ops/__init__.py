""" Arguments of a step, and the lean step against `naive.py` in float64. """
from typing import Dict, List

import torch

from timm_ait.ops import memory as lean_memory
from timm_ait.ops import naive, workspace

TOLERANCE = {
    torch.float64: dict(atol=1e-9, rtol=1e-7),
    torch.float32: dict(atol=1e-4, rtol=1e-3),
    torch.bfloat16: dict(atol=3e-2, rtol=3e-2),
    torch.float16: dict(atol=5e-3, rtol=5e-3),
}


def make_step(
        num_tokens: int = 64,
        dim: int = 24,
        num_slots: int = 8,
        slot_dim: int = 16,
        num_heads: int = 4,
        bottleneck=20,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **kwargs,
) -> Dict:
    """Arguments of `write_and_read`, in which tokens alone may be of half precision."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(torch.promote_types(dtype, torch.float32))

    inner, lift = num_heads * slot_dim, randn(slot_dim, dim)
    return dict(
        tokens=randn(num_tokens, dim).to(dtype),
        memory=torch.linalg.qr(randn(max(num_slots, slot_dim), max(num_slots, slot_dim)))[0][:num_slots, :slot_dim],
        weights=naive.WriteWeights(
            query=randn(inner, slot_dim) * 2,
            key=randn(inner, dim) / dim ** 0.5,
            value=randn(inner, dim) / dim ** 0.5,
            output=randn(slot_dim, inner) / inner ** 0.5,
            norm_weight=1 + 0.1 * randn(slot_dim),
            norm_bias=0.1 * randn(slot_dim),
        ),
        num_heads=num_heads,
        bottleneck=bottleneck,
        lift=lambda memory: memory @ lift.to(memory.dtype),
        **{name: value(randn) if callable(value) else value for name, value in kwargs.items()},
    )


def map_floats(step: Dict, function) -> Dict:
    """The step with a function of its floating point tensors in their place."""
    def other(x):
        return function(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {
        name: type(value)(*map(other, value)) if isinstance(value, tuple) else other(value)
        for name, value in step.items()}


def floats(step: Dict) -> List[torch.Tensor]:
    found = []
    map_floats(step, lambda x: found.append(x) or x)
    return found


def write_and_read(
        ops,
        tokens,
        memory,
        weights,
        num_heads,
        bottleneck,
        lift,
        token_mask=None,
        momentum=0.9,
        rule='orthogonal',
        **read_kwargs,
):
    """A training step of the layer, by `ops.naive` or `ops.workspace`: tokens write, then read what was written.

    Returns:
        Output (T, E), memory after the write and the candidate it was averaged with (M, D), balance loss and coverage.
    """
    candidate, balance, coverage = ops.write(
        tokens=tokens, memory=memory, weights=weights, num_heads=num_heads, bottleneck=bottleneck,
        token_mask=token_mask)
    update_memory = naive.update_memory if ops is naive else lean_memory.update_memory
    written = update_memory(memory, candidate, momentum, rule)
    output = ops.read(tokens=tokens, attractors=lift(written), **read_kwargs)
    return output, written, candidate, balance, coverage


def run(ops, step: Dict, dtype: torch.dtype = None):
    """Results of a step, and gradients of its floating point tensors, zero where there are none."""
    step = map_floats(step, lambda x: x.detach().to(dtype or x.dtype).clone().requires_grad_())
    output, written, candidate, balance, coverage = write_and_read(ops, **step)
    direction = torch.linspace(-1., 1., output.numel(), dtype=torch.float64).view_as(output).to(output.dtype)
    ((output * direction).sum() + 0.1 * balance).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in floats(step)]
    return [output, written, candidate, balance, coverage], grads


def assert_is_naive(step: Dict, min_scale: float = 1e-2) -> None:
    """Results and gradients of the lean step are those of `naive.py`, as exact as the dtype of the tokens.

    Errors are relative to the largest entry of each, or to the smallest scale that is given.
    """
    results, grads = run(workspace, step)
    expected, expected_grads = run(naive, step, torch.float64)
    for actual, wanted in zip(results + grads, expected + expected_grads):
        scale = wanted.abs().max().clamp_min(min_scale)
        torch.testing.assert_close(actual.double() / scale, wanted / scale, **TOLERANCE[step['tokens'].dtype])
