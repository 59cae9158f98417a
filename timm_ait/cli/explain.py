""" Show what a model's workspaces do with image files: python -m timm_ait explain IMAGE … --out FOLDER """
import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from timm.data import create_transform, resolve_model_data_config

from timm_ait.analysis import analyse, collect_tokens, read_weights, workspaces, write_attention

from . import one_line
from .images import find_images, load_image, load_model
from .labels import class_names
from .sheet import save_sheet

__all__ = ['LayerMaps', 'add_parser', 'draw_sheet', 'layer_maps', 'select_slots', 'token_grid']

_PANEL, _GAP, _MARGIN = 192, 14, 28  # pixels
_INK, _GREY = '#16181d', '#6a6f7a'


class LayerMaps(NamedTuple):
    """ What the patches of one picture do at one layer, on their grid of height H and width W.

    `selected` (M, H, W): in how many heads a slot selects the patch, None where the layer does not write. `read`
    (M, H, W): weights with which the patch reads the slots, None where it does not read. `num_kept`: patches and other
    tokens that each slot and head keep.
    """
    name: str
    selected: Optional[torch.Tensor]
    read: Optional[torch.Tensor]
    num_heads: int
    num_kept: int


def token_grid(num_tokens: int, num_prefix_tokens: int, height: int, width: int) -> Tuple[int, int]:
    """Height and width of the grid of patches, whose sides are in proportion to the image's.

    Raises:
        ValueError: There is no such grid.
    """
    num_patches = num_tokens - num_prefix_tokens
    rows = max(1, round(math.sqrt(num_patches * height / width))) if num_patches > 0 else 0
    if rows == 0 or num_patches % rows or abs(rows * width * rows - height * num_patches) > width * rows:
        raise ValueError(f'{num_tokens} tokens are not a grid of patches of an image of {height} x {width} pixels')
    return rows, num_patches // rows


def layer_maps(model: nn.Module, image: torch.Tensor, bottleneck: float) -> List[LayerMaps]:
    """Maps of every layer for one picture, whose tokens compete among themselves.

    Args:
        model: Image model with workspaces.
        image: (1, C, H, W), normalised as the model wants it.
        bottleneck: Share of the tokens that each slot and head keep.

    Raises:
        ValueError: The model has no workspaces, or its tokens are not a grid.
    """
    result = []
    found = workspaces(model)
    num_prefix = getattr(model, 'num_prefix_tokens', 0)
    for name, tokens in collect_tokens(model, image).items():
        workspace = found[name]
        grid = token_grid(tokens.shape[1], num_prefix, *image.shape[-2:])
        selected = read = None
        if workspace.writes:
            attention = write_attention(workspace, tokens, bottleneck)[..., num_prefix:]
            selected = (attention > 0).sum(dim=0).unflatten(-1, grid).cpu()
        if workspace.retrieves:
            read = read_weights(workspace, tokens[0, num_prefix:]).T.unflatten(-1, grid).cpu()
        result.append(LayerMaps(
            name, selected, read, workspace.workspace_heads, max(1, round(bottleneck * tokens.shape[1]))))
    return result


def select_slots(selected: torch.Tensor, number: int) -> List[int]:
    """Slots whose heads agree most on a region, each unlike those before it.

    A slot's agreement is the sum of the squares of its map, averaged over 3 x 3 patches, relative to the sum; it is
    multiplied by one minus the largest cosine with the maps of the slots before.

    Args:
        selected: In how many heads each slot selects each patch, (M, H, W).
        number: How many slots, at most M.
    """
    maps = nn.functional.avg_pool2d(selected.float(), 3, stride=1, padding=1, count_include_pad=False).flatten(1)
    agreement = maps.square().sum(dim=-1) / maps.sum(dim=-1).clamp_min(1e-6)
    directions = nn.functional.normalize(maps, dim=-1)
    chosen: List[int] = []
    novelty = torch.ones(len(maps))
    for _ in range(min(number, len(maps))):
        score = agreement * novelty
        score[chosen] = -1.
        chosen.append(int(score.argmax()))
        novelty = torch.minimum(novelty, 1. - directions @ directions[chosen[-1]])
    return chosen


# colours


