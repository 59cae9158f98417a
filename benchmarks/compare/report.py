""" Table and learning curves of finished runs. """
import json
import statistics
from pathlib import Path
from typing import Any, Dict, List

import matplotlib
import matplotlib.pyplot as plt

from .recipe import Recipe
from .training import write_text

__all__ = ['report']

# {label: {'model': the recipe's run, 'runs': [result.json of every seed]}}
Results = Dict[str, Dict[str, Any]]


def report(recipe: Recipe, output: Path) -> None:
    """Gather the runs' results into `results.json`, `table.md` and `learning_curves.svg`."""
    matplotlib.use('Agg')
    results = {}
    for label, run in recipe['runs'].items():
        runs = [json.loads((output / label / f'seed{seed}' / 'result.json').read_text()) for seed in run['seeds']]
        results[label] = {'model': run, 'runs': runs}
    write_text(output / 'results.json', json.dumps({'recipe': recipe, 'results': results}, indent=2))
    table = _table(results)
    write_text(output / 'table.md', table)
    print(table)
    _learning_curves(results, output)


def _table(results: Results) -> str:
    groups = list(dict.fromkeys(group for result in results.values() for group in result['runs'][0]['accuracy']))
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
            values = [run['accuracy'][group] for run in runs if group in run['accuracy']]
            deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.2f}{deviation}' if values else '')
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


def _learning_curves(results: Results, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout='constrained')
    for i, (label, result) in enumerate(results.items()):
        logs: List[List[Dict[str, Any]]] = [run['log'] for run in result['runs']]
        accuracies = [statistics.mean(entry['accuracy']['all'] for entry in entries) for entries in zip(*logs)]
        style = '-' if i < 10 else '--'  # there are ten colours
        axes.plot([entry['step'] for entry in logs[0]], accuracies, style, label=label)
    axes.set(xlabel='step', ylabel='accuracy (%)')
    figure.legend(loc='outside right upper', fontsize=8)
    figure.savefig(output / 'learning_curves.svg')
    plt.close(figure)
