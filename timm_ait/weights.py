""" Where the shipped checkpoints are, and whether a checkpoint is that of a model. timm's loader does the rest. """
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
import torch.nn as nn

__all__ = ['check_weights', 'shipped_weights', 'weights_dir']

_HUB_USER = 'timm-ait'

FilterFn = Callable[[Dict[str, torch.Tensor], nn.Module], Dict[str, torch.Tensor]]


def weights_dir() -> Path:
    """Folder of the shipped checkpoints: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / 'checkpoints'
    return installed if installed.is_dir() else package.parent / 'weights'


def shipped_weights(name: str) -> Dict[str, str]:
    """Pretrained cfg entries of a checkpoint `<arch>.<tag>`: the shipped file where there is one, else the Hub."""
    file = weights_dir() / name / 'model.safetensors'
    source = {'hf_hub_id': f'{_HUB_USER}/{name}'}
    if file.is_file():
        source['file'] = str(file)
    return source


def _names(entry: Any) -> List[str]:
    return [entry] if isinstance(entry, str) else list(entry or ())


def _list(items: List[str]) -> str:
    return ', '.join(items[:3]) + (f' and {len(items) - 3} more' if len(items) > 3 else '')


def _check_fit(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Compare keys, shapes and dtypes before anything is loaded.

    Left to timm is what it adapts: the first convolution to other channels, the classifier to other classes. For other
    classes it ignores what else is missing, which is right for the pooling and norms ahead of the classifier; those of
    another shape are left out here.

    Raises:
        RuntimeError: They are not those of the model.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if getattr(model, 'num_classes', None) != cfg.get('num_classes') or cfg.get('label_offset'):
        adapted = tuple(f'{name}.' for name in [*_names(cfg.get('classifier')), 'norm', 'fc_norm', 'attn_pool'])
    else:
        adapted = ()
    first_convs = [f'{name}.weight' for name in _names(cfg.get('first_conv'))]

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
        # PyTorch would convert them, complex numbers too
        'not floating point': [
            f'{key} {value.dtype}' for key, value in state_dict.items()
            if key in expected and expected[key].is_floating_point() and not value.is_floating_point()],
    }
    text = '; '.join(f'{problem}: {_list(items)}' for problem, items in problems.items() if items)
    if text:
        raise RuntimeError(text)
    return {key: value for key, value in state_dict.items() if key not in other_shape}


def check_weights(filter_fn: FilterFn) -> FilterFn:
    """Let a model's checkpoint filter refuse weights of another model (another width or depth).

    timm itself does not once the number of classes differs, and loads what happens to fit.
    """

    def checked(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        try:
            return _check_fit(filter_fn(state_dict, model), model)
        except Exception as e:  # filters are written for the model's own weights, others may break them anywhere
            raise RuntimeError(
                f'The weights do not match this {type(model).__name__} (another width or depth?), nothing was loaded: '
                f'{e if isinstance(e, RuntimeError) else repr(e)}. Create the matching architecture, with the '
                'arguments of the checkpoint, or use pretrained=False.') from e

    return checked
