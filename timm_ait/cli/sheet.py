""" Contact sheets: images in a grid with lines of text under them. """
import math
import os
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ['Tile', 'check_sheet', 'contact_sheet', 'save_sheet']

_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG'}
_MAX_TILES = 1000  # a sheet of about 5000 px square
_MARGIN, _LINE = 8, 18  # pixels


class Tile(NamedTuple):
    """ An image of a contact sheet, the lines under it and their colour, and that of its frame if it has one. """
    image: Image.Image
    lines: Sequence[str]
    colour: str = 'black'
    frame: Optional[str] = None


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
            while font.getlength(text) > size:
                text = text[:-2] + '…'
            draw.text((x, y + size + 5 + row * _LINE), text, tile.colour, font)
    return sheet


def check_sheet(file: Path, num_tiles: int) -> None:
    """Find out before the work whether a sheet can be written.

    Raises:
        ValueError: It is not a PNG or JPEG file in a folder that can be written to, or there are too many tiles.
    """
    if file.suffix.lower() not in _FORMATS:
        raise ValueError(f'--sheet {file}: give a name that ends in .png or .jpg')
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f'--sheet {file}: {file.parent} is not a folder that can be written to')
    if file.is_dir():
        raise ValueError(f'--sheet {file}: this is a folder, give the name of a file')
    if num_tiles > _MAX_TILES:
        raise ValueError(f'--sheet {file}: a sheet has room for {_MAX_TILES} images, there are {num_tiles}')


def save_sheet(image: Image.Image, file: Path) -> None:
    """Write a sheet; a failure leaves the file as it was."""
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
        image.save(temporary, format=_FORMATS[file.suffix.lower()])
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
