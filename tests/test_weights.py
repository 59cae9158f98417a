import hashlib
import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg, save_for_hf

from tests.models import make_model
from timm_ait import memory_statistics
from timm_ait.data import sort_of_clevr, triangle
from timm_ait.models._builder import cifar_cfg
from timm_ait.weights import shipped_cfg, weights_dir

SHIPPED = sorted(folder.name for folder in weights_dir().iterdir() if folder.is_dir())


@pytest.mark.parametrize('name', SHIPPED)
class TestShipped:

    def test_is_half_precision_on_disk(self, name):
        weights = load_file(weights_dir() / name / 'model.safetensors')
        assert {x.dtype for key, x in weights.items() if 'num_batches_tracked' not in key} == {torch.float16}

    def test_every_layout_loads_the_same_model_without_a_network(self, name, hub):
        by_tag = timm.create_model(name, pretrained=True).eval()
        by_folder = timm.create_model(f'local-dir:{weights_dir() / name}', pretrained=True).eval()
        assert {p.dtype for p in by_tag.parameters()} == {torch.float32}
        x = torch.randn(2, *by_tag.default_cfg['input_size'])
        asked = {'question': torch.rand(2, 18)} if hasattr(by_tag, 'question_embed') else {}
        assert torch.equal(by_tag(x, **asked), by_folder(x, **asked))
        for layer, statistics in memory_statistics(by_tag).items():
            assert statistics['effective_rank'] >= 0.8 * min(by_tag.get_submodule(layer).memory.shape), layer

    def test_recipe_and_card_come_with_it_and_agree_with_config_and_cfg(self, name):
        assert (weights_dir() / name / 'train.yaml').is_file()
        config = json.loads((weights_dir() / name / 'config.json').read_text())
        cfg = get_pretrained_cfg(name).to_dict()
        assert cfg['num_classes'] == len(cfg['label_names']) == config['num_classes']
        assert cfg['label_names'] == tuple(config['label_names'])
        card = huggingface_hub.ModelCard.load(weights_dir() / name / 'README.md')
        assert card.data.license == cfg['license'] and card.data.model_name == name
        for result in card.data.eval_results:
            assert f'{result.metric_value:.2f}' in card.text


