""" benchmarks/compare.py on a data set of a few images. """
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from timm_ait.__main__ import main as timm_ait
from timm_ait.data.triangle import triangles

ROOT = Path(__file__).parents[1]
TINY = dict(embed_dim=24, depth=1, num_heads=2, num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=8)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 12), ('validation', 6)):
        for i, name in enumerate(('dark', 'light')):
            (folder / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = (rng.random((32, 32, 3)) * 90 + 150 * i).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{j}.png')
    return folder


def run_benchmark(script, *arguments):
    command = [sys.executable, str(ROOT / 'benchmarks' / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})


def compare(recipe, data_dir, output, *arguments):
    file = output.parent / 'recipe.yaml'
    file.write_text(yaml.safe_dump(recipe))
    return run_benchmark('compare.py', file, '--data-dir', data_dir, '--output', output, *arguments)


def recipe_of(**changes):
    return {
        'dataset': 'cifar10',
        'image_size': 32,
        'runs': {'AiT': dict(model='ait_small', **TINY), 'ViT': dict(model='ait_small_no_workspace', **TINY)},
        'steps': 4,
        'batch_size': 8,
        'warmup_steps': 1,
        'eval_every': 2,
        'hflip': True,
        'vflip': True,
        'crop_padding': 2,
        'seeds': [0, 1],
        **changes,
    }


def test_a_recipe_gives_a_table_and_figures(images, tmp_path):
    output = tmp_path / 'out'
    result = compare(recipe_of(), images, output)
    assert result.returncode == 0, result.stderr
    table = (output / 'table.md').read_text()
    assert table in result.stdout
    assert [line.split('|')[1].strip() for line in table.splitlines()] == ['', '---', 'AiT', 'ViT']
    assert table.count('±') == 2
    results = json.loads((output / 'results.json').read_text())['results']
    run = results['AiT']['runs'][1]
    assert [entry['step'] for entry in run['log']] == [2, 4]
    assert run['parameters'] > results['ViT']['runs'][1]['parameters'] > 0
    assert run['macs'] > results['ViT']['runs'][1]['macs'] > 0
    assert run['training_rate'] > 0 and run['inference_rate'] > 0
    for name in ('accuracy', 'accuracy_parameters', 'accuracy_macs', 'learning_curves'):
        assert (output / f'{name}.svg').read_text().startswith('<?xml')


def test_a_run_may_have_seeds_of_its_own(images, tmp_path):
    recipe = recipe_of(seeds=[0], steps=1)
    recipe['runs']['AiT']['seeds'] = [1, 2]
    result = compare(recipe, images, tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    assert sorted(str(path.parent.relative_to(tmp_path / 'out')) for path in tmp_path.rglob('result.json')) == [
        'AiT/seed1', 'AiT/seed2', 'ViT/seed0']
    assert result.stdout.count('±') == 1
    header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in
                        (tmp_path / 'out' / 'table.md').read_text().splitlines()]
    assert {row[0]: row[header.index('seeds')] for row in rows} == {'AiT': '2', 'ViT': '1'}


def test_an_interrupted_run_goes_on_to_the_same_result(images, tmp_path):
    recipe = recipe_of(seeds=[0], amp_dtype='float32')
    recipe['runs'].pop('ViT')
    assert compare(recipe, images, tmp_path / 'whole').returncode == 0
    interrupted = tmp_path / 'interrupted'
    assert compare(recipe, images, interrupted).returncode == 0
    # as it was when the second of two evaluations had not been reached
    run = interrupted / 'AiT' / 'seed0'
    (run / 'result.json').unlink()
    (run / 'last.pth.tar').unlink()
    (run / 'checkpoint-1.pth.tar').rename(run / 'last.pth.tar')
    assert compare(recipe, images, interrupted).returncode == 0
    whole, resumed = (json.loads((folder / 'AiT' / 'seed0' / 'result.json').read_text())
                      for folder in (tmp_path / 'whole', interrupted))
    assert [entry['step'] for entry in resumed['log']] == [2, 4]
    assert resumed['log'] == whole['log'] and resumed['accuracy'] == whole['accuracy']


def test_finished_runs_are_kept(images, tmp_path):
    recipe = recipe_of(seeds=[0])
    assert compare(recipe, images, tmp_path / 'out').returncode == 0
    before = (tmp_path / 'out' / 'AiT' / 'seed0' / 'result.json').stat().st_mtime_ns
    result = compare(recipe, tmp_path / 'no_data_is_needed', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'out' / 'AiT' / 'seed0' / 'result.json').stat().st_mtime_ns == before


def test_runs_of_other_settings_are_not_mixed(images, tmp_path):
    recipe = recipe_of(seeds=[0])
    recipe['runs'].pop('ViT')
    assert compare(recipe, images, tmp_path / 'out').returncode == 0
    table = (tmp_path / 'out' / 'table.md').read_bytes()
    result = compare(recipe, images, tmp_path / 'out', '--steps', '6')
    assert result.returncode == 2 and 'trained with other settings' in result.stderr
    assert (tmp_path / 'out' / 'table.md').read_bytes() == table


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('compare', ROOT / 'benchmarks' / 'compare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('model', [
    'ait_small', 'ait_small_no_workspace', 'coordination_small', 'set_transformer_small', 'perceiver_small',
    'centroid_transformer_small'])
def test_every_family_takes_the_convolutional_stem(benchmark, model, tmp_path):
    recipe_file = tmp_path / 'recipe.yaml'
    recipe_file.write_text(yaml.safe_dump(recipe_of(
        dataset='sort_of_clevr', image_size=75, conv_stem=[8, 16, 24], model_kwargs={'num_heads': 2}, runs={})))
    recipe = benchmark.read_recipe(recipe_file, {})
    model = benchmark.create_run_model(recipe, {'model': model}, num_classes=10)
    assert model.patch_embed(torch.zeros(1, 3, 75, 75)).shape == (1, 10 * 10, 24)
    assert model(torch.zeros(2, 3, 75, 75), question=torch.zeros(2, 18)).shape == (2, 10)


