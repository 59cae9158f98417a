""" What holds for every shape, bottleneck, mask and precision. """
import contextlib

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from tests.devices import unfused
from timm_ait.ops import memory, naive, workspace

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: dict(atol=1e-4, rtol=1e-3), torch.float64: dict(atol=1e-9, rtol=1e-7)}

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def steps(draw, max_tokens=40, dtypes=DTYPES):
    """Arguments of `write_and_read`, most of them drawn from a seed."""
    num_tokens, dim = draw(st.integers(1, max_tokens)), draw(st.integers(1, 12))
    num_slots, slot_dim = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    num_heads, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32)))

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lift = randn(slot_dim, dim)
    return dict(
        x=randn(num_tokens, dim),
        norm=naive.TokenNorm(1. + 0.1 * randn(dim), 0.1 * randn(dim), 1e-3),
        memory=torch.nn.functional.normalize(randn(num_slots, slot_dim), dim=-1),
        weights=naive.WriteWeights(
            query=randn(num_heads * slot_dim, slot_dim),
            key=randn(num_heads * slot_dim, dim) / dim ** 0.5,
            value=randn(num_heads * slot_dim, dim) / dim ** 0.5,
            output=randn(slot_dim, num_heads * slot_dim) / (num_heads * slot_dim) ** 0.5,
            norm_weight=1. + 0.1 * randn(slot_dim),
            norm_bias=0.1 * randn(slot_dim),
        ),
        num_heads=num_heads,
        bottleneck=draw(st.integers(1, max_tokens + 5)),
        lift=lambda written: written @ lift,
        momentum=draw(st.floats(0., 1.)),
        rule='normalize',  # two ways to a polar factor agree where the matrix is well conditioned, see test_memory.py
        beta=draw(st.floats(0.1, 4.)),
        gate=randn(dim) if draw(st.booleans()) else None,
        token_mask=torch.rand(num_tokens, generator=generator) < 0.7 if draw(st.booleans()) else None,
    )


def scores_are_distinct(step):
    """Whether no rounding can change which tokens are kept."""
    tokens = torch.nn.functional.layer_norm(step['x'], step['x'].shape[1:], *step['norm'])
    query = (step['memory'] @ step['weights'].query.T).unflatten(-1, (step['num_heads'], -1)).transpose(0, 1)
    keys = (tokens @ step['weights'].key.T).unflatten(-1, (step['num_heads'], -1)).transpose(0, 1)
    ordered = (query @ keys.transpose(1, 2)).sort(dim=-1).values
    return (ordered.diff(dim=-1).abs() > 1e-5 * ordered.abs().max()).all()


def floats(step):
    """Tensors of floating point numbers, also those in the tuples of parameters."""
    values = [x for value in step.values() for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]


def with_floats(step, tensors):
    """The step with others in their place."""
    tensors = iter(tensors)

    def other(x):
        return next(tensors) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {
        name: type(value)(*map(other, value)) if isinstance(value, tuple) else other(value)
        for name, value in step.items()}


