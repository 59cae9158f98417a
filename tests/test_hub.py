""" Loading from a Hub, by huggingface_hub's own client against the small server of `hub_server.py`. """
import json

import pytest
import torch

import timm
from timm.models import save_for_hf

import timm_ait  # noqa: F401, registers the models

REPO = 'someone/test_ait.mine'


@pytest.fixture
def stored(hub, tmp_path):
    """A model, saved by timm in a repository of the Hub."""
    model = timm.create_model('test_ait', num_classes=3)
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    hub.add(REPO, {file.name: file.read_bytes() for file in (tmp_path / 'saved').iterdir()})
    return model.state_dict()


# the second is how a tag without a shipped file is loaded
@pytest.mark.parametrize('name, overlay', [(f'hf-hub:{REPO}', None), ('test_ait', dict(hf_hub_id=REPO, num_classes=3))])
def test_a_repository_and_a_pretrained_tag(stored, name, overlay):
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[key], stored[key]) for key in stored)


def test_another_number_of_classes_keeps_the_rest(stored):
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=7)
    assert model.head.out_features == 7
    assert torch.equal(model.pos_embed, stored['pos_embed'])


def test_weights_of_another_model_are_refused(hub, stored):
    files = hub.repositories[REPO]
    config = json.loads(files['config.json'])
    config['model_args'] = {**config['model_args'], 'depth': 4}
    hub.add(REPO, {**files, 'config.json': json.dumps(config).encode()})
    with pytest.raises(RuntimeError, match=r'nothing was loaded.*blocks\.3'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
