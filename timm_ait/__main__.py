""" Command line: python -m timm_ait COMMAND …

Each command is a module of `timm_ait.cli` whose `add_parser` adds its arguments and sets the function that runs it.
"""
import argparse
import sys
from typing import List, NoReturn, Optional

from timm_ait import __version__


class _Parser(argparse.ArgumentParser):
    """ Reports errors on one line, without the usage. """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command with arguments, by default those of the process; returns its exit code."""
    from timm_ait.cli import data, explain, export, predict, run

    parser = _Parser(prog='python -m timm_ait', description='Associative Transformer (AiT) for timm.')
    parser.add_argument('--version', action='version', version=f'timm_ait {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for command in (predict, explain, export, data, run):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    return args.main(args)


if __name__ == '__main__':
    sys.exit(main())
