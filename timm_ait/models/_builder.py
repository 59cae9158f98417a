""" What the families share: configuration, construction, and what of a ViT they do not support. """
import inspect
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Tuple, Type

import torch
import torch.nn as nn

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, get_arch_pretrained_cfgs, get_pretrained_cfg, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from timm_ait.layers._arguments import check_at_least, check_known
from timm_ait.weights import HUB_USER, check_weights, weights_dir

_NO_ATTENTION = 'some blocks of this model have no self-attention'
CIFAR_ARGS = dict(img_size=32, patch_size=4, class_token=False, global_pool='avg')


def cifar_cfg(**kwargs) -> Dict[str, Any]:
    """Pretrained cfg of a model, by default for 32 px images and 10 classes."""
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'crop_pct': 1.0,
        'fixed_input_size': True,
        'mean': IMAGENET_INCEPTION_MEAN,
        'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


def build_vit(
        model_cls: Type[VisionTransformer],
        question_cls: Type[VisionTransformer],
        filter_fn: Callable,
        variant: str,
        pretrained: bool = False,
        question_dim: int = 0,
        **kwargs,
) -> VisionTransformer:
    """Build a registered model, with `question_dim` that which takes questions of this width.

    Its checkpoint filter rejects weights of another architecture.
    """
    check_at_least(0, question_dim=question_dim)
    if question_dim:
        if kwargs.get('features_only'):
            raise ValueError('features_only takes no question: call forward_intermediates(x, question=question).')
        model_cls, kwargs['question_dim'] = question_cls, question_dim
    overlay, given = kwargs.get('pretrained_cfg_overlay') or {}, kwargs.get('pretrained_cfg')
    cfg = resolve_pretrained_cfg(variant, given, overlay)
    if (cfg.num_classes or 0) < 0:  # from train.py with --pretrained-path: as many as without it
        own = resolve_pretrained_cfg(variant, given)
        if (own.num_classes or 0) < 0:  # newer scripts have merged the overlay into it
            own = get_arch_pretrained_cfgs(variant).get(f'{variant}.{cfg.tag}') or get_pretrained_cfg(variant)
        kwargs.setdefault('num_classes', own.num_classes or 1000)
    folder = Path(cfg.file or '').parent
    is_elsewhere = cfg.url or cfg.hf_hub_filename or cfg.hf_hub_id not in (None, '', f'{HUB_USER}/{folder.name}')
    shipped = weights_dir() / f'{variant}.{cfg.tag or folder.name.partition(".")[2]}'
    if is_elsewhere and not cfg.source and folder == shipped:  # whose file timm would prefer
        kwargs['pretrained_cfg_overlay'] = {**overlay, 'file': None}
    try:
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=check_weights(filter_fn) if kwargs.get('pretrained_strict', True) else filter_fn,
            feature_cfg=dict(out_indices=kwargs.pop('out_indices', min(3, kwargs['depth'])), feature_cls='getter'),
            **kwargs,
        )
    except OSError as e:
        hub_id = cfg.hf_hub_id or ''
        if cfg.source or cfg.file or cfg.url or cfg.state_dict or not hub_id.startswith(f'{HUB_USER}/'):
            raise
        name = hub_id.partition('/')[2]
        raise RuntimeError(
            f'The weights of {name} are not part of this installation. They are in a source checkout of timm_ait, in '
            f"weights/{name}: load them with create_model('local-dir:<checkout>/weights/{name}', pretrained=True). "
            f'They cannot be downloaded from {hub_id} on the Hugging Face Hub: {e}') from e


def reject_arguments(
        model: VisionTransformer,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
        reason: str,
        also: Iterable[str] = (),
        **supported,
) -> Dict[str, Any]:
    """Arguments of a model by name, without those that may only have one value.

    Args:
        model: The model under construction, whose classes have the arguments.
        args, kwargs: Its arguments, positional ones in the order of `VisionTransformer`.
        reason: Why other values are not supported.
        also: Further arguments that the model takes.
        **supported: The value of each such argument.

    Raises:
        TypeError: An argument is unknown, or given twice.
        ValueError: One of `supported` has another value.
    """
    positional = inspect.signature(VisionTransformer).bind_partial(*args).arguments
    for name in positional.keys() & kwargs.keys() - {'class_token'}:
        raise TypeError(f'{name} is given twice, by position and by name.')
    kwargs = {**positional, **kwargs}
    classes = [cls for cls in type(model).__mro__ if issubclass(cls, VisionTransformer)]
    known = {name for cls in classes for name in inspect.signature(cls).parameters}
    check_known(kwargs, {*known, *also} - {'args', 'kwargs'}, f'{classes[0].__module__}.{classes[0].__name__}')
    for name, value in supported.items():
        given = kwargs.pop(name, value)
        if given != value and (given or value):  # None, 0 and False are all off
            raise ValueError(f'{name}={given!r} is not supported: {reason}.')
    return kwargs


def reject_jax(model: nn.Module, *args, **kwargs) -> None:
    """In place of `load_pretrained`, where a ViT's JAX weights lack some of the model's: raise a ValueError."""
    raise ValueError(f'{type(model).__name__} cannot load JAX weights (.npz), which lack some of its parameters.')


def reject_masks(attn_mask: Optional[torch.Tensor], is_causal: bool, reason: str = _NO_ATTENTION) -> None:
    """Raise a ValueError if there is a mask."""
    # in symbolic tracing both are proxies of unknown value
    if isinstance(attn_mask, torch.Tensor) or is_causal is True:
        name = 'attn_mask' if isinstance(attn_mask, torch.Tensor) else 'is_causal'
        raise ValueError(f'{name} is not supported: {reason}.')


class MasklessBlock(nn.Module):
    """Base of blocks without self-attention: what a ViT calls, with an error if there is a mask."""

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """`update` of the tokens x (B, N, E); a mask raises a ValueError."""
        reject_masks(attn_mask, is_causal)
        return self.update(x)
