""" Associative Transformer (AiT)

A vision transformer whose MLPs end in a global workspace: tokens of the whole batch compete to write into a small
memory, and every token reads from it by Hopfield retrieval.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
    Yuwei Sun, Hideya Ochiai, Zhirong Wu, Stephen Lin, Ryota Kanai. CVPR 2025.

Parameters without the classifier, against the paper's: small 15.1M (15.8M), medium 45.2M (45.9M), base 90.4M (91.0M).
Most of the difference is the published classifier, a LayerNorm and a linear layer over all 64 tokens flattened (0.6M),
in place of which these models have timm's pooling.
"""
from functools import partial
from typing import Optional, Type

import torch
import torch.nn as nn

from timm.layers import HybridEmbed, Mlp
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem

from timm_ait.data.sort_of_clevr import ANSWERS, QUESTION_DIM
from timm_ait.data.triangle import CLASSES as TRIANGLE_CLASSES
from timm_ait.layers import GlobalWorkspace, WorkspaceMlp
from timm_ait.layers._arguments import split_kwargs
from timm_ait.weights import shipped_weights

from ._question import QuestionViT, build_vit, cifar_cfg, refuse_arguments, refuse_masks

__all__ = ['AssociativeTransformer']


@torch.fx.wrap
@register_notrace_function
def attended_tokens(attn_mask: Optional[torch.Tensor], batch_size: int) -> Optional[torch.Tensor]:
    """Tokens (B, N) that some token may attend to, None for all.

    Args:
        attn_mask: Boolean or additive mask that broadcasts to (B, heads, N, N).
        batch_size: Number of images B.
    """
    if attn_mask is None:
        return None
    # what the softmax makes of -inf, of the dtype's lowest number, or of -1e4
    attended = attn_mask if attn_mask.dtype == torch.bool else attn_mask.float().exp() > 0
    if attended.ndim < 4:  # the same for all images
        return attended.flatten(0, -2).any(dim=0).expand(batch_size, -1)
    return attended.flatten(1, 2).any(dim=1).expand(batch_size, -1)


class AssociativeBlock(Block):
    """timm's block with a `WorkspaceMlp`, which it tells in training what tokens no other attends to: padding."""

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        token_mask = attended_tokens(attn_mask, x.shape[0]) if self.training else None
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), token_mask)))
        return x


