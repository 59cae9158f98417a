""" What counters of multiply-accumulates see of the workspace. """
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from tests.deployment import images, make_ait
from tests.layers import make_workspace


def read_macs(num_tokens, dim, steps=1):
    """Attractors of 8 slots of 16, then scores and mean of the attractors for each token and step."""
    return 8 * 16 * dim + steps * 2 * num_tokens * 8 * dim


def count_torch(model, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


def count_fvcore(model, *inputs):
    counts = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return sum(counts.by_operator()[name] for name in ('linear', 'matmul', 'addmm', 'conv'))


COUNTERS = pytest.mark.parametrize('count', [count_torch, count_fvcore])


@COUNTERS
@pytest.mark.parametrize('steps', [1, 3])
def test_of_evaluation(count, steps):
    layer = make_workspace(retrieval_steps=steps).eval()
    assert count(layer, torch.randn(2, 7, 24)) == read_macs(2 * 7, 24, steps)


@COUNTERS
def test_of_a_model_beyond_its_vit(count):
    x = images(2)
    assert count(make_ait(), x) - count(make_ait(workspace=False), x) == 2 * read_macs(2 * 16, 64)
