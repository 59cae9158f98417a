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
import re
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import matplotlib
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import timm
from timm.models import load_checkpoint

import timm_ait
from timm_ait import analysis
from timm_ait.ops.memory import slot_statistics
from timm_ait.weights import weights_dir

from .compare.data import load_images, load_split
from .compare.training import create_run_model, write_text
from .measures import (
    REPLACEMENTS,
    Batches,
    accuracy,
    agreement,
    basins,
    contribution,
    coordination_writes,
    kmeans,
    self_attention_interactions,
    slot_purity,
)
from .page import table, write_parts

BATCH_SIZE = 64
NUM_BATCHES = 8  # for figures of tokens; accuracies are of all images
MAX_IMAGES = 2048  # for a shipped checkpoint, an eighth of them for a deep one
NUM_CLUSTERS = 16
NOISES, BETAS = (0., 0.25, 0.5, 0.75, 1., 1.5, 2., 3.), (0.5, 1., 2., 4., 8., 16.)

Measured = Dict[str, Any]
Runs = Dict[str, Dict[str, List[Measured]]]  # by data set and label, for each seed

# tables of runs: which labels, and which of COLUMNS
RUN_TABLES = {
    'bottlenecks': (r'default|1 of \d+', ('effective tokens', 'coverage', 'overlap', 'by chance', 'accuracy')),
    'sizes': (r'default|1 of 256|\d+ slots, .*', ('coverage', 'accuracy')),
    'balance': (r'default|.*balance.*', ('lowest rank', 'highest cosine', 'coverage', 'overlap', 'accuracy')),
    'memories': (
        r'default|published update|learned.*|reset.*|written.*|Coordination|ViT',
        ('seeds', 'accuracy', 'lowest rank', 'coverage', 'overlap')),
}
LOOKED_AT = ('default', 'published update', 'learned and never written')  # runs beside the shipped checkpoints
CURVES = r'default|published update|normalize, 32 slots, .*'


def percent(value: float, digits: int = 1) -> str:
    return '' if value != value else f'{100. * value:.{digits}f}'


def over_layers(seeds: List[Measured], key: str, choose: Callable = statistics.fmean) -> float:
    """Mean over the seeds of what is chosen of the layers' figures; nan where there are none."""
    values = [
        choose([figures[key] for figures in measured['layers'].values()]) for measured in seeds
        if 'layers' in measured and all(key in figures for figures in measured['layers'].values())]
    return statistics.fmean(values) if values else float('nan')


def number(value: float, digits: int) -> str:
    return '' if value != value else f'{value:.{digits}f}'


def accuracies(seeds: List[Measured]) -> str:
    """Mean in percent, with the standard deviation where there are several seeds."""
    values = [100. * measured['accuracy'] for measured in seeds]
    return f'{statistics.fmean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')


COLUMNS: Dict[str, Callable[[List[Measured]], Any]] = {
    'seeds': len,
    'accuracy': accuracies,
    'lowest rank': lambda seeds: number(over_layers(seeds, 'effective_rank', min), 1),
    'highest cosine': lambda seeds: number(over_layers(seeds, 'mean_cosine', max), 2),
    'effective tokens': lambda seeds: number(over_layers(seeds, 'effective_tokens'), 1),
    'coverage': lambda seeds: percent(over_layers(seeds, 'coverage')),
    'overlap': lambda seeds: percent(over_layers(seeds, 'overlap'), 2),
    'by chance': lambda seeds: percent(over_layers(seeds, 'chance_overlap'), 2),
}


# Measuring

def cached(file: Path, measure: Callable[[], Any]) -> Any:
    """What was measured before, or is now."""
    if not file.exists():
        write_text(file, json.dumps(measure()))
    return json.loads(file.read_text())


def mean(parts: List[Dict[str, float]]) -> Dict[str, float]:
    return {key: statistics.fmean(part[key] for part in parts) for key in parts[0]}


