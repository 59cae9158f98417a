""" Evaluation reads the memory that is stored, whatever changed it: nothing is cached. """
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from timm.utils import ModelEmaV3

from tests.deployment import images, make_ait, train
from tests.layers import make_workspace
from timm_ait.ops import naive


def tokens(dtype=torch.float32):
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3)).to(dtype)


def some_memory(seed=1):
    """Neither orthonormal nor of unit norm."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_reads_its_memory(layer, dtype=torch.float32, tolerance=1e-4):
    """The layer computes its equations with the rows of the memory normalised, whatever it has read before."""
    normed = layer.norm(tokens(dtype))
    attractors = layer.attractors(F.normalize(layer.memory.double(), dim=-1).to(dtype))
    expected = normed + naive.retrieve(normed, attractors, layer.beta)
    torch.testing.assert_close(layer(tokens(dtype)), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def layer():
    """A layer that has read once with another memory."""
    layer = make_workspace().eval()
    layer(tokens())
    return layer


def change_in_inference_mode(layer):
    with torch.inference_mode():
        layer.memory.copy_(some_memory())


def save_and_load(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('change', [
    lambda layer: layer.memory.copy_(some_memory()),
    lambda layer: layer.memory.data.copy_(some_memory()),
    lambda layer: setattr(layer, 'memory', some_memory()),
    lambda layer: layer.load_state_dict({**layer.state_dict(), 'memory': some_memory()}),
    lambda layer: layer.load_state_dict({**layer.state_dict(), 'memory': some_memory()}, assign=True),
    lambda layer: layer.reset_parameters(),
    change_in_inference_mode,
], ids=['in place', 'data', 'replaced', 'loaded', 'assigned', 'reset', 'inference mode'])
def test_a_changed_memory_is_read(layer, change):
    change(layer)
    assert_reads_its_memory(layer)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_cast_memory_is_read(layer, dtype, tolerance):
    layer.memory.copy_(some_memory())
    assert_reads_its_memory(layer.to(dtype), dtype, tolerance)


@pytest.mark.parametrize('make_copy', [copy.deepcopy, save_and_load])
def test_a_copy_has_a_memory_of_its_own(layer, make_copy):
    twin = make_copy(layer)
    assert torch.equal(twin(tokens()), layer(tokens()))
    twin.memory.copy_(some_memory())
    assert_reads_its_memory(twin)
    assert_reads_its_memory(layer)


@pytest.mark.parametrize('average', [
    lambda model: ModelEmaV3(model, decay=0.5), lambda model: AveragedModel(model, use_buffers=True)])
def test_averaged_copies_read_the_memory_of_the_last_update(average):
    model = make_workspace()
    average = average(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
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


def test_a_checkpoint_holds_of_the_memory_nothing_but_itself():
    keys = set(make_workspace().state_dict())
    parameters = {name for name, _ in make_workspace().named_parameters()}
    assert keys - parameters == {'memory'}