class AttentionFreeBlock(AssociativeBlock):
    """timm's block without its self-attention: what tokens exchange goes through the workspace, linear in their number.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        del self.norm1, self.attn, self.ls1, self.drop_path1

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        refuse_masks(None, is_causal)
        token_mask = attended_tokens(attn_mask, x.shape[0]) if self.training else None
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), token_mask)))


class AssociativeTransformer(QuestionViT):
    """ Associative Transformer

    timm's `VisionTransformer` with another MLP layer; keys of a plain ViT checkpoint match one to one.
    """

    def __init__(
            self,
            *args,
            workspace: bool = True,
            attention: bool = True,
            mlp_layer: Optional[Type[nn.Module]] = None,
            **kwargs,
    ) -> None:
        """
        Args:
            *args: As `QuestionViT`.
            workspace: If False, plain MLPs without workspaces: a ViT of the same size.
            attention: If False, blocks without self-attention.
            mlp_layer: MLP layer, by default `WorkspaceMlp`, or `Mlp` without workspaces.
            **kwargs: As `GlobalWorkspace`, its own from `num_slots` on, and as `QuestionViT` except for its blocks.

        Raises:
            ValueError: An argument is out of its range.
        """
        if not isinstance(workspace, bool):
            raise ValueError(f'workspace must be True or False, got {workspace!r}: its arguments go beside it.')
        if not attention and not workspace:
            raise ValueError('attention=False needs workspace=True: without either, tokens would not meet.')
        unused = {} if attention else dict(
            qk_norm=False, scale_attn_norm=False, attn_layer=None, attn_drop_rate=0., fix_init=False)
        reason = f'the blocks are those with attention={attention}, which hand masks to the workspaces'
        kwargs = refuse_arguments(args, kwargs, reason, block_fn=None, **unused)
        workspace_kwargs, kwargs = split_kwargs(GlobalWorkspace, kwargs)
        if workspace:
            block_fn = AssociativeBlock if attention else AttentionFreeBlock
            mlp_layer = partial(mlp_layer or WorkspaceMlp, **workspace_kwargs)
        else:
            block_fn, mlp_layer = Block, mlp_layer or Mlp
        super().__init__(block_fn=block_fn, mlp_layer=mlp_layer, **kwargs)


_CIFAR10_CLASSES = (
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')

_cfg_224 = partial(cifar_cfg, num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)

default_cfgs = generate_default_cfgs({
    'ait_small.cifar10': cifar_cfg(
        **shipped_weights('ait_small.cifar10'), crop_pct=0.875, label_names=_CIFAR10_CLASSES),
    'ait_small_patch32_64.triangle': cifar_cfg(
        **shipped_weights('ait_small_patch32_64.triangle'), num_classes=2, input_size=(3, 64, 64), mean=(0.005,) * 3,
        std=(0.072,) * 3, label_names=TRIANGLE_CLASSES),
    'ait_medium.untrained': cifar_cfg(),
    'ait_base.untrained': cifar_cfg(),
    'ait_small_patch16_224.untrained': _cfg_224(),
    'ait_medium_patch16_224.untrained': _cfg_224(),
    'ait_base_patch16_224.untrained': _cfg_224(),
    'ait_small_patch15_75.untrained': cifar_cfg(input_size=(3, 75, 75)),
    'ait_tiny_hybrid_75.sort_of_clevr': cifar_cfg(
        **shipped_weights('ait_tiny_hybrid_75.sort_of_clevr'), input_size=(3, 75, 75),
        first_conv='patch_embed.backbone.0.conv', label_names=ANSWERS),
    'test_ait.untrained': cifar_cfg(),
})


_create_associative_transformer = partial(build_vit, AssociativeTransformer, checkpoint_filter_fn)

# the paper's input: 32 px images in 64 patches, average pooling
_CIFAR = dict(img_size=32, patch_size=4, class_token=False, global_pool='avg')


@register_model
def ait_small(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=768, depth=2, num_heads=12)
    return _create_associative_transformer('ait_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_small_patch32_64(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 64 px, patch 32: the paper's for Triangle. """
    model_args = dict(_CIFAR, img_size=64, patch_size=32, embed_dim=768, depth=2, num_heads=12)
    return _create_associative_transformer(
        'ait_small_patch32_64', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_medium(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Medium, 6 blocks, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=768, depth=6, num_heads=12)
    return _create_associative_transformer('ait_medium', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_base(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Base, 12 blocks, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=768, depth=12, num_heads=12)
    return _create_associative_transformer('ait_base', pretrained=pretrained, **dict(model_args, **kwargs))


# images of 224 px in 196 patches, otherwise the same
_IMAGENET = dict(img_size=224, patch_size=16, class_token=False, global_pool='avg')


@register_model
def ait_small_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 224 px, patch 16. """
    model_args = dict(_IMAGENET, embed_dim=768, depth=2, num_heads=12)
    return _create_associative_transformer(
        'ait_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_medium_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Medium, 6 blocks, 224 px, patch 16. """
    model_args = dict(_IMAGENET, embed_dim=768, depth=6, num_heads=12)
    return _create_associative_transformer(
        'ait_medium_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_base_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Base, 12 blocks, 224 px, patch 16. """
    model_args = dict(_IMAGENET, embed_dim=768, depth=12, num_heads=12)
    return _create_associative_transformer(
        'ait_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


# Sort-of-CLEVR: images of 75 px and questions of 18 numbers, answered at the question's token
_SORT_OF_CLEVR = dict(img_size=75, question_dim=QUESTION_DIM, global_pool='token')


@register_model
def ait_small_patch15_75(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small for questions, 2 blocks, 75 px, patch 15. """
    model_args = dict(_SORT_OF_CLEVR, patch_size=15, embed_dim=768, depth=2, num_heads=12)
    return _create_associative_transformer(
        'ait_small_patch15_75', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_tiny_hybrid_75(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT for questions with a convolutional stem of stride 16, 4 blocks, 128 wide, 75 px. """
    stem = ConvStem(
        in_chans=kwargs.get('in_chans', 3),
        depth=4,
        channels=(16, 32, 64, 128),
        stride=(2, 2, 2, 2),
        act_layer=nn.ReLU,
    )
    embed_layer = partial(HybridEmbed, backbone=stem, proj=False)
    model_args = dict(
        _SORT_OF_CLEVR, embed_layer=embed_layer, patch_size=1, embed_dim=128, depth=4, num_heads=4)
    return _create_associative_transformer('ait_tiny_hybrid_75', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_ait(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT for unit tests. """
    model_args = dict(
        _CIFAR, embed_dim=64, depth=3, num_heads=2, num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=16)
    return _create_associative_transformer('test_ait', pretrained=pretrained, **dict(model_args, **kwargs))
