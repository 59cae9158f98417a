""" Graphs in ONNX, run by onnxruntime. """
import onnxruntime
import pytest
import torch
from timm.utils.onnx import onnx_export
from torch.export import Dim

from tests.deployment import TOLERANCE, images, make_ait, make_vit, other_memory

MODELS = [make_ait, make_vit]


def export(model, path, dynamo, dynamic_sizes=None):
    """Export with dimensions {number: name} of the images that may change."""
    if not dynamic_sizes:
        how = {}
    elif dynamo:
        how = dict(dynamic_shapes=({number: Dim.DYNAMIC for number in dynamic_sizes},))
    else:
        how = dict(dynamic_axes={'images': dynamic_sizes})
    torch.onnx.export(model, (images(),), str(path), dynamo=dynamo, input_names=['images'], verbose=False, **how)
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


def assert_same_logits(session, model, x):
    (logits,) = session.run(None, {'images': x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), **TOLERANCE)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
class TestOnnx:

    @pytest.mark.parametrize('make', MODELS)
    def test_fixed_size(self, tmp_path, make, dynamo):
        model = make()
        assert_same_logits(export(model, tmp_path / 'model.onnx', dynamo), model, images(seed=2))

    @pytest.mark.parametrize('make', MODELS)
    def test_dynamic_batch(self, tmp_path, make, dynamo):
        model = make()
        session = export(model, tmp_path / 'model.onnx', dynamo, {0: 'batch'})
        for batch_size in (1, 5):
            assert_same_logits(session, model, images(batch_size, seed=2))

    @pytest.mark.parametrize('make', MODELS)
    def test_dynamic_image_size(self, tmp_path, make, dynamo):
        # the exporters lack the antialiased resampling of timm's position embedding
        model = make(dynamic_img_size=True, pos_embed='none')
        session = export(model, tmp_path / 'model.onnx', dynamo, {0: 'batch', 2: 'height', 3: 'width'})
        for batch_size, size in ((1, 16), (3, 24)):
            assert_same_logits(session, model, images(batch_size, size, seed=2))

    @pytest.mark.parametrize('kwargs', [dict(gated=True), dict(beta=2., retrieval_steps=2)], ids=['gated', 'two_steps'])
    def test_other_retrievals(self, tmp_path, kwargs, dynamo):
        model = make_ait(**kwargs)
        assert_same_logits(export(model, tmp_path / 'model.onnx', dynamo), model, images(seed=2))

    def test_holds_the_memory_of_its_time(self, tmp_path, dynamo):
        model = make_ait()
        other_memory(model)
        assert_same_logits(export(model, tmp_path / 'model.onnx', dynamo), model, images(seed=2))

    def test_timms_own_export_checks(self, tmp_path, dynamo):
        model = make_ait()
        path = tmp_path / 'model.onnx'
        onnx_export(model, str(path), images(), check=True, check_forward=True, use_dynamo=dynamo, input_names=['images'])
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        assert_same_logits(session, model, images())

    def test_export_leaves_the_model_as_it_was(self, tmp_path, dynamo):
        model = make_ait()
        expected, state = model(images()), {name: value.clone() for name, value in model.state_dict().items()}
        export(model, tmp_path / 'model.onnx', dynamo)
        assert not model.training and torch.equal(model(images()), expected)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
