""" Arguments: checks that name the argument, its value and what would do, and which are whose. """
import inspect
import math
from typing import Any, Dict, Tuple

__all__ = ['check_at_least', 'check_choice', 'check_number', 'split_kwargs']


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


def check_choice(name: str, value: str, choices: Tuple[str, ...]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}.')


def split_kwargs(cls: type, kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Split keyword arguments into those of a layer, but for `dim`, `device` and `dtype`, and the others."""
    options = inspect.signature(cls).parameters.keys() - {'dim', 'device', 'dtype'}
    of_layer = {name: value for name, value in kwargs.items() if name in options}
    return of_layer, {name: value for name, value in kwargs.items() if name not in of_layer}
