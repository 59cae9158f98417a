""" examples/on_device/train_on_device.py on a data set of a few images. """
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save, save_file

import timm

from tests.benchmarks import write_images
from timm_ait.__main__ import main as command_line

sys.path.insert(0, str(Path(__file__).parents[2] / 'examples' / 'on_device'))

import augment_on_device  # noqa: E402
import cifar_resnet  # noqa: E402, F401, registers the model
import cifar_teacher  # noqa: E402, F401
import train_on_device  # noqa: E402


@pytest.fixture
def train(tmp_path):
    """Run the program; gives what it logged."""
    data_dir = write_images(tmp_path / 'images')

    def run(*options, output=tmp_path / 'run'):
        train_on_device.main([
            '--device', 'cpu', '--no-compile', '--amp-dtype', 'float32', '--data-dir', str(data_dir), '--model',
            'test_ait', '--batch-size', '8', '--output', str(output), '--evals', '1', *options])
        return [json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()]

    return run


def augmentation(size=(32, 32), seed=0, **options):
    args = train_on_device.get_parser().parse_args([])  # nothing is augmented by default
    vars(args).update(options)
    return augment_on_device.Augmentation(args, size, torch.Generator().manual_seed(seed))


def some_images(num=16):
    return torch.randint(256, (num, 3, 32, 32), dtype=torch.uint8)


# augmentation

def test_flip_mirrors_the_images_that_it_names_and_no_other():
    images, flip = some_images(2), torch.tensor([True, False])
    torch.testing.assert_close(augmentation()(images, flip), torch.stack([images[0].flip(-1), images[1]]) / 255)


def test_crops_with_padding_are_shifts_by_whole_pixels():
    images = some_images(64)
    crops = augmentation(crop_padding=2)(images, torch.zeros(64, dtype=torch.bool))
    inside, pixels = crops[..., 4:-4, 4:-4], images / 255
    shifted = [pixels[..., 4 + y:28 + y, 4 + x:28 + x] for y in range(-2, 3) for x in range(-2, 3)]
    distances = torch.stack([(inside - candidate).abs().amax((1, 2, 3)) for candidate in shifted])
    assert distances.amin(0).max() < 1e-3
    assert len(distances.argmin(0).unique()) > 10


def test_random_resized_crops_show_a_part_of_the_image():
    # a ramp from left to right: its extent in the crop is the crop's in the image
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(64, 3, 32, 32)
    crops = augmentation(size=(48, 40), scale=(0.25, 0.25), ratio=(1., 1.))(ramp, torch.zeros(64, dtype=torch.bool))
    assert crops.shape == (64, 3, 48, 40)
    extent = (crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))) * 255 / 8
    assert extent.min() > 14 and extent.max() < 16.5


@pytest.mark.parametrize('options', [
    dict(aa_prob=1., aa_strength=1.), dict(scale=(0.3, 1.), train_interpolation='bicubic')])
def test_augmented_images_are_in_range_and_repeat_with_the_generator(options):
    images, flip = some_images(), torch.zeros(16, dtype=torch.bool)
    first, again, other = [augmentation(seed=seed, **options)(images, flip) for seed in (0, 0, 1)]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


def test_images_of_one_colour_have_no_contrast_to_stretch():
    images = torch.full((64, 3, 4, 4), 0.4)
    recoloured = augment_on_device.recolour(images, prob=1., strength=0., generator=torch.Generator())
    torch.testing.assert_close(recoloured, images, rtol=0, atol=0.01)


# schedule

@pytest.mark.parametrize('progress, scale', [(0., 0.), (0.05, 0.5), (0.1, 1.), (0.5, 1.), (0.75, 0.5), (1., 0.)])
def test_the_learning_rate_rises_stays_and_decays(progress, scale):
    args = Namespace(epochs=1, seconds=None, warmup=0.1, decay_from=0.5, decay='linear')
    assert train_on_device.Schedule(args, 10).lr_scale(progress) == pytest.approx(scale)


# training

