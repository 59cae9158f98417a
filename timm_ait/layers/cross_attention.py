""" Multihead attention of one set of tokens to another. """
from typing import Final, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import use_fused_attn


class Attending(nn.Module):
    """Base of layers with the attributes of timm's `Attention`: num_heads, scale, fused_attn and attn_drop."""

    def attend(self, queries: torch.Tensor, keys_values: torch.Tensor) -> torch.Tensor:
        """Multihead attention of queries (B, M, C) to keys and values side by side (B, N, 2 * C), (B, M, C)."""
        q = queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = keys_values.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            x = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return x.transpose(1, 2).flatten(2)


class CrossAttention(Attending):
    """timm's `Attention` with queries from one set of tokens, keys and values from another."""
    fused_attn: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            scale: Optional[float] = None,
            qkv_bias: bool = True,
            proj_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
            **unused,
    ) -> None:
        """As `Attention`, without norms. `scale` multiplies the scores; None is one over the root of the head width."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if dim % num_heads:
            raise ValueError(f'The width, {dim}, must be a multiple of num_heads, got num_heads={num_heads}.')
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.fused_attn = use_fused_attn()

        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What the tokens x (B, M, C) read from those of the context (B, N, C), of the shape of x."""
        return self.proj_drop(self.proj(self.attend(self.q(x), self.kv(context))))