def _oklch(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """sRGB, 0 to 1, of colours in OKLCH (https://bottosson.github.io/posts/oklab), where distances are as they look.

    Args:
        lightness: 0 to 1.
        chroma: 0 (grey) to about 0.3.
        hue: Degrees.
    """
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    lms = np.stack([
        lightness + 0.3963377774 * a + 0.2158037573 * b,
        lightness - 0.1055613458 * a - 0.0638541728 * b,
        lightness - 0.0894841775 * a - 1.2914855480 * b,
    ], axis=-1) ** 3
    linear = lms @ np.array([
        [4.0767416621, -1.2684380046, -0.0041960863],
        [-3.3077115913, 2.6097574011, -0.7034186147],
        [0.2309699292, -0.3413193965, 1.7076147010],
    ])
    linear = linear.clip(0., 1.)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _heat(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1, from dark violet over red to light yellow, of even steps in lightness."""
    hue = np.interp(values, [0., 0.35, 0.65, 1.], [285., 350., 400., 465.])
    chroma = np.interp(values, [0., 0.3, 0.7, 1.], [0.09, 0.19, 0.19, 0.12])
    return _oklch(0.16 + 0.8 * values, chroma, hue)


def _slot_colour(rank: int) -> np.ndarray:
    """Colour of the slot that is read the rank-th most: hues a golden angle apart, in two lightnesses."""
    return _oklch(np.array(0.72 if rank % 2 else 0.62), np.array(0.16), np.array(25. + 137.508 * rank))


# drawing


def _enlarge(maps: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Maps (n, H, W) at `size` (width, height) in pixels, smooth."""
    return np.stack([
        np.asarray(Image.fromarray(m.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)) for m in maps])


def _blend(picture: Image.Image, brightness: float, colours: np.ndarray, opacity: np.ndarray) -> Image.Image:
    """Colours (H, W, 3) of an opacity (H, W) over the picture in grey; all from 0 to 1."""
    grey = np.asarray(picture.convert('L'), dtype=np.float32)[..., None] / 255. * brightness
    mixed = grey + opacity[..., None] * (colours - grey)
    return Image.fromarray((mixed.clip(0., 1.) * 255.).round().astype(np.uint8))


def _smooth(maps: torch.Tensor) -> np.ndarray:
    """Maps (n, H, W) averaged with their neighbours, by weights 1 : 4 : 1 in either direction as a cubic spline has."""
    padded = np.pad(maps.numpy().astype(np.float32), ((0, 0), (1, 1), (1, 1)), mode='edge')
    rows = (padded[:, :-2] + 4. * padded[:, 1:-1] + padded[:, 2:]) / 6.
    return (rows[..., :-2] + 4. * rows[..., 1:-1] + rows[..., 2:]) / 6.


def _draw_selected(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """How much a slot selects each patch, (H, W), 0 to 1, over the picture."""
    heat = _enlarge(heat[None], picture.size)[0].clip(0., 1.)
    return _blend(picture, 0.7, _heat(heat), 0.15 + 0.8 * heat ** 0.6)


def _draw_read(picture: Image.Image, read: torch.Tensor, colours: np.ndarray) -> Image.Image:
    """Which slot each patch reads most, (M, H, W) in colours (M, 3), the fainter the less, over the picture."""
    weights = _enlarge(read.numpy(), picture.size).clip(0.)
    certainty = ((weights.max(axis=0) * len(read) - 1.) / (len(read) - 1.)).clip(0., 1.) if len(read) > 1 else 1.
    sharpened = (weights / weights.max(axis=0)) ** 8  # the largest weight decides, with smooth borders
    mixed = np.tensordot(sharpened / sharpened.sum(axis=0), colours, axes=(0, 0))
    return _blend(picture, 1., mixed, 0.25 + 0.6 * np.sqrt(certainty) * np.ones(weights.shape[1:]))


class _Canvas:
    """ A white sheet with text that is cut where its place ends. """

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new('RGB', (width, height), 'white')
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, text: str, size: int, colour: str = _GREY, width: int = _PANEL) -> None:
        font = ImageFont.load_default(size)
        if font.getlength(text) > width:
            while text and font.getlength(text + '…') > width:
                text = text[:-1]
            text += '…'
        self.draw.text((x, y), text, colour, font)

    def table(self, x: int, y: int, rows: Sequence[Tuple[str, str]]) -> None:
        """Names at the left, values at the right of a panel's width."""
        for i, (name, value) in enumerate(rows):
            self.text(x, y + 22 * i, name, 13)
            length = ImageFont.load_default(13).getlength(value)
            self.text(x + _PANEL - math.ceil(length), y + 22 * i, value, 13, _INK)

    def swatch(self, x: int, y: int, text: str, colour: np.ndarray) -> int:
        """A square in a colour with a text; returns where the next may stand."""
        self.draw.rounded_rectangle((x, y + 3, x + 11, y + 14), 3, tuple(int(round(255 * float(c))) for c in colour))
        self.text(x + 15, y, text, 13)
        return x + 15 + math.ceil(ImageFont.load_default(13).getlength(text)) + 8


def draw_sheet(
        picture: Image.Image,
        title: str,
        subtitle: str,
        layers: Sequence[LayerMaps],
        num_layers: int,
        figures: Dict[str, Dict[str, float]],
        num_slots: int,
) -> Image.Image:
    """Draw the picture, and a row of maps for each layer.

    Args:
        picture: As the model sees it.
        title: First line.
        subtitle: Second line.
        layers: Maps to draw, at least one.
        num_layers: Number of layers there are.
        figures: What `analyse` says of the layers, by name.
        num_slots: Slots to draw of each layer.
    """
    scale = _PANEL / max(picture.size)
    size = tuple(max(1, round(scale * side)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    chosen = {
        layer.name: select_slots(layer.selected, num_slots) for layer in layers if layer.selected is not None}
    heat = {
        layer.name: _smooth(layer.selected[chosen[layer.name]]) for layer in layers if layer.selected is not None}
    most = max((float(maps.max()) for maps in heat.values()), default=1.)
    columns = 2 + max(map(len, chosen.values()), default=2)  # two for the texts at least

    def column(i: int) -> int:
        return _MARGIN + i * (_PANEL + _GAP)

    row_height = size[1] + 66
    width = column(columns) - _GAP + _MARGIN
    canvas = _Canvas(width, 2 * _MARGIN + max(size[1], 160) + 22 + len(layers) * row_height - 12)
    canvas.image.paste(picture, (column(0), _MARGIN))
    x, y, wide = column(1), _MARGIN - 7, width - column(1) - _MARGIN
    canvas.text(x, y, title, 24, _INK, wide)
    canvas.text(x, y + 34, subtitle, 16, _INK, wide)
    for i, line in enumerate(_legend(layers, num_layers)):
        canvas.text(x, y + 66 + 21 * i, line, 14, width=wide)
    if chosen:
        bar = _heat(np.linspace(0., 1., 160))[None].repeat(12, axis=0)
        canvas.image.paste(Image.fromarray((bar * 255).round().astype(np.uint8)), (x, y + 158))
        text = f'selected by 0 to {most:.1f} of {layers[0].num_heads} heads, smoothed'
        canvas.text(x + 170, y + 154, text, 14, width=wide)

    y = _MARGIN + max(size[1], 160) + 22
    for layer in layers:
        top = y + 24
        canvas.text(column(0), y - 3, _short(layer.name), 19, _INK)
        canvas.table(column(0), top + 6, _describe(layer, figures[layer.name]))
        if layer.read is not None:
            canvas.text(column(1), y, 'slot that the patch reads', 14, _INK)
            order = layer.read.flatten(1).mean(dim=-1).argsort(descending=True).tolist()
            colours = np.stack([_slot_colour(order.index(slot)) for slot in range(len(order))])
            canvas.image.paste(_draw_read(picture, layer.read, colours), (column(1), top))
            shares = _shares_of_patches(layer.read)
            x = column(1)
            for slot in shares.argsort(descending=True)[:3].tolist():
                if shares[slot] > 0:
                    x = canvas.swatch(x, top + size[1] + 5, f'{slot}: {shares[slot]:.0%}', colours[slot])
        for i, slot in enumerate(chosen.get(layer.name, ())):
            canvas.text(column(2 + i), y, f'slot {slot} would write', 14, _INK)
            canvas.image.paste(_draw_selected(picture, heat[layer.name][i] / most), (column(2 + i), top))
        y += row_height
    return canvas.image


def _shares_of_patches(read: torch.Tensor) -> torch.Tensor:
    """Share of the patches that read each slot most, (M,), from weights (M, H, W)."""
    return read.argmax(dim=0).flatten().bincount(minlength=len(read)).float() / read[0].numel()


def _short(name: str) -> str:
    """'block 3' for the workspace of timm's blocks.3."""
    return name.removesuffix('.mlp.workspace').replace('blocks.', 'block ').replace('.', ' ')


def _legend(layers: Sequence[LayerMaps], num_layers: int) -> List[str]:
    lines = []
    if any(layer.read is not None for layer in layers):
        lines.append('Left: the slot that a patch reads with the largest weight; the fainter, the smaller the weight.')
    if any(layer.selected is not None for layer in layers):
        lines += [
            f'Right: what slots would write. In each head a slot selects its best {layers[0].num_kept} tokens of this '
            'picture. Drawn are the',
            'slots whose heads agree most on a region, each unlike those before it. Evaluation itself does not write.',
        ]
    if len(layers) < num_layers:
        lines.append(f'{len(layers)} of {num_layers} layers.')
    return lines


def _describe(layer: LayerMaps, figures: Dict[str, float]) -> List[Tuple[str, str]]:
    """Names and values of a layer's figures."""
    rows = []
    if layer.read is not None:
        kind = 'branch' if math.isnan(figures['residual_share']) else 'residual'
        rows += [
            (f'read / {"MLP branch" if kind == "branch" else "residual stream"}', f'{figures[f"{kind}_share"]:.2%}'),
            ('… the same for all tokens', f'{figures["constant_share"]:.0%}'),
            ('slots a token reads', f'{figures["effective_slots"]:.1f} of {len(layer.read)}'),
        ]
    if layer.selected is not None:
        rows += [
            ('tokens selected by a slot', f'{figures["coverage"]:.0%}'),
            ('overlap of two slots', f'{figures["overlap"]:.0%}'),
            ('… by chance', f'{figures["chance_overlap"]:.0%}'),
        ]
    return rows


# command


def _evenly_spaced(number: int, total: int) -> List[int]:
    """Up to `number` of the indices below `total`, with the first and the last."""
    if number >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(1, number - 1)) for i in range(number)] if number > 1 else [total - 1]


def _picture(image: torch.Tensor, config: Dict[str, Any]) -> Image.Image:
    """What a model sees: its input (C, H, W) without the normalisation."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = ((image.cpu() * std + mean).clamp(0., 1.) * 255.).round().byte()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _numbers(layer: LayerMaps, figures: Dict[str, float], num_slots: int) -> Dict[str, Any]:
    """A layer as JSON has it: nan is null."""
    result: Dict[str, Any] = {
        'layer': layer.name,
        'figures': {key: None if math.isnan(value) else round(value, 6) for key, value in figures.items()},
    }
    if layer.selected is not None:
        result.update({
            'num_heads': layer.num_heads,
            'num_kept': layer.num_kept,
            'drawn_slots': select_slots(layer.selected, num_slots),
            'selected': layer.selected.tolist(),
        })
    if layer.read is not None:
        result.update({
            'read_slot': layer.read.argmax(dim=0).tolist(),
            'read_weight': [[round(weight, 6) for weight in row] for row in layer.read.amax(dim=0).tolist()],
            'read_share': _shares_of_patches(layer.read).tolist(),
        })
    return result


def _stems(files: Sequence[Path]) -> List[str]:
    """Names of what is written for each file, all different."""
    stems: Dict[str, None] = {}
    for file in files:
        stem, number = file.stem, 1
        while stem in stems:
            number += 1
            stem = f'{file.stem}-{number}'
        stems[stem] = None
    return list(stems)


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0. < value <= 1.:
        raise argparse.ArgumentTypeError(f'{value} is not a share in (0, 1]')
    return value


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'explain',
        help="show what a model's workspaces do with image files",
        description="For each image, a sheet of maps by layer, <name>.png: which slot each patch reads, and what slots "
                    'would write. The numbers are in <name>.json. The exit code is 1 if some files could not be read, '
                    'which are named, 2 if nothing could be done.',
    )
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='image, or folder to search for images')
    parser.add_argument('--out', required=True, type=Path, metavar='FOLDER', help='folder for sheets and numbers')
    parser.add_argument('--model', default='ait_small', metavar='NAME',
                        help='classifier with workspaces: a timm model, hf-hub:<user>/<model> or local-dir:<folder> '
                             '(default: %(default)s)')
    parser.add_argument('--device', help='device to run on (default: cuda if there is one, else cpu)')
    parser.add_argument('--layers', type=_positive_int, default=4, metavar='N',
                        help='layers to draw, evenly spaced from the first to the last (default: %(default)s)')
    parser.add_argument('--slots', type=_positive_int, default=5, metavar='N',
                        help='slots to draw of each layer, those whose heads agree most, each unlike those before it '
                             '(default: %(default)s)')
    parser.add_argument('--bottleneck', type=_share, default=0.1, metavar='SHARE',
                        help="share of the picture's tokens that each slot and head select; the bottleneck of training "
                             'is for the tokens of a whole batch (default: %(default)s)')
    parser.set_defaults(main=functools.partial(_main, parser))


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        files, problems = find_images(args.images)
        model = load_model(args.model, args.device)
        try:
            num_layers = len(workspaces(model))
        except ValueError as e:
            raise ValueError(f'--model {args.model}: {e}') from e
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f'--out {args.out}: the folder cannot be made ({one_line(e)})') from e
        if not os.access(args.out, os.W_OK):
            raise ValueError(f'--out {args.out}: the folder cannot be written to')
    except ValueError as e:
        parser.error(str(e))

    for file, reason in problems:
        print(f'{file}: {reason}', file=sys.stderr)
    drawn = _evenly_spaced(args.layers, num_layers)
    num_done = 0
    for file, stem in zip(tqdm(files, unit='image', file=sys.stderr, disable=not files), _stems(files)):
        try:
            sheet, numbers = _explain(model, file, args, drawn)
        except Exception as e:  # Pillow raises nearly anything on damaged files
            tqdm.write(f'{file}: cannot be explained ({one_line(e)})', file=sys.stderr)
            continue
        save_sheet(sheet, args.out / f'{stem}.png')
        _write_text(json.dumps(numbers), args.out / f'{stem}.json')
        num_done += 1
        tqdm.write(str(args.out / f'{stem}.png'))
    if not num_done:
        parser.error('IMAGE: none of the files could be explained, the reasons are above')
    return 0 if num_done == len(files) + len(problems) else 1


def _explain(
        model: nn.Module,
        file: Path,
        args: argparse.Namespace,
        drawn: Sequence[int],
) -> Tuple[Image.Image, Dict[str, Any]]:
    """Sheet and numbers of an image file."""
    config = resolve_model_data_config(model)
    picture = load_image(file, 'L' if config['input_size'][0] == 1 else 'RGB')
    image = create_transform(**config, is_training=False)(picture)
    batch = image.unsqueeze(0).to(next(model.parameters()).device)
    with torch.inference_mode():
        probability, index = model(batch).float().softmax(dim=-1)[0].max(dim=-1)
    description = class_names(model)[1][int(index)]
    maps = layer_maps(model, batch, args.bottleneck)
    figures = analyse(model, [batch], args.bottleneck)
    sheet = draw_sheet(
        _picture(image, config),
        file.name,
        f'{args.model.rpartition("/")[2]}: {float(probability):.0%} {description}',
        [maps[i] for i in drawn],
        len(maps),
        figures,
        args.slots,
    )
    return sheet, {
        'file': str(file),
        'model': args.model,
        'prediction': {'index': int(index), 'description': description, 'probability': float(probability)},
        'bottleneck': args.bottleneck,
        'layers': [_numbers(layer, figures[layer.name], args.slots) for layer in maps],
    }


def _write_text(text: str, file: Path) -> None:
    """Write a file; a failure leaves it as it was."""
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
