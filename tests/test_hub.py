""" Loading from repositories of the Hub. """
import dataclasses

import pytest
import torch

import timm
from timm.models import save_for_hf

import timm_ait

REPO = 'someone/test_ait.mine'


HERE = dict(hf_hub_id=REPO, num_classes=3)
SHIPPED = timm.get_pretrained_cfg('ait_tiny_hybrid_75')


# the last two take the place of shipped weights
@pytest.mark.parametrize('arch, name, kwargs', [
    ('test_ait', f'hf-hub:{REPO}', {}), ('test_vit', f'hf-hub:{REPO}', {}),
    ('test_ait', 'test_ait', dict(pretrained_cfg_overlay=HERE)),
    ('ait_tiny_hybrid_75', 'ait_tiny_hybrid_75', dict(pretrained_cfg_overlay=HERE)),
    ('ait_tiny_hybrid_75', 'ait_tiny_hybrid_75', dict(pretrained_cfg=dataclasses.replace(SHIPPED, **HERE)))])
def test_a_repository_and_a_pretrained_tag(hub, tmp_path, arch, name, kwargs):
    model = timm.create_model(arch, num_classes=3)
    model = timm_ait.add_workspace(model) if arch == 'test_vit' else model
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    hub(REPO, {file.name: file.read_bytes() for file in (tmp_path / 'saved').iterdir()})
    stored = model.state_dict()
    loaded = timm.create_model(name, pretrained=True, **kwargs).state_dict()
    assert loaded.keys() == stored.keys() and all(torch.equal(loaded[key], stored[key]) for key in stored)
