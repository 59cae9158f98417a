import pytest
import torch
from safetensors.torch import save

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from tests.models import images, load, logits, make_model
from timm_ait import AssociativeTransformer

BODIES = {
    'ait_vit_tiny_patch16_224': 'vit_tiny_patch16_224',
    'ait_vit_small_patch16_224': 'vit_small_patch16_224',
    'ait_vit_base_patch16_224': 'vit_base_patch16_224',
    'ait_vit_small_patch14_dinov2': 'vit_small_patch14_dinov2',
    'test_ait_vit': 'test_vit',
}
OUR_TAGS = {'pets'}


def cfgs(name):
    """Entries of the cfgs with weights on the Hub, by tag."""
    # where timm has the original file too, the Hub's is taken, which is in timm's own format
    others = ('architecture', 'url', 'custom_load')
    return {
        cfg.tag: {key: value for key, value in cfg.to_dict().items() if key not in others}
        for cfg in get_arch_pretrained_cfgs(name).values() if cfg.hf_hub_id and cfg.tag not in OUR_TAGS}


@pytest.mark.parametrize('name, body', BODIES.items())
def test_tags_and_cfgs_are_those_of_timm_with_weights_on_the_hub(name, body):
    assert cfgs(name) == cfgs(body) != {}
    assert get_pretrained_cfg(name).tag == get_pretrained_cfg(body).tag
    assert {full.partition('.')[2] for full in timm.list_pretrained(f'{name}.*')} - OUR_TAGS == cfgs(body).keys()


@pytest.mark.parametrize('name', [
    'ait_vit_tiny_patch16_224.augreg_in21k_ft_in1k',
    pytest.param('ait_vit_small_patch16_224.augreg_in1k', marks=pytest.mark.slow),
    pytest.param('ait_vit_base_patch16_224.augreg2_in21k_ft_in1k', marks=pytest.mark.slow),
])
def test_with_weights_from_the_hub_it_is_timms_vit(hub, name):
    vit = timm.create_model(name.removeprefix('ait_'))
    hub(f'timm/{name.removeprefix("ait_")}', {'model.safetensors': save(vit.state_dict())})
    model = timm.create_model(name, pretrained=True)
    assert isinstance(model, AssociativeTransformer)
    assert torch.equal(logits(model, images(2, 224)), logits(vit, images(2, 224)))


class TestPretrained:

    @pytest.fixture
    def weights(self):
        """Weights of a ViT."""
        return make_model('test_vit').state_dict()

    @pytest.mark.parametrize('kwargs', [
        dict(num_classes=7), dict(num_classes=0), dict(img_size=96), dict(img_size=96, num_classes=7),
        dict(in_chans=1), dict(patch_size=8), dict(global_pool='avg', fc_norm=False)])
    def test_adapted_as_the_vit_is(self, weights, kwargs):
        x = images(2, kwargs.get('img_size', 160), kwargs.get('in_chans', 3))
        model, expected = load('test_ait_vit', weights, **kwargs), load('test_vit', weights, **kwargs)
        assert logits(model, x).shape == logits(expected, x).shape
        assert torch.equal(model.forward_features(x), expected.forward_features(x))

    @pytest.mark.parametrize('kwargs, key', [
        (dict(depth=7, num_classes=7), r'blocks\.6\.'), (dict(gated=False), r'blocks\.0\.mlp\.workspace\.memory')])
    def test_another_depth_or_residual_is_one_error(self, weights, kwargs, key):
        with pytest.raises(RuntimeError, match=f'nothing was loaded.*missing keys: {key}'):
            load('test_ait_vit', weights, **kwargs)

    def test_workspaces_are_loaded_whole_or_not_at_all(self):
        incomplete = make_model('test_ait_vit').state_dict()
        del incomplete['blocks.3.mlp.workspace.memory']
        with pytest.raises(RuntimeError, match='missing keys: blocks.3.mlp.workspace.memory'):
            load('test_ait_vit', incomplete)


def test_the_tag_pets_is_for_its_image_size_and_breeds():
    model = timm.create_model('ait_vit_small_patch14_dinov2.pets', device='meta')
    assert model.patch_embed.img_size == (196, 196)
    assert model.num_classes == len(set(model.pretrained_cfg['label_names'])) == 37
    config = timm.data.resolve_model_data_config(model)
    assert (config['input_size'], config['interpolation']) == ((3, 196, 196), 'bicubic')
    assert (config['crop_pct'], config['crop_mode']) == (1.0, 'squash')
