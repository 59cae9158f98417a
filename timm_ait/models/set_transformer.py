""" Set Transformer

An encoder of induced set attention blocks, in which the tokens of an image communicate through a few learned inducing
points (linear in the number of tokens), and a decoder that pools them by attention.

Paper: `Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks` -
    https://arxiv.org/abs/1810.00825
    Juho Lee, Yoonho Lee, Jungtaek Kim, Adam R. Kosiorek, Seungjin Choi, Yee Whye Teh. ICML 2019.

The set is timm's patch tokens with a learned position embedding, the front end of every model of this package. The
layers are the equations of the paper's section 3, with its softmax over scores divided by the root of the full width d
(section 2.2), not of a head's; its row-wise feed-forward layers are one linear layer with ReLU.

Parameters without the classifier: small 15.5M, in AiT-Small's width and depth, which is the paper's encoder of two
blocks; base 90.6M as AiT-Base's, but 8 blocks 1024 wide instead of 12 blocks 768 wide: a block holds two attention
blocks, and norms after the residual sums are hard to train in a deeper stack.
"""
from functools import partial
from typing import Any, Dict, Optional, Type

import torch
import torch.nn as nn

from timm.layers import DropPath, LayerNorm, LayerType
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from timm_ait.layers._arguments import check_at_least
from timm_ait.layers.cross_attention import CrossAttention

from ._builder import CIFAR_ARGS, MasklessBlock, build_vit, cifar_cfg, reject_arguments, reject_jax
from ._question import QuestionViT

__all__ = ['SetTransformer']


def rowwise_feed_forward(dim: int, act_layer: Type[nn.Module], drop: float, device=None, dtype=None) -> nn.Module:
    """rFF: one linear layer with an activation, the same for every element of the set."""
    return nn.Sequential(nn.Linear(dim, dim, device=device, dtype=dtype), act_layer(), nn.Dropout(drop))


