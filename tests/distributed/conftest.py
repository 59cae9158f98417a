""" Processes, as many as there are ranks, each of which runs all scenarios. """
import pytest
import torch
from torch.multiprocessing import spawn

from .rank import run


@pytest.fixture(scope='session', params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=['2_ranks', '3_ranks'])
def ranks(request, tmp_path_factory):
    """Results of all scenarios, a dictionary per rank."""
    folder = tmp_path_factory.mktemp('ranks')
    spawn(run, (request.param, folder), request.param)
    return [torch.load(folder / f'{rank}.pt') for rank in range(request.param)]


@pytest.fixture
def results(ranks, request):
    """Those of a scenario, a list by rank."""
    return lambda name: [result[request.cls.topic, name] for result in ranks]