def test_training_learns_and_writes_weights_that_timm_loads(train, tmp_path):
    final = train('--epochs', '20', '--lr', '1e-2', '--model-ema-decay', '0.9')[-1]
    assert final['top1'] == final['top1_ema'] == 100
    overlay = dict(file=str(tmp_path / 'run' / 'model.safetensors'), num_classes=2)
    model = timm.create_model('test_ait', pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)
    average = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['state_dict_ema']
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    assert command_line(['export', str(tmp_path / 'run' / 'last.pth.tar'), '--out', str(tmp_path / 'exported')]) == 0
    config = json.loads((tmp_path / 'exported' / 'config.json').read_text())
    assert config['pretrained_cfg'].items() >= train_on_device.PREPROCESSING.items()


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        trainer = Namespace(args=Namespace(seed=seed), train_data=Namespace(labels=torch.zeros(16)), device='cpu')
        return train_on_device.Trainer.draw_order(trainer, epoch).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (-1, 0, 1)]
    assert order(0, 0) == orders[1] and len(set(map(tuple, orders))) == len(orders)


def test_the_loss_includes_the_balance_loss(train, tmp_path):
    with_balance = train('--epochs', '1')[-1]
    without = train('--epochs', '1', '--model-kwargs', 'balance_weight=0.', output=tmp_path / 'other')[-1]
    assert with_balance['balance_loss'] > 0 and without['balance_loss'] == 0
    first, second = [load_file(tmp_path / folder / 'model.safetensors') for folder in ('run', 'other')]
    assert not torch.equal(first['blocks.0.mlp.workspace.q.weight'], second['blocks.0.mlp.workspace.q.weight'])


def test_a_budget_in_seconds_ends_the_run_in_time(train):
    final = train('--seconds', '1', '--mixup', '0.5', '--aa-prob', '0.5')[-1]
    assert final['progress'] == 1 and final['step'] > 0 and 1 <= final['seconds'] < 10


def test_warm_up_leaves_no_trace(train, tmp_path, monkeypatch):
    train('--epochs', '1')
    weights = load_file(tmp_path / 'run' / 'model.safetensors')
    monkeypatch.setattr(train_on_device, 'WARM_UP_STEPS', 1)
    train('--epochs', '1', output=tmp_path / 'other')
    other = load_file(tmp_path / 'other' / 'model.safetensors')
    assert all(torch.equal(value, other[name]) for name, value in weights.items())


