"""Which way calls take: the extension `_fast` where it is built, else ctypes.

ANYFLASH_NO_FAST=1 asks for ctypes. The functions of a way:

  - `forward`, `backward`: of any tensors, with gradients and all that their library asks for;
  - `compute`, `compute_backward`: the same of plain memory, without asking.

Each takes its arguments by position, as `_call` says.
"""

from __future__ import annotations

import os
import sys
from typing import Any

FUNCTIONS = ("forward", "compute", "backward", "compute_backward")


def choose() -> Any:
    """The module whose functions compute."""
    from . import _call, _library

    if os.environ.get("ANYFLASH_NO_FAST", "0") in ("", "0"):
        try:
            from . import _fast  # type: ignore[attr-defined,unused-ignore]
        except ImportError:
            pass
        else:
            _library.library()  # tells the library where this Python keeps libnvrtc
            complete = (getattr(_call, name) for name in FUNCTIONS)
            _fast.bind(_library.find(), *complete, _library.show_notice)
            return _fast
    return _call


def use(way: Any) -> None:
    """Lets all calls take this way."""
    for name in FUNCTIONS:
        globals()[name] = getattr(way, name)


# The first call chooses; later ones go straight.


def forward(*arguments: Any) -> Any:
    use(choose())
    return globals()["forward"](*arguments)


def compute(*arguments: Any) -> Any:
    use(choose())
    return globals()["compute"](*arguments)


def backward(*arguments: Any) -> Any:
    use(choose())
    return globals()["backward"](*arguments)


def compute_backward(*arguments: Any) -> Any:
    use(choose())
    return globals()["compute_backward"](*arguments)


# torch.compile follows Python code but not what the functions above do: it takes these instead,
# which it finds by `compiling()`, a constant to it.


def compiling(modules: dict[str, Any] = sys.modules) -> bool:
    """Is torch.compile tracing this very call? Needs no torch."""
    return "torch._dynamo" in modules and modules["torch"].compiler.is_dynamo_compiling()


def traced_forward(*arguments: Any) -> Any:
    from ._call import Arguments
    from .torch import _ops

    return _ops.forward(Arguments.of(*arguments))


def traced_backward(*arguments: Any) -> Any:
    from ._call import BackwardArguments
    from .torch import _ops

    return _ops.backward(BackwardArguments.of(*arguments))
