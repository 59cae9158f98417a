""" What holds for every shape, bottleneck, mask and precision. """
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import assert_is_naive, make_step
from timm_ait.ops import naive

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def steps(draw):
    """Arguments of `write_and_read`, most of them drawn from a seed."""
    num_tokens, dim = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    return make_step(
        num_tokens,
        dim,
        num_slots=draw(st.integers(1, 6)),
        slot_dim=draw(st.integers(1, 7)),
        num_heads=draw(st.integers(1, 4)),
        bottleneck=draw(st.one_of(st.integers(1, 45), st.floats(0.01, 1.))),
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        seed=draw(st.integers(0, 2 ** 32)),
        momentum=draw(st.floats(0., 1.)),
        rule='normalize',  # two ways to a polar factor agree where the matrix is well conditioned, see test_memory.py
        beta=draw(st.floats(0.1, 4.)),
        num_steps=draw(st.integers(1, 2)),
        residual=(lambda randn: randn(num_tokens, dim)) if draw(st.booleans()) else None,
        gate=(lambda randn: randn(dim)) if draw(st.booleans()) else None,
        token_mask=(lambda randn: randn(num_tokens) < 0.5) if draw(st.booleans()) else None,
    )


def scores_are_distinct(step):
    """Whether no rounding can change which tokens are kept."""
    tokens = step['tokens']
    query = (step['memory'] @ step['weights'].query.T).unflatten(-1, (step['num_heads'], -1)).transpose(0, 1)
    keys = (tokens @ step['weights'].key.T).unflatten(-1, (step['num_heads'], -1)).transpose(0, 1)
    ordered = (query @ keys.transpose(1, 2)).sort(dim=-1).values
    return (ordered.diff(dim=-1).abs() > 1e-5 * ordered.abs().max()).all()


@few
@given(steps())
def test_outputs_and_gradients_are_those_of_naive(step):
    if not scores_are_distinct(step):
        step['bottleneck'] = len(step['tokens'])
    assert_is_naive(step, min_scale=1.)


def energy(state, attractors, beta):
    """Energy of each token, (T,), up to a constant: equation 2 of `Hopfield Networks is All You Need`."""
    return 0.5 * state.square().sum(dim=-1) - torch.logsumexp(beta * state @ attractors.T, dim=-1) / beta


@few
@given(steps())
def test_retrieval_never_raises_the_energy_and_stays_between_the_attractors(step):
    state, attractors, beta = (x.double() for x in (
        step['tokens'], step['lift'](step['memory']), torch.tensor(step['beta'])))
    retrieved = naive.retrieve(state, attractors, beta)
    before, after = (energy(x, attractors, beta) for x in (state, retrieved))
    assert (after <= before + 1e-9 * (1. + before.abs())).all()
    slack = 1e-9 * (1. + attractors.abs().max())
    assert (retrieved <= attractors.amax(dim=0) + slack).all()
    assert (retrieved >= attractors.amin(dim=0) - slack).all()
