import pytest
from PIL import Image

from timm_ait.cli.sheet import Tile, contact_sheet, fit


def blue(**kwargs):
    return Tile(Image.new('RGB', (128, 128), 'blue'), ['cat'], **kwargs)


@pytest.mark.parametrize('num', [1, 2, 7])
def test_shows_every_image(num):
    sheet = contact_sheet([blue()] * num)
    assert {colour: n for n, colour in sheet.getcolors(1 << 16)}[0, 0, 255] == num * 128 ** 2


def test_frame():
    assert contact_sheet([blue(frame='red')]).getpixel((6, 6)) == (255, 0, 0)
    assert contact_sheet([blue()]).getpixel((6, 6)) == (255, 255, 255)


def test_long_names_stay_in_their_cell():
    tiles = [Tile(Image.new('RGB', (128, 128)), [text, text]) for text in ('long name ' * 50, '')]
    sheet = contact_sheet(tiles)
    assert sheet.crop((140, 140, sheet.width, 156)).getcolors() == [(16 * (sheet.width - 140), (255, 255, 255))]


@pytest.mark.parametrize('size, fitted', [((256, 128), (128, 64)), ((8, 16), (64, 128)), ((1000, 1), (128, 1))])
def test_images_are_scaled_to_their_place(size, fitted):
    assert fit(Image.new('L', size), 128).size == fitted
