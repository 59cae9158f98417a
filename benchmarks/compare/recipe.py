""" Recipes: YAML files that say which models are trained on what, and how.

A recipe has the key `runs`, {label: {model: NAME, ARGUMENT: VALUE, …}, …}, and any of the options that
`python -m benchmarks.compare RECIPE --help` lists, with underscores for hyphens. An option on the command line replaces
the recipe's. A run may also have

    seeds: in place of the recipe's
    blocks: numbers of the blocks that get gated workspaces
    workspace_kwargs: arguments of these workspaces
    gate_lr: a learning rate of the workspaces' gates
"""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Sequence

import yaml

from timm_ait.cli import integer
from timm_ait.data.sort_of_clevr import IMAGE_SIZE, KINDS

Recipe = Dict[str, Any]


def _flag(text: str) -> bool:
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'must be true or false, got {text!r}')
    return text.lower() == 'true'


def _mapping(text: str) -> Dict[str, Any]:
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a mapping, such as {{depth: 2}}, got {text!r}')
    return value


class _Parser(argparse.ArgumentParser):

    def error(self, message: str) -> None:
        raise ValueError(message)


def create_recipe_parser() -> argparse.ArgumentParser:
    """Parser of a recipe's options; it raises a ValueError where others exit."""
    parser = _Parser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group('options that a recipe may have')
    add = group.add_argument
    add('--dataset', choices=('image_folder', 'sort_of_clevr'), required=True,
        help='train/<class>/*, validation/<class>/*, or what `python -m timm_ait data sort-of-clevr` writes')
    add('--image-size', type=integer(1), required=True, help='pixels; images are scaled to it')
    add('--in-chans', type=int, choices=(1, 3), default=3)
    add('--mean', nargs='+', type=float, default=[0.5], help='what pixels in [0, 1] are normalised with; per channel')
    add('--std', nargs='+', type=float, default=[0.5])
    add('--kinds', nargs='+', choices=KINDS, default=list(KINDS), help='which questions of Sort-of-CLEVR')
    add('--model-kwargs', type=_mapping, default={}, help="of every run's model; a run takes one back with null")
    add('--conv-stem', nargs='+', type=integer(1), metavar='CHANNELS',
        help='convolutions of stride 2 that embed the patches of every model, in place of linear patches')
    add('--steps', type=integer(1), default=1000)
    add('--all-patches-from', type=integer(1), metavar='STEP', help='from which the patch_drop_rate is zero')
    add('--batch-size', type=integer(1), default=128)
    add('--opt', default='adamw')
    add('--opt-kwargs', type=_mapping, default={})
    add('--lr', type=float, default=1e-3)
    add('--layer-decay', type=float)
    add('--weight-decay', type=float, default=0.05)
    add('--warmup-steps', type=int, default=100)
    add('--clip-grad', type=float, default=1., help='norm of the gradients, 0 for no limit')
    add('--amp-dtype', choices=('bfloat16', 'float32'), default='bfloat16')
    add('--seeds', nargs='+', type=int, default=[0])
    add('--eval-every', type=integer(1), default=250, help='steps from one evaluation, and checkpoint, to the next')
    for flip in ('hflip', 'vflip', 'transpose'):
        add(f'--{flip}', type=_flag, default=False, help='flip images at random')
    add('--crop-padding', type=int, default=0, help='shift images by up to as many pixels')
    add('--padding-mode', choices=('reflect', 'constant'), default='reflect', help='constant: black')
    add('--place', type=_flag, default=False, help='move what stands on a black ground to a random place, whole')
    return parser


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: Options of the command line; --seeds also in place of the runs' own.

    Returns:
        The recipe with all options by name, and `runs`, each with seeds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, an option is missing or unknown, or has a wrong value.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(recipe, dict) or not isinstance(recipe.get('runs'), dict) or not recipe['runs']:
        raise ValueError(f'{path}: it must be a mapping with the key runs, {{label: {{model: NAME}}}}')
    runs = recipe.pop('runs')
    arguments: List[str] = []
    for key, value in recipe.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments.append(f"--{str(key).replace('_', '-')}")
            arguments += [yaml.safe_dump(x) if isinstance(x, dict) else str(x) for x in values]
    try:
        recipe = {**vars(create_recipe_parser().parse_args([*arguments, *overrides])), 'runs': runs}
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from e
    if recipe['dataset'] == 'sort_of_clevr' and (recipe['image_size'], recipe['in_chans']) != (IMAGE_SIZE, 3):
        raise ValueError(f'{path}: image_size must be {IMAGE_SIZE} and in_chans 3, those of sort_of_clevr')
    moves = [key for key in ('hflip', 'vflip', 'transpose', 'crop_padding', 'place') if recipe[key]]
    if recipe['dataset'] == 'sort_of_clevr' and moves:
        raise ValueError(f'{path}: {moves} would change the answers to the questions of sort_of_clevr')
    for key in ('mean', 'std'):
        if len(recipe[key]) not in (1, recipe['in_chans']):
            raise ValueError(f"{path}: {key} must be one number, or one for each of {recipe['in_chans']} channels")
    for label, run in runs.items():
        if not isinstance(label, str) or label != Path(label).name or label == '..':
            raise ValueError(f'{path}: run {label!r} names a folder of the output; it must be text without a slash')
        if not isinstance(run, dict) or 'model' not in run:
            raise ValueError(f'{path}: run {label!r} must be a mapping with the key model, got {run!r}')
        if any(override.partition('=')[0] == '--seeds' for override in overrides) or 'seeds' not in run:
            run['seeds'] = recipe['seeds']
        seeds = run['seeds']
        if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)) or (
                len(set(seeds)) != len(seeds)):
            raise ValueError(f'{path}: seeds of run {label!r} must be a list of different integers, got {seeds!r}')
    return recipe


def run_settings(recipe: Recipe, run: Dict[str, Any]) -> Dict[str, Any]:
    """What the result of a run depends on, besides its seed."""
    settings = {key: value for key, value in recipe.items() if key not in ('runs', 'seeds')}
    return {**settings, 'run': {key: value for key, value in run.items() if key != 'seeds'}}
