""" int8: PyTorch's dynamic quantisation, torchao, and quantised export (pt2e). """
import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from tests.deployment import images, make_ait, memories, other_memory, workspaces
from tests.models import make_model
from timm_ait.analysis import analyse

pytestmark = pytest.mark.filterwarnings('ignore')


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def torchao(config, model):
    model = copy.deepcopy(model)
    quantize_(model, config)
    return model


weight_only = partial(torchao, Int8WeightOnlyConfig())
dynamic_torchao = partial(torchao, Int8DynamicActivationInt8WeightConfig())


def pt2e(model):
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images(8),), strict=True).module(), quantizer)
    prepared(images(8))
    return convert_pt2e(prepared)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('quantize', [dynamic, weight_only, dynamic_torchao, pt2e])
@torch.no_grad()
def test_logits_are_close_to_those_in_float(quantize):
    model = make_ait()
    silent = copy.deepcopy(model)
    for workspace in workspaces(silent):
        nn.init.zeros_(workspace.attractors.weight), nn.init.zeros_(workspace.attractors.bias)
    logits = quantize(model)(images(8))
    error = relative_error(logits, model(images(8)))
    assert 0. < error < 0.1
    # further from a workspace that reads nothing
    assert error < 0.3 * relative_error(logits, silent(images(8)))


@pytest.mark.parametrize('quantize', [dynamic, weight_only, dynamic_torchao])
@torch.no_grad()
def test_the_workspace_reads_a_memory_that_is_loaded_later(quantize):
    model = make_ait()
    quantized = quantize(model)
    assert all(torch.equal(a, b) for a, b in zip(memories(quantized), memories(model)))
    before = quantized(images(8))
    other_memory(quantized, model)
    assert not torch.equal(quantized(images(8)), before)
    assert relative_error(quantized(images(8)), model(images(8))) < 0.1


@torch.no_grad()
def test_models_with_questions():
    model, x, question = make_model('test_ait', question_dim=4).eval(), images(4, 32), torch.randn(4, 4)
    assert relative_error(dynamic(model)(x, question=question), model(x, question=question)) < 0.1


def test_analysis():
    figures, expected = analyse(dynamic(make_ait()), [images(8)]), analyse(make_ait(), [images(8)])
    assert figures.keys() == expected.keys()
    for name in figures:
        assert figures[name]['effective_slots'] == pytest.approx(expected[name]['effective_slots'], rel=0.1)
