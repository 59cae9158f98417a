""" What users' faults do: damaged checkpoints and configs, damaged images, killed training runs.

    TIMM_SCRIPTS=FOLDER python -m benchmarks.reliability
    python -m benchmarks.reliability --part checkpoints --case 17

Writes its parts of benchmarks/RELIABILITY.md. Every damaged file follows from the seed and its number, and is read in a
worker that is replaced when it dies or hangs. TIMM_SCRIPTS is the folder of timm's train.py. Linux only.
"""
import argparse
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from timm_ait.__main__ import main as command_line
from timm_ait.cli.export import export
from timm_ait.cli.predict import classify
from timm_ait.ops.memory import project_memory

MODELS = {'AiT': 'test_ait', 'ViT': 'test_vit'}
ARGUMENTS = dict(num_classes=3, img_size=32, patch_size=4, depth=2, embed_dim=64, dynamic_img_size=False)
MEMORY_LIMIT = 2 ** 30  # bytes of address space beyond what the worker has
TIMEOUT = 300.  # seconds a file, of a machine that others use too
# any other outcome is a fault
FINE = ('error', 'error after a warning', 'as it was', 'other values', 'not finite', 'adapted', 'picture', 'named')
Damage = Callable[[random.Random, bytes], bytes]


class Case(NamedTuple):
    """ What became of a damaged file. """
    number: int
    kind: str
    outcome: str
    detail: str
    megabytes: float  # peak beyond what the worker has


def _flip(rng: random.Random, data: bytes, end: Optional[int] = None) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data[:end]))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _replace(rng: random.Random, data: bytes, size: int, new: Callable[[int], bytes]) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + new(rng.randrange(1, 4096)) + data[start + size:]


BYTES: Dict[str, Damage] = {
    'truncated': lambda rng, data: data[:rng.randrange(1, len(data))],
    'bits flipped': _flip,
    'bits of the first 2 kB flipped': lambda rng, data: _flip(rng, data, 2048),
    'a block zeroed': lambda rng, data: _replace(rng, data, 2048, lambda size: bytes(2048)),
    'a block of another size': lambda rng, data: _replace(rng, data, 2048, rng.randbytes),
    'bytes inserted': lambda rng, data: _replace(rng, data, 0, rng.randbytes),
    'bytes appended': lambda rng, data: data + rng.randbytes(rng.randrange(1, 64)),
    'empty': lambda rng, data: b'',
    'noise': lambda rng, data: rng.randbytes(rng.randrange(1, 4096)),
}


def _damage_header(rng: random.Random, data: bytes) -> bytes:
    """Damage to the JSON that a safetensors file starts with, and to its length."""
    size, = struct.unpack('<Q', data[:8])
    header, rest = json.loads(data[8:8 + size]), data[8 + size:]
    length, entry = None, header[rng.choice(sorted(header.keys() - {'__metadata__'}))]
    choice = rng.choice(['length', 'size', 'depth', 'data_offsets', 'shape', 'dtype', 'metadata'])
    if choice == 'length':
        length = rng.choice([0, 7, size + 1, 10 ** 8, 10 ** 8 + 1, 2 ** 40, 2 ** 63, 2 ** 64 - 1])
    elif choice == 'data_offsets':
        entry[choice] = rng.choice([[0, 4], [4, 0], [-1, 4], [0, 2 ** 63], [2 ** 64 - 4, 2 ** 64 - 1], [], None])
    elif choice == 'shape':
        entry[choice] = rng.choice([[2 ** 40, 2 ** 40], [-1], [0], [], [1.5], [2 ** 63], 'x'])
    elif choice == 'dtype':
        entry[choice] = rng.choice(['F16', 'I32', 'X', '', 4, None])
    elif choice == 'metadata':
        header['__metadata__'] = rng.choice([{'a': 1}, 'x', {'format': '../../x'}, {'format': 'x' * 10 ** 6}, None])
    text = '[' * 10 ** rng.randrange(1, 6) if choice == 'depth' else json.dumps(header)
    text += ' ' * rng.choice([10 ** 6, 5 * 10 ** 7, 10 ** 8]) if choice == 'size' else ''
    return struct.pack('<Q', len(text) if length is None else length) + text.encode() + rest


