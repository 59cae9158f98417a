""" The command: one run after another, each kept when it is finished. """
import argparse
import dataclasses
import json
from pathlib import Path
from typing import List, Optional

import torch

from benchmarks.compare.training import write_text

from . import __doc__ as description
from .bodies import BODIES, HEAD_DIM, MLPS
from .data import DATASETS, load_splits, locked
from .report import report
from .training import Recipe, Trainer


def _parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.paper', description=description.split('\n\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-dir', help='folder of the data set')
    parser.add_argument('--output', required=True, type=Path, help='folder of the results')
    parser.add_argument('--body', nargs='+', choices=BODIES, default=['ait'])
    parser.add_argument('--mlp', nargs='+', choices=MLPS, default=['published'])
    parser.add_argument('--seed', nargs='+', type=int, default=[0])
    recipe = Recipe()
    parser.add_argument('--dataset', choices=DATASETS, default=recipe.dataset)
    parser.add_argument('--dim', type=int, default=recipe.dim, help=f'token width, a multiple of {HEAD_DIM}')
    parser.add_argument('--epochs', type=int, default=recipe.epochs)
    parser.add_argument('--warmup-epochs', type=int, default=recipe.warmup_epochs)
    parser.add_argument('--batch-size', type=int, default=recipe.batch_size)
    parser.add_argument('--lr', type=float, default=recipe.lr)
    parser.add_argument('--weight-decay', type=float, default=recipe.weight_decay)
    parser.add_argument('--eval-every', type=int, default=5, metavar='EPOCHS')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--compile', action='store_true', help='compile the models')
    parser.add_argument('--graph', action='store_true', help='capture the steps in a CUDA graph, for small models')
    parser.add_argument('--cache', type=Path, metavar='FILE', help='keep the decoded images for further processes')
    parser.add_argument('--lock', type=Path, metavar='FILE',
                        help='train only while no other process does that was given the same file')
    parser.add_argument('--warm', action='store_true', help='compile, run a few steps, and leave no result')
    parser.add_argument('--report', action='store_true', help='write tables and a figure of all results in --output')
    args = parser.parse_args(argv)

    if not args.report and args.data_dir is None:
        parser.error('--data-dir is needed, except for --report')
    if args.dim < HEAD_DIM or args.dim % HEAD_DIM:
        parser.error(f'--dim: {args.dim} is not a multiple of {HEAD_DIM}')
    for name in ('epochs', 'batch_size', 'eval_every'):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} is below 1")
    if args.warmup_epochs < 0:
        parser.error(f'--warmup-epochs: {args.warmup_epochs} is below 0')
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device)
    except (AssertionError, NotImplementedError, RuntimeError) as e:
        parser.error(f'--device: {str(e).splitlines()[0]}')
    if args.graph and args.device.type != 'cuda':
        parser.error(f'--graph: {args.device} has no CUDA graphs')
    if args.report and not any(args.output.glob('*.json')):
        parser.error(f'--output: there are no results in {args.output}')
    args.recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})

    args.todo = {}
    for body in args.body:
        for mlp in args.mlp:
            files = {seed: args.output / f'{_name(args.recipe, body, mlp)}_seed{seed}.json' for seed in args.seed}
            for file in files.values():
                if file.is_file() and json.loads(file.read_text())['recipe'] != dataclasses.asdict(args.recipe):
                    parser.error(f'--output: {file} was trained with another recipe; choose another folder')
            files = {seed: file for seed, file in files.items() if not file.is_file()}
            if files:
                args.todo[body, mlp] = files
    if args.report:
        return args
    try:
        args.splits = load_splits(args.dataset, args.data_dir, args.cache, args.device) if args.todo else None
    except (OSError, ValueError) as e:
        parser.error(f'--data-dir: {e}')
    for split, name in zip(args.splits or (), ('train', 'validation')):
        if len(split) < args.batch_size:
            parser.error(f'--batch-size: {args.batch_size} is more than the {len(split)} items of {name}')
    return args


def _name(recipe: Recipe, body: str, mlp: str) -> str:
    return f'{recipe.dataset}_{recipe.dim}_{recipe.epochs}epochs_{body}_{mlp}'


def main(argv: Optional[List[str]] = None) -> None:
    args = _parse(argv)
    if args.report:
        report(args.output)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    for (body, mlp), files in args.todo.items():
        torch.compiler.reset()  # or the number of graphs of all models together reaches a limit
        trainer = Trainer(args.recipe, body, mlp, *args.splits, compiled=args.compile, graph=args.graph)
        if args.compile or args.graph or args.warm:
            rate = trainer.warm_up()
            print(f'{body} {mlp}: ready, {rate:.0f} images/s in a few steps', flush=True)
        if args.warm:
            continue
        for seed, file in files.items():
            with locked(args.lock):
                result = trainer.run(seed, args.eval_every)
            device = torch.cuda.get_device_name() if args.device.type == 'cuda' else args.device.type
            write_text(file, json.dumps(dict(
                recipe=dataclasses.asdict(args.recipe),
                body=body,
                mlp=mlp,
                seed=seed,
                device=device,
                torch=torch.__version__,
                compile=args.compile,
                **result,
            ), indent=2))


if __name__ == '__main__':
    main()
