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
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn

from timm.layers import HybridEmbed, Mlp
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem

from timm_ait.data.sort_of_clevr import ANSWERS, QUESTION_DIM
from timm_ait.data.triangle import CLASSES as TRIANGLE_CLASSES
from timm_ait.layers import QuestionEmbed, WorkspaceMlp, balance_loss, memory_statistics
from timm_ait.weights import create_pretrained, shipped_weights

from ._builder import cifar_cfg

__all__ = ['AssociativeTransformer']


class AttentionFreeBlock(Block):
    """timm's block without its self-attention: what tokens exchange goes through the workspace, linear in their number.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        del self.norm1, self.attn, self.ls1, self.drop_path1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class AssociativeTransformer(VisionTransformer):
    """ Associative Transformer

    timm's `VisionTransformer` with another MLP layer; keys of a plain ViT checkpoint match one to one.

    With `question_dim`, it answers a question about each image: the class token, which the model then has, carries the
    embedded question.
    """

    def __init__(
            self,
            *args,
            num_slots: int = 32,
            slot_dim: int = 32,
            workspace_heads: int = 8,
            bottleneck: Union[int, float] = 512,
            beta: float = 1.,
            retrieval_steps: int = 1,
            memory_momentum: float = 0.9,
            memory_init: str = 'normal',
            memory_update: str = 'orthogonal',
            balance_weight: float = 1e-2,
            write: bool = True,
            retrieval: bool = True,
            differentiable_write: bool = True,
            gated: bool = False,
            reset_memory: bool = False,
            workspace_backend: Optional[str] = None,
            workspace: bool = True,
            attention: bool = True,
            question_dim: int = 0,
            mlp_layer: Type[nn.Module] = WorkspaceMlp,
            **kwargs,
    ) -> None:
        """
        Args:
            *args: As `VisionTransformer`.
            num_slots: Number of slots M of each block's memory.
            slot_dim: Slot width D.
            workspace_heads: Number of write heads A.
            bottleneck: Tokens k a slot and head keep out of the batch's; a float in (0, 1] is a fraction of them.
            beta: Inverse temperature of the retrieval.
            retrieval_steps: Number of retrieval steps.
            memory_momentum: Weight of the memory before a write in the memory after it.
            memory_init: Initial memory, 'normal', 'uniform' or 'identity'.
            memory_update: 'orthogonal' keeps the slots orthonormal, 'normalize' (published) only of unit norm.
            balance_weight: Weight of the balance loss.
            write: Write in training.
            retrieval: Read from the memory.
            differentiable_write: Let the gradient flow through the write of the same step.
            gated: Residual form for transformers trained without a workspace; the layer starts as the identity.
            reset_memory: Start every write from the initial memory, which evaluation reads; nothing is remembered.
            workspace_backend: Fused operators, 'torch' or 'triton'; None takes that of TIMM_AIT_BACKEND, else 'torch'.
            workspace: If False, plain MLPs without workspaces: a ViT of the same size.
            attention: If False, blocks without self-attention.
            question_dim: Width of the question vector that `forward` takes; 0 for none.
            mlp_layer: Workspace MLP layer.
            **kwargs: As `VisionTransformer`.

        Raises:
            ValueError: An argument is out of its range.
        """
        if question_dim:
            kwargs['class_token'] = True
        if not attention:
            kwargs['block_fn'] = AttentionFreeBlock
        super().__init__(
            *args,
            mlp_layer=partial(
                mlp_layer,
                num_slots=num_slots,
                slot_dim=slot_dim,
                num_heads=workspace_heads,
                bottleneck=bottleneck,
                beta=beta,
                retrieval_steps=retrieval_steps,
                momentum=memory_momentum,
                memory_init=memory_init,
                memory_update=memory_update,
                balance_weight=balance_weight,
                write=write,
                retrieval=retrieval,
                differentiable_write=differentiable_write,
                gated=gated,
                reset_memory=reset_memory,
                backend=workspace_backend,
            ) if workspace else Mlp,
            **kwargs,
        )
        self.question_embed = QuestionEmbed(
            question_dim, self.embed_dim, device=kwargs.get('device'), dtype=kwargs.get('dtype'))

    def _add_question(self, x: torch.Tensor, question: Optional[torch.Tensor]) -> torch.Tensor:
        """Add the embedded question (B, Q) to the class token of x (B, N, E)."""
        asked = self.question_embed(question, x.shape[0])
        if self.question_embed.proj is not None:
            assert asked is not None
            x = torch.cat([x[:, :1] + asked, x[:, 1:]], dim=1)
        return x

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            question: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        x = self._pos_embed(self.patch_embed(x))
        x = self._add_question(x, question)
        x = self.norm_pre(self.patch_drop(x))
        if attn_mask is not None:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask)
        elif self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            question: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Classify images, or answer questions about them.

        Args:
            x: Images (B, C, H, W).
            attn_mask: As `VisionTransformer`.
            question: (B, question_dim), for models with questions.

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError: The question is missing, misshapen or not wanted.
        """
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, question=question))

    @torch.jit.ignore
    def forward_intermediates(
            self,
            x: torch.Tensor,
            *args,
            question: Optional[torch.Tensor] = None,
            **kwargs,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """As `VisionTransformer`, with a question (B, question_dim) for models that take one."""
        def add_question(module: nn.Module, inputs: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:
            return self._add_question(inputs[0], question),

        with self.patch_drop.register_forward_pre_hook(add_question):
            return super().forward_intermediates(x, *args, **kwargs)

    @torch.jit.ignore
    def balance_loss(self) -> torch.Tensor:
        """Balance loss of the last training forward, to be added to a custom loop's loss.

        timm's training tasks, and so its `train.py`, add it by themselves.

        Raises:
            RuntimeError: There was no training forward.
        """
        return balance_loss(self)

    @torch.jit.ignore
    def memory_statistics(self) -> Dict[str, Dict[str, float]]:
        """Effective rank, mean cosine and coverage of each block's memory, by module name."""
        return memory_statistics(self)


_CIFAR10_CLASSES = (
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')

_cfg_224 = partial(cifar_cfg, num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9)

default_cfgs = generate_default_cfgs({
    'ait_small.cifar10': cifar_cfg(**shipped_weights('ait_small.cifar10'), label_names=_CIFAR10_CLASSES),
    'ait_small.triangle': cifar_cfg(
        **shipped_weights('ait_small.triangle'), num_classes=2, input_size=(3, 64, 64), mean=(0.005,) * 3,
        std=(0.072,) * 3, label_names=TRIANGLE_CLASSES),
    'ait_medium.untrained': cifar_cfg(),
    'ait_base.untrained': cifar_cfg(),
    'ait_small_patch16_224.untrained': _cfg_224(),
    'ait_medium_patch16_224.untrained': _cfg_224(),
    'ait_base_patch16_224.untrained': _cfg_224(),
    'ait_small_no_workspace.untrained': cifar_cfg(),
    'ait_small_no_write.untrained': cifar_cfg(),
    'ait_small_no_retrieval.untrained': cifar_cfg(),
    'ait_small_no_attention.untrained': cifar_cfg(),
    'ait_small_reset_memory.untrained': cifar_cfg(),
    'ait_small_patch15_75.untrained': cifar_cfg(input_size=(3, 75, 75)),
    'ait_tiny_hybrid_75.sort_of_clevr': cifar_cfg(
        **shipped_weights('ait_tiny_hybrid_75.sort_of_clevr'), input_size=(3, 75, 75),
        first_conv='patch_embed.backbone.0.conv', label_names=ANSWERS),
    'test_ait.untrained': cifar_cfg(),
})


def _create_associative_transformer(variant: str, pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    out_indices = kwargs.pop('out_indices', min(3, kwargs['depth']))
    return create_pretrained(
        AssociativeTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


# the paper's input: 32 px images in 64 patches, average pooling
_CIFAR = dict(img_size=32, patch_size=4, class_token=False, global_pool='avg')


@register_model
def ait_small(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT-Small, 2 blocks, 32 px, patch 4; with the tag triangle, as in the paper, 64 px, patch 32. """
    model_args = dict(_CIFAR, embed_dim=768, depth=2, num_heads=12, variant='ait_small')
    variant = kwargs.get('variant', 'ait_small')
    if resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg')).tag == 'triangle':
        model_args.update(img_size=64, patch_size=32)
    return _create_associative_transformer(pretrained=pretrained, **dict(model_args, **kwargs))


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


@register_model
def ait_small_no_workspace(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ Ablation of AiT-Small: plain MLPs, which is the ViT of the same size. """
    return ait_small(pretrained, variant='ait_small_no_workspace', **dict(dict(workspace=False), **kwargs))


@register_model
def ait_small_no_write(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ Ablation of AiT-Small: the memory stays as it was initialised, only the attractors are learned. """
    return ait_small(pretrained, variant='ait_small_no_write', **dict(dict(write=False), **kwargs))


@register_model
def ait_small_no_retrieval(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ Ablation of AiT-Small: tokens write, and are normalised, but read nothing. """
    return ait_small(pretrained, variant='ait_small_no_retrieval', **dict(dict(retrieval=False), **kwargs))


@register_model
def ait_small_no_attention(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ Ablation of AiT-Small: no self-attention, tokens meet in the workspace alone; linear in their number. """
    return ait_small(pretrained, variant='ait_small_no_attention', **dict(dict(attention=False), **kwargs))


@register_model
def ait_small_reset_memory(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ Ablation of AiT-Small: every step starts from the initial memory. """
    return ait_small(pretrained, variant='ait_small_reset_memory', **dict(dict(reset_memory=True), **kwargs))


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
