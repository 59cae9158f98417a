""" Write a synthetic data set: python -m timm_ait data triangle|sort-of-clevr --out FOLDER. """
import argparse
import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from timm_ait.data import sort_of_clevr, triangle

from . import integer, one_line
from .sheet import Tile, contact_sheet, save_sheet, sheet_file

__all__ = ['add_parser']

_MARKER = 'dataset.json'


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to fill, which replaces `out` at the end; on failure it is removed and `out` stays."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}.incomplete-') as staging:
        complete = Path(staging, 'complete')
        complete.mkdir()
        yield complete
        if out.exists():
            os.replace(out, Path(staging, 'replaced'))
        os.replace(complete, out)


def _sheet(images: np.ndarray, captions: Sequence[Sequence[str]], scale: int) -> Image.Image:
    """Contact sheet of images (n, S, S[, 3]), each pixel `scale` pixels wide."""
    return contact_sheet([
        Tile(ImageOps.scale(image, scale, Image.Resampling.NEAREST), lines, frame='lightgrey')
        for image, lines in zip((Image.fromarray(image).convert('RGB') for image in images), captions)
    ], scale * images.shape[1])


def _triangle_sheet(seed: int) -> Image.Image:
    images, labels, _ = triangle.triangles(seed, np.arange(20))
    return _sheet(images, [[triangle.CLASSES[label]] for label in labels], scale=2)


def _in_words(question: np.ndarray, answer: int) -> str:
    colours = list(sort_of_clevr.COLOURS)
    first, second = colours[question[:6].argmax()], colours[question[6:12].argmax()]
    texts = (
        (f'shape of {first}?', f'{first} left?', f'{first} above?'),
        (f'shape nearest to {first}?', f'shape farthest from {first}?', f'others shaped like {first}?'),
        (f'between {first}, {second}?', f'on line {first}, {second}?', f'obtuse with {first}, {second}?'),
    )
    return f'{texts[question[12:15].argmax()][question[15:].argmax()]} {sort_of_clevr.ANSWERS[answer]}'


def _sort_of_clevr_sheet(seed: int) -> Image.Image:
    indices = np.arange(10)
    objects = sort_of_clevr.scenes(seed, indices)
    questions, answers = sort_of_clevr.ask(seed, indices, objects)
    asked = np.concatenate([kind * sort_of_clevr.QUESTIONS_PER_KIND + np.arange(4) for kind in range(3)])
    captions = [[_in_words(questions[i, j], answers[i, j]) for j in asked] for i in indices]
    return _sheet(sort_of_clevr.draw(objects), captions, scale=4)


_DATA_SETS = {
    'triangle': (triangle, triangle.write_triangle, _triangle_sheet),
    'sort-of-clevr': (sort_of_clevr, sort_of_clevr.write_sort_of_clevr, _sort_of_clevr_sheet),
}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'data',
        help='write a synthetic data set, Triangle or Sort-of-CLEVR',
        description="Write a synthetic data set. Triangle is an ImageFolder, as timm's train.py takes it; "
                    'Sort-of-CLEVR is read by timm_ait.data.SortOfClevr. The same seed gives the same files.',
    )
    parser.add_argument('dataset', choices=_DATA_SETS, help='data set to write')
    parser.add_argument('--out', required=True, type=Path, metavar='FOLDER', help='folder to write')
    parser.add_argument('--seed', type=integer(0), default=0, metavar='N', help='seed (default: %(default)s)')
    parser.add_argument('--train', type=integer(1), metavar='N', help='training images (default: 50000 or 9800)')
    parser.add_argument('--validation', type=integer(1), metavar='N',
                        help='validation images (default: 10000 or 200)')
    parser.add_argument('--sheet', type=sheet_file, metavar='FILE',
                        help='also write a contact sheet of the first samples, .png or .jpg')
    parser.add_argument('--force', action='store_true', help='replace an existing data set')
    parser.set_defaults(main=functools.partial(_main, parser))


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    module, write, sheet = _DATA_SETS[args.dataset]
    num_train, num_validation = args.train or module.NUM_TRAIN, args.validation or module.NUM_VALIDATION
    if args.out.exists():
        if not args.force:
            parser.error(f'--out: {args.out} exists; choose another folder, or --force to replace it')
        if not (args.out / _MARKER).is_file():
            parser.error(f'--out: {args.out} was not written by this command, so --force does not replace it')
    about = {'dataset': args.dataset, 'seed': args.seed, 'train': num_train, 'validation': num_validation}
    try:
        with _new_folder(args.out) as folder:
            write(folder, args.seed, num_train, num_validation)
            (folder / _MARKER).write_text(json.dumps(about, indent=2) + '\n')
        print(f'{args.out}: {num_train} training and {num_validation} validation images')
        if args.sheet:
            save_sheet(sheet(args.seed), args.sheet)
    except ValueError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f'--out {args.out} cannot be written ({one_line(e)})')
    return 0
