import argparse
import json
import os
import shlex
import sys

import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import timm
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models import resolve_model_input_args
from timm.utils import CheckpointSaver

from timm_ait.__main__ import main
from timm_ait.cli.export import export
from timm_ait.cli.images import class_names
from timm_ait.weights import weights_dir

SMALLEST = 'ait_tiny_hybrid_75.sort_of_clevr'
TRAINED = ('--model', 'test_ait', '--num-classes', '3')


@pytest.fixture
def checkpoint(tmp_path):
    """As train.py writes it: last weights, and averaged ones."""
    file = tmp_path / 'last.pth.tar'
    models = [timm.create_model('test_ait', num_classes=3) for _ in range(2)]
    torch.save({'epoch': 1, 'state_dict': models[0].state_dict(), 'state_dict_ema': models[1].state_dict()}, file)
    return file


def run(checkpoint, out, *options):
    assert main(['export', str(checkpoint), '--out', str(out), *map(str, options)]) == 0
    return json.loads((out / 'config.json').read_text())


class TestWeights:

    @pytest.mark.parametrize('options, key', [([], 'state_dict_ema'), (['--no-ema'], 'state_dict')])
    def test_averaged_or_last(self, checkpoint, tmp_path, options, key):
        run(checkpoint, tmp_path / 'out', *TRAINED, *options)
        torch.testing.assert_close(load_file(tmp_path / 'out/model.safetensors'), torch.load(checkpoint)[key])

    def test_the_memory_is_as_evaluation_reads_it(self, tmp_path):
        model = timm.create_model('test_ait')
        with torch.no_grad():
            for block in model.blocks:  # as in a mean of several models
                block.mlp.workspace.memory.mul_(0.5).add_(0.1 * torch.randn(8, 16))
        stored = [block.mlp.workspace.stored_memory() for block in model.blocks]
        export(model, tmp_path)
        tensors = load_file(tmp_path / 'model.safetensors')
        for i, memory in enumerate(stored):
            torch.testing.assert_close(tensors[f'blocks.{i}.mlp.workspace.memory'], memory)

    def test_an_onnx_file_is_not_left_beside_other_weights(self, tmp_path):
        (tmp_path / 'model.onnx').touch()
        with pytest.raises(ValueError, match='model.onnx would no longer match the new weights'):
            export(timm.create_model('test_ait'), tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']

    def test_added_workspaces_come_back(self, tmp_path):
        arguments = dict(model='test_vit', blocks=[-1], img_size=64)
        model = timm.create_model('ait_from_timm', num_classes=3, **arguments).eval()
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
        run(tmp_path / 'last.pth.tar', tmp_path / 'out', '--model', 'ait_from_timm', '--num-classes', '3',
            '--model-kwargs', *(f'{key}={value}' for key, value in arguments.items()))
        images = torch.randn(2, 3, 64, 64)
        loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        torch.testing.assert_close(loaded(images), model(images))


@pytest.fixture
def train(tmp_path):
    """A checkpoint of train.py's saver, trained with the given arguments."""
    def train(**arguments):
        defaults = dict(
            model='test_ait', num_classes=3, model_kwargs={}, gp=None, in_chans=None, input_size=None, img_size=None,
            mean=None, std=None, interpolation='', crop_pct=None, data=None, data_dir=None, dataset='',
            train_split='train', class_map='')
        args = argparse.Namespace(**{**defaults, **arguments})
        model = timm.create_model(**resolve_model_input_args(  # as train.py does
            args.model, vars(args), num_classes=args.num_classes, global_pool=args.gp, **args.model_kwargs))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        CheckpointSaver(model, optimizer, args, checkpoint_dir=tmp_path).save_checkpoint(0, 0.)
        return tmp_path / 'last.pth.tar'

    return train


def write_classes(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new('RGB', (4, 4)).save(folder / name / 'a.png')


class TestTrainingArguments:

    @pytest.mark.parametrize('arguments', [
        dict(), dict(model='test_vit', num_classes=7), dict(model_kwargs=dict(num_slots=4, img_size=16)),
        dict(in_chans=1), dict(input_size=[1, 32, 32]), dict(input_size=[1, 64, 64]), dict(img_size=64), dict(gp='max'),
        dict(img_size=64, model_kwargs=dict(dynamic_img_size=True)),
    ], ids=str)
    def test_say_which_model_it_is(self, train, tmp_path, arguments):
        run(train(**arguments), tmp_path / 'out')
        expected = torch.load(tmp_path / 'last.pth.tar', weights_only=False)['state_dict']
        model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
            key: tensor.shape for key, tensor in expected.items()}
        assert model.global_pool == arguments.get('gp', model.global_pool)

    @pytest.mark.parametrize('give', [lambda args: args, lambda args: dict(pretrained_cfg_overlay=args)])
    def test_say_how_images_are_preprocessed(self, train, tmp_path, give):
        preprocessing = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='bilinear', crop_pct=0.9)
        checkpoint = train(**give(preprocessing), img_size=64, model_kwargs=dict(img_size=64))
        cfg = run(checkpoint, tmp_path / 'out')['pretrained_cfg']
        assert {key: cfg[key] for key in preprocessing} == preprocessing
        assert cfg['input_size'] == [3, 64, 64]

    def test_say_where_the_class_folders_are(self, train, tmp_path):
        write_classes(tmp_path / 'data/training', 'a', 'b', 'c')
        (tmp_path / 'map.txt').write_text('c\na\nb')
        arguments = dict(data_dir=str(tmp_path / 'data'), train_split='training', class_map=str(tmp_path / 'map.txt'))
        run(train(**arguments), tmp_path / 'out')
        model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
        assert class_names(model)[0] == ['c', 'a', 'b']

    def test_say_in_what_order_torchvision_lists_class_folders(self, train, tmp_path):
        write_classes(tmp_path / 'data/train', 'C', 'a', 'B')
        config = run(train(dataset='torch/image_folder'), tmp_path / 'out', '--data-dir', tmp_path / 'data')
        assert config['label_names'] == ['B', 'C', 'a']

    def test_may_have_the_image_size_as_one_number(self, tmp_path):
        # as DeiT and MAE, which read images with torchvision and ImageNet's mean
        weights = timm.create_model('test_ait', num_classes=3, img_size=64).state_dict()
        arguments = argparse.Namespace(model='test_ait', input_size=64)
        torch.save({'model': weights, 'args': arguments}, tmp_path / 'last.pth.tar')
        write_classes(tmp_path / 'data/train', 'C', 'a', 'B')
        config = run(
            tmp_path / 'last.pth.tar', tmp_path / 'out', '--num-classes', '3', '--data-dir', tmp_path / 'data')
        assert config['pretrained_cfg']['input_size'] == [3, 64, 64]
        assert config['pretrained_cfg']['mean'] == list(IMAGENET_DEFAULT_MEAN)
        assert config['pretrained_cfg']['crop_pct'] == 0.875
        assert config['label_names'] == ['B', 'C', 'a']

    @pytest.mark.parametrize('names, arguments', [
        ('ab', {}), ('', {}), ('abc', dict(dataset='sort_of_clevr'))])
    def test_a_folder_of_other_classes_or_another_data_set_gives_no_names(self, train, tmp_path, names, arguments):
        (tmp_path / 'data/train').mkdir(parents=True)
        write_classes(tmp_path / 'data/train', *names)
        assert 'label_names' not in run(train(data_dir=str(tmp_path / 'data'), **arguments), tmp_path / 'out')

    @pytest.mark.parametrize('options', [
        ('--model', 'no_such_model'), ('--num-classes', '4'), ('--model-kwargs', 'depth=2')], ids=' '.join)
    def test_are_less_than_options(self, refused, train, options):
        refused('no_such_model' if '--model' in options else 'CHECKPOINT', train(model_kwargs=dict(depth=3)), *options)


