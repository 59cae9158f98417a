""" Show what a model's workspaces do with image files: python -m timm_ait explain IMAGE … --out FOLDER """
import argparse
import itertools
import json
import math
import os
import unicodedata
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from tqdm import tqdm

from timm.data import resolve_model_data_config
from timm.layers import to_2tuple

from timm_ait.analysis import analyse, collect_tokens, read_weights, workspaces, write_attention
from timm_ait.ops.workspace import num_kept

from . import blame, integer, is_same_file, output_folder, quietly, staged
from .images import add_arguments, class_names, each_file, find_images, image_classifier, load_model
from .sheet import Tile, contact_sheet, fit

_PANEL = 208  # pixels
BOTTLENECK = 0.1  # share of the picture's tokens that each slot and head select; that of training is for whole batches

# of the slots that are read the most, told apart by the colour-blind (Okabe and Ito), and of all others
_SLOT_COLOURS = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#f0e442', '#b0b0b0')


class LayerMaps(NamedTuple):
    """ What the patches of one picture write and read in one layer, on their grid of height H and width W. """
    name: str
    selected: Optional[torch.Tensor]  # heads in which a slot selects a patch (M, H, W), None if the layer never writes
    read: Optional[torch.Tensor]  # weights with which a patch reads the slots (M, H, W), None if the layer never reads
    num_heads: int
    num_kept: int  # tokens that each slot and head keep
    figures: Dict[str, float]  # those of `analyse`


def token_grid(num_tokens: int, num_prefix_tokens: int, height: int, width: int, aspect: float = 1.) -> Tuple[int, int]:
    """Height and width of a grid of patches `aspect` times as wide as high; a ValueError if there is no such grid."""
    num_patches = num_tokens - num_prefix_tokens
    rows = max(1, round(math.sqrt(max(0, num_patches) * height / width * aspect)))
    if num_patches < 1 or num_patches % rows:
        raise ValueError(f'{num_tokens} tokens are not a grid of patches of an image of {height} x {width} pixels')
    return rows, num_patches // rows


def layer_maps(model: nn.Module, image: torch.Tensor, bottleneck: float) -> List[LayerMaps]:
    """Maps of every layer for one picture (1, C, H, W), normalised, whose tokens compete among themselves.

    Raises:
        ValueError: The model has no workspaces, or its tokens are not a grid, or not in its order, as in Hiera.
    """
    if hasattr(model, 'unroll'):
        raise ValueError(f'{type(model).__name__} does not keep its tokens in the order of the grid')
    result, found = [], workspaces(model)
    figures = analyse(model, [image], bottleneck)
    num_prefix = getattr(model, 'num_prefix_tokens', 0)
    patch_height, patch_width = to_2tuple(getattr(getattr(model, 'patch_embed', None), 'patch_size', 1))
    for name, tokens in collect_tokens(model, image).items():
        workspace = found[name]
        grid = token_grid(tokens.shape[1], num_prefix, *image.shape[-2:], patch_width / patch_height)
        selected = read = None
        if workspace.writes:
            attention = write_attention(workspace, tokens, bottleneck)[..., num_prefix:]
            selected = (attention > 0).sum(dim=0).unflatten(-1, grid).cpu()
        if workspace.retrieves:
            read = read_weights(workspace, tokens[0, num_prefix:]).T.unflatten(-1, grid).cpu()
        kept = num_kept(bottleneck, tokens.shape[1])
        result.append(LayerMaps(name, selected, read, workspace.workspace_heads, kept, figures[name]))
    return result


def smooth(selected: torch.Tensor) -> torch.Tensor:
    """Maps (M, H, W), each patch averaged with its neighbours by weights 1 : 4 : 1 in either direction."""
    weights = torch.tensor([1., 4., 1.]) / 6.
    padded = F.pad(selected.float()[:, None], (1, 1, 1, 1), mode='replicate')
    return F.conv2d(padded, weights.outer(weights)[None, None])[:, 0]


def select_slots(selected: torch.Tensor, number: int) -> List[int]:
    """Slots whose heads agree most on a region, each unlike those before it, from `LayerMaps.selected`.

    A slot's agreement is the sum of the squares of its smoothed map relative to the sum; it is multiplied by one minus
    the largest cosine with the maps of the slots before.
    """
    maps = smooth(selected).flatten(1)
    agreement = maps.square().sum(dim=-1) / maps.sum(dim=-1).clamp_min(1e-6)
    directions = F.normalize(maps, dim=-1)
    chosen: List[int] = []
    novelty = torch.ones(len(maps))
    for _ in range(min(number, len(maps))):
        score = agreement * novelty
        score[chosen] = -1.
        chosen.append(int(score.argmax()))
        novelty = torch.minimum(novelty, 1. - directions @ directions[chosen[-1]])
    return chosen


