""" Table and figures of finished runs. """
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List, Tuple

import matplotlib
import matplotlib.pyplot as plt

from .recipe import Recipe
from .training import write_text

__all__ = ['report']

# {label: {'model': the recipe's run, 'runs': [result.json of every seed]}}
Results = Dict[str, Dict[str, Any]]


def report(recipe: Recipe, output: Path) -> None:
    """Gather the runs' results into `results.json`, `table.md` and the figures."""
    matplotlib.use('Agg')
    results = {}
    for label, run in recipe['runs'].items():
        runs = [json.loads((output / label / f'seed{seed}' / 'result.json').read_text()) for seed in run['seeds']]
        results[label] = {'model': run, 'runs': runs}
    write_text(output / 'results.json', json.dumps({'recipe': recipe, 'results': results}, indent=2))
    table = _table(results)
    write_text(output / 'table.md', table)
    print(table)
    _dots(results, output)
    _accuracy_against(results, 'parameters', 'parameters', output)
    _accuracy_against(results, 'macs', 'multiply-adds per image', output)
    _learning_curves(results, output)


def _table(results: Results) -> str:
    groups = list(next(iter(results.values()))['runs'][0]['accuracy'])
    numbers_differ = len({len(result['runs']) for result in results.values()}) > 1
    gated = any(result['runs'][0]['gates'] for result in results.values())
    header = ['', *(['seeds'] if numbers_differ else []),
              *(f'accuracy, {group}' if len(groups) > 1 else 'accuracy' for group in groups),
              'lowest rank', *(['gates'] if gated else []), 'parameters', 'MACs', 'training images/s',
              'inference images/s']
    rows = []
    for label, result in results.items():
        runs = result['runs']
        cells = [label, *([str(len(runs))] if numbers_differ else [])]
        for group in groups:
            mean, deviation = _mean_and_deviation(result, group)
            cells.append(f'{mean:.2f} ± {deviation:.2f}' if len(runs) > 1 else f'{mean:.2f}')
        ranks = [run['lowest_rank'] for run in runs if run['lowest_rank'] is not None]
        gates = [gate for run in runs for gate in run['gates']]
        rates = [run['training_rate'] for run in runs if run['training_rate'] is not None]
        cells += [
            f'{min(ranks):.1f}' if ranks else '',
            *([_range(gates)] if gated else []),
            f"{runs[0]['parameters'] / 1e6:.2f}M",
            f"{runs[0]['macs'] / 1e6:.1f}M",
            f'{statistics.median(rates):.0f}' if rates else '',
            f"{statistics.median(run['inference_rate'] for run in runs):.0f}",
        ]
        rows.append(cells)
    lines = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    return ''.join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _range(values: List[float]) -> str:
    return f'{min(values):.4f} to {max(values):.4f}' if values else ''


def _mean_and_deviation(result: Dict[str, Any], group: str = 'all') -> Tuple[float, float]:
    values = [run['accuracy'][group] for run in result['runs']]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def _dots(results: Results, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 1 + 0.3 * len(results)), layout='constrained')
    for position, result in enumerate(results.values()):
        accuracy, deviation = _mean_and_deviation(result)
        axes.errorbar(accuracy, position, xerr=deviation, fmt='o', capsize=3, color='tab:blue')
    axes.set(xlabel='accuracy (%)', yticks=range(len(results)), yticklabels=list(results))
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=0.3)
    _save(figure, output / 'accuracy.svg')


def _accuracy_against(results: Results, quantity: str, xlabel: str, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    for label, result in results.items():
        x = result['runs'][0][quantity]
        accuracy, deviation = _mean_and_deviation(result)
        axes.errorbar(x, accuracy, deviation, fmt='o', capsize=3)
        axes.annotate(label, (x, accuracy), xytext=(5, 4), textcoords='offset points', fontsize=8)
    axes.set(xlabel=xlabel, ylabel='accuracy (%)', xscale='log')
    axes.margins(x=0.2)
    _save(figure, output / f'accuracy_{quantity}.svg')


def _learning_curves(results: Results, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    for i, (label, result) in enumerate(results.items()):
        logs: List[List[Dict[str, Any]]] = [run['log'] for run in result['runs']]
        accuracies = [statistics.mean(entry['accuracy']['all'] for entry in entries) for entries in zip(*logs)]
        style = '-' if i < 10 else '--'  # there are ten colours
        axes.plot([entry['step'] for entry in logs[0]], accuracies, style, label=label)
    axes.set(xlabel='step', ylabel='accuracy (%)')
    axes.legend(fontsize=8)
    _save(figure, output / 'learning_curves.svg')
