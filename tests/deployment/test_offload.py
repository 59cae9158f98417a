""" accelerate's offloading, and models that begin on the meta device: the right numbers, or an error. """
import copy
from functools import partial

import accelerate
import pytest
import torch

from tests.deployment import images, make_ait, memories, train, workspaces
from tests.layers import make_workspace


@pytest.mark.parametrize('offload_buffers', [False, True])
@pytest.mark.parametrize('to', ['cpu', 'disk'])
@torch.no_grad()
def test_offloaded_it_computes_the_same(tmp_path, to, offload_buffers):
    model = make_ait()
    expected = model(images())
    offload = accelerate.cpu_offload if to == 'cpu' else partial(accelerate.disk_offload, offload_dir=str(tmp_path))
    offloaded = offload(copy.deepcopy(model), execution_device=torch.device('cpu'), offload_buffers=offload_buffers)
    for _ in range(2):
        torch.testing.assert_close(offloaded(images()), expected)


def test_training_an_offloaded_workspace_is_an_error():
    layer = workspaces(make_ait())[0].train()
    offloaded = accelerate.cpu_offload(layer, torch.device('cpu'), offload_buffers=True)
    with pytest.raises(RuntimeError, match='parameters on meta.*train without offloading'):
        offloaded(torch.randn(2, 9, 64))


class TestMeta:

    @pytest.mark.parametrize('assign', [False, True])
    def test_evaluates_and_trains_after_loading(self, assign):
        source = make_ait()
        model = make_ait().to('meta')
        if not assign:
            model.to_empty(device='cpu')
        model.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(model.eval()(images()), source(images()))
        before = memories(model)
        source = copy.deepcopy(source)
        for trained in (model, source):
            train(trained, 2)
        assert not any(torch.equal(a, b) for a, b in zip(memories(model), before))
        assert all(torch.equal(a, b) for a, b in zip(memories(model), memories(source)))

    @pytest.mark.parametrize('training', [False, True])
    def test_is_shapes_alone(self, training):
        layer = make_workspace().train(training).to('meta')
        output = layer(torch.randn(2, 3, 24, device='meta'))
        assert output.is_meta and output.shape == (2, 3, 24)
        assert all(x.is_meta for x in layer.written_since_step())
