import numpy as np
import pytest
from PIL import Image

from timm_ait.__main__ import main

pytestmark = pytest.mark.parametrize('dataset', ['triangle', 'sort-of-clevr'])


def write(dataset, folder, *arguments):
    return main(['data', dataset, '--out', str(folder), '--train', '30', '--validation', '12', *arguments])


def test_the_same_seed_gives_the_same_files(dataset, tmp_path):
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        assert write(dataset, tmp_path / name, '--seed', seed) == 0
    contents = {
        name: {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob('*.*')}
        for name in 'abc'}
    assert contents['a'] == contents['b'] != contents['c']


def test_an_existing_folder_is_kept(dataset, tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    with pytest.raises(SystemExit, match='2'):
        write(dataset, tmp_path / 'out')
    assert '--out' in capsys.readouterr().err and not list((tmp_path / 'out').iterdir())


def test_an_interrupted_run_leaves_nothing(dataset, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', interrupt)
    monkeypatch.setattr(np, 'savez_compressed', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(dataset, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('argument, value', [
    ('--train', '0'), ('--validation', '0'), ('--seed', '-1'), ('--seed', str(2 ** 64)), ('--out', __file__)])
def test_bad_values_are_named_in_one_line(dataset, tmp_path, capsys, argument, value):
    with pytest.raises(SystemExit, match='2'):
        write(dataset, tmp_path / 'out', argument, value)
    error = capsys.readouterr().err
    assert argument in error and value in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
