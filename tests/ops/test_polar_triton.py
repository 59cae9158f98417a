""" On a GPU, or on the CPU with the environment variable TRITON_INTERPRET=1. """
import os

import pytest
import torch

from timm_ait.ops import memory

from .test_memory import degenerate

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# triton reads it when it is first imported
pytestmark = pytest.mark.skipif(
    DEVICE == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1', reason='needs a GPU or TRITON_INTERPRET=1')


@pytest.fixture(scope='module')
def kernels():
    from timm_ait.ops import polar_triton
    return polar_triton


@pytest.mark.parametrize('shape', [(32, 32), (8, 32), (1, 16), (5, 7), (17, 40), (64, 64)])
def test_the_kernel_gives_the_factor_and_derivative_of_the_products(kernels, shape):
    matrix, grad = torch.randn(2, *shape, device=DEVICE)
    factor = memory._polar_by_products(matrix)
    torch.testing.assert_close(kernels.polar_kernel(matrix), factor, atol=1e-6, rtol=0)
    expected = memory._polar_derivative_by_products(matrix, factor, grad)
    actual = kernels.polar_derivative_kernel(matrix, factor, grad)
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize('shape', [(32, 32), (8, 32)])
@pytest.mark.parametrize('name', ['layer norms', 'shared', 'one row', 'a row of zeros', 'tiny', 'huge'])
def test_the_kernel_gives_orthonormal_slots_whatever_was_written(kernels, name, shape):
    slots = kernels.polar_kernel(degenerate(name, *shape).to(DEVICE))
    torch.testing.assert_close(slots @ slots.T, torch.eye(shape[0], device=DEVICE), atol=1e-4, rtol=0)


@pytest.mark.parametrize('shape', [(32, 32), (8, 32)])
def test_the_kernel_gives_orthonormal_slots_for_zeros_and_a_finite_derivative(kernels, shape):
    zeros = torch.zeros(shape, device=DEVICE)
    slots = kernels.polar_kernel(zeros)
    torch.testing.assert_close(slots @ slots.T, torch.eye(shape[0], device=DEVICE), atol=1e-4, rtol=0)
    assert kernels.polar_derivative_kernel(zeros, slots, torch.randn(shape, device=DEVICE)).isfinite().all()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_the_kernel_gives_nan_for_a_matrix_that_is_not_finite(kernels, value):
    matrix = torch.eye(4, 6, device=DEVICE)
    matrix[1, 2] = value
    assert not kernels.polar_kernel(matrix).isfinite().any()


def test_the_kernel_takes_a_transposed_view(kernels):
    matrix = torch.randn(9, 6, device=DEVICE).T
    torch.testing.assert_close(kernels.polar_kernel(matrix), memory._polar_by_products(matrix), atol=1e-6, rtol=0)
