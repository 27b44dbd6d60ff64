"""What the library knows of this machine (anyflash_environment), with a default for all of it."""

from __future__ import annotations

import functools
import json
import os
import platform
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """GPUs, driver, CPU, compiler, cache and archives; {"error": text} where the library itself
    cannot be loaded."""
    from anyflash import _library

    try:
        return dict(json.loads(_library.environment_json()))
    except Exception as error:  # a report about this machine has to go on, whatever it is
        return {"error": f"{type(error).__name__}: {error}"}


def gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver shows and that can be asked."""
    return [gpu for gpu in environment().get("gpus") or [] if "error" not in gpu]


def package_folder() -> Path:
    """Where anyflash is installed."""
    import anyflash

    return Path(str(anyflash.__file__)).absolute().parent


def cpu_description() -> str:
    """The processor, the instruction set that attention uses, and its threads."""
    cpu = environment().get("cpu") or {}
    threads = cpu.get("threads") or cpu_count()
    isa = f"{cpu['isa']}, " if cpu.get("isa") else ""
    return f"{cpu_name()}, {isa}{threads} thread{'s' if threads != 1 else ''}"


def cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cuda_version(version: int | None) -> str:
    """12090 as "12.9"."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "of unknown version"
