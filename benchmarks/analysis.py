r""" What the memory holds, measured: the tables and figures of benchmarks/ANALYSIS.md.

    for data in cifar10 flowers12; do
        python -m benchmarks.compare benchmarks/analysis_$data.yaml --data-dir DATA/$data --output output/analysis/$data
    done
    python -m benchmarks.analysis output/analysis \
        --images cifar10=DATA/cifar10 flowers12=DATA/flowers12 pets=DATA/pets triangle=DATA/triangle

Looks at the short runs that the first commands train, about an hour on two cores, and at the shipped checkpoints.
What was measured once is kept beside the runs. The program writes the generated parts of the page; what the figures
mean is written there by hand.
"""
import argparse
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import timm
from timm.models import load_checkpoint
from timm.utils import ParseKwargs

import timm_ait
from timm_ait import analysis
from timm_ait.cli.explain import layer_name
from timm_ait.ops.memory import slot_statistics
from timm_ait.weights import weights_dir

from . import measures
from .compare.data import load_images, load_split
from .compare.training import create_run_model
from .results import mean_and_deviation, table, write_parts, write_text

BATCH_SIZE = 64
NUM_BATCHES = 8  # for figures of tokens; accuracies are of all images
MAX_IMAGES = 2048  # for a shipped checkpoint, an eighth of them for a deep one
NUM_CLUSTERS = 16
NOISES, BETAS = (0., 0.25, 0.5, 0.75, 1., 1.5, 2., 3.), (0.5, 1., 2., 4., 8., 16.)

Measured = Dict[str, Any]
Runs = Dict[str, List[Measured]]  # of every seed, by 'data set, label'

# tables of runs: which labels, and which of COLUMNS
RUN_TABLES = {
    'bottlenecks': (r'default|1 of \d+', ('effective tokens', 'coverage', 'overlap', 'by chance', 'accuracy')),
    'sizes': (r'default|1 of 256|\d+ slots, .*', ('coverage', 'accuracy')),
    'balance': (r'default|.*balance.*', ('lowest rank', 'highest cosine', 'coverage', 'overlap', 'accuracy')),
    'memories': (
        r'default|published update|learned.*|reset.*|written.*|Coordination|ViT',
        ('seeds', 'accuracy', 'lowest rank', 'coverage', 'overlap')),
}
LOOKED_AT = 'default|published update|learned and never written'  # runs beside the shipped checkpoints
CURVES = r'default|published update|normalize, 32 slots, .*'


def over_layers(seeds: List[Measured], key: str, choose: Callable = statistics.fmean) -> float:
    """Mean over the seeds of what is chosen of the layers' figures; nan where there are none."""
    values = [
        choose([figures[key] for figures in measured['layers'].values()]) for measured in seeds
        if 'layers' in measured and all(key in figures for figures in measured['layers'].values())]
    return statistics.fmean(values) if values else math.nan


def number(value: float, digits: int = 1) -> str:
    return '' if value != value else f'{value:.{digits}f}'


def percent(value: float, digits: int = 1) -> str:
    return number(100. * value, digits)


COLUMNS: Dict[str, Callable[[List[Measured]], Any]] = {
    'seeds': len,
    'accuracy': lambda seeds: mean_and_deviation([100. * measured['accuracy'] for measured in seeds], 1),
    'lowest rank': lambda seeds: number(over_layers(seeds, 'effective_rank', min), 1),
    'highest cosine': lambda seeds: number(over_layers(seeds, 'mean_cosine', max), 2),
    'effective tokens': lambda seeds: number(over_layers(seeds, 'effective_tokens'), 1),
    'coverage': lambda seeds: percent(over_layers(seeds, 'coverage')),
    'overlap': lambda seeds: percent(over_layers(seeds, 'overlap'), 2),
    'by chance': lambda seeds: percent(over_layers(seeds, 'chance_overlap'), 2),
}


# Measuring

def cached(file: Path, weights: Path, measure: Callable[[], Any]) -> Any:
    """What was measured of these weights before, or is now."""
    if not file.exists() or file.stat().st_mtime < weights.stat().st_mtime:
        write_text(file, json.dumps(measure()))
    return json.loads(file.read_text())


def mean(parts: List[Dict[str, float]]) -> Dict[str, float]:
    return {key: statistics.fmean(part[key] for part in parts) for key in parts[0]}