def purities(model: torch.nn.Module, batches: Batches) -> Dict[str, float]:
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
                'cluster': kmeans(tokens.flatten(0, 1), NUM_CLUSTERS),
            }
            layers.append({})
            for kind, types in kinds.items():
                shuffled = types[torch.randperm(len(types), generator=generator)]
                layers[-1][kind] = float(slot_purity(weights, types).mean())
                layers[-1][f'{kind} by chance'] = float(slot_purity(weights, shuffled).mean())
    return mean(layers) if layers else {}


def measure(model: torch.nn.Module, batches: Batches) -> Measured:
    """All figures of an image classifier, those of tokens over the first NUM_BATCHES batches."""
    few = batches[:NUM_BATCHES]
    first = few[0][0]
    result: Measured = {
        'num_images': sum(len(labels) for _, labels in batches),
        'accuracy': accuracy(model, batches),
        'interactions': self_attention_interactions(model, first),
    }
    writes = coordination_writes(model, first)
    if writes:
        result['layers'] = {
            name: {**analysis.competition(attention), **mean([slot_statistics(memory) for memory in memories])}
            for name, (attention, memories) in writes.items()}
    elif timm_ait.memory_statistics(model):
        result['layers'] = analysis.analyse(model, (images for images, _ in few))
        result['purity'] = purities(model, few)
        if any(workspace.retrieves for workspace in analysis.workspaces(model).values()):
            result['contribution'] = contribution(model, batches)
    return result


def measure_agreement(models: List[torch.nn.Module], batches: Batches) -> Dict[str, Dict[str, float]]:
    """Agreement of the slots of each layer, mean over pairs of models."""
    images = torch.cat([images for images, _ in batches[:NUM_BATCHES]])
    maps = [{
        name: {
            'written': analysis.write_attention(model.get_submodule(name), tokens, 0.1).mean(dim=0),
            'read': analysis.read_weights(model.get_submodule(name), tokens.flatten(0, 1)).T,
        } for name, tokens in analysis.collect_tokens(model, images).items()} for model in models]
    result: Dict[str, Dict[str, float]] = {}
    for name, kind in itertools.product(maps[0], ('written', 'read')):
        found = [agreement(a[name][kind], b[name][kind]) for a, b in itertools.combinations(maps, 2)]
        result.setdefault(name, {})[kind] = statistics.fmean(x for x, _ in found)
        result[name][f'{kind} by chance'] = statistics.fmean(chance for _, chance in found)
    return result


def measure_shipped(name: str, data_dir: Optional[Path]) -> Measured:
    """Figures of a shipped checkpoint; those of its memory alone where there are no images."""
    model = timm.create_model(name, pretrained=True).eval()
    layers = analysis.workspaces(model)
    result: Measured = {'layers': {}, 'num_tokens': model.patch_embed.num_patches + model.num_prefix_tokens}
    if data_dir is not None:
        images, labels = load_images(data_dir, model, MAX_IMAGES if len(layers) < 6 else MAX_IMAGES // 8)
        result.update(measure(model, list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE)))))
    result['basins'] = {}
    for layer, workspace in layers.items():
        priors = analysis.attractors(workspace)
        statistics_ = {f'attractor_{key}': value for key, value in slot_statistics(priors).items()}
        result['layers'].setdefault(layer, {}).update(statistics_)
        result['basins'][layer] = {
            f'{beta:g}': [float(basins(priors, beta, noise).mean()) for noise in NOISES] for beta in BETAS}
    return result


def measure_runs(folder: Path, data_dir: Path) -> Tuple[Dict[str, List[Measured]], Measured]:
    """Figures of the runs of a recipe by label, and the agreement of the seeds of its default run."""
    recipe = json.loads((folder / 'results.json').read_text())['recipe']
    split = load_split(recipe, str(data_dir), 'validation')
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    batches = [split.batch(items)[:2] for items in order.split(BATCH_SIZE)]

    def load(label: str, seed: int, trained: bool = True) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = create_run_model(recipe, recipe['runs'][label], len(split.class_names))
        if trained:
            load_checkpoint(model, str(folder / label / f'seed{seed}' / 'last.pth.tar'))
        return model.eval()

    runs: Dict[str, List[Measured]] = {}
    for label, run in tqdm(recipe['runs'].items(), desc=folder.name):
        for seed in run['seeds']:
            place = folder / label / f'seed{seed}'
            measured = cached(place / 'analysis.json', lambda: measure(load(label, seed), batches))
            runs.setdefault(label, []).append({**measured, 'log': json.loads((place / 'log.json').read_text())})
    seeds = recipe['runs']['default']['seeds']
    agreements = cached(folder / 'agreement.json', lambda: {
        kind: measure_agreement([load('default', seed, kind == 'trained') for seed in seeds], batches)
        for kind in ('untrained', 'trained')})
    return runs, agreements


