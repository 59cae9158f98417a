""" accelerate's offloading, and models that begin on the meta device: the right numbers, or an error. """
import copy
from functools import partial

import accelerate
import pytest
import torch
from safetensors.torch import save_file

import timm

from tests.deployment import images, make_ait, memories, train, workspaces
from tests.layers import make_workspace


class TestAccelerate:

    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize('offload_buffers', [False, True])
    @pytest.mark.parametrize('to', ['cpu', 'disk'])
    def test_offload(self, tmp_path, to, offload_buffers):
        model = make_ait()
        expected = model(images())
        offload = accelerate.cpu_offload if to == 'cpu' else partial(accelerate.disk_offload, offload_dir=str(tmp_path))
        offloaded = offload(copy.deepcopy(model), execution_device=torch.device('cpu'), offload_buffers=offload_buffers)
        for _ in range(2):
            torch.testing.assert_close(offloaded(images()), expected)

    @pytest.mark.filterwarnings('ignore:The following device_map keys')
    def test_load_checkpoint_and_dispatch_in_part_to_disk(self, tmp_path):
        model = make_ait()
        save_file(model.state_dict(), tmp_path / 'model.safetensors')
        with accelerate.init_empty_weights():
            empty = timm.create_model('test_ait', img_size=16, depth=2, num_classes=5).eval()
        in_memory = ('patch_embed', 'pos_embed', 'blocks.0', 'norm', 'fc_norm', 'head')
        loaded = accelerate.load_checkpoint_and_dispatch(
            empty,
            str(tmp_path / 'model.safetensors'),
            device_map={**dict.fromkeys(in_memory, 'cpu'), 'blocks.1': 'disk'},
            offload_folder=str(tmp_path / 'offload'),
            offload_buffers=True,  # without, accelerate leaves out the buffers of what goes to disk, of any model
        )
        torch.testing.assert_close(loaded(images()), model(images()))


def test_training_an_offloaded_workspace_is_an_error():
    layer = workspaces(make_ait())[0].train()
    offloaded = accelerate.cpu_offload(layer, torch.device('cpu'), offload_buffers=True)
    with pytest.raises(RuntimeError, match='train without offloading'):
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

    @pytest.mark.parametrize('memory_update', ['orthogonal', 'normalize'])
    def test_to_empty_and_reset(self, memory_update):
        with torch.device('meta'):
            layer = make_workspace(memory_update=memory_update)
        layer.to_empty(device='cpu').reset_parameters()
        layer.eval()
        torch.testing.assert_close(layer.stored_memory().norm(dim=-1), torch.ones(8))
        assert layer(torch.randn(2, 24)).isfinite().all()

    @pytest.mark.parametrize('training', [False, True])
    def test_is_shapes_alone(self, training):
        layer = make_workspace().train(training).to('meta')
        output = layer(torch.randn(2, 3, 24, device='meta'))
        assert output.is_meta and output.shape == (2, 3, 24)
        assert all(x.is_meta for x in layer.written_since_step())
