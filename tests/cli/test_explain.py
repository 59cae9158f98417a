import json

import numpy as np
import pytest
import torch
from PIL import Image

import timm
from timm.models import save_for_hf

import timm_ait
from timm_ait.__main__ import main
from timm_ait.cli.explain import draw_sheet, layer_maps, select_slots, token_grid


def save(model, folder, **kwargs):
    save_for_hf(model, folder, safe_serialization=True, **kwargs)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save(timm.create_model('test_ait'), tmp_path_factory.mktemp('model'))


@pytest.fixture
def image(tmp_path):
    file = tmp_path / 'image.png'
    Image.effect_noise((40, 30), 64).convert('RGB').save(file)
    return file


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'out'


def explain(*args):
    return main(['explain', *map(str, args)])


def error_of(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        explain(*args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    return error.splitlines()[-1]


class TestFiles:

    def test_a_sheet_and_its_numbers_for_each_image(self, model, image, out):
        other = image.with_name('sub') / 'image.jpg'
        other.parent.mkdir()
        Image.new('RGB', (50, 50), 'red').save(other)
        assert explain(image, other, '--model', model, '--out', out) == 0
        assert sorted(file.name for file in out.iterdir()) == [
            'image-2.json', 'image-2.png', 'image.json', 'image.png']
        assert Image.open(out / 'image.png').format == 'PNG'
        assert json.loads((out / 'image-2.json').read_text())['file'] == str(other)

    def test_unreadable_files_are_named_and_skipped(self, capsys, model, image, out):
        broken = image.with_name('broken.png')
        broken.write_text('not an image')
        assert explain(image, broken, '--model', model, '--out', out) == 1
        assert f'{broken}: cannot be explained' in capsys.readouterr().err
        assert sorted(file.name for file in out.iterdir()) == ['image.json', 'image.png']


class TestNumbers:

    def test_are_those_of_the_analysis(self, model, image, out):
        explain(image, '--model', model, '--out', out)
        document = json.loads((out / 'image.json').read_text())
        assert [layer['layer'] for layer in document['layers']] == [f'blocks.{i}.mlp.workspace' for i in range(3)]
        for layer in document['layers']:
            selected = np.array(layer['selected'])
            assert selected.shape == (8, 8, 8)
            assert (selected.sum(axis=(1, 2)) == 4 * 6).all()  # four heads with a tenth of 64 tokens
            assert layer['num_kept'] == 6
            assert np.array(layer['read_slot']).shape == np.array(layer['read_weight']).shape == (8, 8)
            assert sum(layer['read_share']) == pytest.approx(1.)
            assert 0. < layer['figures']['coverage'] <= 1.

    def test_are_json_where_a_figure_is_not_a_number(self, image, out, tmp_path):
        one = save(timm.create_model('test_ait', num_slots=1), tmp_path / 'one', model_args=dict(num_slots=1))
        assert explain(image, '--model', one, '--out', out) == 0
        document = json.loads((out / 'image.json').read_text(), parse_constant=pytest.fail)
        assert document['layers'][0]['figures']['overlap'] is None


class TestModels:

    @pytest.mark.parametrize('kwargs', [dict(write=False), dict(retrieval=False), dict(in_chans=1)])
    def test_variants(self, image, out, tmp_path, kwargs):
        name = save(timm.create_model('test_ait', **kwargs), tmp_path / 'model', model_args=kwargs)
        assert explain(image, '--model', name, '--out', out) == 0

    def test_with_a_class_token_and_added_workspaces(self, image, out, tmp_path):
        model = timm_ait.add_workspace(timm.create_model('test_vit', num_classes=3), blocks=[0, 2])
        assert explain(image, '--model', save(model, tmp_path / 'model'), '--out', out) == 0
        layers = json.loads((out / 'image.json').read_text())['layers']
        assert [layer['layer'] for layer in layers] == ['blocks.0.mlp.workspace', 'blocks.2.mlp.workspace']
        assert np.array(layers[0]['selected']).shape[1:] == (10, 10)

    def test_without_workspaces(self, capsys, image, out, tmp_path):
        name = save(timm.create_model('test_vit', num_classes=3), tmp_path / 'vit')
        error = error_of(capsys, image, '--model', name, '--out', out)
        assert 'model' in error and 'no workspaces' in error
        assert not out.exists()


class TestErrors:

    @pytest.mark.parametrize('option, value', [
        ('--layers', '0'), ('--slots', '-1'), ('--device', 'toaster'), ('--out', __file__)])
    def test_option(self, capsys, model, image, out, option, value):
        error = error_of(capsys, image, '--model', model, '--out', out, option, value)
        assert option in error and value in error


class TestTokenGrid:

    @pytest.mark.parametrize('num_tokens, num_prefix, size, grid', [
        (64, 0, (32, 32), (8, 8)), (197, 1, (224, 224), (14, 14)), (33, 1, (64, 128), (4, 8)),
        (4, 0, (64, 64), (2, 2)), (1, 0, (32, 32), (1, 1)),
    ])
    def test_is_in_proportion_to_the_image(self, num_tokens, num_prefix, size, grid):
        assert token_grid(num_tokens, num_prefix, *size) == grid

    @pytest.mark.parametrize('num_tokens, num_prefix', [(7, 0), (65, 0), (1, 1)])
    def test_does_not_exist(self, num_tokens, num_prefix):
        with pytest.raises(ValueError, match=f'^{num_tokens} tokens'):
            token_grid(num_tokens, num_prefix, 32, 32)


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