# The page

def run_table(runs: Runs, pattern: str, columns: Tuple[str, ...]) -> str:
    rows = [
        [f'{data}, {label}', *(COLUMNS[column](seeds) for column in columns)]
        for data, labels in runs.items() for label, seeds in labels.items() if re.fullmatch(pattern, label)]
    return table(['run', *columns], rows)


def short(layer: str) -> str:
    return layer.removesuffix('.mlp.workspace').replace('blocks.', 'block ')


def attractor_table(shipped: Dict[str, Measured]) -> str:
    rows = []
    for name, measured in shipped.items():
        for layer, figures in measured['layers'].items():
            back = measured['basins'][layer]
            rows.append([
                f'{name}, {short(layer)}',
                f"{figures['attractor_effective_rank']:.1f}",
                f"{figures['attractor_mean_cosine']:.2f}",
                percent(back['1'][0], 0),
                percent(back['1'][NOISES.index(1.)], 0),
                next((beta for beta in back if back[beta][0] > 0.999), f'more than {max(BETAS):g}'),
                *(number(figures.get(key, float('nan')), 1) for key in ('num_fixed_points', 'steps')),
                percent(figures.get('distance', float('nan')), 0),
                percent(figures.get('energy_rises', float('nan'))),
            ])
    return table([
        'checkpoint, layer', 'rank', 'cosine', 'attractors', 'back after noise', 'least β for all', 'fixed points',
        'steps', 'distance', 'energy rises'], rows)


def reading_table(looked_at: Dict[str, List[Measured]]) -> str:
    rows = []
    for label, seeds in looked_at.items():
        accuracies_ = mean([measured['contribution'] for measured in seeds])
        rows.append([
            label,
            seeds[0]['num_images'],
            *(percent(value) for value in accuracies_.values()),
            percent(over_layers(seeds, 'residual_share'), 2),
            percent(over_layers(seeds, 'constant_share'), 0),
        ])
    return table(
        ['model', 'images', 'unchanged', *REPLACEMENTS, 'read / residual', 'the same for all'], rows)


