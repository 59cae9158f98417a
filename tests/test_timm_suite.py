""" timm's own model tests, from its source distribution, run over this package's models. """
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import timm

import timm_ait

# our models join timm's ViTs on the suite's lists of non-standard models and of modules with intermediates
OUR_FILTERS = {
    'NON_STD_FILTERS': [
        'ait_*', 'test_ait*', 'test_set_transformer*', 'test_perceiver*', 'test_coordination*',
        'test_centroid_transformer*'],
    'FEAT_INTER_FILTERS': [
        'associative_transformer', 'ait_vit', 'set_transformer', 'coordination', 'centroid_transformer'],
}


@pytest.fixture(scope='module')
def timm_tests(tmp_path_factory):
    """Folder with timm's tests: that of TIMM_TESTS, or of the source distribution of the installed version."""
    if 'TIMM_TESTS' in os.environ:
        return Path(os.environ['TIMM_TESTS'])
    folder = tmp_path_factory.mktemp('timm')
    command = [
        sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:',
        f'timm=={timm.__version__}', '--dest', str(folder)]
    download = subprocess.run(command, capture_output=True, text=True)
    if download.returncode and 'CI' not in os.environ:
        pytest.skip(f"timm's source distribution cannot be downloaded, set TIMM_TESTS to its tests: {download.stderr}")
    assert download.returncode == 0, download.stderr
    archive, = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter='data')
    return folder / archive.name.removesuffix('.tar.gz') / 'tests'


@pytest.mark.slow
@pytest.mark.parametrize('models', [
    'test_ait and not vit',
    'test_set_transformer or test_perceiver or test_coordination or test_centroid_transformer or '
    '(ait_small and not patch)',
])
def test_suite_passes(timm_tests, tmp_path, models):
    source = (timm_tests / 'test_models.py').read_text()
    for name, filters in OUR_FILTERS.items():
        source, count = re.subn(rf'^{name} = \[', f'{name} = [{repr(filters)[1:-1]}, ', source, flags=re.MULTILINE)
        assert count == 1, f"timm's test_models.py has no list {name}"
    (tmp_path / 'test_models.py').write_text(source)
    environment = {**os.environ, 'TORCH_BACKEND': 'timm_ait', 'PYTHONPATH': str(Path(timm_ait.__file__).parents[1])}
    command = [
        sys.executable, '-m', 'pytest', '-q', '-W', 'ignore', '-p', 'no:cacheprovider', '--rootdir', str(tmp_path),
        str(tmp_path / 'test_models.py'), '-k', models,
        # it asks every model for three feature levels, and AiT-Small has two blocks: its own tests cover them
        '--deselect', 'test_models.py::test_model_forward_intermediates[1-ait_small]']
    suite = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert suite.returncode == 0, suite.stdout[-10000:] + suite.stderr
    assert int(re.search(r'(\d+) passed', suite.stdout).group(1)) >= 3, suite.stdout
    assert 'skipped' not in suite.stdout, suite.stdout
