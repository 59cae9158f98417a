""" The wheel by itself, away from the checkout, and what it requires. """
import configparser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from timm_ait.weights import weights_dir

ROOT = Path(__file__).parents[1]
SMALLEST = 'ait_tiny_hybrid_75.sort_of_clevr'
TOY = 'ait_small_patch32_64.triangle'  # its weights are left to the checkout and the Hub
REPORT = f"""
import json, sys, timm
loaded = set(sys.modules)
import timm_ait
added = sorted(set(sys.modules) - loaded)
timm.create_model({SMALLEST!r}, pretrained=True)
cfgs = {{
    name: timm.get_pretrained_cfg(name).to_dict()
    for name in {[folder.name for folder in weights_dir().iterdir() if folder.is_dir()]!r}}}
print(json.dumps(dict(package=timm_ait.__file__, added=added, analysis=timm_ait.analysis.__name__, cfgs=cfgs)))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    ignored = shutil.ignore_patterns('.*', 'build', 'dist', 'output', '*.egg-info')
    source = shutil.copytree(ROOT, folder / 'source', ignore=ignored)  # setuptools would pack an old build folder too
    pip('wheel', '--no-deps', '--wheel-dir', folder, source)
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(tmp_path_factory, wheel):
    """A folder that holds nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp('site')
    pip('install', '--no-deps', '--target', folder, wheel)
    return folder


def pip(command, *arguments):
    subprocess.run([sys.executable, '-m', 'pip', command, '--quiet', *map(str, arguments)], check=True)


@pytest.fixture(scope='module')
def report(installed):
    """What a process says that has the wheel and not the checkout."""
    environment = {**os.environ, 'PYTHONPATH': str(installed), 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(
        [sys.executable, '-c', REPORT], cwd=installed.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
class TestWheel:

    def test_the_wheel_is_within_the_limit_of_pypi(self, wheel):
        assert wheel.stat().st_size < 95 * 2 ** 20  # PyPI takes up to 100 MiB

    def test_the_checkpoints_of_the_wheel_are_complete(self, installed):
        checkpoints = installed / 'timm_ait' / 'checkpoints'
        assert (checkpoints / 'manifest.json').is_file()
        folders = [folder for folder in checkpoints.iterdir() if folder.is_dir() and folder.name != '__pycache__']
        assert SMALLEST in {folder.name for folder in folders}
        for folder in folders:
            expected = {file.name for file in (weights_dir() / folder.name).iterdir()}
            assert {file.name for file in folder.iterdir()} == ({'config.json'} if folder.name == TOY else expected)

    def test_the_wheel_is_typed(self, installed):
        assert (installed / 'timm_ait' / 'py.typed').is_file()

    def test_pretrained_models_have_their_config_and_come_from_the_wheel_or_the_hub(self, installed, report):
        assert report['package'].startswith(str(installed))
        for name, cfg in report['cfgs'].items():
            file = installed / 'timm_ait' / 'checkpoints' / name / 'model.safetensors'
            assert cfg.get('file') == (None if name == TOY else str(file))
            assert cfg['hf_hub_id'].endswith(f'/{name}')
            config = json.loads((weights_dir() / name / 'config.json').read_text())['pretrained_cfg']
            assert {key: cfg[key] for key in config} == config

    def test_importing_loads_nothing_of_the_command_line_that_timm_does_not_load(self, report):
        assert 'timm_ait' in report['added']
        assert not [name for name in report['added'] if name.split('.')[0] in ('PIL', 'argparse', 'tqdm')]
        assert not [name for name in report['added'] if name.startswith(('timm_ait.cli', 'timm_ait.__main__'))]


def test_floors_are_the_versions_of_the_constraints():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    extras = {name: text for name, text in config['options.extras_require'].items() if name != 'demo'}
    lines = [config['options']['install_requires'], *extras.values()]
    required = {line.replace(' ', '') for text in lines for line in text.splitlines() if line}
    constraints = (ROOT / 'tests' / 'constraints.txt').read_text(encoding='utf-8')
    tested = {line.replace('==', '>=') for line in constraints.splitlines() if not line.startswith('#')}
    assert required == tested