class TestStep:

    @pytest.mark.parametrize('device', [contextlib.nullcontext, unfused])
    @few
    @given(step=steps())
    def test_outputs_and_gradients_are_those_of_naive(self, step, device):
        if not scores_are_distinct(step):
            step['bottleneck'] = len(step['x'])
        results = []
        for function in (workspace.write_and_read, naive.write_and_read):
            leaves = [x.clone().requires_grad_() for x in floats(step)]
            with device():
                output, written, candidate, balance, coverage = function(**with_floats(step, leaves))
            direction = torch.linspace(-1., 1., output.numel(), dtype=output.dtype).view_as(output)
            ((output * direction).sum() + 0.1 * balance).backward()
            results.append([output, written, candidate, balance, coverage, *(leaf.grad for leaf in leaves)])
        for fused, expected in zip(*results):
            fused = torch.zeros_like(expected) if fused is None else fused
            expected = torch.zeros_like(fused) if expected is None else expected
            scale = expected.abs().max().clamp_min(1.) if expected.numel() else 1.
            torch.testing.assert_close(fused / scale, expected / scale, **TOLERANCE[step['x'].dtype])

    @few
    @given(steps(dtypes=[torch.float64]), st.randoms(use_true_random=False))
    def test_the_order_of_tokens_does_not_matter(self, step, random):
        order = list(range(len(step['x'])))
        random.shuffle(order)
        mask = step['token_mask']
        shuffled = {**step, 'x': step['x'][order], 'token_mask': mask if mask is None else mask[order]}
        output, *others = workspace.write_and_read(**step)
        shuffled_output, *shuffled_others = workspace.write_and_read(**shuffled)
        torch.testing.assert_close([shuffled_output, *shuffled_others], [output[order], *others])

    @few
    @given(steps(), st.integers(0, 100))
    def test_a_bottleneck_of_all_tokens_or_more_keeps_all(self, step, more):
        num_tokens = len(step['x'])
        every, beyond = (
            workspace.write_and_read(**{**step, 'bottleneck': k}) for k in (num_tokens, num_tokens + more))
        assert all(torch.equal(a, b) for a, b in zip(every, beyond))
        valid = num_tokens if step['token_mask'] is None else int(step['token_mask'].sum())
        assert float(every[4]) == pytest.approx(float(valid > 0))

    @few
    @given(steps())
    def test_the_balance_loss_is_not_negative_and_coverage_is_a_share(self, step):
        _, _, _, balance, coverage = workspace.write_and_read(**step)
        assert balance >= 0. and 0. <= coverage <= 1.

    @settings(few, max_examples=10)
    @given(steps(max_tokens=6, dtypes=[torch.float64]))
    def test_gradients_are_those_of_finite_differences(self, step):
        def outputs(*tensors):
            return workspace.write_and_read(**with_floats(step, tensors))[:4:3]

        torch.autograd.gradcheck(outputs, [x.clone().requires_grad_() for x in floats(step)], fast_mode=True)


class TestMemory:

    @few
    @given(steps(), st.integers(0, 2 ** 32), st.floats(0.5, 1.))
    def test_slots_are_orthonormal_after_an_update(self, step, seed, momentum):
        shape, dtype = step['memory'].shape, step['memory'].dtype
        torch.manual_seed(seed)
        before = naive.polar(torch.randn(shape, dtype=dtype))
        candidate = torch.nn.functional.normalize(torch.randn(shape, dtype=dtype), dim=-1)
        averaged = momentum * before + (1. - momentum) * candidate
        assume(torch.linalg.cond(averaged) < 15)  # what the iterations are for
        updated = memory.update_memory(before, candidate, momentum)
        torch.testing.assert_close(updated.norm(dim=-1), torch.ones(shape[0], dtype=dtype))
        if shape[0] <= shape[1]:
            torch.testing.assert_close(updated @ updated.T, torch.eye(shape[0], dtype=dtype), atol=1e-4, rtol=0.)


class TestRetrieval:

    @few
    @given(steps())
    def test_it_never_raises_the_energy(self, step):
        state, attractors, beta = step['x'], step['lift'](step['memory']), step['beta']
        retrieved = naive.retrieve(state, attractors, beta)
        before, after = (naive.energy(x.double(), attractors.double(), beta) for x in (state, retrieved))
        assert (after <= before + 1e-5 * (1. + before.abs())).all()

    @few
    @given(steps())
    def test_what_is_retrieved_lies_between_the_attractors(self, step):
        state, attractors = step['x'], step['lift'](step['memory'])
        retrieved = naive.retrieve(state, attractors, step['beta'])
        slack = 1e-5 * (1. + attractors.abs().max())
        assert (retrieved <= attractors.amax(dim=0) + slack).all()
        assert (retrieved >= attractors.amin(dim=0) - slack).all()
