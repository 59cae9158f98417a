import pytest
import torch
from safetensors.torch import save, save_file

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, save_for_hf

from tests.models import images, logits, make_model, open_gates
from timm_ait import AssociativeTransformer

BODIES = {
    'ait_vit_tiny_patch16_224': 'vit_tiny_patch16_224',
    'ait_vit_small_patch16_224': 'vit_small_patch16_224',
    'ait_vit_base_patch16_224': 'vit_base_patch16_224',
    'ait_vit_small_patch14_dinov2': 'vit_small_patch14_dinov2',
    'test_ait_vit': 'test_vit',
}
OUR_TAGS = {'pets'}


@pytest.mark.parametrize('name, body', BODIES.items())
class TestBody:

    def test_every_tag_with_weights_on_the_hub_is_there(self, name, body):
        tags = {full.partition('.')[2] for full, cfg in get_arch_pretrained_cfgs(body).items() if cfg.hf_hub_id}
        assert tags
        assert {full.partition('.')[2] for full in timm.list_pretrained(f'{name}.*')} - OUR_TAGS == tags
        assert get_pretrained_cfg(name).tag == get_pretrained_cfg(body).tag

    def test_cfgs_are_those_of_timm_but_for_the_name(self, name, body):
        for full, cfg in get_arch_pretrained_cfgs(name).items():
            if cfg.tag in OUR_TAGS:
                continue
            assert cfg.hf_hub_id == f'timm/{body}.{cfg.tag}'
            ours, theirs = cfg.to_dict(), get_pretrained_cfg(f'{body}.{cfg.tag}').to_dict()
            # where timm has the original file too, the Hub's is taken, which is in timm's own format
            for key in ('architecture', 'url', 'custom_load'):
                ours.pop(key, None), theirs.pop(key, None)
            assert ours == theirs, full


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
    def vit(self, tmp_path):
        """A ViT and the file that holds its weights."""
        vit = make_model('test_vit')
        save_file(vit.state_dict(), tmp_path / 'model.safetensors')
        return vit, dict(file=str(tmp_path / 'model.safetensors'))

    def load(self, overlay, **kwargs):
        return timm.create_model('test_ait_vit', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    @pytest.mark.parametrize('training', [False, True])
    def test_logits_are_those_of_the_vit(self, vit, training):
        assert torch.equal(self.load(vit[1]).train(training)(images(2, 160)), vit[0].train(training)(images(2, 160)))

    @pytest.mark.parametrize('kwargs', [
        dict(num_classes=7), dict(num_classes=0), dict(img_size=96), dict(img_size=96, num_classes=7),
        dict(in_chans=1), dict(patch_size=8), dict(global_pool='avg', fc_norm=False)])
    def test_adapted_as_the_vit_is(self, vit, kwargs):
        x = images(2, kwargs.get('img_size', 160), kwargs.get('in_chans', 3))
        model = self.load(vit[1], **kwargs)
        expected = timm.create_model('test_vit', pretrained=True, pretrained_cfg_overlay=vit[1], **kwargs)
        assert logits(model, x).shape == logits(expected, x).shape
        assert torch.equal(model.forward_features(x), expected.forward_features(x))

    def test_another_depth_is_one_error(self, vit):
        with pytest.raises(RuntimeError, match=r'nothing was loaded.*missing keys: blocks\.6\.'):
            self.load(vit[1], depth=7, num_classes=7)

    def test_workspaces_are_loaded_whole_or_not_at_all(self, tmp_path):
        state_dict = timm.create_model('test_ait_vit').state_dict()
        del state_dict['blocks.3.mlp.workspace.memory']
        save_file(state_dict, tmp_path / 'incomplete.safetensors')
        with pytest.raises(RuntimeError, match='missing keys: blocks.3.mlp.workspace.memory'):
            self.load(dict(file=str(tmp_path / 'incomplete.safetensors')))

    def test_fine_tuned_and_saved_it_comes_back(self, vit, tmp_path):
        model, x = open_gates(self.load(vit[1], num_classes=3)), images(2, 160)
        save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
        assert torch.equal(logits(loaded, x), logits(model, x))
        assert not torch.allclose(logits(loaded, x), logits(self.load(vit[1], num_classes=3), x))


def test_the_tag_pets_is_for_its_image_size_and_breeds():
    model = timm.create_model('ait_vit_small_patch14_dinov2.pets', device='meta')
    assert model.patch_embed.img_size == (196, 196)
    assert model.num_classes == len(set(model.pretrained_cfg['label_names'])) == 37
    config = timm.data.resolve_model_data_config(model)
    assert (config['input_size'], config['crop_pct'], config['interpolation']) == ((3, 196, 196), 0.875, 'bicubic')
