""" benchmarks.compare on a data set of a few images. """
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import timm
from timm.layers import PatchDropout

import timm_ait  # noqa: F401, registers the models
from benchmarks.compare.__main__ import main as compare_main
from benchmarks.compare.data import augment, load_image_folder, load_images
from benchmarks.compare.recipe import read_recipe
from benchmarks.compare.training import create_run_model, create_run_optimizer, evaluate_writing
from benchmarks.results import main as results_main
from tests.benchmarks import write_images
from timm_ait.data.triangle import triangles

ROOT = Path(__file__).parents[2]
TINY = dict(embed_dim=24, depth=1, num_heads=2, num_slots=4, slot_dim=8, workspace_heads=2, bottleneck=8)


def compare(recipe, data_dir, output, *options):
    """Run the command; returns the results of all runs."""
    file = output.parent / 'recipe.yaml'
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    compare_main([str(file), '--data-dir', str(data_dir), '--output', str(output), *options])
    return json.loads((output / 'results.json').read_text())['results']


def column(output, name):
    """Cells of a column of the table, by run."""
    lines = (output / 'table.md').read_text().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]
    return {row[0]: row[header.index(name)] for row in rows}


@pytest.fixture(scope='module')
def one_run(images, tmp_path_factory):
    """Recipe and output of a run with one seed."""
    recipe = recipe_of(seeds=[0], amp_dtype='float32')
    recipe['runs'].pop('ViT')
    output = tmp_path_factory.mktemp('one_run') / 'out'
    compare(recipe, images, output)
    return recipe, output


@pytest.fixture
def output(tmp_path):
    return tmp_path / 'out'


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


def test_a_recipe_gives_a_table_and_learning_curves(capsys, images, output):
    results = compare(recipe_of(), images, output)
    assert (output / 'table.md').read_text() in capsys.readouterr().out
    assert list(results) == list(column(output, '')) == ['AiT', 'ViT']
    assert all('±' in accuracy for accuracy in column(output, 'accuracy').values())
    ait, vit = (result['runs'][1] for result in results.values())
    assert [entry['step'] for entry in ait['log']] == [2, 4]
    assert ait['parameters'] > vit['parameters'] > 0
    assert ait['macs'] > vit['macs'] > 0
    assert ait['training_rate'] > 0 and ait['inference_rate'] > 0
    assert (output / 'learning_curves.svg').read_text().startswith('<?xml')


def test_a_run_may_have_seeds_of_its_own(images, output):
    recipe = recipe_of(seeds=[0], steps=1)
    recipe['runs']['AiT']['seeds'] = [1, 2]
    compare(recipe, images, output)
    assert sorted(str(path.parent.relative_to(output)) for path in output.rglob('result.json')) == [
        'AiT/seed1', 'AiT/seed2', 'ViT/seed0']
    assert column(output, 'seeds') == {'AiT': '2', 'ViT': '1'}
    assert ['±' in accuracy for accuracy in column(output, 'accuracy').values()] == [True, False]


def test_gates_may_have_a_learning_rate_of_their_own(images, output):
    gated = dict(model='ait_small', gated=True, **TINY)
    results = compare(recipe_of(
        seeds=[0], steps=1, warmup_steps=0, opt='adamw', lr=1.0e-4, layer_decay=0.5,
        runs={'as the body': gated, 'faster': {**gated, 'gate_lr': 1.0e-2}}), images, output)
    # Adam's first step is the learning rate; the block is one layer below the head
    assert results['as the body']['runs'][0]['gates'] == pytest.approx([0.5e-4], rel=1e-2)
    assert results['faster']['runs'][0]['gates'] == pytest.approx([1.0e-2], rel=1e-2)


def test_the_last_steps_may_see_all_patches(images, output, monkeypatch):
    forward, shares = PatchDropout.forward, []

    def record(self, x):
        kept = forward(self, x)
        shares.append(kept.shape[1] / x.shape[1])
        return kept

    monkeypatch.setattr(PatchDropout, 'forward', record)
    runs = {'AiT': dict(model='ait_small', patch_drop_rate=0.5, **TINY)}
    compare(recipe_of(seeds=[0], steps=3, eval_every=3, all_patches_from=2, runs=runs), images, output)
    assert shares[:3] == pytest.approx([0.5, 0.5, 1.], abs=0.02)


