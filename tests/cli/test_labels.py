import pytest

import timm

from timm_ait.cli.labels import class_names, match_labels, read_labels


def model_with(num_classes, **cfg):
    return timm.create_model('test_ait', num_classes=num_classes, pretrained_cfg_overlay=cfg)


class TestClassNames:

    @pytest.mark.parametrize('label_names', [['cat', 'dog'], {'0': 'cat', '1': 'dog'}])
    def test_from_the_config(self, label_names):
        model = model_with(2, label_names=label_names, label_descriptions={'cat': 'tom', 'dog': 'rex'})
        assert class_names(model) == (['cat', 'dog'], ['tom', 'rex'])

    @pytest.mark.parametrize('num_classes', [1, 3])
    def test_names_of_another_number_of_classes_are_not_used(self, num_classes):
        names = class_names(model_with(num_classes, label_names=['cat', 'dog']))[0]
        assert names == [str(i) for i in range(num_classes)]

    def test_imagenet_classes(self):
        names, descriptions = class_names(model_with(1000))
        assert names[0] == 'n01440764'
        assert descriptions[0].startswith('tench')


class TestReadLabels:

    def read(self, tmp_path, text):
        (tmp_path / 'labels.csv').write_text(text, encoding='utf-8')
        return read_labels(tmp_path / 'labels.csv')

    @pytest.mark.parametrize('text', [
        'file,label\na/b.png,cat\nb.png,\nc.png\n,\n',
        'file,label,\na/b.png,cat,\nb.png,,\n,,\n',
        'file,label,,\na/b.png,cat\n',
    ])
    def test_of_files_relative_to_the_csv_file_without_the_unlabelled(self, tmp_path, text):
        assert self.read(tmp_path, text) == {(tmp_path / 'a/b.png').resolve(): 'cat'}

    @pytest.mark.parametrize('text, message', [
        ('name,class\na.png,cat\n', 'file and label'),
        ('', 'file and label'),
        ('label,file\ncat\n', 'line 2'),
        ('file,label\na.png,cat\na.png,dog\n', "'dog'"),
    ])
    def test_bad_contents(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=f'--labels .*{message}'):
            self.read(tmp_path, text)


class TestMatchLabels:

    def test_names_and_unambiguous_descriptions(self):
        labels = {'a': 'n1', 'b': 'cat', 'c': 'n3'}
        assert match_labels(labels, ['n1', 'n2', 'n3'], ['dog', 'cat', 'dog']) == {'a': 0, 'b': 1, 'c': 2}

    @pytest.mark.parametrize('label', ['zebra', 'dog'])
    def test_an_unknown_or_ambiguous_class_is_named_beside_the_models_classes(self, label):
        with pytest.raises(ValueError, match=f"--labels.*'{label}'.*n1, n2, n3"):
            match_labels({'a': label}, ['n1', 'n2', 'n3'], ['dog', 'cat', 'dog'])
