""" Perceiver

A small array of learned latents reads the tokens of an image by cross-attention several times, with self-attention
among the latents in between; the cost of depth does not grow with the number of tokens.

Paper: `Perceiver: General Perception with Iterative Attention` - https://arxiv.org/abs/2103.03206
    Andrew Jaegle, Felix Gimeno, Andrew Brock, Andrew Zisserman, Oriol Vinyals, Joao Carreira. ICML 2021.

The byte array is not the paper's pixels with Fourier features: it is timm's patch tokens with a learned position
embedding, the front end of every model of this package, as wide as the latents. Everything else is the paper's
appendix C: norms before every layer and none at the end, cross-attention with a single head, dense blocks as wide as
their input, the mean over the latents before the classifier, weights shared by all iterations except for the first
cross-attention (table 7).

Parameters without the classifier: small 14.3M, in AiT-Small's width and number of blocks; base 88.3M, in the width of
the paper's ImageNet model, 1024, with 12 blocks as AiT-Base. Shared blocks count once, so the number of iterations is
free: 3 in small and 2 in base, about the multiplications of the AiT of that name.
"""
from typing import Any, Dict, List, Optional, Set, Tuple, Type, Union

import torch
import torch.nn as nn

from timm.layers import DropPath, LayerNorm, Mlp, trunc_normal_
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn

from timm_ait.layers._arguments import check_at_least, check_choice
from timm_ait.layers.cross_attention import CrossAttention

from ._builder import build_vit, check_arguments, cifar_cfg, reject_masks
from ._question import QuestionViT

__all__ = ['Perceiver']

_POOLS = ('', 'avg', 'avgmax', 'max')


class CrossAttentionBlock(nn.Module):
    """Cross-attention module: latents attend to the tokens, then a dense block; both residual, with norms before."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 1.,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = LayerNorm,
            device=None,
            dtype=None,
    ) -> None:
        """As timm's `Block`, of latents and tokens of the same width."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.norm_tokens = norm_layer(dim, **dd)
        self.attn = CrossAttention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Update the latents (B, M, E) with what they read from the tokens (B, N, E)."""
        latents = latents + self.drop_path1(self.attn(self.norm1(latents), self.norm_tokens(tokens)))
        latents = latents + self.drop_path2(self.mlp(self.norm2(latents)))
        return latents


class PerceiverEncoder(nn.Module):
    """All iterations, each a cross-attention and a latent transformer. For timm's ViT this is a single block."""

    def __init__(
            self,
            dim: int,
            depth: int,
            num_heads: int,
            num_cross_heads: int,
            num_latents: int,
            num_iterations: int,
            share_weights: str,
            device=None,
            dtype=None,
            **block_kwargs,
    ) -> None:
        """As `Perceiver`; `block_kwargs` are those of its blocks."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grad_checkpointing = False
        self.num_iterations = num_iterations
        self.latents = nn.Parameter(torch.empty(1, num_latents, dim, **dd))
        # iterations beyond the length of a list use its last module
        num_cross_attns = {'none': num_iterations, 'after_first': min(2, num_iterations), 'all': 1}[share_weights]
        self.cross_attns = nn.ModuleList([
            CrossAttentionBlock(dim, num_cross_heads, **block_kwargs, **dd) for _ in range(num_cross_attns)])
        self.latent_transformers = nn.ModuleList([
            nn.Sequential(*[Block(dim, num_heads, qkv_bias=True, **block_kwargs, **dd) for _ in range(depth)])
            for _ in range(num_iterations if share_weights == 'none' else 1)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.latents, std=.02)

    def iterate(self, latents: torch.Tensor, tokens: torch.Tensor, iteration: int) -> torch.Tensor:
        """One iteration, counted from 0: latents (B, M, E) read the tokens (B, N, E), then each other."""
        # loops with a condition in them, since TorchScript cannot index a ModuleList by a variable
        for i, cross_attn in enumerate(self.cross_attns):
            if i == min(iteration, len(self.cross_attns) - 1):
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    latents = checkpoint(cross_attn, latents, tokens)
                else:
                    latents = cross_attn(latents, tokens)
        for i, blocks in enumerate(self.latent_transformers):
            if i == min(iteration, len(self.latent_transformers) - 1):
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    latents = checkpoint_seq(blocks, latents)
                else:
                    latents = blocks(latents)
        return latents

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Latents (B, M, E) that have read the tokens x (B, N, E); masks are not supported."""
        reject_masks(attn_mask, is_causal)
        latents = self.latents.expand(x.shape[0], -1, -1)
        for i in range(self.num_iterations):
            latents = self.iterate(latents, x, i)
        return latents

    def prune(self, num_iterations: int) -> None:
        """Keep only the first iterations."""
        self.num_iterations = num_iterations
        self.cross_attns = self.cross_attns[:num_iterations]
        self.latent_transformers = self.latent_transformers[:num_iterations]


