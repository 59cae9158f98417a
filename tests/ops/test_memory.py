import pytest
import torch

from timm_ait.ops import naive
from timm_ait.ops.memory import keep_, polar, slot_statistics, update_memory

SHAPES = [(32, 32), (8, 32), (1, 16), (40, 16), (5, 1)]


@pytest.mark.parametrize('shape', SHAPES)
def test_polar_is_the_nearest_orthonormal_matrix(shape):
    matrix = naive.polar(torch.randn(shape)) + 0.3 * torch.randn(shape) / max(shape) ** 0.5
    torch.testing.assert_close(polar(matrix), naive.polar(matrix), atol=1e-4, rtol=1e-4)


def test_polar_separates_slots_that_share_a_large_common_component():
    memory = naive.polar(torch.randn(32, 32))
    # the most that a write can add: the same LayerNorm output in every slot
    common = torch.nn.functional.layer_norm(torch.randn(32), (32,))
    averaged = 0.9 * memory + 0.1 * common
    assert 10 < torch.linalg.cond(averaged) < 60  # what twelve iterations reach
    separated = polar(averaged)
    torch.testing.assert_close(separated @ separated.T, torch.eye(32), atol=1e-4, rtol=0)


def test_polar_has_the_gradient_of_its_definition():
    matrix = torch.eye(6, 9, dtype=torch.float64) + 0.1 * torch.randn(6, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(polar, matrix.requires_grad_())


@pytest.mark.parametrize('rule', ['orthogonal', 'normalize'])
@pytest.mark.parametrize('shape', SHAPES)
def test_update_matches_naive_and_rows_have_unit_norm(shape, rule):
    memory = naive.polar(torch.randn(shape))
    candidate = memory + 0.5 * torch.randn(shape)
    updated = update_memory(memory, candidate, 0.9, rule)
    torch.testing.assert_close(updated, naive.update_memory(memory, candidate, 0.9, rule), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(updated.norm(dim=-1), torch.ones(shape[0]))


def test_statistics_of_distinct_slots():
    statistics = slot_statistics(torch.eye(8, 16))
    assert statistics['effective_rank'] == pytest.approx(8.)
    assert statistics['mean_cosine'] == pytest.approx(0., abs=1e-6)


def test_statistics_of_collapsed_slots():
    statistics = slot_statistics(torch.randn(1, 16).expand(8, 16))
    assert statistics['effective_rank'] == pytest.approx(1., abs=1e-3)
    assert statistics['mean_cosine'] == pytest.approx(1., abs=1e-5)


def test_a_forward_inside_of_backward_keeps_what_is_pending():
    pending = torch.zeros(2)
    keep_(pending, torch.ones(2))
    x = torch.zeros(1, requires_grad=True)
    y = x * 1.
    y.register_hook(lambda grad: keep_(pending, torch.full((2,), 2.)))
    y.backward()
    assert torch.equal(pending, torch.ones(2))
