""" The wheel by itself, away from the checkout, and what it requires. """
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_ait.weights import weights_dir

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder that holds nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return folder


def run_installed(folder, code):
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'HF_HUB_OFFLINE': '1'}
    return subprocess.run(
        [sys.executable, '-c', code], cwd=folder.parent, env=environment, capture_output=True, text=True)


def test_the_wheel_brings_the_weights_and_their_manifest(installed):
    for file in weights_dir().rglob('*'):
        if file.is_file():
            assert (installed / 'timm_ait' / 'checkpoints' / file.relative_to(weights_dir())).is_file()


def test_the_wheel_is_typed(installed):
    assert (installed / 'timm_ait' / 'py.typed').is_file()


def test_pretrained_models_load_away_from_the_checkout(installed):
    names = [folder.name for folder in weights_dir().iterdir() if folder.is_dir()]
    result = run_installed(installed, f'''
import timm, timm_ait
assert timm_ait.__file__.startswith({str(installed)!r}), timm_ait.__file__
for name in {names!r}:
    model = timm.create_model(name, pretrained=True)
    assert model.pretrained_cfg['file'].startswith({str(installed)!r})
''')
    assert result.returncode == 0, result.stderr


def test_floors_are_the_versions_of_the_constraints():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    lines = [config['options']['install_requires'], *config['options.extras_require'].values()]
    required = {line.replace(' ', '') for text in lines for line in text.splitlines() if line}
    constraints = (ROOT / 'tests' / 'constraints.txt').read_text(encoding='utf-8')
    tested = {line.replace('==', '>=') for line in constraints.splitlines() if not line.startswith('#')}
    assert required == tested
