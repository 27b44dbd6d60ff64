"""warm_up(): which kernels it loads, and what it refuses."""

from __future__ import annotations

import anyflash
import numpy as np
import pytest
from anyflash import _library

X = (1, 64, 4, 64)


@pytest.fixture
def loaded(monkeypatch):
    """The plans whose kernels are loaded during the test."""
    plans = []
    monkeypatch.setattr(_library, "warm_up", plans.append)
    return plans


def test_kernels_of_the_forward_and_of_the_backward(loaded):
    asked = {"causal": True, "softcap": 3.0, "dtype": "float16", "device": "cpu"}
    anyflash.warm_up(X, X, X, **asked)
    anyflash.warm_up(X, X, X, **asked, backward=True)
    forward = anyflash.supports(X, X, X, **asked).plan
    backward = anyflash.supports(X, X, X, **asked, backward=True).plan
    expected = [forward, forward, backward]
    assert [bytes(plan) for plan in loaded] == [bytes(plan) for plan in expected]
    assert [plan.op for plan in loaded] == [_library.FORWARD] * 2 + [_library.BACKWARD]


def test_tensors_say_dtype_and_device(loaded):
    q = np.zeros(X, np.float32)
    anyflash.warm_up(q, q, q)
    assert bytes(loaded[0]) == bytes(anyflash.supports(q, q, q).plan)


def test_the_cpu_has_nothing_to_load():
    assert anyflash.warm_up(X, X, X, dtype="float32", device="cpu", backward=True) is None


def test_what_is_refused(loaded):
    q = np.zeros(X, np.float16)
    for tensors in ((X, X, X), (q, q, q)):
        with pytest.raises(ValueError, match="device is 'sm_86'; kernels are loaded by a device"):
            anyflash.warm_up(*tensors, dtype="float16", device="sm_86")
    with pytest.raises(TypeError, match="q is a shape; dtype= and device= must be given"):
        anyflash.warm_up(X, X, X)
    with pytest.raises(NotImplementedError, match="asked: forward of float64"):
        anyflash.warm_up(X, X, X, dtype="float64", device="cpu", backward=True)
    with pytest.raises(ValueError, match="k"):
        anyflash.warm_up(X, (1, 64, 3, 64), X, dtype="float16", device="cpu")
    assert not loaded
