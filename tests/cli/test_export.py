import json
import os
import pickle

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_ait.__main__ import main
from timm_ait.cli.export import export
from timm_ait.cli.labels import class_names
from timm_ait.weights import weights_dir

IMAGE_FOLDERS = ('ait_small.cifar10', 'ait_small_patch32_64.triangle', 'ait_vit_small_patch14_dinov2.pets')
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


def names_of(folder):
    return class_names(timm.create_model(f'local-dir:{folder}', pretrained=True))[0]


class TestWeights:

    @pytest.mark.parametrize('options, key', [([], 'state_dict_ema'), (['--no-ema'], 'state_dict')])
    def test_averaged_or_last(self, checkpoint, tmp_path, options, key):
        run(checkpoint, tmp_path / 'out', *TRAINED, '--dtype', 'float32', *options)
        expected = torch.load(checkpoint)[key]
        for name, tensor in load_file(tmp_path / 'out/model.safetensors').items():
            torch.testing.assert_close(tensor, expected[name])  # the memory to rounding

    @pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
    def test_precision_on_disk(self, checkpoint, tmp_path, dtype):
        run(checkpoint, tmp_path / 'out', *TRAINED, '--dtype', dtype)
        tensors = load_file(tmp_path / 'out/model.safetensors').values()
        assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}

    def test_the_memory_is_as_evaluation_reads_it(self, tmp_path):
        model = timm.create_model('test_ait')
        with torch.no_grad():
            for block in model.blocks:  # as in a mean of several models
                block.mlp.workspace.memory.mul_(0.5).add_(0.1 * torch.randn(8, 16))
        stored = [block.mlp.workspace.stored_memory() for block in model.blocks]
        export(model, tmp_path, torch.float32)
        tensors = load_file(tmp_path / 'model.safetensors')
        for i, memory in enumerate(stored):
            torch.testing.assert_close(tensors[f'blocks.{i}.mlp.workspace.memory'], memory)

    def test_added_workspaces_come_back(self, tmp_path):
        options = ('--model', 'ait_from_timm', '--num-classes', '3')
        arguments = dict(model='test_vit', blocks=[-1], img_size=64)
        model = timm.create_model('ait_from_timm', num_classes=3, **arguments).eval()
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
        run(tmp_path / 'last.pth.tar', tmp_path / 'out', *options, '--dtype', 'float32', '--model-kwargs',
            *(f'{key}={value}' for key, value in arguments.items()))
        images = torch.randn(2, 3, 64, 64)
        loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        torch.testing.assert_close(loaded(images), model(images))

    def test_other_files_of_the_folder_stay(self, checkpoint, tmp_path):
        (tmp_path / 'out').mkdir()
        (tmp_path / 'out/README.md').write_text('a card')
        run(checkpoint, tmp_path / 'out', *TRAINED)
        assert {file.name for file in (tmp_path / 'out').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}


