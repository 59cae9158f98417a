""" A convolutional classifier for images of 32 px, a teacher.

A network of the kind that `94% on CIFAR-10 in 3.29 Seconds on a Single GPU` (https://arxiv.org/abs/2404.00498) trains:
a frozen first convolution that whitens patches of 2x2, batch norms without scales, convolutions that begin as the
identity.
"""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

__all__ = ['CifarTeacher']

# added to the variance of each principal component of the patches, of pixels in [-1, 1]
_WHITENING_EPS = 1e-4


class Conv(nn.Conv2d):
    """3x3 convolution that begins as the identity in its first channels."""

    def __init__(self, in_chs: int, out_chs: int, **dd) -> None:
        super().__init__(in_chs, out_chs, 3, padding=1, bias=False, **dd)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.weight.is_meta:
            with torch.no_grad():
                nn.init.dirac_(self.weight[:self.in_channels])


class Norm(nn.BatchNorm2d):
    """Batch norm with a bias alone."""

    def __init__(self, num_features: int, **dd) -> None:
        super().__init__(num_features, momentum=0.4, **dd)
        self.weight.requires_grad_(False)


class Stage(nn.Module):
    """Two convolutions, the first of which halves the image, or with a third, which makes the other two residual."""

    def __init__(self, in_chs: int, out_chs: int, residual: bool, **dd) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(in_chs, out_chs, **dd), Norm(out_chs, **dd)
        self.conv2, self.norm2 = Conv(out_chs, out_chs, **dd), Norm(out_chs, **dd)
        self.residual = residual
        if residual:
            self.conv3, self.norm3 = Conv(out_chs, out_chs, **dd), Norm(out_chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(x + self.norm3(self.conv3(y))) if self.residual else y


class CifarTeacher(nn.Module):
    """Whitened patches, stages of convolutions, and the maximum of each feature."""

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            widths: Tuple[int, ...] = (128, 384, 512),
            residual: bool = True,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            num_classes: Number of classes.
            in_chans: Number of channels of the image.
            widths: Of each stage.
            residual: Three convolutions a stage, of which two are residual, rather than two.
            drop_rate: Dropout rate before the classifier.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        self.whiten = nn.Conv2d(in_chans, 2 * 4 * in_chans, 2, **dd)
        self.whiten.weight.requires_grad_(False)
        chs = (self.whiten.out_channels, *widths)
        self.stages = nn.Sequential(*[Stage(*in_out, residual, **dd) for in_out in zip(chs, widths)])
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes, bias=False, **dd)
        self.to(memory_format=torch.channels_last)  # what oneDNN's and cuDNN's convolutions work in

    @torch.no_grad()
    def init_from_images(self, images: torch.Tensor) -> None:
        """Let the first convolution whiten patches of images like these.

        Args:
            images: (B, C, H, W), normalised as in training.
        """
        patches = F.unfold(images.float(), 2).transpose(1, 2).flatten(0, 1)  # (B * (H - 1) * (W - 1), 4 * C)
        variances, components = torch.linalg.eigh(torch.cov(patches.T))
        filters = (components / (variances + _WHITENING_EPS).sqrt()).T
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))
        self.whiten.bias.zero_()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.whiten(x.contiguous(memory_format=torch.channels_last)))
        return self.stages(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(x.amax((2, 3)))
        return x if pre_logits else self.fc(x) / 9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({
    'cifar_teacher.cifar10': dict(
        file='output/cifar10_teacher/model.safetensors', num_classes=10, input_size=(3, 32, 32), pool_size=None,
        crop_pct=1.0, interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, first_conv='whiten',
        classifier='fc'),
})


@register_model
def cifar_teacher(pretrained: bool = False, **kwargs) -> CifarTeacher:
    """ Convolutional classifier for 32 px, 9.9M parameters. """
    return build_model_with_cfg(CifarTeacher, 'cifar_teacher', pretrained, **kwargs)
