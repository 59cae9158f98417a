""" Evaluation reads the memory as it is, whatever changed it: its projection is never stale. """
import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from timm.utils import ModelEmaV3

from tests.deployment import images, make_ait, train
from tests.layers import make_workspace
from timm_ait.layers import advance_memory

SHAPE = (8, 16)
RULES = pytest.mark.parametrize('memory_update', ['orthogonal', 'normalize'])


def make_layer(**kwargs):
    return make_workspace(**kwargs).eval()


def tokens(dtype=torch.float32):
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


def some_memory(seed=1):
    """Neither orthonormal nor of unit norm."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def expected_read(layer, x):
    """The equations, with the projection by a singular value decomposition."""
    memory = layer.memory.detach().double()
    if layer.memory_update == 'orthogonal':
        u, _, v = torch.linalg.svd(memory, full_matrices=False)
        memory = u @ v
    memory = nn.functional.normalize(memory, dim=-1).to(x.dtype)
    normed = layer.norm(x)
    attractors = layer.attractors(memory)
    return normed + (normed @ attractors.T).softmax(dim=-1) @ attractors


@torch.no_grad()
def assert_reads_its_memory(layer, dtype=torch.float32, **tolerance):
    tolerance = tolerance or dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(tokens(dtype)), expected_read(layer, tokens(dtype)), **tolerance)


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@RULES
class TestOfALayer:
    """Each layer has read once with another memory."""

    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    @pytest.fixture
    def layer(self, memory_update):
        layer = make_layer(memory_update=memory_update)
        layer(tokens())
        return layer

    @pytest.mark.parametrize('change', [
        lambda layer: layer.memory.copy_(some_memory()),
        lambda layer: layer.memory[2].add_(1.),
        lambda layer: nn.init.normal_(layer.memory),
        lambda layer: layer.memory.view(-1)[:16].zero_().add_(torch.arange(16.)),
        lambda layer: layer.memory.detach().mul_(torch.arange(1., 17.)),
        lambda layer: torch._foreach_add_([layer.memory], [some_memory()]),
        lambda layer: setattr(layer, 'memory', some_memory()),
        lambda layer: layer._buffers.update(memory=some_memory()),
        lambda layer: [layer.memory.data.copy_(some_memory()), layer.eval()],
        lambda layer: layer.load_state_dict({**layer.state_dict(), 'memory': some_memory()}),
        lambda layer: layer.load_state_dict({**layer.state_dict(), 'memory': some_memory()}, assign=True),
        lambda layer: nn.Sequential(layer).load_state_dict({
            **nn.Sequential(layer).state_dict(), '0.memory': some_memory()}),
        lambda layer: layer.reset_parameters(),
    ], ids=[
        'copy', 'row', 'init', 'view', 'detached', 'foreach', 'replaced', 'replaced-in-buffers', 'data-ahead-of-eval',
        'loaded', 'assigned', 'loaded-as-a-part', 'reset'])
    def test_changed(self, layer, change):
        change(layer)
        assert_reads_its_memory(layer)

    def test_changed_in_inference_mode(self, layer):
        with torch.inference_mode():
            layer.memory.copy_(some_memory())
            assert_reads_its_memory(layer)
        assert_reads_its_memory(layer)

    def test_made_in_inference_mode(self, memory_update):
        with torch.inference_mode():
            layer = make_layer(memory_update=memory_update)
            layer(tokens())
            layer.memory.copy_(some_memory())
            assert_reads_its_memory(layer)

    @pytest.mark.parametrize('assign', [False, True])
    def test_changed_through_a_tensor_that_shares_its_storage(self, layer, assign):
        memory = some_memory()
        if assign:
            layer.load_state_dict({**layer.state_dict(), 'memory': memory}, assign=True)
        else:
            layer.memory = memory.view_as(memory)
        layer(tokens())
        memory.mul_(torch.arange(1., 17.))
        assert_reads_its_memory(layer)

    @pytest.mark.parametrize('dtype, tolerance', [
        (torch.float64, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
    def test_cast(self, layer, dtype, tolerance):
        layer.memory.copy_(some_memory())
        layer.to(dtype)
        assert_reads_its_memory(layer, dtype, atol=tolerance, rtol=tolerance)
        layer.memory.copy_(some_memory(seed=2))
        assert_reads_its_memory(layer, dtype, atol=tolerance, rtol=tolerance)

    def test_moved(self, layer):
        state = layer.state_dict()
        layer.to('meta').to_empty(device='cpu').load_state_dict({**state, 'memory': some_memory()})
        assert_reads_its_memory(layer)

    @pytest.mark.parametrize('copied', [
        copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded])
    def test_copied_and_changed(self, layer, copied):
        twin = copied(layer)
        assert torch.equal(twin(tokens()), layer(tokens()))
        twin.memory.copy_(some_memory())
        assert_reads_its_memory(twin)
        assert_reads_its_memory(layer)

    @pytest.mark.parametrize('evaluated', [False, True])
    def test_advanced(self, layer, evaluated):
        with torch.enable_grad():
            layer.train()(tokens())
        if evaluated:
            layer.eval()(tokens())
        advance_memory(layer)
        assert_reads_its_memory(layer.eval())

    def test_frozen_in_a_module_of_its_own_mode(self, layer):
        model = nn.Sequential(layer, nn.Dropout()).train()
        layer.eval()
        layer.memory.copy_(some_memory())
        model(tokens())
        assert_reads_its_memory(layer)


def averages(model):
    return {
        'timm': ModelEmaV3(model, decay=0.5),
        'timm-foreach-off': ModelEmaV3(model, decay=0.5, foreach=False),
        'swa': AveragedModel(model, use_buffers=True),
        'torch-ema': AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    }


@pytest.mark.parametrize('kind', ['timm', 'timm-foreach-off', 'swa', 'torch-ema'])
@RULES
def test_averaged_copies_read_the_memory_of_the_last_update(kind, memory_update):
    model = make_layer(memory_update=memory_update).train()
    average = averages(model)[kind]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    average.eval()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 24)).square().sum().backward()
        optimizer.step()
        (average.update if hasattr(average, 'update') else average.update_parameters)(model)
        before = average.module.memory.clone()
        assert_reads_its_memory(average.module)
        assert torch.equal(average.module.memory, before)


def test_a_model_that_trains_on_after_an_evaluation_evaluates_anew():
    model = make_ait()
    logits = model(images())
    train(model, 1)
    fresh = make_ait()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), fresh(images())) and not torch.equal(model(images()), logits)


def test_the_projection_is_made_once_for_many_forwards(monkeypatch):
    layer = make_layer()
    layer(tokens())
    calls = []
    monkeypatch.setattr('timm_ait.layers.workspace.project_memory', lambda *args: calls.append(args))
    layer(tokens())
    layer(tokens())
    assert not calls


def test_the_projection_is_in_no_checkpoint():
    assert all('slots' not in name and 'pending' not in name for name in make_ait().state_dict())


def test_evaluation_on_several_threads_reads_one_memory():
    layer = make_layer()
    layer.memory.copy_(some_memory())
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: layer(tokens()).detach(), range(32)))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
