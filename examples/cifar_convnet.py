""" A small convolutional classifier for images of 32 px, the first teacher of `ait_small.cifar10`.

timm's train.py finds it with `--device-modules timm_ait examples.cifar_convnet`, run from the top of the checkout with
`PYTHONPATH=.`. As `--kd-model-name` it has the weights that `examples/cifar10_teacher.yaml` trains.
"""
from typing import Tuple

import torch
import torch.nn as nn

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

__all__ = ['CifarConvNet']


class ConvNormAct(nn.Sequential):

    def __init__(self, in_chs: int, out_chs: int, pool: bool = False, **dd) -> None:
        super().__init__(
            nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False, **dd),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.BatchNorm2d(out_chs, **dd),
            nn.GELU(),
        )


class CifarConvNet(nn.Module):
    """Stages of two convolutions, the first of which halves the image, and the maximum of each feature."""

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            widths: Tuple[int, ...] = (32, 64, 128, 256),
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            num_classes: Number of classes.
            in_chans: Number of channels of the image.
            widths: Of the stem and of each stage.
            drop_rate: Dropout rate before the classifier.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        layers = [ConvNormAct(in_chans, widths[0], **dd)]
        for in_chs, out_chs in zip(widths, widths[1:]):
            layers += [ConvNormAct(in_chs, out_chs, pool=True, **dd), ConvNormAct(out_chs, out_chs, **dd)]
        self.features = nn.Sequential(*layers)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes, bias=False, **dd)
        self.to(memory_format=torch.channels_last)  # what oneDNN's convolutions work in

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x.contiguous(memory_format=torch.channels_last))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(x.amax((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({
    'cifar_convnet.cifar10': dict(
        file='output/train/cifar10_teacher/last.pth.tar', num_classes=10, input_size=(3, 32, 32), pool_size=None,
        crop_pct=1.0, interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, first_conv='features.0.0',
        classifier='fc'),
})


@register_model
def cifar_convnet(pretrained: bool = False, **kwargs) -> CifarConvNet:
    """ Convolutional classifier for 32 px, 1.2M parameters. """
    return build_model_with_cfg(CifarConvNet, 'cifar_convnet', pretrained, **kwargs)
