"""Where the device tests run: ANYFLASH_TEST_DEVICE, by default the GPU.

With ANYFLASH_TEST_DEVICE=cpu the same tests run on the CPU backend, where they make sense.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="the device tests need torch")

DEVICE = os.environ.get("ANYFLASH_TEST_DEVICE", "cuda")
if DEVICE == "cpu":
    torch.set_num_threads(1)  # the oracle's tensors are small


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU (ANYFLASH_TEST_DEVICE=cpu runs these on the CPU)")
        for item in items:
            if "tests/device" in item.path.as_posix():
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def _gpu_only(request):
    if request.node.get_closest_marker("gpu") and DEVICE != "cuda":
        pytest.skip("needs a GPU")
