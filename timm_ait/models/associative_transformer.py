""" Associative Transformer (AiT)

A vision transformer whose MLPs end in a global workspace: tokens of the whole batch compete to write into a small
memory, and every token reads from it by Hopfield retrieval.

Paper: `Associative Transformer` - https://arxiv.org/abs/2309.12862
    Yuwei Sun, Hideya Ochiai, Zhirong Wu, Stephen Lin, Ryota Kanai. CVPR 2025.

Parameters with the paper's classifier, `global_pool='flat'`, against the paper's (quoted from memory): small 15.7M
(15.8M), medium 45.8M (45.9M), base 91.0M (91.0M), of which the classifier has 0.6M.
"""
from functools import partial
from typing import Optional, Type

import torch
import torch.nn as nn

from timm.layers import HybridEmbed, LayerNorm, Mlp, PatchDropout, get_device_dtype, get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem

from timm_ait.layers import GlobalWorkspace, WorkspaceMlp
from timm_ait.layers._arguments import check_choice, options, split_kwargs
from timm_ait.layers.advance import named_workspaces
from timm_ait.weights import shipped_cfg

from ._builder import CIFAR_ARGS, build_vit, cifar_cfg, reject_arguments, reject_masks
from ._question import QuestionViT

__all__ = ['AssociativeTransformer']


@torch.fx.wrap
def attended_tokens(attn_mask: Optional[torch.Tensor], B: int, N: int) -> Optional[torch.Tensor]:
    """Tokens (B, N) that any may attend to, by a boolean or additive mask for (B, heads, N, N); None for all."""
    if attn_mask is None:
        return None
    # -inf, the lowest number of the dtype, -1e4 and Swin's -100 hide a token
    attended = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -80.
    if attended.ndim < 4:  # one mask for all images
        return attended.reshape(-1, attended.shape[-1]).any(dim=0).expand(B, N)
    return attended.flatten(1, 2).any(dim=1).expand(B, N)


class AssociativeBlock(Block):
    """timm's block with a `WorkspaceMlp`. Tokens that a mask hides from all, also from themselves, are not written."""

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Update the tokens x (B, N, E); a mask broadcasts to (B, heads, N, N). No `is_causal` in training."""
        if self.training:
            reject_masks(None, is_causal, 'in training, earlier tokens would read what later ones write')
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return self.feed_forward(x, attn_mask)

    def feed_forward(self, x: torch.Tensor, attn_mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens (B, N, E) after the MLP, which may be any that takes tokens alone where there is no mask."""
        token_mask = attended_tokens(attn_mask, x.shape[0], x.shape[1]) if self.training else None
        normed = self.norm2(x)
        updates = self.mlp(normed) if token_mask is None else self.mlp(normed, token_mask)
        return x + self.drop_path2(self.ls2(updates))


