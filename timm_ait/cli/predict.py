""" Classify image files with a pretrained model: python -m timm_ait predict IMAGE … """
import argparse
import json
import math

from tqdm import tqdm

from . import blame, integer, is_same_file, quietly, staged
from .images import add_arguments, class_names, each_file, find_images, image_classifier, load_model
from .sheet import Tile, contact_sheet, fit, sheet_file

_THUMBNAIL = 160  # pixels
_MAX_TILES = 1000  # a sheet of about 6000 px square


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'predict',
        help='classify image files with a pretrained model',
        description='Classify image files with a pretrained model, turned upright by their EXIF orientation. The exit '
                    'code is 1 if some files could not be read, which are reported, and 2 if nothing could be done.',
    )
    add_arguments(parser, 'classifier')
    parser.add_argument('--topk', type=integer(1), default=5, metavar='N',
                        help='predictions per image, at most the number of classes (default: %(default)s)')
    parser.add_argument('--sheet', type=sheet_file, metavar='FILE', help='write a contact sheet, .png or .jpg')
    parser.add_argument('--json', action='store_true', help='print one JSON document')
    parser.set_defaults(main=lambda args: quietly(_main, parser, args))


def _main(args: argparse.Namespace) -> int:
    files = find_images(args.images)
    if args.sheet and len(files) > _MAX_TILES:
        raise ValueError(f'--sheet has room for {_MAX_TILES} images, got {len(files)}')
    if args.sheet and any(is_same_file(file, args.sheet) for file in files):
        raise ValueError(f'--sheet {args.sheet} is one of the images: take another file')
    model = load_model(args.model, args.device)
    with blame(f'--model {args.model}'):
        (names, descriptions), classify = class_names(model), image_classifier(model)

    images, errors, tiles = [], [], []
    for file, (image, _, probabilities) in each_file(classify, files, 'classified', errors):
        best = [x.tolist() for x in probabilities.topk(min(args.topk, len(names)))]
        predictions = [
            {'index': index, 'name': names[index], 'description': descriptions[index], 'probability': probability}
            for probability, index in zip(*best)]
        images.append({'file': str(file), 'predictions': predictions})
        classes = ['{probability:.1%} {description}'.format_map(prediction) for prediction in predictions]
        if not args.json:
            tqdm.write('  '.join([str(file), *classes]))
        if args.sheet:
            tiles.append(Tile(fit(image, _THUMBNAIL), [file.name, classes[0]]))

    if args.json:
        print(json.dumps({'model': args.model, 'images': images, 'errors': errors}, indent=2))
    if args.sheet:
        columns = math.ceil(1.1 * math.sqrt(len(tiles)))
        rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
        with staged(args.sheet.parent) as folder:
            contact_sheet(rows, _THUMBNAIL).save(folder / args.sheet.name)
    return 1 if errors else 0