class TestPretrained:

    @pytest.mark.parametrize(
        'source', [SMALLEST, weights_dir() / SMALLEST, weights_dir() / SMALLEST / 'model.safetensors'],
        ids=['name', 'folder', 'file'])
    def test_keeps_its_weights_names_tag_and_license(self, tmp_path, source):
        config = run(source, tmp_path / 'out')
        exported, shipped = (
            load_file(folder / 'model.safetensors') for folder in (tmp_path / 'out', weights_dir() / SMALLEST))
        torch.testing.assert_close(exported, shipped, atol=1e-3, rtol=1e-3, check_dtype=False)
        cfg = timm.get_pretrained_cfg(SMALLEST)
        assert config['label_names'] == list(cfg.label_names)
        assert (config['pretrained_cfg']['tag'], config['pretrained_cfg']['license']) == (cfg.tag, cfg.license)

    @pytest.mark.parametrize('options', [
        ('--model', 'ait_base'), ('--num-classes', '0'), ('--no-ema',), ('--model-kwargs', 'num_classes=4'),
    ], ids=' '.join)
    def test_refuses_options_of_a_training(self, refused, options):
        refused(options[0], SMALLEST, *options)

    @pytest.mark.parametrize('name', ['no_such_model', 'ait_small.no_such_tag', 'test_ait', 'local-dir:nowhere'])
    def test_what_does_not_exist_is_named(self, refused, name):
        refused(f'CHECKPOINT {name}', name)

    def test_classes_that_are_as_many_as_imagenets_are_numbers(self, train, tmp_path):
        assert run(train(num_classes=1000), tmp_path / 'out')['label_names'] == [str(i) for i in range(1000)]

    def test_fine_tuned_it_has_other_names_tag_and_license(self, train, tmp_path):
        config = run(train(model='ait_tiny_hybrid_75', num_classes=10), tmp_path / 'out')
        assert not {'label_names', 'tag', 'license'} & {*config, *config['pretrained_cfg']}


