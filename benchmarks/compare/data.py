""" Data sets in memory, batches of them, and augmentation.

Random numbers come from a generator on the CPU, so that every device sees the same batches.
"""
import dataclasses
from pathlib import Path
from typing import BinaryIO, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from timm.data import create_dataset, create_transform, resolve_model_data_config

from timm_ait.cli import blame
from timm_ait.data import SortOfClevr
from timm_ait.data.sort_of_clevr import ANSWERS, KINDS, QUESTION_DIM

from .recipe import Recipe


@dataclasses.dataclass
class Split:
    """A split in memory; an item is an image and its target, or one of several questions about an image.

    Attributes:
        images: (n, C, H, W) uint8.
        image_of: Image of each item (T,).
        targets: (T,).
        class_names: In the order of the targets.
        mean: What pixels in [0, 1] are normalised with, one number or per channel (C, 1, 1).
        std: Likewise.
        questions: (T, Q) uint8, or None.
        groups: Kind of each question (T,), an index of `group_names`, or None.
        group_names: Kinds of questions.
    """
    images: torch.Tensor
    image_of: torch.Tensor
    targets: torch.Tensor
    class_names: Tuple[str, ...]
    mean: Union[float, torch.Tensor] = 0.5
    std: Union[float, torch.Tensor] = 0.5
    questions: Optional[torch.Tensor] = None
    groups: Optional[torch.Tensor] = None
    group_names: Tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> 'Split':
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{key: tensor.to(device) for key, tensor in tensors.items()})

    def batch(
            self,
            items: torch.Tensor,
            recipe: Optional[Recipe] = None,
            generator: Optional[torch.Generator] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor, Dict[str, torch.Tensor]]:
        """Normalised images, targets, and the further arguments of the model.

        Args:
            items: Numbers of the items (B,).
            recipe: How to augment the images; not at all if None.
            generator: Of the augmentation, on the CPU.
        """
        items = items.to(self.targets.device)
        images = self.images[self.image_of[items]].float().div_(255.)
        if recipe is not None:
            images = augment(images, recipe, generator)
        images = images.sub_(self.mean).div_(self.std)
        kwargs = {} if self.questions is None else {'question': self.questions[items].float()}
        return images, self.targets[items], kwargs


def load_image_folder(data_dir: str, split: str, image_size: int, in_chans: int) -> Split:
    """Read `split/class/image` files, scaled to a size.

    Raises:
        ValueError: There is no such folder, there are no images in it, or one is damaged.
    """
    if not Path(data_dir).is_dir():
        raise ValueError(f'there is no folder {data_dir}')
    transform = transforms.Compose([
        transforms.Resize((image_size, image_size), transforms.InterpolationMode.BICUBIC), transforms.PILToTensor()])
    try:
        dataset = create_dataset('', data_dir, split=split)
    except RuntimeError as e:
        raise ValueError(f'there are no images {data_dir}/{split}/<class>/*') from e
    if Path(dataset.reader.root) == Path(data_dir):  # where timm reads if there is no folder of the split
        raise ValueError(f'there is no folder {data_dir}/{split}')

    def read(file: BinaryIO) -> torch.Tensor:
        with blame(f'{file.name} cannot be read'):
            return transform(Image.open(file).convert('L' if in_chans == 1 else 'RGB'))

    # the data set itself would give the next image for one that is damaged
    images, targets = zip(*[(read(file), target) for file, target in dataset.reader])
    return Split(
        images=torch.stack(images), image_of=torch.arange(len(images)), targets=torch.tensor(targets),
        class_names=tuple(dataset.reader.class_to_idx))


