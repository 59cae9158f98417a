""" An AiT goes wherever timm's ViT goes. The models and inputs of these tests. """
from typing import List

import torch
import torch.nn as nn

import tests.models
import timm_ait
from timm_ait.layers import GlobalWorkspace

TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def make_ait(**kwargs) -> nn.Module:
    """A small AiT in evaluation whose memories are not the initial ones any more."""
    model = tests.models.make_model('test_ait', **{**dict(img_size=16, depth=2, num_classes=5), **kwargs})
    train(model, 2)
    return model.eval()


@torch.enable_grad()
def train(model: nn.Module, num_steps: int, lr: float = 0.02, size: int = 16) -> None:
    """Steps of the optimizer on noise, with what requires a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    model.train()
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(4, size, seed=step)), torch.arange(4))
        (loss + timm_ait.balance_loss(model)).backward()
        optimizer.step()


def images(batch_size: int = 2, size: int = 16, **kwargs) -> torch.Tensor:
    return tests.models.images(batch_size, size, **kwargs)


def workspaces(model: nn.Module) -> List[GlobalWorkspace]:
    return [module for module in model.modules() if isinstance(module, GlobalWorkspace)]


def memories(model: nn.Module) -> List[torch.Tensor]:
    return [workspace.memory.clone() for workspace in workspaces(model)]


def other_memory(*models: nn.Module) -> None:
    """Put other memories into models, in place, the same into all."""
    for model in models:
        for workspace in workspaces(model):
            workspace.memory.copy_(torch.eye(*workspace.memory.shape))
