""" The commands of python -m timm_ait, one module each. Libraries should not import from here. """
import contextlib
import io
import os
import sys
import tempfile
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Callable, Iterator, Union


def one_line(error: BaseException) -> str:
    """Type and message of an exception on one line, shortened to about 400 characters."""
    message = textwrap.shorten(str(error), 400, placeholder=' …')
    return f'{type(error).__name__}: {message}' if message else type(error).__name__


@contextlib.contextmanager
def blame(argument: str) -> Iterator[None]:
    """Any error as a ValueError that begins with an argument: readers of files and models raise many kinds."""
    try:
        yield
    except Exception as e:
        raise ValueError(f'{argument}: {one_line(e)}') from e


def quietly(command: Callable[[Namespace], int], parser: ArgumentParser, args: Namespace) -> int:
    """Run a command. A ValueError or file error ends it in one line; a closed output, as by `head`, in silence."""
    for name in ('stdout', 'stderr'):  # closed, as in a daemon
        setattr(sys, name, getattr(sys, name) or open(os.devnull, 'w'))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # for names of files that the terminal cannot print
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except (OSError, ValueError) as e:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails
        if isinstance(e, BrokenPipeError):
            return 1
        parser.error(one_line(e) if isinstance(e, OSError) else str(e))


def integer(minimum: int) -> Callable[[str], int]:
    """Type of an argument: an integer of at least a minimum."""
    def integer(text: str) -> int:
        if not minimum <= int(text) < 2 ** 64:
            raise ArgumentTypeError(f'must be at least {minimum} and less than 2**64, got {text}')
        return int(text)
    return integer


def is_same_file(a: Union[str, Path], b: Union[str, Path]) -> bool:
    """Whether two paths lead to one file or folder that exists, also where the file system ignores case."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists and may be seen; itself if none does."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)


def output_folder(text: str) -> Path:
    """Type of an argument: a folder that can be written to or created."""
    if not text:
        raise ArgumentTypeError('is empty')
    existing = _nearest(Path(text))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ArgumentTypeError(f'{text}: {existing} is not a folder that can be written to')
    return Path(text)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose contents move into `folder` at the end; on failure `folder` stays as it was."""
    with tempfile.TemporaryDirectory(dir=_nearest(folder), prefix='.incomplete-') as temporary:
        yield Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for item in Path(temporary).iterdir():
            os.replace(item, folder / item.name)
