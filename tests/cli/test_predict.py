import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import timm
from timm.data import create_transform, resolve_model_data_config

from timm_ait.__main__ import main
from timm_ait.cli.images import class_names, find_images

EXAMPLES = Path(__file__).parents[2] / 'examples' / 'images' / 'cifar10'


def predict(*args):
    return main(['predict', *map(str, args)])


def predict_json(capsys, *args):
    code = predict(*args, '--json')
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


class TestPredict:

    def test_probabilities_are_those_of_timms_own_pipeline(self, capsys, model, images):
        _, document, _ = predict_json(capsys, images / 'a.jpg', '--model', model, '--topk', 10)
        reference = timm.create_model(model, pretrained=True).eval()
        transform = create_transform(**resolve_model_data_config(reference), is_training=False)
        with torch.no_grad():
            probabilities = reference(transform(Image.open(images / 'a.jpg').convert('RGB'))[None]).softmax(-1)[0]
        for prediction in document['images'][0]['predictions']:
            assert prediction['probability'] == pytest.approx(probabilities[prediction['index']].item(), rel=1e-5)
            assert prediction['name'] == class_names(reference)[0][prediction['index']]

    def test_a_line_an_image(self, capsys, model, images):
        assert predict(images, '--model', model, '--topk', 2) == 0
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert [line.split('  ')[0] for line in lines] == [str(file) for file in find_images([images])]
        assert all(line.count('% ') == 2 for line in lines)
        assert '3/3' in captured.err

    def test_file_names_that_cannot_be_printed(self, capsys, model, images):
        file = os.fsdecode(b'\xff.png')
        (images / 'b.png').rename(images / file)
        assert predict(images / file, '--model', model) == 0
        assert '\\udcff.png' in capsys.readouterr().out


class TestSheet:

    def test_is_written(self, model, tmp_path):
        sheet = tmp_path / 'sheet.png'
        assert predict(EXAMPLES, '--model', model, '--sheet', sheet) == 0
        assert Image.open(sheet).format == 'PNG'
        assert list(tmp_path.iterdir()) == [sheet]

    @pytest.mark.parametrize('name, message', [
        ('sheet.gif', 'ends in .png'), ('folder.png', 'name of a file'), ('images/a.jpg/sheet.png', 'not a folder')])
    def test_bad_file(self, error_of, images, tmp_path, name, message):
        (tmp_path / 'folder.png').mkdir()
        error = error_of('predict', images, '--sheet', tmp_path / name)
        assert '--sheet' in error and str((tmp_path / name).parent) in error and message in error

    def test_a_sheet_is_none_of_the_images(self, error_of, images):
        assert 'b.png is one of the images' in error_of('predict', images, '--sheet', images / 'b.png')

    def test_too_many_images(self, error_of, tmp_path):
        for i in range(1001):
            (tmp_path / f'{i}.png').touch()
        assert '--sheet has room for 1000 images, got 1001' in error_of('predict', tmp_path, '--sheet', 'sheet.png')

    def test_a_failed_write_costs_neither_old_sheet_nor_results(self, capsys, model, images, tmp_path, monkeypatch):
        def save(image, file):
            Path(file).write_bytes(b'half a file')
            raise OSError('disk full')

        (tmp_path / 'sheet.png').write_bytes(b'old')
        monkeypatch.setattr(Image.Image, 'save', save)
        with pytest.raises(SystemExit, match='2'):
            predict(images, '--model', model, '--json', '--sheet', tmp_path / 'sheet.png')
        out, err = capsys.readouterr()
        assert len(json.loads(out)['images']) == 3
        assert 'disk full' in err.splitlines()[-1]
        assert (tmp_path / 'sheet.png').read_bytes() == b'old'
        assert {file.name for file in tmp_path.iterdir()} == {'images', 'sheet.png'}