NAMES = ('../../x', '/etc/passwd', '', '\0', 'a' * 70_000, 'head', '__class__', 'blocks.0', 'C:\\x', '\u202e.weight')
DTYPES = ('float16', 'bfloat16', 'float64', 'int8', 'int64', 'bool', 'complex64', 'float8_e4m3fn')
VALUES = ('text', None, [1, 2], {'a': 1}, 3, torch.zeros(2, 2).to_sparse(), torch.empty(3, device='meta'))
TENSORS: Dict[str, Callable[[random.Random, torch.Tensor], Any]] = {
    'other shapes': lambda rng, x: rng.choice([x.flatten(), x[None], x[:0], x[1:].clone(), torch.cat([x, x]), x.sum()]),
    'other dtypes': lambda rng, x: x.to(getattr(torch, rng.choice(DTYPES))),
    'nan or inf': lambda rng, x: x.flatten().index_fill(
        0, torch.tensor([rng.randrange(x.numel())]), rng.choice([np.nan, np.inf, -np.inf])).view_as(x),
    'no tensors': lambda rng, x: rng.choice(VALUES),
}
KEYS = ('keys missing', 'keys added', 'keys renamed', 'tricks in names')


def _damage_tensors(kind: str, rng: random.Random, weights: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """Another content of a well-formed file."""
    some = rng.sample(list(weights), rng.choice([1, 1, 2, 5, len(weights)]))
    if kind in TENSORS:
        return {**weights, **{key: TENSORS[kind](rng, weights[key]) for key in some}}
    if kind == 'tricks in names':
        return {**weights, rng.choice(NAMES): torch.zeros(3)}
    kept = weights if kind == 'keys added' else {key: value for key, value in weights.items() if key not in some}
    return kept if kind == 'keys missing' else {**kept, **{f'{key}.x': weights[key].clone() for key in some}}


class Harmful:
    """ A pickle that writes a file when it is read. """

    def __reduce__(self):
        return open, ('harm', 'w')


CONFIGS = (
    'values', 'keys missing', 'keys added', 'path tricks', 'truncated', 'bits flipped', 'a block zeroed', 'empty')


def _damage_config(kind: str, rng: random.Random, text: bytes, outside: str) -> bytes:
    """Damage to a config.json; outside is a folder with another model."""
    if kind in BYTES:
        return BYTES[kind](rng, text)
    config = json.loads(text)
    place = rng.choice([config, config['pretrained_cfg'], config['pretrained_cfg'], config['model_args']])
    value = rng.choice([
        None, '', 'x', 'x' * 10 ** 6, [], [1], {}, {'a': 1}, '../../x', '\0', 0, -1, 1.5, True, 10 ** 5, 10 ** 9,
        10 ** 30, float('nan'), float('inf')])
    if kind == 'values':
        place[rng.choice(list(place))] = value
    elif kind == 'keys missing':
        del place[rng.choice(list(place))]
    elif kind == 'keys added':
        names = ['x', '', '../x', 'depth', 'num_slots', 'beta', 'checkpoint_path', 'device', 'dtype', 'pretrained']
        place[rng.choice(names)] = value
    elif rng.random() < 0.5:
        config['architecture'] = rng.choice([f'local-dir:{outside}', outside, '../test_ait', 'hf-hub:a/b', '__class__'])
    else:
        name = rng.choice(['file', 'url', 'hf_hub_id', 'state_dict', 'hf_hub_filename', 'source', 'custom_load'])
        config['pretrained_cfg'][name] = rng.choice([outside, f'{outside}/model.safetensors', f'file://{outside}'])
    return json.dumps(config).encode()


class Checkpoints:
    """ Damaged checkpoints and configs of an AiT, and beside it of a ViT of timm's, read in every way there is. """
    names = tuple(MODELS)
    kinds = (
        *BYTES, *TENSORS, *KEYS, 'safetensors header', 'another pickle', 'no file', *(f'config: {x}' for x in CONFIGS))

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        for name, architecture in MODELS.items():
            for place in (folder / name, folder / f'outside {name}'):
                model = timm.create_model(architecture, **ARGUMENTS)
                export(model, place, torch.float32, ['a', 'b', 'c'])
                torch.save({
                    'epoch': 1, 'version': 2, 'args': argparse.Namespace(model=architecture),
                    'state_dict': model.state_dict()}, place / 'last.pth.tar')
        Image.new('RGB', (32, 32), 'red').save(folder / 'image.png')

    def prepare(self, rng: random.Random, name: str) -> Tuple[str, Callable[[], Tuple[str, str]]]:
        """Write a damaged file; returns the kind of damage, and a function that reads the file, see `_read`."""
        place, kind = self.folder / 'damaged', rng.choice(self.kinds)
        for folder in (place, self.folder / 'out'):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.folder / name, folder)
        file, other = rng.sample([place / 'model.safetensors', place / 'last.pth.tar'], 2)
        if kind == 'safetensors header' and file.suffix == '.tar' or kind in ('another pickle', 'no tensors') and \
                file.suffix != '.tar':
            file, other = other, file
        other.unlink()  # local-dir: reads what it finds
        routes = ['local-dir', 'predict', 'load_checkpoint', 'overlay', 'export']
        if kind.startswith('config: '):
            config, outside = place / 'config.json', str(self.folder / f'outside {name}')
            config.write_bytes(_damage_config(kind.removeprefix('config: '), rng, config.read_bytes(), outside))
        elif kind in BYTES:
            file.write_bytes(BYTES[kind](rng, file.read_bytes()))
        elif kind == 'safetensors header':
            file.write_bytes(_damage_header(rng, file.read_bytes()))
        elif kind == 'no file':
            file.unlink()
            rng.choice([file.mkdir, lambda: file.symlink_to('nowhere'), lambda: os.mkfifo(file)])()
        elif file.suffix == '.safetensors':
            save_file({k: v.contiguous() for k, v in _damage_tensors(kind, rng, load_file(file)).items()}, file)
        else:
            state = torch.load(file, weights_only=False)
            others = [Harmful(), [], 'text', None, torch.zeros(3), {'state_dict': None}, {'state_dict': Harmful()}, {}]
            torch.save(rng.choice(others) if kind == 'another pickle' else {
                **state, 'state_dict': _damage_tensors(kind, rng, state['state_dict'])}, file)
        route = rng.choice(routes[:2 if kind.startswith('config: ') else None])
        return kind, lambda: self._read(route, name, place, file)

    def _read(self, route: str, name: str, place: Path, file: Path) -> Tuple[str, str]:
        """Outcome of reading a file, and the error."""
        architecture, out, before = MODELS[name], self.folder / 'out', {}
        detail, model = f'{file.name} by {route}: ', None
        try:
            if route == 'load_checkpoint':
                model = timm.create_model(architecture, **ARGUMENTS)
                before = {key: value.clone() for key, value in model.state_dict().items()}
                timm.models.load_checkpoint(model, str(file))
            elif route == 'overlay':
                overlay = dict(file=str(file), num_classes=3)
                model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **ARGUMENTS)
            elif route == 'export':
                _command('export', file, '--model', architecture, '--out', out, '--dtype', 'float32', '--model-kwargs',
                         *(f'{key}={value}' for key, value in ARGUMENTS.items()))
            else:
                if route == 'predict':
                    _command('predict', self.folder / 'image.png', '--device', 'cpu', '--model', f'local-dir:{place}')
                model = timm.create_model(f'local-dir:{place}', pretrained=True)
        except CommandError as e:
            lines = [line for line in e.args[0] if "the model's output is not a number" not in line]
            detail += str(lines)
            if any((out / x.name).read_bytes() != x.read_bytes() for x in (self.folder / name).iterdir()):
                return 'half written', detail
            if sum(line.startswith('python -m timm_ait') for line in lines) != 1 or 'error: ' not in lines[-1]:
                return 'not one error', detail
            return 'error' if len(lines) == 1 else 'error after a warning', detail
        except Exception as e:
            is_kept = all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
            return 'half loaded' if not is_kept else 'error' if str(e) else 'no message', f'{detail}{e!r}'

        # what was loaded must be what an independent reading of the file gives
        expected, saved, tolerance = _read_tensors(file), load_file(self.folder / name / 'model.safetensors'), 0.
        loaded = model.state_dict() if model else load_file(out / 'model.safetensors')
        if route == 'export':  # which writes the memory as evaluation reads it
            tolerance = 1e-6
            expected = {key: project_memory(x.float()) if '.memory' in key else x for key, x in expected.items()}

        def differ(others):
            return [key for key, value in loaded.items() if key not in others or others[key].shape != value.shape or
                    not torch.allclose(others[key].to(value.dtype), value, rtol=0., atol=tolerance, equal_nan=True)]

        detail += ', '.join(differ(expected))
        if any(not key.startswith(('head.', 'pos_embed', 'patch_embed.')) for key in differ(expected)):
            return 'not what the file has', detail
        if differ(expected):
            return 'adapted', detail
        if not all(value.isfinite().all() for value in loaded.values()):
            return 'not finite', detail
        return 'other values' if differ(saved) else 'as it was', detail


