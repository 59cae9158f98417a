""" benchmarks.compare on a data set of a few images. """
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import timm
from timm.layers import PatchDropout

import timm_ait  # noqa: F401, registers the models
from benchmarks.compare.__main__ import main as compare_main
from benchmarks.compare.data import augment, load_image_folder
from benchmarks.compare.recipe import read_recipe
from benchmarks.compare.training import create_run_model, create_run_optimizer, evaluate_writing
from benchmarks.results import main as results_main
from timm_ait.data.sort_of_clevr import write_sort_of_clevr
from timm_ait.data.triangle import triangles
from timm_ait.layers.published import PublishedWorkspace

ROOT = Path(__file__).parents[2]
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


class Commands:
    """Runs the commands in this process, and keeps what they printed."""

    def __init__(self, capsys):
        self.capsys = capsys

    def run(self, main, *arguments):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as e:
            code = e.code
        return SimpleNamespace(returncode=code, **self.capsys.readouterr()._asdict())

    def compare(self, recipe, data_dir, output, *arguments):
        file = output.parent / 'recipe.yaml'
        file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        return self.run(compare_main, file, '--data-dir', data_dir, '--output', output, *arguments)


@pytest.fixture
def commands(capsys):
    return Commands(capsys)


@pytest.fixture(scope='module')
def one_run(images, tmp_path_factory):
    """Recipe and output of a run with one seed."""
    recipe = recipe_of(seeds=[0], amp_dtype='float32')
    recipe['runs'].pop('ViT')
    folder = tmp_path_factory.mktemp('one_run')
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    compare_main([str(folder / 'recipe.yaml'), '--data-dir', str(images), '--output', str(folder / 'out')])
    return recipe, folder / 'out'


def recipe_of(**changes):
    return {
        'dataset': 'image_folder',
        'image_size': 32,
        'runs': {'AiT': dict(model='ait_small', **TINY), 'ViT': dict(model='ait_small', workspace=False, **TINY)},
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


def test_a_recipe_gives_a_table_and_learning_curves(commands, images, tmp_path):
    output = tmp_path / 'out'
    result = commands.compare(recipe_of(), images, output)
    assert result.returncode == 0, result.err
    table = (output / 'table.md').read_text()
    assert table in result.out
    assert [line.split('|')[1].strip() for line in table.splitlines()] == ['', '---', 'AiT', 'ViT']
    assert table.count('±') == 2
    results = json.loads((output / 'results.json').read_text())['results']
    run = results['AiT']['runs'][1]
    assert [entry['step'] for entry in run['log']] == [2, 4]
    assert run['parameters'] > results['ViT']['runs'][1]['parameters'] > 0
    assert run['macs'] > results['ViT']['runs'][1]['macs'] > 0
    assert run['training_rate'] > 0 and run['inference_rate'] > 0
    assert (output / 'learning_curves.svg').read_text().startswith('<?xml')


def test_a_run_may_have_seeds_of_its_own(commands, images, tmp_path):
    recipe = recipe_of(seeds=[0], steps=1)
    recipe['runs']['AiT']['seeds'] = [1, 2]
    result = commands.compare(recipe, images, tmp_path / 'out')
    assert result.returncode == 0, result.err
    assert sorted(str(path.parent.relative_to(tmp_path / 'out')) for path in tmp_path.rglob('result.json')) == [
        'AiT/seed1', 'AiT/seed2', 'ViT/seed0']
    assert result.out.count('±') == 1
    header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in
                        (tmp_path / 'out' / 'table.md').read_text().splitlines()]
    assert {row[0]: row[header.index('seeds')] for row in rows} == {'AiT': '2', 'ViT': '1'}


def test_gates_may_have_a_learning_rate_of_their_own(commands, images, tmp_path):
    gated = dict(model='ait_small', gated=True, **TINY)
    recipe = recipe_of(
        seeds=[0], steps=1, warmup_steps=0, opt='adamw', lr=1.0e-4, layer_decay=0.5,
        runs={'as the body': gated, 'faster': {**gated, 'gate_lr': 1.0e-2}})
    result = commands.compare(recipe, images, tmp_path / 'out')
    assert result.returncode == 0, result.err
    runs = json.loads((tmp_path / 'out' / 'results.json').read_text())['results']
    # Adam's first step is the learning rate; the block is one layer below the head
    assert runs['as the body']['runs'][0]['gates'] == pytest.approx([0.5e-4], rel=1e-2)
    assert runs['faster']['runs'][0]['gates'] == pytest.approx([1.0e-2], rel=1e-2)


