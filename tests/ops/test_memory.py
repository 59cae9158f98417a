import pytest
import torch
import torch.nn.functional as F

from timm_ait.ops import memory, naive
from timm_ait.ops.memory import add_written_, slot_statistics, update_memory


def degenerate(name, num_slots=32, slot_dim=32):
    normed = F.layer_norm(torch.randn(num_slots, slot_dim), (slot_dim,))
    return {
        # 'memory_momentum=0': every row of a layer norm is orthogonal to the vector of ones
        'layer norms': normed,
        # the most that a write can add to a memory: the same in every slot
        'shared': 0.9 * naive.polar(torch.randn(num_slots, slot_dim)) + 0.1 * normed[:1],
        'one row': normed[:1].expand(num_slots, -1),
        'a row of zeros': torch.eye(num_slots, slot_dim).index_fill(0, torch.tensor(0), 0.).roll(1, 0),
        'zero': torch.zeros(num_slots, slot_dim),
        'tiny': 1e-20 * normed,
        'huge': 1e15 * normed,
    }[name]


# on the CPU, and on every other device
POLAR = pytest.mark.parametrize('polar', [memory.polar, memory._polar_by_products], ids=['cpu', 'products'])


@POLAR
@pytest.mark.parametrize('shape', [(32, 32), (8, 32), (1, 16), (5, 7)])
def test_polar_is_the_nearest_orthonormal_matrix(polar, shape):
    matrix = naive.polar(torch.randn(shape)) + 0.3 * torch.randn(shape) / max(shape) ** 0.5
    torch.testing.assert_close(polar(matrix), naive.polar(matrix), atol=1e-5, rtol=1e-4)


@POLAR
@pytest.mark.parametrize('shape', [(32, 32), (8, 32)])
@pytest.mark.parametrize('name', ['layer norms', 'shared', 'one row', 'a row of zeros', 'zero', 'tiny', 'huge'])
def test_slots_are_orthonormal_whatever_was_written(polar, name, shape):
    slots = polar(degenerate(name, *shape))
    torch.testing.assert_close(slots @ slots.T, torch.eye(shape[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@POLAR
def test_a_matrix_that_is_not_finite_has_a_result_that_is_not(polar, value):
    matrix = torch.eye(4, 6)
    matrix[1, 2] = value
    assert not polar(matrix).isfinite().any()


@pytest.mark.parametrize('shape', [(6, 9), (6, 6), (9, 6)])
def test_polar_has_the_gradients_of_its_definition(shape):
    matrix = torch.eye(*shape, dtype=torch.float64) + 0.3 * torch.randn(shape, dtype=torch.float64)
    matrix.requires_grad_()
    assert torch.autograd.gradcheck(memory.polar, matrix)
    assert torch.autograd.gradgradcheck(memory.polar, matrix)


@pytest.mark.parametrize('shape', [(32, 32), (8, 32)])
@pytest.mark.parametrize('name', ['layer norms', 'shared'])
def test_the_gradient_by_products_is_that_on_the_cpu(name, shape):
    matrix, grad = degenerate(name, *shape), torch.randn(shape)
    factor = memory.polar(matrix)
    expected = memory._polar_backward(matrix, factor, grad)
    actual = memory._polar_derivative_by_products(matrix, factor, grad)
    assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize('grad', [False, True])
def test_polar_is_a_well_formed_operator(grad):
    torch.library.opcheck(torch.ops.timm_ait.polar, (torch.randn(4, 6, requires_grad=grad),))


@pytest.mark.parametrize('rule', ['orthogonal', 'normalize'])
@pytest.mark.parametrize('shape', [(32, 32), (8, 32), (1, 16), (40, 16), (5, 1)])
def test_update_matches_naive_and_rows_have_unit_norm(shape, rule):
    before = naive.polar(torch.randn(shape))
    candidate = before + 0.5 * torch.randn(shape)
    updated = update_memory(before, candidate, 0.9, rule)
    torch.testing.assert_close(updated, naive.update_memory(before, candidate, 0.9, rule), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(updated.norm(dim=-1), torch.ones(shape[0]))


@pytest.mark.parametrize('slots, effective_rank, mean_cosine', [
    (torch.eye(8, 16), 8., 0.), (torch.ones(8, 16), 1., 1.)], ids=['distinct', 'collapsed'])
def test_statistics(slots, effective_rank, mean_cosine):
    statistics = slot_statistics(slots)
    assert statistics['effective_rank'] == pytest.approx(effective_rank, abs=1e-3)
    assert statistics['mean_cosine'] == pytest.approx(mean_cosine, abs=1e-5)


def test_a_forward_inside_of_backward_is_not_added_to_what_was_written():
    total, count = torch.zeros(2, 3), torch.zeros((), dtype=torch.long)
    y = torch.zeros(1, requires_grad=True) * 1.
    y.register_hook(lambda grad: add_written_(total, count, torch.ones(2, 3)))
    y.backward()
    assert count == 0
    add_written_(total, count, torch.ones(2, 3))
    assert count == 1 and torch.equal(total, torch.ones(2, 3))
