import os
import random
import shutil

import pytest
import torch

from benchmarks import reliability
from benchmarks.reliability import Checkpoints, Images, differences, main, report_kills, write_section


class Faults:
    """ In place of `Images`: cases that fail in every way a worker can, but for the hanging one. """
    names = ('a',)

    def __init__(self, folder):
        self.cases = iter([
            lambda: ('named', ''), lambda: 1 / 0, lambda: torch.zeros(2 ** 28, dtype=torch.float64),
            lambda: os._exit(3)])

    def prepare(self, rng, name):
        return 'kind', next(self.cases)


@pytest.mark.timeout(120)
def test_faults_are_counted_and_the_worker_replaced(monkeypatch, tmp_path):
    page = tmp_path / 'page.md'
    write_section(page, 'kills', 'stays')
    monkeypatch.setitem(reliability.PARTS, 'images', Faults)
    monkeypatch.setattr(reliability, 'run_command_line', lambda *_: 'command line')
    main(['--part', 'images', '--images', '5', '--output', str(page)])
    text = page.read_text()
    # of the tracebacks, one is for want of memory
    assert '| damage | files | named | crash | traceback |' in text and '| all | 5 | 2 | 1 | 2 |' in text
    assert 'exit code 3' in text and 'stays' in text


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp('checkpoints'))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return Images(tmp_path_factory.mktemp('images'))


class TestCheckpoints:

    @pytest.mark.parametrize('file', ['model.safetensors', 'last.pth.tar'])
    @pytest.mark.parametrize('route', ['load_checkpoint', 'overlay', 'local-dir', 'predict', 'export'])
    def test_an_undamaged_file_is_as_it_was(self, checkpoints, route, file, tmp_path):
        place, other = tmp_path / 'place', {'model.safetensors', 'last.pth.tar'} - {file}
        shutil.copytree(checkpoints.folder / 'AiT', place, ignore=lambda *_: other)
        outcome, detail = checkpoints._read(route, 'AiT', place, place / file)
        assert outcome == 'as it was', detail

    @pytest.mark.parametrize('kind', Checkpoints.kinds)
    def test_every_kind_of_damage_is_made_and_read(self, checkpoints, kind, monkeypatch):
        monkeypatch.setattr(checkpoints, 'kinds', [kind])
        drawn, read = checkpoints.prepare(random.Random(1), 'AiT')
        outcome, detail = read()
        assert drawn == kind and outcome in (*reliability.FINE, 'no message'), detail

    def test_half_a_load_is_a_fault(self, checkpoints, monkeypatch):
        monkeypatch.setattr(checkpoints, 'kinds', ['keys missing'])
        outcomes = [checkpoints.prepare(random.Random(number), 'ViT')[1]()[0] for number in range(20)]
        assert set(outcomes) == {'error', 'half loaded'}  # by PyTorch's own load_state_dict


@pytest.mark.parametrize('kind', [kind for kind in Images.kinds if kind != 'large'])
def test_every_kind_of_damaged_image_is_made_and_read(images, kind, monkeypatch):
    monkeypatch.setattr(images, 'kinds', {kind: Images.kinds[kind]})
    drawn, read = images.prepare(random.Random(1), 'predict')
    outcome, detail = read()
    assert drawn == kind and outcome in ('picture', 'named'), detail


def test_what_a_resumed_run_has_of_its_own_is_named():
    kept = {'a': torch.zeros(2), 'b': [torch.ones(1), 3], 'c': {'d': 1}}
    assert differences(kept, {**kept, 'a': torch.zeros(2)}, 'x') == []
    changed = {'a': torch.tensor([0., 1e-9]), 'b': [torch.ones(1), 4], 'c': {}}
    assert differences(kept, changed, 'x') == ['x.a', 'x.b.1', 'x.c']


def test_a_memory_that_differs_is_counted():
    runs = [(['tmp.pth.tar'], ['state_dict.blocks.0.mlp.workspace.memory']), (['last.pth.tar'], [])]
    assert report_kills({'AiT': runs}).endswith('| AiT | 2 | 1 | 1 | 1 | 1 | 2 | 2 | 1 |')


def test_without_timms_scripts_the_kills_say_so(monkeypatch, capsys):
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    with pytest.raises(SystemExit):
        main(['--part', 'kills'])
    assert 'TIMM_SCRIPTS' in capsys.readouterr().err