def test_an_interrupted_run_goes_on_to_the_same_result(images, one_run, output):
    recipe, whole = one_run
    shutil.copytree(whole, output)
    # as it was when the second of two evaluations had not been reached
    run = output / 'AiT' / 'seed0'
    (run / 'result.json').unlink()
    (run / 'checkpoint-1.pth.tar').replace(run / 'last.pth.tar')
    resumed = compare(recipe, images, output)['AiT']['runs'][0]
    expected = json.loads((whole / 'AiT' / 'seed0' / 'result.json').read_text())
    assert [entry['step'] for entry in resumed['log']] == [2, 4]
    assert resumed['log'] == expected['log'] and resumed['accuracy'] == expected['accuracy']


def test_an_output_inside_of_the_data_is_continued_and_keeps_other_runs(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    output, recipe = tmp_path / 'data' / 'out', recipe_of(seeds=[0], steps=1)
    for label, others, labels in (('AiT', ['--runs', 'AiT'], ['AiT']), ('ViT', [], ['AiT', 'ViT'])):
        compare(recipe, tmp_path / 'data', output, '--runs', label)
        results = json.loads((output / 'results.json').read_text())
        assert (results['arguments'][1:], list(results['results'])) == (others, labels)


def test_finished_runs_are_kept(images, one_run, output):
    recipe, finished = one_run
    shutil.copytree(finished, output)
    before = (output / 'AiT' / 'seed0' / 'result.json').stat().st_mtime_ns
    (output.parent / 'linked').mkdir()
    for split in Path(images).iterdir():
        (output.parent / 'linked' / split.name).symlink_to(split)
    compare(recipe, output.parent / 'linked', output)
    assert (output / 'AiT' / 'seed0' / 'result.json').stat().st_mtime_ns == before


def test_runs_of_other_settings_are_not_mixed(capsys, images, one_run, output):
    recipe, finished = one_run
    shutil.copytree(finished, output)
    others = shutil.copytree(images, output.parent / 'others' / Path(images).name)
    next(others.glob('train/*/*')).unlink()
    for data, options in ((images, ['--steps', '6']), (others, [])):
        with pytest.raises(SystemExit, match='2'):
            compare(recipe, data, output, *options)
        assert 'trained with other settings' in capsys.readouterr().err
    assert (output / 'table.md').read_bytes() == (finished / 'table.md').read_bytes()


@pytest.mark.parametrize('label', [
    'AiT', 'ViT', 'Coordination', 'Set Transformer', 'Perceiver', 'Centroid Transformer'])
def test_every_family_takes_the_convolutional_stem(label):
    recipe = read_recipe(ROOT / 'examples' / 'compare_sort_of_clevr.yaml')
    model = create_run_model(recipe, recipe['runs'][label], num_classes=10)
    assert model.patch_embed(torch.zeros(1, 3, 75, 75)).shape == (1, 5 * 5, 128)
    assert model(torch.zeros(2, 3, 75, 75), question=torch.zeros(2, 18)).shape == (2, 10)


def shape_of(image):
    """What stands on black, wherever it stands."""
    rows, columns = image.any(1).nonzero()[:, 0], image.any(0).nonzero()[:, 0]
    return image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


class TestAugmentation:
    images = torch.from_numpy(triangles(0, np.arange(64))[0])[:, None].float()

    def augment(self, **changes):
        options = dict(hflip=False, vflip=False, transpose=False, crop_padding=0, padding_mode='reflect', place=False)
        return augment(self.images, {**options, **changes}, torch.Generator().manual_seed(0))

    def test_placing_moves_what_is_shown_whole(self):
        placed = self.augment(place=True)
        assert not torch.equal(placed, self.images)
        for before, after in zip(self.images, placed):
            assert torch.equal(shape_of(before[0]), shape_of(after[0]))

    @pytest.mark.parametrize('mode', ['reflect', 'constant'])
    def test_crops_are_shifted_by_no_more_than_the_padding(self, mode):
        cropped = self.augment(crop_padding=1, padding_mode=mode)
        assert not torch.equal(cropped, self.images)
        padded = torch.nn.functional.pad(self.images, (1,) * 4, mode=mode)
        windows = torch.stack([padded[..., i:i + 64, j:j + 64] for i in range(3) for j in range(3)])
        assert (windows == cropped).flatten(2).all(2).any(0).all()


def test_a_published_workspace_is_also_evaluated_while_it_writes(images, output):
    runs = {'AiT': dict(model='published_body', dim=64), 'ViT': dict(model='published_body', dim=64, mlp='plain')}
    compare(recipe_of(seeds=[0], steps=1, runs=runs, mean=[0.5, 0.4, 0.3], clip_grad=0), images, output)
    assert all(column(output, 'accuracy, all').values())
    writing = column(output, 'accuracy, writing')
    assert writing['AiT'] and not writing['ViT']


def test_a_damaged_image_is_not_replaced_by_another(tmp_path):
    (write_images(tmp_path) / 'train' / 'dark' / '0.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match='0.png cannot be read'):
        load_image_folder(str(tmp_path), 'train', 32, 3)


def test_images_of_other_classes_than_the_models_are_refused(tmp_path):
    model = timm.create_model('test_ait', num_classes=3)
    with pytest.raises(ValueError, match='2 classes, not 3'):
        load_images(write_images(tmp_path), model)
    model = timm.create_model('test_ait', num_classes=2)
    model.pretrained_cfg['label_names'] = ['light', 'dark']
    with pytest.raises(ValueError, match='in another order'):
        load_images(tmp_path, model)
    shutil.rmtree(tmp_path / 'validation')
    with pytest.raises(ValueError, match='no folder validation'):
        load_images(tmp_path, model)


def test_evaluating_while_writing_leaves_the_memory_as_it_was(images):
    model, written = timm.create_model('published_body', dim=64), []
    before = [buffer.clone() for buffer in model.buffers()]
    workspace = model.blocks[0].mlp.workspace
    workspace.register_forward_hook(lambda *_: written.append(workspace.memory.clone()))
    accuracy = evaluate_writing(model, load_image_folder(str(images), 'train', 32, 3), batch_size=8)
    assert accuracy * 24 / 100 == pytest.approx(round(accuracy * 24 / 100))
    assert len(written) == 3 and not torch.equal(written[0], written[1])
    assert all(torch.equal(buffer, stored) for buffer, stored in zip(model.buffers(), before))


def test_questions_are_counted_by_kind(sort_of_clevr, output):
    results = compare(recipe_of(
        dataset='sort_of_clevr', image_size=75, kinds=['non_relational', 'relational'], seeds=[0], hflip=False,
        vflip=False, crop_padding=0, runs={
            'plain': dict(model='ait_small', patch_size=15, **TINY),
            'stem': dict(model='ait_tiny_hybrid_75', depth=1),
        }), sort_of_clevr, output)
    for result in results.values():
        accuracy = result['runs'][0]['accuracy']
        assert list(accuracy) == ['all', 'non_relational', 'relational']
        assert accuracy['all'] == pytest.approx((accuracy['non_relational'] + accuracy['relational']) / 2)


def test_recipes_that_no_other_test_runs_can_be_run():  # those of a GPU and of the analysis
    recipes = [read_recipe(ROOT / 'examples/compare_bodies_clevr.yaml')]
    recipes += [read_recipe(file) for file in (ROOT / 'benchmarks').glob('*.yaml')]
    assert len(recipes) > 1
    # of runs with the same arguments, whatever their values, one is made
    runs = {
        (recipe['dataset'], run['model'], *sorted(run)): (recipe, run)
        for recipe in recipes for run in recipe['runs'].values()}
    for recipe, run in runs.values():
        run = {**run, 'pretrained': False, 'pretrained_cfg_overlay': None}  # the weights are a run's output
        model = create_run_model(recipe, run, num_classes=10)
        create_run_optimizer(recipe, run, model)


def assert_refused(capsys, images, output, names, recipe, *options):
    """A mistake is answered in one line with these names, and nothing is written."""
    with pytest.raises(SystemExit, match='2'):
        compare(recipe, images, output, *options)
    message = capsys.readouterr().err.split('error: ')[-1].replace(str(output.parent), '')
    assert message.count('\n') == 1 and all(name in message for name in names), message
    assert not output.exists()


class TestBadInput:

    @pytest.mark.parametrize('change, names', [
        (dict(stepz=3), ['stepz']), (dict(dataset='mnist'), ['dataset', 'mnist']),
        (dict(steps='many'), ['steps', 'many']), (dict(steps=0), ['steps', '0']), (dict(hflip=1), ['hflip', '1']),
        (dict(opt='adamx'), ["'AiT'", 'adamx']), (dict(amp_dtype='float16'), ['amp-dtype', 'float16']),
        (dict(kinds=['binary']), ['kinds', 'binary']), (dict(seeds=[]), ['seeds']),
        (dict(seeds=[0, 0]), ['seeds', '[0, 0]']), (dict(model_kwargs=3), ['model-kwargs', '3']),
        (dict(runs={}), ['runs']), (dict(runs={'x': 'ait_small'}), ["'x'", 'ait_small']),
        (dict(runs={'x': {'model': 'ait_smal'}}), ["'x'", 'ait_smal']),
        (dict(runs={'x': {'model': 'ait_small', 'seeds': 3}}), ["'x'", 'seeds', '3']),
        (dict(runs={128: {'model': 'ait_small'}}), ['128', 'text']),
        (dict(runs={'x': {'model': 'ait_small', 'gate_lr': 0.1}}), ["'x'", 'gate_lr', '0.1', 'no gates']),
        (dict(runs={'x': {'model': 'ait_small', 'workspace': False, 'blocks': [7]}}), ["'x'", 'blocks', '7']),
        (dict(runs={'x': {'model': 'ait_small', 'workspace_kwargs': {'num_slots': 2}}}), ["'x'", 'workspace_kwargs']),
        (dict(all_patches_from=2), ['all_patches_from', '2', 'patch_drop_rate']),
        (dict(opt_kwargs={'betaz': 3}), ["'AiT'", 'betaz']), (dict(runs={'../x': {'model': 'ait_small'}}), ["'../x'"]),
        (dict(runs={'x': {'model': 'ait_small', 'bottlenek': 3}}), ["'x'", 'bottlenek']),
        (dict(dataset='sort_of_clevr'), ['image_size', '75']), (dict(batch_size=25), ['batch_size', '25', '24']),
        (dict(dataset='sort_of_clevr', image_size=75), ['hflip']), (dict(mean=[0.5, 0.4]), ['mean', '3 channels']),
    ], ids=str)
    def test_recipe(self, capsys, images, output, change, names):
        assert_refused(capsys, images, output, names, recipe_of(**change))

    @pytest.mark.parametrize('argument', [['--runs', 'AiT', 'MLP'], ['--device', 'gpu'], ['--steps', '0']])
    def test_argument(self, capsys, images, output, argument):
        assert_refused(capsys, images, output, [argument[0].strip('-'), argument[-1]], recipe_of(), *argument)


@pytest.mark.parametrize('option, seeds', [(['--seeds', '3', '4'], [3, 4]), (['--seeds=3'], [3])])
def test_an_option_replaces_the_recipes(tmp_path, option, seeds):
    runs = {label: dict(run, seeds=[1, 2]) for label, run in recipe_of()['runs'].items()}
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe_of(runs=runs)))
    recipe = read_recipe(tmp_path / 'recipe.yaml', ['--steps', '7', *option])
    assert recipe['steps'] == 7 and recipe['batch_size'] == 8
    assert [run['seeds'] for run in recipe['runs'].values()] == [seeds, seeds]


def test_results_go_into_their_part_of_the_page(one_run, tmp_path):
    shutil.copytree(one_run[1], tmp_path / 'mine')
    page = tmp_path / 'PAGE.md'
    page.write_text('# Before\n<!-- begin generated: mine -->\nold\n<!-- end generated: mine -->\nafter\n')
    for _ in range(2):  # the second time it replaces its own text
        results_main([str(tmp_path / 'mine'), '--page', str(page)])
        text = page.read_text()
        assert text.startswith('# Before\n<!-- begin generated: mine -->\n4 steps of 8')
        assert ' Trained on cpu. ' in text and '/recipe.yaml --data-dir DATA --output output/mine`' in text
        assert text.endswith('<!-- end generated: mine -->\nafter\n')
        assert text.count((tmp_path / 'mine' / 'table.md').read_text()) == 1 and 'old' not in text
        for figure in re.findall(r'\((figures/.*?)\)', text):
            assert (tmp_path / figure).is_file()
