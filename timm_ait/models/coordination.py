""" Coordination through a shared global workspace

A vision transformer whose tokens, the specialists, do not attend to each other: in every block they compete to write
into a few slots of a memory, which is then broadcast to all of them. Each image has its own memory; it starts from
learned slots and is carried from block to block. Linear in the number of tokens.

Paper: `Coordination Among Neural Modules Through a Shared Global Workspace` - https://arxiv.org/abs/2103.01197
    Anirudh Goyal, Aniket Didolkar, Alex Lamb, Kartikeya Badola, Nan Rosemary Ke, Nasim Rahaman, Jonathan Binas,
    Charles Blundell, Michael Mozer, Yoshua Bengio. ICLR 2022.

Parameters without the classifier: small 15.0M (AiT-Small 15.1M) and base 89.4M (AiT-Base 90.4M). Width, depth and heads
are those of the AiT of the name; the slots are 320 wide, not 768 as the tokens, for the parameters to meet.
"""
import math
from collections import OrderedDict
from functools import partial
from typing import Dict, Set, Tuple

import torch
import torch.nn as nn

from timm.layers import use_fused_attn
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn

from timm_ait.layers._arguments import check_at_least
from timm_ait.layers.cross_attention import Attending

from ._builder import CIFAR_ARGS, MasklessBlock, build_vit, cifar_cfg, reject_arguments, reject_jax
from ._question import QuestionViT

__all__ = ['Coordination']