class MultiheadAttentionBlock(nn.Module):
    """MAB(X, Y) = LayerNorm(H + rFF(H)) with H = LayerNorm(X + Multihead(X, Y, Y)), equations 6 and 7."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Type[nn.Module] = LayerNorm,
            device=None,
            dtype=None,
            **unused,
    ) -> None:
        """As timm's `Block`. Its other arguments are ignored here; `SetTransformer` rejects them."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.attn = CrossAttention(
            dim, num_heads, scale=dim ** -0.5, qkv_bias=False, proj_bias=False,
            attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm1 = norm_layer(dim, **dd)
        self.rff = rowwise_feed_forward(dim, act_layer, proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Update the set x (B, M, d) with what it reads from the set y (B, N, d)."""
        x = self.norm1(x + self.drop_path1(self.attn(x, y)))
        return self.norm2(x + self.drop_path2(self.rff(x)))


class InducedSetAttentionBlock(MasklessBlock):
    """ISAB_m(X) = MAB(X, H) with H = MAB(I, X), I the m inducing points; equations 9 and 10."""

    def __init__(self, dim: int, num_inducing: int, device=None, dtype=None, **kwargs) -> None:
        """Width d = dim and m = num_inducing points; the others as `MultiheadAttentionBlock`."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.inducing_points = nn.Parameter(torch.empty(num_inducing, dim, **dd))
        self.induce = MultiheadAttentionBlock(dim, **kwargs, **dd)
        self.attend = MultiheadAttentionBlock(dim, **kwargs, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.inducing_points)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """The set x (B, N, d) after it has communicated."""
        h = self.induce(self.inducing_points.expand(x.shape[0], -1, -1), x)
        return self.attend(x, h)


class PoolingByMultiheadAttention(nn.Module):
    """PMA_1(Z) = MAB(S, rFF(Z)) with a seed S, equation 11."""

    def __init__(self, dim: int, device=None, dtype=None, **kwargs) -> None:
        """Width d = dim; the others as `MultiheadAttentionBlock`."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.seeds = nn.Parameter(torch.empty(1, dim, **dd))
        self.rff = rowwise_feed_forward(dim, kwargs.get('act_layer', nn.ReLU), kwargs.get('proj_drop', 0.), **dd)
        self.mab = MultiheadAttentionBlock(dim, **kwargs, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.seeds)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Pool the set z (B, N, d) to (B, d)."""
        return self.mab(self.seeds.expand(z.shape[0], -1, -1), self.rff(z)).squeeze(1)


class SetTransformer(VisionTransformer):
    """ Set Transformer

    timm's `VisionTransformer` with other blocks and its own pooling. A question, in the class token, is one more
    element of the set.
    """

    load_pretrained = reject_jax

    def __init__(self, *args, num_inducing: int = 32, act_layer: Optional[LayerType] = None, **kwargs) -> None:
        """
        Args:
            *args: As `VisionTransformer`. As `global_pool`, 'map' pools by multihead attention (PMA), the paper's
                decoder; the others are those of timm's ViT, where 'token' is the question's.
            num_inducing: Number of inducing points m of each block.
            act_layer: Activation of the rFFs, ReLU by default.
            **kwargs: As `VisionTransformer`, except for options of its blocks.

        Raises:
            ValueError: An argument is out of its range or not supported.
        """
        kwargs = reject_arguments(
            self, args, kwargs,
            'the blocks are induced set attention blocks, with the norms, layers and initialisation of their paper',
            mlp_ratio=None, qkv_bias=False, qk_norm=False, scale_attn_norm=False, scale_mlp_norm=False, proj_bias=False,
            init_values=None, final_norm=False, fc_norm=False, weight_init='', fix_init=False, block_fn=None,
            mlp_layer=None, attn_layer=None,
        )
        check_at_least(1, depth=kwargs.get('depth', 12), num_inducing=num_inducing)
        mab_args: Dict[str, Any] = {}

        def block_fn(**block_args) -> nn.Module:
            mab_args.update(block_args)
            return InducedSetAttentionBlock(num_inducing=num_inducing, **block_args)

        super().__init__(
            act_layer=act_layer or nn.ReLU, block_fn=block_fn, final_norm=False, weight_init='skip', **kwargs)
        if self.global_pool == 'map':
            self.attn_pool = PoolingByMultiheadAttention(**dict(mab_args, drop_path=0.))
            self.pool_include_prefix = True
        # linear layers keep PyTorch's initialisation; with timm's for ViTs narrow models learn more slowly
        self.init_weights(needs_reset=False)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As `VisionTransformer`; only pooling by attention includes the question."""
        had_pool = self.attn_pool is not None
        super().reset_classifier(num_classes, global_pool)
        if had_pool and self.attn_pool is None:
            self.pool_include_prefix = False


class QuestionSetTransformer(QuestionViT, SetTransformer):
    """ Set Transformer that takes questions """


default_cfgs = generate_default_cfgs({
    'set_transformer_small.untrained': cifar_cfg(),
    'set_transformer_base.untrained': cifar_cfg(),
    'test_set_transformer.untrained': cifar_cfg(),
})


_create_set_transformer = partial(build_vit, SetTransformer, QuestionSetTransformer, checkpoint_filter_fn)

# a question has no position
_CIFAR = dict(CIFAR_ARGS, no_embed_class=True, global_pool='map')


@register_model
def set_transformer_small(pretrained: bool = False, **kwargs) -> SetTransformer:
    """ Set Transformer of AiT-Small's width and depth, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=768, depth=2, num_heads=12)
    return _create_set_transformer('set_transformer_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def set_transformer_base(pretrained: bool = False, **kwargs) -> SetTransformer:
    """ Set Transformer of AiT-Base's size, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=1024, depth=8, num_heads=16)
    return _create_set_transformer('set_transformer_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_set_transformer(pretrained: bool = False, **kwargs) -> SetTransformer:
    """ Set Transformer for unit tests. """
    model_args = dict(_CIFAR, embed_dim=64, depth=3, num_heads=2, num_inducing=8)
    return _create_set_transformer('test_set_transformer', pretrained=pretrained, **dict(model_args, **kwargs))
