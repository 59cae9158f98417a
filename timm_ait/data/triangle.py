""" Triangle: do the midpoints of three clusters of dots form an equilateral triangle?

The task of `Coordination Among Neural Modules Through a Shared Global Workspace` - https://arxiv.org/abs/2103.01197,
which gives the image size, the three clusters and the question. The rest is chosen here: a cluster is eight white dots
of one pixel, some in the same place, within about 4.5 pixels of their mean, its midpoint; clusters are at least 14
pixels apart, half of the triangles are equilateral (up to the rounding of dots to pixels), and in the others the
longest side exceeds the shortest by at least a tenth of their mean, so that rounding never makes a label wrong.
"""
from pathlib import Path
from typing import Tuple

import numpy as np
from PIL import Image

from .sampling import chunks, first_valid, uniforms

IMAGE_SIZE = 64
NUM_TRAIN = 50_000
NUM_VALIDATION = 10_000
CLASSES = ('equilateral', 'other')

_DOTS = 8
_CLUSTER_RADIUS = 3.
_MIN_SIDE = 14.
_MIN_DIFFERENCE = 0.1
_ATTEMPTS = 16


def _propose(numbers: np.ndarray, equilateral: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Midpoints (n, a, 3, 2) from numbers (n, 7 a), as (n,) are to be equilateral, and which are valid (n, a)."""
    low, high = _CLUSTER_RADIUS + 1., IMAGE_SIZE - 2. - _CLUSTER_RADIUS
    numbers = numbers.reshape(-1, _ATTEMPTS, 7)
    vertices = low + (high - low) * numbers[..., :6].reshape(-1, _ATTEMPTS, 3, 2)
    # an equilateral triangle's third vertex is its second turned by 60 degrees, either way, about the first
    angle = np.where(numbers[..., 6] < 0.5, np.pi / 3, -np.pi / 3)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = np.moveaxis(vertices[..., 1, :] - vertices[..., 0, :], -1, 0)
    third = vertices[..., 0, :] + np.stack([cos * x - sin * y, sin * x + cos * y], -1)
    vertices[equilateral, :, 2] = third[equilateral]
    sides = np.linalg.norm(vertices - np.roll(vertices, 1, axis=-2), axis=-1)
    difference = (sides.max(-1) - sides.min(-1)) / sides.mean(-1)
    valid = (sides.min(-1) >= _MIN_SIDE) & (equilateral[:, None] | (difference >= _MIN_DIFFERENCE))
    return vertices, valid & ((vertices >= low) & (vertices <= high)).all((-2, -1))


def triangles(seed: int, indices: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generate the samples of indices (n,); each depends only on the seed and its own index.

    Returns:
        Images (n, 64, 64) uint8, 0 and 255; labels (n,) as indices of `CLASSES`; midpoints (n, 3, 2) as x, y in pixels.
    """
    numbers = uniforms(seed, indices, 0, 1 + 3 * _DOTS * 2)
    labels = (numbers[:, 0] >= 0.5).astype(np.int64)
    vertices = first_valid(seed, indices, 7 * _ATTEMPTS, _propose, labels == 0)
    # uniform in a disc, then moved so that the mean of the dots is the midpoint
    radius, angle = np.moveaxis(numbers[:, 1:].reshape(-1, 3, _DOTS, 2), -1, 0)
    radius, angle = _CLUSTER_RADIUS * np.sqrt(radius), 2 * np.pi * angle
    dots = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    dots += vertices[:, :, None] - dots.mean(2, keepdims=True)
    x, y = np.moveaxis(np.rint(dots).clip(0, IMAGE_SIZE - 1).astype(np.int64).reshape(-1, 3 * _DOTS, 2), -1, 0)
    images = np.zeros((len(indices), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    images[np.arange(len(indices))[:, None], y, x] = 255
    return images, labels, vertices


def write_triangle(folder: Path, seed: int, num_train: int, num_validation: int) -> None:
    """Write an ImageFolder of PNG files, `train/<class>/00000.png` and `validation/<class>/50000.png`."""
    for split in ('train', 'validation'):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
    for split, indices in chunks(num_train, num_validation, NUM_TRAIN):
        images, labels, _ = triangles(seed, indices)
        for index, image, label in zip(indices, images, labels):
            Image.fromarray(image).save(folder / split / CLASSES[label] / f'{index:05d}.png')
    for empty in (path for path in folder.glob('*/*') if not any(path.iterdir())):
        raise ValueError(f'--{empty.parent.name}: too few, timm would miss the class {empty.name}: write more')