def attention_table(looked_at: Dict[str, List[Measured]]) -> str:
    rows = []
    for label, seeds in looked_at.items():
        blocks = list(seeds[0]['interactions'].values())
        first, middle, last = (
            f'{min(counts):.1f} to {max(counts):.1f}' for counts in (blocks[0], blocks[len(blocks) // 2], blocks[-1]))
        means = [
            statistics.fmean(itertools.chain(*measured['interactions'].values())) for measured in seeds]
        spread = f' ± {statistics.stdev(means):.1f}' if len(means) > 1 else ''
        rows.append([
            label, first, middle if len(blocks) > 2 else '', last, f'{statistics.fmean(means):.1f}{spread}'])
    return table(['model', 'first block', 'middle', 'last', 'all heads'], rows)


def purity_table(looked_at: Dict[str, List[Measured]]) -> str:
    rows = [
        [label, *(percent(value) for value in seeds[0]['purity'].values())]
        for label, seeds in looked_at.items() if seeds[0].get('purity')]
    return table(['model', 'class', 'by chance', 'cluster', 'by chance'], rows)


def agreement_table(measured: Measured) -> str:
    rows = [
        [f'{kind}, {short(layer)}', *(f'{value:.2f}' for value in figures.values())]
        for kind, layers in measured.items() for layer, figures in layers.items()]
    return table(['model', 'written', 'by chance', 'read', 'by chance'], rows)


def draw_ranks(runs: Dict[str, List[Measured]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(5., 3.2), layout='constrained')
    for label, seeds in runs.items():
        if re.fullmatch(CURVES, label):
            log = seeds[0]['log']
            ranks = [min(entry['effective_rank'].values()) for entry in log]
            axes.plot([entry['step'] for entry in log], ranks, label=label)
    axes.set(xlabel='step', ylabel='effective rank of the lowest layer', ylim=(0, 34))
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={'Date': None})  # the same figure is the same file
    plt.close(figure)


def draw_basins(shipped: Dict[str, Measured], file: Path) -> None:
    size = (3.2 * len(shipped), 3.2)
    figure, axes = plt.subplots(1, len(shipped), figsize=size, sharey=True, squeeze=False, layout='constrained')
    for axis, (name, measured) in zip(axes[0], shipped.items()):
        layers = list(measured['basins'].values())
        for beta in layers[0]:
            shares = [statistics.fmean(layer[beta][i] for layer in layers) for i in range(len(NOISES))]
            axis.plot(NOISES, shares, 'o-', label=f'β = {beta}')
        axis.set(title=name.replace('.', '\n', 1), xlabel='noise, relative to the prior', ylim=(-0.03, 1.03))
    axes[0, 0].set(ylabel='share of priors that return')
    axes[0, -1].legend(fontsize=8)
    figure.savefig(file, metadata={'Date': None})
    plt.close(figure)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.analysis', description=__doc__.split('\n\n')[0])
    parser.add_argument('runs', type=Path, metavar='FOLDER', help='with the outputs of the recipes, by data set')
    parser.add_argument('--images', nargs='+', required=True, metavar='NAME=FOLDER',
                        help='ImageFolders: those of the recipes, and for the shipped checkpoints those of their tags')
    parser.add_argument('--page', type=Path, default=Path(__file__).with_name('ANALYSIS.md'), metavar='FILE',
                        help='page whose generated parts are written, with figures/ beside it (default: %(default)s)')
    args = parser.parse_args(argv)
    folders = {name: Path(folder) for name, _, folder in (text.partition('=') for text in args.images)}
    outputs = sorted(file.parent for file in args.runs.glob('*/results.json'))
    missing = [output.name for output in outputs if output.name not in folders]
    if not outputs or missing:
        parser.error(f'{args.runs} must hold outputs of benchmarks.compare, and --images a folder for each, got '
                     f'{[output.name for output in outputs]} without images of {missing}')
    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'timm_ait'
    runs, agreements = {}, {}
    for output in outputs:
        runs[output.name], agreements[output.name] = measure_runs(output, folders[output.name])
    names = sorted(path.name for path in weights_dir().iterdir() if (path / 'model.safetensors').is_file())
    shipped = {
        name: cached(args.runs / f'{name}.json', lambda: measure_shipped(name, folders.get(name.rpartition('.')[2])))
        for name in tqdm(names, desc='checkpoints')}
    with_images = {name: [measured] for name, measured in shipped.items() if 'accuracy' in measured}
    looked_at = {
        **with_images,
        **{f'{data}, {label}': runs[data][label] for data in runs for label in LOOKED_AT if label in runs[data]}}
    vits = {f'{data}, ViT': labels['ViT'] for data, labels in runs.items() if 'ViT' in labels}
    first = next(iter(runs))
    figures = args.page.with_name('figures')
    figures.mkdir(exist_ok=True)
    draw_ranks(runs[first], figures / 'analysis_rank.svg')
    draw_basins(shipped, figures / 'analysis_basins.svg')
    write_parts(args.page, {
        **{name: run_table(runs, *choice) for name, choice in RUN_TABLES.items()},
        'attractors': attractor_table(shipped),
        'reading': reading_table(looked_at),
        'attention': attention_table({**looked_at, **vits}),
        'purity': purity_table(looked_at),
        'agreement': agreement_table(agreements[first]),
    })


if __name__ == '__main__':
    main()
