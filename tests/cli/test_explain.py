import json

import numpy as np
import pytest
import torch
from PIL import Image

import timm

import timm_ait
from timm_ait.__main__ import main
from timm_ait.cli.explain import BOTTLENECK, draw_sheet, layer_maps, select_slots, token_grid
from timm_ait.cli.images import image_classifier, load_model


@pytest.fixture
def explain(images, tmp_path):
    """Function that explains a.jpg, whose numbers it returns."""
    def explain(model):
        assert main(['explain', str(images / 'a.jpg'), '--model', model, '--out', str(tmp_path / 'out')]) == 0
        return json.loads((tmp_path / 'out/a.json').read_text(), parse_constant=pytest.fail)

    return explain


class TestFiles:

    def test_a_sheet_and_its_numbers_for_each_image(self, model, images, tmp_path):
        small, large, out = '\u00e9', 'E\u0301', tmp_path / 'out'  # the same to file systems that tell neither apart
        files = [images / f'{small}.jpg', images / f'sub/{large}.jpg']
        for file in files:
            Image.new('RGB', (50, 50), 'red').save(file)
        assert main(['explain', *map(str, files), '--model', model, '--out', str(out)]) == 0
        names = [f'{stem}.{kind}' for stem in (f'{large}-2', small) for kind in ('json', 'png')]
        assert sorted(file.name for file in out.iterdir()) == names
        assert Image.open(out / f'{small}.png').format == 'PNG'
        assert json.loads((out / f'{large}-2.json').read_text())['file'] == str(files[1])

    @pytest.mark.parametrize('folder', ['', 'sub'])
    def test_sheets_replace_no_image(self, error_of, model, images, folder):
        assert f'--out {images / folder} holds some' in error_of(
            'explain', images, '--model', model, '--out', images / folder)

    def test_sheets_replace_no_link_to_an_image(self, error_of, model, images, tmp_path):
        (tmp_path / 'links').mkdir()
        (tmp_path / 'links/a.png').symlink_to(images / 'a.jpg')
        error = error_of('explain', tmp_path / 'links', '--model', model, '--out', tmp_path / 'links')
        assert f'--out {tmp_path / "links"} holds some' in error

    def test_unreadable_files_are_named_and_skipped(self, capsys, model, images, tmp_path):
        (images / 'b.png').write_text('not an image')
        (images / 'loop.png').symlink_to(images / 'loop.png')
        assert main(['explain', str(images), '--model', model, '--out', str(tmp_path / 'out')]) == 1
        assert f'{images / "b.png"}: cannot be explained' in capsys.readouterr().err
        assert {file.stem for file in (tmp_path / 'out').iterdir()} == {'a', 'c'}


class TestNumbers:

    def test_are_those_of_the_analysis(self, model, images, explain):
        layers, loaded = explain(model)['layers'], load_model(model)
        _, image, _ = image_classifier(loaded)(images / 'a.jpg')
        for layer, expected in zip(layers, layer_maps(loaded, image, BOTTLENECK), strict=True):
            assert (layer['layer'], layer['num_kept'], layer['num_heads']) == (expected.name, 6, 4)  # a tenth of 64
            assert (expected.selected.sum(dim=(1, 2)) == 4 * 6).all() and expected.selected.shape == (8, 8, 8)
            assert layer['selected'] == expected.selected.tolist()
            weights, slots = expected.read.max(dim=0)
            assert layer['read_slot'] == slots.tolist()
            assert layer['read_weight'] == [pytest.approx(row) for row in weights.tolist()]
            assert sum(layer['read_share']) == pytest.approx(1.)
            assert layer['figures'] == pytest.approx(expected.figures)

    def test_a_figure_that_is_not_a_number_is_null(self, save, explain):
        kwargs = dict(num_slots=1)
        layer = explain(save(timm.create_model('test_ait', **kwargs), model_args=kwargs))['layers'][0]
        assert layer['figures']['overlap'] is None


