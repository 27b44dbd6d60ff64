"""What of tools/gpu_check.py runs without a GPU: reading outputs, time limits, importing."""

from __future__ import annotations

import os
import sys
import time

import gpu_check
import gpu_record
import pytest
from gpu_check import (
    Clock,
    count_cases,
    count_errors,
    count_tests,
    image_of,
    parse,
    read_cells,
    run,
)


def test_images_and_how_to_ask_for_them():
    assert image_of("sm_90").environment == {"ANYFLASH_IMAGE": "sm_90"}
    assert image_of("compute_80").name == "compute_80 PTX"
    assert image_of("rows_86").environment == {"ANYFLASH_PLAN_FOR": "86"}
    with pytest.raises(SystemExit, match="none of"):
        image_of("h100")


def test_expected_images_are_images():
    for images in gpu_record.EXPECTED_IMAGES.values():
        for name in images:
            assert image_of(name.replace(" PTX", "")).name == name


def test_outcomes_are_counted():
    text = """
tests/device/test_forward.py::test_case[a b-float16] PASSED              [  1%]
tests/device/test_forward.py::test_case[FAILED of name-float16] PASSED   [  1%]
tests/device/test_forward.py::test_case[plain-bfloat16] FAILED           [  2%]
tests/device/test_gpu.py::test_x SKIPPED (needs 24 GiB)                  [  3%]
tests/device/test_gpu.py::test_y ERROR                                   [  4%]
FAILED tests/device/test_forward.py::test_case[plain-bfloat16] - assert 'O[0] ...
"""
    assert count_tests(text) == {"passed": 2, "failed": 2, "skipped": 1}


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n", 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3),
        ("========= RACECHECK SUMMARY: 30 hazards displayed (417 errors, 0 warnings)\n", 417),
        ("Device not supported\n", None),
    ],
)
def test_sanitizer_summaries(text, errors):
    assert count_errors(text) == errors


def test_cases_of_the_sanitized_program():
    assert count_cases("========= X\ncases: 42, rows reached: 4 of 4\n") == 42
    assert count_cases("Traceback\n") is None


def test_cells_survive_a_cut_off_line(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"d": 64}\n{"d": 128}\n{"d": 2')
    assert read_cells(path) == [{"d": 64}, {"d": 128}]
    assert read_cells(tmp_path / "none.jsonl") == []


def test_run_returns_output_and_status(tmp_path):
    log = tmp_path / "logs" / "a.txt"
    output = run([sys.executable, "-c", "print('a'); exit(3)"], dict(os.environ), log, 60)
    assert (output.text.strip(), output.status) == ("a", 3)
    assert log.read_text() == "a\n"


def test_run_ends_children_when_the_time_is_over(tmp_path):
    script = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '100'])"
    begin = time.monotonic()
    output = run([sys.executable, "-c", script], dict(os.environ), tmp_path / "log.txt", 3)
    assert output.status is None
    assert "begun" in output.text
    assert time.monotonic() - begin < 50


def test_clock():
    clock = Clock(1000)
    assert clock.left(5) == 5
    assert 990 < clock.left() <= 1000
    assert Clock(0).out()


def test_arguments():
    arguments = parse(["--wheel", "a.whl", "--sanitizers", "all"])
    assert arguments.sanitizers == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert ("bwd", "sm80", "compute_80") in arguments.sections
    assert ("fwd", "sm90", "sm_90a") in arguments.sections
    named = parse(["--wheel", "a.whl", "--sections", "fwd/sm80/rows_86,bwd/sm90/sm_90a"])
    assert named.sections == [("fwd", "sm80", "rows_86"), ("bwd", "sm90", "sm_90a")]
    for wrong in (
        [],
        ["--wheel", "a.whl", "--sanitizers", "lint"],
        ["--wheel", "a.whl", "--sections", "fwd/sm80"],
        ["--wheel", "a.whl", "--sections", "fwd/sm10/sm_90"],
        ["--wheel", "a.whl", "--sections", "fwd/sm80/h100"],
    ):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_the_tests_of_torch_run_on_the_gpu(tmp_path, monkeypatch):
    asked = []

    def fake_run(command, environment, log, seconds):
        asked.append((command, environment))
        text = "tests/python/test_sdpa.py::test_x PASSED [50%]\ntests/a.py::test_y FAILED [100%]\n"
        return gpu_check.Output(text + "FAILED tests/a.py::test_y - assert 0\n", 1)

    monkeypatch.setattr(gpu_check, "run", fake_run)
    sections = "fwd/sm80/sm_90,bwd/sm80/sm_90"
    words = ["--wheel", "a.whl", "--torch", "--sections", sections, "--out", str(tmp_path)]
    check = gpu_check.Check(parse(words), tmp_path)
    check.check()
    ((command, environment),) = asked
    files = [word for word in command if word.endswith(".py")]
    assert "tests/python/test_sdpa.py" in files and "tests/python/test_torch_training.py" in files
    assert all((gpu_record.ROOT / name).is_file() for name in files)
    assert environment["ANYFLASH_TEST_DEVICE"] == "cuda"
    assert environment["ANYFLASH_IMAGE"] == "sm_90"
    both = gpu_record.read(tmp_path / "record.json")["sections"]
    assert [section["op"] for section in both] == ["bwd", "fwd"]
    for section in both:
        assert section["torch_tests"] == {"passed": 1, "failed": 1, "skipped": 0}
        assert gpu_record.failures(section) == 1
        assert "  torch tests: 1 passed, 1 failed, 0 skipped" in gpu_record.summary(section)
    assert check.remarks == ["FAILED tests/a.py::test_y - assert 0"]


