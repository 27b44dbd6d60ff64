"""Both ways into the library: every test that asks for `binding` runs through each."""

from __future__ import annotations

import os

import pytest

np = pytest.importorskip("numpy", reason="these tests need NumPy")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from anyflash import _backend, _call


@pytest.fixture(params=["fast", "ctypes"])
def binding(request, monkeypatch):
    """The name of the way that `anyflash.attention` takes during the test."""
    if request.param == "fast":
        pytest.importorskip("anyflash._fast", reason="the extension _fast is not built")
        monkeypatch.delenv("ANYFLASH_NO_FAST", raising=False)
        way = _backend.choose()
    else:
        way = _call
    for name in _backend.FUNCTIONS:
        monkeypatch.setattr(_backend, name, getattr(way, name))
    return request.param


@pytest.fixture(autouse=True)
def same_bits_on_gpus():
    """dQ's sums have a free order on GPUs unless it is fixed, and tests compare bits."""
    if not os.environ.get("ANYFLASH_TEST_DEVICE", "cpu").startswith("cuda"):
        yield
        return
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
