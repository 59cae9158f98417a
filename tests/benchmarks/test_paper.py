""" benchmarks.paper: its bodies against the published ones' sizes, its recipe, and the command on a few images. """
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.paper.__main__ import main
from benchmarks.paper.bodies import create_model
from benchmarks.paper.data import DATASETS, Split
from benchmarks.paper.training import Recipe, learning_rates

CIFAR = DATASETS['cifar10'].model_kwargs
CLEVR = DATASETS['sort_of_clevr'].model_kwargs
TINY = ('--dim', 64, '--epochs', 2, '--warmup-epochs', 1, '--batch-size', 8, '--eval-every', 1)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 10), ('validation', 6)):
        for i in range(2):
            (folder / split / str(i)).mkdir(parents=True)
            for j in range(count):
                pixels = (rng.random((32, 32, 3)) * 90 + 150 * i).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / str(i) / f'{j}.png')
    return folder


@pytest.fixture
def split():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 32, 32), generator=rng, dtype=torch.uint8)
    return Split(DATASETS['cifar10'], pixels, torch.randint(10, (20,), generator=rng))


def run(*arguments):
    main([str(argument) for argument in arguments])


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


class TestPublishedSizes:
    """Parameters of the published models, made from the published files with their defaults."""
    memory = 2 * 32 * 32  # a parameter there, a buffer here

    def test_ait(self):
        unused = 65 * 768 + 768 + 58_368  # position embedding, class token, convolution
        assert num_parameters(create_model('ait', 'published', 768, **CIFAR)) == 15_784_426 - unused - self.memory

    def test_vit(self):
        assert num_parameters(create_model('vit', 'plain', 768, **CIFAR)) == 14_270_314


class TestBodies:
    def test_the_ait_has_no_position_embedding_and_reads_all_tokens(self):
        model = create_model('ait', 'plain', 128, **CIFAR)
        assert model.pos_embed is None and model.cls_token is None
        assert model.head[1].weight.shape == (10, 64 * 128)

    def test_the_vit_reads_a_class_token_beside_large_positions(self):
        model = create_model('vit', 'plain', 128, **CIFAR)
        assert model.pos_embed.shape == (1, 65, 128) and 0.9 < model.pos_embed.std() < 1.1
        assert model.head[1].weight.shape == (10, 128)

    def test_patches_hold_their_pixels_row_by_row_channels_last(self):
        embed = create_model('ait', 'plain', 64, **CIFAR).patch_embed
        embed.norm1 = embed.proj = embed.norm2 = torch.nn.Identity()
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(embed(images)[:, 9], images[:, :, 4:8, 4:8].permute(0, 2, 3, 1).flatten(1))


def test_learning_rates_warm_up_and_then_follow_a_delayed_cosine():
    rates = learning_rates(Recipe())
    assert rates[:6] == pytest.approx([1e-5, 2.8e-5, 4.6e-5, 6.4e-5, 8.2e-5, 1e-4])
    assert rates[55] == pytest.approx((1e-4 + 1e-6) / 2)
    assert rates[-1] == pytest.approx(1e-6 + 0.5 * 9.9e-5 * (1 + np.cos(0.94 * np.pi)))


class TestViews:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (DATASETS['cifar10'].mean, DATASETS['cifar10'].std))

    def test_a_crop_takes_black_pixels_from_the_border_before_it_is_flipped(self, split):
        (images,), _ = split.batch(torch.tensor([[3], [0], [6], [1]]))
        pixels = split.images[3:4, :, 0:32, 6:38].flip(-1)
        torch.testing.assert_close(images, (pixels / 255. - self.mean) / self.std)
        torch.testing.assert_close(images[0, :, 0, 0], -(self.mean / self.std).flatten())

    def test_random_ones_show_no_item_twice_and_take_every_edge(self, split):
        items, top, left, flip = split.random_views(20, torch.Generator().manual_seed(0))
        assert items.sort().values.tolist() == list(range(20))
        assert 0 <= min(top.min(), left.min()) and max(top.max(), left.max()) <= 8
        assert set(flip.tolist()) == {0, 1}


class TestCommand:
    def test_it_trains_every_pair_with_every_seed_and_reports(self, images, tmp_path, capsys):
        run('--data-dir', images, '--output', tmp_path, *TINY, '--body', 'ait', 'vit', '--mlp', 'plain', 'published',
            '--seed', 0, 1)
        files = sorted(tmp_path.glob('*.json'))
        assert len(files) == 8
        result = json.loads((tmp_path / 'cifar10_64_2epochs_ait_published_seed1.json').read_text())
        assert [entry['epoch'] for entry in result['log']] == [1, 2]
        assert result['accuracy'].keys() == {'frozen', 'writing'}
        assert result['images_per_second'] > 0 and len(result['memory']) == 2
        capsys.readouterr()
        run('--output', tmp_path, '--report')
        table = capsys.readouterr().out
        assert '| body | plain | plain_norm | published, frozen | published, writing | ours |' in table
        assert f"{result['accuracy']['writing']:.2f})" in table
        assert (tmp_path / 'table.md').read_text() in table and (tmp_path / 'learning_curves.svg').is_file()

    def test_a_seed_gives_the_same_run_whatever_ran_before(self, images, tmp_path):
        run('--data-dir', images, '--output', tmp_path / 'after', *TINY, '--mlp', 'plain', '--seed', 0, 1)
        run('--data-dir', images, '--output', tmp_path / 'alone', *TINY, '--mlp', 'plain', '--seed', 1)
        after, alone = (
            json.loads((tmp_path / name / 'cifar10_64_2epochs_ait_plain_seed1.json').read_text())
            for name in ('after', 'alone'))
        assert after['log'] == alone['log']

    def test_finished_runs_are_kept(self, images, tmp_path):
        arguments = ('--data-dir', images, '--output', tmp_path, *TINY, '--mlp', 'plain')
        run(*arguments)
        file, = tmp_path.glob('*.json')
        before = file.stat().st_mtime_ns
        run(*arguments, '--seed', 0)
        assert file.stat().st_mtime_ns == before

    def test_a_cache_takes_the_place_of_the_images(self, images, tmp_path):
        arguments = ('--output', tmp_path, *TINY, '--mlp', 'plain', '--cache', tmp_path / 'images.pt', '--warm')
        run('--data-dir', images, *arguments)
        run('--data-dir', tmp_path / 'gone', *arguments)

    @pytest.mark.parametrize('arguments, error', [
        (['--dim', '100'], '--dim: 100 is not a multiple of 64'),
        (['--epochs', '0'], '--epochs: 0 is below 1'),
        (['--graph'], '--graph: cpu has no CUDA graphs'),
        (['--device', 'nothing'], '--device: '),
        (['--data-dir', 'nowhere'], '--data-dir: there is no folder nowhere'),
        (['--batch-size', '13'], '--batch-size: 13 is more than the 12 items of validation'),
        (['--report'], '--output: there are no results in'),
    ])
    def test_bad_arguments_are_named(self, images, tmp_path, capsys, arguments, error):
        with pytest.raises(SystemExit):
            run('--data-dir', images, '--output', tmp_path / 'new', *TINY, *arguments)
        assert error in capsys.readouterr().err
        assert not (tmp_path / 'new').exists()

    def test_results_of_another_recipe_are_refused(self, images, tmp_path, capsys):
        arguments = ('--data-dir', images, '--output', tmp_path, *TINY, '--mlp', 'plain')
        run(*arguments)
        with pytest.raises(SystemExit):
            run(*arguments, '--lr', 1e-3)
        assert 'was trained with another recipe' in capsys.readouterr().err
