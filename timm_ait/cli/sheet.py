""" Contact sheets: images in a grid with lines of text under them. """
import math
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

from PIL import Image, ImageDraw, ImageFont

from . import replacing

__all__ = ['MAX_TILES', 'Tile', 'contact_sheet', 'fit', 'save_sheet', 'sheet_file', 'shorten']

_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}
MAX_TILES = 1000  # a sheet of about 5000 px square
_MARGIN, _LINE = 8, 18  # pixels


class Tile(NamedTuple):
    """ An image of a contact sheet, the lines under it and their colour, and that of its frame if it has one. """
    image: Image.Image
    lines: Sequence[str]
    colour: str = 'black'
    frame: Optional[str] = None


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image in RGB, its longer side scaled to `size` pixels."""
    width, height = (max(1, round(size * side / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.).convert('RGB')


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut where it would be longer than `width` pixels."""
    while font.getlength(text) > width:
        text = text[:-2] + '…'
    return text


def contact_sheet(tiles: Sequence[Tile], size: int = 128) -> Image.Image:
    """Draw tiles in a grid that is about square.

    Args:
        tiles: At least one; their images have sides of at most `size`.
        size: Width and height of an image's place, in pixels.
    """
    font = ImageFont.load_default(14)
    width = size + 2 * _MARGIN
    height = width + _LINE * max(len(tile.lines) for tile in tiles)
    columns = min(len(tiles), math.ceil(math.sqrt(len(tiles) * height / width)))
    sheet = Image.new('RGB', (columns * width, math.ceil(len(tiles) / columns) * height), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = i % columns * width + _MARGIN, i // columns * height + _MARGIN
        w, h = tile.image.size
        left, top = x + (size - w) // 2, y + (size - h) // 2
        sheet.paste(tile.image, (left, top))
        if tile.frame:
            draw.rectangle((left - 3, top - 3, left + w + 2, top + h + 2), outline=tile.frame, width=3)
        for row, text in enumerate(tile.lines):
            draw.text((x, y + size + 5 + row * _LINE), shorten(text, font, size), tile.colour, font)
    return sheet


def sheet_file(text: str) -> Path:
    """Type of an argument: a PNG or JPEG file in a folder that can be written to."""
    file = Path(text)
    if file.suffix.lower() not in _FORMATS:
        raise ArgumentTypeError(f'{file}: give a name that ends in .png or .jpg')
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ArgumentTypeError(f'{file}: {file.parent} is not a folder that can be written to')
    if file.is_dir():
        raise ArgumentTypeError(f'{file}: this is a folder, give the name of a file')
    return file


def save_sheet(image: Image.Image, file: Path) -> None:
    """Write a sheet; a failure leaves the file as it was."""
    with replacing(file) as temporary:
        image.save(temporary, format=_FORMATS[file.suffix.lower()])
