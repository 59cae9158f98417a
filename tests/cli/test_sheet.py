import pytest
from PIL import Image

from timm_ait.cli.sheet import Tile, contact_sheet, fit

BLUE = Image.new('RGB', (128, 128), 'blue')


@pytest.mark.parametrize('lengths', [[1], [2, 2, 2], [3, 1]])
def test_shows_every_image(lengths):
    sheet = contact_sheet([[Tile(BLUE, ['cat'])] * length for length in lengths], 128)
    assert {colour: n for n, colour in sheet.getcolors(1 << 16)}[0, 0, 255] == sum(lengths) * 128 ** 2


def test_squares():
    sheet = contact_sheet([[Tile(BLUE, ['cat', 'dog'], squares=['lime'])]], 128)
    assert sheet.getpixel((6, 14)) == (255, 255, 255)
    assert {colour: n for n, colour in sheet.getcolors(1 << 16)}[0, 255, 0] == 11 ** 2


def test_long_names_stay_in_their_cell():
    row = [Tile(Image.new('RGB', (128, 128)), [text, text]) for text in ('long name ' * 50, '')]
    sheet = contact_sheet([row], 128)
    assert sheet.crop((140, 148, sheet.width, 164)).getcolors() == [(16 * (sheet.width - 140), (255, 255, 255))]


@pytest.mark.parametrize('size, fitted', [((256, 128), (128, 64)), ((8, 16), (64, 128)), ((1000, 1), (128, 1))])
def test_images_are_scaled_to_their_place(size, fitted):
    assert fit(Image.new('L', size), 128).size == fitted
