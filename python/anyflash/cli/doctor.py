"""``python -m anyflash doctor``: what this machine has, what serves it, whether it works, what
to do if not."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anyflash.cli.console import UserError, megabytes
from anyflash.cli.facts import (
    cpu_description,
    cpu_name,
    cuda_version,
    environment,
    package_folder,
)

OK, NOTE, FAIL = "ok", "note", "fail"
NVRTC_REMEDY = "`pip install nvidia-cuda-nvrtc-cu12`"
MARKS = {OK: "+", NOTE: "-", FAIL: "!"}


@dataclass
class Check:
    """One line of the report. remedy: what to type when something that one may want is missing."""

    name: str
    status: str
    text: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    checks = examine()
    if arguments.json:
        report = {"checks": [asdict(check) for check in checks], "environment": environment()}
        print(json.dumps(report, indent=1))
    else:
        print(show(checks))
    return 1 if any(check.status == FAIL for check in checks) else 0


def examine() -> list[Check]:
    """All checks, in the order in which one would ask. None of them raises."""
    facts = environment()
    return [
        check_package(facts),
        check_cpu(facts),
        *check_gpus(facts),
        check_kernels(facts),
        check_compiler(facts),
        check_cache(facts),
        check_frameworks(),
        *check_results(facts),
    ]


def show(checks: list[Check]) -> str:
    """The report as text: a line a check, then what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        first, *more = check.text.splitlines() or [""]
        lines.append(f"{MARKS[check.status]} {check.name.ljust(width)}  {first}")
        lines += [" " * (width + 4) + line for line in more]
    remedies = [check for check in checks if check.remedy]
    if remedies:
        lines += ["", "What can be done:"]
        lines += [f"  {check.name}: {check.remedy}" for check in remedies]
    failed = [check.name for check in checks if check.status == FAIL]
    lines += [
        "",
        f"Something is wrong: {', '.join(failed)}." if failed else "Everything that is here works.",
    ]
    return "\n".join(lines)


def check_package(facts: dict[str, Any]) -> Check:
    import anyflash

    text = (
        f"anyflash {anyflash.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}\n{package_folder()}"
    )
    if "error" in facts:
        return Check(
            "package",
            FAIL,
            f"{text}\nthe library cannot be loaded: {facts['error']}",
            "reinstall it: `pip install --force-reinstall anyflash`, in a checkout `pip install .`",
        )
    if importlib.util.find_spec("anyflash._fast") is None:
        text += "\ncalls go through ctypes, which is slower: _fast was not built"
        remedy = "with Python >= 3.10 and its headers (Debian: python3-dev), reinstall anyflash"
        return Check("package", NOTE, text, remedy)
    return Check("package", OK, text)


def check_cpu(facts: dict[str, Any]) -> Check:
    cpu = facts.get("cpu") or {}
    if cpu.get("error"):
        remedy = f"unset ANYFLASH_CPU, or set it to one of {', '.join(cpu.get('isas') or [])}"
        return Check("CPU", FAIL, f"{cpu_name()}: {cpu['error']}", remedy)
    text = cpu_description()
    if len(cpu.get("isas") or []) > 1:
        text += f" (instruction sets here: {', '.join(cpu['isas'])})"
    return Check("CPU", OK, text)


def check_gpus(facts: dict[str, Any]) -> list[Check]:
    driver = facts.get("driver") or {}
    found = facts.get("gpus") or []
    if found:
        return [check_gpu(gpu, driver.get("version") or 0) for gpu in found]
    if _has_nvidia_card():
        text = f"an NVIDIA GPU is here, its driver is not: {driver.get('error')}"
        remedy = "install NVIDIA's driver, 525 or later; in a container start it with `--gpus all`"
        return [Check("GPU", FAIL, text, remedy)]
    reason = driver.get("error") or "the driver shows none"
    return [Check("GPU", NOTE, f"none: attention runs on the CPU\n{reason}")]


def check_gpu(gpu: dict[str, Any], driver: int) -> Check:
    name = f"GPU {gpu.get('index', 0)}"
    if "error" in gpu:
        return Check(name, FAIL, str(gpu["error"]), "see what `nvidia-smi` says about it")
    capability = int(gpu["compute_capability"])
    text = (
        f"{gpu['name']}, compute capability {capability // 10}.{capability % 10}, "
        f"{gpu['memory_bytes'] / 2**30:.0f} GB, driver of CUDA {cuda_version(driver)}"
    )
    if not gpu.get("images"):
        return Check(name, NOTE, f"{text}: older than every kernel, not used")
    if 0 < driver < 12000:
        return Check(name, FAIL, text, "update NVIDIA's driver to 525 or later")
    return Check(name, OK, text)


def check_kernels(facts: dict[str, Any]) -> Check:
    """Which images are here, and whether each GPU has its own among them."""
    archives = {archive["image"]: archive for archive in facts.get("archives") or []}
    lines = [_archive_text(archive) for archive in archives.values()]
    lines = lines or ["none: this package was built without kernels for GPUs"]
    status, remedy = OK if archives else NOTE, ""
    for gpu in facts.get("gpus") or []:
        for wanted in gpu.get("images") or []:
            ready = archives.get(wanted["image"], {}).get("fresh") or 0
            lines.append(
                f"GPU {gpu['index']} runs {wanted['image']}: {ready} of {wanted['rows']} rows"
            )
            if ready < wanted["rows"]:
                status = NOTE
                lines[-1] += ", the others are compiled on first use"
                if not facts.get("compiler"):
                    status, remedy = FAIL, NVRTC_REMEDY + ", or build anyflash on this machine"
    return Check("kernels", status, "\n".join(lines), remedy)