def test_the_last_steps_may_see_all_patches(commands, images, tmp_path, monkeypatch):
    forward, shares = PatchDropout.forward, []

    def record(self, x):
        kept = forward(self, x)
        shares.append(kept.shape[1] / x.shape[1])
        return kept

    monkeypatch.setattr(PatchDropout, 'forward', record)
    runs = {'AiT': dict(model='ait_small', patch_drop_rate=0.5, **TINY)}
    recipe = recipe_of(seeds=[0], steps=3, eval_every=3, all_patches_from=2, runs=runs)
    result = commands.compare(recipe, images, tmp_path / 'out')
    assert result.returncode == 0, result.err
    assert shares[:3] == pytest.approx([0.5, 0.5, 1.], abs=0.02)


def test_an_interrupted_run_goes_on_to_the_same_result(commands, images, one_run, tmp_path):
    recipe, whole = one_run
    interrupted = Path(shutil.copytree(whole, tmp_path / 'out'))
    # as it was when the second of two evaluations had not been reached
    run = interrupted / 'AiT' / 'seed0'
    (run / 'result.json').unlink()
    (run / 'last.pth.tar').unlink()
    (run / 'checkpoint-1.pth.tar').rename(run / 'last.pth.tar')
    assert commands.compare(recipe, images, interrupted).returncode == 0
    whole, resumed = (json.loads((folder / 'AiT' / 'seed0' / 'result.json').read_text())
                      for folder in (whole, interrupted))
    assert [entry['step'] for entry in resumed['log']] == [2, 4]
    assert resumed['log'] == whole['log'] and resumed['accuracy'] == whole['accuracy']


def test_finished_runs_are_kept(commands, one_run, tmp_path):
    recipe, finished = one_run
    output = Path(shutil.copytree(finished, tmp_path / 'out'))
    before = (output / 'AiT' / 'seed0' / 'result.json').stat().st_mtime_ns
    result = commands.compare(recipe, tmp_path / 'no_data_is_needed', output)
    assert result.returncode == 0, result.err
    assert (output / 'AiT' / 'seed0' / 'result.json').stat().st_mtime_ns == before


def test_runs_of_other_settings_are_not_mixed(commands, images, one_run, tmp_path):
    recipe, finished = one_run
    output = Path(shutil.copytree(finished, tmp_path / 'out'))
    table = (output / 'table.md').read_bytes()
    result = commands.compare(recipe, images, output, '--steps', '6')
    assert result.returncode == 2 and 'trained with other settings' in result.err
    assert (output / 'table.md').read_bytes() == table


@pytest.mark.parametrize('run', [
    {'model': 'ait_small'}, {'model': 'ait_small', 'workspace': False}, {'model': 'coordination_small'},
    {'model': 'set_transformer_small'}, {'model': 'perceiver_small'}, {'model': 'centroid_transformer_small'},
], ids=lambda run: '-'.join(map(str, run.values())))
def test_every_family_takes_the_convolutional_stem(run, tmp_path):
    recipe_file = tmp_path / 'recipe.yaml'
    recipe_file.write_text(yaml.safe_dump(recipe_of(
        dataset='sort_of_clevr', image_size=75, conv_stem=[8, 16, 24], model_kwargs={'num_heads': 2},
        runs={'x': run})))
    model = create_run_model(read_recipe(recipe_file), run, num_classes=10)
    assert model.patch_embed(torch.zeros(1, 3, 75, 75)).shape == (1, 10 * 10, 24)
    assert model(torch.zeros(2, 3, 75, 75), question=torch.zeros(2, 18)).shape == (2, 10)


def shape_of(image):
    """What stands on black, wherever it stands."""
    rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
    return image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


