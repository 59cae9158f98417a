""" Damaged checkpoints and images are refused or read as they are; a killed training run resumes to the same end. """
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import timm
from timm.models import save_for_hf

import timm_ait  # noqa: F401, registers the models
from timm_ait.__main__ import main as command_line

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2 ** 32)

BYTES = {
    'truncated': lambda rng, data: data[:rng.randrange(len(data))],
    'bits flipped': lambda rng, data: flipped(rng, data, len(data)),
    'bits of the header flipped': lambda rng, data: flipped(rng, data, 2048),
    'a block zeroed': lambda rng, data: replaced(rng, data, 2048, bytes(2048)),
    'bytes inserted': lambda rng, data: replaced(rng, data, 0, rng.randbytes(100)),
    'bytes appended': lambda rng, data: data + rng.randbytes(10),
    'noise': lambda rng, data: rng.randbytes(1000),
}
TENSORS = {
    'missing': lambda rng, x: None,
    'another shape': lambda rng, x: rng.choice([x[None], x[:0], torch.cat([x, x])]),
    'another dtype': lambda rng, x: x.to(rng.choice([torch.float16, torch.float64, torch.int8, torch.complex64])),
    'nan': lambda rng, x: x * float('nan'),
}
ADAPTED = ('head.', 'pos_embed', 'patch_embed.')  # by timm, to other classes, image sizes and channels


def flipped(rng, data, end):
    data = bytearray(data)
    for _ in range(rng.choice([1, 8])):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def replaced(rng, data, size, new):
    start = rng.randrange(len(data))
    return data[:start] + new + data[start + size:]


