""" What counters of multiply-accumulates see of the workspace. """
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from tests.deployment import images, make_ait, make_vit
from timm_ait.layers import GlobalWorkspace

BATCH, TOKENS, DIM, SLOTS, SLOT_DIM = 2, 7, 24, 8, 16
DEPTH, EMBED_DIM = 2, 64


def make_workspace(**kwargs):
    return GlobalWorkspace(DIM, SLOTS, SLOT_DIM, workspace_heads=4, bottleneck=5, **kwargs)


def read_macs(num_tokens, dim=DIM, steps=1):
    """Attractors of the slots, then scores and mean of the attractors for each token and step."""
    return SLOTS * SLOT_DIM * dim + steps * 2 * num_tokens * SLOTS * dim


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
    assert count(layer, torch.randn(BATCH, TOKENS, DIM)) == read_macs(BATCH * TOKENS, steps=steps)


@COUNTERS
def test_of_a_model_beyond_its_vit(count):
    x = images(BATCH)
    num_tokens = BATCH * 16
    assert count(make_ait(), x) - count(make_vit(), x) == DEPTH * read_macs(num_tokens, EMBED_DIM)