def test_a_run_that_is_interrupted_amid_an_epoch_resumes_to_the_same_weights(train, tmp_path, monkeypatch):
    options = '--epochs 2 --evals 4 --mixup 0.5 --aa-prob 0.5 --model-kwargs drop_path_rate=0.2'.split()
    train(*options)
    save = train_on_device.Trainer.save
    monkeypatch.setattr(train_on_device.Trainer, 'save', lambda self: save(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(*options, output=tmp_path / 'other')
    monkeypatch.setattr(train_on_device.Trainer, 'save', save)
    train(*options, '--resume', output=tmp_path / 'other')
    whole, resumed = [load_file(tmp_path / name / 'model.safetensors') for name in ('run', 'other')]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_student_approaches_the_mean_of_its_teachers(train, tmp_path):
    names, files = ['test_ait', 'test_vit'], [str(tmp_path / 'ait.safetensors'), str(tmp_path / 'vit.safetensors')]
    for name, file, bias in zip(names, files, (1., 5.)):  # of different sizes, for whom all is dark
        teacher = timm.create_model(name, num_classes=2)
        teacher.head.weight.data.zero_()
        teacher.head.bias.data = torch.tensor([bias, -bias])
        save_file(teacher.state_dict(), file)
    log = train(
        '--epochs', '20', '--lr', '1e-2', '--model-ema-decay', '0.9', '--task-loss-weight', '0', '--kd-model-name',
        *names, '--kd-model-file', *files)
    assert log[1] == {'teachers_top1': 50.}
    student = timm.create_model('test_ait', num_classes=2)
    student.load_state_dict(load_file(tmp_path / 'run' / 'model.safetensors'))
    logits = student.eval()(torch.randn(8, 3, 32, 32))
    assert ((logits[:, 0] - logits[:, 1] - 6).abs() < 2).all()


@pytest.mark.parametrize('options', ['--model-kwargs img_size=48', '--model test_efficientnet --img-size 48'])
def test_images_are_scaled_to_the_size_that_the_model_is_for(train, options, monkeypatch):
    sizes = []
    prepare = train_on_device.Trainer.prepare
    monkeypatch.setattr(
        train_on_device.Trainer, 'prepare', lambda *args: sizes.append(prepare(*args).shape[-2:]) or prepare(*args))
    train('--epochs', '1', *options.split())
    assert set(sizes) == {(48, 48)}


def test_patches_are_dropped_until_the_given_share_of_the_budget(train, tmp_path, monkeypatch):
    rates = []
    step = train_on_device.Trainer.step
    monkeypatch.setattr(
        train_on_device.Trainer, 'step',
        lambda self, *args: rates.append(self.model.patch_drop.prob) or step(self, *args))
    monkeypatch.setattr(train_on_device, 'WARM_UP_STEPS', 0)
    train('--epochs', '4', '--model-kwargs', 'patch_drop_rate=0.5', '--all-patches-from', '0.75')
    assert rates == [0.5] * (len(rates) * 3 // 4) + [0.] * (len(rates) // 4)
    with pytest.raises(ValueError, match='--all-patches-from 0.75: test_vit drops no patches'):
        train('--epochs', '1', '--all-patches-from', '0.75', '--model', 'test_vit', output=tmp_path / 'other')


@pytest.mark.parametrize('options', [
    'cifar_teacher --model-kwargs widths=(8,8,8) residual=True',
    'cifar_teacher --model-kwargs widths=(8,8,8) residual=False',
    'cifar_resnet20 --model-kwargs depth=1 --lr 0.05 --epochs 30'])
def test_a_convolutional_teacher_trains(train, options):
    final = train(
        '--channels-last', '--epochs', '10', '--opt', 'sgd', '--lr', '0.3', '--bn-bias-lr-scale', '8',
        '--model-ema-decay', '0.9', '--model', *options.split())[-1]
    assert final['top1_ema'] == 100


def test_published_weights_of_a_residual_network_are_loaded(tmp_path):
    model, loaded = [timm.create_model('cifar_resnet20', depth=2) for _ in range(2)]
    published = {f'module.{name}': value for name, value in model.state_dict().items()}
    for ours, theirs in (
            ('stages.0', 'layer1'), ('stages.1', 'layer2'), ('stages.2', 'layer3'), ('module.conv.', 'module.conv1.'),
            ('module.norm.', 'module.bn1.'), ('norm', 'bn')):
        published = {name.replace(ours, theirs): value for name, value in published.items()}
    torch.save(dict(state_dict=published, best_prec1=0.), tmp_path / 'resnet14.th')
    assert train_on_device.load_weights(loaded, str(tmp_path / 'resnet14.th'), 'cifar_resnet20', depth=2) == 10
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_its_first_convolution_whitens_patches():
    model = timm.create_model('cifar_teacher', widths=(8, 8, 8))
    images = torch.rand(64, 3, 32, 32).mul(2).sub(1)
    images[:, 1:] = 0.8 * images[:, :1] + 0.2 * images[:, 1:]
    model.init_from_images(images)
    features = model.whiten(images)[:, :12].transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(features), torch.eye(12), atol=0.05, rtol=0)


# grown models

@pytest.mark.parametrize('kwargs', [{}, dict(workspace=False)])
def test_grown_blocks_begin_as_the_identity_and_learn(kwargs, tmp_path):
    small = timm.create_model('test_ait', depth=2, num_classes=2, **kwargs).eval()
    save_file(small.state_dict(), tmp_path / 'small.safetensors')
    large = timm.create_model('test_ait', depth=6, num_classes=2, **kwargs).eval()
    train_on_device.load_weights(
        large, str(tmp_path / 'small.safetensors'), 'test_ait', depth=6, num_classes=2, **kwargs)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(large(images), small(images))

    large.train()(images).square().sum().backward()
    for i in (1, 2, 4, 5):
        for name in ('attn.proj.weight', 'mlp.workspace.norm.weight' if not kwargs else 'mlp.fc2.weight'):
            assert large.get_parameter(f'blocks.{i}.{name}').grad.abs().max() > 0


def test_blocks_grow_into_a_multiple_of_them():
    with pytest.raises(ValueError, match='not into 5'):
        train_on_device.grow_blocks({'blocks.1.norm2.weight': torch.ones(1)}, 5)


# errors

@pytest.mark.parametrize('options, message', [
    ([], 'a budget is missing'), (['--epochs', '0'], '--epochs must be above 0'),
    (['--epochs', '1', '--batch-size', '7'], '--batch-size must be even'),
    (['--epochs', '1', '--warmup', '0.5'], '--warmup <= --decay-from'),
    (['--epochs', '1', '--evals', '0'], '--evals must be above 0'),
    (['--epochs', '1', '--batch-size', '0'], '--batch-size must be above 0'),
    (['--epochs', '1', '--clip-grad', '-1'], '--clip-grad must be above 0'),
    (['--epochs', '1', '--mixup-off', '2'], '--mixup-off must be in [0, 1]'),
    (['--epochs', '1', '--smoothing', '2'], '--smoothing must be in [0, 1]'),
    (['--epochs', '1', '--scale', '0.5', '2'], '0 < --scale MIN <= MAX <= 1'),
    (['--epochs', '1', '--scale', '0.5', '1', '--crop-padding', '2'], '--crop-padding 2: --scale places the crops'),
    (['--epochs', '1', '--all-patches-from', '-1'], '--all-patches-from must be in [0, 1]'),
    (['--epochs', '1', '--kd-model-file', 'a.safetensors'], 'a file for each teacher'),
    (['--epochs', '1', '--resume'], '--resume: there is no last.pth.tar'),
])
def test_options_out_of_range_are_refused(train, options, message, capsys):
    with pytest.raises(SystemExit):
        train(*options)
    assert message in capsys.readouterr().err


def test_a_choice_in_the_config_is_checked(train, tmp_path, capsys):
    (tmp_path / 'config.yaml').write_text('decay: liner')
    with pytest.raises(SystemExit):
        train('--epochs', '1', '--config', str(tmp_path / 'config.yaml'))
    assert '--decay must be one of linear, cosine, got liner' in capsys.readouterr().err


def test_a_run_is_replaced_by_none_that_does_not_go_on_with_it(train, tmp_path, capsys):
    train('--epochs', '1')
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in ('last.pth.tar', 'model.safetensors')}
    with pytest.raises(SystemExit):
        train('--epochs', '2')
    assert 'continue it with --resume' in capsys.readouterr().err
    for options, message in (
            (['--model-kwargs', 'depth=2'], 'has model_kwargs {}, got'),
            (['--weight-decay', '0.3'], 'has weight_decay 0.05, got 0.3'),
            (['--batch-size', '4'], 'has batch_size 8, got 4')):
        with pytest.raises(SystemExit):
            train('--epochs', '1', '--resume', *options)
        assert message in capsys.readouterr().err
    train('--epochs', '1', '--resume')  # it is at its end
    assert before == {name: (tmp_path / 'run' / name).read_bytes() for name in before}


def test_two_runs_do_not_write_into_one_folder(train, tmp_path):
    (tmp_path / 'run').mkdir()
    with FileLock(tmp_path / 'run' / 'run.lock'), pytest.raises(ValueError, match='another run writes there'):
        train('--epochs', '1')


def test_a_run_that_diverges_ends_without_weights(train, tmp_path):
    with pytest.raises(ValueError, match='the loss is nan at step'):
        train('--epochs', '3', '--opt', 'sgd', '--lr', '1e30', '--warmup', '0')
    assert not (tmp_path / 'run' / 'model.safetensors').exists()


@pytest.mark.parametrize('has_file', [True, False])
def test_a_teacher_of_other_classes_is_refused(train, tmp_path, hub, has_file):
    weights = save(timm.create_model('test_vit').state_dict())
    hub('timm/test_vit.r160_in1k', {'model.safetensors': weights})
    (tmp_path / 'teacher.safetensors').write_bytes(weights)
    options = ['--kd-model-file', str(tmp_path / 'teacher.safetensors')] if has_file else []
    with pytest.raises(ValueError, match='has 1000 classes, the data 2'):
        train('--epochs', '1', '--kd-model-name', 'test_vit', *options)


def test_a_file_replaces_the_weights_of_a_folder(tmp_path):
    model, other = [timm.create_model('test_ait', num_classes=2) for _ in range(2)]
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    save_file(other.state_dict(), tmp_path / 'other.safetensors')
    train_on_device.load_weights(model, str(tmp_path / 'other.safetensors'), f'local-dir:{tmp_path}', num_classes=2)
    assert torch.equal(model.head.weight, other.head.weight)


def test_images_of_several_sizes_are_refused(tmp_path):
    for name, size in (('a', 8), ('b', 9)):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (size, size)).save(tmp_path / 'train' / name / '0.png')
    with pytest.raises(ValueError, match='must be of one size, they are 8x8, 9x9'):
        train_on_device.read_images(train_on_device.open_split(str(tmp_path), 'train'), 2)


