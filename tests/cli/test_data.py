import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from timm_ait.__main__ import main

pytestmark = pytest.mark.parametrize('dataset', ['triangle', 'sort-of-clevr'])


def write(dataset, folder, seed=0):
    return main(['data', dataset, '--out', str(folder), '--train', '30', '--validation', '12', '--seed', str(seed)])


def test_the_same_seed_gives_the_same_files(dataset, tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert write(dataset, tmp_path / name, seed) == 0
    contents = {
        name: {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob('*.*')}
        for name in 'abc'}
    assert contents['a'] == contents['b'] != contents['c']


def test_an_existing_folder_is_kept(dataset, tmp_path, error_of):
    assert f'--out: {tmp_path} exists' in error_of('data', dataset, '--out', tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_closed_output_does_not_matter(dataset, tmp_path):
    options = f'--train 30 --validation 12 --out {tmp_path / "out"}'
    subprocess.run(f'{sys.executable} -m timm_ait data {dataset} {options} >&- 2>&-', shell=True, check=True)


def test_a_link_to_nothing_is_refused_and_kept(dataset, tmp_path, error_of):
    (tmp_path / 'out').symlink_to(tmp_path / 'gone')
    assert 'exists; choose another folder' in error_of('data', dataset, '--out', tmp_path / 'out')
    assert (tmp_path / 'out').is_symlink()


def test_an_interrupted_run_leaves_nothing(dataset, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'save', interrupt)
    monkeypatch.setattr(np, 'savez_compressed', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(dataset, tmp_path / 'out')
    assert not list(tmp_path.iterdir())
