"""The installed package alone, in any supported Python: attention against its reference.

usage: python tests/smoke.py
"""

from __future__ import annotations

import sys

import anyflash
import numpy as np


def main() -> int:
    random = np.random.default_rng(0)
    shapes = ((2, 70, 4, 64), (2, 130, 2, 64), (2, 130, 2, 64))
    for dtype, allowed in ((np.float32, 2e-6), (np.float16, 2e-3)):
        q, k, v = (random.standard_normal(shape).astype(dtype) for shape in shapes)
        o, lse = anyflash.attention(q, k, v, causal=True, return_lse=True)
        expected, expected_lse = anyflash.reference(
            *(x.astype(np.float64) for x in (q, k, v)), causal=True, return_lse=True
        )
        error = float(np.abs(o - expected).max())
        error_lse = float(np.abs(lse - expected_lse).max())
        print(f"{np.dtype(dtype).name}: largest difference {error:.2g}, of L {error_lse:.2g}")
        if not (error < allowed and error_lse < 1e-4):
            return 1
    if anyflash.supports(q, k, v, device="sm_90") and not anyflash.explain(q, k, v, device="sm_90"):
        return 1
    try:
        anyflash.attention(q, k, v[:, :1])
    except ValueError as error:
        print(f"refused as it should be: {error}")
    else:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
