""" Classify image files with a pretrained model: python -m timm_ait predict IMAGE … """
import argparse
import functools
import json
import math
import os
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

from timm.data import create_transform, resolve_model_data_config

from . import one_line
from .images import KNOWN_FORMATS, MAX_ASPECT_RATIO, MAX_PIXELS, find_images, load_image, load_model
from .labels import class_names, match_labels, read_labels
from .sheet import Tile, check_sheet, contact_sheet, save_sheet

__all__ = ['Prediction', 'add_parser', 'classify']

_THUMBNAIL = 128  # pixels
_COLOURS = {True: '#137333', False: '#c5221f'}


class Prediction(NamedTuple):
    """ An image's most probable classes, or the error that left it without. """
    file: Path
    indices: Sequence[int] = ()
    probabilities: Sequence[float] = ()
    thumbnail: Optional[Image.Image] = None
    error: Optional[str] = None


def classify(model: nn.Module, files: Iterable[Path], topk: int = 5, batch_size: int = 64) -> Iterator[Prediction]:
    """Classify image files in batches, with the transforms of the model's own config.

    Args:
        model: Classifier, in evaluation mode.
        files: Image files.
        topk: Predictions per image, at most the number of classes.
        batch_size: Images in memory at a time.

    Yields:
        Predictions; a file that cannot be read comes before the others of its batch.
    """
    config = resolve_model_data_config(model)
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    transform = create_transform(**config, is_training=False)
    device = next(model.parameters()).device

    files = iter(files)
    while chunk := list(islice(files, batch_size)):
        batch = []
        for file in chunk:
            try:
                image = load_image(file, mode)
                batch.append((file, _thumbnail(image), transform(image)))
            except Exception as e:  # Pillow raises nearly anything on damaged files
                yield Prediction(file, error=f'cannot be read ({one_line(e)})')
        if not batch:
            continue
        batch_files, thumbnails, inputs = zip(*batch)
        with torch.inference_mode():
            probabilities = model(torch.stack(inputs).to(device)).float().softmax(-1)
            values, indices = probabilities.topk(min(topk, probabilities.shape[-1]))
        for prediction in map(Prediction, batch_files, indices.tolist(), values.tolist(), thumbnails):
            if math.isnan(prediction.probabilities[0]):
                prediction = Prediction(prediction.file, error="the model's output is not a number")
            yield prediction


def _thumbnail(image: Image.Image) -> Image.Image:
    scale = _THUMBNAIL / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.).convert('RGB')


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'predict',
        help='classify image files with a pretrained model',
        description=f'Classify image files with a pretrained model, upright as their EXIF data says. Images of more '
                    f'than {MAX_PIXELS // 10 ** 6} million pixels, or with one side more than {MAX_ASPECT_RATIO} times '
                    'the other, are not read. The exit code is 1 if some files could not be read, which are named, '
                    '2 if nothing could be done.',
    )
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE',
                        help='image, or folder to search for images; those of formats that Pillow here does not read '
                             f'are named ({" ".join(sorted(KNOWN_FORMATS))}), hidden ones are left out')
    parser.add_argument('--model', default='ait_small', metavar='NAME',
                        help='any timm model, hf-hub:<user>/<model> or local-dir:<folder> (default: %(default)s)')
    parser.add_argument('--device', help='device to run on (default: cuda if there is one, else cpu)')
    parser.add_argument('--batch-size', type=_positive_int, default=64, metavar='N',
                        help='images in memory at a time (default: %(default)s)')
    parser.add_argument('--topk', type=_positive_int, default=5, metavar='N',
                        help='predictions per image, at most the number of classes (default: %(default)s)')
    parser.add_argument('--labels', type=Path, metavar='FILE.csv',
                        help='true classes, in columns file (relative to the CSV file) and label: adds the accuracy')
    parser.add_argument('--sheet', type=Path, metavar='FILE', help='write a contact sheet, .png or .jpg')
    parser.add_argument('--json', action='store_true', help='print one JSON document')
    parser.set_defaults(main=functools.partial(_main, parser))


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        code = _predict(parser, args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads the output has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        return 1


def _predict(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        files, problems = find_images(args.images)
        labels = read_labels(args.labels) if args.labels else {}
        if args.labels and labels.keys().isdisjoint(file.resolve() for file in files):
            raise ValueError(
                f'--labels {args.labels} has a label for none of the images; its files are relative to its own folder')
        if args.sheet:
            check_sheet(args.sheet, len(files))
        model = load_model(args.model, args.device)
        names, descriptions = class_names(model)
        targets = match_labels(labels, names, descriptions)
    except ValueError as e:
        parser.error(str(e))

    def describe(index: Optional[int]) -> Optional[Dict[str, Any]]:
        return None if index is None else {
            'index': index, 'name': names[index], 'description': descriptions[index]}

    images, errors, tiles = [], [], []
    failures = (Prediction(file, error=reason) for file, reason in problems)
    predictions = classify(model, files, args.topk, args.batch_size)
    progress = tqdm(predictions, total=len(files), unit='image', file=sys.stderr, disable=not files)
    for prediction in chain(failures, progress):
        if prediction.error:
            errors.append({'file': str(prediction.file), 'error': prediction.error})
            tqdm.write(f'{prediction.file}: {prediction.error}', file=sys.stderr)
            continue
        target = targets.get(prediction.file.resolve())
        correct = None if target is None else prediction.indices[0] == target
        images.append({
            'file': str(prediction.file),
            'label': describe(target),
            'correct': correct,
            'predictions': [
                {**describe(index), 'probability': probability}
                for index, probability in zip(prediction.indices, prediction.probabilities)
            ],
        })
        if not args.json:
            _print_image(images[-1])
        if args.sheet:
            lines = [f'{prediction.probabilities[0]:.0%} {descriptions[prediction.indices[0]]}']
            colour = _COLOURS.get(correct)
            if target is not None:
                lines.append('right' if correct else f'is {descriptions[target]}')
            tiles.append(Tile(prediction.thumbnail, lines, colour or 'black', colour))

    if not images:
        parser.error('IMAGE: none of the files could be classified, the reasons are above')
    if args.sheet:
        save_sheet(contact_sheet(tiles, _THUMBNAIL), args.sheet)
    correct = [image['correct'] for image in images if image['correct'] is not None]
    accuracy = sum(correct) / len(correct) if correct else None
    if args.json:
        document = {'model': args.model, 'images': images, 'errors': errors, 'accuracy': accuracy}
        print(json.dumps(document, indent=2))
    elif accuracy is not None:
        print(f'top-1 accuracy {accuracy:.1%} ({sum(correct)} of {len(correct)} labelled images)')
    return 1 if errors else 0


def _print_image(image: Dict[str, Any]) -> None:
    line = image['file']
    if image['correct'] is not None:
        line += '  right' if image['correct'] else f'  wrong (is {image["label"]["description"]})'
    for prediction in image['predictions']:
        line += f'  {prediction["probability"]:.1%} {prediction["description"]}'
    # not every file name can be printed as it is
    encoding = sys.stdout.encoding or 'utf-8'
    line = line.encode(encoding, 'backslashreplace').decode(encoding)
    # on a terminal the progress bar has to make room, elsewhere that would only draw it again for every line
    (tqdm.write if sys.stdout.isatty() else print)(line)