class TestAugmentation:
    images = torch.from_numpy(triangles(0, np.arange(64))[0])[:, None].float()

    def augment(self, **changes):
        options = dict(
            hflip=False, vflip=False, transpose=False, crop_padding=0, padding_mode='reflect', place=False)
        return augment(self.images, {**options, **changes}, torch.Generator().manual_seed(0))

    def test_placing_moves_what_is_shown_whole(self):
        placed = self.augment(place=True)
        assert not torch.equal(placed, self.images)
        for before, after in zip(self.images, placed):
            assert torch.equal(shape_of(before[0]), shape_of(after[0]))

    @pytest.mark.parametrize('mode', ['reflect', 'constant'])
    def test_crops_are_shifted_by_no_more_than_the_padding(self, mode):
        cropped = self.augment(crop_padding=1, padding_mode=mode)
        padded = torch.nn.functional.pad(self.images, (1,) * 4, mode=mode)
        windows = torch.stack([padded[..., i:i + 64, j:j + 64] for i in range(3) for j in range(3)])
        assert (windows == cropped).flatten(2).all(2).any(0).all()


def test_a_published_workspace_is_also_evaluated_while_it_writes(commands, images, tmp_path):
    runs = {'AiT': dict(model='published_body', dim=64), 'ViT': dict(model='published_body', dim=64, mlp='plain')}
    recipe = recipe_of(seeds=[0], steps=1, runs=runs, mean=[0.5, 0.4, 0.3], clip_grad=0)
    result = commands.compare(recipe, images, tmp_path / 'out')
    assert result.returncode == 0, result.err
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())['results']
    assert [list(results[label]['runs'][0]['accuracy']) for label in runs] == [['all', 'writing'], ['all']]
    header, _, ait, vit = [line.split('|') for line in (tmp_path / 'out' / 'table.md').read_text().splitlines()]
    writing = header.index(' accuracy, writing ')
    assert ait[writing].strip() and not vit[writing].strip()


