""" Accuracy of a pretrained model on Sort-of-CLEVR, by the kind of the questions.

    python -m timm_ait data sort-of-clevr --out sort_of_clevr
    python -m benchmarks.validate_sort_of_clevr ait_tiny_hybrid_75 --data-dir sort_of_clevr
"""
import argparse
from typing import List, Optional

import torch

import timm
from timm.data import resolve_model_data_config

import timm_ait  # noqa: F401, registers the models
from timm_ait.cli import integer
from timm_ait.data.sort_of_clevr import IMAGE_SIZE, KINDS

from .compare.data import load_sort_of_clevr
from .compare.training import evaluate


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.validate_sort_of_clevr', description=__doc__.split('\n\n')[0])
    parser.add_argument('model', help='name of a model, or local-dir:FOLDER or hf-hub:NAME')
    parser.add_argument('--data-dir', required=True, help='folder written by python -m timm_ait data sort-of-clevr')
    parser.add_argument('--split', default='validation', choices=('train', 'validation'))
    parser.add_argument('--kinds', nargs='+', default=KINDS[:2], choices=KINDS, help='(default: %(default)s)')
    parser.add_argument('--batch-size', type=integer(1), default=128, metavar='N', help='(default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='(default: %(default)s)')
    args = parser.parse_args(argv)
    try:
        split = load_sort_of_clevr(args.data_dir, args.split, args.kinds)
    except OSError as e:
        parser.error(f'--data-dir: {e}')
    try:
        model = timm.create_model(args.model, pretrained=True).to(args.device)
        config = resolve_model_data_config(model)
        if config['input_size'] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"it takes images of {config['input_size']}, Sort-of-CLEVR has {IMAGE_SIZE} px")
        split.mean, split.std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
        accuracy, _ = evaluate(model, split.to(args.device), args.batch_size)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as e:
        parser.error(f'{args.model} on {args.device}: {" ".join(str(e).split())}')
    print(f'{args.model}: {len(split.images)} images, {len(split)} questions')
    for kind in args.kinds:
        print(f'{kind} {accuracy[kind]:.2f}')


if __name__ == '__main__':
    main()
