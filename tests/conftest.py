""" Fixtures of several test files. """
import os

import huggingface_hub
import pytest
import torch

# models here are too small for more threads, which wait for each other all the longer where a machine is busy
os.environ['OMP_NUM_THREADS'] = '1'  # of processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Function that puts files (bytes by their name) into a repository of the Hub, as its client has cached them."""
    cache, commit = tmp_path / 'hub_cache', '0' * 40
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

    def add(repo_id, files):
        folder = cache / f'models--{repo_id.replace("/", "--")}'
        for name, content in {'refs/main': commit.encode(), **{
                f'snapshots/{commit}/{name}': content for name, content in files.items()}}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return add
