""" Arguments: checks that name the argument, its value and what would do, and which are whose. """
import difflib
import inspect
import math
from typing import Any, Dict, Iterable, Set, Tuple


def check_at_least(minimum: int, **values) -> None:
    """Raise a ValueError that names the first value that is not an integer, or too small."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}.')


def check_number(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    """Raise a ValueError unless low <= value <= high, or low < value <= high."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not (low < value if low_open else low <= value) or value > high:
        brackets = '(' if low_open else '[', ')' if math.isinf(high) else ']'
        raise ValueError(f'{name} must be a number in {brackets[0]}{low}, {high}{brackets[1]}, got {value!r}.')


def check_choice(name: str, value: Any, choices: Tuple[Any, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}.')


def check_known(names: Iterable[str], known: Set[str], where: str) -> None:
    """Raise a TypeError that names the first unknown argument, the nearest valid one, and where all are listed."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f' Did you mean {nearest[0]}?' if nearest else ''
            raise TypeError(f'Unknown argument {name!r}.{hint} The arguments are listed in help({where}).')


def options(cls: type) -> Set[str]:
    """Arguments of a layer's constructor except for `dim`, `device` and `dtype`."""
    return inspect.signature(cls).parameters.keys() - {'dim', 'device', 'dtype'}


def split_kwargs(cls: type, kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Split keyword arguments into the options of a layer and the others."""
    of_layer = {name: value for name, value in kwargs.items() if name in options(cls)}
    return of_layer, {name: value for name, value in kwargs.items() if name not in of_layer}