class TestReport:

    def test_says_what_was_written_and_class_folders_in_timms_order(self, checkpoint, tmp_path, capsys):
        write_classes(tmp_path / 'data/train', 'class10', 'Class9', 'class1')
        run(checkpoint, tmp_path / 'out', *TRAINED, '--data-dir', tmp_path / 'data')
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [
            f'{tmp_path / "out"}: test_ait in float32', 'classes: 3 (class1, Class9, class10)', 'input: 3 x 32 x 32']

    def test_ends_with_a_command_that_works(self, checkpoint, tmp_path, capsys):
        run(checkpoint, tmp_path / 'my model', *TRAINED)
        command = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert command[:5] == ['try:', 'python', '-m', 'timm_ait', 'predict']
        Image.new('RGB', (40, 30)).save(tmp_path / 'image.png')
        assert main([str(tmp_path / 'image.png') if word == 'IMAGE' else word for word in command[4:]]) == 0


@pytest.fixture
def refused(error_of, tmp_path):
    """Function of a mistake that has to be answered in one line that names the argument; nothing is written."""
    def refused(argument, checkpoint, *options):
        error = error_of('export', checkpoint, '--out', tmp_path / 'out', *options)
        assert argument in error.replace(str(tmp_path), '') and len(error.splitlines()) == 1, error
        assert not (tmp_path / 'out').exists()

    return refused


