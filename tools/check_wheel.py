"""Checks a built wheel: its tag, what is in it, its size, and what its libraries ask of a system.

usage: python tools/check_wheel.py WHEEL [--audit]

--audit also asks auditwheel and abi3audit, which must be installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST_MB = 40

# The fast binding's stable ABI; older Pythons go through ctypes.
OLDEST_ABI3 = "3.10"

# What a wheel must hold, as patterns of its paths.
REQUIRED = {
    "the package": r"anyflash/__init__\.py",
    "the library": r"anyflash/.*(libanyflash\.so|anyflash\.dll)",
    "the fast binding": r"anyflash/_fast\.(abi3\.so|pyd)",
    "the type marker": r"anyflash/py\.typed",
    "the C header": r"anyflash/.*include/anyflash/anyflash\.h",
    "the CMake package": r"anyflash/.*anyflash-config\.cmake",
    "the ledger": r"anyflash/.*ledger\.json",
    "compiled kernels": r"anyflash/.*kernels/sm_\w+\.bin",
    "the licence": r"anyflash-.*dist-info/.*LICENSE",
}

# What has no place in it.
FORBIDDEN = re.compile(r"(^|/)(tests?|bench|__pycache__|\.git|build)/|\.(pyc|o|a|cpp)$")


def problems_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    problems = [
        f"lacks {what} ({pattern})"
        for what, pattern in REQUIRED.items()
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    problems += [f"holds {name}" for name in names if FORBIDDEN.search(name)]
    if not re.fullmatch(r"anyflash-[\w.]+-py3-none-(linux|manylinux|win)\w*\.whl", wheel.name):
        problems.append(f"is named {wheel.name}, not anyflash-VERSION-py3-none-PLATFORM.whl")
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > LARGEST_MB:
        problems.append(f"has {megabytes:.1f} MB, {LARGEST_MB} are allowed")
    return problems


def audit(wheel: Path) -> list[str]:
    """What auditwheel and abi3audit complain about; their words are shown."""
    problems = []
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True
    )
    print(shown.stdout + shown.stderr)
    if shown.returncode:
        problems.append("auditwheel cannot read it")
    for library in re.findall(r"libtorch\S*|libcuda\S*|libcudart\S*|libgomp\S*", shown.stdout):
        problems.append(f"links {library}")
    return problems + audit_stable_abi(wheel)


def audit_stable_abi(wheel: Path) -> list[str]:
    """abi3audit on the extension alone: a py3-none wheel does not tell it the oldest Python."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        extensions = [name for name in archive.namelist() if name.endswith(".abi3.so")]
        paths = [archive.extract(name, folder) for name in extensions]
        command = [sys.executable, "-m", "abi3audit", "--strict", "--report"]
        command += ["--assume-minimum-abi3", OLDEST_ABI3, *paths]
        audited = subprocess.run(command, capture_output=True, text=True)
    print(audited.stdout + audited.stderr)
    return ["uses symbols outside the stable ABI"] if audited.returncode or not paths else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--audit", action="store_true")
    arguments = parser.parse_args()
    problems = problems_of(arguments.wheel)
    if arguments.audit:
        problems += audit(arguments.wheel)
    for problem in problems:
        print(f"the wheel {problem}")
    size = arguments.wheel.stat().st_size / 1e6
    print(f"{arguments.wheel.name}: {size:.1f} MB: {'good' if not problems else 'not good'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
