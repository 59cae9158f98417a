""" Set Transformer

An encoder of induced set attention blocks, in which the tokens of an image exchange what they know through a few
learned inducing points (linear in the number of tokens), and a decoder that pools them by attention.

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
from typing import Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn

from timm.layers import DropPath, LayerNorm, LayerType, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from timm_ait.layers.cross_attention import CrossAttention
from timm_ait.weights import check_weights

from ._question import QuestionViT, cifar_cfg, refuse_arguments, refuse_masks

__all__ = ['SetTransformer']


class RowwiseFeedForward(nn.Sequential):
    """rFF: one linear layer with an activation, the same for every element of the set."""

    def __init__(self, dim: int, act_layer: Type[nn.Module], drop: float = 0., device=None, dtype=None) -> None:
        super().__init__(nn.Linear(dim, dim, device=device, dtype=dtype), act_layer(), nn.Dropout(drop))


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
    ) -> None:
        """
        Args:
            dim: Width d.
            num_heads: Number of heads.
            proj_drop: Dropout rate after the attention's output projection and in the rFF.
            attn_drop: Dropout rate of the attention weights.
            drop_path: Stochastic depth rate.
            act_layer: Activation of the rFF.
            norm_layer: Normalization layer.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.attn = CrossAttention(
            dim, num_heads, scale=dim ** -0.5, qkv_bias=False, proj_bias=False,
            attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm1 = norm_layer(dim, **dd)
        self.rff = RowwiseFeedForward(dim, act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Update the set x (B, M, d) with what it reads from the set y (B, N, d)."""
        x = self.norm1(x + self.drop_path1(self.attn(x, y)))
        x = self.norm2(x + self.drop_path2(self.rff(x)))
        return x


class InducedSetAttentionBlock(nn.Module):
    """ISAB_m(X) = MAB(X, H) with H = MAB(I, X), I the m inducing points; equations 9 and 10."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            num_inducing: int,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Type[nn.Module] = LayerNorm,
            device=None,
            dtype=None,
            **unused,
    ) -> None:
        """
        Args:
            dim: Width d.
            num_heads: Number of heads.
            num_inducing: Number of inducing points m.
            proj_drop: As `MultiheadAttentionBlock`, like the following.
            attn_drop: Dropout rate of the attention weights.
            drop_path: Stochastic depth rate.
            act_layer: Activation of the rFF.
            norm_layer: Normalization layer.
            **unused: What else timm's ViT hands to its blocks; `SetTransformer` refuses to have it set.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        mab = partial(
            MultiheadAttentionBlock, dim, num_heads, proj_drop, attn_drop, drop_path, act_layer, norm_layer, **dd)
        self.inducing_points = nn.Parameter(torch.empty(num_inducing, dim, **dd))
        self.induce = mab()
        self.attend = mab()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.inducing_points)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Update the set x (B, N, d); there is no self-attention to mask."""
        refuse_masks(attn_mask, is_causal)
        h = self.induce(self.inducing_points.expand(x.shape[0], -1, -1), x)
        return self.attend(x, h)


class PoolingByMultiheadAttention(nn.Module):
    """PMA_k(Z) = MAB(S, rFF(Z)), S the k seeds (equation 11), and SAB(PMA_k(Z)) for k > 1; then the mean over them."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            num_seeds: int = 1,
            proj_drop: float = 0.,
            act_layer: Type[nn.Module] = nn.ReLU,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            dim: Width d.
            num_heads: Number of heads.
            num_seeds: Number of seeds k.
            proj_drop: Dropout rate after the attention's output projection and in the rFF.
            act_layer: Activation of the rFF.
            **kwargs: As `MultiheadAttentionBlock`.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        mab = partial(MultiheadAttentionBlock, dim, num_heads, proj_drop=proj_drop, act_layer=act_layer, **kwargs, **dd)
        self.seeds = nn.Parameter(torch.empty(num_seeds, dim, **dd))
        self.rff = RowwiseFeedForward(dim, act_layer, drop=proj_drop, **dd)
        self.mab = mab()
        self.sab = mab() if num_seeds > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.seeds)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Pool the set z (B, N, d) to (B, d)."""
        x = self.mab(self.seeds.expand(z.shape[0], -1, -1), self.rff(z))
        if self.sab is not None:
            x = self.sab(x, x)
        return x.mean(dim=1)


class SetTransformer(QuestionViT):
    """ Set Transformer

    timm's `VisionTransformer` with other blocks and its own pooling. A question, in the class token, is one more
    element of the set.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 32,
            patch_size: Union[int, Tuple[int, int]] = 4,
            in_chans: int = 3,
            num_classes: int = 10,
            global_pool: str = 'map',
            embed_dim: int = 768,
            depth: int = 2,
            num_heads: int = 12,
            *,
            num_inducing: int = 32,
            num_seeds: int = 1,
            class_token: bool = False,
            no_embed_class: bool = True,
            norm_layer: Optional[LayerType] = None,
            act_layer: Optional[LayerType] = None,
            **kwargs,
    ) -> None:
        """
        Args:
            img_size: Input image size.
            patch_size: Patch size.
            in_chans: Number of image input channels.
            num_classes: Number of classes for the classification head; 0 for none.
            global_pool: 'map' pools by multihead attention (PMA), the paper's decoder; the others are those of timm's
                ViT, where 'token' is the question's.
            embed_dim: Width d.
            depth: Number of induced set attention blocks.
            num_heads: Number of attention heads.
            num_inducing: Number of inducing points m of each block.
            num_seeds: Number of seeds k of the pooling by attention.
            class_token: As `VisionTransformer`.
            no_embed_class: As `VisionTransformer`.
            norm_layer: Normalization layer.
            act_layer: Activation of the rFFs, ReLU by default.
            **kwargs: As `QuestionViT`, except for what its blocks do not have.

        Raises:
            ValueError: An argument is out of its range, or one of other blocks.
        """
        for name, value in dict(depth=depth, num_inducing=num_inducing, num_seeds=num_seeds).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}.')
        kwargs = refuse_arguments(
            kwargs,
            ('mlp_ratio', 'qkv_bias', 'qk_norm', 'scale_attn_norm', 'scale_mlp_norm', 'proj_bias', 'init_values',
             'final_norm', 'fc_norm', 'weight_init', 'fix_init', 'block_fn', 'mlp_layer', 'attn_layer'),
            'the blocks are induced set attention blocks, with the norms, layers and initialisation of their paper',
        )
        act_layer = act_layer or nn.ReLU
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            num_heads,
            class_token=class_token,
            no_embed_class=no_embed_class,
            final_norm=False,
            norm_layer=norm_layer,
            act_layer=act_layer,
            block_fn=partial(InducedSetAttentionBlock, num_inducing=num_inducing),
            weight_init='skip',
            **kwargs,
        )
        if global_pool == 'map':
            self.attn_pool = PoolingByMultiheadAttention(
                embed_dim,
                num_heads,
                num_seeds=num_seeds,
                proj_drop=kwargs.get('proj_drop_rate', 0.),
                attn_drop=kwargs.get('attn_drop_rate', 0.),
                act_layer=get_act_layer(act_layer),
                norm_layer=get_norm_layer(norm_layer) or LayerNorm,
                device=kwargs.get('device'),
                dtype=kwargs.get('dtype'),
            )
            self.pool_include_prefix = True
        # linear layers keep PyTorch's rule; timm's for ViTs learns slower in models narrower than 768
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        """Create regex patterns for parameter grouping."""
        return {**super().group_matcher(coarse), 'blocks': r'^blocks\.(\d+)'}

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As `VisionTransformer`; other poolings than the one by attention leave out the question."""
        had_pool = self.attn_pool is not None
        super().reset_classifier(num_classes, global_pool)
        if had_pool and self.attn_pool is None:
            self.pool_include_prefix = False


default_cfgs = generate_default_cfgs({
    'set_transformer_small.untrained': cifar_cfg(),
    'set_transformer_base.untrained': cifar_cfg(),
    'test_set_transformer.untrained': cifar_cfg(),
})


def _create_set_transformer(variant: str, pretrained: bool = False, **kwargs) -> SetTransformer:
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']))
    return build_model_with_cfg(
        SetTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=check_weights(checkpoint_filter_fn),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


@register_model
def set_transformer_small(pretrained: bool = False, **kwargs) -> SetTransformer:
    """ Set Transformer of AiT-Small's width and depth, 32 px, patch 4. """
    model_args = dict(embed_dim=768, depth=2, num_heads=12)
    return _create_set_transformer('set_transformer_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def set_transformer_base(pretrained: bool = False, **kwargs) -> SetTransformer:
    """ Set Transformer of AiT-Base's size, 32 px, patch 4. """
    model_args = dict(embed_dim=1024, depth=8, num_heads=16)
    return _create_set_transformer('set_transformer_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_set_transformer(pretrained: bool = False, **kwargs) -> SetTransformer:
    """ Set Transformer for unit tests. """
    model_args = dict(embed_dim=64, depth=3, num_heads=2, num_inducing=8)
    return _create_set_transformer('test_set_transformer', pretrained=pretrained, **dict(model_args, **kwargs))