def load_or_refuse(file):
    """The model that a checkpoint gives, or None where it is refused with an error that says why."""
    overlay = dict(file=str(file), num_classes=3)
    try:
        return timm.create_model('test_ait', num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as e:
        assert str(e)
        return None


def assert_loaded_as_stored(model, stored):
    for key, value in model.state_dict().items():
        if not key.startswith(ADAPTED):
            torch.testing.assert_close(value, stored[key].to(value.dtype), rtol=0., atol=0., equal_nan=True)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Folder of a small classifier."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('checkpoint')
    save_for_hf(timm.create_model('test_ait', num_classes=3), folder, safe_serialization=True)
    return folder


class TestDamagedCheckpoints:

    @few
    @given(kind=st.sampled_from(sorted(BYTES)), seed=seeds)
    def test_bytes(self, checkpoint, kind, seed):
        file = checkpoint / 'damaged.safetensors'
        file.write_bytes(BYTES[kind](random.Random(seed), (checkpoint / 'model.safetensors').read_bytes()))
        model = load_or_refuse(file)
        if model is not None:
            assert_loaded_as_stored(model, load_file(file))

    @few
    @given(kind=st.sampled_from(sorted(TENSORS)), seed=seeds)
    def test_tensors(self, checkpoint, kind, seed):
        rng, file = random.Random(seed), checkpoint / 'damaged.safetensors'
        stored = load_file(checkpoint / 'model.safetensors')
        key = rng.choice([key for key in sorted(stored) if not key.startswith(ADAPTED)])
        stored[key] = TENSORS[kind](rng, stored[key])
        save_file({key: value for key, value in stored.items() if value is not None}, file)
        model = load_or_refuse(file)
        if kind in ('missing', 'another shape'):
            assert model is None
        elif stored[key].dtype in (torch.int8, torch.complex64):
            assert model is None
        else:
            assert_loaded_as_stored(model, stored)

    @few
    @given(kind=st.sampled_from(sorted(BYTES)), seed=seeds)
    def test_predict_says_so_in_one_line(self, checkpoint, kind, seed):
        folder = checkpoint / 'damaged'
        folder.mkdir(exist_ok=True)
        rng, config, weights = random.Random(seed), *(
            (checkpoint / name).read_bytes() for name in ('config.json', 'model.safetensors'))
        (folder / 'config.json').write_bytes(config)
        (folder / 'model.safetensors').write_bytes(BYTES[kind](rng, weights))
        Image.new('RGB', (32, 32), 'red').save(checkpoint / 'image.png')
        code, error = predict(checkpoint / 'image.png', '--model', f'local-dir:{folder}')
        assert code == 0 or (code == 2 and error.splitlines()[-1].startswith('python -m timm_ait predict: error: '))
        assert 'Traceback' not in error


def predict(*arguments):
    """Exit code and standard error of a command in this process."""
    stream, kept = io.StringIO(), (sys.stderr, sys.stdout)
    sys.stderr, sys.stdout = stream, io.StringIO()
    try:
        code = command_line(['predict', *map(str, arguments), '--device', 'cpu', '--json'])
    except SystemExit as e:
        code = e.code
    finally:
        output, (sys.stderr, sys.stdout) = sys.stdout.getvalue(), kept
    predict.document = json.loads(output) if output.startswith('{') else None
    return code, stream.getvalue()


def encoded(form, mode, **options):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(stream, form, **options)
    return form.lower(), stream.getvalue()


IMAGES = [
    encoded('JPEG', 'RGB', progressive=True), encoded('JPEG', 'CMYK'), encoded('PNG', 'RGBA'), encoded('PNG', 'I;16'),
    encoded('GIF', 'P'), encoded('BMP', 'RGB'), encoded('TIFF', 'RGB', compression='tiff_lzw'), encoded('WEBP', 'RGB')]


@few
@given(image=st.sampled_from(IMAGES), kind=st.sampled_from(sorted(BYTES)), seed=seeds)
def test_a_damaged_image_is_classified_or_named_beside_a_good_one(checkpoint, image, kind, seed):
    form, data = image
    good, damaged = checkpoint / 'image.png', checkpoint / f'damaged.{form}'
    Image.new('RGB', (32, 32), 'red').save(good)
    damaged.write_bytes(BYTES[kind](random.Random(seed), data))
    code, error = predict(good, damaged, '--model', f'local-dir:{checkpoint}')
    classified = [entry['file'] for entry in predict.document['images']]
    named = [entry['file'] for entry in predict.document['errors']]
    assert sorted(classified + named) == sorted(map(str, (good, damaged))) and str(good) in classified
    assert code == len(named) and 'Traceback' not in error


# train.py seeds once, and no checkpoint holds the state of random numbers: with this an epoch is the same when resumed
SEED_EPOCHS = """
import random, numpy, torch
from timm.data import ImageDataset

def set_epoch(self, epoch):
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(epoch)

ImageDataset.set_epoch = set_epoch
"""


@pytest.mark.slow
@pytest.mark.skipif('TIMM_SCRIPTS' not in os.environ, reason="TIMM_SCRIPTS, the folder of timm's train.py, is not set")
@pytest.mark.parametrize('while_saving', [False, True])
def test_a_killed_run_resumes_to_the_same_end(tmp_path, while_saving):
    (tmp_path / 'seed_epochs.py').write_text(SEED_EPOCHS)
    generator = np.random.default_rng(0)
    for i in range(60):
        file = tmp_path / 'data' / ('validation' if i < 12 else 'train') / 'abc'[i % 3] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)

    def start(experiment):
        place = tmp_path / experiment
        # the saver unlinks the last checkpoint before it moves the next one to its place
        files = sorted(place.glob('checkpoint-*')) + list(place.glob('last.pth.tar'))
        command = [
            sys.executable, Path(os.environ['TIMM_SCRIPTS'], 'train.py'), '--device-modules', 'timm_ait', 'seed_epochs',
            '--data-dir', tmp_path / 'data', '--model', 'test_ait', '--output', tmp_path, '--experiment', experiment,
            *(['--resume', files[-1]] if files else []), *(
                '--epochs 4 --warmup-epochs 1 -b 16 -vb 12 --opt adamw --lr 1e-3 --drop-path 0.1 --model-ema '
                '--device cpu --workers 0 --num-classes 3').split()]
        environment = {**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{os.getcwd()}'}
        log = open(tmp_path / 'log', 'w')
        return subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=log)

    def finish(experiment):
        assert start(experiment).wait() == 0, (tmp_path / 'log').read_text()
        return torch.load(tmp_path / experiment / 'last.pth.tar', weights_only=False)

    whole = finish('whole')
    run = start('killed')
    awaited = tmp_path / 'killed' / ('tmp.pth.tar' if while_saving else 'checkpoint-1.pth.tar')
    while run.poll() is None and not awaited.exists():
        time.sleep(0. if while_saving else 1e-3)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    resumed = finish('killed')
    for key in ('state_dict', 'state_dict_ema'):
        assert [name for name, value in whole[key].items() if not torch.equal(value, resumed[key][name])] == []
    torch.testing.assert_close(resumed['optimizer']['state'], whole['optimizer']['state'], rtol=0., atol=0.)
