""" Graphs in ONNX, run by onnxruntime. """
import onnxruntime
import pytest
import torch
from torch.export import Dim

from tests.deployment import TOLERANCE, images, make_ait, other_memory
from tests.models import make_model

SIZES = {0: 'batch', 2: 'height', 3: 'width'}  # dimensions of images that may change


def assert_same_logits(path, model, *batches):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for x in batches:
        (logits,) = session.run(None, {'images': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), **TOLERANCE)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo', [pytest.param(True, marks=pytest.mark.slow), False], ids=['dynamo', 'torchscript'])
def test_any_batch_and_image_size(tmp_path, dynamo):
    # the exporters lack the antialiased resampling of timm's position embedding
    model = make_ait(dynamic_img_size=True, pos_embed='none')
    other_memory(model)
    expected, state = model(images()), {name: value.clone() for name, value in model.state_dict().items()}
    path, how = tmp_path / 'model.onnx', dict(dynamic_axes={'images': SIZES})
    if dynamo:
        how = dict(dynamic_shapes=(dict.fromkeys(SIZES, Dim.DYNAMIC),))
    torch.onnx.export(model, (images(),), str(path), dynamo=dynamo, input_names=['images'], verbose=False, **how)
    assert_same_logits(path, model, images(1, 16), images(3, 24))
    # and the model is as it was
    assert not model.training and torch.equal(model(images()), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name, kwargs', [
    ('set_transformer', {}), ('perceiver', {}), ('coordination', dict(num_slots=3)), ('centroid_transformer', {})])
def test_any_batch_of_a_baseline_by_the_exporter_that_traces(tmp_path, name, kwargs):
    model, path = make_model(f'test_{name}', img_size=16, **kwargs).eval(), tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (images(2),), str(path), dynamo=False, input_names=['images'], dynamic_axes={'images': {0: 'batch'}})
    assert_same_logits(path, model, images(1), images(3))
