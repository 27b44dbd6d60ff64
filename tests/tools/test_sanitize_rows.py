"""What compute-sanitizer will run reaches every row: planned here, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("anyflash", reason="anyflash is not installed")

SCRIPT = Path(__file__).resolve().parents[1] / "device" / "sanitize_rows.py"


@pytest.mark.parametrize(
    ("gpu", "image"),
    [(gpu, "") for gpu in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")]
    + [("sm_90", "sm_90"), ("sm_90", "sm_90a")],
)
def test_every_kernel_is_reached(gpu, image, monkeypatch):
    monkeypatch.setenv("ANYFLASH_IMAGE", image)
    command = [sys.executable, str(SCRIPT), "--plan-only", gpu]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not reached" not in done.stdout


@pytest.mark.parametrize("family, image", [("sm80", "sm_90"), ("sm90", "sm_90a")])
def test_every_kernel_of_a_family_is_reached(family, image):
    command = [sys.executable, str(SCRIPT), "--op", "backward", "--family", family]
    command += ["--plan-only", "sm_90"]
    environment = {**os.environ, "ANYFLASH_IMAGE": image}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not reached" not in done.stdout