class TestErrors:

    def test_unreadable_files_are_named_and_skipped(self, capsys, model, images):
        (images / 'broken.png').write_text('not an image')
        (images / 'cut.bmp').write_bytes((images / 'sub/c.bmp').read_bytes()[:500])
        code, document, error = predict_json(capsys, images, '--model', model)
        assert code == 1
        assert len(document['images']) == 3
        assert [error['file'] for error in document['errors']] == [str(images / 'broken.png'), str(images / 'cut.bmp')]
        assert f'{images / "broken.png"}: cannot be classified' in error

    @pytest.mark.parametrize('name, message', [
        ('no_such_model', 'Unknown model'), ('test_ait', 'No pretrained weights'), ('local-dir:nowhere', 'nowhere'),
    ])
    def test_model(self, error_of, images, name, message):
        error = error_of('predict', images, '--model', name)
        assert f'--model {name}' in error and message in error and 'local-dir:' in error

    @pytest.mark.parametrize('kwargs, message', [
        (dict(num_classes=0), 'num_classes=0'), (dict(num_classes=1), 'num_classes=1'),
        (dict(in_chans=2), '2 channels'),
        (dict(question_dim=3), 'answers questions')])
    def test_model_that_does_not_classify_images(self, error_of, save, images, kwargs, message):
        assert message in error_of('predict', images, '--model', save(timm.create_model('test_ait', **kwargs)))

    @pytest.mark.parametrize('bias, kwargs', [(float('nan'), {}), (0., dict(global_pool='', fc_norm=False))])
    def test_model_output_that_is_not_a_number_for_each_class(self, error_of, save, images, bias, kwargs):
        model = timm.create_model('test_ait', **kwargs)
        torch.nn.init.constant_(model.head.bias, bias)
        error = error_of('predict', images, '--model', save(model))
        assert str(images / 'a.jpg') in error and 'not one number for each class' in error


@pytest.mark.parametrize('command', ['predict', 'explain --out out'])
class TestErrorsOfBothCommands:

    @pytest.mark.parametrize('config', [
        dict(data_config=dict(interpolation='lanczos3')), dict(model_config=dict(label_names={'cat': 0, 'dog': 1}))])
    def test_a_bad_config_is_that_of_the_model(self, error_of, save, images, command, config):
        model = save(timm.create_model('test_ait'), **config)
        assert f'error: --model {model}: ' in error_of(*command.split(), images, '--model', model)

    def test_a_path_that_does_not_exist(self, error_of, images, command):
        assert 'IMAGE: there is no file or folder nowhere' in error_of(*command.split(), images, 'nowhere')

    def test_no_file_can_be_read(self, error_of, model, tmp_path, monkeypatch, command):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'broken.png').write_text('not an image')
        verb = 'classified' if command == 'predict' else 'explained'
        lines = error_of(*command.split(), 'broken.png', '--model', model).splitlines()
        assert any(line.startswith(f'broken.png: cannot be {verb}') for line in lines)
        assert lines[-1].endswith(f'error: IMAGE: none of the files could be {verb}, see above')
        assert os.listdir() == ['broken.png']


class TestCommandLine:

    @pytest.mark.slow
    @pytest.mark.parametrize('output, message', [('| true', None), ('> /dev/full', 'error: OSError')])
    def test_a_closed_pipe_or_a_full_disk_ends_it(self, model, images, output, message):
        command = f'{sys.executable} -m timm_ait predict {images} --model {model} {output}'
        result = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert 'Exception' not in result.stderr
        assert (message in result.stderr and result.returncode == 2) if message else 'Error' not in result.stderr

    @pytest.mark.parametrize('argv', [[], ['guess'], ['predict'], ['run']])
    def test_incomplete(self, error_of, argv):
        assert error_of(*argv)

    @pytest.mark.parametrize('command, option, value', [
        ('predict images', '--topk', '-1'), ('predict images', '--device', 'toaster'),
        ('explain images --out out', '--layers', '0'), ('explain images --out out', '--slots', '-1'),
        ('explain images --out out', '--device', 'toaster'), ('explain images', '--out', __file__),
        ('export test_ait --out out', '--num-classes', '-3'), ('export test_ait', '--out', __file__),
        ('export test_ait', '--out', ''),
        ('data triangle --out out', '--train', '0'), ('data triangle --out out', '--validation', '0'),
        ('data triangle --out out', '--seed', '-1'), ('data triangle --out out', '--seed', str(2 ** 64)),
        ('data triangle', '--out', __file__),
    ])
    def test_a_bad_value_is_named_in_one_line(self, error_of, images, monkeypatch, command, option, value):
        monkeypatch.chdir(images.parent)
        error = error_of(*command.split(), option, value)
        assert option in error and value in error and len(error.splitlines()) == 1
        assert os.listdir() == ['images']