def purities(model: torch.nn.Module, batches: measures.Batches) -> Dict[str, float]:
    """How far slots prefer classes of images, and clusters of tokens, beside chance; mean over the layers."""
    generator = torch.Generator().manual_seed(0)
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    layers = []
    for name, tokens in analysis.collect_tokens(model, images).items():
        workspace = model.get_submodule(name)
        if workspace.writes:
            weights = analysis.write_attention(workspace, tokens).mean(dim=0)
            kinds = {
                'class': labels.repeat_interleave(tokens.shape[1]),
                'cluster': measures.kmeans(tokens.flatten(0, 1), NUM_CLUSTERS),
            }
            layers.append({})
            for kind, types in kinds.items():
                shuffled = types[torch.randperm(len(types), generator=generator)]
                layers[-1][kind] = float(measures.slot_purity(weights, types).mean())
                layers[-1][f'{kind} by chance'] = float(measures.slot_purity(weights, shuffled).mean())
    return mean(layers) if layers else {}


def measure(model: torch.nn.Module, batches: measures.Batches) -> Measured:
    """All figures of an image classifier, those of tokens over the first NUM_BATCHES batches."""
    few = batches[:NUM_BATCHES]
    first = few[0][0]
    result: Measured = {
        'num_images': sum(len(labels) for _, labels in batches),
        'accuracy': measures.accuracy(model, batches),
        'interactions': measures.self_attention_interactions(model, first),
    }
    writes = measures.coordination_writes(model, first)
    if writes:
        result['layers'] = {
            name: {**analysis.competition(attention), **mean([slot_statistics(memory) for memory in memories])}
            for name, (attention, memories) in writes.items()}
    elif timm_ait.memory_statistics(model):
        result['layers'] = analysis.analyse(model, (images for images, _ in few))
        result['purity'] = purities(model, few)
        if any(workspace.retrieves for workspace in analysis.workspaces(model).values()):
            result['contribution'] = {'unchanged': result['accuracy']}
            for how in measures.REPLACEMENTS:
                with measures.replaced_memory(model, how):
                    result['contribution'][how] = measures.accuracy(model, batches)
    return result


def measure_agreement(models: List[torch.nn.Module], batches: measures.Batches) -> Dict[str, Dict[str, float]]:
    """Agreement of the slots of each layer, mean over pairs of models."""
    images = torch.cat([images for images, _ in batches[:NUM_BATCHES]])
    maps = [{
        name: {
            'written': analysis.write_attention(model.get_submodule(name), tokens, 0.1).mean(dim=0),
            'read': analysis.read_weights(model.get_submodule(name), tokens.flatten(0, 1)).T,
        } for name, tokens in analysis.collect_tokens(model, images).items()} for model in models]
    result: Dict[str, Dict[str, float]] = {name: {} for name in maps[0]}
    for name, kind in itertools.product(result, ('written', 'read')):
        pairs = [(a[name][kind], b[name][kind]) for a, b in itertools.combinations(maps, 2)]
        order = torch.randperm(pairs[0][0].shape[-1], generator=torch.Generator().manual_seed(0))
        result[name][kind] = statistics.fmean(measures.agreement(a, b) for a, b in pairs)
        result[name][f'{kind} by chance'] = statistics.fmean(measures.agreement(a, b[:, order]) for a, b in pairs)
    return result


def measure_shipped(name: str, data_dir: Optional[str]) -> Measured:
    """Figures of a shipped checkpoint; those of its memory alone where there are no images."""
    model = timm.create_model(name, pretrained=True).eval()
    layers = analysis.workspaces(model)
    result: Measured = {'layers': {}}
    if data_dir is not None:
        images, labels = load_images(data_dir, model, MAX_IMAGES if len(layers) < 6 else MAX_IMAGES // 8)
        result.update(measure(model, list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE)))))
    result['basins'] = {}
    for layer, workspace in layers.items():
        priors = analysis.attractors(workspace)
        statistics_ = {f'attractor_{key}': value for key, value in slot_statistics(priors).items()}
        result['layers'].setdefault(layer, {}).update(statistics_)
        result['basins'][layer] = {
            f'{beta:g}': [float(measures.basins(priors, beta, noise).mean()) for noise in NOISES] for beta in BETAS}
    return result


