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

Parameters without the classifier: small 14.3M, in AiT-Small's width and number of blocks; base 88.4M, in the width of
the paper's ImageNet model, 1024, with 12 blocks as AiT-Base. Shared blocks count once, so the number of iterations is
free: 3 in small and 2 in base, about the multiplications of the AiT of that name.
"""
import copy
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn

from timm.layers import trunc_normal_
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn

from timm_ait.layers._arguments import check_at_least, check_choice
from timm_ait.layers.cross_attention import CrossAttention

from ._builder import CIFAR_ARGS, MasklessBlock, build_vit, cifar_cfg, reject_arguments, reject_jax, reject_masks
from ._question import QuestionViT

__all__ = ['Perceiver']


class CrossAttentionBlock(Block):
    """Cross-attention module: latents attend to the tokens, then a dense block; both residual, with norms before."""

    def __init__(self, dim: int, num_heads: int = 1, **kwargs) -> None:
        """As timm's `Block`, of latents and tokens of the same width."""
        super().__init__(dim, num_heads, **{**kwargs, 'attn_layer': CrossAttention})
        self.norm_tokens = copy.deepcopy(self.norm1)

    def forward(self, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Update the latents (B, M, E) with what they read from the tokens (B, N, E)."""
        latents = latents + self.drop_path1(self.attn(self.norm1(latents), self.norm_tokens(tokens)))
        return latents + self.drop_path2(self.mlp(self.norm2(latents)))


class PerceiverEncoder(MasklessBlock):
    """All iterations, each a cross-attention and a latent transformer. For timm's ViT this is a single block.

    The first cross-attention has weights of its own, the others share theirs, and so do all latent transformers.
    """

    def __init__(self, dim: int, num_heads: int, depth: int, num_latents: int, num_iterations: int, **kwargs) -> None:
        """As `Perceiver`; other arguments as timm's `Block`, of which `device` and `dtype` are needed."""
        super().__init__()
        self.grad_checkpointing = False
        self.num_iterations = num_iterations
        self.latents = nn.Parameter(torch.empty(1, num_latents, dim, device=kwargs['device'], dtype=kwargs['dtype']))
        self.cross_attns = nn.ModuleList([CrossAttentionBlock(dim, **kwargs) for _ in range(min(2, num_iterations))])
        self.latent_transformers = nn.ModuleList([
            nn.Sequential(*[Block(dim, num_heads, **kwargs) for _ in range(depth)])])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.latents, std=.02)

    def iterate(self, latents: torch.Tensor, tokens: torch.Tensor, is_first: bool) -> torch.Tensor:
        """One iteration: latents (B, M, E) read the tokens (B, N, E), then each other."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            latents = checkpoint(self.cross_attns[0 if is_first else -1], latents, tokens)
            return checkpoint_seq(self.latent_transformers[0], latents)
        if is_first:
            latents = self.cross_attns[0](latents, tokens)
        else:
            latents = self.cross_attns[-1](latents, tokens)
        return self.latent_transformers[0](latents)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Latents (B, M, E) that have read the tokens x (B, N, E)."""
        latents = self.latents.expand(x.shape[0], -1, -1)
        for i in range(self.num_iterations):
            latents = self.iterate(latents, x, i == 0)
        return latents


class Perceiver(VisionTransformer):
    """ Perceiver

    timm's `VisionTransformer` with other layers between its position embedding and its pooling. The features are the
    latents. A question, in a class token, is one more token to read. Of layers that iterations share, timm's
    `AttentionExtract` gives the attention of the last use with `method='hook'`, of the first with 'fx'.
    """

    load_pretrained = reject_jax

    def __init__(self, *args, num_latents: int = 32, num_iterations: int = 3, **kwargs) -> None:
        """
        Args:
            *args: As `VisionTransformer`. `depth` and `num_heads` are those of the latent transformer, which follows
                each cross-attention; `mlp_ratio` is 1 by default; `global_pool` of latents may be 'avg' (the paper's
                and the default), 'avgmax', 'max', or '' for none; `drop_path_rate` is the same in all blocks, since a
                shared block has no depth.
            num_latents: Number of latents M.
            num_iterations: Number of iterations, of a cross-attention and a latent transformer each.
            **kwargs: As `VisionTransformer`, except for options of its blocks.

        Raises:
            ValueError: An argument is out of its range or not supported.
        """
        kwargs = reject_arguments(
            self, args, kwargs, 'tokens are the patches and the question, and the blocks are those of the paper',
            qkv_bias=True, qk_norm=False, scale_attn_norm=False, scale_mlp_norm=False, proj_bias=True, init_values=None,
            no_embed_class=True, reg_tokens=0, final_norm=False, fc_norm=False, weight_init='', fix_init=False,
            block_fn=None, mlp_layer=None, attn_layer=None,
        )
        kwargs = {'global_pool': 'avg', 'mlp_ratio': 1., 'class_token': False, **kwargs}
        sizes = dict(depth=kwargs.pop('depth', 12), num_latents=num_latents, num_iterations=num_iterations)
        check_at_least(1, **sizes)
        check_choice('global_pool', kwargs['global_pool'], ('', 'avg', 'avgmax', 'max'))
        drop_path = kwargs.pop('drop_path_rate', 0.)

        def block_fn(**block_kwargs) -> nn.Module:
            return PerceiverEncoder(**{**block_kwargs, **sizes, 'drop_path': drop_path})

        super().__init__(
            depth=1, no_embed_class=True, final_norm=False, weight_init='skip', block_fn=block_fn, **kwargs)
        # of the features
        self.num_prefix_tokens = 0
        self.has_class_token = False
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
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing, self.blocks[0].grad_checkpointing = False, enable  # block by block

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
            latents = encoder.iterate(latents, tokens, i == 0)
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
        encoder = self.blocks[0]
        take_indices, max_index = feature_take_indices(encoder.num_iterations, indices)
        encoder.num_iterations = max_index + 1
        encoder.cross_attns = encoder.cross_attns[:max_index + 1]
        # for whoever saves it: no weights tell how many there are, since those after the first share theirs
        self._model_args = {**getattr(self, '_model_args', {}), 'num_iterations': max_index + 1}
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


@register_model
def perceiver_small(pretrained: bool = False, **kwargs) -> Perceiver:
    """ Perceiver of AiT-Small's size, 3 iterations of 2 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=2, num_heads=12, num_iterations=3)
    return _create_perceiver('perceiver_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def perceiver_base(pretrained: bool = False, **kwargs) -> Perceiver:
    """ Perceiver of AiT-Base's size, 2 iterations of 12 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=1024, depth=12, num_heads=16, num_iterations=2)
    return _create_perceiver('perceiver_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_perceiver(pretrained: bool = False, **kwargs) -> Perceiver:
    """ Perceiver for unit tests. """
    model_args = dict(CIFAR_ARGS, embed_dim=64, depth=2, num_heads=2, num_latents=8, num_iterations=3)
    return _create_perceiver('test_perceiver', pretrained=pretrained, **dict(model_args, **kwargs))
