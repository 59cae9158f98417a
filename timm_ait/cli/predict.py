""" Classify image files with a pretrained model: python -m timm_ait predict IMAGE … """
import argparse
import functools
import json
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

from . import integer, one_line, quietly, staged
from .images import MAX_ASPECT_RATIO, MAX_PIXELS, add_arguments, find_images, image_reader, load_model
from .labels import class_names, match_labels, read_labels
from .sheet import Tile, contact_sheet, fit, sheet_file

__all__ = ['Prediction', 'add_parser', 'classify']

_THUMBNAIL = 128  # pixels
_MAX_TILES = 1000  # a sheet of about 5000 px square
_FRAMES = {True: '#137333', False: '#c5221f'}  # of right and wrong predictions


class Prediction(NamedTuple):
    """ An image's most probable classes, as pairs of index and probability, or the error why there are none. """
    file: Path
    classes: Sequence[Tuple[int, float]] = ()
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
        Predictions in order, except that files that cannot be read come first in their batch.
    """
    read, device, files = image_reader(model), next(model.parameters()).device, iter(files)
    while chunk := list(islice(files, batch_size)):
        batch = []
        for file in chunk:
            try:
                image, x = read(file)
                batch.append((file, fit(image, _THUMBNAIL), x))
            except Exception as e:  # Pillow raises many kinds of errors on damaged files
                yield Prediction(file, error=f'cannot be read ({one_line(e)})')
        if not batch:
            continue
        with torch.inference_mode():
            probabilities = model(torch.stack([x for _, _, x in batch]).to(device)).float().softmax(-1)
            values, indices = probabilities.topk(min(topk, probabilities.shape[-1]))
        for (file, thumbnail, _), *best in zip(batch, indices.tolist(), values.tolist()):
            if math.isnan(best[1][0]):
                yield Prediction(file, error="the model's output is not a number")
            else:
                yield Prediction(file, list(zip(*best)), thumbnail)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'predict',
        help='classify image files with a pretrained model',
        description=f'Classify image files with a pretrained model, turned upright by their EXIF orientation. Images '
                    f'of more than {MAX_PIXELS // 10 ** 6} million pixels, or with one side more than '
                    f'{MAX_ASPECT_RATIO} times the other, are not read. The exit code is 1 if some files could not be '
                    'read, which are reported, and 2 if nothing could be done.',
    )
    add_arguments(parser, 'classifier')
    parser.add_argument('--batch-size', type=integer(1), default=64, metavar='N',
                        help='images in memory at a time (default: %(default)s)')
    parser.add_argument('--topk', type=integer(1), default=5, metavar='N',
                        help='predictions per image, at most the number of classes (default: %(default)s)')
    parser.add_argument('--labels', type=Path, metavar='FILE.csv',
                        help='true classes, to report the accuracy: columns file (relative to the CSV file) and label')
    parser.add_argument('--sheet', type=sheet_file, metavar='FILE', help='write a contact sheet, .png or .jpg')
    parser.add_argument('--json', action='store_true', help='print one JSON document')
    parser.set_defaults(main=functools.partial(quietly, _main, parser))


def _main(args: argparse.Namespace) -> int:
    files = find_images(args.images)
    labels = read_labels(args.labels) if args.labels else {}
    if args.labels and labels.keys().isdisjoint(file.resolve() for file in files):
        raise ValueError(
            f'--labels {args.labels} has no label for any of the images; its files are relative to its own folder')
    if args.sheet and len(files) > _MAX_TILES:
        raise ValueError(f'--sheet has room for {_MAX_TILES} images, got {len(files)}')
    model = load_model(args.model, args.device)
    names, descriptions = class_names(model)
    targets = match_labels(labels, names, descriptions)

    def describe(index: int) -> Dict[str, Any]:
        return {'index': index, 'name': names[index], 'description': descriptions[index]}

    images, errors, tiles = [], [], []
    predictions = classify(model, files, args.topk, args.batch_size)
    for prediction in tqdm(predictions, total=len(files), unit='image', file=sys.stderr):
        file = str(prediction.file)
        if prediction.error:
            errors.append({'file': file, 'error': prediction.error})
            tqdm.write(f'{file}: {prediction.error}', file=sys.stderr)
            continue
        target = targets.get(prediction.file.resolve())
        correct = None if target is None else prediction.classes[0][0] == target
        images.append({
            'file': file,
            'label': None if target is None else describe(target),
            'correct': correct,
            'predictions': [
                {**describe(index), 'probability': probability} for index, probability in prediction.classes],
        })
        truth = '' if target is None else 'right' if correct else f'is {descriptions[target]}'
        if not args.json:
            verdict = f'wrong ({truth})' if correct is False else truth
            classes = (f'{probability:.1%} {descriptions[index]}' for index, probability in prediction.classes)
            tqdm.write('  '.join(filter(None, [file, verdict, *classes])))
        if args.sheet:
            index, probability = prediction.classes[0]
            lines = [f'{probability:.0%} {descriptions[index]}', truth]
            tiles.append(Tile(prediction.thumbnail, lines, frame=_FRAMES.get(correct)))

    if not images:
        raise ValueError('IMAGE: none of the files could be classified, see above')
    if args.sheet:
        columns = math.ceil(1.1 * math.sqrt(len(tiles)))
        rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
        with staged(args.sheet.parent) as folder:
            contact_sheet(rows, _THUMBNAIL).save(folder / args.sheet.name)
    marks = [image['correct'] for image in images if image['correct'] is not None]
    accuracy = sum(marks) / len(marks) if marks else None
    if args.json:
        print(json.dumps({'model': args.model, 'images': images, 'errors': errors, 'accuracy': accuracy}, indent=2))
    elif marks:
        print(f'top-1 accuracy {accuracy:.1%} ({sum(marks)} of {len(marks)} labelled images)')
    return 1 if errors else 0
