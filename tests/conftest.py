""" Fixtures of several test files. """
import os

import huggingface_hub
import pytest
import torch

from tests.hub_server import HubServer, reset_sessions

# models here are too small for more threads, which wait for each other all the longer where a machine is busy
os.environ['OMP_NUM_THREADS'] = '1'  # of processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on localhost that huggingface_hub's client talks to, with an empty cache and nobody logged in."""
    with HubServer() as server:
        for key, value in {
            'ENDPOINT': server.endpoint,
            'HF_HUB_CACHE': str(tmp_path / 'hub_cache'),
            'HF_HUB_OFFLINE': False,
            'HF_TOKEN_PATH': str(tmp_path / 'no_token'),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, key, value)
        template = server.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # before 1.0 the latter has a copy
            monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
        reset_sessions()
        monkeypatch.delenv('HF_TOKEN', raising=False)
        monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
        yield server
