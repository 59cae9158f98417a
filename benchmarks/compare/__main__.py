""" The command: what is to do, checked as far as it can be before anything is written. """
import argparse
import hashlib
import importlib.util
import json
from glob import glob
from pathlib import Path
from typing import List, Optional

import torch

from ..results import report
from . import __doc__ as description
from .data import load_split
from .recipe import create_recipe_parser, read_recipe, run_settings
from .training import create_run_model, create_run_optimizer, train_run


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.compare', description=description.split('\n\n')[0], allow_abbrev=False,
        epilog=create_recipe_parser().format_help(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', type=Path, help='YAML file')
    parser.add_argument('--data-dir', required=True, help='folder of the data set')
    parser.add_argument('--output', required=True, type=Path, help='folder of the results')
    parser.add_argument('--runs', nargs='+', metavar='LABEL', help="only these of the recipe's runs")
    parser.add_argument('--device', default='cpu', help='device to train on (default: %(default)s)')
    parser.add_argument('--compile', action='store_true', help='compile the models for training')
    args, overrides = parser.parse_known_args(argv)
    try:
        recipe = read_recipe(args.recipe, overrides)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    if args.runs:
        unknown = sorted(set(args.runs) - recipe['runs'].keys())
        if unknown:
            parser.error(f"--runs: {unknown} are not in {args.recipe}; it has {sorted(recipe['runs'])}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f'--output: {args.output} is not a folder')

    data_dir = Path(args.data_dir)
    paths = [data_dir / name for name in sorted(glob('**/*', root_dir=data_dir, recursive=True))]  # also behind links
    is_inside = data_dir.resolve() in args.output.resolve().parents  # what it holds is not data
    files = [
        (path.relative_to(data_dir).as_posix(), path.stat().st_size)
        for path in paths if path.is_file() and not (is_inside and args.output.resolve() in path.resolve().parents)]
    if not files:
        parser.error(f'--data-dir: {data_dir} is no folder, or has no files')
    recipe['data'] = hashlib.sha256(repr(files).encode()).hexdigest()[:12]
    folders = {
        (label, seed): args.output / label / f'seed{seed}'
        for label, run in recipe['runs'].items() for seed in run['seeds']}
    for (label, _), folder in folders.items():
        file = folder / 'settings.json'
        if file.is_file() and json.loads(file.read_text()) != run_settings(recipe, recipe['runs'][label]):
            parser.error(f'--output: {folder} was trained with other settings; choose another folder, or delete it')
    todo = {
        (label, seed): folder for (label, seed), folder in folders.items()
        if label in (args.runs or recipe['runs']) and not (folder / 'result.json').is_file()}
    if importlib.util.find_spec('matplotlib') is None:
        parser.error("matplotlib is missing, for the learning curves: pip install '.[benchmarks]'")
    if todo:
        try:
            device = torch.device(args.device)
            torch.zeros(1, device=device)
        except (AssertionError, NotImplementedError, RuntimeError) as e:
            parser.error(f'--device {args.device}: {str(e).splitlines()[0]}')
        try:
            train, test = (
                load_split(recipe, args.data_dir, split).to(device) for split in ('train', 'validation'))
        except (OSError, ValueError) as e:
            parser.error(f'--data-dir: {e}')
        if train.class_names != test.class_names:
            parser.error(f'--data-dir: train and validation of {args.data_dir} differ in their classes')
        if len(train) < recipe['batch_size']:
            parser.error(f"batch_size: {recipe['batch_size']} is more than the {len(train)} items to train on")
        for label in dict.fromkeys(label for label, _ in todo):
            try:
                run = recipe['runs'][label]
                create_run_optimizer(recipe, run, create_run_model(recipe, run, len(train.class_names)))
            except Exception as e:  # a wrong argument is refused by whatever layer takes it
                parser.error(f'{args.recipe}: run {label!r}: {type(e).__name__}: {" ".join(str(e).split())}')
        for (label, seed), folder in todo.items():
            torch.compiler.reset()  # the graphs of all models together would reach a limit
            train_run(recipe, recipe['runs'][label], seed, folder, train, test, args.compile)
    for label in {label for (label, _), folder in folders.items() if not (folder / 'result.json').is_file()}:
        del recipe['runs'][label]
    runs = ['--runs', *recipe['runs']] if recipe['runs'].keys() < {label for label, _ in folders} else []
    report(recipe, args.output, [str(args.recipe), *runs, *overrides])


if __name__ == '__main__':
    main()