def manifest():
    """Sizes and hashes of what a model is made of; `python -m tests.test_weights` writes them to manifest.json."""
    return {
        name: {
            file.name: dict(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
            for file in (weights_dir() / name / 'config.json', weights_dir() / name / 'model.safetensors')
        }
        for name in SHIPPED
    }


def test_files_are_those_of_the_manifest():
    assert json.loads((weights_dir() / 'manifest.json').read_text()) == manifest()


def test_the_models_of_sort_of_clevr_and_triangle_have_the_generators_sizes():
    model = timm.create_model('ait_tiny_hybrid_75', device='meta')
    assert model.question_embed.question_dim == sort_of_clevr.QUESTION_DIM
    assert model.pretrained_cfg['label_names'] == sort_of_clevr.ANSWERS
    assert get_pretrained_cfg('ait_small_patch32_64').label_names == triangle.CLASSES


def test_an_emptied_source_leaves_the_others():
    model, expected = [
        timm.create_model('ait_small', pretrained=True, pretrained_cfg_overlay=overlay)
        for overlay in (dict(hf_hub_id=''), {})]
    assert torch.equal(model.head.weight, expected.head.weight)


class TestNotInstalled:
    """A checkpoint that the wheel leaves out."""
    cfg = PretrainedCfg(**cifar_cfg(**shipped_cfg('test_ait.elsewhere')))

    def test_the_error_says_where_it_is(self, hub):
        with pytest.raises(RuntimeError, match='weights/test_ait.elsewhere.*timm-ait/test_ait.elsewhere.*Hub'):
            timm.create_model('test_ait', pretrained=True, pretrained_cfg=self.cfg)

    def test_errors_of_files_of_ones_own_are_left_alone(self, hub, tmp_path):
        overlay = dict(file=str(tmp_path / 'model.safetensors'))
        with pytest.raises(FileNotFoundError):
            timm.create_model('test_ait', pretrained=True, pretrained_cfg=self.cfg, pretrained_cfg_overlay=overlay)


def test_a_checkpoint_to_train_on_from(tmp_path):
    # train.py --pretrained-path
    model = make_model('test_ait', num_classes=3)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    overlay = dict(file=str(tmp_path / 'last.pth.tar'), num_classes=-1)
    loaded = timm.create_model('test_ait', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert not torch.equal(loaded.head.weight, model.head.weight)
    assert torch.equal(loaded.blocks[2].mlp.workspace.memory, model.blocks[2].mlp.workspace.memory)


@pytest.mark.parametrize('name, num_classes', [
    ('ait_small', 10), ('perceiver_small', 10), ('ait_vit_small_patch14_dinov2.pets', 37)])
def test_a_checkpoint_to_train_on_from_leaves_the_number_of_classes_as_it_is(name, num_classes):
    overlay = dict(pretrained_cfg_overlay=dict(num_classes=-1))
    for arguments in (dict(model_name=name, **overlay), timm.models.resolve_model_input_args(name, **overlay)):
        assert timm.create_model(**arguments, device='meta').num_classes == num_classes
    folder = dict(pretrained_cfg=dict(num_classes=12), **overlay)
    assert timm.create_model(name, **folder, device='meta').num_classes == 12


class TestFit:
    """Weights of another width or depth are refused before any of them are loaded."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = make_model('test_ait', num_classes=3)
        save_for_hf(model, tmp_path, safe_serialization=True)
        return model, f'local-dir:{tmp_path}'

    @pytest.mark.parametrize('kwargs, problem', [
        (dict(embed_dim=32), r'\(1, 64, 64\) instead of \(1, 64, 32\)'),
        (dict(embed_dim=32, num_classes=5), r'\(1, 64, 64\) instead of \(1, 64, 32\)'), (dict(depth=4), r'blocks\.3\.'),
        (dict(depth=2), r'blocks\.2\.'),
        (dict(depth=4, num_classes=5), r'blocks\.3\.'),  # timm by itself leaves the block untrained
        (dict(num_slots=4, num_classes=5), 'memory'),
        (dict(num_classes=5, class_token=True), 'width, depth, global_pool or question_dim'),
        (dict(global_pool='map'), r'attn_pool\.'),
    ])
    def test_weights_of_another_width_or_depth_are_not_loaded(self, saved, kwargs, problem):
        with pytest.raises(RuntimeError, match=problem) as error:
            timm.create_model(saved[1], pretrained=True, **kwargs)
        assert 'nothing was loaded' in str(error.value)

    def test_without_strictness_what_is_missing_stays_untrained(self, saved):
        loaded = timm.create_model(saved[1], pretrained=True, depth=4, pretrained_strict=False)
        assert torch.equal(loaded.head.weight, saved[0].head.weight)

    def test_classes_before_the_offset_are_left_out(self, saved):
        model = saved[0]
        overlay = dict(state_dict=model.state_dict(), num_classes=2, label_offset=1)
        loaded = timm.create_model('test_ait', pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)
        assert torch.equal(loaded.head.weight, model.head.weight[1:])

    @pytest.mark.parametrize('kwargs', [
        dict(num_classes=5), dict(num_classes=0), dict(in_chans=1), dict(img_size=64), dict(patch_size=8),
        dict(features_only=True), dict(num_classes=5, global_pool='map')])
    def test_what_timm_adapts_is_still_adapted(self, saved, kwargs):
        model, name = saved
        loaded = dict(timm.create_model(name, pretrained=True, **kwargs).named_parameters())
        key = next(key for key in loaded if key.endswith('blocks.2.mlp.fc1.weight'))
        assert torch.equal(loaded[key], model.blocks[2].mlp.fc1.weight)


if __name__ == '__main__':
    (weights_dir() / 'manifest.json').write_text(json.dumps(manifest(), indent=2) + '\n')