class TestMistakes:

    @pytest.mark.parametrize('argument, options', [
        ('--model', ['--model', 'no_such_model']), ('--model', ['--model', 'local-dir:nowhere']),
        ('--model', ['--model', 'ait_from_timm']),
        ('--model', ['--model', 'ait_from_timm', '--model-kwargs', 'model=no_such_model']),
        ('--model-kwargs', [*TRAINED, '--model-kwargs', 'depth']),
        ('--model-kwargs', [*TRAINED, '--model-kwargs', 'no_such_argument=3']),
        ('--model-kwargs', [*TRAINED, '--model-kwargs', 'num_slots=-1']), ('--model', []),
        ('CHECKPOINT', ['--model', 'test_ait']), ('CHECKPOINT', [*TRAINED, '--model-kwargs', 'depth=2']),
        ('CHECKPOINT', [*TRAINED, '--model-kwargs', 'num_slots=9']),
    ])
    def test_of_the_model(self, refused, checkpoint, argument, options):
        refused(argument, checkpoint, *options)

    @pytest.mark.parametrize('content', ['text', 'hi', '', 'half', 'list', 'empty', 'code'])
    def test_of_the_checkpoint(self, refused, checkpoint, content):
        if content in ('text', 'hi', ''):
            checkpoint.write_text(content)
        elif content == 'half':
            checkpoint.write_bytes(checkpoint.read_bytes()[:checkpoint.stat().st_size // 2])
        else:
            torch.save({'list': [1], 'empty': {}, 'code': os.getcwd}[content], checkpoint)
        refused('more than weights' if content in ('text', 'hi', '', 'code') else 'CHECKPOINT', checkpoint, *TRAINED)

    @pytest.mark.parametrize('name, message', [
        ('nowhere', 'it does not exist'), ('.', '--data-dir'), ('last.pth.tar', '--data-dir')])
    def test_of_the_data_set(self, refused, checkpoint, tmp_path, name, message):
        refused(message, checkpoint, *TRAINED, '--data-dir', tmp_path / name)

    def test_of_the_number_of_classes(self, refused, checkpoint, tmp_path):
        write_classes(tmp_path / 'data/train', 'a', 'b')
        refused('names for 2 classes, the model has 3', checkpoint, *TRAINED, '--data-dir', tmp_path / 'data')

    def test_values_out_of_range(self, refused, checkpoint, tmp_path):
        state_dict = timm.create_model('test_ait', num_classes=3).state_dict()
        state_dict['head.bias'] += 1e6
        torch.save(state_dict, checkpoint)
        refused('head.bias', checkpoint, *TRAINED, '--dtype', 'float16')
        run(checkpoint, tmp_path / 'out', *TRAINED, '--dtype', 'bfloat16')
        assert {x.dtype for x in load_file(tmp_path / 'out/model.safetensors').values()} == {torch.bfloat16}

    def test_a_failed_write_leaves_what_was_there(self, capsys, error_of, checkpoint, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError(28, 'No space left on device')

        out = tmp_path / 'out'
        out.mkdir()
        (out / 'README.md').write_text('card')
        run(checkpoint, out, *TRAINED)
        assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors']
        before = {file.name: file.read_bytes() for file in out.iterdir()}
        capsys.readouterr()
        monkeypatch.setattr('timm.models._hub.save_config_for_hf', fail)
        assert f'--out {out}, nothing was written' in error_of('export', checkpoint, '--out', out, *TRAINED, '--no-ema')
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before

    def test_a_missing_package_is_named(self, error_of, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, 'onnx', None)
        error = error_of('export', checkpoint, '--out', tmp_path / 'out', *TRAINED, '--onnx')
        assert f'--out {tmp_path / "out"}, nothing was written' in error and 'import of onnx' in error
        assert not (tmp_path / 'out').exists()

    def test_questions_have_no_onnx(self, refused, train):
        refused('--onnx', train(model_kwargs=dict(question_dim=3)), '--onnx')


@pytest.mark.slow
def test_onnx_takes_the_images_of_the_model(tmp_path):
    export(timm.create_model('test_ait', img_size=64, in_chans=1), tmp_path, onnx=True)
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    assert session.get_inputs()[0].shape[1:] == [1, 64, 64]


class TestTransformers:

    def test_trains_half_precision_in_float32(self, tmp_path):
        export(timm.create_model('test_ait', num_classes=3), tmp_path, torch.float16)
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).train()
        model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}

    def test_computes_the_same_logits_and_names_the_classes(self, tmp_path):
        model, names = timm.create_model('test_ait', num_classes=3), ['rose', 'daisy', 'tulip']
        torch.nn.init.normal_(model.head.weight)
        export(model, tmp_path, label_names=names)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images).logits, model.eval()(images), rtol=0, atol=0)
        assert loaded.config.id2label == dict(enumerate(names))

        classify = transformers.pipeline('image-classification', model=str(tmp_path))
        assert {prediction['label'] for prediction in classify(Image.new('RGB', (40, 30)))} <= set(names)

    def test_a_model_that_answers_questions_takes_them_by_name(self, tmp_path):
        # patches, since transformers before 5 builds no hybrid, timm's neither
        export(timm.create_model('test_ait', num_classes=3, question_dim=4), tmp_path)
        expected = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        images, question = torch.randn(2, 3, 32, 32), torch.eye(4)[:2]
        with torch.no_grad():
            torch.testing.assert_close(
                model(images, question=question).logits, expected(images, question=question), rtol=0, atol=0)
            with pytest.raises(TypeError, match='question'):
                model(images)