def test_evaluating_while_writing_leaves_the_memory_as_it_was(images):
    torch.manual_seed(0)
    model = timm.create_model('published_body', dim=64)
    split = load_image_folder(str(images), 'train', 32, 3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    written = []
    for module in model.modules():
        if isinstance(module, PublishedWorkspace):
            module.register_forward_hook(lambda module, *_: written.append(module.memory.clone()))
    accuracy = evaluate_writing(model, split, batch_size=8)
    assert accuracy * 24 / 100 == pytest.approx(round(accuracy * 24 / 100))
    assert len(written) == 2 * 3 and not torch.equal(written[0], written[2])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.fixture(scope='module')
def sort_of_clevr(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sort_of_clevr')
    write_sort_of_clevr(folder, seed=0, num_train=4, num_validation=2)
    return folder


def test_questions_are_counted_by_kind(commands, sort_of_clevr, tmp_path):
    recipe = recipe_of(
        dataset='sort_of_clevr', image_size=75, kinds=['non_relational', 'relational'], seeds=[0], hflip=False,
        vflip=False, crop_padding=0, runs={
            'plain': dict(model='ait_small', patch_size=15, **TINY),
            'stem': dict(model='ait_tiny_hybrid_75', depth=1),
        })
    result = commands.compare(recipe, sort_of_clevr, tmp_path / 'out')
    assert result.returncode == 0, result.err
    for label in recipe['runs']:
        accuracy = json.loads((tmp_path / 'out' / label / 'seed0' / 'result.json').read_text())['accuracy']
        assert list(accuracy) == ['all', 'non_relational', 'relational']
        assert accuracy['all'] == pytest.approx((accuracy['non_relational'] + accuracy['relational']) / 2)


def test_our_recipes_are_read():
    examples = [file for file in (ROOT / 'examples').glob('*.yaml') if 'runs:' in file.read_text()]
    files = [*examples, *(ROOT / 'benchmarks').glob('*.yaml')]
    assert len(files) > len(examples) > 0
    recipes = [read_recipe(file) for file in files]
    # of runs with the same arguments, whatever their values, one is made
    runs = {
        (recipe['dataset'], run['model'], *sorted(run)): (recipe, run)
        for recipe in recipes for run in recipe['runs'].values()}
    for recipe, run in runs.values():
        run = {**run, 'pretrained': False, 'pretrained_cfg_overlay': None}  # the weights are a run's output
        model = create_run_model(recipe, run, num_classes=10)
        create_run_optimizer(recipe, run, model)


def assert_refused(result, output, *names):
    """The command ended with one line that has the names, and wrote nothing."""
    message = result.err.split('error: ')[-1]
    assert result.returncode == 2 and message.count('\n') == 1, result.err
    assert all(name in message for name in names), message
    assert not output.exists()


class TestBadInput:

    @pytest.mark.parametrize('change, names', [
        (dict(stepz=3), ['stepz']),
        (dict(dataset='mnist'), ['dataset', 'mnist']),
        (dict(steps='many'), ['steps', 'many']),
        (dict(steps=0), ['steps', '0']),
        (dict(hflip=1), ['hflip', '1']),
        (dict(opt='adamx'), ["'AiT'", 'adamx']),
        (dict(amp_dtype='float16'), ['amp-dtype', 'float16']),
        (dict(kinds=['binary']), ['kinds', 'binary']),
        (dict(seeds=[]), ['seeds']),
        (dict(seeds=[0, 0]), ['seeds', '[0, 0]']),
        (dict(model_kwargs=3), ['model-kwargs', '3']),
        (dict(runs={}), ['runs']),
        (dict(runs={'x': 'ait_small'}), ["'x'", 'ait_small']),
        (dict(runs={'x': {'model': 'ait_smal'}}), ["'x'", 'ait_smal']),
        (dict(runs={'x': {'model': 'ait_small', 'seeds': 3}}), ["'x'", 'seeds', '3']),
        (dict(runs={'x': {'model': 'ait_small', 'gate_lr': 0.1}}), ["'x'", 'gate_lr', '0.1', 'no gates']),
        (dict(runs={'x': {'model': 'ait_small', 'workspace': False, 'blocks': [7]}}), ["'x'", 'blocks', '7']),
        (dict(all_patches_from=2), ['all_patches_from', '2', 'patch_drop_rate']),
        (dict(opt_kwargs={'betaz': 3}), ["'AiT'", 'betaz']),
        (dict(runs={'../x': {'model': 'ait_small'}}), ["'../x'"]),
        (dict(runs={'x': {'model': 'ait_small', 'bottlenek': 3}}), ["'x'", 'bottlenek']),
        (dict(dataset='sort_of_clevr'), ['image_size', '75']),
        (dict(batch_size=25), ['batch_size', '25', '24']),
    ], ids=str)
    def test_recipe(self, commands, images, tmp_path, change, names):
        assert_refused(commands.compare(recipe_of(**change), images, tmp_path / 'out'), tmp_path / 'out', *names)

    @pytest.mark.parametrize('argument', [['--runs', 'AiT', 'MLP'], ['--device', 'gpu'], ['--steps', '0']])
    def test_argument(self, commands, images, tmp_path, argument):
        result = commands.compare(recipe_of(), images, tmp_path / 'out', *argument)
        assert_refused(result, tmp_path / 'out', argument[0].strip('-'), argument[-1])


def test_an_option_replaces_the_recipes(tmp_path):
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe_of()))
    recipe = read_recipe(tmp_path / 'recipe.yaml', ['--steps', '7', '--seeds', '3', '4'])
    assert recipe['steps'] == 7 and recipe['batch_size'] == 8
    assert [run['seeds'] for run in recipe['runs'].values()] == [[3, 4], [3, 4]]


def test_results_go_into_their_part_of_the_page(commands, one_run, tmp_path):
    shutil.copytree(one_run[1], tmp_path / 'mine')
    page = tmp_path / 'PAGE.md'
    page.write_text('# Before\n<!-- begin generated: mine -->\nold\n<!-- end generated: mine -->\nafter\n')
    for _ in range(2):  # the second time it replaces its own text
        result = commands.run(results_main, tmp_path / 'mine', '--page', page)
        assert result.returncode == 0, result.err
        text = page.read_text()
        assert text.startswith('# Before\n<!-- begin generated: mine -->\n4 steps of 8')
        assert text.endswith('<!-- end generated: mine -->\nafter\n')
        assert text.count((tmp_path / 'mine' / 'table.md').read_text()) == 1 and 'old' not in text
        for figure in re.findall(r'\((figures/.*?)\)', text):
            assert (tmp_path / figure).is_file()
