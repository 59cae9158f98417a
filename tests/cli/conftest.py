""" Images, a model, and errors of the commands. """
import pytest
import torch
from PIL import Image

import timm
from timm.models import save_for_hf

from timm_ait.__main__ import main


@pytest.fixture
def images(tmp_path):
    """Folder with a.jpg, b.png and sub/c.bmp."""
    folder = tmp_path / 'images'
    (folder / 'sub').mkdir(parents=True)
    for i, name in enumerate(['b.png', 'a.jpg', 'sub/c.bmp']):
        Image.effect_noise((40, 30), 64 + 32 * i).convert('RGB').save(folder / name)
    return folder


@pytest.fixture(scope='session')
def save(tmp_path_factory):
    """Function that saves a model as timm does; returns the name to load it by."""
    def save(model, **kwargs):
        folder = tmp_path_factory.mktemp('model')
        save_for_hf(model, folder, safe_serialization=True, **kwargs)
        return f'local-dir:{folder}'

    return save


@pytest.fixture(scope='session')
def model(save):
    """Name of a classifier with CIFAR-10's classes, whose predictions differ between images."""
    torch.manual_seed(0)
    model = timm.create_model('test_ait')
    torch.nn.init.normal_(model.head.weight)
    return save(model, model_config=dict(label_names=timm.get_pretrained_cfg('ait_small.cifar10').label_names))


@pytest.fixture
def error_of(capsys):
    """Function that runs a command, which has to end with exit code 2 and no output; returns its error."""
    def error_of(*arguments):
        with pytest.raises(SystemExit, match='2'):
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert captured.out == ''
        return captured.err

    return error_of
