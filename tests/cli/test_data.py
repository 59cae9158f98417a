import json

import numpy as np
import pytest
from PIL import Image

from timm_ait.__main__ import main

pytestmark = pytest.mark.parametrize('dataset', ['triangle', 'sort-of-clevr'])


def write(dataset, folder, *arguments, train=30, validation=12):
    return main(['data', dataset, '--out', str(folder), '--train', str(train), '--validation', str(validation),
                 *arguments])


def test_the_same_seed_gives_the_same_files(dataset, tmp_path):
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        write(dataset, tmp_path / name, '--seed', seed)
    contents = {name: {f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob('*.*')
                       if f.suffix in ('.png', '.npz')} for name in 'abc'}
    assert contents['a'] == contents['b'] != contents['c']


@pytest.mark.parametrize('options', [(), ('--force',)], ids=str)
def test_an_existing_folder_of_another_origin_is_kept(dataset, tmp_path, capsys, options):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'file').write_text('mine')
    with pytest.raises(SystemExit, match='2'):
        write(dataset, tmp_path / 'out', *options)
    assert '--force' in capsys.readouterr().err
    assert (tmp_path / 'out' / 'file').read_text() == 'mine'


def test_force_replaces_a_data_set(dataset, tmp_path):
    write(dataset, tmp_path / 'out')
    assert write(dataset, tmp_path / 'out', '--force', '--seed', '3') == 0
    assert json.loads((tmp_path / 'out' / 'dataset.json').read_text())['seed'] == 3
    assert [file.name for file in tmp_path.iterdir()] == ['out']


def test_an_interrupted_run_leaves_nothing(dataset, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', interrupt)
    monkeypatch.setattr(np, 'savez_compressed', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(dataset, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('argument, value', [
    ('--train', '0'), ('--validation', '0'), ('--seed', '-1'), ('--seed', str(2 ** 64))])
def test_bad_numbers_are_named(dataset, tmp_path, capsys, argument, value):
    with pytest.raises(SystemExit, match='2'):
        main(['data', dataset, '--out', str(tmp_path / 'out'), argument, value])
    assert argument in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_contact_sheet(dataset, tmp_path):
    write(dataset, tmp_path / 'out', '--sheet', str(tmp_path / 'sheet.png'))
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.width > 500 and sheet.height > 400


@pytest.mark.parametrize('name', ['sheet.xyz', 'nowhere/sheet.png'])
def test_a_bad_sheet_is_refused_before_anything_is_written(dataset, tmp_path, capsys, name):
    with pytest.raises(SystemExit, match='2'):
        write(dataset, tmp_path / 'out', '--sheet', str(tmp_path / name))
    assert '--sheet' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(dataset, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='2'):
        write(dataset, tmp_path / 'file' / 'out')
    error = capsys.readouterr().err
    assert '--out' in error and len(error.splitlines()) == 1
