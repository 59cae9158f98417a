""" An AiT goes wherever timm's ViT goes. The models and inputs of these tests. """
import os
import subprocess
import sys
from pathlib import Path
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


def make_vit(**kwargs) -> nn.Module:
    """The same model without workspaces: timm's ViT."""
    return make_ait(workspace=False, **kwargs)


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


def other_memory(model: nn.Module) -> None:
    """Put other memories into a model, in place."""
    for workspace in workspaces(model):
        workspace.memory.data = nn.init.orthogonal_(torch.empty_like(workspace.memory))
    model.eval()


def run_without_timm_ait(code: str, directory: Path) -> None:
    """Run Python in a directory, in a process that has neither timm_ait nor timm."""
    code += "\nimport sys\nassert not {'timm', 'timm_ait'} & set(sys.modules)\n"
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=directory, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
