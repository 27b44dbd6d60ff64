"""anyflash for PyTorch: the functions of `anyflash`, which train when given torch tensors.

The same objects as `anyflash.attention`, ...: importing this module is never needed, and says that
torch must be there.
"""

from __future__ import annotations

import torch  # noqa: F401  the error of a missing torch comes here

from ..api import attention, attention_backward, attention_varlen, explain, supports

__all__ = ["attention", "attention_backward", "attention_varlen", "explain", "supports"]
