""" Small models and images of these tests. """
from typing import Dict, Tuple

import torch
import torch.nn as nn

import timm

import timm_ait  # noqa: F401, registers the models

# a small body of any timm transformer, and its workspaces
BODY = dict(img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2, num_classes=5)
WORKSPACE = dict(num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=16)


def make_model(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def open_gates(model: nn.Module) -> nn.Module:
    """Let gated workspaces, which start as the identity, change what the model computes."""
    for name, parameter in model.named_parameters():
        if name.endswith('workspace.gate'):
            nn.init.ones_(parameter)
    return model


def images(
        batch_size: int = 4,
        size: int = 32,
        in_chans: int = 3,
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, in_chans, size, size, generator=generator, dtype=dtype)


def make_and_ask(name: str, **kwargs) -> Tuple[nn.Module, torch.Tensor, Dict[str, torch.Tensor]]:
    """A model with its gates open, images of its size, and further arguments of its forward: a question."""
    model = open_gates(make_model(name, **kwargs))
    asked = {'question': torch.randn(4, kwargs['question_dim'])} if kwargs.get('question_dim') else {}
    return model, images(size=kwargs.get('img_size', 32), in_chans=kwargs.get('in_chans', 3)), asked


def load(name: str, weights: Dict[str, torch.Tensor], **kwargs) -> nn.Module:
    """A model with pretrained weights, as timm adapts and loads them."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(weights)), **kwargs)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)