class Perceiver(VisionTransformer):
    """ Perceiver

    timm's `VisionTransformer` with other layers between its position embedding and its pooling. The features are the
    latents. A question, in a class token, is one more token to read.
    """

    def __init__(
            self,
            *args,
            num_cross_heads: int = 1,
            num_latents: int = 32,
            num_iterations: int = 3,
            share_weights: str = 'after_first',
            **kwargs,
    ) -> None:
        """
        Args:
            *args: As `VisionTransformer`. `depth` and `num_heads` are those of the latent transformer, which follows
                each cross-attention; `mlp_ratio` is 1 by default; `global_pool` of latents may be 'avg' (the paper's
                and the default), 'avgmax', 'max', or '' for none; `drop_path_rate` is the same in all blocks, since a
                shared block has no depth.
            num_cross_heads: Number of heads of the cross-attention.
            num_latents: Number of latents M.
            num_iterations: Number of iterations, of a cross-attention and a latent transformer each.
            share_weights: Weights that the iterations share: 'after_first' is the paper's, all except for the first
                cross-attention; 'all' or 'none'.
            **kwargs: As `VisionTransformer`, except for options of its blocks.

        Raises:
            ValueError: An argument is out of its range or not supported.
        """
        kwargs = check_arguments(
            self,
            args,
            kwargs,
            'tokens are the patches and the question, and the blocks are those of the paper',
            qkv_bias=True, qk_norm=False, scale_attn_norm=False, scale_mlp_norm=False, proj_bias=True, init_values=None,
            no_embed_class=True, reg_tokens=0, final_norm=False, fc_norm=False, weight_init='', fix_init=False,
            block_fn=None, mlp_layer=None, attn_layer=None,
        )
        kwargs = {'global_pool': 'avg', 'mlp_ratio': 1., 'class_token': False, **kwargs}
        depth, drop_path = kwargs.pop('depth', 12), kwargs.pop('drop_path_rate', 0.)
        check_at_least(1, depth=depth, num_latents=num_latents, num_iterations=num_iterations)
        check_choice('share_weights', share_weights, ('none', 'after_first', 'all'))
        check_choice('global_pool', kwargs['global_pool'], _POOLS)

        def block_fn(dim: int, num_heads: int, **block_kwargs) -> nn.Module:
            names = ('mlp_ratio', 'proj_drop', 'attn_drop', 'norm_layer', 'act_layer', 'device', 'dtype')
            return PerceiverEncoder(
                dim, depth, num_heads, num_cross_heads, num_latents, num_iterations, share_weights,
                drop_path=drop_path, **{name: block_kwargs[name] for name in names})

        super().__init__(
            depth=1, no_embed_class=True, final_norm=False, weight_init='skip', block_fn=block_fn, **kwargs)
        self.num_prefix_tokens = 0  # of the features
        # linear layers keep PyTorch's initialisation; with timm's for ViTs narrow models learn more slowly
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Set of parameters that should not use weight decay."""
        return super().no_weight_decay() | {'blocks.0.latents'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that group the parameters by depth, shared ones by their first use."""
        return dict(
            stem=super().group_matcher(coarse)['stem'] + r'|blocks\.0\.latents',
            blocks=[
                (r'^blocks\.0\.cross_attns\.(\d+)', None),
                (r'^blocks\.0\.latent_transformers\.(\d+)\.(\d+)', None)],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, of each cross-attention and block."""
        self.blocks[0].grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As `VisionTransformer`, with the poolings of latents."""
        check_choice('global_pool', self.global_pool if global_pool is None else global_pool, _POOLS)
        super().reset_classifier(num_classes, global_pool)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NLC',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """As `VisionTransformer`, with the latents after each iteration, which are no grids: `output_fmt` is 'NLC'.

        `return_prefix_tokens` and `norm` change nothing: there are no prefix tokens among latents, and no norm.
        """
        assert output_fmt == 'NLC', 'Output format must be NLC: latents are not on a grid.'
        reject_masks(attn_mask, is_causal)
        encoder = self.blocks[0]
        take_indices, max_index = feature_take_indices(encoder.num_iterations, indices)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        latents = encoder.latents.expand(x.shape[0], -1, -1)
        intermediates = []
        for i in range(max_index + 1 if stop_early else encoder.num_iterations):
            latents = encoder.iterate(latents, tokens, i)
            if i in take_indices:
                intermediates.append(latents)
        if output_dict:
            features = {} if intermediates_only else {'image_features': latents}
            return {'image_intermediates': intermediates, **features}
        return intermediates if intermediates_only else (latents, intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """As `VisionTransformer`, of iterations; `prune_norm` changes nothing, since there is no norm after them."""
        take_indices, max_index = feature_take_indices(self.blocks[0].num_iterations, indices)
        self.blocks[0].prune(max_index + 1)
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices


class QuestionPerceiver(QuestionViT, Perceiver):
    """ Perceiver that takes questions """


default_cfgs = generate_default_cfgs({
    'perceiver_small.untrained': cifar_cfg(),
    'perceiver_base.untrained': cifar_cfg(),
    'test_perceiver.untrained': cifar_cfg(),
})


def _create_perceiver(variant: str, pretrained: bool = False, **kwargs) -> Perceiver:
    if kwargs.get('features_only'):
        raise RuntimeError(
            'features_only is not implemented for Perceiver models, whose features are latents and not grids: use '
            'forward_intermediates.')
    return build_vit(Perceiver, QuestionPerceiver, checkpoint_filter_fn, variant, pretrained, **kwargs)


# 32 px images in 64 patches
_CIFAR = dict(img_size=32, patch_size=4)


@register_model
def perceiver_small(pretrained: bool = False, **kwargs) -> Perceiver:
    """ Perceiver of AiT-Small's size, 3 iterations of 2 blocks, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=768, depth=2, num_heads=12, num_iterations=3)
    return _create_perceiver('perceiver_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def perceiver_base(pretrained: bool = False, **kwargs) -> Perceiver:
    """ Perceiver of AiT-Base's size, 2 iterations of 12 blocks, 32 px, patch 4. """
    model_args = dict(_CIFAR, embed_dim=1024, depth=12, num_heads=16, num_iterations=2)
    return _create_perceiver('perceiver_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_perceiver(pretrained: bool = False, **kwargs) -> Perceiver:
    """ Perceiver for unit tests. """
    model_args = dict(_CIFAR, embed_dim=64, depth=2, num_heads=2, num_latents=8, num_iterations=3)
    return _create_perceiver('test_perceiver', pretrained=pretrained, **dict(model_args, **kwargs))
