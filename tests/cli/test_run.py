import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_ait.__main__ import main

REPO = Path(__file__).parents[2]
EXAMPLES = REPO / 'examples' / 'images' / 'cifar10'
SCRIPTS = Path(os.environ['TIMM_SCRIPTS']).resolve() if 'TIMM_SCRIPTS' in os.environ else None


def run(*args, python=(sys.executable,)):
    """ Run from the source checkout, which is how `python -m` finds the package where it is not installed. """
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    command = [*python, '-m', 'timm_ait', 'run', *map(str, args)]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)


def write(folder, text):
    (folder / 'script.py').write_text(text)
    return folder / 'script.py'


@pytest.fixture
def state(monkeypatch):
    """ Let a script in this process change what belongs to the interpreter. """
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', sys.path[:])


REPORT = 'import json, sys; print(json.dumps([__name__, __file__, sys.argv, sys.path[0]]))'


class TestRun:

    @pytest.mark.parametrize('args', [
        [], ['--help'], ['-h'], ['--version'], ['--', '--lr', '-1'], ['a', '--', 'b', '--'], ['--model', 'x y', ''],
        ['-x=1', '--hel', '-'],
    ], ids=' '.join)
    def test_arguments_are_passed_as_they_are(self, state, capsys, tmp_path, args):
        script = str(write(tmp_path, REPORT))
        assert main(['run', script, *args]) == 0
        assert json.loads(capsys.readouterr().out) == ['__main__', script, [script, *args], str(tmp_path.resolve())]

    def test_as_python_runs_it(self, state, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'scripts').mkdir()
        (tmp_path / 'scripts/neighbour_of_the_script.py').write_text('VALUE = 3')
        write(tmp_path / 'scripts', 'import sys, neighbour_of_the_script as n; print(sys.argv, sys.path[0], n.VALUE)')
        plain = subprocess.run([sys.executable, 'scripts/script.py', '-v'], capture_output=True, text=True)
        main(['run', 'scripts/script.py', '-v'])
        assert capsys.readouterr().out == plain.stdout != ''

    def test_exit_code_of_the_script(self, state, tmp_path):
        with pytest.raises(SystemExit, match='3'):
            main(['run', str(write(tmp_path, 'import sys; sys.exit(3)'))])

    @pytest.mark.parametrize('name', ['missing.py', '.'])
    def test_missing_script(self, error_of, name):
        assert f'no file {name!r}' in error_of('run', name)


WORKERS = """
import timm
from torch.utils.data import DataLoader

if __name__ == '__main__':
    models = [timm.create_model('test_ait')]
    loader = DataLoader(models, batch_size=None, num_workers=1, multiprocessing_context='spawn')
    print(*(type(model).__name__ for model in loader))
"""


class TestProcesses:

    @pytest.mark.slow
    def test_workers_of_a_data_loader(self, tmp_path):
        result = run(write(tmp_path, WORKERS))
        assert result.stdout == 'AssociativeTransformer\n', result.stderr

    @pytest.mark.slow
    def test_under_torchrun(self, tmp_path):
        script = write(tmp_path, """
import sys, timm, torch
torch.distributed.init_process_group('gloo')
model = torch.nn.parallel.DistributedDataParallel(timm.create_model('test_ait'))
print(type(model.module).__name__, torch.distributed.get_world_size(), sys.argv[1:])
torch.distributed.destroy_process_group()
""")
        torchrun = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '1')
        result = run(script, '--lr', '1', python=torchrun)
        assert result.stdout == "AssociativeTransformer 1 ['--lr', '1']\n", result.stderr


@pytest.mark.skipif(SCRIPTS is None, reason="set TIMM_SCRIPTS to the folder of timm's scripts")
class TestTimmScripts:

    def test_validate_measures_the_accuracy_that_predict_does(self, capsys, model, tmp_path):
        with open(EXAMPLES / 'labels.csv') as file:
            labels = {row['file']: row['label'] for row in csv.DictReader(file)}
        for name, label in labels.items():
            (tmp_path / 'data' / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'data' / label / name).symlink_to(EXAMPLES / name)

        main(['predict', str(EXAMPLES), '--model', model, '--json'])
        predicted = {
            Path(image['file']).name: image['predictions'][0]['name']
            for image in json.loads(capsys.readouterr().out)['images']}
        accuracy = sum(predicted[name] == label for name, label in labels.items()) / len(labels)
        result = run(
            SCRIPTS / 'validate.py', '--data-dir', tmp_path / 'data', '--model', model, '--device', 'cpu',
            '--workers', '1', '--results-file', tmp_path / 'results.json', '--results-format', 'json')
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / 'results.json').read_text())['top1'] == pytest.approx(100 * accuracy)

    @pytest.mark.slow
    def test_bulk_runner_as_docs_training_says(self, tmp_path):
        result = run(
            SCRIPTS / 'bulk_runner.py', '--model-list', 'test_ai[t]', '--sort-key', 'infer_samples_per_sec',
            '--results-file', tmp_path / 'results.csv', '-m', '1', 'timm_ait', 'run', SCRIPTS / 'benchmark.py',
            '--bench', 'inference', '--device', 'cpu', '--batch-size', '2', '--num-warm-iter', '1',
            '--num-bench-iter', '10')
        assert result.returncode == 0, result.stderr
        assert (tmp_path / 'results.csv').read_text().splitlines()[1].startswith('test_ait,')
