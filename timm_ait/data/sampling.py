""" Random numbers that depend on the seed and a sample's index alone, and the indices of a data set. """
from typing import Iterator, Tuple

import numpy as np
from tqdm import tqdm

__all__ = ['chunks', 'uniforms']

_CHUNK = 500


def uniforms(seed: int, indices: np.ndarray, draw: int, size: int) -> np.ndarray:
    """Uniform numbers in [0, 1), from one counter-based stream a sample.

    Args:
        seed: Seed of the data set.
        indices: Sample indices (n,).
        draw: Which draw of a sample it is; each has its own numbers.
        size: Numbers a sample.

    Returns:
        (n, size) float64.
    """
    numbers = np.empty((len(indices), size))
    for row, index in zip(numbers, indices):
        # the lowest counter word is left to the stream itself
        np.random.Generator(np.random.Philox(key=seed, counter=[0, int(index), draw, 0])).random(out=row)
    return numbers


def chunks(num_train: int, num_validation: int) -> Iterator[Tuple[str, np.ndarray]]:
    """Names of splits with the indices of some of their samples, in order, with a progress bar.

    The validation samples take the indices after those of the training samples, so that no sample is in both.
    """
    num_samples = num_train + num_validation
    with tqdm(total=num_samples, unit='image') as progress:
        for split, start, stop in (('train', 0, num_train), ('validation', num_train, num_samples)):
            for first in range(start, stop, _CHUNK):
                indices = np.arange(first, min(first + _CHUNK, stop))
                yield split, indices
                progress.update(len(indices))