def _archive_text(archive: dict[str, Any]) -> str:
    if "error" in archive:
        return f"{archive['image']}: {archive['error']}"
    text = f"{archive['image']}: {archive['fresh']} of {archive['rows']} rows"
    if archive["fresh"] < archive["kernels"]:
        text += f", {archive['kernels'] - archive['fresh']} kernels of another version are not used"
    return text


def check_compiler(facts: dict[str, Any]) -> Check:
    compiler = facts.get("compiler")
    if compiler:
        version = cuda_version(compiler.get("version"))
        return Check("compiler", OK, f"libnvrtc {version}, {compiler['path']}")
    lines = ["no libnvrtc: GPUs that this package was not built for cannot be served"]
    for rejected in facts.get("compilers_rejected") or []:
        lines.append(f"not used: {rejected['path']} ({rejected['reason']})")
    return Check("compiler", NOTE, "\n".join(lines), NVRTC_REMEDY if facts.get("gpus") else "")


def check_cache(facts: dict[str, Any]) -> Check:
    cache = facts.get("cache") or {}
    remedy = "set ANYFLASH_CACHE_DIR to a folder that can be written"
    if not cache.get("path"):
        return Check("cache", NOTE, "none: there is no home folder", remedy)
    files = [file for file in Path(cache["path"]).rglob("*") if file.is_file()]
    text = f"{cache['path']}, {len(files)} files, "
    text += f"{megabytes(sum(file.stat().st_size for file in files))} MB"
    if not cache.get("writable"):
        text += "\ncannot be written: kernels compiled on first use last for one process"
        return Check("cache", NOTE, text, remedy)
    return Check("cache", OK, text)


def check_frameworks() -> Check:
    """Versions from the packages' metadata: nothing is imported, torch alone would take seconds."""
    found = {name: _version_of(name) for name in ("numpy", "torch", "cupy", "jax")}
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version) or "none"
    missing = [name for name, version in found.items() if not version]
    if missing and len(missing) < len(found):
        text += f" (not here: {', '.join(missing)})"
    if len(missing) == len(found):
        return Check(
            "frameworks",
            NOTE,
            text,
            "`pip install numpy`, torch, CuPy or JAX: tensors come from one of them",
        )
    return Check("frameworks", OK, text, details=found)


def check_results(facts: dict[str, Any]) -> list[Check]:
    """The self-test, on the CPU and on each GPU."""
    if "error" in facts:
        return []
    if importlib.util.find_spec("numpy") is None:
        return [Check("self-test", NOTE, "not run: it needs NumPy", "`pip install numpy`")]
    checks = [_self_test("CPU", ("float32", "float16"), _numpy_transfers)]
    for gpu in facts.get("gpus") or []:
        index = gpu.get("index", 0)
        if gpu.get("images"):
            checks.append(
                _self_test(
                    f"GPU {index}",
                    ("float16", "bfloat16"),
                    functools.partial(_gpu_transfers, index),
                )
            )
    return checks


def _self_test(device: str, dtypes: tuple[str, ...], transfers: Callable[[], Any]) -> Check:
    from anyflash.cli import self_test

    name = f"self-test {device}"
    try:
        to_device, to_host, known = transfers()
    except UserError as error:
        return Check(
            name, NOTE, f"not run: {error}", "`pip install cupy-cuda12x`, or torch with CUDA"
        )
    outcomes = self_test.run(tuple(dtype for dtype in dtypes if dtype in known), to_device, to_host)
    bad = [outcome for outcome in outcomes if not outcome.passed]
    details = {"outcomes": [asdict(outcome) for outcome in outcomes]}
    if not bad:
        worst = max(outcome.share or 0 for outcome in outcomes)
        text = (
            f"{len(outcomes)} problems agree with the reference (largest error: "
            f"{100 * worst:.0f} % of what the rule allows)"
        )
        return Check(name, OK, text, details=details)
    lines = [
        f"{outcome.problem} ({outcome.dtype}): "
        + (outcome.error or f"error {outcome.share:.1f} times what is allowed")
        for outcome in bad
    ]
    text = "\n".join([f"{len(bad)} of {len(outcomes)} problems failed", *lines])
    return Check(
        name, FAIL, text, "report it with the output of `python -m anyflash doctor --json`", details
    )


def _numpy_transfers() -> Any:
    return (
        (lambda x, dtype: x.astype(dtype)),
        (lambda o: o.astype("float32")),
        ("float32", "float16"),
    )


def _gpu_transfers(index: int) -> Any:
    """How arrays get to a GPU and back, by torch or CuPy, whichever is here and sees the GPU."""
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.device_count() > index:
            return (
                lambda x, dtype: torch.from_numpy(x).to(f"cuda:{index}", getattr(torch, dtype)),
                lambda o: o.float().cpu().numpy(),
                ("float16", "bfloat16"),
            )
    if importlib.util.find_spec("cupy"):
        import cupy

        def to_device(x: Any, dtype: str) -> Any:
            with cupy.cuda.Device(index):
                return cupy.asarray(x.astype(dtype))

        return to_device, lambda o: cupy.asnumpy(o).astype("float32"), ("float16",)
    raise UserError("neither torch with CUDA nor CuPy is here to hold tensors on the GPU")


def _has_nvidia_card() -> bool:
    """Whether a display device of NVIDIA's sits on the PCI bus."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            if (device / "vendor").read_text().strip() == "0x10de" and (
                device / "class"
            ).read_text()[2:4] == "03":
                return True
        except OSError:
            continue
    return False


def _version_of(module: str) -> str | None:
    """The installed version of an importable module, "?" where its package does not say."""
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        return None
    names = [module]
    if module == "cupy":
        names = [
            d.metadata["Name"]
            for d in importlib.metadata.distributions()
            if str(d.metadata["Name"]).startswith("cupy")
        ]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "?"
