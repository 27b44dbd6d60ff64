"""Which way calls take: the extension `_fast` where it is built, else ctypes.

ANYFLASH_NO_FAST=1 asks for ctypes.
"""

from __future__ import annotations

import os
from typing import Any, Callable


def choose() -> Callable[..., Any]:
    """The function that computes a forward from the positions of `_call.Arguments`."""
    from . import _call, _library

    if os.environ.get("ANYFLASH_NO_FAST", "0") in ("", "0"):
        try:
            from . import _fast  # type: ignore[attr-defined,unused-ignore]
        except ImportError:
            pass
        else:
            _library.library()  # tells the library where this Python keeps libnvrtc
            _fast.bind(_library.find(), _call.forward, _library.show_notice)
            return _fast.forward  # type: ignore[no-any-return,unused-ignore]
    return _call.forward


def _first_forward(*arguments: Any) -> Any:
    """The first call chooses; later ones go straight."""
    global forward
    forward = choose()
    return forward(*arguments)


forward: Callable[..., Any] = _first_forward


def compute(*arguments: Any) -> Any:
    """A forward of plain memory: what `forward` does beside gradients."""
    from . import _call

    return _call.compute(*arguments)


def backward(*arguments: Any) -> Any:
    """The gradients from the positions of `_call.BackwardArguments`."""
    from . import _call

    return _call.backward(*arguments)