def measure_runs(folder: Path, data_dir: str) -> Tuple[Runs, Measured]:
    """Figures of the runs of a recipe, and the agreement of the seeds of its default run."""
    recipe = json.loads((folder / 'results.json').read_text())['recipe']
    split = load_split(recipe, data_dir, 'validation')
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    batches = [split.batch(items)[:2] for items in order.split(BATCH_SIZE)]

    def load(label: str, seed: int, trained: bool = True) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = create_run_model(recipe, recipe['runs'][label], len(split.class_names))
        if trained:
            load_checkpoint(model, str(folder / label / f'seed{seed}' / 'last.pth.tar'))
        return model.eval()

    runs: Runs = {}
    for label, run in tqdm(recipe['runs'].items(), desc=folder.name):
        for seed in run['seeds']:
            place = folder / label / f'seed{seed}'
            measured = cached(
                place / 'analysis.json', place / 'result.json', lambda: measure(load(label, seed), batches))
            measured['log'] = json.loads((place / 'log.json').read_text())
            runs.setdefault(f'{folder.name}, {label}', []).append(measured)
    seeds = recipe['runs']['default']['seeds']
    agreements = cached(folder / 'agreement.json', folder / 'default' / f'seed{seeds[-1]}' / 'result.json', lambda: {
        kind: measure_agreement([load('default', seed, kind == 'trained') for seed in seeds], batches)
        for kind in ('untrained', 'trained')})
    return runs, agreements


# The page

def chosen(runs: Runs, labels: str, data: str = '[^,]*') -> Runs:
    """Those of a data set and with a label that match."""
    return {name: seeds for name, seeds in runs.items() if re.fullmatch(f'{data}, ({labels})', name)}


def run_table(runs: Runs, labels: str, columns: Iterable[str]) -> str:
    rows = [
        [name, *(COLUMNS[column](seeds) for column in columns)] for name, seeds in chosen(runs, labels).items()]
    return table(['run', *columns], rows)


def attractor_table(shipped: Dict[str, Measured]) -> str:
    rows = []
    for name, measured in shipped.items():
        for layer, figures in measured['layers'].items():
            back = measured['basins'][layer]
            rows.append({
                'checkpoint, layer': f'{name}, {layer_name(layer)}',
                'rank': number(figures['attractor_effective_rank']),
                'cosine': number(figures['attractor_mean_cosine'], 2),
                'attractors': percent(back['1'][0], 0),
                'back after noise': percent(back['1'][NOISES.index(1.)], 0),
                'least β for all': next((beta for beta in back if back[beta][0] > 0.999), f'more than {max(BETAS):g}'),
                'fixed points': number(figures.get('num_fixed_points', math.nan)),
                'distance': percent(figures.get('distance', math.nan), 0),
            })
    return table(rows[0], [row.values() for row in rows])


def reading_table(models: Runs) -> str:
    rows = []
    for name, seeds in models.items():
        contribution = mean([measured['contribution'] for measured in seeds])
        rows.append({
            'model': name,
            'images': seeds[0]['num_images'],
            **{how: percent(accuracy) for how, accuracy in contribution.items()},
            'read / residual': percent(over_layers(seeds, 'residual_share'), 2),
            'the same for all': percent(over_layers(seeds, 'constant_share'), 0),
        })
    return table(rows[0], [row.values() for row in rows])


def attention_table(models: Runs) -> str:
    rows = []
    for name, seeds in models.items():
        blocks = [f'{min(counts):.1f} to {max(counts):.1f}' for counts in seeds[0]['interactions'].values()]
        means = [statistics.fmean(itertools.chain(*measured['interactions'].values())) for measured in seeds]
        middle = blocks[len(blocks) // 2] if len(blocks) > 2 else ''
        rows.append([name, blocks[0], middle, blocks[-1], mean_and_deviation(means, 1)])
    return table(['model', 'first block', 'middle', 'last', 'all heads'], rows)


def purity_table(models: Runs) -> str:
    rows = [
        [name, *(percent(value) for value in seeds[0]['purity'].values())]
        for name, seeds in models.items() if seeds[0].get('purity')]
    return table(['model', 'class', 'by chance', 'cluster', 'by chance'], rows)


def agreement_table(measured: Measured) -> str:
    rows = [
        [f'{kind}, {layer_name(layer)}', *(f'{value:.2f}' for value in figures.values())]
        for kind, layers in measured.items() for layer, figures in layers.items()]
    return table(['model', 'written', 'by chance', 'read', 'by chance'], rows)


def draw_ranks(runs: Runs, file: Path) -> None:
    figure = Figure(figsize=(5., 3.2), layout='constrained')
    axes = figure.subplots()
    for name, seeds in runs.items():
        log = seeds[0]['log']
        ranks = [min(entry['effective_rank'].values()) for entry in log]
        axes.plot([entry['step'] for entry in log], ranks, label=name.partition(', ')[2])
    axes.set(xlabel='step', ylabel='effective rank of the lowest layer', ylim=(0, 34))
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={'Date': None})  # the same figure is the same file


