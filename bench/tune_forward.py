"""Tile shapes and pipelines of the sm80 forward kernel side by side on one GPU, for variants.def.

usage: python bench/tune_forward.py --d 128 [--json FILE] [--lengths 1024 8192]
           [--sources DIR] "128x64 w4 b2 k2 v1 q0" ...

--sources: the src folder of another checkout, to compare two versions of the kernel.

A candidate reads: Br x Bc, warps, blocks a multiprocessor, stages of K and of V, Q in registers.
Without candidates those of the docs are measured. Needs CuPy (its NVRTC compiles the candidates)
and torch (whose FlashAttention-2 is timed beside them); each candidate is checked against it first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch
from gpu_bench import measure
from gpu_peers import fa2
from gpu_problem import dense

UNBOUNDED = 1 << 30
CANDIDATES = {
    32: [
        "128x64 w4 b3 k2 v2 q0",
        "128x64 w4 b2 k2 v2 q1",
        "128x128 w4 b2 k2 v2 q0",
        "64x64 w4 b4 k2 v2 q1",
    ],
    64: [
        "128x64 w4 b2 k2 v2 q1",
        "128x64 w4 b2 k2 v2 q0",
        "128x64 w4 b2 k1 v1 q1",
        "128x32 w4 b3 k2 v2 q1",
        "128x128 w4 b2 k1 v1 q0",
        "64x64 w4 b3 k2 v2 q1",
        "256x64 w8 b1 k2 v2 q1",
        "128x128 w8 b1 k2 v2 q1",
    ],
    96: [
        "128x64 w4 b2 k2 v2 q0",
        "128x64 w4 b2 k2 v1 q0",
        "128x64 w4 b2 k1 v1 q0",
        "128x32 w4 b2 k2 v2 q0",
    ],
    128: [
        "128x64 w4 b2 k2 v1 q0",
        "128x64 w4 b2 k2 v2 q0",
        "128x64 w4 b2 k1 v1 q0",
        "128x32 w4 b2 k2 v2 q0",
        "64x64 w4 b3 k1 v1 q1",
        "256x64 w8 b1 k2 v2 q0",
        "128x64 w8 b1 k2 v2 q1",
        "128x128 w8 b1 k1 v1 q1",
    ],
    192: [
        "64x64 w4 b2 k1 v1 q0",
        "64x64 w4 b2 k2 v1 q0",
        "128x64 w8 b1 k2 v2 q0",
        "128x64 w8 b1 k1 v1 q0",
    ],
    256: [
        "64x64 w4 b2 k1 v1 q0",
        "128x64 w8 b1 k1 v1 q0",
        "128x64 w8 b1 k2 v2 q0",
        "128x32 w8 b1 k1 v1 q0",
    ],
}

STRIDES = np.dtype([("batch", "i8"), ("row", "i8"), ("head", "i8")])
DIVISOR = np.dtype([("divisor", "u4"), ("multiplier", "u4"), ("shift", "u4"), ("padding", "u4")])
POINTERS = [
    "q",
    "k",
    "v",
    "o",
    "lse",
    "alibi_slopes",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
]
# ForwardParams of src/cuda/params.h
PARAMS = np.dtype(
    [(name, "u8") for name in POINTERS]
    + [(name, STRIDES) for name in ("q_strides", "k_strides", "v_strides", "o_strides")]
    + [(name, "i8") for name in ("lse_batch", "lse_head", "alibi_batch")]
    + [(name, DIVISOR) for name in ("heads", "group", "section_heads", "section_blocks")]
    + [(name, "i4") for name in ("query_blocks", "batch", "seqlen_q", "seqlen_k", "d", "dv")]
    + [("window_left", "i4"), ("window_right", "i4")]
    + [(name, "f4") for name in ("factor", "softcap_in", "alibi_factor")]
    + [(name, "i4") for name in ("negative", "aligned", "padding")]
)


def divisor(n: int) -> tuple[int, int, int, int]:
    shift = (n - 1).bit_length()
    return n, (1 << (31 + shift)) // n + 1, shift, 0


class Candidate:
    """A row that is not in the table, compiled and ready to launch."""

    def __init__(self, text: str, d: int, sources: Path) -> None:
        match = re.fullmatch(r"(\d+)x(\d+) w(\d+) b(\d+) k(\d) v(\d) q(\d)", text)
        if not match:
            raise SystemExit(f"{text!r} does not read like '128x64 w4 b2 k2 v1 q0'")
        self.text, self.d = text, d
        self.Br, Bc, self.warps, blocks, k_stages, v_stages, q_in_registers = map(
            int, match.groups()
        )
        source = f"""#include "cuda/sm80/forward.cuh"
            struct Row {{ static constexpr int d = {d}, dv = {d}, Br = {self.Br}, Bc = {Bc},
              warps = {self.warps}, k_stages = {k_stages}, v_stages = {v_stages},
              q_in_registers = {q_in_registers};
              static constexpr bool general = false; using T = anyflash::bf16; }};
            extern "C" __global__ void __launch_bounds__({32 * self.warps}, {blocks})
            kernel(const __grid_constant__ anyflash::ForwardParams p) {{
              anyflash::sm80::forward<Row>(p); }}"""
        options = ("--std=c++20", f"-I{sources}")
        self.kernel = cupy.RawModule(code=source, options=options, backend="nvrtc").get_function(
            "kernel"
        )
        self.shared = max(self.Br * d + Bc * d * (k_stages + v_stages), self.Br * d) * 2
        self.kernel.max_dynamic_shared_size_bytes = self.shared

    def bind(self, q: Any, k: Any, v: Any, o: Any, causal: bool) -> Any:
        """A call on dense [B, N, H, d] tensors."""
        batch, seqlen, heads, _ = q.shape
        blocks = math.ceil(seqlen / self.Br)
        section = min(16, batch * heads) if causal else 1
        p = np.zeros((), PARAMS)
        for name, x in zip("qkvo", (q, k, v, o)):
            p[name] = x.data_ptr()
            p[f"{name}_strides"] = x.stride()[:3]
        p["heads"], p["group"] = divisor(heads), divisor(heads // k.shape[2])
        p["section_heads"], p["section_blocks"] = divisor(section), divisor(section * blocks)
        p["query_blocks"], p["batch"], p["seqlen_q"], p["seqlen_k"] = blocks, batch, seqlen, seqlen
        p["d"] = p["dv"] = self.d
        p["window_left"], p["window_right"] = UNBOUNDED, 0 if causal else UNBOUNDED
        p["factor"], p["alibi_factor"], p["aligned"] = self.d**-0.5 * math.log2(math.e), 1, 1
        grid, block = (blocks * heads * batch,), (32 * self.warps,)
        return partial(self.kernel, grid, block, (p,), shared_mem=self.shared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("candidates", nargs="*")
    parser.add_argument("--d", type=int, required=True, choices=sorted(CANDIDATES))
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time of a cell")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sources", type=Path, default=Path(__file__).resolve().parents[1] / "src")
    arguments = parser.parse_args()
    candidates = [
        Candidate(text, arguments.d, arguments.sources)
        for text in arguments.candidates or CANDIDATES[arguments.d]
    ]
    ratios: dict[str, dict[str, list[float]]] = {
        c.text: {"full": [], "causal": []} for c in candidates
    }
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream())
    for causal in (False, True):
        for seqlen in arguments.lengths:
            p = dense(seqlen, arguments.d, causal)
            o = torch.empty_like(p.q)
            peer = fa2(p)
            with stream:
                runs = {c.text: c.bind(p.q, p.k, p.v, o, causal) for c in candidates}
                for text, run in runs.items():
                    o.fill_(math.nan)
                    run()
                    if not torch.allclose(o, peer(), atol=0.02, rtol=0.02):
                        raise SystemExit(f"{text} is wrong at length {seqlen}, causal {causal}")
                times = measure({**runs, "fa2": peer}, arguments.seconds)
            for text in runs:
                ratios[text]["causal" if causal else "full"].append(times["fa2"] / times[text])
    lines = []
    for text, modes in ratios.items():
        line = {mode: round(statistics.geometric_mean(values), 3) for mode, values in modes.items()}
        lines.append({"d": arguments.d, "candidate": text, "over_fa2": line})
    lines.sort(key=lambda line: -sum(line["over_fa2"].values()))
    print(f"{torch.cuda.get_device_name()}: speed over FA2, geomean of lengths {arguments.lengths}")
    for line in lines:
        print(f"  d{line['d']:<4} {line['candidate']:28} full {line['over_fa2']['full']:.3f}"
              f"  causal {line['over_fa2']['causal']:.3f}")  # fmt: skip
    if arguments.json:
        old = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        kept = [line for line in old if line["d"] != arguments.d]
        arguments.json.write_text(json.dumps(kept + lines, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