class TestClassNames:

    def test_those_of_the_pretrained_weights_do_not_survive(self, tmp_path):
        model = timm.create_model('ait_small')  # as trained further on ten classes
        assert model.pretrained_cfg['label_names']
        torch.save(model.state_dict(), tmp_path / 'last.pth')
        config = run(tmp_path / 'last.pth', tmp_path / 'out', '--model', 'ait_small', '--num-classes', '10')
        assert 'airplane' not in json.dumps(config)
        assert names_of(tmp_path / 'out') == [str(i) for i in range(10)]

    def test_nor_those_of_imagenet(self, tmp_path):
        model = timm.create_model('test_ait', num_classes=1000)
        export(model, tmp_path)
        assert names_of(tmp_path) == [str(i) for i in range(1000)]

    def test_from_a_text_file(self, checkpoint, tmp_path):
        (tmp_path / 'names.txt').write_text('rose\ndaisy\nä tulip\n\n', encoding='utf-8')
        config = run(checkpoint, tmp_path / 'out', *TRAINED, '--class-map', tmp_path / 'names.txt')
        assert config['label_names'] == ['rose', 'daisy', 'ä tulip'] == names_of(tmp_path / 'out')

    def test_from_a_pickled_class_map(self, checkpoint, tmp_path):
        (tmp_path / 'names.pkl').write_bytes(pickle.dumps({'rose': 2, 'daisy': 0, 'tulip': 1}))
        run(checkpoint, tmp_path / 'out', *TRAINED, '--class-map', tmp_path / 'names.pkl')
        assert names_of(tmp_path / 'out') == ['daisy', 'tulip', 'rose']

    @pytest.mark.parametrize('split', ['train', 'training', '.'])
    def test_from_the_class_folders_in_timms_order(self, checkpoint, tmp_path, split):
        for name in ('class10', 'Class9', 'class1', 'no images'):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            if name != 'no images':
                Image.new('RGB', (4, 4)).save(tmp_path / 'data' / split / name / 'a.png')
        run(checkpoint, tmp_path / 'out', *TRAINED, '--data-dir', tmp_path / 'data')
        assert names_of(tmp_path / 'out') == ['class1', 'Class9', 'class10']

    @pytest.mark.parametrize('text', ['rose\n', 'rose\ndaisy\ntulip\nlily\n', 'rose\n\ndaisy\ntulip\n', 'a\nb\na\nc\n'])
    def test_names_of_other_classes_are_refused(self, checkpoint, tmp_path, capsys, text):
        (tmp_path / 'names.txt').write_text(text)
        fails(capsys, '--class-map', checkpoint, tmp_path / 'out', *TRAINED, '--class-map', tmp_path / 'names.txt')

    @pytest.mark.parametrize('name', ['nowhere.txt', 'last.pth.tar', '.'])
    def test_an_unreadable_class_map_is_refused(self, checkpoint, tmp_path, capsys, name):
        fails(capsys, '--class-map', checkpoint, tmp_path / 'out', *TRAINED, '--class-map', tmp_path / name)

    @pytest.mark.parametrize('name', ['nowhere', '.', 'last.pth.tar'])
    def test_a_data_set_without_the_classes_is_refused(self, checkpoint, tmp_path, capsys, name):
        fails(capsys, '--data-dir', checkpoint, tmp_path / 'out', *TRAINED, '--data-dir', tmp_path / name)


def fails(capsys, argument, checkpoint, out, *options):
    """A mistake is answered in one line that names the argument, and nothing is written."""
    before = out.read_bytes() if out.is_file() else None
    with pytest.raises(SystemExit, match='2'):
        main(['export', str(checkpoint), '--out', str(out), *map(str, options)])
    error = capsys.readouterr().err
    assert argument in error and len(error.splitlines()) == 1, error
    assert (out.read_bytes() if out.is_file() else None) == before
    assert not out.is_dir()


