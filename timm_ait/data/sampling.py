""" Random numbers that depend only on the seed and a sample's index, and the indices of a data set. """
from typing import Callable, Iterator, Tuple

import numpy as np
from tqdm import tqdm

_CHUNK = 500


def uniforms(seed: int, indices: np.ndarray, draw: int, size: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (n, size) float64, from one counter-based stream for each draw of a sample."""
    numbers = np.empty((len(indices), size))
    for row, index in zip(numbers, indices):
        # the lowest counter word is left to the stream itself
        np.random.Generator(np.random.Philox(key=seed, counter=[0, int(index), draw, 0])).random(out=row)
    return numbers


def first_valid(
        seed: int,
        indices: np.ndarray,
        size: int,
        propose: Callable[..., Tuple[np.ndarray, np.ndarray]],
        *properties: np.ndarray,
        draw: int = 1,
) -> np.ndarray:
    """The first valid of several attempts at each sample, (n, …), by rejection.

    From numbers (n, size) and the samples' properties (n, …), `propose` makes attempts (n, a, …) and says which of them
    are valid (n, a). Samples without a valid one are tried again with the numbers of the next draw.
    """
    attempts, valid = propose(uniforms(seed, indices, draw, size), *properties)
    chosen = attempts[np.arange(len(indices)), valid.argmax(1)]
    missing = ~valid.any(1)
    if missing.any():
        of_missing = [values[missing] for values in properties]
        chosen[missing] = first_valid(seed, np.asarray(indices)[missing], size, propose, *of_missing, draw=draw + 1)
    return chosen


def chunks(num_train: int, num_validation: int, default_train: int) -> Iterator[Tuple[str, np.ndarray]]:
    """Names of splits with the indices of some of their samples, in order, with a progress bar.

    The validation samples take the indices after those of the training samples, and never those of the default training
    set, on which shipped weights were trained.
    """
    middle = max(num_train, default_train)
    with tqdm(total=num_train + num_validation, unit='image') as progress:
        for split, start, stop in (('train', 0, num_train), ('validation', middle, middle + num_validation)):
            for first in range(start, stop, _CHUNK):
                indices = np.arange(first, min(first + _CHUNK, stop))
                yield split, indices
                progress.update(len(indices))