@torch.fx.wrap
def topk_softmax(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Softmax over the k largest scores of the last dimension, zero elsewhere; a larger k keeps all scores."""
    values, indices = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return scores.clamp(max=float('-inf')).scatter(-1, indices, values).softmax(dim=-1)  # full_like is fixed in ONNX


def join_memory(x: torch.Tensor, memory: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Put a memory (B, M, D) behind the first P of the tokens x (B, P + N, E), into as many as it fills."""
    memory = nn.functional.pad(memory.flatten(1), (0, -(memory.shape[1] * memory.shape[2]) % x.shape[2]))
    memory = memory.view(x.shape[0], memory.shape[1] // x.shape[2], x.shape[2])
    return torch.cat([x[:, :num_prefix_tokens], memory.to(x.dtype), x[:, num_prefix_tokens:]], dim=1)


class LearnedSlots(nn.Module):
    """Puts the initial memory, the same for every image, among the tokens (B, P + N, E), after the first P."""

    def __init__(self, num_slots: int, slot_dim: int, num_prefix_tokens: int, device=None, dtype=None) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.slots = nn.Parameter(torch.empty(1, num_slots, slot_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.slots)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return join_memory(x, self.slots.expand(x.shape[0], -1, -1), self.num_prefix_tokens)


class SharedWorkspace(Attending):
    """Communication of the tokens R (N, E) through the slots M (M, D), in place of self-attention.

    Source: section 2.1 of the paper, steps 2 and 3, and its gated update, that of the relational memory core (Santoro
    et al. 2018) whose input is a mean over the specialists. A head of the write has d = D / slot_heads features, a head
    of the broadcast d = E / num_heads:

        write:      U = topk-softmax((M W_q) (R W_k)^T / sqrt(d)) R W_v, over the tokens, for each slot and head
        gates:      K = mean_i relu(R_i W_1) + tanh(M);  I = sigmoid(K W_I + b_I),  F = sigmoid(K W_F + b_F + 1)
        update:     M <- I * tanh(U) + F * M
        broadcast:  R <- R + softmax((R W_q') (M W_k')^T / sqrt(d)) M W_v' W_o, over the slots, for each token and head

    Choices where the paper leaves one: the softmax runs over the k kept scores alone, so that the weights of a slot
    sum to one; slots may share tokens; the forget gate starts open, by the 1 in its bias; there is a gate per feature;
    the broadcast has an output projection W_o, the write none; R is the normed state, and the residual connection,
    layer scale and drop path are the block's. Blocks do not share parameters.
    """
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            slot_dim: int = 320,
            slot_heads: int = 5,
            bottleneck: int = 5,
            qkv_bias: bool = False,
            proj_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """As timm's `Attention`, whose `num_heads` are those of the broadcast; W_1 has a bias with `proj_bias`.

        Args:
            slot_dim: Slot width D.
            slot_heads: Heads of the write.
            bottleneck: Tokens k that write into a slot, for each head.

        Raises:
            ValueError: A width is no multiple of its number of heads, or a number is not a positive integer.
        """
        super().__init__()
        check_at_least(1, num_heads=num_heads, slot_dim=slot_dim, slot_heads=slot_heads, bottleneck=bottleneck)
        if dim % num_heads or slot_dim % slot_heads:
            raise ValueError(
                f'The token width {dim} must be a multiple of num_heads={num_heads}, and slot_dim={slot_dim} of '
                f'slot_heads={slot_heads}.')
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.slot_heads = slot_heads
        self.slot_dim = slot_dim
        self.bottleneck = bottleneck
        self.slot_scale = (slot_dim // slot_heads) ** -0.5
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()

        self.write_q = nn.Linear(slot_dim, slot_dim, bias=qkv_bias, **dd)
        self.write_kv = nn.Linear(dim, 2 * slot_dim, bias=qkv_bias, **dd)
        self.gate_in = nn.Linear(dim, slot_dim, bias=proj_bias, **dd)
        self.gates = nn.Linear(slot_dim, 2 * slot_dim, **dd)
        self.read_q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.read_kv = nn.Linear(slot_dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def write(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Memory (B, M, D) after the tokens x (B, N, E) have written into it."""
        q = self.write_q(memory).unflatten(-1, (self.slot_heads, -1)).transpose(1, 2)
        k, v = self.write_kv(x).unflatten(-1, (2, self.slot_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = topk_softmax((q * self.slot_scale) @ k.transpose(-2, -1), self.bottleneck)
        update = (self.attn_drop(weights) @ v).transpose(1, 2).reshape(memory.shape)

        gates = self.gates(self.gate_in(x).relu().mean(dim=1, keepdim=True) + memory.tanh())
        input_gate, forget_gate = gates.chunk(2, dim=-1)
        return input_gate.sigmoid() * update.tanh() + (forget_gate + 1.).sigmoid() * memory

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """What the normed tokens x (B, N, E) read after they have written, and the memory (B, M, D) then."""
        memory = self.write(x, memory)
        return self.proj_drop(self.proj(self.attend(self.read_q(x), self.read_kv(memory)))), memory


class CoordinationBlock(MasklessBlock, Block):
    """Pre-norm transformer block with a shared workspace in place of self-attention.

    The memory (B, M, D) is passed on among the tokens: after the first P, in as many tokens as it fills.
    """

    def __init__(self, num_prefix_tokens: int, num_slots: int, slots: Dict[str, int], **kwargs) -> None:
        """As `Block`, after P prefix tokens, with M slots and other arguments of `SharedWorkspace`."""
        super().__init__(**{**kwargs, 'attn_layer': nn.Identity})  # replaced below
        shared = ('dim', 'num_heads', 'qkv_bias', 'proj_bias', 'attn_drop', 'proj_drop', 'device', 'dtype')
        self.attn = SharedWorkspace(**slots, **{name: kwargs[name] for name in shared})
        self.num_slots = num_slots
        self.num_prefix_tokens = num_prefix_tokens
        self.num_memory_tokens = math.ceil(num_slots * self.attn.slot_dim / kwargs['dim'])

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Update the tokens x (B, P + K + N, E), of which K hold the memory."""
        start, stop = self.num_prefix_tokens, self.num_prefix_tokens + self.num_memory_tokens
        size = self.num_slots * self.attn.slot_dim
        memory = x[:, start:stop].flatten(1)[:, :size].reshape(x.shape[0], self.num_slots, self.attn.slot_dim)
        tokens = torch.cat([x[:, :start], x[:, stop:]], dim=1)
        received, memory = self.attn(self.norm1(tokens), memory)
        tokens = tokens + self.drop_path1(self.ls1(received))
        tokens = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        return join_memory(tokens, memory, self.num_prefix_tokens)


class Coordination(VisionTransformer):
    """ Vision transformer coordinated through a shared global workspace

    timm's `VisionTransformer` with other blocks, which pass on a memory per image among the prefix tokens, after class
    token and registers. A question, in the class token, writes into the memory if it wins the competition.
    """

    load_pretrained = reject_jax

    def __init__(
            self,
            *args,
            num_slots: int = 8,
            slot_dim: int = 320,
            slot_heads: int = 5,
            bottleneck: int = 5,
            **kwargs,
    ) -> None:
        """
        Args:
            *args: As `VisionTransformer`.
            num_slots: Number of slots M of the memory.
            slot_dim, slot_heads, bottleneck: As `SharedWorkspace`.
            **kwargs: As `VisionTransformer`, except for the options of its attention and of its blocks.

        Raises:
            ValueError: An argument is out of its range, or is an option of self-attention.
        """
        kwargs = reject_arguments(
            self, args, kwargs, 'this model has no self-attention, and only patches have positions',
            qk_norm=False, scale_attn_norm=False, attn_layer=None, block_fn=None, no_embed_class=True,
        )
        check_at_least(1, num_slots=num_slots)
        slots = dict(slot_dim=slot_dim, slot_heads=slot_heads, bottleneck=bottleneck)

        def block_fn(**block_kwargs) -> nn.Module:
            return CoordinationBlock(self.num_prefix_tokens, num_slots, slots, **block_kwargs)

        super().__init__(block_fn=block_fn, no_embed_class=True, **kwargs)
        if self.pool_include_prefix:
            raise ValueError(
                "pool_include_prefix=True and global_pool='prr' are not supported: prefix tokens hold the memory.")
        memory = LearnedSlots(
            num_slots, slot_dim, self.num_prefix_tokens, device=kwargs.get('device'), dtype=kwargs.get('dtype'))
        self.norm_pre = nn.Sequential(OrderedDict(norm=self.norm_pre, memory=memory))
        self.num_prefix_tokens += -(-num_slots * slot_dim // self.embed_dim)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Set of parameters that should not use weight decay."""
        return super().no_weight_decay() | {'norm_pre.memory.slots'}


class QuestionCoordination(QuestionViT, Coordination):
    """ Coordination that takes questions """


default_cfgs = generate_default_cfgs({
    'coordination_small.untrained': cifar_cfg(),
    'coordination_base.untrained': cifar_cfg(),
    'test_coordination.untrained': cifar_cfg(),
})


_create_coordination = partial(build_vit, Coordination, QuestionCoordination, checkpoint_filter_fn)


@register_model
def coordination_small(pretrained: bool = False, **kwargs) -> Coordination:
    """ Coordination, 2 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=2, num_heads=12)
    return _create_coordination('coordination_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def coordination_base(pretrained: bool = False, **kwargs) -> Coordination:
    """ Coordination, 12 blocks, 32 px, patch 4. """
    model_args = dict(CIFAR_ARGS, embed_dim=768, depth=12, num_heads=12)
    return _create_coordination('coordination_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_coordination(pretrained: bool = False, **kwargs) -> Coordination:
    """ Coordination for unit tests. """
    model_args = dict(
        CIFAR_ARGS, embed_dim=64, depth=3, num_heads=2, num_slots=4, slot_dim=32, slot_heads=2, bottleneck=3)
    return _create_coordination('test_coordination', pretrained=pretrained, **dict(model_args, **kwargs))