class AttentionFreeBlock(AssociativeBlock):
    """timm's block without self-attention: in training tokens meet only in the workspace, in evaluation not at all."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        del self.norm1, self.attn, self.ls1, self.drop_path1

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """As `AssociativeBlock`; the mask only excludes tokens from the write, and `is_causal` is not supported."""
        reject_masks(None, is_causal)
        return self.feed_forward(x, attn_mask)


class AssociativeTransformer(VisionTransformer):
    """ Associative Transformer

    timm's `VisionTransformer` with another MLP layer; keys of a plain ViT checkpoint match one to one.

    Besides timm's values, `global_pool` may be 'flat', the published classifier: a norm and a linear layer over the
    N * E features of all patch tokens, and with `pool_include_prefix` of class token and registers too. The norm is
    `fc_norm`, as in timm's pooled models; `fc_norm=False` normalises the tokens before they are flattened.
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
            *args: As `VisionTransformer`, and `global_pool='flat'`.
            workspace: If False, plain MLPs without workspaces: a ViT of the same width and depth.
            attention: If False, blocks without self-attention.
            mlp_layer: MLP layer, by default `WorkspaceMlp`, or `Mlp` without workspaces.
            **kwargs: Arguments of `GlobalWorkspace` (from `num_slots` on) and of `VisionTransformer`, except for
                `block_fn`.

        Raises:
            ValueError: An argument is out of its range.
        """
        check_choice('workspace', workspace, (True, False))
        check_choice('attention', attention, (True, False))
        if not attention and not workspace:
            raise ValueError('attention=False needs workspace=True: tokens could not communicate without either.')
        unused = {} if attention else dict(
            qkv_bias=True, qk_norm=False, scale_attn_norm=False, attn_layer=None, attn_drop_rate=0., fix_init=False)
        reason = f'the blocks are fixed with attention={attention}'
        kwargs = reject_arguments(self, args, kwargs, reason, options(GlobalWorkspace), block_fn=None, **unused)
        workspace_kwargs, kwargs = split_kwargs(GlobalWorkspace, kwargs)
        if workspace:
            mlp_cls = getattr(mlp_layer, 'func', mlp_layer) or WorkspaceMlp
            if not (isinstance(mlp_cls, type) and issubclass(mlp_cls, WorkspaceMlp)):
                raise ValueError(
                    f'mlp_layer={mlp_layer!r} has no workspace: derive it from WorkspaceMlp, or use workspace=False.')
            block_fn = AssociativeBlock if attention else AttentionFreeBlock
            mlp_layer = partial(mlp_layer or WorkspaceMlp, **workspace_kwargs)
        else:
            block_fn, mlp_layer = Block, mlp_layer or Mlp
        flat = kwargs.get('global_pool') == 'flat'
        if flat:
            kwargs['global_pool'] = 'avg'  # has its norm in the same place
        super().__init__(block_fn=block_fn, mlp_layer=mlp_layer, **kwargs)
        self.norm_layer = get_norm_layer(kwargs.get('norm_layer')) or LayerNorm
        if flat:
            self.reset_classifier(self.num_classes, 'flat')

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """As `VisionTransformer`, except for a classifier of all tokens, which keeps PyTorch's rule as published.

        With timm's standard deviation of 0.02, whatever the number of inputs, the first logits would be far too large.
        """
        super().init_weights(mode, needs_reset)
        if self.global_pool == 'flat' and self.num_classes > 0:
            self.head.reset_parameters()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As `VisionTransformer`, with 'flat' too, which raises a ValueError where the number of tokens varies."""
        global_pool = self.global_pool if global_pool is None else global_pool
        flat = global_pool == 'flat'
        if flat and (self.dynamic_img_size or isinstance(self.patch_drop, PatchDropout)):
            raise ValueError(
                "global_pool='flat' is not supported with dynamic_img_size or patch_drop_rate: its classifier has "
                "weights for every token of a full grid. Choose another pooling, such as 'avg'.")
        old_width = self.head_hidden_size
        super().reset_classifier(num_classes, 'avg' if flat else global_pool)
        num_tokens = 1
        if flat:
            self.global_pool, self.attn_pool = 'flat', nn.Flatten(1).train(self.training)
            num_tokens = self.patch_embed.num_patches + self.pool_include_prefix * self.num_prefix_tokens
        self.head_hidden_size = num_tokens * self.embed_dim
        dd = get_device_dtype(self)
        if self.head_hidden_size != old_width and not isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = self.norm_layer(self.head_hidden_size, **dd).train(self.training)
        if flat and num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **dd).train(self.training)

    def load_pretrained(self, *args, **kwargs) -> None:
        """As `VisionTransformer`; ungated workspaces, which JAX weights lack, raise a ValueError."""
        if any(not workspace.gated for _, workspace in named_workspaces(self)):
            raise ValueError('JAX weights (.npz) have no workspaces: create the model with gated=True to load them.')
        super().load_pretrained(*args, **kwargs)

    def set_input_size(self, *args, **kwargs) -> None:
        """As `VisionTransformer`; `global_pool='flat'` raises a ValueError."""
        if self.global_pool == 'flat':
            raise ValueError(
                "global_pool='flat' is not supported with set_input_size: its classifier has weights for every token "
                'of one image size. Create the model with img_size, or reset its classifier to another pooling first.')
        super().set_input_size(*args, **kwargs)