def shape_of(image):
    """What stands on black, wherever it stands."""
    rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
    return image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


class TestAugmentation:
    images = torch.from_numpy(triangles(0, np.arange(64))[0])[:, None].float()

    def augment(self, benchmark, **changes):
        recipe = {**benchmark._DEFAULTS, **changes}
        return benchmark._augment(self.images, recipe, torch.Generator().manual_seed(0))

    def test_without_options_images_stay(self, benchmark):
        assert torch.equal(self.augment(benchmark), self.images)

    def test_placing_moves_what_is_shown_whole(self, benchmark):
        placed = self.augment(benchmark, place=True)
        assert not torch.equal(placed, self.images)
        for before, after in zip(self.images, placed):
            assert torch.equal(shape_of(before[0]), shape_of(after[0]))

    def test_placing_reaches_every_edge(self, benchmark):
        shown = self.augment(benchmark, place=True).amax(dim=(0, 1)) > 0
        assert shown[0].any() and shown[-1].any() and shown[:, 0].any() and shown[:, -1].any()

    @pytest.mark.parametrize('option, flip', [
        ('hflip', lambda x: x.flip(-1)), ('vflip', lambda x: x.flip(-2)), ('transpose', lambda x: x.mT)])
    def test_about_half_of_the_images_are_flipped(self, benchmark, option, flip):
        flipped = self.augment(benchmark, **{option: True})
        as_they_were = (flipped == self.images).flatten(1).all(1)
        assert 16 < as_they_were.sum() < 48
        assert torch.equal(flipped[~as_they_were], flip(self.images)[~as_they_were])

    def test_crops_are_shifted_by_no_more_than_the_padding(self, benchmark):
        cropped = self.augment(benchmark, crop_padding=1)
        padded = torch.nn.functional.pad(self.images, (1,) * 4, mode='reflect')
        windows = torch.stack([padded[..., i:i + 64, j:j + 64] for i in range(3) for j in range(3)])
        assert (windows == cropped).flatten(2).all(2).any(0).all()


def test_questions_are_counted_by_kind(tmp_path):
    timm_ait(['data', 'sort-of-clevr', '--out', str(tmp_path / 'data'), '--train', '4', '--validation', '2'])
    recipe = recipe_of(
        dataset='sort_of_clevr', image_size=75, kinds=['non_relational', 'relational'], seeds=[0], hflip=False,
        vflip=False, crop_padding=0, runs={
            'plain': dict(model='ait_small', patch_size=15, **TINY),
            'stem': dict(model='ait_tiny_hybrid_75', depth=1),
        })
    result = compare(recipe, tmp_path / 'data', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    for label in recipe['runs']:
        accuracy = json.loads((tmp_path / 'out' / label / 'seed0' / 'result.json').read_text())['accuracy']
        assert list(accuracy) == ['all', 'non_relational', 'relational']
        assert accuracy['all'] == pytest.approx((accuracy['non_relational'] + accuracy['relational']) / 2)


@pytest.mark.parametrize('change, message', [
    (dict(stepz=3), 'unknown keys'),
    (dict(dataset='mnist'), 'dataset must be one of'),
    (dict(runs={'x': {'model': 'ait_smal'}}), 'ait_smal'),
    (dict(runs={'x': {'model': 'ait_small', 'seeds': 3}}), "seeds of run 'x' must be a list of integers, got 3"),
    (dict(seeds=[]), 'must be a list of integers, got []'),
    (dict(conv_stem=64), 'conv_stem must be a list of numbers of channels, got 64'),
])
def test_a_bad_recipe_is_explained(images, tmp_path, change, message):
    result = compare(recipe_of(**change), images, tmp_path / 'out')
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / 'out').exists()


def test_an_unknown_run_is_named(images, tmp_path):
    result = compare(recipe_of(), images, tmp_path / 'out', '--runs', 'AiT', 'MLP')
    assert result.returncode == 2 and 'MLP' in result.stderr


def test_results_go_into_their_block_of_the_page(images, tmp_path):
    recipe = recipe_of(seeds=[0])
    recipe['runs'].pop('ViT')
    compare(recipe, images, tmp_path / 'mine')
    page = tmp_path / 'PAGE.md'
    page.write_text('# Before\n<!-- mine -->\nold\n<!-- end of mine -->\nafter\n')
    for _ in range(2):  # the second time it replaces its own text
        result = run_benchmark('results.py', tmp_path / 'mine', '--page', page)
        assert result.returncode == 0, result.stderr
        text = page.read_text()
        assert text.startswith('# Before\n<!-- mine -->\n4 steps of 8')
        assert text.endswith('<!-- end of mine -->\nafter\n')
        assert text.count((tmp_path / 'mine' / 'table.md').read_text()) == 1 and 'old' not in text
        for figure in re.findall(r'\((figures/.*?)\)', text):
            assert (tmp_path / figure).is_file()


def test_a_page_without_the_block_is_left_alone(images, tmp_path):
    recipe = recipe_of(seeds=[0])
    recipe['runs'].pop('ViT')
    compare(recipe, images, tmp_path / 'mine')
    page = tmp_path / 'PAGE.md'
    page.write_text('text')
    result = run_benchmark('results.py', tmp_path / 'mine', '--page', page)
    assert result.returncode == 2 and 'no block for mine' in result.stderr
    assert page.read_text() == 'text' and not (tmp_path / 'figures').exists()
