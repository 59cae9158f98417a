""" Loading from a Hub, by huggingface_hub's own client against the small server of `hub_server.py`. """
import json
import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_ait  # registers the models

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


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
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

    def test_in_another_process_with_the_hub_named_by_the_environment(self, hub, stored, tmp_path):
        code = f'import timm, timm_ait; print(timm.create_model("hf-hub:{REPO}", pretrained=True).num_classes)'
        environment = {**os.environ, 'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(tmp_path)}
        result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
        assert result.stdout == '3\n', result.stderr


class TestErrors:
    """They are those that timm's own models give."""

    @pytest.fixture
    def both(self, hub, tmp_path_factory):
        """A repository each of an AiT and of timm's ViT, without files yet, and the files to put there."""
        files = {f'someone/{name}': saved_files(name, tmp_path_factory)[1] for name in ('test_ait', 'test_vit')}

        def add(leave_out=(), **kwargs):
            for repo_id, content in files.items():
                hub.add(repo_id, {name: data for name, data in content.items() if name not in leave_out}, **kwargs)

        return add

    @staticmethod
    def assert_same_errors(by_tag=False, revision=''):
        errors = []
        for name in ('test_ait', 'test_vit'):
            repo_id = f'someone/{name}{revision}'
            with pytest.raises(Exception) as error:
                if by_tag:
                    load(name, pretrained_cfg_overlay=dict(hf_hub_id=repo_id))
                else:
                    load(f'hf-hub:{repo_id}')
            text = re.sub(r'0x[0-9a-f]+|Request ID: \S+', '', str(error.value))
            errors.append((type(error.value), text.replace(name, 'NAME')))
        assert errors[0] == errors[1]

    @pytest.mark.parametrize('by_tag', [False, True])
    def test_a_repository_that_is_not_there(self, hub, by_tag):
        self.assert_same_errors(by_tag)

    @pytest.mark.parametrize('by_tag', [False, True])
    def test_a_private_repository_without_a_token(self, both, by_tag):
        both(private=True)
        self.assert_same_errors(by_tag)

    def test_a_repository_without_a_config(self, both):
        both(leave_out=['config.json'])
        self.assert_same_errors()

    @pytest.mark.parametrize('by_tag', [False, True])
    def test_a_repository_without_weights(self, both, by_tag):
        both(leave_out=['model.safetensors'])
        self.assert_same_errors(by_tag)

    def test_a_config_of_another_library(self, hub):
        for name in ('test_ait', 'test_vit'):
            hub.add(f'someone/{name}', {'config.json': b'{"architectures": ["ViTForImageClassification"]}'})
        self.assert_same_errors()

    @pytest.mark.parametrize('by_tag', [False, True])
    def test_a_revision_that_is_not_there(self, both, by_tag):
        both()
        self.assert_same_errors(by_tag, revision='@v9')

    @pytest.mark.parametrize('by_tag', [False, True])
    def test_offline_with_an_empty_cache(self, both, monkeypatch, by_tag):
        both()
        offline(monkeypatch)
        self.assert_same_errors(by_tag)

    def test_of_models_that_are_not_ours_nothing_changes(self):
        assert timm.models._factory.load_model_config_from_hf is timm.models._hub.load_model_config_from_hf
