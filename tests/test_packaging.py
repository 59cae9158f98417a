""" The wheel by itself, away from the checkout, and what it requires. """
import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_ait.weights import weights_dir

ROOT = Path(__file__).parents[1]
NAMES = [folder.name for folder in weights_dir().iterdir() if folder.is_dir()]
SMALLEST = min(NAMES, key=lambda name: (weights_dir() / name / 'model.safetensors').stat().st_size)
REPORT = f'''
import json, sys, timm
loaded = set(sys.modules)
import timm_ait
added = sorted(set(sys.modules) - loaded)
timm.create_model({SMALLEST!r}, pretrained=True)
weights = [timm.get_pretrained_cfg_value(name, 'file') for name in {NAMES!r}]
print(json.dumps(dict(package=timm_ait.__file__, added=added, weights=weights)))
'''


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder that holds nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope='module')
def report(installed):
    """What a process says that has the wheel and not the checkout."""
    environment = {**os.environ, 'PYTHONPATH': str(installed), 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(
        [sys.executable, '-c', REPORT], cwd=installed.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_wheel_brings_the_weights_and_their_manifest(installed):
    for file in weights_dir().rglob('*'):
        if file.is_file():
            assert (installed / 'timm_ait' / 'checkpoints' / file.relative_to(weights_dir())).is_file()


def test_the_wheel_is_typed(installed):
    assert (installed / 'timm_ait' / 'py.typed').is_file()


def test_pretrained_models_are_found_away_from_the_checkout(installed, report):
    assert all(path.startswith(str(installed)) for path in (report['package'], *report['weights']))


def test_importing_loads_nothing_of_the_command_line_that_timm_does_not_load(report):
    assert 'timm_ait' in report['added']
    assert not [name for name in report['added'] if name.split('.')[0] in ('PIL', 'argparse', 'tqdm')]
    assert not [name for name in report['added'] if name.startswith(('timm_ait.cli', 'timm_ait.__main__'))]


def test_floors_are_the_versions_of_the_constraints():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    lines = [config['options']['install_requires'], *config['options.extras_require'].values()]
    required = {line.replace(' ', '') for text in lines for line in text.splitlines() if line}
    constraints = (ROOT / 'tests' / 'constraints.txt').read_text(encoding='utf-8')
    tested = {line.replace('==', '>=') for line in constraints.splitlines() if not line.startswith('#')}
    assert required - {'huggingface_hub>=0.25.0'} == tested - {'huggingface_hub>=0.34.0'}  # see there
