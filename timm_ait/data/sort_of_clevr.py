""" Sort-of-CLEVR: questions about six coloured squares and circles.

From `A simple neural network module for relational reasoning` (Santoro et al. 2017) - https://arxiv.org/abs/1706.01427,
with the encoding of the usual implementation; its ternary questions have other thresholds, and fewer pairs of objects.

An image is 75 x 75, with one object of each colour, a square of 11 pixels or a circle of that diameter. No two objects
overlap, no centre lies on a middle line, and every object has one nearest and one farthest other.

Question, 18 numbers, zero except for:
    0-5    colour of the object asked about, one-hot (order of `COLOURS`)
    6-11   colour of the second object, one-hot; only in ternary questions
    12-14  kind, one-hot (order of `KINDS`)
    15-17  which of the kind's three questions, one-hot:
        non-relational  the object's shape? is it left of the middle? is it above the middle?
        relational      the shape of the object nearest to it? of that farthest from it? how many others have its shape?
        ternary         how many others lie in the rectangle spanned by the centres of the two? does another's centre
                        lie within 5 pixels of the line through the two? how many others form an obtuse triangle with
                        the two?

Answer, one of ten: yes, no, rectangle, circle, or a count from 0 to 5 (`ANSWERS`).
"""
from pathlib import Path
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from .sampling import chunks, first_valid, uniforms

IMAGE_SIZE = 75
NUM_TRAIN = 9_800
NUM_VALIDATION = 200
QUESTIONS_PER_KIND = 10
QUESTION_DIM = 18
COLOURS = {
    'red': (255, 0, 0),
    'green': (0, 255, 0),
    'blue': (0, 0, 255),
    'orange': (255, 156, 0),
    'grey': (128, 128, 128),
    'yellow': (255, 255, 0),
}
KINDS = ('non_relational', 'relational', 'ternary')
ANSWERS = ('yes', 'no', 'rectangle', 'circle', '0', '1', '2', '3', '4', '5')

_RADIUS = 5
_BACKGROUND = 255
_MIDDLE = IMAGE_SIZE // 2
_ATTEMPTS = 32
_YES, _RECTANGLE, _ZERO = ANSWERS.index('yes'), ANSWERS.index('rectangle'), ANSWERS.index('0')


class Scenes(NamedTuple):
    """Objects in the order of `COLOURS`: centres (n, 6, 2) as x, y in pixels; circles (n, 6) bool, else squares."""
    centres: np.ndarray
    circles: np.ndarray


def _squared_distances(centres: np.ndarray) -> np.ndarray:
    """(..., 6, 2) to (..., 6, 6)."""
    return ((centres[..., :, None, :] - centres[..., None, :, :]) ** 2).sum(-1)


def _propose(numbers: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Centres (n, a, 6, 2) from numbers (n, 12 a), and which are valid (n, a)."""
    # no centre on a middle line: an object is always left or right, above or below
    places = np.setdiff1d(np.arange(_RADIUS, IMAGE_SIZE - _RADIUS), [_MIDDLE])
    centres = places[(numbers * len(places)).astype(np.int64)].reshape(-1, _ATTEMPTS, len(COLOURS), 2)
    apart = np.abs(centres[..., :, None, :] - centres[..., None, :, :]).max(-1) > 2 * _RADIUS
    distances = np.sort(_squared_distances(centres), axis=-1)  # the first is that to itself
    unique = (distances[..., 1] < distances[..., 2]) & (distances[..., -2] < distances[..., -1])
    return centres, (apart | np.eye(len(COLOURS), dtype=bool)).all((-2, -1)) & unique.all(-1)


def scenes(seed: int, indices: np.ndarray) -> Scenes:
    """Place the objects of the images of indices (n,); each depends only on the seed and its own index."""
    centres = first_valid(seed, indices, 2 * len(COLOURS) * _ATTEMPTS, _propose)
    return Scenes(centres, uniforms(seed, indices, 0, len(COLOURS)) < 0.5)


def draw(objects: Scenes) -> np.ndarray:
    """Images (n, 75, 75, 3) uint8 of scenes."""
    images = np.full((len(objects.centres), IMAGE_SIZE, IMAGE_SIZE, 3), _BACKGROUND, np.uint8)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    for i, colour in enumerate(COLOURS.values()):
        dx = x - objects.centres[:, i, 0, None, None]
        dy = y - objects.centres[:, i, 1, None, None]
        circle = dx ** 2 + dy ** 2 <= (_RADIUS + 0.5) ** 2  # as wide as the square's pixels
        square = np.maximum(abs(dx), abs(dy)) <= _RADIUS
        images[np.where(objects.circles[:, i, None, None], circle, square)] = colour
    return images


def encode_questions(first: np.ndarray, second: np.ndarray, kind: np.ndarray, subtype: np.ndarray) -> np.ndarray:
    """Questions (..., 18) uint8 of indices (...) of two `COLOURS`, one of `KINDS` and one of its three questions.

    The second colour counts only in ternary questions.
    """
    objects, of_three = np.eye(len(COLOURS), dtype=np.uint8), np.eye(3, dtype=np.uint8)
    is_ternary = (kind == KINDS.index('ternary'))[..., None].astype(np.uint8)
    return np.concatenate([objects[first], objects[second] * is_ternary, of_three[kind], of_three[subtype]], axis=-1)


def answer_tables(objects: Scenes) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers to every question about scenes, as indices of `ANSWERS`, kinds in the order of `KINDS`.

    Returns:
        Non-relational and relational answers (n, 6, 3) for each object and question, and ternary answers
        (n, 6, 6, 3) for each two objects and question.
    """
    centres, circles = objects
    num_objects = circles.shape[-1]
    image = np.arange(len(circles))[:, None]
    shape = _RECTANGLE + circles.astype(np.int64)

    # every answer for every object (n, 6), then every pair of objects (n, 6, 6); 'no' comes after 'yes'
    non_relational = [shape, _YES + (centres[..., 0] >= _MIDDLE), _YES + (centres[..., 1] >= _MIDDLE)]
    distances = _squared_distances(centres)
    nearest = (distances + np.eye(num_objects, dtype=np.int64) * IMAGE_SIZE ** 3).argmin(-1)
    farthest = distances.argmax(-1)
    same_shape = (circles[:, :, None] == circles[:, None]).sum(-1) - 1
    relational = [shape[image, nearest], shape[image, farthest], _ZERO + same_shape]

    a, b, c = centres[:, :, None, None], centres[:, None, :, None], centres[:, None, None]
    # is the third object c another than a and b?
    identity = np.eye(num_objects, dtype=bool)
    other = ~(identity[:, None, :] | identity[None, :, :])
    between = ((np.minimum(a, b) <= c) & (c <= np.maximum(a, b))).all(-1) & other
    ab, ac = b - a, c - a
    cross = ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]
    on_line = (cross ** 2 <= _RADIUS ** 2 * (ab ** 2).sum(-1)) & other
    # obtuse: the square of the longest side exceeds the sum of the other two squares
    sides = np.stack(np.broadcast_arrays(
        distances[:, :, :, None], distances[:, :, None, :], distances[:, None, :, :]), -1)
    obtuse = (2 * sides.max(-1) > sides.sum(-1)) & other
    ternary = [_ZERO + between.sum(-1), _YES + ~on_line.any(-1), _ZERO + obtuse.sum(-1)]
    return tuple(np.stack(answers, axis=-1) for answers in (non_relational, relational, ternary))


