""" benchmarks.analysis on a few small runs, and its measures. """
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import timm

import timm_ait
from benchmarks import analysis, measures
from tests.benchmarks.test_compare import compare, recipe_of

PAGE = 'By hand.\n' + ''.join(
    f'<!-- begin generated: {name} -->\nold\n<!-- end generated: {name} -->\nConclusion about {name}.\n'
    for name in (*analysis.RUN_TABLES, 'attractors', 'reading', 'attention', 'purity', 'agreement'))


@pytest.fixture
def model():
    return timm.create_model('test_ait', num_classes=3).eval()


def test_the_page_is_written_from_runs_and_checkpoints(images, tmp_path, monkeypatch):
    recipe = recipe_of(steps=2, seeds=[0, 1])
    recipe['runs'] = {
        'default': recipe['runs']['AiT'],
        'learned and never written': {**recipe['runs']['AiT'], 'write': False},
        'Coordination': {'model': 'test_coordination'},
        'ViT': recipe['runs']['ViT'],
    }
    (tmp_path / 'runs').mkdir()
    compare(recipe, images, tmp_path / 'runs' / 'mine')
    checkpoint = tmp_path / 'weights' / 'ait_small_patch32_64.triangle'
    checkpoint.mkdir(parents=True)
    (checkpoint / 'model.safetensors').touch()
    monkeypatch.setattr(analysis, 'weights_dir', lambda: tmp_path / 'weights')
    page = tmp_path / 'page.md'
    page.write_text(PAGE)
    arguments = [str(tmp_path / 'runs'), '--images', f'mine={images}', '--page', str(page)]
    analysis.main(arguments)
    text = page.read_text()
    assert 'old' not in text and text.count('Conclusion about') == PAGE.count('Conclusion about')
    memories = re.search(r'generated: memories -->\n(.*?)\n<!--', text, re.DOTALL)[1].splitlines()
    assert [line.split('|')[1].strip() for line in memories[2:]] == [
        'mine, default', 'mine, learned and never written', 'mine, Coordination', 'mine, ViT']
    assert all(line.count('|') == memories[0].count('|') for line in memories)
    assert '| ait_small_patch32_64.triangle, block 1 |' in text
    assert (tmp_path / 'figures' / 'analysis_rank.svg').is_file()
    # nothing is measured twice, and the same figures give the same page
    monkeypatch.setattr(analysis, 'measure', None)
    monkeypatch.setattr(analysis, 'measure_shipped', None)
    analysis.main(arguments)
    assert page.read_text() == text


def test_the_page_has_a_place_for_every_part():
    page = analysis.Path(analysis.__file__).with_name('ANALYSIS.md').read_text()
    for name in re.findall('generated: (.*) -->', PAGE):
        assert page.count(f'generated: {name} -->') == 2


def test_writes_of_coordination_are_one_per_image():
    model = timm.create_model('test_coordination').train()
    writes = measures.coordination_writes(model, torch.randn(2, 3, 32, 32))
    assert list(writes) == ['blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn']
    for attention, memory in writes.values():
        assert attention.shape == (2, 2, 4, 64) and memory.shape == (2, 4, 32)
        assert ((attention > 0).sum(dim=-1) == 3).all()
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_interactions_of_heads_with_even_attention(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:128] = 0.
            block.attn.qkv.bias[:128] = 0.
    fused = [block.attn.fused_attn for block in model.blocks]
    counts = measures.self_attention_interactions(model, torch.randn(4, 3, 32, 32))
    assert counts == {f'blocks.{i}.attn': [58., 58.] for i in range(3)}  # 90 % of 64
    assert [block.attn.fused_attn for block in model.blocks] == fused


def test_patterns_close_together_share_a_basin():
    patterns = torch.eye(4, 8)
    patterns[1] = F.normalize(patterns[0] + 0.05 * patterns[1], dim=0)
    assert measures.basins(patterns, beta=20., noise=0.).tolist() == [0., 0., 1., 1.]


def test_no_assignment_of_slots_agrees_better():
    a, b = torch.randn(2, 5, 30).double()
    correlation = torch.corrcoef(torch.cat([a, b]))[:5, 5:]
    best = max(correlation[torch.arange(5), list(order)].mean() for order in itertools.permutations(range(5)))
    assert measures.agreement(a, b) == pytest.approx(float(best))


class TestPurity:

    def test_is_the_share_of_the_favourite_kind(self):
        weights = torch.tensor([[0.5, 0.5, 0., 0.], [0.25, 0.25, 0.25, 0.25], [0., 0., 0.2, 0.6]])
        assert measures.slot_purity(weights, torch.tensor([0, 0, 1, 2])).tolist() == pytest.approx([1., 0.5, 0.75])

    def test_clusters_far_apart_are_found(self):
        labels = torch.arange(5).repeat(20)
        points = 10. * torch.eye(5)[labels] + 0.1 * torch.randn(100, 5)
        clusters = measures.kmeans(points, 5)
        for a, b in ((labels, clusters), (clusters, labels)):
            assert measures.slot_purity(F.one_hot(a).T.float(), b).tolist() == [1.] * 5


class TestReplacedMemory:

    @pytest.mark.parametrize('how', measures.REPLACEMENTS)
    def test_changes_the_logits_and_nothing_for_long(self, model, how):
        pictures = torch.randn(4, 3, 32, 32)
        model.train()(pictures)
        timm_ait.advance_memory(model.eval())
        with torch.no_grad():
            before = model(pictures)
            with measures.replaced_memory(model, how):
                assert not torch.allclose(model(pictures), before)
            assert torch.equal(model(pictures), before)

    def test_removed_is_a_layer_without_retrieval(self, model):
        pictures = torch.randn(4, 3, 32, 32)
        without = timm.create_model('test_ait', num_classes=3, retrieval=False).eval()
        without.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad(), measures.replaced_memory(model, 'removed'):
            torch.testing.assert_close(model(pictures), without(pictures))
