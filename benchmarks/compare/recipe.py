""" Recipes: which models are trained on what, and how.

A recipe is a YAML file with these keys; all but the first three have defaults.
    dataset: image_folder (train/<class>/*, validation/<class>/*) or sort_of_clevr (of `python -m timm_ait data`)
    image_size: pixels; images are scaled to it
    runs: {label: {model: NAME, ARGUMENT: VALUE, …}, …}; a run may also have seeds of its own, blocks, the numbers
        of the blocks that get gated workspaces, and gate_lr, a learning rate of the workspaces' gates
    in_chans: channels of the images, 1 or 3
    mean, std: what pixels in [0, 1] are normalised with
    kinds: which of Sort-of-CLEVR's questions, all by default
    model_kwargs: arguments of every run's model, which a run may take back with null
    conv_stem: channels of convolutions of stride 2 that embed the patches of every model, in place of linear patches
    steps, batch_size, opt, opt_kwargs, lr, layer_decay, weight_decay, warmup_steps, clip_grad, amp_dtype, seeds
    eval_every: steps from one evaluation, and checkpoint, to the next
    all_patches_from: step from which the patch_drop_rate of the models is zero
    hflip, vflip, transpose: flip images at random; crop_padding: shift them by up to as many pixels
    place: move what stands on a black ground to a random place of the image, whole
"""
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import timm
import yaml
from timm.optim import list_optimizers

from timm_ait.data.sort_of_clevr import IMAGE_SIZE, KINDS

__all__ = ['Recipe', 'read_recipe', 'run_settings']

Recipe = Dict[str, Any]


class _Key(NamedTuple):
    check: Callable[[Any], bool]
    wanted: str
    default: Any = None
    required: bool = False


def _integer(minimum: int, default: Any, **kwargs) -> _Key:
    return _Key(lambda x: type(x) is int and x >= minimum, f'an integer of {minimum} or more', default, **kwargs)


def _number(default: float, zero: bool = False) -> _Key:
    wanted = f"a number{' of 0 or more' if zero else ' above 0'}, such as 1.0e-3"  # YAML reads 1e-3 as a text
    return _Key(lambda x: type(x) in (int, float) and (x > 0 or zero and x == 0), wanted, default)


def _flag() -> _Key:
    return _Key(lambda x: type(x) is bool, 'true or false', False)


def _choice(*values: Any, default: Any = None, **kwargs) -> _Key:
    return _Key(lambda x: type(x) in (int, str) and x in values, f"one of {', '.join(map(str, values))}", default,
                **kwargs)


def _are_integers(values: Any, minimum: int) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(type(x) is int and x >= minimum for x in values)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


_RATE = _number(1e-3)
_SEEDS = _Key(lambda x: _are_integers(x, 0) and len(set(x)) == len(x), 'a list of different integers', [0])
_KEYS = {
    'dataset': _choice('image_folder', 'sort_of_clevr', required=True),
    'image_size': _integer(1, None, required=True),
    'runs': _Key(lambda x: _is_mapping(x) and len(x) > 0, 'a mapping of labels to models', required=True),
    'in_chans': _choice(1, 3, default=3),
    'mean': _number(0.5, zero=True),
    'std': _number(0.5),
    'kinds': _Key(lambda x: isinstance(x, list) and len(x) > 0 and all(kind in KINDS for kind in x),
                  f"a list out of {', '.join(KINDS)}", list(KINDS)),
    'model_kwargs': _Key(_is_mapping, "a mapping of models' arguments", {}),
    'conv_stem': _Key(lambda x: x is None or _are_integers(x, 1), 'a list of numbers of channels'),
    'steps': _integer(1, 1000),
    'all_patches_from': _Key(lambda x: x is None or type(x) is int and x > 0, 'an integer of 1 or more'),
    'batch_size': _integer(1, 128),
    'opt': _Key(lambda x: isinstance(x, str) and x in list_optimizers(), "one of timm's optimizers", 'adamw'),
    'opt_kwargs': _Key(_is_mapping, "a mapping of the optimizer's arguments", {}),
    'lr': _RATE,
    'layer_decay': _Key(lambda x: x is None or type(x) in (int, float) and 0 < x <= 1, 'a number above 0, at most 1'),
    'weight_decay': _number(0.05, zero=True),
    'warmup_steps': _integer(0, 100),
    'clip_grad': _number(1.),
    'amp_dtype': _choice('bfloat16', 'float32', default='bfloat16'),
    'seeds': _SEEDS,
    'eval_every': _integer(1, 250),
    'hflip': _flag(),
    'vflip': _flag(),
    'transpose': _flag(),
    'crop_padding': _integer(0, 0),
    'place': _flag(),
}


def read_recipe(path: Path, changes: Recipe) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        changes: Values in place of the file's; seeds also in place of the runs' own.

    Returns:
        The recipe with all keys, and with seeds in every run.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, a key is missing or unknown, or a value is none of those the key takes.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not _is_mapping(recipe):
        raise ValueError(f'{path} is not a recipe, a mapping with the keys {", ".join(_KEYS)}')
    unknown = [key for key in recipe if key not in _KEYS]
    missing = [key for key, rule in _KEYS.items() if rule.required and key not in recipe]
    if unknown or missing:
        raise ValueError(f'{path}: unknown keys {unknown}, missing keys {missing}; known are {", ".join(_KEYS)}')
    recipe = {**{key: rule.default for key, rule in _KEYS.items()}, **recipe, **changes}
    for key, rule in _KEYS.items():
        if not rule.check(recipe[key]):
            raise ValueError(f'{path}: {key} must be {rule.wanted}, got {recipe[key]!r}')
    if recipe['dataset'] == 'sort_of_clevr' and (recipe['image_size'], recipe['in_chans']) != (IMAGE_SIZE, 3):
        raise ValueError(f'{path}: image_size must be {IMAGE_SIZE} and in_chans 3, those of sort_of_clevr')
    for label, run in recipe['runs'].items():
        if label != Path(label).name or label == '..':
            raise ValueError(f'{path}: run {label!r} names a folder of the output; it must have no slash')
        if not _is_mapping(run) or not isinstance(run.get('model'), str):
            raise ValueError(f'{path}: run {label!r} must be a mapping with the key model, got {run!r}')
        if not timm.is_model(run['model']):
            raise ValueError(f"{path}: run {label!r} has the model {run['model']!r}, which is not registered")
        run['seeds'] = changes.get('seeds') or run.get('seeds', recipe['seeds'])
        if not _SEEDS.check(run['seeds']):
            raise ValueError(f"{path}: seeds of run {label!r} must be {_SEEDS.wanted}, got {run['seeds']!r}")
        if 'gate_lr' in run and not _RATE.check(run['gate_lr']):
            raise ValueError(f"{path}: gate_lr of run {label!r} must be {_RATE.wanted}, got {run['gate_lr']!r}")
    return recipe


def run_settings(recipe: Recipe, run: Dict[str, Any]) -> Dict[str, Any]:
    """What the result of a run depends on, besides its seed."""
    settings = {key: value for key, value in recipe.items() if key not in ('runs', 'seeds')}
    return {**settings, 'run': {key: value for key, value in run.items() if key != 'seeds'}}