class CommandError(Exception):
    """ A command's exit code is not 0; its argument is the lines on standard error. """


def _command(*arguments: Any) -> None:
    with _captured() as lines:
        try:
            code = command_line([str(argument) for argument in arguments])
        except SystemExit as e:
            code = e.code
    if code:
        raise CommandError(lines)


def _read_tensors(file: Path) -> Dict[str, torch.Tensor]:
    if file.suffix == '.tar':
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location='cpu', weights_only=True)['state_dict']
    data = file.read_bytes()
    start = 8 + struct.unpack('<Q', data[:8])[0]
    dtypes = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'F8_E4M3': 'float8_e4m3fn',
              'I8': 'int8', 'I32': 'int32', 'I64': 'int64', 'BOOL': 'bool', 'C64': 'complex64'}
    return {
        key: torch.frombuffer(bytearray(data[start:][slice(*entry['data_offsets'])]),
                              dtype=getattr(torch, dtypes[entry['dtype']])).view(entry['shape'])
        for key, entry in json.loads(data[8:start]).items() if key != '__metadata__'}


def _declare(rng: random.Random, data: bytes) -> bytes:
    """Another width or height, wherever the header has it."""
    size, other = rng.choice(Images.size), rng.choice([0, 1, 8_000, 20_000, 65_535, 2 ** 31 - 1])
    head = data[:2048]
    for form, limit in (('<I', 2 ** 32), ('>I', 2 ** 32), ('<H', 2 ** 16), ('>H', 2 ** 16)):
        head = head.replace(struct.pack(form, size), struct.pack(form, min(other, limit - 1)))
    if data.startswith(b'\x89PNG'):
        head = head[:29] + struct.pack('>I', zlib.crc32(head[12:29])) + head[33:]
    return head + data[2048:]


