""" Loading from a Hub, by huggingface_hub's own client against the small server of `hub_server.py`. """
import itertools
import json
import re

import huggingface_hub
import pytest
import torch

import timm
from timm.models import save_for_hf

import timm_ait  # noqa: F401, registers the models

from .hub_server import TOKEN, reset_sessions

REPO = 'someone/test_ait.mine'


def saved_files(name, tmp_path_factory, seed=0):
    """A model, and the files that timm saves of it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3)
    folder = tmp_path_factory.mktemp(f'{name}-{seed}')
    save_for_hf(model, folder, safe_serialization=True)
    return model, {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Two models, and the files that timm saves of them."""
    return [saved_files('test_ait', tmp_path_factory, seed) for seed in range(2)]


@pytest.fixture
def stored(hub, folders):
    """The first model in a repository of the Hub."""
    hub.add(REPO, folders[0][1])
    return folders[0][0]


def load(name=f'hf-hub:{REPO}', **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def offline(monkeypatch, yes=True):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', yes)
    reset_sessions()


class TestLoading:

    def test_by_name_of_the_repository(self, stored):
        assert same(load(), stored)

    def test_by_pretrained_tag(self, stored):
        # what a tag without a shipped file is
        assert same(load('test_ait', pretrained_cfg_overlay=dict(hf_hub_id=REPO, num_classes=3)), stored)

    def test_another_number_of_classes_keeps_the_rest(self, stored):
        model = load(num_classes=7)
        assert model.head.out_features == 7
        assert torch.equal(model.pos_embed, stored.pos_embed)

    def test_a_revision_is_pinned(self, hub, folders):
        first = hub.add(REPO, folders[0][1])
        hub.add(REPO, folders[1][1])
        assert same(load(f'hf-hub:{REPO}@{first}'), folders[0][0])
        assert same(load(), folders[1][0])

    def test_a_private_repository_with_a_token(self, hub, folders, monkeypatch):
        hub.add(REPO, folders[0][1], private=True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        assert same(load(), folders[0][0])

    def test_offline_from_the_cache(self, hub, stored, monkeypatch):
        load()
        offline(monkeypatch)
        hub.requests.clear()
        assert same(load(), stored)
        assert not hub.requests

    def test_into_a_cache_of_ones_own(self, stored, tmp_path):
        assert same(load(cache_dir=tmp_path / 'own'), stored)
        assert list((tmp_path / 'own').glob('models--*/blobs/*'))
        assert not (tmp_path / 'hub_cache').exists()

    def test_a_pickle_is_read_for_its_weights_alone(self, hub, folders, tmp_path):
        model, files = folders[0]
        torch.save(model.state_dict(), tmp_path / 'weights')
        hub.add(REPO, {'config.json': files['config.json'], 'pytorch_model.bin': (tmp_path / 'weights').read_bytes()})
        assert same(load(), model)

    def test_weights_of_another_model_are_refused(self, hub, folders):
        config = json.loads(folders[0][1]['config.json'])
        config['model_args'] = {**config['model_args'], 'depth': 4}
        hub.add(REPO, {**folders[0][1], 'config.json': json.dumps(config).encode()})
        with pytest.raises(RuntimeError, match=r'nothing was loaded.*blocks\.3'):
            load()


class TestErrors:
    """They are those that timm's own models give."""

    @pytest.mark.parametrize('problem, by_tag', [
        *itertools.product(['no repository', 'private', 'no weights', 'no revision', 'offline'], [False, True]),
        ('no config', False), ('another library', False)])
    def test_are_those_of_a_vit(self, hub, tmp_path_factory, monkeypatch, problem, by_tag):
        errors = []
        for name in ('test_ait', 'test_vit'):
            repo_id = f'someone/{name}'
            left_out = {'no config': 'config.json', 'no weights': 'model.safetensors'}.get(problem)
            files = {key: data for key, data in saved_files(name, tmp_path_factory)[1].items() if key != left_out}
            if problem == 'another library':
                files = {'config.json': b'{"architectures": ["ViTForImageClassification"]}'}
            if problem != 'no repository':
                hub.add(repo_id, files, private=problem == 'private')
            if problem == 'no revision':
                repo_id += '@v9'
            offline(monkeypatch, problem == 'offline')
            with pytest.raises(Exception) as error:
                if by_tag:
                    load(name, pretrained_cfg_overlay=dict(hf_hub_id=repo_id))
                else:
                    load(f'hf-hub:{repo_id}')
            text = re.sub(r'0x[0-9a-f]+|Request ID: \S+', '', str(error.value))
            errors.append((type(error.value), text.replace(name, 'NAME')))
        assert errors[0] == errors[1]

    def test_of_models_that_are_not_ours_nothing_changes(self):
        assert timm.models._factory.load_model_config_from_hf is timm.models._hub.load_model_config_from_hf
