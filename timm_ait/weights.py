""" Location of the shipped checkpoints, and checks of weights before timm loads them. """
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
import torch.nn as nn

HUB_USER = 'timm-ait'


def weights_dir() -> Path:
    """Folder of the shipped checkpoints: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / 'checkpoints'
    return installed if installed.is_dir() else package.parent / 'weights'


def shipped_cfg(name: str) -> Dict[str, Any]:
    """Pretrained cfg entries of a checkpoint `<arch>.<tag>`: what its config.json says, and where its weights are.

    Weights that are not part of the installation are on the Hub.
    """
    folder = weights_dir() / name
    cfg: Dict[str, Any] = {}
    if (folder / 'config.json').is_file():
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        cfg = {**config['pretrained_cfg'], **{key: config[key] for key in ('num_classes', 'label_names')}}
        cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    cfg['hf_hub_id'] = f'{HUB_USER}/{name}'
    if (folder / 'model.safetensors').is_file():
        cfg['file'] = str(folder / 'model.safetensors')
    return cfg


def _check_fit(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Compare keys, shapes and dtypes before anything is loaded.

    timm adapts the first convolution to other channels and the classifier to other classes, so these may differ. With
    another number of classes, pooling and norms before the classifier may be missing; those of another shape are
    removed here, the classifier by timm.

    Raises:
        RuntimeError: The weights do not match the model.
    """
    def names(entry: Any) -> List[str]:
        return [entry] if isinstance(entry, str) else list(entry or ())

    cfg = getattr(model, 'pretrained_cfg', None) or {}
    adapted = ()
    if getattr(model, 'num_classes', None) != cfg.get('num_classes') or cfg.get('label_offset'):
        adapted = tuple(f'{name}.' for name in [*names(cfg.get('classifier')), 'norm', 'fc_norm', 'attn_pool'])
    classifier = [f'{name}.{part}' for name in names(cfg.get('classifier')) for part in ('weight', 'bias')]
    first_convs = [f'{name}.weight' for name in names(cfg.get('first_conv'))]

    expected = model.state_dict()
    other_shape = [
        key for key, value in expected.items()
        if key in state_dict and key not in first_convs and state_dict[key].shape != value.shape]
    problems = {
        'missing keys': [key for key in expected if key not in state_dict and not key.startswith(adapted)],
        'unexpected keys': [key for key in state_dict if key not in expected and not key.startswith(adapted)],
        'another shape': [
            f'{key} {tuple(state_dict[key].shape)} instead of {tuple(expected[key].shape)}' for key in other_shape
            if not key.startswith(adapted)],
        # PyTorch would convert even complex numbers
        'not floating point': [
            f'{key} {value.dtype}' for key, value in state_dict.items()
            if key in expected and expected[key].is_floating_point() and not value.is_floating_point()],
    }
    if any(problems.values()):
        raise RuntimeError('; '.join(
            f'{problem}: {", ".join(items[:3])}' + (f' and {len(items) - 3} more' if len(items) > 3 else '')
            for problem, items in problems.items() if items))
    return {key: value for key, value in state_dict.items() if key not in other_shape or key in classifier}


def check_weights(filter_fn: Callable) -> Callable:
    """Make a checkpoint filter reject weights of another width or depth.

    With another number of classes, timm would load only the weights that fit, without an error.
    """
    def checked(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        try:
            return _check_fit(filter_fn(state_dict, model), model)
        except Exception as e:  # filters are written for the model's own weights, others may break them anywhere
            raise RuntimeError(
                f'The weights do not match this {type(model).__name__} (another width, depth, global_pool or '
                f'question_dim?), nothing was loaded: {e if isinstance(e, RuntimeError) else repr(e)}. Create the '
                'matching architecture, with the arguments of the checkpoint, or use pretrained=False.') from e

    return checked
