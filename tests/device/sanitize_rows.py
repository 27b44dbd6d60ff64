"""Launches every row of the table on small odd shapes: what compute-sanitizer watches.

usage: compute-sanitizer python tests/device/sanitize_rows.py [--op forward] [--family sm80]
                                                              [--rows TEXT] [--plan-only sm_90]

--family: only its rows; where a GPU has images of several families, ANYFLASH_IMAGE says which one
the plan prefers. Rows of the backward run after the forward that they need, with free and with
ordered sums of dQ.

Only the driver and NumPy: a framework's start would take most of the time under a sanitizer.
The last line is "cases: N, rows reached: N of N". Fails when a launch fails, when a result is not
finite, or when a row that serves this GPU was not reached.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from anyflash import _library

ROW_NAME = re.compile(
    r"(?P<op>[a-z_]+)_(?P<family>sm\d+)_(?P<variant>[a-z]+)_(?P<dtype>fp16|bf16)"
    r"_d(?P<d>\d+)_dv(?P<dv>\d+)_(?P<Br>\d+)x(?P<Bc>\d+)"
)
DTYPES = {"fp16": _library.FLOAT16, "bf16": _library.BFLOAT16}


class Driver:
    """The few functions of libcuda that a test needs."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.cuda, name)(*arguments):
            raise RuntimeError(f"{name} returned {status}")

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def upload(self, array: np.ndarray) -> int:
        pointer = self.allocate(array.nbytes)
        if array.nbytes:
            self._call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(pointer),
                array.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_size_t(array.nbytes),
            )
        return pointer

    def download(self, pointer: int, array: np.ndarray) -> np.ndarray:
        if array.nbytes:
            self._call(
                "cuMemcpyDtoH_v2",
                array.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_uint64(pointer),
                ctypes.c_size_t(array.nbytes),
            )
        return array

    def free(self, pointers: list[int]) -> None:
        for pointer in pointers:
            self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")


@dataclass
class Shape:
    """One small problem. gap: elements between rows, so that 1 makes rows start anywhere."""

    d: int
    dv: int
    dtype: int
    q: int = 133
    k: int = 197
    batch: int = 2
    heads: int = 2
    heads_k: int = 1
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    gap: int = 0
    packed: list[tuple[int, int]] = field(default_factory=list)


def shapes_for(row: re.Match[str]) -> list[Shape]:
    """Problems whose plan should pick this row, at its own head dims and just below."""
    d, dv, dtype = int(row["d"]), int(row["dv"]), DTYPES[row["dtype"]]
    packed = [(70, 133), (0, 5), (65, 0), (1, 66)]
    if row["variant"] == "plain":
        return [
            Shape(d, dv, dtype, causal=True),
            Shape(d - 8, dv - 8, dtype, q=1, k=65),
            Shape(d, dv, dtype, packed=packed, causal=True),
        ]
    return [
        Shape(d, dv, dtype, window=(40, 7), softcap=20.0, alibi=True),
        Shape(d - 3, dv - 5, dtype, gap=1, causal=True),
        Shape(d, dv, dtype, packed=packed, window=(33, 0), alibi=True),
    ]


