""" The commands of python -m timm_ait, one module each. Libraries should not import from here. """
import contextlib
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Callable, Iterator

__all__ = ['integer', 'nearest_folder', 'one_line', 'output_folder', 'quietly', 'replacing']


def one_line(error: BaseException) -> str:
    """Type and message of an exception on one line, shortened to about 400 characters."""
    message = ' '.join(str(error).split())
    message = message if len(message) <= 400 else f'{message[:400]} …'
    return f'{type(error).__name__}: {message}' if message else type(error).__name__


def quietly(command: Callable[[ArgumentParser, Namespace], int], parser: ArgumentParser, args: Namespace) -> int:
    """Run a command. It ends silently if its output is closed, as by `head`, and in one line on a file error."""
    try:
        code = command(parser, args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails
        return 1
    except OSError as e:
        parser.error(one_line(e))


def integer(minimum: int) -> Callable[[str], int]:
    """Type of an argument: an integer of at least a minimum."""
    def integer(text: str) -> int:
        if not minimum <= int(text) < 2 ** 64:
            raise ArgumentTypeError(f'must be at least {minimum} and less than 2**64, got {text}')
        return int(text)

    return integer


def output_folder(text: str) -> Path:
    """Type of an argument: a folder that can be written to or created."""
    existing = nearest_folder(Path(text))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ArgumentTypeError(f'{text}: {existing} is not a folder that can be written to')
    return Path(text)


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file to write to, which replaces `file` at the end; on failure `file` stays as it was."""
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
