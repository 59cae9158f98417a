""" Classify image files with a pretrained model: python -m timm_ait predict IMAGE … """
import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict

from tqdm import tqdm

from . import integer, quietly, staged
from .images import MAX_ASPECT_RATIO, MAX_PIXELS, add_arguments, each_file, find_images, image_classifier, load_model
from .labels import class_names, match_labels, read_labels
from .sheet import Tile, contact_sheet, fit, sheet_file

_THUMBNAIL = 128  # pixels
_MAX_TILES = 1000  # a sheet of about 5000 px square
_FRAMES = {True: '#137333', False: '#c5221f'}  # of right and wrong predictions


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
    parser.add_argument('--topk', type=integer(1), default=5, metavar='N',
                        help='predictions per image, at most the number of classes (default: %(default)s)')
    parser.add_argument('--labels', type=Path, metavar='FILE.csv',
                        help='true classes, to report the accuracy: columns file (relative to the CSV file) and label')
    parser.add_argument('--sheet', type=sheet_file, metavar='FILE', help='write a contact sheet, .png or .jpg')
    parser.add_argument('--json', action='store_true', help='print one JSON document')
    parser.set_defaults(main=lambda args: quietly(_main, parser, args))


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
    for file, (image, _, probabilities) in each_file(image_classifier(model), files, 'classified', errors):
        values, indices = probabilities.topk(min(args.topk, len(names)))
        best = list(zip(values.tolist(), indices.tolist()))
        target = targets.get(file.resolve())
        correct = None if target is None else best[0][1] == target
        images.append({
            'file': str(file),
            'label': None if target is None else describe(target),
            'correct': correct,
            'predictions': [{**describe(index), 'probability': probability} for probability, index in best],
        })
        truth = '' if target is None else 'right' if correct else f'is {descriptions[target]}'
        classes = [f'{probability:.1%} {descriptions[index]}' for probability, index in best]
        if not args.json:
            verdict = f'wrong ({truth})' if correct is False else truth
            tqdm.write('  '.join(filter(None, [str(file), verdict, *classes])))
        if args.sheet:
            tiles.append(Tile(fit(image, _THUMBNAIL), [classes[0], truth], frame=_FRAMES.get(correct)))

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
