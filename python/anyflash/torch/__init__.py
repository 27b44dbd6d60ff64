"""anyflash for PyTorch: the functions of `anyflash`, which train when given torch tensors.

The same objects as `anyflash.attention`, ...: for these, importing this module is not needed. And
torch's own `scaled_dot_product_attention` on anyflash: `enable_sdpa`.
"""

from __future__ import annotations

import torch  # noqa: F401  the error of a missing torch comes here

from .._sdpa import disable_sdpa, enable_sdpa, explain_sdpa, sdpa, sdpa_enabled
from ..api import attention, attention_backward, attention_varlen
from ..planning import explain, supports, warm_up

__all__ = [
    "attention",
    "attention_backward",
    "attention_varlen",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "explain_sdpa",
    "sdpa",
    "sdpa_enabled",
    "supports",
    "warm_up",
]