def test_benchmarks_of_a_section():
    newest, older = ({"op": "bwd", "family": family} for family in ("sm90", "sm80"))
    parts = gpu_check.bench_command(newest, every=True)[1:]
    script = "bench/gpu_backward.py"
    grid = ["--grid", "--options", "--deterministic"]
    assert parts == [script, *grid, "--extra", "--cycles"]
    assert gpu_check.bench_command(newest, every=False)[1:] == [script, "--grid"]
    without_fa4 = ["--peers", "cudnn,fa2"]
    assert gpu_check.bench_command(older, every=True)[1:] == [script, *grid, *without_fa4]
    for command, _ in ((script, newest), ("bench/gpu_forward.py", older)):
        assert (gpu_record.ROOT / command).is_file()


def section(hash_):
    return {
        "op": "fwd",
        "family": "sm80",
        "image": "sm_90",
        "hash": hash_,
        "date": "2026-01-01",
        "tests": {"passed": 1, "failed": 0, "skipped": 0},
    }


def test_import_merges_a_run_of_these_sources(tmp_path):
    hash_ = gpu_record.source_hash("fwd", "sm80")
    gpu_record.write({"sections": [section(hash_)]}, tmp_path / "record.json")
    target = tmp_path / "into.json"
    gpu_check.import_record(tmp_path, target)
    assert (
        gpu_record.read(target)["sections"] == gpu_record.read(tmp_path / "record.json")["sections"]
    )


def test_import_refuses_a_run_of_other_sources(tmp_path):
    gpu_record.write({"sections": [section("other")]}, tmp_path / "record.json")
    with pytest.raises(SystemExit, match="other sources"):
        gpu_check.import_record(tmp_path, tmp_path / "into.json")
    assert not (tmp_path / "into.json").exists()


def test_steps_run_side_by_side_and_benchmarks_alone(tmp_path, monkeypatch):
    running, most, alone = set(), [], []

    def fake_run(command, environment, log, seconds):
        running.add(log)
        most.append(len(running))
        if "bench" in log.name:
            alone.append(len(running) == 1)
        time.sleep(0.2)
        running.discard(log)
        return gpu_check.Output("ERROR SUMMARY: 0 errors\ncases: 3, rows reached: 1 of 1\n", 0)

    monkeypatch.setattr(gpu_check, "run", fake_run)
    words = ["--wheel", "a.whl", "--sanitizers", "all", "--bench", "grid", "--out", str(tmp_path)]
    check = gpu_check.Check(parse([*words, "--jobs", "4"]), tmp_path)
    check.check()
    assert max(most) == 4
    assert alone == [True] * len(check.sections)
    for section in gpu_record.read(tmp_path / "record.json")["sections"]:
        assert {tool: result["errors"] for tool, result in section["sanitizers"].items()} == {
            "memcheck": 0,
            "racecheck": 0,
            "initcheck": 0,
            "synccheck": 0,
        }


@pytest.mark.parametrize(
    ("again", "explained"),
    [
        ("0 hazards displayed (0 errors, 0 warnings)", 41),
        ("1 hazard displayed (1 error, 0 warnings)", 0),
    ],
)
def test_what_racecheck_reports_is_explained_when_every_thread_arrives(
    tmp_path, monkeypatch, again, explained
):
    def fake_run(command, environment, log, seconds):
        every = "EVERY_THREAD_ARRIVES" in environment.get("ANYFLASH_COMPILE_OPTIONS", "")
        summary = again if every else "30 hazards displayed (40 errors, 1 warning)"
        text = f"cases: 3, rows reached: 1 of 1\n========= RACECHECK SUMMARY: {summary}\n"
        return gpu_check.Output(text, 0)

    monkeypatch.setattr(gpu_check, "run", fake_run)
    words = ["--wheel", "a.whl", "--sanitizers", "racecheck", "--sections", "fwd/sm90/sm_90a"]
    check = gpu_check.Check(parse([*words, "--out", str(tmp_path)]), tmp_path)
    check.check()
    (section,) = gpu_record.read(tmp_path / "record.json")["sections"]
    assert section["sanitizers"]["racecheck"] == {"cases": 3, "errors": 41, "explained": explained}
