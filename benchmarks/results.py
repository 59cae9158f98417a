""" Bring the results of benchmarks.compare into the results page.

    python -m benchmarks.results output/compare_cifar10 output/ablations …

Each folder's budget, table and learning curves go into the generated part of its name; the rest of the page stays.
"""
import argparse
import json
import shutil
from pathlib import Path
from typing import List, Optional

from .page import write_parts


def budget_and_table(folder: Path) -> str:
    """What the page says about the output of benchmarks.compare in a folder."""
    recipe = json.loads((folder / 'results.json').read_text())['recipe']
    most, fewest = (choose((run['seeds'] for run in recipe['runs'].values()), key=len) for choose in (max, min))
    seeds = f"seed{'s' if len(most) > 1 else ''} {', '.join(map(str, most))}"
    if len(fewest) < len(most):
        seeds += ', of which each run had the first of the number that the table gives'
    return '\n'.join([
        f"{recipe['steps']} steps of {recipe['batch_size']}, {recipe['opt']}, learning rate {recipe['lr']:g}, cosine, "
        f"{recipe['amp_dtype']} training; {seeds}. Images of {recipe['image_size']} px. "
        f'`python -m benchmarks.compare examples/{folder.name}.yaml --data-dir DATA '
        f'--output output/{folder.name}`',
        '',
        (folder / 'table.md').read_text().rstrip(),
        '',
        f'![Learning curves](figures/{folder.name}_learning_curves.svg)',
    ])


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.results', description=__doc__.split('\n\n')[0])
    parser.add_argument('folders', nargs='+', type=Path, metavar='FOLDER', help='output of benchmarks.compare')
    parser.add_argument('--page', type=Path, default=Path(__file__).with_name('RESULTS.md'), metavar='FILE')
    args = parser.parse_args(argv)
    for folder in args.folders:
        if not (folder / 'table.md').is_file():
            parser.error(f'{folder} has no table.md: it is not the output of a complete run of benchmarks.compare')
    try:
        write_parts(args.page, {folder.name: budget_and_table(folder) for folder in args.folders})
    except ValueError as e:
        parser.error(str(e))
    figures = args.page.with_name('figures')
    figures.mkdir(exist_ok=True)
    for folder in args.folders:
        shutil.copyfile(folder / 'learning_curves.svg', figures / f'{folder.name}_learning_curves.svg')


if __name__ == '__main__':
    main()