class TestModels:

    @pytest.mark.parametrize('kwargs', [dict(write=False), dict(retrieval=False), dict(in_chans=1)])
    def test_variants(self, save, explain, kwargs):
        explain(save(timm.create_model('test_ait', **kwargs), model_args=kwargs))

    def test_with_a_class_token_and_added_workspaces(self, save, explain):
        model = timm_ait.add_workspace(timm.create_model('test_vit', num_classes=3), blocks=[0, 2])
        layers = explain(save(model))['layers']
        assert [layer['layer'] for layer in layers] == ['blocks.0.mlp.workspace', 'blocks.2.mlp.workspace']
        assert np.array(layers[0]['selected']).shape[1:] == (10, 10)

    def test_without_workspaces(self, error_of, save, images, tmp_path):
        model = save(timm.create_model('test_vit', num_classes=3))
        assert 'model: VisionTransformer has no workspaces' in error_of(
            'explain', images, '--model', model, '--out', tmp_path / 'out')
        assert not (tmp_path / 'out').exists()


class TestTokenGrid:

    @pytest.mark.parametrize('num_tokens, num_prefix, size, grid', [
        (64, 0, (32, 32), (8, 8)), (197, 1, (224, 224), (14, 14)), (33, 1, (64, 128), (4, 8)),
        (4, 0, (64, 64), (2, 2)), (1, 0, (32, 32), (1, 1)),
    ])
    def test_is_in_proportion_to_the_image(self, num_tokens, num_prefix, size, grid):
        assert token_grid(num_tokens, num_prefix, *size) == grid

    def test_is_in_proportion_to_the_patches(self):
        assert token_grid(64, 0, 64, 64, aspect=4.) == (16, 4)
        model = timm.create_model('test_ait', img_size=64, patch_size=(4, 16))
        assert layer_maps(model, torch.randn(1, 3, 64, 64), 0.1)[0].read.shape == (8, 16, 4)

    @pytest.mark.parametrize('num_tokens, num_prefix', [(7, 0), (65, 0), (1, 1)])
    def test_does_not_exist(self, num_tokens, num_prefix):
        with pytest.raises(ValueError, match=f'^{num_tokens} tokens'):
            token_grid(num_tokens, num_prefix, 32, 32)

    def test_is_not_that_of_tokens_in_units_of_masks(self):
        model = timm_ait.add_workspace(timm.create_model('hiera_tiny_224', device='meta'), blocks=[0])
        with pytest.raises(ValueError, match='Hiera'):
            layer_maps(model, torch.zeros(1, 3, 224, 224), 0.1)


class TestSlots:

    def test_whose_heads_agree_come_first(self):
        selected = torch.zeros(3, 6, 6)
        selected[0, ::2, ::2] = 1  # each head elsewhere
        selected[1, 2:4, 2:4] = 4  # all heads in one region
        selected[2, 4:, 4:] = 2
        assert select_slots(selected, 3) == [1, 2, 0]

    def test_alike_are_not_drawn_twice(self):
        selected = torch.zeros(3, 6, 6)
        selected[:2, :2, :2] = 4
        selected[2, 4:, 4:] = 1
        assert select_slots(selected, 2) == [0, 2]


def test_a_sheet_shows_where_a_slot_selects():
    maps = []
    for layer in layer_maps(timm.create_model('test_ait').eval(), torch.randn(1, 3, 32, 32), bottleneck=0.1):
        selected = torch.zeros_like(layer.selected)
        selected[:, :2, :2] = layer.num_heads  # in the corner alone
        maps.append(layer._replace(selected=selected))
    sheet = np.asarray(draw_sheet(Image.new('RGB', (64, 64), 'grey'), ['title'], maps, 2)).astype(int)
    top, left = 8 + 18 + 8, 2 * (208 + 2 * 8) + 8
    assert sheet[top + 10, left + 10].sum() > 2 * sheet[top + 180, left + 180].sum()
