"""What the library knows of this machine (anyflash_environment), with a default for all of it."""

from __future__ import annotations

import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

from anyflash.cli.console import UserError


@functools.lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """GPUs, driver, CPU, compiler, cache and archives; {"error": text} where the library itself
    cannot be loaded."""
    from anyflash import _library

    try:
        return dict(json.loads(_library.environment_json()))
    except Exception as error:  # a report about this machine has to go on, whatever it is
        return {"error": f"{type(error).__name__}: {error}"}


def require_library() -> None:
    """Raises UserError where attention cannot run at all, before anything else is done."""
    broken = environment().get("error") or (environment().get("cpu") or {}).get("error")
    if broken:
        text = f"{broken}; `python -m anyflash doctor` says what can be done"
        raise UserError(text, exit_code=1)


def busy() -> str:
    """A remark when others use this machine's CPUs, so that times say little; else empty."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return ""
    if load < 0.5 * cpu_count():
        return ""
    return f"This machine is busy (load {load:.1f} on {cpu_count()} CPUs): times are not its best."


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
