"""The GPU record: hashes follow the sources they should, runs merge, staleness is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_record
import pytest
from gpu_record import check_line, merge, operations, source_hash, summary

FILES = {
    "variants.def": "// a table\n"
    'KERNEL( forward, sm80, plain, "80 90", fp16|bf16, 64, 64, 128, 64, warps = 4 )\n'
    'KERNEL( forward, sm90, plain, "90a", bf16, 64, 64, 128, 64, warps = 8 )\n',
    "src/cuda/params.h": "struct P {};\n",
    "src/cuda/ptx/mma.h": '#include "cuda/params.h"\nint mma;\n',
    "src/cuda/ptx/wgmma.h": "int wgmma;\n",
    "src/cuda/sm80/forward.cuh": '#include "cuda/ptx/mma.h"\nint forward80;\n',
    "src/cuda/sm90/forward.cuh": '#include "cuda/ptx/wgmma.h"\nint forward90;\n',
}


@pytest.fixture()
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def replace(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def section(root, image="sm_90", **more):
    return {
        "op": "fwd",
        "family": "sm80",
        "image": image,
        "hash": source_hash("fwd", "sm80", root),
        "date": "2026-01-01",
        "gpu": "H100",
        "driver": "580",
        "tests": {"passed": 3, "failed": 0, "skipped": 1},
        **more,
    }


def cell(seqlen=512, ours=2.0, **more):
    return {
        "d": 64,
        "dv": 64,
        "heads": 32,
        "heads_k": 32,
        "causal": False,
        "seqlen": seqlen,
        "batch": 32,
        "dtype": "bf16",
        "layout": "dense",
        "options": {},
        "deterministic": True,
        "ours": ours,
        "peers": {"fa2": 1.0},
        "unit": "TFLOP/s",
        **more,
    }


def both(root):
    return source_hash("fwd", "sm80", root), source_hash("fwd", "sm90", root)


def test_operations_come_from_the_table(root):
    assert operations(root) == [("fwd", "sm80"), ("fwd", "sm90")]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("src/cuda/ptx/mma.h", "int mma;", "int mma;  // fast"),
        ("src/cuda/ptx/mma.h", "int mma;", "\n  int mma;\n\n/* two\nlines */"),
        ("variants.def", "warps = 4 )", "warps = 4 )  // measured"),
        ("variants.def", "64, 64, 128, 64, warps = 4", "64,64,  128,  64, warps=4"),
    ],
)
def test_hash_ignores_comments_and_layout(root, name, old, new):
    before = both(root)
    replace(root, name, old, new)
    assert both(root) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("src/cuda/params.h", "P {}", "P { int a; }", (True, False)),
        ("src/cuda/ptx/mma.h", "int mma", "int mma2", (True, False)),
        ("src/cuda/sm80/forward.cuh", "forward80", "other", (True, False)),
        ("src/cuda/sm90/forward.cuh", "forward90", "other", (False, True)),
        ("variants.def", "warps = 4", "warps = 8", (True, False)),
        ("variants.def", "warps = 8", "warps = 12", (False, True)),
    ],
)
def test_hash_follows_the_sources_of_its_own_family(root, name, old, new, changes):
    before = both(root)
    replace(root, name, old, new)
    assert tuple(a != b for a, b in zip(before, both(root))) == changes


def test_hash_of_the_real_tree_covers_the_kernel_and_its_headers():
    names = {
        path.relative_to(gpu_record.ROOT).as_posix()
        for path in gpu_record.closure(
            gpu_record.ROOT / "src", gpu_record.ROOT / "src/cuda/sm80/forward.cuh"
        )
    }
    if not (gpu_record.ROOT / "src/cuda/sm80/forward.cuh").is_file():
        pytest.skip("the kernel is not there yet")
    assert {"src/cuda/params.h", "src/cuda/attn/key_blocks.h"} <= names
    assert any(name.startswith("src/cuda/ptx/") for name in names)


def test_merge_keeps_what_the_new_run_did_not_measure(root):
    old = section(root, sanitizers={"memcheck": {"cases": 9, "errors": 0}}, bench=[cell(512)])
    new = section(root, date="2026-01-02", bench=[cell(512, 3.0), cell(1024)])
    new["sanitizers"] = {"racecheck": {"cases": 9, "errors": 0}}
    del new["tests"]
    (merged,) = merge({"sections": [old]}, [new])["sections"]
    assert merged["date"] == "2026-01-02"
    assert merged["tests"]["passed"] == 3
    assert set(merged["sanitizers"]) == {"memcheck", "racecheck"}
    assert [(c["seqlen"], c["ours"]) for c in merged["bench"]] == [(512, 3.0), (1024, 2.0)]


def test_tests_of_torch_are_kept_and_their_failures_noticed(root):
    counts = {"passed": 9, "failed": 0, "skipped": 1}
    (merged,) = merge({"sections": [section(root, torch_tests=counts)]}, [section(root)])[
        "sections"
    ]
    assert merged["torch_tests"] == counts
    assert gpu_record.why_stale(merged, root) is None
    only = section(root, tests={}, torch_tests={**counts, "failed": 2})
    (merged,) = merge({"sections": [merged]}, [only])["sections"]
    assert merged["tests"]["passed"] == 3
    assert gpu_record.why_stale(merged, root) == "2 tests failed"


def test_merge_replaces_a_section_of_other_sources(root):
    old = section(root, hash="other", bench=[cell()], sanitizers={"memcheck": {}})
    (merged,) = merge({"sections": [old]}, [section(root)])["sections"]
    assert "bench" not in merged
    assert "sanitizers" not in merged


def test_merge_leaves_other_sections_alone(root):
    record = {"sections": [section(root), section(root, "compute_80 PTX")]}
    merged = merge(record, [section(root, date="2026-02-02")])
    assert [s["date"] for s in merged["sections"]] == ["2026-01-01", "2026-02-02"]


def test_merge_ignores_a_run_that_measured_nothing(root):
    record = {"sections": [section(root)]}
    empty = section(root, date="2026-03-03", sanitizers={}, bench=[])
    empty["tests"] = {"passed": 0, "failed": 0, "skipped": 0}
    assert merge(record, [empty]) == record


def complete(root):
    replace(root, "variants.def", "KERNEL( forward, sm90", "// KERNEL( forward, sm90")
    return {"sections": [section(root), section(root, "compute_80 PTX")]}


def test_fresh_record(root):
    line, fresh = check_line(complete(root), root)
    assert fresh
    assert line == "GPU record: 2 sections, none stale"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.pop(), "fwd sm80 compute_80 PTX (not recorded)"),
        (lambda s: s[0].update(hash="x"), "fwd sm80 sm_90 (sources changed)"),
        (lambda s: s[0].pop("tests"), "fwd sm80 sm_90 (not tested)"),
        (lambda s: s[0]["tests"].update(passed=0), "fwd sm80 sm_90 (not tested)"),
        (lambda s: s[0]["tests"].update(failed=2), "fwd sm80 sm_90 (2 tests failed)"),
        (
            lambda s: s[0].update(sanitizers={"memcheck": {"errors": 2, "explained": 1}}),
            "(memcheck: 2 errors)",
        ),
        (lambda s: s[0].update(family="sm99"), "fwd sm99 sm_90 (no such kernels)"),
    ],
)
def test_stale_record(root, spoil, complaint):
    record = complete(root)
    spoil(record["sections"])
    line, fresh = check_line(record, root)
    assert not fresh
    assert complaint in line
    assert "\n" not in line


def test_explained_sanitizer_reports_are_fine(root):
    record = complete(root)
    record["sections"][0]["sanitizers"] = {"racecheck": {"errors": 1, "explained": 1}}
    assert check_line(record, root)[1]


def test_missing_record_is_stale(tmp_path):
    assert not check_line(gpu_record.read(tmp_path / "none.json"), gpu_record.ROOT)[1]


def test_write_and_read_are_inverse_and_stable(root, tmp_path):
    record = {"sections": [section(root, bench=[cell(512), cell(1024)])]}
    path = tmp_path / "record.json"
    gpu_record.write(record, path)
    assert gpu_record.read(path) == record
    assert json.loads(path.read_text()) == record
    assert sum('"seqlen": 512' in line for line in path.read_text().splitlines()) == 1
    text = path.read_text()
    gpu_record.write(gpu_record.read(path), path)
    assert path.read_text() == text


def test_summary_names_the_worst_cell(root):
    cells = [cell(512, 2.0), cell(1024, 0.5), cell(512, 3.0, causal=True)]
    text = "\n".join(summary(section(root, bench=cells)))
    assert "3 passed, 0 failed, 1 skipped" in text
    assert "512/1k: 2 (2.00x fa2)  0.5 (0.50x fa2)" in text
    assert "over fa2: geomean 1.442x, worst 0.500x of 3 cells; d64 full 1.000x, d64 causal" in text


def test_summary_of_every_peer_and_of_other_problems(root):
    cells = [
        cell(512, 2.0, peers={"fa2": 1.0, "cudnn": 4.0, "fa4": 2.0}),
        cell(512, 2.0, peers={"plain": 4.0}),
        cell(512, 8.0, part="extra", dv=32, heads_k=8, peers={"cudnn": 1.0, "dense": 16.0}),
    ]
    text = "\n".join(summary(section(root, bench=cells)))
    assert "2 (0.50x cudnn) (1.00x fa4) (2.00x fa2)" in text
    assert "d64 full bf16 deterministic" in text
    assert "d64/32 full bf16 extra GQA 32/8" in text
    assert "8 (8.00x cudnn) (0.50x dense)" in text
    for line in ("over cudnn: geomean 0.500x", "over fa4: geomean 1.000x"):
        assert line in text


def test_summary_states_the_price_of_an_option(root):
    cells = [cell(ours=1.0, options={"softcap": 30.0}, peers={"plain": 1.05})]
    text = "\n".join(summary(section(root, bench=cells)))
    assert "softcap=30.0" in text
    assert "price +5.0%" in text
    assert "geomean" not in text


def test_summary_of_times_counts_smaller_as_better(root):
    text = "\n".join(summary(section(root, bench=[cell(ours=2.0, unit="us")])))
    assert "(0.50x fa2)" in text