class Problem:
    """A shape as an anyflash_problem of each operation; with a driver in real memory, without one
    for planning."""

    def __init__(self, shape: Shape, driver: Driver | None) -> None:
        self.shape, self.driver, self.pointers = shape, driver, []
        self.random = np.random.default_rng(0)
        total_q = sum(n for n, _ in shape.packed)
        total_k = sum(m for _, m in shape.packed)
        self.batch = len(shape.packed) or shape.batch
        lead_q = (total_q,) if shape.packed else (shape.batch, shape.q)
        lead_k = (total_k,) if shape.packed else (shape.batch, shape.k)
        q = self._values((*lead_q, shape.heads, shape.d))
        k = self._values((*lead_k, shape.heads_k, shape.d))
        v = self._values((*lead_k, shape.heads_k, shape.dv))
        self.outputs: list[tuple[str, int, tuple[int, ...]]] = []
        o = self._output("O", (*lead_q, shape.heads, shape.dv))
        lse_shape = (shape.heads, total_q) if shape.packed else (self.batch, shape.heads, shape.q)
        lse = self._lse(lse_shape)
        dlse = self._array(self.random.standard_normal(lse_shape).astype(np.float32))
        dout = self._values((*lead_q, shape.heads, shape.dv))
        gradients = [
            self._output("dQ", (*lead_q, shape.heads, shape.d)),
            self._output("dK", (*lead_k, shape.heads_k, shape.d)),
            self._output("dV", (*lead_k, shape.heads_k, shape.dv)),
        ]
        slopes = _library.ABSENT
        if shape.alibi:
            slopes = self._array(np.linspace(0.1, 0.4, shape.heads, dtype=np.float32))
        lengths = (_library.ABSENT, _library.ABSENT)
        if shape.packed:
            lengths = tuple(self._cumulative(which) for which in (0, 1))
        absent = (_library.ABSENT, _library.ABSENT)
        tensors = (q, k, v, o, lse, slopes, *lengths, *absent)

        def pack(op: int, gradients: tuple[bytes, ...] | None, deterministic: bool) -> bytes:
            return _library.pack_problem(
                op,
                tensors,
                gradients,
                max((n for n, _ in shape.packed), default=shape.q),
                max((m for _, m in shape.packed), default=shape.k),
                *shape.window,
                shape.d**-0.5,
                shape.softcap,
                shape.causal,
                deterministic,
            )

        # What is run, in this order, for each operation.
        self.forward = [pack(_library.FORWARD, None, True)]
        self.backward = [
            pack(_library.BACKWARD, (dout, dlse, *gradients), deterministic)
            for deterministic in (False, True)
        ]

    def _place(self, array: np.ndarray) -> int:
        if self.driver is None:
            return 0
        self.pointers.append(self.driver.upload(array))
        return self.pointers[-1]

    def _values(self, shape: tuple[int, ...]) -> bytes:
        """Random 16-bit values, with shape.gap elements between rows."""
        gap = self.shape.gap
        strides, size = [1], 1
        for extent in reversed(shape[1:]):
            size = size * extent + gap
            strides.append(size)
        size *= shape[0]
        values = self.random.standard_normal(size).astype(np.float32)
        if self.shape.dtype == _library.FLOAT16:
            array = values.astype(np.float16).view(np.uint16)
        else:
            array = (values.view(np.uint32) >> 16).astype(np.uint16)
        return self._tensor(self._place(array), self.shape.dtype, shape, tuple(reversed(strides)))

    def _output(self, name: str, shape: tuple[int, ...]) -> bytes:
        """NaN, so that what a kernel leaves out is found by check(); uploaded, because initcheck
        does not see what the copy engine of a GPU (TMA) stores."""
        pointer = self._place(np.full(shape, 0xFFFF, np.uint16))
        self.outputs.append((name, pointer, shape))
        return self._tensor(pointer, self.shape.dtype, shape, _contiguous(shape))

    def _lse(self, shape: tuple[int, ...]) -> bytes:
        pointer = self._place(np.full(shape, np.nan, np.float32))
        return self._tensor(pointer, _library.FLOAT32, shape, _contiguous(shape))

    def _array(self, array: np.ndarray) -> bytes:
        dtype = _library.INT32 if array.dtype == np.int32 else _library.FLOAT32
        return self._tensor(self._place(array), dtype, array.shape, _contiguous(array.shape))

    def _cumulative(self, which: int) -> bytes:
        lengths = [0, *(pair[which] for pair in self.shape.packed)]
        return self._array(np.cumsum(lengths, dtype=np.int32))

    @staticmethod
    def _tensor(
        pointer: int, dtype: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> bytes:
        return _library.pack_tensor(pointer, dtype, (_library.CUDA, 0), shape, strides)

    def run(self, problem: bytes) -> None:
        assert self.driver is not None
        plan = _library.make_plan(problem, None)
        workspace = self.driver.allocate(plan.workspace_bytes) if plan.workspace_bytes else None
        run = _library.library().anyflash_run
        _library.check(run(ctypes.byref(plan), problem, workspace, None))
        self.driver.synchronize()
        self.driver.free([workspace] if workspace else [])

    def check(self, names: tuple[str, ...]) -> None:
        """Raises if an output holds anything that is not finite."""
        assert self.driver is not None
        exponent = 0x7C00 if self.shape.dtype == _library.FLOAT16 else 0x7F80
        for name, pointer, shape in self.outputs:
            if name not in names:
                continue
            bits = self.driver.download(pointer, np.empty(shape, np.uint16))
            if np.any((bits & exponent) == exponent):
                raise RuntimeError(f"{name} is not finite: {self.shape}")

    def free(self) -> None:
        assert self.driver is not None
        self.driver.free(self.pointers)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * max(extent, 1))
    return tuple(reversed(strides))


def same_kernel(row: re.Match[str]) -> tuple[str, ...]:
    """Rows alike in all this are alternatives of each other for different GPUs."""
    return tuple(row[name] for name in ("op", "family", "variant", "dtype", "d", "dv"))


def run_and_check(problem: Problem, op: str) -> None:
    for one in problem.forward:
        problem.run(one)
    problem.check(("O",))
    for one in problem.backward if op == "backward" else ():
        problem.run(one)
        problem.check(("dQ", "dK", "dV"))
    problem.free()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default="forward", choices=("forward", "backward"))
    parser.add_argument("--family", help="only rows of this family")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name holds it")
    parser.add_argument("--plan-only", metavar="sm_NN", help="no GPU: which rows would be reached")
    arguments = parser.parse_args()
    os.environ["ANYFLASH_FREE_ORDER"] = "1"  # the plan has dQ of problems so small added in turns
    driver, device = None, None
    if arguments.plan_only:
        device = _library.describe_gpu(int(arguments.plan_only.removeprefix("sm_")))
    else:
        driver = Driver()

    rows = [ROW_NAME.fullmatch(row["name"]) for row in json.loads(_library.rows_json())]
    known = [row for row in rows if row and row["op"] == arguments.op]
    if arguments.family:
        known = [row for row in known if row["family"] == arguments.family]
    known = [row for row in known if arguments.rows in row[0]]
    reached, tried, cases = set(), set(), 0
    for row in known:
        if same_kernel(row) in tried:
            continue
        tried.add(same_kernel(row))
        for shape in shapes_for(row):
            problem = Problem(shape, driver)
            watched = problem.forward if arguments.op == "forward" else problem.backward
            for one in watched:
                plan = _library.make_plan(one, device)
                reached.update(rows[launch.row] for launch in plan.launches[: plan.launch_count])
                cases += 1
            if driver is not None:
                run_and_check(problem, arguments.op)
    # An older family stands in for what the newest cannot address; it has a run of its own.
    newest = max((row["family"] for row in reached if row), default="")
    kernels = {same_kernel(row) for row in known if row["family"] == newest}
    missing = kernels - {same_kernel(row) for row in reached if row}
    for kernel in sorted(missing):
        print("not reached:", " ".join(kernel))
    print(f"cases: {cases}, rows reached: {len(kernels) - len(missing)} of {len(kernels)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
