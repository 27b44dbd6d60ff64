"""Random calls: a right result, or a clean refusal that has written nothing; never a crash."""

from __future__ import annotations

import anyflash
import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from anyflash import _backend, _call
from hypothesis import given, settings
from hypothesis import strategies as st

REFUSALS = (ValueError, TypeError, NotImplementedError)
SLOW = settings(max_examples=150, deadline=None, derandomize=True)


def both_ways():
    ways = [_call]
    try:
        import anyflash._fast  # noqa: F401
    except ImportError:
        return ways
    return [*ways, _backend.choose()]


def through(way, function, *arguments, **options):
    """(result, None) or (None, (type, message)) of a call through one of the ways."""
    before, _backend.forward = _backend.forward, way.forward
    try:
        return function(*arguments, **options), None
    except REFUSALS as error:
        return None, (type(error), str(error))
    finally:
        _backend.forward = before


def values(shape, dtype, seed):
    random = np.random.default_rng(seed)
    return random.standard_normal(shape).astype(dtype)


small = st.integers(0, 20)
heads = st.integers(0, 4)
side = st.one_of(st.none(), st.integers(0, 25))


@st.composite
def sound_problems(draw):
    """Problems that make sense, of any shape and option."""
    heads_k = draw(st.integers(1, 3))
    batch, n, m = draw(st.integers(0, 3)), draw(small), draw(small)
    head_count = heads_k * draw(st.integers(0, 3))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(["float32", "float16"]))
    options = {
        "causal": draw(st.booleans()),
        "window": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([0.0, 0.5, 10.0, 50.0])),
        "scale": draw(st.one_of(st.none(), st.floats(-2, 2, width=32))),
        "deterministic": draw(st.sampled_from([None, True, False])),
    }
    if draw(st.booleans()):
        shape = (head_count,) if draw(st.booleans()) else (batch, head_count)
        options["alibi_slopes"] = values(shape, "float32", 9)
    shapes = (batch, n, head_count, d), (batch, m, heads_k, d), (batch, m, heads_k, dv)
    tensors = [values(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    if draw(st.booleans()):  # [batch, heads, seqlen, d] in memory
        tensors = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in tensors]
    if draw(st.booleans()):  # backwards in memory
        tensors[1] = tensors[1][:, ::-1]
    return tensors, options


@SLOW
@given(sound_problems())
def test_sound_problems_are_right(problem):
    tensors, options = problem
    doubles = [x.astype(np.float64) for x in tensors]
    expected, expected_lse = anyflash.reference(*doubles, **options, return_lse=True)
    tolerance = 2e-2 if tensors[0].dtype == np.float16 else 2e-4
    results = []
    for way in both_ways():
        out = np.full(expected.shape, np.nan, tensors[0].dtype)
        result, refusal = through(
            way, anyflash.attention, *tensors, **options, out=out, return_lse=True
        )
        assert refusal is None, refusal
        assert result[0] is out
        np.testing.assert_allclose(out.astype(np.float64), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(result[1], expected_lse, rtol=1e-3, atol=tolerance)
        results.append((out.tobytes(), result[1].tobytes()))
    assert all(result == results[0] for result in results)


odd_numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([np.float32(2), np.int8(-3), 2**63, -(2**63), 1e-45, 10**30]),
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 257]), max_size=5)
dtypes = st.sampled_from(["float32", "float16", "float64", "int32", "int64", "bool", "complex64"])
arrays = st.builds(lambda shape, dtype: np.zeros(shape, dtype), shapes, dtypes)
good = st.sampled_from(
    [
        np.zeros((2, 3, 4, 8), np.float32),
        np.zeros((2, 3, 2, 8), np.float32),
        np.zeros(4, np.float32),
    ]
)
tensors = st.one_of(good, good, good, arrays, st.none(), st.text(max_size=2))


@SLOW
@given(
    st.tuples(tensors, tensors, tensors),
    st.fixed_dictionaries(
        {},
        optional={
            "causal": odd_numbers,
            "window": st.one_of(odd_numbers, st.tuples(odd_numbers, odd_numbers)),
            "scale": odd_numbers,
            "softcap": odd_numbers,
            "alibi_slopes": tensors,
            "deterministic": odd_numbers,
            "return_lse": odd_numbers,
        },
    ),
    st.booleans(),
)
def test_any_arguments_end_cleanly(arrays, options, with_out):
    answers = []
    for way in both_ways():
        out = np.full((2, 3, 4, 8), 7, np.float32)
        if with_out:
            options["out"] = out
        result, refusal = through(way, anyflash.attention, *arrays, **options)
        assert (result is None) == (refusal is not None)
        if refusal is not None:
            assert (out == 7).all()
        answers.append(refusal)
    assert all(answer == answers[0] for answer in answers)


int32 = st.one_of(st.integers(-3, 14), st.sampled_from([-(2**31), 2**31 - 1]))


@SLOW
@given(
    st.lists(int32, min_size=1, max_size=5),
    st.lists(int32, min_size=1, max_size=5),
    st.integers(-2, 14),
    st.integers(-2, 14),
    st.one_of(st.none(), st.lists(int32, max_size=4)),
    st.one_of(st.none(), st.lists(int32, max_size=4)),
    st.booleans(),
)
def test_any_lengths_end_cleanly(cu_q, cu_k, max_q, max_k, used_q, used_k, causal):
    q, k, v = (values((12, 2, 8), "float32", seed) for seed in range(3))
    lengths = [np.array(x, np.int32) for x in (cu_q, cu_k)]
    used = {"seqused_q": used_q, "seqused_k": used_k}
    used = {name: np.array(x, np.int32) for name, x in used.items() if x is not None}
    arguments = (q, k, v, *lengths, max_q, max_k)
    for way in both_ways():
        out = np.full((12, 2, 8), np.nan, np.float32)
        result, refusal = through(
            way, anyflash.attention_varlen, *arguments, **used, causal=causal, out=out
        )
        if refusal is not None:
            assert np.isnan(out).all()
            continue
        expected = np.full_like(out, np.nan)
        anyflash.reference(*arguments, **used, causal=causal, out=expected)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def sorted_lengths(draw_list):
    return np.cumsum([0, *draw_list]).astype(np.int32)


@SLOW
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    st.booleans(),
    side,
)
def test_sound_lengths_are_right(pairs, causal, left):
    cu_q = sorted_lengths([n for n, _ in pairs])
    cu_k = sorted_lengths([m for _, m in pairs])
    q, k, v = (
        values((int(total) + 2, 2, 8), "float32", 4) for total in (cu_q[-1], cu_k[-1], cu_k[-1])
    )
    arguments = (q, k, v, cu_q, cu_k, 9, 9)
    options = {"causal": causal, "window": (left, None), "return_lse": True}
    for way in both_ways():
        out = np.full(q.shape, np.nan, np.float32)
        (o, lse), refusal = through(way, anyflash.attention_varlen, *arguments, **options, out=out)
        assert refusal is None
        expected = np.full(q.shape, np.nan, np.float32)
        _, expected_lse = anyflash.reference(*arguments, **options, out=expected)
        np.testing.assert_allclose(o, expected, rtol=1e-4, atol=1e-4)
        used = slice(0, int(cu_q[-1]))
        np.testing.assert_allclose(lse[:, used], expected_lse[:, used], rtol=1e-4, atol=1e-4)