def _to_image(values: torch.Tensor) -> Image.Image:
    """Image of values from 0 to 1, (H, W) or (H, W, 3)."""
    return Image.fromarray((values.clamp(0., 1.) * 255.).round().byte().numpy())


def draw_heat(picture: Image.Image, heat: torch.Tensor) -> Image.Image:
    """A value of each patch, (H, W), 0 to 1, over the picture: in how many heads a slot selects it, for instance."""
    heat = F.interpolate(heat[None, None], picture.size[::-1], mode='bicubic')[0, 0].clamp(0., 1.)
    grey = picture.convert('L').point(lambda value: 0.7 * value).convert('RGB')
    colours = ImageOps.colorize(_to_image(heat), '#1a0a50', '#fff5a0', '#d8354f', midpoint=115)
    return Image.composite(colours, grey, _to_image(0.15 + 0.8 * heat ** 0.6))


def read_legend(read: torch.Tensor) -> List[Tuple[int, float, str]]:
    """Slots, the share of patches that read each most, and their colours, the most read first; grey from the eighth."""
    counts = read.argmax(dim=0).flatten().bincount(minlength=len(read))
    order = counts.argsort(descending=True, stable=True).tolist()
    shares = (counts / read[0].numel()).tolist()
    return [(slot, shares[slot], _SLOT_COLOURS[min(i, len(_SLOT_COLOURS) - 1)]) for i, slot in enumerate(order)]


def draw_read(picture: Image.Image, read: torch.Tensor) -> Image.Image:
    """Which slot each patch reads most in the colours of `read_legend`, the fainter the less, over the picture."""
    colours = [colour for _, _, colour in sorted(read_legend(read))]
    weights = F.interpolate(read[None], picture.size[::-1], mode='bicubic')[0].clamp_min(0.)
    largest = weights.amax(dim=0)
    shares = (weights / largest) ** 8  # the largest weight decides, with smooth borders
    rgb = torch.tensor([ImageColor.getrgb(colour) for colour in colours]) / 255.
    mixed = torch.einsum('mhw,mc->hwc', shares / shares.sum(dim=0), rgb)
    certainty = ((largest - 1. / len(read)) / (1. - 1. / len(read) + 1e-6)).clamp(0., 1.)
    grey = picture.convert('L').convert('RGB')
    return Image.composite(_to_image(mixed), grey, _to_image(0.3 + 0.55 * certainty.sqrt()))


def layer_name(name: str) -> str:
    """Name of a workspace in pictures, such as block 3."""
    return name.removesuffix('.mlp.workspace').replace('blocks.', 'block ')


def describe(layer: LayerMaps) -> List[Tuple[str, str]]:
    """Names and values of a layer's figures."""
    rows, figures = [], layer.figures
    if layer.read is not None:
        rows += [
            ('read / residual stream', f'{figures["residual_share"]:.2%}'),
            ('… same for all tokens', f'{figures["constant_share"]:.0%}'),
            ('slots a token reads', f'{figures["effective_slots"]:.1f} of {len(layer.read)}'),
        ]
    if layer.selected is not None:
        rows += [
            ('tokens selected', f'{figures["coverage"]:.0%}'),
            ('overlap of two slots', f'{figures["overlap"]:.0%}'),
            ('… by chance', f'{figures["chance_overlap"]:.0%}'),
        ]
    return [row for row in rows if 'nan' not in row[1]]


def draw_sheet(picture: Image.Image, title: Sequence[str], layers: Sequence[LayerMaps], num_slots: int) -> Image.Image:
    """Draw a row for each layer: the picture with figures, the slot that each patch reads, what slots would write."""
    picture = fit(picture, _PANEL)
    rows = []
    for layer in layers:
        figures = [layer_name(layer.name), *(f'{name}: {value}' for name, value in describe(layer))]
        row = [Tile(picture, figures)]
        if layer.read is not None:
            legend = [(slot, share, colour) for slot, share, colour in read_legend(layer.read)[:3] if share > 0.]
            lines = [f'slot {slot} read by {share:.0%}' for slot, share, _ in legend]
            row.append(Tile(draw_read(picture, layer.read), lines, [colour for _, _, colour in legend]))
        if layer.selected is not None:
            slots = select_slots(layer.selected, num_slots)
            heat = smooth(layer.selected[slots])
            most = heat.max().clamp_min(1e-6)
            figures.append(f'brightest: {most:.1f} of {layer.num_heads} heads')
            row += [
                Tile(draw_heat(picture, map_ / most), [f'slot {slot} would write']) for slot, map_ in zip(slots, heat)]
        rows.append(row)
    return contact_sheet(rows, _PANEL, title)