class TestMistakes:

    @pytest.mark.parametrize('argument, options', [
        ('--model', ['--model', 'no_such_model']),
        ('--model', ['--model', 'local-dir:nowhere']),
        ('--model', ['--model', 'ait_from_timm']),
        ('--model', ['--model', 'ait_from_timm', '--model-kwargs', 'model=no_such_model']),
        ('--model-kwargs', [*TRAINED, '--model-kwargs', 'depth']),
        ('--model-kwargs', [*TRAINED, '--model-kwargs', 'no_such_argument=3']),
        ('--model-kwargs', [*TRAINED, '--model-kwargs', 'num_slots=-1']),
        ('--num-classes', ['--model', 'test_ait', '--num-classes', '-3']),
        ('CHECKPOINT', ['--model', 'test_ait']),
        ('CHECKPOINT', [*TRAINED, '--model-kwargs', 'depth=2']),
        ('CHECKPOINT', [*TRAINED, '--model-kwargs', 'num_slots=9']),
    ])
    def test_of_the_model(self, capsys, checkpoint, tmp_path, argument, options):
        fails(capsys, argument, checkpoint, tmp_path / 'out', *options)

    @pytest.mark.parametrize('content', ['', 'text', 'half', 'list', 'number', 'empty', 'code'])
    def test_of_the_checkpoint(self, capsys, checkpoint, tmp_path, content):
        if content in ('', 'text'):
            checkpoint.write_text(content)
        elif content == 'half':
            checkpoint.write_bytes(checkpoint.read_bytes()[:checkpoint.stat().st_size // 2])
        else:
            torch.save({'list': [1], 'number': 3, 'empty': {}, 'code': os.getcwd}[content], checkpoint)
        fails(capsys, 'CHECKPOINT', checkpoint, tmp_path / 'out', *TRAINED)

    @pytest.mark.parametrize('name', ['nowhere', '.'])
    def test_no_checkpoint(self, capsys, tmp_path, name):
        fails(capsys, 'CHECKPOINT', tmp_path / name, tmp_path / 'out', *TRAINED)

    def test_a_folder_that_is_a_file(self, capsys, checkpoint):
        fails(capsys, '--out', checkpoint, checkpoint, *TRAINED)
        fails(capsys, '--out', checkpoint, checkpoint / 'below', *TRAINED)

    def test_values_out_of_range(self, capsys, checkpoint, tmp_path):
        state_dict = timm.create_model('test_ait', num_classes=3).state_dict()
        state_dict['head.bias'] += 1e6
        torch.save(state_dict, checkpoint)
        fails(capsys, 'head.bias', checkpoint, tmp_path / 'out', *TRAINED)
        run(checkpoint, tmp_path / 'out', *TRAINED, '--dtype', 'bfloat16')

    def test_a_failed_write_leaves_what_was_there(self, capsys, checkpoint, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError(28, 'No space left on device')

        run(checkpoint, tmp_path / 'out', *TRAINED)
        before = {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()}
        monkeypatch.setattr('timm.models._hub.save_config_for_hf', fail)
        fails(capsys, '--out', checkpoint, tmp_path / 'new', *TRAINED)
        with pytest.raises(SystemExit, match='2'):
            run(checkpoint, tmp_path / 'out', *TRAINED, '--no-ema')
        assert {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()} == before

    @pytest.mark.parametrize('package', ['onnx', 'onnxscript'])
    def test_a_missing_package_is_named(self, capsys, checkpoint, tmp_path, monkeypatch, package):
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == package else name)
        fails(capsys, f'pip install {package}', checkpoint, tmp_path / 'out', *TRAINED, '--onnx')

    def test_questions_have_no_onnx(self, capsys, checkpoint, tmp_path):
        options = ['--model', 'test_ait', '--model-kwargs', 'question_dim=3', '--onnx']
        fails(capsys, '--onnx', checkpoint, tmp_path / 'out', *options)


class TestOnnx:

    def test_computes_what_the_model_does_for_any_batch(self, checkpoint, tmp_path):
        pytest.importorskip('onnxscript')
        onnxruntime = pytest.importorskip('onnxruntime')
        run(checkpoint, tmp_path / 'out', *TRAINED, '--onnx')
        assert sorted(os.listdir(tmp_path / 'out')) == ['config.json', 'model.onnx', 'model.safetensors']
        model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        session = onnxruntime.InferenceSession(str(tmp_path / 'out/model.onnx'), providers=['CPUExecutionProvider'])
        for batch_size in (1, 2, 5):
            images = torch.randn(batch_size, 3, 32, 32)
            logits = torch.from_numpy(session.run(['logits'], {'image': images.numpy()})[0])
            torch.testing.assert_close(logits, model(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def transformers():
    return pytest.importorskip('transformers')


class TestTransformers:

    @pytest.fixture
    def exported(self, tmp_path):
        model = timm.create_model('test_ait', num_classes=3)
        torch.nn.init.normal_(model.head.weight)
        export(model, tmp_path / 'out', label_names=['rose', 'daisy', 'tulip'])
        return tmp_path / 'out'

    def check(self, transformers, folder, names):
        expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
        images = torch.randn(2, *expected.pretrained_cfg['input_size'])
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, expected(images), rtol=0, atol=0)
        assert model.config.id2label == dict(enumerate(names))

        classify = transformers.pipeline('image-classification', model=str(folder), dtype=torch.float32)
        assert {prediction['label'] for prediction in classify(Image.new('RGB', (40, 30)))} <= set(names)

    def test_what_export_writes(self, transformers, exported):
        self.check(transformers, exported, ['rose', 'daisy', 'tulip'])

    @pytest.mark.parametrize('name', IMAGE_FOLDERS)
    def test_the_shipped_weights(self, transformers, name):
        self.check(transformers, weights_dir() / name, timm.create_model(name).pretrained_cfg['label_names'])

    def test_a_model_that_answers_questions_takes_them_by_name(self, transformers, tmp_path):
        # patches, since transformers before 5 builds no hybrid, timm's neither
        export(timm.create_model('test_ait', num_classes=3, question_dim=4), tmp_path)
        expected = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
        images, question = torch.randn(2, 3, 32, 32), torch.eye(4)[:2]
        with torch.no_grad():
            torch.testing.assert_close(
                model(images, question=question).logits, expected(images, question=question), rtol=0, atol=0)
            with pytest.raises(TypeError, match='question'):
                model(images)
