import os
import subprocess
import sys

import pytest
from PIL import ExifTags, Image, TiffImagePlugin

import timm

from timm_ait.cli.images import MAX_ASPECT_RATIO, class_names, find_images, load_image


def files_of(folder):
    return [folder / 'a.jpg', folder / 'b.png', folder / 'sub/c.bmp']


class TestFindImages:

    def test_a_folder_without_images_is_named(self, images, tmp_path):
        (tmp_path / 'empty').mkdir()
        with pytest.raises(ValueError, match='IMAGE: .*empty'):
            find_images([images, tmp_path / 'empty'])

    @pytest.mark.parametrize('name', ['.hidden.png', '._a.jpg', '.ipynb_checkpoints/a.png', '__MACOSX/a.png'])
    def test_hidden_files_are_not_images(self, images, name):
        (images / name).parent.mkdir(exist_ok=True)
        (images / 'b.png').rename(images / name)
        assert find_images([images]) == [images / 'a.jpg', images / 'sub/c.bmp']

    def test_folders_are_searched_recursively_sorted_and_once_where_links_lead_up(self, images):
        (images / 'sub/up').symlink_to('..')
        (images / 'sub/again').symlink_to('..')
        assert find_images([images]) == files_of(images)

    def test_formats_are_known_in_a_new_process(self, images):
        code = (
            'import pathlib, sys; from timm_ait.cli.images import find_images; '
            'assert len(find_images([pathlib.Path(sys.argv[1])])) == 3')
        subprocess.run([sys.executable, '-c', code, str(images)], check=True)

    def test_a_path_given_twice_is_read_once(self, images):
        assert find_images([images / 'a.jpg', images, images / 'sub']) == files_of(images)

    @pytest.mark.timeout(60)
    def test_a_pipe_is_left_out(self, images):
        os.mkfifo(images / 'x.png')
        assert find_images([images]) == files_of(images)

    def test_links_to_nothing_and_formats_that_pillow_does_not_know_are_listed(self, images):
        (images / 'c.png').symlink_to('nowhere')
        (images / 'photo.HEIC').write_bytes(b'')
        (images / 'data.h5').write_bytes(b'')  # which Pillow names, but never reads
        assert find_images([images]) == sorted([*files_of(images), images / 'c.png', images / 'photo.HEIC'])

    def test_a_folder_that_cannot_be_searched_is_listed(self, images, monkeypatch):
        def listed(path, scandir=os.scandir):
            if os.fspath(path) == str(images / 'sub'):
                raise PermissionError(13, 'Permission denied', str(path))
            return scandir(path)

        monkeypatch.setattr(os, 'scandir', listed)
        assert find_images([images]) == [images / 'a.jpg', images / 'b.png', images / 'sub']


class TestLoadImage:

    @pytest.mark.parametrize('mode, suffix', [
        ('1', 'png'), ('L', 'png'), ('LA', 'png'), ('P', 'gif'), ('RGBA', 'webp'), ('I;16', 'png'), ('I;16', 'tif'),
        ('CMYK', 'jpg'), ('YCbCr', 'jpg'), ('LAB', 'tif'),
    ])
    def test_modes(self, tmp_path, mode, suffix):
        file = tmp_path / f'image.{suffix}'
        Image.new(mode, (5, 4)).save(file)
        image = load_image(file)
        assert (image.mode, image.size) == ('RGB', (5, 4))

    @pytest.mark.parametrize('suffix', ['png', 'tif', 'pgm'])
    def test_16_bits_keep_their_range(self, tmp_path, suffix):
        gray = Image.frombytes('I;16', (3, 1), b'\0\0\0\x80\xff\xff')  # 0, 0x8000 and 0xffff
        gray.save(tmp_path / f'gray.{suffix}')
        image = load_image(tmp_path / f'gray.{suffix}')
        assert [image.getpixel((x, 0))[0] for x in range(3)] == pytest.approx([0, 128, 255], abs=1)

    def test_12_bits_keep_their_range(self, tmp_path):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in dict(ImageWidth=2, ImageLength=1, BitsPerSample=12, PhotometricInterpretation=1,
                               StripOffsets=0, StripByteCounts=3).items():
            tags[ExifTags.Base[tag].value] = value
        with open(tmp_path / 'gray.tif', 'wb') as file:
            tags.save(file)  # which moves the offset to its end
            file.write(b'\x80\x0f\xff')  # 0x800 and 0xfff
        image = load_image(tmp_path / 'gray.tif')
        assert [image.getpixel((x, 0))[0] for x in range(2)] == pytest.approx([128, 255], abs=1)

    def test_an_error_comes_without_pillows_warning(self, tmp_path, recwarn):
        Image.new('L', (5, 4)).save(tmp_path / 'whole.tif')
        (tmp_path / 'cut.tif').write_bytes((tmp_path / 'whole.tif').read_bytes()[:-8])
        with pytest.raises((OSError, ValueError)):
            load_image(tmp_path / 'cut.tif')
        assert not recwarn.list

    @pytest.mark.parametrize('mode, suffix, message', [
        ('I', 'tif', 'mode'), ('F', 'tif', 'mode'), ('L', 'eps', 'PostScript')])
    def test_pixels_without_a_range_and_programs_are_refused(self, tmp_path, mode, suffix, message):
        Image.new(mode, (4, 4)).save(tmp_path / f'image.{suffix}')
        with pytest.raises(ValueError, match=message):
            load_image(tmp_path / f'image.{suffix}')

    @pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
    def test_images_are_turned_upright(self, tmp_path, suffix):
        upright, exif = Image.new('RGB', (32, 16)), Image.Exif()
        upright.paste('white', (0, 0, 16, 16))  # its left half
        exif[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f'image.{suffix}', exif=exif)
        image = load_image(tmp_path / f'image.{suffix}', 'L')
        assert image.size == (32, 16)
        assert image.getpixel((4, 8)) > 250 and image.getpixel((28, 8)) < 5

    @pytest.mark.parametrize('exif', [
        b'not a header',
        # orientation 3, and a tag of numbers that is a text
        b'MM\0*\0\0\0\x08\0\x02\x01-\0\x02\0\0\0\x02a\0\0\0\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0',
    ])
    def test_damaged_exif_data_do_not_matter(self, tmp_path, exif):
        Image.new('RGB', (5, 4)).save(tmp_path / 'image.jpg', exif=b'Exif\0\0' + exif)
        assert load_image(tmp_path / 'image.jpg').size == (5, 4)

    @pytest.mark.parametrize('width, height', [
        (1, MAX_ASPECT_RATIO + 1), (10 ** 6, 1), (9600, 9600), (10 ** 5, 10 ** 5)])
    @pytest.mark.filterwarnings('error')
    def test_extreme_sizes_are_refused_before_decoding(self, tmp_path, width, height):
        (tmp_path / 'image.ppm').write_bytes(b'P6 %d %d 255\n' % (width, height))  # and no pixels
        with pytest.raises(Exception, match='pixels'):
            load_image(tmp_path / 'image.ppm')


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
