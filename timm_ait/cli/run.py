""" Run any script with timm_ait imported first: python -m timm_ait run SCRIPT.py …

timm's validate.py, inference.py and benchmark.py have no option to import a package; run this way they know its models.
"""
import argparse
import functools
import os
import runpy
import sys
from pathlib import Path

__all__ = ['add_parser']


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'run',
        help='run a script, such as timm\'s validate.py, that then knows this package\'s models',
        description='Run a script as python would, with timm_ait imported first. Everything after the script is passed '
                    'on to it. Processes that the script spawns start from the script: if these create models, '
                    'write `import timm_ait` in it.',
    )
    # argparse's REMAINDER after a positional loses a `--` that follows it, PARSER does not
    parser.add_argument('command', nargs=argparse.PARSER, metavar='SCRIPT.py', help='script and its arguments')
    parser.set_defaults(main=functools.partial(_main, parser))


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    script = args.command[0]
    if not os.path.isfile(script):
        parser.error(f'SCRIPT.py: there is no file {script!r}; give the path of a Python script')

    sys.argv = args.command
    if not getattr(sys.flags, 'safe_path', False):
        start = sys.path[0]
        sys.path[0] = os.path.dirname(os.path.realpath(script))
        # started from a source checkout, the package is importable from there alone; spawned workers need it too
        if Path(start).resolve() == Path(__file__).resolve().parents[2]:
            sys.path.append(start)
    runpy.run_path(script, run_name='__main__')
    return 0