def input_picture(image: torch.Tensor, config: Dict[str, Any]) -> Image.Image:
    """A model's input (C, H, W) as a picture, without the normalisation of its data config."""
    mean, std = (torch.tensor(config[key]) for key in ('mean', 'std'))
    return _to_image(image.cpu().expand(3, -1, -1).permute(1, 2, 0) * std + mean)


def _numbers(layer: LayerMaps, num_slots: int) -> Dict[str, Any]:
    """A layer as JSON has it: nan is null."""
    figures = {key: None if math.isnan(value) else value for key, value in layer.figures.items()}
    result = {'layer': layer.name, 'num_heads': layer.num_heads, 'num_kept': layer.num_kept, 'figures': figures}
    if layer.selected is not None:
        result['drawn_slots'] = select_slots(layer.selected, num_slots)
        result['selected'] = layer.selected.tolist()
    if layer.read is not None:
        result['read_slot'] = layer.read.argmax(dim=0).tolist()
        result['read_weight'] = layer.read.amax(dim=0).tolist()
        result['read_share'] = [share for _, share, _ in sorted(read_legend(layer.read))]
    return result


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'explain',
        help="show what a model's workspaces do with image files",
        description='For each image, a sheet of maps by layer, <name>.png: which slot each patch reads, and what slots '
                    'would write. The numbers are in <name>.json. The exit code is 1 if some files could not be read, '
                    'which are named, 2 if nothing could be done. Sheets of the same names in FOLDER are replaced.',
    )
    add_arguments(parser, 'classifier with workspaces')
    parser.add_argument('--out', required=True, type=output_folder, metavar='FOLDER', help='folder to write to')
    parser.add_argument('--layers', type=integer(1), default=4, metavar='N',
                        help='layers to draw, evenly spaced from the first to the last (default: %(default)s)')
    parser.add_argument('--slots', type=integer(1), default=5, metavar='N',
                        help='slots to draw of each layer, whose heads agree most (default: %(default)s)')
    parser.set_defaults(main=lambda args: quietly(_main, parser, args))


def _main(args: argparse.Namespace) -> int:
    files = find_images(args.images)
    folders = {folder for file in files for folder in (str(file.parent), os.path.dirname(os.path.realpath(file)))}
    if any(is_same_file(folder, args.out) for folder in folders):
        raise ValueError(f'--out {args.out} holds some images, which sheets could overwrite: choose another')
    model = load_model(args.model, args.device)
    workspaces(model)  # raises an error if it has none
    with blame(f'--model {args.model}'):
        (_, descriptions), classify = class_names(model), image_classifier(model)

    def explain(file: Path) -> Tuple[Image.Image, Dict[str, Any]]:
        _, image, probabilities = classify(file)
        probability, index = (x.item() for x in probabilities.max(dim=-1))
        maps = layer_maps(model, image, BOTTLENECK)
        drawn = torch.linspace(len(maps) - 1, 0, min(args.layers, len(maps))).round().int().sort().values
        title = [
            f'{file.name}: {probability:.0%} {descriptions[index]}, says {args.model.rpartition("/")[2]}',
            f'{len(drawn)} of {len(maps)} layers: the slot that each patch reads most, and what slots would write, '
            f'{", ".join(dict.fromkeys(str(maps[i].num_kept) for i in drawn))} tokens a head',
        ]
        picture = input_picture(image[0], resolve_model_data_config(model))
        return draw_sheet(picture, title, [maps[i] for i in drawn], args.slots), {
            'file': str(file),
            'model': args.model,
            'prediction': {'index': index, 'description': descriptions[index], 'probability': probability},
            'bottleneck': BOTTLENECK,
            'layers': [_numbers(layer, args.slots) for layer in maps],
        }

    errors, stems = [], set()
    for file, (sheet, numbers) in each_file(explain, files, 'explained', errors):
        names = itertools.chain([file.stem], (f'{file.stem}-{i}' for i in itertools.count(2)))
        # file systems may not tell A from a, nor é from e with an accent
        stem, key = next((s, k) for s in names if (k := unicodedata.normalize('NFC', s).casefold()) not in stems)
        stems.add(key)
        with staged(args.out) as folder:
            sheet.save(folder / f'{stem}.png')
            (folder / f'{stem}.json').write_text(json.dumps(numbers))
        tqdm.write(str(args.out / f'{stem}.png'))
    return 1 if errors else 0
