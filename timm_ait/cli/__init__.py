""" The commands of python -m timm_ait, a module each; nothing that a library user needs. """
import contextlib
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Callable, Iterator

__all__ = ['integer', 'nearest_folder', 'one_line', 'output_folder', 'quietly', 'replacing']


def one_line(error: BaseException) -> str:
    """Kind and message of an exception in one line of bounded length."""
    message = ' '.join(str(error).split())
    message = message if len(message) <= 400 else f'{message[:400]} …'
    return f'{type(error).__name__}: {message}' if message else type(error).__name__


def quietly(command: Callable[[ArgumentParser, Namespace], int], parser: ArgumentParser, args: Namespace) -> int:
    """Run a command, which ends without a word when whoever reads its output has seen enough, such as head, and with a
    line where a file cannot be written.
    """
    try:
        code = command(parser, args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
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
    """Type of an argument: a folder that can be written to, or made."""
    existing = nearest_folder(Path(text))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ArgumentTypeError(f'{text}: {existing} is not a folder that can be written to')
    return Path(text)


def nearest_folder(folder: Path) -> Path:
    """The folder, or that above it which is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `file` in the end; a failure leaves that as it was."""
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