def _spoil_exif(rng: random.Random, data: bytes) -> bytes:
    """Noise in the EXIF data, or in a TIFF's own tags."""
    start = max(data.find(mark) for mark in (b'II*', b'MM\0*'))
    start, noise = start + rng.randrange(4, 30), rng.randbytes(rng.randrange(1, 30) if start >= 0 else 0)
    return data[:start] + noise + data[start + len(noise):]


class Images:
    """ Damaged images, read by the function that `python -m timm_ait predict` classifies files with. """
    names = ('predict',)
    size = (309, 247)
    kinds: Dict[str, Damage] = {
        **BYTES, 'declared size': _declare, 'EXIF spoilt': _spoil_exif, 'another extension': lambda rng, data: data,
        'text': lambda rng, data: rng.choice([b'<html>', b'%!PS-Adobe-3.0', b'P6 9999999 9999999 255', b'\n']) * 9,
        'not damaged': lambda rng, data: data, 'large': lambda rng, data: data}

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.large = folder, timm.create_model('test_ait', **ARGUMENTS).eval(), []
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        rgb = Image.fromarray(noise).resize(self.size, Image.Resampling.BICUBIC)
        cmyk, rgba, palette, sixteen = rgb.convert('CMYK'), rgb.convert('RGBA'), rgb.quantize(64), rgb.convert('I;16')
        exif = rgb.getexif()
        exif.update({0x112: 6, 0x10e: 'a description'})
        several = dict(save_all=True, append_images=[rgb.rotate(90).resize(rgb.size)])
        self.originals = [self._encode(*arguments) for arguments in (
            ('JPEG', rgb, dict(exif=exif)), ('JPEG', rgb, dict(progressive=True)), ('JPEG', cmyk), ('PNG', rgba),
            ('PNG', rgb, dict(exif=exif)), ('PNG', palette, dict(transparency=3)), ('PNG', sixteen),
            ('PNG', rgb.convert('1')), ('PNG', rgb, several), ('GIF', palette), ('GIF', palette, several), ('BMP', rgb),
            ('BMP', palette), ('TIFF', rgb, dict(exif=exif)), ('TIFF', rgb, dict(compression='tiff_lzw')),
            ('TIFF', rgb, dict(compression='jpeg')), ('TIFF', cmyk, dict(compression='tiff_deflate')),
            ('TIFF', sixteen), ('WEBP', rgb, dict(exif=exif)), ('WEBP', rgba, dict(lossless=True)),
            ('WEBP', rgb, several))]

    @staticmethod
    def _encode(form: str, image: Image.Image, options: Optional[Dict[str, Any]] = None) -> Tuple[str, bytes]:
        stream = io.BytesIO()
        image.save(stream, form, **options or {})
        return form.lower(), stream.getvalue()

    def prepare(self, rng: random.Random, name: str) -> Tuple[str, Callable[[], Tuple[str, str]]]:
        """As `Checkpoints.prepare`."""
        kind = rng.choice(list(self.kinds))
        if kind == 'large' and not self.large:  # 64 million pixels are read, more are not
            self.large = [self._encode(form, Image.new(mode, (side, side)), options) for form, mode, side, options in (
                ('JPEG', 'RGB', 8000, dict(progressive=True)), ('PNG', 'RGB', 8000, {}), ('PNG', 'L', 9500, {}),
                ('PNG', '1', 20_000, {}), ('WEBP', 'RGBA', 8000, dict(lossless=True, method=0)),
                ('TIFF', 'CMYK', 8000, {}), ('TIFF', 'I;16', 8000, dict(compression='tiff_lzw')),
                ('GIF', 'P', 30_000, {}))]
        extension, data = rng.choice(self.large if kind == 'large' else self.originals)
        if kind == 'another extension':
            extension = rng.choice(['jpg', 'png', 'gif', 'bmp', 'tif', 'webp', 'txt'])
        file = self.folder / f'image.{extension}'
        file.write_bytes(self.kinds[kind](rng, data))
        return kind, lambda: self._read(kind, file)

    def _read(self, kind: str, file: Path) -> Tuple[str, str]:
        """Outcome of reading a file, and the error."""
        with _captured() as lines:
            prediction, = classify(self.model, [file])
        error = prediction.error or ''
        file.unlink()
        outcome = 'named' if error else 'picture'
        if lines or '\n' in error or prediction.file != file:
            outcome = 'not one line'
        elif error and kind in ('not damaged', 'another extension'):
            outcome = 'a good picture refused'
        return outcome, f'{file.name}: {error} {lines}'