class QuestionAssociativeTransformer(QuestionViT, AssociativeTransformer):
    """ Associative Transformer that takes questions """


_cfg_224 = partial(cifar_cfg, num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)

default_cfgs = generate_default_cfgs({
    'ait_small.cifar10': cifar_cfg(**shipped_cfg('ait_small.cifar10')),
    'ait_small_patch32_64.triangle': cifar_cfg(**shipped_cfg('ait_small_patch32_64.triangle')),
    'ait_medium.untrained': cifar_cfg(),
    'ait_base.untrained': cifar_cfg(),
    'ait_small_patch16_224.untrained': _cfg_224(),
    'ait_medium_patch16_224.untrained': _cfg_224(),
    'ait_base_patch16_224.untrained': _cfg_224(),
    'ait_small_patch15_75.untrained': cifar_cfg(input_size=(3, 75, 75)),
    'ait_tiny_hybrid_75.sort_of_clevr': cifar_cfg(**shipped_cfg('ait_tiny_hybrid_75.sort_of_clevr')),
    'test_ait.untrained': cifar_cfg(),
})


_create_ait = partial(build_vit, AssociativeTransformer, QuestionAssociativeTransformer, checkpoint_filter_fn)


@register_model
def ait_small(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=2, num_heads=12)
    return _create_ait('ait_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_small_patch32_64(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 64 px, patch 32: the paper's for Triangle. """
    model_args = dict(CIFAR_ARGS, img_size=64, patch_size=32, embed_dim=768, depth=2, num_heads=12)
    return _create_ait('ait_small_patch32_64', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_medium(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Medium, 6 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=6, num_heads=12)
    return _create_ait('ait_medium', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_base(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Base, 12 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=12, num_heads=12)
    return _create_ait('ait_base', pretrained=pretrained, **dict(model_args, **kwargs))


# images of 224 px in 196 patches, otherwise the same
_IMAGENET = dict(CIFAR_ARGS, img_size=224, patch_size=16)


@register_model
def ait_small_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 224 px, patch 16. """
    model_args = dict(_IMAGENET, embed_dim=768, depth=2, num_heads=12)
    return _create_ait('ait_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_medium_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Medium, 6 blocks, 224 px, patch 16. """
    model_args = dict(_IMAGENET, embed_dim=768, depth=6, num_heads=12)
    return _create_ait('ait_medium_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_base_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Base, 12 blocks, 224 px, patch 16. """
    model_args = dict(_IMAGENET, embed_dim=768, depth=12, num_heads=12)
    return _create_ait('ait_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


# Sort-of-CLEVR: images of 75 px and questions of 18 numbers, answered at the question's token
_SORT_OF_CLEVR = dict(img_size=75, question_dim=18, global_pool='token')


@register_model
def ait_small_patch15_75(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small for questions, 2 blocks, 75 px, patch 15. """
    model_args = dict(_SORT_OF_CLEVR, patch_size=15, embed_dim=768, depth=2, num_heads=12)
    return _create_ait('ait_small_patch15_75', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_tiny_hybrid_75(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT for questions with a convolutional stem of stride 16, 4 blocks, 128 wide, 75 px. """
    stem = ConvStem(
        kwargs.get('in_chans', 3), depth=4, channels=(16, 32, 64, 128), stride=(2, 2, 2, 2), act_layer=nn.ReLU,
        device=kwargs.get('device'), dtype=kwargs.get('dtype'))
    embed_layer = partial(HybridEmbed, backbone=stem, proj=False)
    model_args = dict(_SORT_OF_CLEVR, embed_layer=embed_layer, patch_size=1, embed_dim=128, depth=4, num_heads=4)
    return _create_ait('ait_tiny_hybrid_75', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_ait(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT for unit tests. """
    model_args = dict(
        CIFAR_ARGS, embed_dim=64, depth=3, num_heads=2, num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=16)
    return _create_ait('test_ait', pretrained=pretrained, **dict(model_args, **kwargs))
