""" Loading from repositories of the Hub. """
import pytest
import torch

import timm
from timm.models import save_for_hf

import timm_ait

REPO = 'someone/test_ait.mine'


# the last takes the place of shipped weights
@pytest.mark.parametrize('arch, name, overlay', [
    ('test_ait', f'hf-hub:{REPO}', None), ('test_vit', f'hf-hub:{REPO}', None),
    ('test_ait', 'test_ait', dict(hf_hub_id=REPO, num_classes=3)),
    ('ait_tiny_hybrid_75', 'ait_tiny_hybrid_75', dict(hf_hub_id=REPO, num_classes=3))])
def test_a_repository_and_a_pretrained_tag(hub, tmp_path, arch, name, overlay):
    model = timm.create_model(arch, num_classes=3)
    model = timm_ait.add_workspace(model) if arch == 'test_vit' else model
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    hub(REPO, {file.name: file.read_bytes() for file in (tmp_path / 'saved').iterdir()})
    stored = model.state_dict()
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[key], stored[key]) for key in stored)