def load_images(
        folder: Union[str, Path],
        model: torch.nn.Module,
        num_images: Optional[int] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Validation images (n, C, H, W) as a pretrained model wants them, and labels (n,), classes mixed.

    Args:
        folder: ImageFolder, or the folder of its splits.
        model: Pretrained model.
        num_images: How many, spread evenly over the folder; all if None.

    Raises:
        ValueError: The folder has images of other classes than the model, or in another order.
    """
    if not Path(folder).is_dir():
        raise ValueError(f'there is no folder {folder}')
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = create_dataset('', root=str(folder), split='validation', transform=transform)
    if len(dataset.reader.class_to_idx) != model.num_classes:
        raise ValueError(f'{folder} has images of {len(dataset.reader.class_to_idx)} classes, not {model.num_classes}')
    classes = list(dataset.reader.class_to_idx)
    if not all(Path(dataset.reader.root, name).is_dir() for name in classes):  # timm takes folders of splits together
        raise ValueError(f'{folder} has no folder validation')
    if list(model.pretrained_cfg.get('label_names') or classes) != classes:
        raise ValueError(f'{folder} has other classes than the model, or in another order')
    count = min(num_images or len(dataset), len(dataset))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    images, labels = zip(*(dataset[i * len(dataset) // count] for i in order))
    return torch.stack(images), torch.tensor(labels)


def load_sort_of_clevr(data_dir: str, split: str, kinds: Sequence[str]) -> Split:
    """Read the questions of some kinds, and their images.

    Raises:
        OSError: The folder holds no such split, or its file is damaged.
    """
    data = SortOfClevr(data_dir, split, kinds)
    questions = torch.from_numpy(data.questions.reshape(-1, QUESTION_DIM))
    return Split(
        images=torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous(),
        image_of=torch.arange(len(data.images)).repeat_interleave(data.answers.shape[1]),
        targets=torch.from_numpy(data.answers.reshape(-1)).long(),
        class_names=ANSWERS,
        questions=questions,
        groups=questions[:, 12:15].argmax(-1),
        group_names=KINDS,
    )


def load_split(recipe: Recipe, data_dir: str, split: str) -> Split:
    """Read a split of a recipe's data, normalised as the recipe says.

    Raises:
        OSError: A split of Sort-of-CLEVR is missing or damaged.
        ValueError: A folder of images is missing.
    """
    if recipe['dataset'] == 'sort_of_clevr':
        read = load_sort_of_clevr(data_dir, split, recipe['kinds'])
    else:
        read = load_image_folder(data_dir, split, recipe['image_size'], recipe['in_chans'])
    read.mean, read.std = (torch.tensor(recipe[key])[:, None, None] for key in ('mean', 'std'))
    return read


def _windows(images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Windows (B, C, height, width) of images, whose other side follows on their edge, at corners (B, 1)."""
    batch_size, channels, rows, columns = images.shape
    device = images.device
    return images[
        torch.arange(batch_size, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        ((top + torch.arange(height, device=device)) % rows)[:, None, :, None],
        ((left + torch.arange(width, device=device)) % columns)[:, None, None, :],
    ]


def _random_corner(images: torch.Tensor, axis: int, generator: torch.Generator) -> torch.Tensor:
    """Where along an axis a window has to begin (B, 1) to have all that is not black at a random place."""
    shown = images.amax(dim=(1, axis)) > 0
    first = shown.int().argmax(dim=1, keepdim=True)
    free = first + shown.flip(1).int().argmax(dim=1, keepdim=True)
    place = (torch.rand(len(images), 1, generator=generator).to(images.device) * (free + 1)).long()
    return first - place


def augment(images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Flip, shift and place images (B, C, H, W) at random, as the recipe says; black is zero."""
    batch_size, _, height, width = images.shape
    for name, flip in (
            ('hflip', lambda x: x.flip(-1)), ('vflip', lambda x: x.flip(-2)), ('transpose', lambda x: x.mT)):
        if recipe[name]:
            flipped = torch.rand(batch_size, 1, 1, 1, generator=generator).to(images.device) < 0.5
            images = torch.where(flipped, flip(images), images)
    padding = recipe['crop_padding']
    if padding:
        images = F.pad(images, (padding,) * 4, mode=recipe['padding_mode'])
        top, left = torch.randint(2 * padding + 1, (2, batch_size, 1), generator=generator).to(images.device)
        images = _windows(images, top, left, height, width)
    if recipe['place']:
        top, left = (_random_corner(images, axis, generator) for axis in (-1, -2))
        images = _windows(images, top, left, height, width)
    return images
