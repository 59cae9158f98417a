""" Centroid Transformer

A vision transformer that summarises its N tokens in M < N centroids on the way: blocks of self-attention over the
tokens, one block of centroid attention, and blocks of self-attention over the centroids, which cost less.

Paper: `Centroid Transformers: Learning to Abstract with Attention` - https://arxiv.org/abs/2102.08606
    Lemeng Wu, Xingchao Liu, Qiang Liu. 2021.

Parameters without the classifier: base 85.1M, ViT-Base with the seventh of its twelve blocks made one of centroid
attention, which has the same parameters. Small 14.8M, near AiT-Small's 15.1M, but three blocks 640 wide in place of two
768 wide: one before, one of centroid attention and one after are the least that make the family.
"""
from functools import partial
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import Attention
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn

from timm_ait.layers._arguments import check_at_least

from ._builder import CIFAR_ARGS, MasklessBlock, build_vit, cifar_cfg, reject_arguments
from ._question import QuestionViT

__all__ = ['CentroidTransformer']


class CentroidAttention(Attention):
    """One step of the centroids u_j (M of them) towards the tokens x_i (N), with heads l of d features:

        u_j <- u_j + eps sum_l sum_i sim_l(x_i, u_j) V_l(x_i)
        sim_l(x_i, u_j) = exp(s_l(x_i, u_j)) / sum_j' exp(s_l(x_i, u_j')),    s_l(x, u) = <W_Q u, W_K x> / sqrt(d)

    This is a step of gradient ascent on the soft K-means objective (the paper's section on centroid attention)

        sum_l sum_i log sum_j exp(s_l(x_i, u_j)),

    whose gradient to u_j is the sum above with V_l(x) = W_Q^T W_K x / sqrt(d). The paper amortises the step: V_l is a
    free map (values and the output projection of head l). So the softmax runs over the centroids: tokens choose
    centroids, where in self-attention queries choose tokens.

    Choice: eps = M / N, with which the weights that reach a centroid sum to one on average, as in self-attention. The
    parameters are those of timm's `Attention`, under the same names. The residual connection is the block's.
    """

    def forward(self, centroids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Step (B, M, C) of the centroids (B, M, C) towards the tokens x (B, N, C), both normed."""
        # called as a whole, so that adapters and int8 layers in its place act
        q, kv = self.qkv(centroids)[..., :self.attn_dim], self.qkv(x)[..., self.attn_dim:]
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)

        sim = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-2)
        x = (self.attn_drop(sim) @ v) * (centroids.shape[1] / x.shape[1])
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


class CentroidBlock(MasklessBlock, Block):
    """Pre-norm transformer block from N tokens to M centroids.

    The centroids start as the means of `pool_size` x `pool_size` tokens of the grid (of fewer at a border that does not
    divide), and so are a grid themselves. Prefix tokens are centroids of their own. The norm before the attention is
    that of tokens and centroids.
    """

    def __init__(self, grid_size: Tuple[int, int], num_prefix_tokens: int, pool_size: int, **kwargs) -> None:
        """As `Block`, for a grid of tokens of this height and width after the prefix tokens."""
        super().__init__(**{**kwargs, 'attn_layer': CentroidAttention})
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens
        self.pool_size = pool_size

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Centroids (B, P + M, C) of P prefix tokens and a grid of tokens, x (B, P + N, C)."""
        prefix, grid = x[:, :self.num_prefix_tokens], x[:, self.num_prefix_tokens:]
        grid = grid.transpose(1, 2).unflatten(2, (self.grid_size[0], self.grid_size[1]))
        means = F.avg_pool2d(grid, self.pool_size, ceil_mode=True, count_include_pad=False)  # ONNX's ceil_mode pads
        centroids = torch.cat([prefix, means.flatten(2).transpose(1, 2)], dim=1)
        centroids = centroids + self.drop_path1(self.ls1(self.attn(self.norm1(centroids), self.norm1(x))))
        return centroids + self.drop_path2(self.ls2(self.mlp(self.norm2(centroids))))


class CentroidTransformer(VisionTransformer):
    """ Centroid Transformer

    timm's `VisionTransformer` with one block of centroid attention; keys of a plain ViT checkpoint match one to one. A
    question, in the class token, is a centroid of its own, and so competes for the image's tokens.
    """

    def __init__(self, *args, centroid_index: int = 6, centroid_pool: int = 2, **kwargs) -> None:
        """
        Args:
            *args: As `VisionTransformer`.
            centroid_index: Index of the block of centroid attention, the number of blocks over all tokens before it.
            centroid_pool: Side of the square of tokens that a centroid starts from: M = N / side^2.
            **kwargs: As `VisionTransformer`, except for other blocks and what leaves no full grid of one size.

        Raises:
            ValueError: An option of other blocks, or a size that is not possible.
        """
        kwargs = reject_arguments(
            self, args, kwargs, 'centroids start from the means of a full grid of tokens of one size',
            attn_layer=None, block_fn=None, dynamic_img_size=False, dynamic_img_pad=False, patch_drop_rate=0.,
        )
        check_at_least(0, centroid_index=centroid_index)
        check_at_least(1, centroid_pool=centroid_pool)

        def block_fn(**block_kwargs) -> nn.Module:
            if block_kwargs['depth'] != centroid_index:
                return Block(**block_kwargs)
            return CentroidBlock(self.patch_embed.grid_size, self.num_prefix_tokens, centroid_pool, **block_kwargs)

        super().__init__(block_fn=block_fn, **kwargs)
        if centroid_index >= len(self.blocks):
            raise ValueError(f'centroid_index={centroid_index} must be below the number of blocks, {len(self.blocks)}.')
        for info in self.feature_info[centroid_index:]:
            info['reduction'] *= centroid_pool
        self.centroid_pool = centroid_pool

    def set_input_size(self, *args, **kwargs) -> None:
        """As `VisionTransformer`; the number of centroids changes with that of the patches."""
        super().set_input_size(*args, **kwargs)
        for block in self.blocks:
            if isinstance(block, CentroidBlock):
                block.grid_size = self.patch_embed.grid_size

    def forward_intermediates(
            self, x: torch.Tensor, indices: Optional[Union[int, List[int]]] = None, return_prefix_tokens: bool = False,
            norm: bool = False, stop_early: bool = False, output_fmt: str = 'NCHW', *args, **kwargs) -> Any:
        """As `VisionTransformer`; the grid is one of centroids from their block on."""
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        output = super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, 'NLC', *args, **kwargs)
        if output_fmt == 'NLC':
            return output
        H, W = self.patch_embed.grid_size
        centroid_grid = -(-H // self.centroid_pool), -(-W // self.centroid_pool)

        def to_grid(y: Any) -> Any:
            """Tokens or centroids (B, N, E) as (B, E, H, W)."""
            if isinstance(y, tuple):  # beside prefix tokens
                return to_grid(y[0]), y[1]
            return y.transpose(1, 2).unflatten(2, (H, W) if y.shape[1] == H * W else centroid_grid).contiguous()

        if isinstance(output, dict):
            return {**output, 'image_intermediates': [to_grid(y) for y in output['image_intermediates']]}
        if isinstance(output, tuple):
            return output[0], [to_grid(y) for y in output[1]]
        return [to_grid(y) for y in output]


class QuestionCentroidTransformer(QuestionViT, CentroidTransformer):
    """ Centroid Transformer that takes questions """


default_cfgs = generate_default_cfgs({
    'centroid_transformer_small.untrained': cifar_cfg(),
    'centroid_transformer_base.untrained': cifar_cfg(),
    'test_centroid_transformer.untrained': cifar_cfg(),
})


_create_centroid = partial(build_vit, CentroidTransformer, QuestionCentroidTransformer, checkpoint_filter_fn)


@register_model
def centroid_transformer_small(pretrained: bool = False, **kwargs) -> CentroidTransformer:
    """ Centroid Transformer, 1 block before and 1 after the centroid block, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=640, depth=3, num_heads=10, centroid_index=1)
    return _create_centroid('centroid_transformer_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def centroid_transformer_base(pretrained: bool = False, **kwargs) -> CentroidTransformer:
    """ Centroid Transformer, 6 blocks before and 5 after the centroid block, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=12, num_heads=12, centroid_index=6)
    return _create_centroid('centroid_transformer_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_centroid_transformer(pretrained: bool = False, **kwargs) -> CentroidTransformer:
    """ Centroid Transformer for unit tests. """
    model_args = dict(CIFAR_ARGS, embed_dim=64, depth=3, num_heads=2, centroid_index=1)
    return _create_centroid('test_centroid_transformer', pretrained=pretrained, **dict(model_args, **kwargs))
