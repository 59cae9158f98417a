""" Images, models and the names of their classes, for the commands. """
import argparse
import contextlib
import os
import struct
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import create_model

from . import blame, one_line

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 1000

# formats of photographs that not every Pillow reads: in folders they are named where it does not, others are ignored
_PHOTOGRAPHS = set('.heic .heif .hif .avif .jxl .jp2 .webp .raw .dng .cr2 .cr3 .nef .arw .orf .raf .rw2'.split())


def add_arguments(parser: argparse.ArgumentParser, models: str) -> None:
    """Arguments for `find_images` and `load_model`."""
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE',
                        help=f'image of at most {MAX_PIXELS // 10 ** 6} million pixels, or folder to search for them, '
                             'where hidden files are left out')
    parser.add_argument('--model', default='ait_small', metavar='NAME',
                        help=f'{models}: a timm model, hf-hub:<user>/<model> or local-dir:<folder> '
                             '(default: %(default)s)')
    parser.add_argument('--device', help='device to run on (default: cuda if available, else cpu)')


def find_images(paths: Sequence[Path]) -> List[Path]:
    """List the given files, and the files in the given folders that have the extension of an image.

    Folders are searched recursively, links are followed, and each file is listed once. Hidden files and folders and
    the `__MACOSX` of archives are skipped unless they are given themselves. What cannot be read is listed too: links
    to nothing, folders that cannot be searched, and formats that the installed Pillow does not know.

    Raises:
        ValueError: A path does not exist, or a folder has no images.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(f'IMAGE: there is no file or folder {", ".join(missing)}')

    known = {
        extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN and
        name not in ('BUFR', 'GRIB', 'HDF5', 'MPEG')}  # of which Pillow knows no more than the names
    files = {}
    for path in paths:
        found = _search(path, known | _PHOTOGRAPHS) if path.is_dir() else [path]
        if not found:
            raise ValueError(f'IMAGE: the folder {path} has no files with the extension of an image format')
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _search(root: Path, extensions: Set[str]) -> List[Path]:
    """Files below a folder with these extensions, and the folders that cannot be listed, sorted."""
    found, visited = [], set()
    for folder, subfolders, names in os.walk(
            root, onerror=lambda e: found.append(Path(e.filename)), followlinks=True):
        if os.path.realpath(folder) in visited:  # a link to a folder above
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = [name for name in subfolders if not name.startswith('.') and name != '__MACOSX']
        files = (Path(folder, name) for name in names if not name.startswith('.'))
        # whoever reads a pipe may wait forever
        found += [
            file for file in files
            if file.suffix.lower() in extensions and not (os.path.exists(file) and file.is_fifo())]
    return sorted(found)


def load_image(file: Path, mode: str = 'RGB') -> Image.Image:
    """Read the first frame of an image, turned upright by its EXIF orientation; the upper 8 of 12 or 16 bits.

    Raises:
        ValueError: The image is too large or PostScript, a program, both checked before its pixels are read; or it has
            32-bit pixels, whose range is unknown.
        Exception: Any error of Pillow on a damaged file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what Pillow warns of is raised, or does not matter
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f'{width} x {height} pixels are more than {MAX_PIXELS // 10 ** 6} million')
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ValueError(f'{width} x {height} pixels, one side is more than {MAX_ASPECT_RATIO} times the other')
            if image.format == 'EPS':
                raise ValueError('PostScript is not read, since it is a program that Ghostscript would run')
            image.load()
            # errors of damaged EXIF data
            with contextlib.suppress(SyntaxError, TypeError, ValueError, LookupError, OverflowError, struct.error):
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PPM'):
                # Pillow's own conversion clips at 255: the image would be white
                bits = 12 if getattr(image, 'tag_v2', {}).get(ExifTags.Base.BitsPerSample) == (12,) else 16
                image = image.convert('I').point(lambda value: value * 2. ** (8 - bits)).convert('L')
            elif image.mode in ('I', 'F'):
                raise ValueError(f'pixels of mode {image.mode!r} have no fixed range, save the image with 8 or 16 bits')
            return image if image.mode == mode else image.convert(mode)


def class_names(model: nn.Module) -> Tuple[List[str], List[str]]:
    """Names and descriptions of a classifier's classes, each of length num_classes.

    As in timm's inference.py they come from the model's config, else from the ImageNet subset with that many classes. A
    list of names of another length is ignored. A class without a name is named by its index, and one without a
    description is described by its name.
    """
    names = model.pretrained_cfg.get('label_names') or ()
    descriptions = model.pretrained_cfg.get('label_descriptions') or {}
    subset = infer_imagenet_subset(model)
    if not names and subset:
        info = ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    if not isinstance(names, dict):
        names = dict(enumerate(names)) if len(names) == model.num_classes else {}
    by_index = {int(index): name for index, name in names.items()}  # JSON has strings for keys
    names = [by_index.get(index, str(index)) for index in range(model.num_classes)]
    return names, [descriptions.get(name, name) for name in names]


def image_classifier(model: nn.Module) -> Callable[[Path], Tuple[Image.Image, torch.Tensor, torch.Tensor]]:
    """Function of a file that returns the image, the model's input (1, C, H, W) and probabilities (num_classes,)."""
    config, device = resolve_model_data_config(model), next(model.parameters()).device
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    transform = create_transform(**config, is_training=False)

    @torch.inference_mode()
    def classify(file: Path) -> Tuple[Image.Image, torch.Tensor, torch.Tensor]:
        image = load_image(file, mode)
        x = transform(image).unsqueeze(0).to(device)
        probabilities = model(x)[0].float().softmax(-1)
        if probabilities.dim() > 1 or probabilities.isnan().any():
            raise ValueError("the model's output is not one number for each class")
        return image, x, probabilities

    return classify


def each_file(function: Callable, files: Sequence[Path], verb: str, errors: List[Dict]) -> Iterator[Tuple[Path, Any]]:
    """Files with a function's results. Those it fails on are reported and added to `errors`.

    Raises:
        ValueError: It fails on all.
    """
    for file in tqdm(files, unit='image', file=sys.stderr):
        try:
            result = function(file)
        except Exception as e:  # Pillow raises many kinds of errors on damaged files
            errors.append({'file': str(file), 'error': f'cannot be {verb} ({one_line(e)})'})
            tqdm.write(f'{file}: {errors[-1]["error"]}', file=sys.stderr)
        else:
            yield file, result
    if len(errors) == len(files):
        raise ValueError(f'IMAGE: none of the files could be {verb}, see above')


def load_model(name: str, device: Optional[str] = None) -> nn.Module:
    """Load a pretrained image classifier in evaluation mode, on cuda where it is available.

    Raises:
        ValueError: The device is not available, the model cannot be loaded, or it does not classify images.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with blame(
            f'--model {name} cannot be loaded, use a name from timm.list_pretrained(), hf-hub:<user>/<model> or '
            'local-dir:<folder with config.json and weights>'):
        model = create_model(name, pretrained=True)
    if model.num_classes < 2:
        raise ValueError(f'--model {name} does not tell two classes apart, it has num_classes={model.num_classes}')
    channels = resolve_model_data_config(model)['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'--model {name} takes {channels} channels, images have 1 or 3')
    if hasattr(model, 'question_embed'):
        raise ValueError(f'--model {name} answers questions about images; call it as model(images, question=…)')
    with blame(f'--device {device} does not work here, --device cpu always does'):
        return model.to(device).eval()
