"""The wheel check sees what is missing, what has no place there, and a wrong tag."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from check_wheel import problems_of

NAME = "anyflash-0.1.0-py3-none-linux_x86_64.whl"
FILES = [
    "anyflash/__init__.py",
    "anyflash/py.typed",
    "anyflash/_fast.abi3.so",
    "anyflash/lib/libanyflash.so",
    "anyflash/lib/kernels/sm_90.bin",
    "anyflash/lib/kernels/ledger.json",
    "anyflash/lib/cmake/anyflash/anyflash-config.cmake",
    "anyflash/include/anyflash/anyflash.h",
    "anyflash-0.1.0.dist-info/licenses/LICENSE",
]


def wheel_of(folder: Path, files: list[str], name: str = NAME) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    return path


def test_good_wheel(tmp_path):
    assert problems_of(wheel_of(tmp_path, FILES)) == []


@pytest.mark.parametrize("missing", FILES)
def test_every_part_is_asked_for(tmp_path, missing):
    files = [file for file in FILES if file != missing]
    assert len(problems_of(wheel_of(tmp_path, files))) == 1


@pytest.mark.parametrize("extra", ["anyflash/tests/a.py", "anyflash/a.pyc", "bench/x.py"])
def test_what_has_no_place_there(tmp_path, extra):
    assert problems_of(wheel_of(tmp_path, [*FILES, extra])) == [f"holds {extra}"]


@pytest.mark.parametrize("tag", ["cp311-cp311-linux_x86_64", "py3-none-any"])
def test_wrong_tag(tmp_path, tag):
    (problem,) = problems_of(wheel_of(tmp_path, FILES, f"anyflash-0.1.0-{tag}.whl"))
    assert "py3-none-PLATFORM" in problem
