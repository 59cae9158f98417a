""" Bring the results of benchmarks/compare into the results page.

    python -m benchmarks.results output/compare_cifar10 output/ablations …

The page has a block for each folder, between `<!-- NAME -->` and `<!-- end of NAME -->` with the folder's name. Blocks
of the given folders are written anew: budget, table and figures, which are copied to the folder `figures` beside the
page. What stands between the blocks stays.
"""
import argparse
import json
import re
import shutil
from pathlib import Path
from typing import List, Optional

FIGURES = {
    'accuracy': 'Accuracy',
    'accuracy_parameters': 'Accuracy against parameters',
    'accuracy_macs': 'Accuracy against multiply-adds',
    'learning_curves': 'Learning curves',
}


def block(folder: Path, figures: Path) -> str:
    """Text of a folder's block; copies its figures."""
    recipe = json.loads((folder / 'results.json').read_text())['recipe']
    most, fewest = (choose((run['seeds'] for run in recipe['runs'].values()), key=len) for choose in (max, min))
    seeds = f"seed{'s' if len(most) > 1 else ''} {', '.join(map(str, most))}"
    if len(fewest) < len(most):
        seeds += ', of which each run had the first of the number that the table gives'
    lines = [
        f"{recipe['steps']} steps of {recipe['batch_size']}, {recipe['opt']}, learning rate {recipe['lr']:g}, cosine, "
        f"{recipe['amp_dtype']} training; {seeds}. Images of {recipe['image_size']} px. "
        f'`python -m benchmarks.compare examples/{folder.name}.yaml --data-dir DATA '
        f'--output output/{folder.name}`',
        '',
        (folder / 'table.md').read_text().rstrip(),
        '',
    ]
    figures.mkdir(exist_ok=True)
    for name, title in FIGURES.items():
        shutil.copyfile(folder / f'{name}.svg', figures / f'{folder.name}_{name}.svg')
        lines.append(f'![{title}](figures/{folder.name}_{name}.svg)')
    return '\n'.join(lines)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('folders', nargs='+', type=Path, metavar='FOLDER', help='output of benchmarks.compare')
    parser.add_argument('--page', type=Path, default=Path(__file__).parent / 'RESULTS.md', metavar='FILE')
    args = parser.parse_args(argv)
    page = args.page.read_text()
    for folder in args.folders:
        if not (folder / 'table.md').is_file():
            parser.error(f'{folder} has no table.md: it is not the output of a complete run of benchmarks.compare')
        begin, end = f'<!-- {folder.name} -->', f'<!-- end of {folder.name} -->'
        if not re.search(f'{begin}.*{end}', page, flags=re.DOTALL):
            parser.error(f'{args.page} has no block for {folder.name}: write {begin} and {end} where it belongs')
    for folder in args.folders:
        begin, end = f'<!-- {folder.name} -->', f'<!-- end of {folder.name} -->'
        text = '\n'.join([begin, block(folder, args.page.parent / 'figures'), end])
        page = re.sub(f'{begin}.*{end}', lambda match: text, page, flags=re.DOTALL)
    args.page.write_text(page)


if __name__ == '__main__':
    main()
