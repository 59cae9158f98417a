""" Tables and a figure of the results in a folder. """
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Sequence

import matplotlib
import matplotlib.pyplot as plt

from benchmarks.compare.training import write_text

from .bodies import BODIES, MLPS

__all__ = ['report']

Result = Dict[str, Any]


def report(output: Path) -> None:
    """Gather a folder's results into `table.md` and `learning_curves.svg`, and print the former."""
    matplotlib.use('Agg')
    results = [json.loads(file.read_text()) for file in sorted(output.glob('*.json'))]
    results.sort(key=lambda result: (
        list(result['recipe'].values()), list(BODIES).index(result['body']), list(MLPS).index(result['mlp']),
        result['seed']))
    recipes = [list(group) for _, group in itertools.groupby(results, key=lambda result: result['recipe'])]
    text = '\n'.join(f'{_recipe(group)}\n\n{_accuracies(group)}\n{_costs(group)}' for group in recipes)
    write_text(output / 'table.md', text)
    print(text)
    _learning_curves(recipes, output / 'learning_curves.svg')


def _recipe(results: List[Result]) -> str:
    recipe = results[0]['recipe']
    return (f"{recipe['dataset']}, width {recipe['dim']}, {recipe['epochs']} epochs ({recipe['warmup_epochs']} of "
            f"warm-up) in batches of {recipe['batch_size']}, learning rate {recipe['lr']:g}")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    return ''.join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _select(results: List[Result], body: str, mlp: str) -> List[Result]:
    return [result for result in results if (result['body'], result['mlp']) == (body, mlp)]


def _accuracies(results: List[Result]) -> str:
    """A row a body, a column an MLP: the mean over seeds, and each seed."""
    columns = [(mlp, 'frozen') for mlp in MLPS]
    columns.insert(columns.index(('published', 'frozen')) + 1, ('published', 'writing'))
    rows = []
    for body in BODIES:
        cells = []
        for mlp, measure in columns:
            values = [result['accuracy'][measure] for result in _select(results, body, mlp)]
            each = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.2f}{each}' if values else '')
        if any(cells):
            rows.append([body, *cells])
    return _markdown(
        ['body', *(f'{mlp}, {measure}' if mlp == 'published' else mlp for mlp, measure in columns)], rows)


def _costs(results: List[Result]) -> str:
    rows = []
    for body, mlp in itertools.product(BODIES, MLPS):
        runs = _select(results, body, mlp)
        if runs:
            ranks = [layer['effective_rank'] for run in runs for layer in run['memory'].values()]
            rows.append([
                f'{body}, {mlp}',
                f"{runs[0]['parameters']:,}",
                f'{min(ranks):.1f}' if ranks else '',
                f"{statistics.median(run['images_per_second'] for run in runs):,.0f}",
                ', '.join(sorted({run['device'] for run in runs})),
            ])
    return _markdown(['', 'parameters', 'lowest rank', 'training images/s', 'device'], rows)


def _learning_curves(recipes: List[List[Result]], file: Path) -> None:
    """Validation accuracy over epochs, the mean over seeds: a panel a recipe, a colour a body, a dash an MLP."""
    figure, panels = plt.subplots(
        1, len(recipes), figsize=(5.2 * len(recipes), 4.2), layout='constrained', squeeze=False)
    dashes = dict(zip(MLPS, ('-', '--', ':', '-.')))
    for axes, results in zip(panels[0], recipes):
        for (i, body), mlp in itertools.product(enumerate(BODIES), MLPS):
            logs = [result['log'] for result in _select(results, body, mlp)]
            if logs:
                accuracies = [
                    statistics.mean(entry['accuracy']['frozen'] for entry in entries) for entries in zip(*logs)]
                epochs = [entry['epoch'] for entry in logs[0]]
                axes.plot(epochs, accuracies, dashes[mlp], color=f'C{i}', label=f'{body}, {mlp}')
        axes.set_title(_recipe(results), fontsize=7)
        axes.set(xlabel='epoch', ylabel='validation accuracy (%)')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file)
    plt.close(figure)
