""" The commands of python -m timm_ait, a module each; nothing that a library user needs. """

__all__ = ['one_line']


def one_line(error: BaseException) -> str:
    """Kind and message of an exception in one line of bounded length."""
    message = ' '.join(str(error).split())
    message = message if len(message) <= 400 else f'{message[:400]} …'
    return f'{type(error).__name__}: {message}' if message else type(error).__name__
