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


def _check_fit(state_dict: Dict[str, Any], model: nn.Module) -> None:
    """Compare keys, shapes and kinds of numbers before anything is loaded.

    Left to timm is what it adapts: the first convolution to other channels, the classifier to other classes. For other
    classes it no longer minds what else is missing, which is right for the pooling and norms before the classifier.

    Raises:
        RuntimeError: They are not those of the model.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    head = _names(cfg.get('classifier'))
    if getattr(model, 'num_classes', None) != cfg.get('num_classes'):
        head += ['norm', 'fc_norm', 'attn_pool']
    head = tuple(f'{name}.' for name in head)
    first_convs = [f'{name}.weight' for name in _names(cfg.get('first_conv'))]

    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith(head)}
    found = {key: tuple(value.shape) for key, value in state_dict.items() if not key.startswith(head)}
    floating = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    problems = {
        'they lack': [key for key in expected if key not in found],
        'they have, unlike the model,': [key for key in found if key not in expected],
        'of another shape:': [
            f'{key} {found[key]} in place of {shape}' for key, shape in expected.items()
            if found.get(key, shape) != shape and key not in first_convs
        ],
        # PyTorch would convert them, complex numbers too
        'no floating point numbers:': [
            f'{key} {value.dtype}' for key, value in state_dict.items()
            if key in floating and not value.is_floating_point()
        ],
    }
    text = '; '.join(
        f'{problem} {", ".join(items[:3])}{f" and {len(items) - 3} more" if len(items) > 3 else ""}'
        for problem, items in problems.items() if items)
    if text:
        raise RuntimeError(text)


def check_weights(filter_fn: FilterFn) -> FilterFn:
    """Let a model's checkpoint filter refuse weights of another model (another width or depth).

    timm itself does not once the number of classes differs, and loads what happens to fit.
    """

    def checked(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        try:
            state_dict = filter_fn(state_dict, model)
            _check_fit(state_dict, model)
        except Exception as e:  # filters are written for the model's own weights, others may break them anywhere
            raise RuntimeError(
                f'The weights are not those of this {type(model).__name__} (another width or depth?), nothing was '
                f'loaded: {e if isinstance(e, RuntimeError) else repr(e)}. Create the model that they are of, with its '
                'arguments, or use pretrained=False.') from e
        return state_dict

    return checked
