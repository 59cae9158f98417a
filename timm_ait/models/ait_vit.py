""" Associative Transformers in the bodies of timm's ViTs, with their published weights

Each model is timm's ViT of the same name with gated workspaces in its blocks, and has the ViT's pretrained tags: the
weights are timm's on the Hub, and the workspaces start as the identity, so the logits are exactly the ViT's until
fine-tuning opens the gates.

The gradient of the balance loss reaches the pretrained body from the first step, which made no difference where it was
measured (benchmarks/RESULTS.md); `balance_weight=0.` turns it off.

Papers: `Associative Transformer` - https://arxiv.org/abs/2309.12862
    `An Image is Worth 16x16 Words` - https://arxiv.org/abs/2010.11929
    `How to train your ViT?` - https://arxiv.org/abs/2106.10270
    `DINOv2: Learning Robust Visual Features without Supervision` - https://arxiv.org/abs/2304.07193
"""
import dataclasses
from functools import partial
from typing import Dict

from timm.models import PretrainedCfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model

from timm_ait.weights import shipped_cfg

from ._builder import build_vit, cifar_cfg
from .associative_transformer import AssociativeTransformer, QuestionAssociativeTransformer
from .from_timm import checkpoint_filter_fn


def _cfgs(*vits: str) -> Dict[str, PretrainedCfg]:
    """timm's cfgs for the weights on the Hub, under the names of these models."""
    return {
        f'ait_{name}': dataclasses.replace(cfg, url=None, custom_load=False)  # the Hub has timm's own format
        for vit in vits for name, cfg in get_arch_pretrained_cfgs(vit).items() if cfg.hf_hub_id
    }


default_cfgs = generate_default_cfgs({
    **_cfgs(
        'vit_tiny_patch16_224', 'vit_small_patch16_224', 'vit_base_patch16_224', 'vit_small_patch14_dinov2'),
    'ait_vit_small_patch14_dinov2.pets': cifar_cfg(**shipped_cfg('ait_vit_small_patch14_dinov2.pets')),
    'test_ait_vit.r160_in1k': _cfgs('test_vit')['ait_test_vit.r160_in1k'],
})


_create_ait_vit = partial(
    build_vit, AssociativeTransformer, QuestionAssociativeTransformer, checkpoint_filter_fn, gated=True)


@register_model
def ait_vit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT in the body of ViT-Tiny, 12 blocks, 192 wide. """
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_ait_vit('ait_vit_tiny_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_vit_small_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT in the body of ViT-Small, 12 blocks, 384 wide. """
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_ait_vit('ait_vit_small_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_vit_base_patch16_224(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT in the body of ViT-Base, 12 blocks, 768 wide. """
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create_ait_vit('ait_vit_base_patch16_224', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ait_vit_small_patch14_dinov2(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT in the body of DINOv2's ViT-Small, 12 blocks, 384 wide, with layer scale. """
    model_args = dict(patch_size=14, embed_dim=384, depth=12, num_heads=6, init_values=1e-5)
    return _create_ait_vit('ait_vit_small_patch14_dinov2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_ait_vit(pretrained: bool = False, **kwargs) -> AssociativeTransformer:
    """ AiT in the body of timm's ViT for unit tests. """
    model_args = dict(
        patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3, dynamic_img_size=True,
        num_slots=8, slot_dim=16, workspace_heads=4, bottleneck=16)
    return _create_ait_vit('test_ait_vit', pretrained=pretrained, **dict(model_args, **kwargs))
