""" Data sets of these tests. """
import pytest

from tests.benchmarks import write_images
from timm_ait.data.sort_of_clevr import write_sort_of_clevr


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def sort_of_clevr(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sort_of_clevr')
    write_sort_of_clevr(folder, seed=0, num_train=4, num_validation=10)
    return folder