def ask(seed: int, indices: np.ndarray, objects: Scenes) -> Tuple[np.ndarray, np.ndarray]:
    """Ask ten questions of each kind about the scenes of the images of indices (n,), and answer them.

    Returns:
        Questions (n, 30, 18) uint8 and answers (n, 30) uint8 as indices of `ANSWERS`, kinds in the order of `KINDS`.
    """
    num_images, num_objects = objects.circles.shape
    numbers = uniforms(seed, indices, 0, num_objects + 3 * len(KINDS) * QUESTIONS_PER_KIND)
    numbers = numbers[:, num_objects:].reshape(num_images, -1, 3)  # the first decide the shapes of the objects
    first = (numbers[..., 0] * num_objects).astype(np.int64)
    second = (first + 1 + (numbers[..., 1] * (num_objects - 1)).astype(np.int64)) % num_objects
    subtype = (numbers[..., 2] * 3).astype(np.int64)
    kind = np.broadcast_to(np.repeat(np.arange(len(KINDS)), QUESTIONS_PER_KIND), first.shape)

    image = np.arange(num_images)[:, None]
    non_relational, relational, ternary = answer_tables(objects)
    answers = np.choose(kind, (
        non_relational[image, first, subtype],
        relational[image, first, subtype],
        ternary[image, first, second, subtype],
    ))
    return encode_questions(first, second, kind, subtype), answers.astype(np.uint8)


def write_sort_of_clevr(folder: Path, seed: int, num_train: int, num_validation: int) -> None:
    """Write `train.npz` and `validation.npz` with images, questions and answers, as `SortOfClevr` reads them."""
    parts = {'train': [], 'validation': []}
    for split, indices in chunks(num_train, num_validation, NUM_TRAIN):
        objects = scenes(seed, indices)
        parts[split].append((draw(objects), *ask(seed, indices, objects)))
    for split, arrays in parts.items():
        images, questions, answers = map(np.concatenate, zip(*arrays))
        np.savez_compressed(folder / f'{split}.npz', images=images, questions=questions, answers=answers)


class SortOfClevr:
    """Map-style data set of (image, question, answer), one item a question.

    Items are the image (75, 75, 3) uint8, the question (18,) float32 and the answer, an index of `ANSWERS`. All images
    are held in memory: 165 MB for the training split.
    """

    def __init__(self, root: str, split: str = 'train', kinds: Sequence[str] = KINDS) -> None:
        """
        Args:
            root: Folder written by `python -m timm_ait data sort-of-clevr`.
            split: 'train' or 'validation'.
            kinds: Kinds of questions, out of `KINDS`.

        Raises:
            ValueError: A kind is unknown, or none is given.
            OSError: The folder holds no such split, or its file is damaged.
        """
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f'kinds must be one or more of {KINDS}, got {kinds!r}.')
        file = Path(root, f'{split}.npz')
        if not file.is_file():
            raise FileNotFoundError(
                f'There is no file {file}; write the data set with: python -m timm_ait data sort-of-clevr --out {root}')
        of_kinds = np.isin(np.repeat(KINDS, QUESTIONS_PER_KIND), list(kinds))
        try:
            with np.load(file, allow_pickle=False) as arrays:
                self.images = arrays['images']
                self.questions = arrays['questions'][:, of_kinds]
                self.answers = arrays['answers'][:, of_kinds]
        except Exception as e:  # NumPy and zipfile raise many kinds
            raise OSError(f'{file} cannot be read; if it is damaged, write the data set again: {e!r}') from e

    def __len__(self) -> int:
        return self.answers.size

    def __getitem__(self, index: int) -> Tuple[np.ndarray, np.ndarray, int]:
        item = divmod(index, self.answers.shape[1])
        return self.images[item[0]], self.questions[item].astype(np.float32), int(self.answers[item])
