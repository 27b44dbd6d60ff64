"""The support table follows the table of kernels and the record."""

from __future__ import annotations

import pytest
from generate_docs import page
from variants import read_rows

TABLE = """// KERNEL( forward, sm99, plain, "99", bf16, 1, 1, 1, 1 )
KERNEL( forward, sm80, plain, "80 86", fp16|bf16, 64, 64, 128, 64, warps  =  4 )
KERNEL( forward, sm80, general, "80", fp16|bf16, 192,
        128, 128, 64, warps = 4 )  // two lines
KERNEL( forward, sm80, plain, "120", bf16, 64, 64, 128, 64, warps = 4 )
"""


@pytest.fixture()
def rows(tmp_path):
    (tmp_path / "variants.def").write_text(TABLE)
    return read_rows(tmp_path)


def line_of(text, image):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {image}")]
    return line


def test_rows_are_read(rows):
    assert [(row.variant, row.archs, row.dtypes, row.d, row.dv) for row in rows] == [
        ("plain", ("80", "86"), ("fp16", "bf16"), 64, 64),
        ("general", ("80",), ("fp16", "bf16"), 192, 128),
        ("plain", ("120",), ("bf16",), 64, 64),
    ]
    assert rows[0].text == 'forward,sm80,plain,"80 86",fp16|bf16,64,64,128,64,warps=4'


def test_a_line_for_each_image(rows):
    text = page(rows, {"sections": []})
    assert "64, 192/128 | fp16, bf16 | plain, general | built, not run" in line_of(text, "`sm_80`")
    assert "| 64 | bf16 | plain | built, not run" in line_of(text, "`sm_120`")
    images = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `sm_")]
    assert images == ["sm_80", "sm_86", "sm_120"]


def test_what_was_run_says_so(rows):
    section = {"op": "fwd", "family": "sm80", "gpu": "H100", "date": "2026-01-01"}
    section["tests"] = {"passed": 7, "failed": 0, "skipped": 1}
    images = ("compute_80 PTX", "rows of sm_86", "sm_120")
    text = page(rows, {"sections": [{**section, "image": image} for image in images]})
    assert "as PTX: H100, 7 tests, 2026-01-01" in line_of(text, "`sm_80`")
    assert "compiled for another GPU: H100" in line_of(text, "`sm_86`")
    assert "natively: H100" in line_of(text, "`sm_120`")
    assert "compiled by the driver: H100" in line_of(text, "PTX of")


def test_failures_are_not_hidden(rows):
    section = {"op": "fwd", "family": "sm80", "image": "sm_80", "gpu": "A100", "date": "x"}
    section["tests"] = {"passed": 7, "failed": 2, "skipped": 0}
    assert "7 tests, 2 failed" in page(rows, {"sections": [section]})
