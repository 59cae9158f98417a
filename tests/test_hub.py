""" Loading from repositories of the Hub. """
import json

import pytest
import torch

import timm
from timm.models import save_for_hf

import timm_ait  # noqa: F401, registers the models

REPO = 'someone/test_ait.mine'


@pytest.fixture
def files(tmp_path):
    """A model with three classes, as timm saves it."""
    save_for_hf(timm.create_model('test_ait', num_classes=3), tmp_path / 'saved', safe_serialization=True)
    return {file.name: file.read_bytes() for file in (tmp_path / 'saved').iterdir()}


# the second is how a tag without a shipped file is loaded
@pytest.mark.parametrize('name, overlay', [(f'hf-hub:{REPO}', None), ('test_ait', dict(hf_hub_id=REPO, num_classes=3))])
def test_a_repository_and_a_pretrained_tag(hub, files, tmp_path, name, overlay):
    hub(REPO, files)
    stored = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).state_dict()
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[key], stored[key]) for key in stored)


def test_weights_of_another_model_are_refused(hub, files):
    config = json.loads(files['config.json'])
    config['model_args'] = {**config['model_args'], 'depth': 4}
    hub(REPO, {**files, 'config.json': json.dumps(config).encode()})
    with pytest.raises(RuntimeError, match=r'nothing was loaded.*blocks\.3'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
