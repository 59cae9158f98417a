""" What the registries of several model files share. """
from typing import Any, Dict, Type, TypeVar

import torch.nn as nn

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import checkpoint_filter_fn

from timm_ait.weights import check_weights

__all__ = ['cifar_cfg', 'create_with_grids']

ModelT = TypeVar('ModelT', bound=nn.Module)


def cifar_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    """Pretrained cfg of a model for images of 32 px in 10 classes."""
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


def create_with_grids(model_cls: Type[ModelT], variant: str, pretrained: bool = False, **kwargs) -> ModelT:
    """timm's `build_model_with_cfg`, for models with a grid of features after each of their `depth` blocks."""
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']))
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=check_weights(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