PARTS = {'checkpoints': Checkpoints, 'images': Images}


@contextlib.contextmanager
def _captured() -> Iterator[List[str]]:
    """Lines that are written to standard error meanwhile, by C code too, without those of progress bars."""
    lines: List[str] = []
    with tempfile.TemporaryFile('w+', errors='replace') as file, contextlib.redirect_stderr(file), \
            contextlib.redirect_stdout(io.StringIO()):
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += [line for line in file.read().splitlines() if line.strip() and not re.match(r' *\d+%\|', line)]


def _status(name: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    return int(re.search(rf'{name}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024


def _worker(connection, part: Type, seed: int, folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter('always')
    cases = part(Path(folder))
    for number in iter(connection.recv, None):
        for name in cases.names:
            kind, read = cases.prepare(random.Random(f'{part.__name__} {seed} {number}'), name)
            connection.send(kind)
            Path('/proc/self/clear_refs').write_text('5')  # the peak counts from here
            before = _status('VmRSS')
            resource.setrlimit(resource.RLIMIT_AS, (_status('VmSize') + MEMORY_LIMIT, resource.RLIM_INFINITY))
            try:
                outcome, detail = read()
            except BaseException as e:
                outcome, detail = 'traceback', repr(e)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            if Path('harm').exists():
                outcome = 'code was run'
            connection.send((outcome, detail, (_status('VmHWM') - before) / 1e6))


def run_cases(part: Type, numbers: Sequence[int], seed: int) -> Dict[str, List[Case]]:
    """Read damaged files of a part, `Checkpoints` or `Images`, by number in a worker."""
    results: Dict[str, List[Case]] = {name: [] for name in part.names}
    context, worker = multiprocessing.get_context('spawn'), None
    for number in tqdm(numbers, desc=part.__name__):
        if worker is None:
            folder = tempfile.TemporaryDirectory()
            connection, theirs = context.Pipe()
            worker = context.Process(target=_worker, args=(theirs, part, seed, folder.name))
            worker.start()
            theirs.close()
        connection.send(number)
        for name in results:
            kind = '?'
            try:
                kind = connection.recv()
                outcome = connection.recv() if connection.poll(TIMEOUT) else ('hang', f'{TIMEOUT} s', 0.)
            except (ConnectionError, EOFError):
                worker.join()
                outcome = ('crash', f'exit code {worker.exitcode}', 0.)
            results[name].append(Case(number, kind, *outcome))
            if outcome[0] in ('crash', 'hang'):
                worker.kill()
                folder.cleanup()
                worker = None
                break
    if worker is not None:
        connection.send(None)
        worker.join()
        folder.cleanup()
    return results


def run_command_line(number: int, seed: int) -> str:
    """Give damaged images to one run of the command line; what it made of them."""
    with tempfile.TemporaryDirectory() as folder:
        images, files = Images(Path(folder)), []
        export(images.model, Path(folder, 'model'), torch.float32)
        for i in range(number):
            images.prepare(random.Random(f'Images {seed} {i}'), 'predict')
            file = next(Path(folder).glob('image.*'))
            files.append(str(file.rename(file.with_stem(str(i)))))
        options = ['--model', f'local-dir:{folder}/model', '--device', 'cpu', '--json']
        command = [sys.executable, '-m', 'timm_ait', 'predict', *files, *options]
        run = subprocess.run(command, capture_output=True, text=True)
    document = json.loads(run.stdout)
    named, pictures = (sorted(entry['file'] for entry in document[key]) for key in ('errors', 'images'))
    lines = [line for line in run.stderr.splitlines() if line.strip() and not re.match(r' *\d+%\|', line)]
    is_fine = sorted(named + pictures) == sorted(files) and sorted(line.split(': ')[0] for line in lines) == named
    return (
        f'{number} such files in one `python -m timm_ait predict`: {len(pictures)} pictures, {len(named)} named, exit '
        f'code {run.returncode}; standard error has {"a line for each of these and no other" if is_fine else lines}.')


# train.py seeds once, and no checkpoint holds the state of random numbers: with this an epoch is the same when resumed
SEED_EPOCHS = """
import random, numpy, torch
from timm.data import ImageDataset

def set_epoch(self, epoch):
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(epoch)

ImageDataset.set_epoch = set_epoch
"""
EPOCHS = 6
OPTIONS = (
    f'--epochs {EPOCHS} --warmup-epochs 1 -b 16 -vb 12 --opt adamw --lr 1e-3 --weight-decay 0.05 --drop-path 0.1 '
    '--model-ema --model-ema-decay 0.9 --device cpu --workers 0 --checkpoint-hist 2 --num-classes 3 --img-size 32 '
    '--model-kwargs patch_size=4 depth=2 embed_dim=64').split()


class Training:
    """ Small runs of timm's train.py. """

    def __init__(self, folder: Path, model: str, modules: Sequence[str]) -> None:
        self.folder, self.model, self.modules = folder, model, modules
        (folder / 'seed_epochs.py').write_text(SEED_EPOCHS)
        generator = np.random.default_rng(0)
        for i in range(108):
            file = folder / 'data' / ('validation' if i < 12 else 'train') / 'abc'[i % 3] / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)

    def start(self, experiment: str) -> subprocess.Popen:
        """Start a run, or resume it from the last checkpoint that it left."""
        place = self.folder / experiment
        files = sorted(place.glob('checkpoint-*'), key=lambda file: int(re.findall(r'\d+', file.name)[0]))
        # the saver unlinks the last checkpoint before it moves the next one to its place
        files += [file for file in [place / 'last.pth.tar'] if file.exists()]
        command = [
            sys.executable, Path(os.environ['TIMM_SCRIPTS'], 'train.py'), '--device-modules', *self.modules,
            '--data-dir', self.folder / 'data', '--model', self.model, '--output', self.folder,
            '--experiment', experiment, *(['--resume', files[-1]] if files else []), *OPTIONS]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{self.folder}{os.pathsep}{os.getcwd()}'}
        with open(self.folder / 'log', 'w') as log:
            return subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=log)

    def finish(self, experiment: str) -> Dict[str, Any]:
        """Train to the end; returns the last checkpoint."""
        if self.start(experiment).wait():
            raise RuntimeError((self.folder / 'log').read_text())
        return torch.load(self.folder / experiment / 'last.pth.tar', weights_only=False)

    def kill(self, experiment: str, rng: random.Random, seconds: float, while_saving: bool) -> List[str]:
        """Kill a run in a random epoch, within some seconds or while it saves; returns the names of what it left."""
        place = self.folder / experiment
        while True:
            run, epoch = self.start(experiment), rng.randrange(EPOCHS - 1)
            before = place / (f'checkpoint-{epoch - 1}.pth.tar' if epoch else 'args.yaml')
            while run.poll() is None and not before.exists():
                time.sleep(1e-3)
            while while_saving and run.poll() is None and not (place / 'tmp.pth.tar').exists():
                pass
            time.sleep(rng.uniform(0, 5e-3 if while_saving else seconds))
            run.send_signal(signal.SIGKILL)
            if run.wait() == -signal.SIGKILL:
                return [file.name for file in place.glob('*.pth.tar')]
            if run.returncode:
                raise RuntimeError((self.folder / 'log').read_text())
            shutil.rmtree(place)  # it was at its end before


def differences(a: Any, b: Any, name: str) -> List[str]:
    """Names of what is not the same, bit for bit, in two checkpoints."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [item for key in a for item in differences(a[key], b[key], f'{name}.{key}')]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [item for i, pair in enumerate(zip(a, b)) for item in differences(*pair, f'{name}.{i}')]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [name]


def run_kills(model: str, modules: Sequence[str], number: int, seed: int) -> List[Tuple[List[str], List[str]]]:
    """Kill runs, every other one while it saves, and resume them.

    Returns:
        For each, the files that it left, and names of what is not as in a run that was left alone.
    """
    rng, results = random.Random(f'kills {seed}'), []
    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder), model, modules)
        whole = training.finish('whole')
        started, ended = (Path(folder, 'whole', name).stat().st_mtime for name in ('args.yaml', 'last.pth.tar'))
        for i in range(number):
            left = training.kill(str(i), rng, (ended - started) / EPOCHS, i % 2 == 1)
            resumed = training.finish(str(i))
            keys = ('state_dict', 'state_dict_ema', 'optimizer', 'epoch')
            results.append((left, [name for key in keys for name in differences(whole[key], resumed[key], key)]))
    return results


def _table(header: List[str], rows: List[List[Any]]) -> str:
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def report_cases(results: Dict[str, List[Case]]) -> str:
    """Tables of what became of damaged files, a row for each kind of damage, and each kind of fault."""
    blocks = []
    for name, cases in results.items():
        kinds = defaultdict(Counter)
        for case in cases:
            kinds[case.kind][case.outcome] += 1
            kinds['all'][case.outcome] += 1
        outcomes = sorted(kinds['all'], key=lambda outcome: ([*FINE, outcome].index(outcome), outcome))
        rows = [[kind, sum(counts.values()), *(counts[outcome] or '' for outcome in outcomes)]
                for kind, counts in sorted(kinds.items(), key=lambda item: (item[0] == 'all', item[0]))]
        peak = max(cases, key=lambda case: case.megabytes)
        blocks += [f'### {name}', _table(['damage', 'files', *outcomes], rows),
                   f'Most memory beyond what it has: {peak.megabytes:.0f} MB ({peak.kind}, case {peak.number}).']
        faults = {(case.outcome, case.kind): case for case in reversed(cases) if case.outcome not in FINE}
        blocks += [f'- {outcome}, {kind}: case {case.number}, `{" ".join(case.detail.split())[-300:]}`'
                   for (outcome, kind), case in sorted(faults.items())]
    return '\n\n'.join(blocks)


def report_kills(results: Dict[str, List[Tuple[List[str], List[str]]]]) -> str:
    """Table of killed runs."""
    rows = []
    for kind, runs in results.items():
        same = [sum(not any(re.match(pattern, name) for name in names) for _, names in runs)
                for pattern in (r'state_dict\.', r'state_dict\..*\.memory', 'state_dict_ema', 'optimizer', '')]
        rows.append([kind, len(runs), sum('tmp.pth.tar' in left for left, _ in runs),
                     sum('last.pth.tar' not in left for left, _ in runs), *same])
    return _table(['run', 'kills', 'an unfinished file left', 'no last checkpoint', 'same weights', 'same memory',
                   'same averages', 'same optimizer', 'all the same'], rows)


TEXTS = {
    'checkpoints': """## {number:,} damaged checkpoints and configs

A folder with config.json and model.safetensors, or a checkpoint of train.py, is damaged and read in one of five ways,
drawn at random: `timm.models.load_checkpoint` into a model that is there, `create_model` with the file in
`pretrained_cfg_overlay`, `create_model('local-dir:…')`, `python -m timm_ait predict --model local-dir:…`, and
`python -m timm_ait export` over an earlier export. The same is done with a ViT of timm's.

*error*: one exception with a message, or of a command one line and exit code 2, and what was there before is the same
bit for bit. *error after a warning*: of torch, or a line of timm's log. *as it was*, *other values*, *not finite*: it
loads, and every tensor is what an independent reading of the file gives. *adapted*: so it is but for the position
embedding, the patch embedding and the classifier, which timm fits to another image size, channels or classes. Any other
column is a fault: *no message* is of timm and torch, whose errors are empty where a name is not that of a regular file,
where a pickle ends at once, and where an input size is not three numbers; *half loaded* is PyTorch's, which raises
after it has loaded what fits.

Each is read in a process with {limit} MiB of address space beyond what it has, within {timeout} s; with `--case NUMBER`
after the command below one is read again.""",
    'images': """## {number:,} damaged images

JPEG, PNG, GIF, BMP, TIFF and WebP, with EXIF data, palettes, transparency, 1, 8 and 16 bits, CMYK and animations, read
by the function that `python -m timm_ait predict` classifies files with. *picture*: it was classified. *named*: the file
is named with its error in one line. In neither case is anything else written, by Pillow's C libraries either. Any other
column is a fault.

Each is read in a process with {limit} MiB of address space beyond what it has, within {timeout} s; with `--case NUMBER`
after the command below one is read again.""",
    'kills': """## {number} killed training runs

timm's train.py trains a small model for {epochs} epochs (random crops and flips, drop path, averaged weights, float32,
CPU). It gets SIGKILL, every other time while it writes a checkpoint, else at any time; it is resumed from the last
checkpoint, or begun anew where there is none, and its last checkpoint is compared, bit for bit, with that of a run left
alone. train.py draws the order of images and their crops from a seed that is set once, and saves no state of random
numbers, so that no model resumes to the same weights (last row). For the other rows a small module, given to
`--device-modules`, seeds each epoch by its number. Recovery checkpoints within an epoch are left out: train.py goes on
with the epoch after them.""",
}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.reliability', description=__doc__.split('\n\n')[0])
    parser.add_argument('--part', nargs='+', default=[*TEXTS], choices=[*TEXTS], help='(default: all)')
    for name, number in (('checkpoints', 10_000), ('images', 2_000), ('kills', 20)):
        parser.add_argument(f'--{name}', type=int, default=number, metavar='N', help='how many (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='(default: %(default)s)')
    parser.add_argument('--case', type=int, metavar='N', help='print what becomes of this file, and write no page')
    parser.add_argument('--output', type=Path, default=Path(__file__).with_name('RELIABILITY.md'), metavar='FILE')
    args = parser.parse_args(argv)
    if min(args.checkpoints, args.images, args.kills) < 1:
        parser.error('--checkpoints, --images and --kills must be at least 1')
    if args.case is not None:
        for part in set(args.part) & set(PARTS):
            print(part, run_cases(PARTS[part], [args.case], args.seed))
        return
    if 'kills' in args.part and not Path(os.environ.get('TIMM_SCRIPTS', ''), 'train.py').is_file():
        parser.error("--part kills needs TIMM_SCRIPTS, the folder of timm's train.py; choose other parts without")
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('timm', 'torch', 'safetensors', 'pillow')]

    def write(part: str, number: int, result: str) -> None:
        command = f'python -m benchmarks.reliability --part {part} --{part} {number} --seed {args.seed}'
        text = TEXTS[part].format(number=number, epochs=EPOCHS, limit=MEMORY_LIMIT >> 20, timeout=int(TIMEOUT))
        write_section(args.output, part, f'{text}\n\n`{command}`, with {", ".join(versions)}.\n\n{result}')

    for part in args.part:
        number = getattr(args, part)
        if part == 'kills':
            modules = ['timm_ait', 'seed_epochs']
            write(part, number, report_kills({
                'AiT': run_kills(MODELS['AiT'], modules, number, args.seed),
                'ViT': run_kills(MODELS['ViT'], modules, -(-number // 4), args.seed),
                'ViT, seeded once': run_kills(MODELS['ViT'], modules[:1], 1, args.seed)}))
            continue
        results: Dict[str, List[Case]] = {name: [] for name in PARTS[part].names}
        for start in range(0, number, 1000):  # the page says how far it is
            stop = min(start + 1000, number)
            for name, cases in run_cases(PARTS[part], range(start, stop), args.seed).items():
                results[name] += cases
            write(part, stop, report_cases(results))
        if part == 'images':
            write(part, number, f'{report_cases(results)}\n\n{run_command_line(min(number, 48), args.seed)}')


def write_section(page: Path, part: str, text: str) -> None:
    """Write a part's section of the page anew; the others stay."""
    marks = {name: (f'<!-- {name} -->', f'<!-- end of {name} -->') for name in TEXTS}
    old = page.read_text() if page.exists() else ''
    sections = {name: re.findall(f'{begin}\n(.*)\n{end}', old, re.DOTALL) for name, (begin, end) in marks.items()}
    sections[part] = [text]
    blocks = [f'{marks[name][0]}\n{section}\n{marks[name][1]}' for name, found in sections.items() for section in found]
    page.write_text('\n\n'.join(['# Reliability', *blocks]) + '\n')


if __name__ == '__main__':
    main()
