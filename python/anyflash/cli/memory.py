"""Resident memory of this process, as the operating system counts it: Python's and native code's
together."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


class PeakResident:
    """Growth of the process's resident memory above where it stood at the start, at its highest; in
    bytes.

    On Linux memory that is free inside the process goes back to the system first (else what is
    measured would hide in it), and the kernel's own high-water mark (VmHWM) is reset and read
    afterwards. Where it cannot be reset the mark since the start of the process counts, which
    may hide a small growth, never invent one. None where the operating system tells neither
    (Windows).
    """

    def __init__(self) -> None:
        _return_free_memory()
        _reset_peak()
        self.start = resident()

    def growth(self) -> int | None:
        peak = _peak()
        if self.start is None or peak is None:
            return None
        return max(peak - self.start, 0)


def resident() -> int | None:
    """Resident bytes now."""
    return _status("VmRSS") if sys.platform == "linux" else _peak()


def available() -> int | None:
    """Bytes that can still be allocated without swapping, the container's limit included; None
    where unknown."""
    free = [_meminfo(), _container()]
    known = [value for value in free if value is not None]
    return min(known) if known else None


def _peak() -> int | None:
    if sys.platform == "linux":
        return _status("VmHWM")
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _return_free_memory() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _status(field: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _meminfo() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _container() -> int | None:
    """What the control group leaves (version 2, then version 1)."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            with open(limit) as file:
                most = file.read().strip()
            with open(used) as file:
                now = int(file.read())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            return max(int(most) - now, 0)
    return None