def test_a_damaged_image_is_named(tmp_path):
    image = next((write_images(tmp_path) / 'train').glob('*/*'))
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f'{image.name} is no image that can be read'):
        train_on_device.read_images(train_on_device.open_split(str(tmp_path), 'train'), 2)


def test_a_split_that_is_not_there_or_of_other_classes_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match='--data-dir nowhere is no folder'):
        train_on_device.open_split('nowhere', 'train')
    with pytest.raises(ValueError, match='has no folder trian'):
        train('--epochs', '1', '--train-split', 'trian')
    with pytest.raises(ValueError, match='--num-classes 1: the data have 2'):
        train('--epochs', '1', '--num-classes', '1')
    (next((tmp_path / 'images' / 'validation').iterdir())).rename(tmp_path / 'images' / 'validation' / 'other')
    with pytest.raises(ValueError, match='train and validation in .* must have the same classes'):
        train('--epochs', '1')


def test_data_sets_of_the_same_name_or_before_a_change_do_not_share_a_cache(tmp_path):
    folders = [write_images(tmp_path / name / 'images') for name in 'ab']
    changed = next((folders[0] / 'train').iterdir())
    for folder in (*folders, folders[0]):
        images = train_on_device.load_images(str(folder), 'train', 2, str(tmp_path))
        next(changed.iterdir()).unlink()
    assert len(list(tmp_path.glob('*.pt'))) == 3
    assert len(images.labels) == len(list((folders[0] / 'train').glob('*/*'))) + 1


def test_a_cache_notices_an_image_that_is_replaced_also_where_timm_finds_the_split_by_another_name(tmp_path):
    folder = write_images(tmp_path / 'images')
    (folder / 'validation').rename(folder / 'val')
    (folder / 'val' / 'dark').rename(tmp_path / 'elsewhere')
    (folder / 'val' / 'dark').symlink_to(tmp_path / 'elsewhere')
    for image in [*(folder / 'val' / 'light').iterdir(), *(tmp_path / 'elsewhere').iterdir()]:
        train_on_device.load_images(str(folder), 'validation', 2, str(tmp_path))
        Image.new('RGB', (32, 32), 'white').save(image)
    assert train_on_device.load_images(str(folder), 'validation', 2, str(tmp_path)).images.float().mean() > 250


def test_a_checkpoint_that_is_not_there_is_named(train, tmp_path):
    with pytest.raises(FileNotFoundError, match='none.safetensors, the weights for test_ait, is not there'):
        train('--epochs', '1', '--init', str(tmp_path / 'none.safetensors'))
