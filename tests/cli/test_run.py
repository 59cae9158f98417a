import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import timm
from timm.models import save_for_hf

from timm_ait.__main__ import main
from timm_ait.cli.labels import read_labels

REPO = Path(__file__).parents[2]
EXAMPLES = REPO / 'examples' / 'images' / 'cifar10'
SCRIPTS = Path(os.environ['TIMM_SCRIPTS']).resolve() if 'TIMM_SCRIPTS' in os.environ else None


def run(*args, python=(sys.executable,)):
    """ Run from the source checkout, which is how `python -m` finds the package where it is not installed. """
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    command = [*python, '-m', 'timm_ait', 'run', *map(str, args)]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)


def write(folder, text, name='script.py'):
    file = folder / name
    file.write_text(text)
    return file


@pytest.fixture
def state(monkeypatch):
    """ Let a script in this process change what belongs to the interpreter. """
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', sys.path[:])


REPORT = """
import json, sys
print(json.dumps([__name__, __file__, sys.argv, sys.path[0]]))
"""


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
        write(tmp_path / 'scripts', 'VALUE = 3', name='neighbour_of_the_script.py')
        write(tmp_path / 'scripts', 'import sys, neighbour_of_the_script as n; print(sys.argv, sys.path[0], n.VALUE)')
        plain = subprocess.run([sys.executable, 'scripts/script.py', '-v'], capture_output=True, text=True)
        main(['run', 'scripts/script.py', '-v'])
        assert capsys.readouterr().out == plain.stdout != ''

    @pytest.mark.parametrize('code', [0, 3])
    def test_exit_code_of_the_script(self, state, tmp_path, code):
        with pytest.raises(SystemExit) as exit_:
            main(['run', str(write(tmp_path, f'import sys; sys.exit({code})'))])
        assert exit_.value.code == code

    @pytest.mark.parametrize('name', ['missing.py', '.'])
    def test_missing_script(self, capsys, monkeypatch, name):
        monkeypatch.setattr(runpy, 'run_path', None)
        with pytest.raises(SystemExit, match='2'):
            main(['run', name])
        assert f'no file {name!r}' in capsys.readouterr().err


WORKERS = """
import sys
import timm
import torch

class Images(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return self.model(torch.zeros(1, 3, 32, 32))[0].detach()

if __name__ == '__main__':
    images = Images(timm.create_model('test_ait').eval())
    for context in sys.argv[1:]:
        loader = torch.utils.data.DataLoader(images, num_workers=1, multiprocessing_context=context)
        print(context, sum(len(batch) for batch in loader))
"""


class TestProcesses:

    @pytest.mark.slow
    def test_workers_of_a_data_loader(self, tmp_path):
        result = run(write(tmp_path, WORKERS), 'spawn')
        assert result.stdout == 'spawn 2\n', result.stderr

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

    def test_validate_measures_the_accuracy_that_predict_does(self, capsys, tmp_path):
        torch.manual_seed(0)
        labels = read_labels(EXAMPLES / 'labels.csv')
        model = timm.create_model('test_ait')
        torch.nn.init.normal_(model.head.weight)
        names = sorted(set(labels.values()))  # the order validate.py gives folders
        save_for_hf(model, tmp_path / 'model', model_config={'label_names': names}, safe_serialization=True)
        for file, label in labels.items():
            (tmp_path / 'data' / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'data' / label / file.name).symlink_to(file)

        model = f'local-dir:{tmp_path / "model"}'
        main(['predict', str(EXAMPLES), '--model', model, '--labels', str(EXAMPLES / 'labels.csv'), '--json'])
        accuracy = json.loads(capsys.readouterr().out)['accuracy']
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
