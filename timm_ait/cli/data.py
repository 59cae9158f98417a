""" Write a synthetic data set: python -m timm_ait data triangle|sort-of-clevr --out FOLDER. """
import argparse

from timm_ait.data import sort_of_clevr, triangle

from . import integer, output_folder, quietly, staged

_DATA_SETS = {
    'triangle': (triangle, triangle.write_triangle),
    'sort-of-clevr': (sort_of_clevr, sort_of_clevr.write_sort_of_clevr),
}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'data',
        help='write a synthetic data set, Triangle or Sort-of-CLEVR',
        description="Write a synthetic data set. Triangle is an ImageFolder, as timm's train.py takes it; "
                    'Sort-of-CLEVR is read by timm_ait.data.SortOfClevr. The same seed gives the same files.',
    )
    parser.add_argument('dataset', choices=_DATA_SETS, help='data set to write')
    parser.add_argument('--out', required=True, type=output_folder, metavar='FOLDER', help='new folder to write')
    parser.add_argument('--seed', type=integer(0), default=0, metavar='N', help='seed (default: %(default)s)')
    parser.add_argument('--train', type=integer(1), metavar='N', help='training images (default: 50000 or 9800)')
    parser.add_argument('--validation', type=integer(1), metavar='N', help='validation images (default: 10000 or 200)')
    parser.set_defaults(main=lambda args: quietly(_main, parser, args))


def _main(args: argparse.Namespace) -> int:
    module, write = _DATA_SETS[args.dataset]
    num_train, num_validation = args.train or module.NUM_TRAIN, args.validation or module.NUM_VALIDATION
    if args.out.exists() or args.out.is_symlink():
        raise ValueError(f'--out: {args.out} exists; choose another folder, or remove it')
    with staged(args.out) as folder:
        write(folder, args.seed, num_train, num_validation)
    print(f'{args.out}: {num_train} training and {num_validation} validation images')
    return 0
