""" Configuration and construction of the models, and checks of their arguments. """
import difflib
import inspect
from typing import Any, Callable, Dict, Iterable, Optional, Tuple, Type

import torch

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer

from timm_ait.layers._arguments import check_at_least
from timm_ait.weights import check_weights, say_where_weights_are

__all__ = ['build_vit', 'cifar_cfg', 'check_arguments', 'reject_masks', 'check_known']


def cifar_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    """Pretrained cfg of a model for 32 px images and 10 classes."""
    return {
        'url': url,
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': None,
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
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
    """Build a registered model. Its checkpoint filter rejects weights of another architecture.

    Args:
        model_cls: Class of the model.
        question_cls: Class of the same model with questions.
        filter_fn: Checkpoint filter.
        variant: Name of the registered model.
        pretrained: Load pretrained weights.
        question_dim: Width Q of the question vector that `forward` takes; 0 for none.
        **kwargs: Arguments of the class and of `build_model_with_cfg`.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_at_least(0, question_dim=question_dim)
    if question_dim:
        model_cls, kwargs['question_dim'] = question_cls, question_dim
    with say_where_weights_are(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')):
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=check_weights(filter_fn),
            feature_cfg=dict(out_indices=kwargs.pop('out_indices', min(3, kwargs['depth'])), feature_cls='getter'),
            **kwargs,
        )


def check_known(kwargs: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise a TypeError that names the first unknown argument, the nearest valid one, and where all are listed."""
    for name in kwargs:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f' Did you mean {nearest[0]}?' if nearest else ''
            raise TypeError(f'Unknown argument {name!r}.{hint} The arguments are listed in help({where}).')


def check_arguments(
        model: VisionTransformer,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
        reason: str,
        also: Iterable[str] = (),
        **fixed,
) -> Dict[str, Any]:
    """Check the arguments of a ViT, and remove those that this model fixes.

    Args:
        model: The model under construction.
        args: Positional arguments, in the order of `VisionTransformer`.
        kwargs: Keyword arguments.
        reason: Why some arguments are fixed.
        also: Further valid names, beside the arguments of the model's classes.
        **fixed: The only supported value of each fixed argument.

    Returns:
        The other arguments, by name.

    Raises:
        TypeError: An argument is unknown.
        ValueError: A fixed argument has another value.
    """
    kwargs = {**inspect.signature(VisionTransformer).bind_partial(*args).arguments, **kwargs}
    classes = [cls for cls in type(model).__mro__ if issubclass(cls, VisionTransformer)]
    known = {name for cls in classes for name in inspect.signature(cls).parameters}
    check_known(kwargs, {*known, *also} - {'args', 'kwargs'}, f'{classes[0].__module__}.{classes[0].__name__}')
    for name, value in fixed.items():
        given = kwargs.pop(name, value)
        if given != value and (given or value):  # None, 0 and False are all off
            raise ValueError(f'{name}={given!r} is not supported: {reason}.')
    return kwargs


def reject_masks(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    """Reject masks in a block without self-attention.

    Raises:
        ValueError: A mask is given.
    """
    # in symbolic tracing both are proxies of unknown value
    if isinstance(attn_mask, torch.Tensor) or (isinstance(is_causal, bool) and is_causal):
        raise ValueError('attn_mask and is_causal are not supported: some blocks of this model have no self-attention.')
