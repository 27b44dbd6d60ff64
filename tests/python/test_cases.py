"""The case list on NumPy arrays, by the rule; and both ways into the library agree to the bit."""

from __future__ import annotations

import anyflash
import numpy as np
import pytest
from accuracy import Result, worst_violation
from anyflash import _backend, _call
from case_list import PACKED_TAIL, load_cases, make_inputs, storage_of

CASES = {case.name: case for case in load_cases()}
DTYPES = ["float32", "float16", "bfloat16"]


def numpy_dtype(name):
    if name != "bfloat16":
        return np.dtype(name)
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 through ml_dtypes")
    return np.dtype(ml_dtypes.bfloat16)


def strided(shape, layout, dtype):
    """NaN in this layout, and the storage around it."""
    elements, offset, strides = storage_of(shape, layout)
    storage = np.full(elements, np.nan, dtype)
    byte_strides = [stride * dtype.itemsize for stride in strides]
    return storage, np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides)


def placed(values, layout, dtype):
    _, view = strided(values.shape, layout, dtype)
    if layout == "broadcast":
        view[:1] = values[:1]
    else:
        view[...] = values
    return view


def prepare(case, dtype_name):
    """The arguments of the call, its inputs, and the poisoned output with its storage."""
    dtype = numpy_dtype(dtype_name)
    inputs = make_inputs(case, dtype_name)
    q_layout = "contiguous" if case.layout == "broadcast" else case.layout
    arguments = {
        "q": placed(inputs.q, q_layout, dtype),
        "k": placed(inputs.k, case.layout, dtype),
        "v": placed(inputs.v, case.layout, dtype),
        "causal": case.causal,
        "window": case.window,
        "scale": case.scale,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
    }
    if case.packed is not None:
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
            arguments[name] = getattr(inputs, name)
        arguments.update(max_seqlen_q=case.q, max_seqlen_k=case.k)
    storage, out = strided(case.shape_o, q_layout, dtype)
    return arguments, inputs, storage, out


def run(case, arguments, out):
    function = anyflash.attention if case.packed is None else anyflash.attention_varlen
    o, lse = function(**arguments, out=out, return_lse=True)
    assert o is out
    if case.packed is not None:
        lse[:, -PACKED_TAIL:] = np.nan  # allocated by the call, not written by it
    return Result(o, lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype):
    case = CASES[name]
    arguments, inputs, storage, out = prepare(case, dtype)
    result = run(case, arguments, out)
    widened = Result(np.asarray(result.o, np.float32), result.lse)
    assert worst_violation(widened, inputs, dtype) is None
    out[...] = np.nan
    assert np.isnan(storage.astype(np.float32)).all(), "memory around the output was written"


@pytest.mark.parametrize("name", CASES)
def test_both_ways_agree_to_the_bit(name, monkeypatch):
    pytest.importorskip("anyflash._fast", reason="the extension _fast is not built")
    case = CASES[name]
    results = []
    for way in (_call, _backend.choose()):
        monkeypatch.setattr(_backend, "forward", way.forward)
        arguments, _, storage, out = prepare(case, "float16")
        results.append((run(case, arguments, out), storage))
    (first, first_storage), (second, second_storage) = results
    assert first.lse.tobytes() == second.lse.tobytes()
    assert first_storage.tobytes() == second_storage.tobytes()


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    """The library's own oracle, on the same inputs in double."""
    from accuracy import formula

    case = CASES[name]
    arguments, inputs, _, _ = prepare(case, "float32")
    for tensor in ("q", "k", "v"):
        arguments[tensor] = arguments[tensor].astype(np.float64, order="C")
    o, lse = anyflash.reference(**arguments, return_lse=True)
    expected = formula(inputs)
    inside = ~np.isnan(expected.o)
    np.testing.assert_allclose(o[inside], expected.o[inside], rtol=2e-6, atol=1e-6)
    inside = ~np.isnan(expected.lse)
    np.testing.assert_allclose(lse[inside], expected.lse[inside], rtol=2e-6, atol=2e-6)


def test_order_of_keys_does_not_matter(binding):
    case = CASES["gqa 3"]
    arguments, _, _, _ = prepare(case, "float32")
    arguments["causal"] = False
    o = anyflash.attention(**arguments)
    order = np.random.default_rng(0).permutation(case.k)
    arguments["k"], arguments["v"] = arguments["k"][:, order], arguments["v"][:, order]
    np.testing.assert_allclose(anyflash.attention(**arguments), o, rtol=1e-4, atol=1e-5)


def test_keys_split_in_two_merge_by_their_lse(binding):
    arguments, _, _, _ = prepare(CASES["mqa"], "float32")
    k, v = arguments.pop("k"), arguments.pop("v")
    whole, whole_lse = anyflash.attention(**arguments, k=k, v=v, return_lse=True)
    parts = [
        anyflash.attention(**arguments, k=k[:, part], v=v[:, part], return_lse=True)
        for part in (slice(0, 61), slice(61, None))
    ]
    lse = np.stack([part_lse for _, part_lse in parts])
    merged_lse = np.logaddexp(*lse)
    weights = np.exp(lse - merged_lse).transpose(0, 1, 3, 2)[..., None]
    merged = sum(weight * o for weight, (o, _) in zip(weights, parts))
    np.testing.assert_allclose(merged_lse, whole_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (5, 3), "softcap": 9.0}])
def test_batch_and_packed_agree_bit_for_bit(binding, options):
    random = np.random.default_rng(1)
    batch, n, heads, d = 3, 70, 4, 40
    q = random.standard_normal((batch, n, heads, d), np.float32)
    k, v = (random.standard_normal((batch, n, 2, d), np.float32) for _ in range(2))
    lengths = np.arange(0, (batch + 1) * n, n, dtype=np.int32)
    dense, dense_lse = anyflash.attention(q, k, v, return_lse=True, **options)
    packed, packed_lse = anyflash.attention_varlen(
        *(x.reshape(batch * n, -1, d) for x in (q, k, v)),
        lengths,
        lengths,
        n,
        n,
        return_lse=True,
        **options,
    )
    assert packed.reshape(dense.shape).tobytes() == dense.tobytes()
    same = packed_lse.reshape(heads, batch, n).transpose(1, 0, 2)
    assert np.ascontiguousarray(same).tobytes() == dense_lse.tobytes()
