""" Tables, figures and pages; as a command, bring the results of benchmarks.compare into the results page.

    python -m benchmarks.results output/compare_cifar10 output/ablations …

Each folder's budget, table and learning curves go into the generated part of its name; a person writes the rest.
"""
import argparse
import json
import os
import re
import shlex
import statistics
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, List, Optional, Sequence

from .compare.recipe import Recipe

# of benchmarks.compare, {label: {'model': the recipe's run, 'runs': [result.json of every seed]}}
Results = Dict[str, Dict[str, Any]]


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_text(text, encoding='utf-8')
    os.replace(partial, path)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Mean, with the standard deviation where there are several values; empty where there are none."""
    deviation = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.{digits}f}{deviation}' if values else ''


def table(header: Collection[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    return '\n'.join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_parts(page: Path, parts: Dict[str, str]) -> None:
    """Replace what is between `<!-- begin generated: NAME -->` and `<!-- end generated: NAME -->` of a page, by name.

    Raises:
        ValueError: The page has no such markers for a part. It is then left as it was.
    """
    text = page.read_text(encoding='utf-8')
    for name, part in parts.items():
        begin, end = f'<!-- begin generated: {name} -->', f'<!-- end generated: {name} -->'
        pattern = f'{re.escape(begin)}.*?{re.escape(end)}'
        text, found = re.subn(pattern, lambda match: f'{begin}\n{part}\n{end}', text, flags=re.DOTALL)
        if not found:
            raise ValueError(f'{page} has no place for {name}: write {begin} and {end} where it belongs')
    write_text(page, text)


def report(recipe: Recipe, output: Path, arguments: Sequence[str]) -> None:
    """Gather what a command with these options gave into `results.json`, `table.md` and `learning_curves.svg`."""
    results = {}
    for label, run in recipe['runs'].items():
        runs = [json.loads((output / label / f'seed{seed}' / 'result.json').read_text()) for seed in run['seeds']]
        results[label] = {'model': run, 'runs': runs}
    write_text(output / 'results.json', json.dumps(
        {'recipe': recipe, 'arguments': arguments, 'results': results}, indent=2))
    rows = _rows(results)
    text = table(rows[0], [row.values() for row in rows]) + '\n'
    write_text(output / 'table.md', text)
    print(text)
    _learning_curves(results, output)


def _rows(results: Results) -> List[Dict[str, Any]]:
    """Rows of the table, by column."""
    groups = list(dict.fromkeys(group for result in results.values() for group in result['runs'][0]['accuracy']))
    numbers_differ = len({len(result['runs']) for result in results.values()}) > 1
    gated = any(result['runs'][0]['gates'] for result in results.values())
    rows = []
    for label, result in results.items():
        runs = result['runs']
        ranks = [run['lowest_rank'] for run in runs if run['lowest_rank'] is not None]
        gates = [gate for run in runs for gate in run['gates']]
        rates = [run['training_rate'] for run in runs if run['training_rate'] is not None]
        row = {'': label}
        if numbers_differ:
            row['seeds'] = len(runs)
        for group in groups:
            values = [run['accuracy'][group] for run in runs if group in run['accuracy']]
            row[f'accuracy, {group}' if len(groups) > 1 else 'accuracy'] = mean_and_deviation(values, 2)
        row['lowest rank'] = f'{min(ranks):.1f}' if ranks else ''
        if gated:
            row['gates'] = f'{min(gates):.4f} to {max(gates):.4f}' if gates else ''
        row['parameters'] = f"{runs[0]['parameters'] / 1e6:.2f}M"
        row['MACs'] = f"{runs[0]['macs'] / 1e6:.1f}M"
        row['training images/s'] = f'{statistics.median(rates):.0f}' if rates else ''
        row['inference images/s'] = f"{statistics.median(run['inference_rate'] for run in runs):.0f}"
        rows.append(row)
    return rows


def _learning_curves(results: Results, output: Path) -> None:
    import matplotlib.figure  # not needed to validate

    figure = matplotlib.figure.Figure(figsize=(8.4, 4.2), layout='constrained')
    axes = figure.subplots()
    for i, (label, result) in enumerate(results.items()):
        logs: List[List[Dict[str, Any]]] = [run['log'] for run in result['runs']]
        accuracies = [statistics.mean(entry['accuracy']['all'] for entry in entries) for entries in zip(*logs)]
        style = '-' if i < 10 else '--'  # there are ten colours
        axes.plot([entry['step'] for entry in logs[0]], accuracies, style, label=label)
    axes.set(xlabel='step', ylabel='accuracy (%)')
    figure.legend(loc='outside right upper', fontsize=8)
    with matplotlib.rc_context({'svg.hashsalt': 'timm_ait'}):  # the same figure is the same file
        figure.savefig(output / 'learning_curves.svg', metadata={'Date': None})


def budget_and_table(folder: Path) -> str:
    """What the page says about the output of benchmarks.compare in a folder."""
    results = json.loads((folder / 'results.json').read_text())
    recipe, (file, *others) = results['recipe'], results['arguments']
    most, fewest = (choose((run['seeds'] for run in recipe['runs'].values()), key=len) for choose in (max, min))
    seeds = f"seed{'s' if len(most) > 1 else ''} {', '.join(map(str, most))}"
    if any(run['seeds'] != most[:len(run['seeds'])] for run in recipe['runs'].values()):
        seeds = '; '.join(f"{label} seeds {', '.join(map(str, run['seeds']))}" for label, run in recipe['runs'].items())
    elif len(fewest) < len(most):
        seeds += ', a run with n seeds the first n of them'
    runs = [run for result in results['results'].values() for run in result['runs']]
    devices = '; '.join(sorted({run['device'] for run in runs if 'device' in run}))
    return '\n'.join([
        f"{recipe['steps']} steps of {recipe['batch_size']}, {recipe['opt']}, learning rate {recipe['lr']:g}, cosine, "
        f"{recipe['amp_dtype']} training; {seeds}. Images of {recipe['image_size']} px. "
        f"{f'Trained on {devices}. ' if devices else ''}"
        f'`python -m benchmarks.compare {shlex.quote(file)} --data-dir DATA '
        f"{shlex.join(['--output', f'output/{folder.name}', *others])}`",
        '',
        (folder / 'table.md').read_text(encoding='utf-8').rstrip(),
        '',
        f'![Learning curves](figures/{folder.name}_learning_curves.svg)',
    ])


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.results', description=__doc__.split('\n\n')[0])
    parser.add_argument('folders', nargs='+', type=Path, metavar='FOLDER', help='output of benchmarks.compare')
    parser.add_argument('--page', type=Path, default=Path(__file__).with_name('RESULTS.md'), metavar='FILE')
    args = parser.parse_args(argv)
    figures = args.page.with_name('figures')
    try:
        parts = {folder.name: budget_and_table(folder) for folder in args.folders}
        curves = {folder.name: (folder / 'learning_curves.svg').read_bytes() for folder in args.folders}
        write_parts(args.page, parts)
        figures.mkdir(exist_ok=True)
        for name, curve in curves.items():
            (figures / f'{name}_learning_curves.svg').write_bytes(curve)
    except (OSError, ValueError) as e:
        parser.error(str(e))


if __name__ == '__main__':
    main()
