""" The lean step against naive.py. """
import pytest
import torch

from tests.ops import assert_is_naive, make_step, write_and_read
from timm_ait.ops import workspace

KINDS = {
    'plain': dict(), 'one token kept': dict(bottleneck=1), 'all but one': dict(bottleneck=63),
    'more than there are': dict(bottleneck=512), 'fraction': dict(bottleneck=0.3),
    'more slots than their width': dict(num_slots=12, slot_dim=8),
    'gated': dict(residual=lambda randn: randn(64, 24), gate=lambda randn: randn(24)),
    'several steps': dict(beta=0.7, num_steps=3),
    'published rule': dict(rule='normalize', momentum=0.5),
    'masked': dict(token_mask=torch.arange(64) % 3 > 0),
    'masked, fraction': dict(token_mask=torch.arange(64) % 3 > 0, bottleneck=0.3),
    # the spec's SVD has no gradient at the memory itself
    'all masked': dict(token_mask=torch.zeros(64, dtype=torch.bool), rule='normalize'),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_outputs_and_gradients_are_those_of_naive(kind, dtype):
    assert_is_naive(make_step(dtype=dtype, **KINDS[kind]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_tokens_of_half_precision_differ_by_rounding(dtype):
    # every token is kept, since rounding the scores may change which ones are
    step = make_step(40, bottleneck=40, dtype=dtype)
    assert [x.dtype for x in write_and_read(workspace, **step)] == [dtype, *4 * [torch.float32]]
    assert_is_naive(step)


def test_a_large_channel_in_many_tokens_does_not_overflow_half_precision():
    step = make_step(8192, bottleneck=4096, dtype=torch.float16)
    step['tokens'][:, 3] = 40.
    assert all(result.isfinite().all() for result in write_and_read(workspace, **step))


@pytest.mark.parametrize('padding', [float('nan'), float('inf'), 1e30])
def test_masked_tokens_may_be_anything(padding):
    mask = torch.arange(64) % 3 > 0
    step = make_step(token_mask=mask)
    expected = write_and_read(workspace, **step)
    step['tokens'] = step['tokens'].masked_fill(~mask.unsqueeze(-1), padding)
    output, *others = write_and_read(workspace, **step)
    torch.testing.assert_close([output[mask], *others], [expected[0][mask], *expected[1:]])


def test_a_tie_keeps_exactly_k_tokens():
    step = make_step(num_slots=1, num_heads=1, bottleneck=5)
    step['tokens'] = step['tokens'][:1].expand(64, -1)
    assert write_and_read(workspace, **step)[4] == 5 / 64


def test_gradients_of_gradients_are_those_of_finite_differences():
    step = make_step(5, 3, 2, 3, 2, 3, dtype=torch.float64, gate=lambda randn: randn(3))
    step['residual'] = step['tokens']

    def outputs(tokens, memory, query):
        weights = step['weights']._replace(query=query)
        return write_and_read(workspace, **{**step, 'tokens': tokens, 'memory': memory, 'weights': weights})[:4:3]

    inputs = [x.clone().requires_grad_() for x in (step['tokens'], step['memory'], step['weights'].query)]
    assert torch.autograd.gradcheck(outputs, inputs) and torch.autograd.gradgradcheck(outputs, inputs, atol=1e-3)


@pytest.mark.parametrize('bottleneck, num_tokens, k', [
    (5, 10, 5), (5, 3, 3), (0.5, 5, 3), (0.5, 4, 2), (1 / 64, 32768, 512), (1 / 64, 2, 1), (1., 7, 7), (0.1, 25, 3)])
def test_number_of_tokens_kept(bottleneck, num_tokens, k):
    assert workspace.num_kept(bottleneck, num_tokens) == k
    if isinstance(bottleneck, float):
        assert workspace.num_kept(bottleneck, torch.tensor(num_tokens).clamp_min(1)) == k
