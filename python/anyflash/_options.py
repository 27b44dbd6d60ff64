"""The keyword options of a call, checked and turned into the library's numbers."""

from __future__ import annotations

import operator
from typing import Any

_LARGEST = (1 << 62) - 1  # of a window or a length: fits an int64, and is unbounded to the library


def flag(value: Any, name: str) -> bool:
    """True and False, also of NumPy, and 0 and 1."""
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} is {value!r}; it must be True or False")


def real(value: Any, name: str) -> float:
    """A number that a float can hold; never a text or a truth value."""
    if type(value) is float:
        return value
    if not isinstance(value, (str, bytes, bytearray, bool)):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is too large for a float") from None
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} is {value!r}; it must be a number")


def whole(value: Any, name: str, wanted: str) -> int:
    """An integer of any library, not a truth value or a float. wanted: that in words."""
    if type(value).__name__ not in ("bool", "bool_"):
        try:
            return operator.index(value)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} is {value!r}; it must be {wanted}")


def window_sides(window: Any) -> tuple[int, int]:
    """(left, right) -> the same with -1 for None: unbounded."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(
            f"window is {window!r}; it must be a pair (left, right) of integers or None"
        ) from None
    return _side(left, "left"), _side(right, "right")


def _side(value: Any, side: str) -> int:
    if value is None:
        return -1
    number = whole(value, f"the {side} side of window", "an integer, or None for unbounded")
    if number < 0:
        raise ValueError(
            f"the {side} side of window is {number}; it must be 0 or more, or None for unbounded"
        )
    return min(number, _LARGEST)


def length(value: Any, name: str) -> int:
    """max_seqlen_q, max_seqlen_k."""
    return max(-_LARGEST, min(whole(value, name, "an integer"), _LARGEST))
