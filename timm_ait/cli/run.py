""" Run any script with timm_ait imported first: python -m timm_ait run SCRIPT.py …

timm's validate.py, inference.py and benchmark.py have no option to import a package; run this way they know its models.
"""
import argparse
import os
import runpy
import sys
from pathlib import Path

_EPILOG = """\
Other Python processes that the script starts do not import timm_ait. In a script of your own whose workers create
models, write `import timm_ait`. timm's bulk_runner.py starts one process a model: let each be another `run`,

  python -m timm_ait run bulk_runner.py --model-list 'ait_vit_*' --sort-key infer_samples_per_sec \\
      -m 1 timm_ait run benchmark.py --bench inference
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        'run',
        help="run a script, such as timm's validate.py, with this package's models registered",
        description='Run a script as python would, with timm_ait imported first. All arguments after the script are '
                    "the script's.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse's REMAINDER after a positional loses a `--` that follows it, PARSER does not
    parser.add_argument('command', nargs=argparse.PARSER, metavar='SCRIPT.py', help='script and its arguments')
    parser.set_defaults(main=lambda args: _main(parser, args))


def _main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    script = args.command[0]
    if not os.path.isfile(script):
        parser.error(f'SCRIPT.py: there is no file {script!r}; give the path of a Python script')
    sys.argv = args.command
    if not getattr(sys.flags, 'safe_path', False):
        start = sys.path[0]
        sys.path[0] = os.path.dirname(os.path.realpath(script))
        # in a source checkout that is not installed, `start` is where the package is; spawned workers need it too
        if Path(start).resolve() == Path(__file__).resolve().parents[2]:
            sys.path.append(start)
    runpy.run_path(script, run_name='__main__')
    return 0
