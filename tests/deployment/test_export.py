""" `torch.export`, and files of it and of TorchScript that run without this package. """
import os
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from tests.deployment import TOLERANCE, images, make_ait, other_memory


def export(model):
    return torch.export.export(model, (images(2),), dynamic_shapes=({0: Dim('batch')},))


def assert_files_compute_the_same(model, folder, *loads):
    """In a process that has neither timm_ait nor timm."""
    torch.save((images(3), model(images(3)).detach()), folder / 'example.pt')
    code = (
        'import sys, torch\n'
        'x, expected = torch.load("example.pt")\n'
        f'for module in ({", ".join(loads)},):\n'
        f'    torch.testing.assert_close(module(x), expected, **{TOLERANCE})\n'
        'assert not {"timm", "timm_ait"} & set(sys.modules)\n')
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    result = subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope='module')
def exported():
    """A model with another memory than the trained one, and its program for any number of images."""
    model = make_ait()
    other_memory(model)
    return model, export(model)


def test_computes_the_same_for_any_batch(exported):
    model, program = exported
    for batch_size in (1, 5):
        torch.testing.assert_close(program.module()(images(batch_size)), model(images(batch_size)))


def test_dynamic_image_size():
    model = make_ait(dynamic_img_size=True, pos_embed='none')
    side = Dim('side', min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({2: 4 * side, 3: 4 * side},))
    torch.testing.assert_close(program.module()(images(2, 24)), model(images(2, 24)))


@pytest.mark.filterwarnings('ignore')
def test_loaded_files_run_without_this_package(exported, tmp_path):
    model, program = exported
    torch.export.save(program, tmp_path / 'model.pt2')
    torch.jit.script(model).save(tmp_path / 'scripted.pt')
    torch.jit.trace(model, images(2)).save(tmp_path / 'traced.pt')
    assert_files_compute_the_same(
        model, tmp_path, 'torch.export.load("model.pt2").module()', 'torch.jit.load("scripted.pt")',
        'torch.jit.load("traced.pt")')


@pytest.mark.slow
def test_an_aotinductor_package_runs_without_this_package(exported, tmp_path):
    model, program = exported
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
    assert_files_compute_the_same(model, tmp_path, 'torch._inductor.aoti_load_package("model.pt2")')
