""" One launch of torchrun per number of ranks, in which all scenarios run. """
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# seconds; a collective that not all ranks reach gives up before
_TIMEOUT = 300


def launch(num_ranks, folder):
    """Results of all scenarios, a dictionary per rank."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(num_ranks)]
    process = subprocess.Popen(
        [*command, '-m', 'tests.distributed.rank', str(folder)],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return [torch.load(folder / f'{rank}.pt') for rank in range(num_ranks)]


@pytest.fixture(scope='session', params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=['2_ranks', '3_ranks'])
def ranks(request, tmp_path_factory):
    return launch(request.param, tmp_path_factory.mktemp('ranks'))


@pytest.fixture
def results(ranks, request):
    """Those of a scenario, a list by rank."""
    topic = request.module.__name__.rpartition('test_')[2]
    return lambda name: [result[topic, name] for result in ranks]
