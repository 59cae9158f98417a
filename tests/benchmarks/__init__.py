""" A data set of a few images, dark ones and light ones. """
import numpy as np
from PIL import Image


def write_images(folder):
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('validation', 6)):
        for i, name in enumerate(('dark', 'light')):
            (folder / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = (rng.random((32, 32, 3)) * 90 + 150 * i).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{j}.png')
    return folder