def draw_basins(shipped: Dict[str, Measured], file: Path) -> None:
    figure = Figure(figsize=(3.2 * len(shipped), 3.2), layout='constrained')
    axes = figure.subplots(1, len(shipped), sharey=True, squeeze=False)
    for axis, (name, measured) in zip(axes[0], shipped.items()):
        layers = list(measured['basins'].values())
        for beta in layers[0]:
            shares = [statistics.fmean(layer[beta][i] for layer in layers) for i in range(len(NOISES))]
            axis.plot(NOISES, shares, 'o-', label=f'β = {beta}')
        axis.set(title=name.replace('.', '\n', 1), xlabel='noise, relative to the prior', ylim=(-0.03, 1.03))
    axes[0, 0].set(ylabel='share of priors that return')
    axes[0, -1].legend(fontsize=8)
    figure.savefig(file, metadata={'Date': None})


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.analysis', description=__doc__.split('\n\n')[0])
    parser.add_argument('runs', type=Path, metavar='FOLDER', help='with the outputs of the recipes, by data set')
    parser.add_argument('--images', nargs='+', required=True, action=ParseKwargs, metavar='NAME=FOLDER',
                        help='ImageFolders: those of the recipes, and for the shipped checkpoints those of their tags')
    parser.add_argument('--page', type=Path, default=Path(__file__).with_name('ANALYSIS.md'), metavar='FILE',
                        help='page whose generated parts are written, with figures/ beside it (default: %(default)s)')
    args = parser.parse_args(argv)
    outputs = sorted(file.parent for file in args.runs.glob('*/results.json'))
    missing = [output.name for output in outputs if output.name not in args.images]
    if not outputs or missing:
        parser.error(f'{args.runs} must hold outputs of benchmarks.compare, and --images a folder for each, got '
                     f'{[output.name for output in outputs]} without images of {missing}')
    for output in outputs:
        runs = json.loads((output / 'results.json').read_text())['recipe']['runs']
        if len(runs.get('default', {}).get('seeds', ())) < 2:
            parser.error(f'{output}: the run "default" needs two seeds, whose slots are compared')
    matplotlib.rcParams['svg.hashsalt'] = 'timm_ait'
    runs, agreements = {}, []
    for output in outputs:
        measured, agreement = measure_runs(output, args.images[output.name])
        runs.update(measured)
        agreements.append(agreement)
    names = sorted(path.name for path in weights_dir().iterdir() if (path / 'model.safetensors').is_file())
    shipped = {}
    for name in tqdm(names, desc='checkpoints'):
        images = args.images.get(name.rpartition('.')[2])
        file = args.runs / f'{name}{"_with_images" if images else ""}.json'
        shipped[name] = cached(file, weights_dir() / name / 'model.safetensors', lambda: measure_shipped(name, images))
    with_images = {name: [measured] for name, measured in shipped.items() if 'accuracy' in measured}
    looked_at = {**with_images, **chosen(runs, LOOKED_AT)}
    figures = args.page.with_name('figures')
    figures.mkdir(exist_ok=True)
    draw_ranks(chosen(runs, CURVES, re.escape(outputs[0].name)), figures / 'analysis_rank.svg')
    draw_basins(shipped, figures / 'analysis_basins.svg')
    write_parts(args.page, {
        **{name: run_table(runs, *choice) for name, choice in RUN_TABLES.items()},
        'attractors': attractor_table(shipped),
        'reading': reading_table(looked_at),
        'attention': attention_table({**looked_at, **chosen(runs, 'ViT')}),
        'purity': purity_table(looked_at),
        'agreement': agreement_table(agreements[0]),
    })


if __name__ == '__main__':
    main()
