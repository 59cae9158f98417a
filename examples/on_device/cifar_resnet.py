""" Residual networks for images of 32 px, teachers.

They follow section 4.2 of `Deep Residual Learning for Image Recognition` (https://arxiv.org/abs/1512.03385), whose
shortcuts have no parameters. Weights for 20, 32, 44 and 56 layers, trained on CIFAR-10 as PNG, are published in
https://github.com/akamaster/pytorch_resnet_cifar10; `--init` of train_on_device.py takes these files.
"""
import re
from typing import Any, Dict

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

__all__ = ['CifarResNet']

WIDTHS = (16, 32, 64)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which takes every second pixel and adds channels of zeros as needed."""

    def __init__(self, in_chs: int, out_chs: int, **dd) -> None:
        super().__init__()
        self.stride, self.more_chs = out_chs // in_chs, out_chs - in_chs
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, self.stride, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(out_chs, **dd)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(out_chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.more_chs // 2, self.more_chs // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Three stages of residual blocks, and the mean of each feature."""

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            depth: int = 9,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            num_classes: Number of classes.
            in_chans: Number of channels of the image.
            depth: Blocks of a stage; there are 6 * depth + 2 layers.
            drop_rate: Dropout rate before the classifier.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, WIDTHS[-1]
        self.conv = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(WIDTHS[0], **dd)
        self.stages = nn.Sequential(*[
            nn.Sequential(*[ResidualBlock(width if i else before, width, **dd) for i in range(depth)])
            for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS)])
        self.head_drop = nn.Dropout(drop_rate)
        self.linear = nn.Linear(self.num_features, num_classes, **dd)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # what oneDNN's and cuDNN's convolutions work in
        return self.stages(F.relu(self.norm(self.conv(x))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.linear(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename published weights, whose layers have torchvision's names."""
    renamed = {}
    for name, value in state_dict.items():
        name = re.sub(r'^layer(\d)', lambda match: f'stages.{int(match[1]) - 1}', name)
        name = re.sub(r'^(conv|bn)1\.', r'\1.', name)
        renamed[name.replace('bn', 'norm')] = value
    return renamed


def _cfg() -> Dict[str, Any]:
    return dict(
        num_classes=10, input_size=(3, 32, 32), pool_size=None, crop_pct=1.0, interpolation='bilinear',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), first_conv='conv', classifier='linear')


default_cfgs = generate_default_cfgs({f'cifar_resnet{num_layers}': _cfg() for num_layers in (20, 32, 44, 56)})


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ Residual network of 20 layers, 0.27M parameters. """
    return _create_cifar_resnet('cifar_resnet20', pretrained, **dict(dict(depth=3), **kwargs))


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ Residual network of 32 layers, 0.46M parameters. """
    return _create_cifar_resnet('cifar_resnet32', pretrained, **dict(dict(depth=5), **kwargs))


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ Residual network of 44 layers, 0.66M parameters. """
    return _create_cifar_resnet('cifar_resnet44', pretrained, **dict(dict(depth=7), **kwargs))


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ Residual network of 56 layers, 0.85M parameters. """
    return _create_cifar_resnet('cifar_resnet56', pretrained, **dict(dict(depth=9), **kwargs))
