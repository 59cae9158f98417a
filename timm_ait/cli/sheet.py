""" Contact sheets: rows of images with lines of text under them. """
import os
from argparse import ArgumentTypeError
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Sequence

from PIL import Image, ImageDraw, ImageFont

from . import output_folder

_MARGIN, _LINE = 8, 18  # pixels


class Tile(NamedTuple):
    """ An image of a contact sheet, the lines under it, and the colours of squares before them. """
    image: Image.Image
    lines: Sequence[str]
    squares: Sequence[str] = ()


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image in RGB, its longer side scaled to `size` pixels."""
    width, height = (max(1, round(size * side / max(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.).convert('RGB')


def contact_sheet(rows: Sequence[Sequence[Tile]], size: int, title: Sequence[str] = ()) -> Image.Image:
    """Draw rows of tiles, whose images have sides of at most `size` pixels, below a title. Long lines are cut."""
    font = ImageFont.load_default(14)
    width, top = size + 2 * _MARGIN, _MARGIN + _LINE * len(title)
    heights = [width + _LINE * max(len(tile.lines) for tile in row) for row in rows]
    sheet = Image.new('RGB', (width * max(map(len, rows)), top + sum(heights)), 'white')
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, room: int) -> None:
        while font.getlength(text) > room:
            text = text[:-2] + '…'
        draw.text((x, y), text, 'black', font)

    for i, text in enumerate(title):
        write(_MARGIN, i * _LINE + 3, text, sheet.width - 2 * _MARGIN)
    for row, height in zip(rows, heights):
        for i, (image, lines, squares) in enumerate(row):
            x, y = i * width + _MARGIN, top + size + 5
            sheet.paste(image, (x + (size - image.width) // 2, top + (size - image.height) // 2))
            for text, square in zip_longest(lines, squares):
                if square:
                    draw.rectangle((x, y + 3, x + 10, y + 13), square)
                indent = 16 if square else 0
                write(x + indent, y, text, size - indent)
                y += _LINE
        top += height
    return sheet


def sheet_file(text: str) -> Path:
    """Type of an argument: a PNG or JPEG file in a folder that can be written to or created."""
    file = Path(text)
    if file.suffix.lower() not in ('.png', '.jpg', '.jpeg') or os.path.isdir(file):
        raise ArgumentTypeError(f'{file}: give the name of a file that ends in .png or .jpg')
    output_folder(str(file.parent))
    return file
