""" CIFAR-10 and Sort-of-CLEVR's relational questions, in the memory of the device. """
import contextlib
import dataclasses
import fcntl
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

from benchmarks.compare.data import load_image_folder
from timm_ait.data import SortOfClevr
from timm_ait.data.sort_of_clevr import ANSWERS, QUESTION_DIM

__all__ = ['DATASETS', 'Dataset', 'Split', 'load_splits', 'locked']


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as the published code has it.

    Attributes:
        model_kwargs: The sizes of a model for it.
        padding: Black pixels around an image of which the crop takes some.
        flip: Mirror half of the images.
        mean: What the channels, in [0, 1], are normalised with.
        std: Likewise.
    """
    model_kwargs: Dict[str, int]
    padding: int
    flip: bool
    mean: Tuple[float, float, float]
    std: Tuple[float, float, float]


DATASETS = {
    'cifar10': Dataset(
        model_kwargs=dict(image_size=32, patch_size=4, num_classes=10),
        padding=4,
        flip=True,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    'sort_of_clevr': Dataset(
        model_kwargs=dict(image_size=75, patch_size=15, num_classes=len(ANSWERS), question_dim=QUESTION_DIM),
        padding=0,
        flip=False,
        mean=(0., 0., 0.),
        std=(1., 1., 1.),
    ),
}


class Split:
    """Images and what is asked about them; an item is an image, or a question about one."""

    def __init__(
            self,
            dataset: Dataset,
            images: torch.Tensor,
            targets: torch.Tensor,
            image_of: Optional[torch.Tensor] = None,
            questions: Optional[torch.Tensor] = None,
    ) -> None:
        """
        Args:
            dataset: What they are of.
            images: (n, 3, H, W) uint8.
            targets: (T,).
            image_of: Image of each item (T,), the item's own number if None.
            questions: (T, Q) uint8, or None.
        """
        self.dataset = dataset
        self.size = images.shape[-1]
        self.images = F.pad(images, (dataset.padding,) * 4)
        self.targets = targets
        self.image_of = image_of
        self.questions = questions
        self.mean, self.std = (
            torch.tensor(values, device=images.device).view(3, 1, 1) for values in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self.targets)

    def random_views(self, num_items: int, generator: torch.Generator) -> torch.Tensor:
        """What an epoch shows, in random order: items, upper and left edges and flips (4, num_items)."""
        device = self.targets.device
        items = torch.randperm(len(self), generator=generator, device=device)[:num_items]
        edges = torch.randint(2 * self.dataset.padding + 1, (2, num_items), generator=generator, device=device)
        flips = torch.randint(1 + self.dataset.flip, (1, num_items), generator=generator, device=device)
        return torch.cat([items[None], edges, flips])

    def plain_views(self, items: torch.Tensor) -> torch.Tensor:
        """Items (B,) as they are, for `batch` (4, B)."""
        edges = torch.full_like(items, self.dataset.padding)
        return torch.stack([items, edges, edges, torch.zeros_like(items)])

    def batch(self, views: torch.Tensor) -> Tuple[Tuple[torch.Tensor, ...], torch.Tensor]:
        """What a model is given, normalised images and perhaps questions, and the targets, of views (4, B)."""
        items, top, left, flip = views.unsqueeze(-1).unbind()
        pixel = torch.arange(self.size, device=items.device)
        rows = top + pixel
        columns = left + torch.where(flip == 1, self.size - 1 - pixel, pixel)
        items = items[:, 0]
        images = items if self.image_of is None else self.image_of[items]
        channels = torch.arange(3, device=items.device)[:, None, None]
        pixels = self.images[images[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
        inputs = ((pixels / 255. - self.mean) / self.std,)
        if self.questions is not None:
            inputs += (self.questions[items].float(),)
        return inputs, self.targets[items]


@contextlib.contextmanager
def locked(file: Optional[Path]) -> Iterator[None]:
    """Hold a lock that processes share by the name of a file; none if None."""
    if file is None:
        yield
        return
    with open(file, 'w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_cifar10(data_dir: str, split: str) -> Dict[str, torch.Tensor]:
    read = load_image_folder(data_dir, split, 32, 3)
    return dict(images=read.images, targets=read.targets)


def _read_sort_of_clevr(data_dir: str, split: str) -> Dict[str, torch.Tensor]:
    data = SortOfClevr(data_dir, split, ['relational'])
    return dict(
        images=torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous(),
        targets=torch.from_numpy(data.answers).flatten().long(),
        image_of=torch.arange(len(data.images)).repeat_interleave(data.answers.shape[1]),
        questions=torch.from_numpy(data.questions).flatten(0, 1),
    )


def load_splits(name: str, data_dir: str, cache: Optional[Path], device: torch.device) -> Tuple[Split, Split]:
    """Read the training and validation split onto a device.

    Args:
        name: One of `DATASETS`.
        data_dir: `train/<class>/*` and `validation/<class>/*`, or the folder of `python -m timm_ait data`.
        cache: File that keeps the decoded images for the next process, which then reads nothing else; none if None.
        device: Where the tensors go.

    Raises:
        FileNotFoundError: A split of Sort-of-CLEVR is missing.
        ValueError: A folder of images is missing or empty.
    """
    read = {'cifar10': _read_cifar10, 'sort_of_clevr': _read_sort_of_clevr}[name]
    with locked(cache and cache.with_suffix('.lock')):
        if cache is not None and cache.is_file():
            tensors: Dict[str, Any] = torch.load(cache)
        else:
            tensors = {split: read(data_dir, split) for split in ('train', 'validation')}
            if cache is not None:
                partial = cache.with_suffix('.partial')
                torch.save(tensors, partial)
                partial.replace(cache)
    return tuple(
        Split(DATASETS[name], **{key: tensor.to(device) for key, tensor in tensors[split].items()})
        for split in ('train', 'validation'))
