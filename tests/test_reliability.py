""" Damaged checkpoints and images are refused or read as they are; a killed training run resumes to the same end. """
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import timm
from timm.models import save_for_hf

from timm_ait.__main__ import main as command_line

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2 ** 32)

BYTES = {
    'truncated': lambda rng, data: data[:rng.randrange(len(data))],
    'bits flipped': lambda rng, data: bytes(byte ^ (rng.random() < 1e-3) << rng.randrange(8) for byte in data),
    'bytes inserted': lambda rng, data: data[:len(data) // 2] + rng.randbytes(100) + data[len(data) // 2:],
    'noise': lambda rng, data: rng.randbytes(1000),
}
TENSORS = {
    'missing': lambda rng, x: None,
    'another shape': lambda rng, x: rng.choice([x[None], x[:0], torch.cat([x, x])]),
    'another kind of number': lambda rng, x: x.to(rng.choice([torch.int8, torch.complex64])),
    'another precision': lambda rng, x: x.to(rng.choice([torch.float16, torch.float64])),
    'nan': lambda rng, x: x * float('nan'),
}
ADAPTED = ('pos_embed', 'patch_embed.')  # by timm, to other image sizes and channels


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Folder of a small classifier."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('checkpoint')
    save_for_hf(timm.create_model('test_ait', num_classes=3), folder, safe_serialization=True)
    return folder


@few
@given(kind=st.sampled_from(sorted(TENSORS)), seed=seeds)
def test_a_checkpoint_with_a_damaged_tensor_is_refused_or_loaded_as_it_is(checkpoint, kind, seed):
    rng, stored = random.Random(seed), load_file(checkpoint / 'model.safetensors')
    key = rng.choice([key for key in sorted(stored) if not key.startswith(ADAPTED)])
    stored[key] = TENSORS[kind](rng, stored[key])
    overlay = dict(state_dict={key: value for key, value in stored.items() if value is not None}, num_classes=3)

    def load():
        return timm.create_model('test_ait', num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)

    if kind in ('another precision', 'nan'):
        for key, value in load().state_dict().items():
            if not key.startswith(ADAPTED):
                torch.testing.assert_close(value, stored[key].to(value.dtype), rtol=0., atol=0., equal_nan=True)
    else:
        problem = f'{key} {stored[key].dtype}' if kind == 'another kind of number' else key
        with pytest.raises(RuntimeError, match=f'nothing was loaded: .*{problem}'):
            load()


MODES = {'jpeg': 'CMYK', 'png': 'I;16', 'gif': 'P', 'bmp': 'RGB', 'tiff': 'RGB', 'webp': 'RGB'}
NOISE = Image.frombytes('RGB', (64, 48), random.Random(0).randbytes(64 * 48 * 3))


@few
@given(suffix=st.sampled_from(sorted(MODES)), kind=st.sampled_from(sorted(BYTES)), seed=seeds)
def test_a_damaged_image_is_classified_or_named_beside_a_good_one(checkpoint, suffix, kind, seed):
    good, damaged = checkpoint / 'image.png', checkpoint / f'damaged.{suffix}'
    NOISE.save(good)
    NOISE.convert(MODES[suffix]).save(damaged, compression='tiff_lzw')
    damaged.write_bytes(BYTES[kind](random.Random(seed), damaged.read_bytes()))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = command_line([
            'predict', str(good), str(damaged), '--model', f'local-dir:{checkpoint}', '--device', 'cpu', '--json'])
    document = json.loads(out.getvalue())
    classified, named = ([entry['file'] for entry in document[key]] for key in ('images', 'errors'))
    assert sorted(classified + named) == sorted(map(str, (good, damaged))) and str(good) in classified
    assert code == len(named) and 'Traceback' not in err.getvalue()


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
@pytest.mark.parametrize('awaited, options', [
    ('checkpoint-1.pth.tar', []),
    ('tmp.pth.tar', ['--amp', '--amp-dtype', 'bfloat16', '--grad-accum-steps', '2', '--grad-checkpointing']),
], ids=['between epochs', 'while saving'])
def test_a_killed_run_of_timms_train_script_resumes_to_the_same_end(tmp_path, awaited, options):
    (tmp_path / 'seed_epochs.py').write_text(SEED_EPOCHS)
    rng = random.Random(0)
    for i in range(60):
        file = tmp_path / 'data' / ('validation' if i < 12 else 'train') / 'abc'[i % 3] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes('RGB', (32, 32), rng.randbytes(32 * 32 * 3)).save(file)

    def start(experiment):
        place = tmp_path / experiment
        # the saver unlinks the last checkpoint before it moves the next one to its place
        files = sorted(place.glob('checkpoint-*')) + list(place.glob('last.pth.tar'))
        command = [
            sys.executable, Path(os.environ['TIMM_SCRIPTS'], 'train.py'), '--device-modules', 'timm_ait', 'seed_epochs',
            '--data-dir', tmp_path / 'data', '--model', 'test_ait', '--output', tmp_path, '--experiment', experiment,
            *(['--resume', files[-1]] if files else []), *options, *(
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
    while run.poll() is None and not (tmp_path / 'killed' / awaited).exists():
        time.sleep(0. if awaited == 'tmp.pth.tar' else 1e-3)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    resumed = finish('killed')
    for key in ('state_dict', 'state_dict_ema'):
        assert [name for name, value in whole[key].items() if not torch.equal(value, resumed[key][name])] == []
    torch.testing.assert_close(resumed['optimizer']['state'], whole['optimizer']['state'], rtol=0., atol=0.)
