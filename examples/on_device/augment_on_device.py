""" Augmentation of batches on their device, for `train_on_device.py`.

Images are (B, 3, H, W) in [0, 1] unless said otherwise, and every image draws its own. All that moves pixels is one
resampling. Operations are those of RandAugment (https://arxiv.org/abs/1909.13719), of which an image gets at most one
that recolours and one that distorts, as TrivialAugment (https://arxiv.org/abs/2103.10158) draws them.
"""
import argparse
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = ['Augmentation']


def uniform(size: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(size, device=generator.device).uniform_(low, high, generator=generator)


def chosen(size: int, num_choices: int, prob: float, generator: torch.Generator) -> torch.Tensor:
    """One of the choices, or with probability 1 - prob none: -1."""
    choice = torch.randint(num_choices, (size,), generator=generator, device=generator.device)
    return choice.where(uniform(size, 0, 1, generator) < prob, -1)


def crops(
        size: int,
        shape: Tuple[int, int],
        padding: int,
        scale: Optional[Tuple[float, float]],
        ratio: Tuple[float, float],
        generator: torch.Generator,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Extent and centre (B, 2) of random crops, x first, as shares of the image's half sides.

    Args:
        size: Number of crops B.
        shape: Height and width of the image.
        padding: Pixels by which crops are shifted at most; shifts are whole pixels, which need no interpolation.
        scale: Range of the area of a random resized crop, as a share of the image's; less where it would be wider or
            higher than the image.
        ratio: Range of its width to height, relative to the image's.
    """
    if scale is None:
        shifts = torch.randint(-padding, padding + 1, (size, 2), generator=generator, device=generator.device)
        shares = torch.stack([2 * shifts[:, 0] / shape[1], 2 * shifts[:, 1] / shape[0]], dim=1)
        return torch.ones_like(shares), shares
    area = uniform(size, *scale, generator)
    aspect = uniform(size, *map(math.log, ratio), generator).exp()
    extent = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp(max=1.)
    return extent, (1 - extent) * torch.stack([uniform(size, -1, 1, generator) for _ in range(2)], dim=1)


def distortions(size: int, prob: float, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Affine maps (B, 3, 3): a rotation, shear, shift or zoom, or with probability 1 - prob the identity."""
    choice = chosen(size, 6, prob, generator)
    x = uniform(size, -1, 1, generator) * strength
    zero = torch.zeros_like(x)

    def only(operation: int, values: torch.Tensor) -> torch.Tensor:
        return values.where(choice == operation, zero)

    angle = only(0, x * math.pi / 4)
    zoom = only(5, x * 0.4).exp()
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack([
        cos, only(1, x * 0.6) - sin, only(2, x * 0.8),
        only(3, x * 0.6) + sin, cos, only(4, x * 0.8),
        zero, zero, zero + 1], dim=1).view(-1, 3, 3)


def recolour(images: torch.Tensor, prob: float, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Change brightness, contrast, saturation or sharpness, posterise, solarise or stretch the contrast."""
    size = len(images)
    choice = chosen(size, 7, prob, generator).view(-1, 1, 1, 1)
    x = uniform(size, -1, 1, generator).view(-1, 1, 1, 1) * strength
    gray = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    # each is a distance from an image that lacks what is changed
    lacking = torch.where(choice == 0, 0., images)
    lacking = torch.where(choice == 1, gray.mean((2, 3), keepdim=True), lacking)
    lacking = torch.where(choice == 2, gray, lacking)
    lacking = torch.where(choice == 3, F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False), lacking)
    images = torch.lerp(lacking, images, 1 + 0.9 * x).clamp(0., 1.)
    step = 2 ** (1 + 5 * x.abs()).floor()  # of gray levels: 2 to 32
    images = torch.where(choice == 4, (images * 255 / step).floor() * step / 255, images)
    images = torch.where((choice == 5) & (images > 1 - 0.8 * x.abs()), 1 - images, images)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where((choice == 6) & (high > low), (images - low) / (high - low).clamp(min=1e-3), images)


class Augmentation:
    """Crop, flip, distort and recolour. All that moves pixels is one resampling."""

    def __init__(self, args: argparse.Namespace, output_size: Tuple[int, int], generator: torch.Generator) -> None:
        self.args, self.output_size, self.generator = args, tuple(output_size), generator

    def __call__(self, images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: (B, 3, H, W), bytes.
            flip: (B,), which of them to mirror.

        Returns:
            (B, 3, *output_size), floats in [0, 1].
        """
        args, generator, size = self.args, self.generator, len(images)
        extent, centre = crops(size, images.shape[-2:], args.crop_padding, args.scale, args.ratio, generator)
        mirror = torch.where(flip, -1., 1.)
        crop = torch.zeros(size, 2, 3, device=images.device)
        crop[:, 0, 0], crop[:, 1, 1], crop[:, :, 2] = extent[:, 0] * mirror, extent[:, 1], centre
        maps = crop @ distortions(size, args.aa_prob, args.aa_strength, generator)
        grid = F.affine_grid(maps, [size, 3, *self.output_size], align_corners=False)
        images = F.grid_sample(
            images.float() / 255, grid, mode=args.train_interpolation, padding_mode='reflection', align_corners=False)
        images = images.clamp(0., 1.)
        if args.aa_prob > 0:
            images = recolour(images, args.aa_prob, args.aa_strength, generator)
        return images
