"""What a person types: commands, exit codes, messages, the doctor's judgement."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types

import anyflash
import numpy as np
import pytest
from anyflash.cli import console, doctor, facts, main, rows, self_test

GPU = {
    "index": 0,
    "name": "NVIDIA H100",
    "compute_capability": 90,
    "memory_bytes": 80 * 2**30,
    "images": [{"family": "sm80", "image": "sm_90", "rows": 24}],
}
ARCHIVE = {"image": "sm_90", "path": "sm_90.bin", "kernels": 24, "fresh": 24, "rows": 24}
COMPILER = {"path": "/usr/lib/libnvrtc.so.12", "version": 12090}
LEDGER = {
    "compiler": "NVRTC 12.9",
    "kernels": [
        {
            "row": "forward_sm80_plain_bf16_d64_dv64_128x64",
            "arch": "sm_90",
            "registers": 168,
            "spill_bytes": 0,
            "stack_bytes": 0,
            "shared_bytes": 40960,
            "image_bytes": 2**20,
            "seconds": 2.25,
            "peak_mb": 90.5,
        },
        {"row": "forward_sm80_general_bf16_d64_dv64_128x64", "arch": "compute_80"},
    ],
}


@pytest.fixture
def typed(capsys):
    """Types a command: (exit code, what it printed, what it complained)."""

    def run(*arguments):
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    monkeypatch.setattr(rows, "ledger_path", lambda: path)
    return path


# Commands and exit codes


def test_help_lists_the_commands(typed):
    code, out, _ = typed()
    assert code == 0
    assert all(command in out for command in ("doctor", "rows", "bench", "demo", "--cmake-dir"))
    assert typed("--help")[0] == 0


def test_version(typed):
    assert typed("--version") == (0, f"anyflash {anyflash.__version__}\n", "")


@pytest.mark.parametrize("words", [["rwos"], ["doctor", "--jsno"], ["bench", "--d", "x"]])
def test_a_wrong_word_is_a_usage_error(typed, words):
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert "usage:" in err and "Traceback" not in err


def test_runs_as_a_module_and_loads_no_framework():
    program = (
        "import runpy, sys; sys.argv = ['anyflash', '--version']\n"
        "try: runpy.run_module('anyflash', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'numpy', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_cmake_dir_holds_the_package(typed, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "package_folder", lambda: tmp_path)
    code, out, err = typed("--cmake-dir")
    assert (code, out) == (1, "") and "pip install ." in err
    folder = tmp_path / "lib" / "cmake" / "anyflash"
    folder.mkdir(parents=True)
    (folder / "anyflash-config.cmake").touch()
    assert typed("--cmake-dir") == (0, f"{folder}\n", "")


def test_interrupted(typed, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "run", interrupt)
    code, _, err = typed("rows")
    assert code == 130 and "interrupted" in err


def test_a_reader_that_goes_is_no_error():
    command = f"{sys.executable} -m anyflash doctor --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "{" and "Traceback" not in done.stderr


# rows


def test_rows_shows_every_kernel(typed, ledger):
    ledger.write_text(json.dumps(LEDGER))
    code, out, _ = typed("rows")
    assert code == 0
    head, _, first, second, totals = out.splitlines()
    assert head.split()[:2] == ["row", "image"]
    assert first.split()[1:] == ["sm_90", "168", "0", "0", "40960", "1048576", "2.25", "90"]
    assert second.split() == [LEDGER["kernels"][1]["row"], "compute_80", *7 * "-"]
    assert totals.startswith("2 kernels, 1.0 MB, images sm_90, compute_80; compiled by NVRTC 12.9")


def test_rows_as_json(typed, ledger):
    ledger.write_text(json.dumps(LEDGER))
    code, out, _ = typed("rows", "--json")
    assert code == 0 and json.loads(out) == LEDGER


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"kernels": 3}'])
def test_rows_without_a_good_ledger(typed, ledger, text):
    if text is not None:
        ledger.write_text(text)
    code, out, err = typed("rows")
    assert (code, out) == (1, "")
    assert "ledger" in err and "Traceback" not in err


# doctor


def test_doctor_here(typed):
    code, out, err = typed("doctor", "--json")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0, [check for check in report["checks"] if check["status"] == "fail"]
    assert report["environment"]["version"] == anyflash.__version__
    assert checks["self-test CPU"]["status"] == "ok"
    outcomes = checks["self-test CPU"]["details"]["outcomes"]
    assert len(outcomes) == 2 * len(self_test.PROBLEMS)
    assert all(0 <= outcome["share"] <= 1 for outcome in outcomes)


def test_doctor_in_words(typed):
    code, out, _ = typed("doctor")
    assert code == 0
    assert all(word in out for word in ("package", "CPU", "kernels", "compiler", "numpy"))
    assert out.endswith("Everything that is here works.\n")


def judged(check):
    return check.status, check.text, check.remedy


@pytest.mark.parametrize(
    "environment, status, says, remedy",
    [
        ({"gpus": [GPU], "archives": [ARCHIVE]}, "ok", "runs sm_90: 24 of 24", ""),
        ({"gpus": [GPU], "archives": []}, "fail", "0 of 24", "nvidia-cuda-nvrtc-cu12"),
        ({"gpus": [GPU], "compiler": COMPILER}, "note", "compiled on first use", ""),
        ({"gpus": [], "archives": []}, "note", "built without kernels", ""),
        ({"archives": [{**ARCHIVE, "fresh": 20}]}, "ok", "4 kernels of another version", ""),
        ({"archives": [{"image": "sm_90", "error": "torn"}]}, "ok", "sm_90: torn", ""),
    ],
)
def test_kernels(environment, status, says, remedy):
    found, text, advice = judged(doctor.check_kernels(environment))
    assert found == status and says in text
    assert remedy in advice and bool(remedy) == bool(advice)


@pytest.mark.parametrize(
    "gpu, driver, status, says",
    [
        (GPU, 12080, "ok", "NVIDIA H100, compute capability 9.0, 80 GB, driver of CUDA 12.8"),
        (GPU, 11080, "fail", "driver of CUDA 11.8"),
        ({**GPU, "compute_capability": 70, "images": []}, 12080, "note", "older than every kernel"),
        ({"index": 1, "error": "GPU is lost"}, 12080, "fail", "GPU is lost"),
    ],
)
def test_gpu(gpu, driver, status, says):
    check = doctor.check_gpu(gpu, driver)
    assert check.status == status and says in check.text
    assert bool(check.remedy) == (status == "fail")


def test_no_gpu_is_fine_a_card_without_driver_is_not(monkeypatch):
    facts_here = {"gpus": [], "driver": {"error": "libcuda.so.1 not found"}}
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: False)
    assert [check.status for check in doctor.check_gpus(facts_here)] == ["note"]
    monkeypatch.setattr(doctor, "_has_nvidia_card", lambda: True)
    (check,) = doctor.check_gpus(facts_here)
    assert check.status == "fail" and "libcuda" in check.text and "525" in check.remedy


def test_cache(tmp_path):
    (tmp_path / "kernel.bin").write_bytes(bytes(3 * 2**20))
    cache = {"path": str(tmp_path), "writable": True}
    assert judged(doctor.check_cache({"cache": cache})) == (
        "ok",
        f"{tmp_path}, 1 files, 3.0 MB",
        "",
    )
    status, text, remedy = judged(doctor.check_cache({"cache": {**cache, "writable": False}}))
    assert status == "note" and "cannot be written" in text and "ANYFLASH_CACHE_DIR" in remedy
    assert doctor.check_cache({"cache": {"path": None, "writable": False}}).status == "note"


def test_a_library_that_does_not_load(typed, monkeypatch):
    def fails():
        raise RuntimeError("libanyflash.so does not load")

    monkeypatch.setattr("anyflash._library.environment_json", fails)
    facts.environment.cache_clear()
    try:
        code, out, _ = typed("doctor")
    finally:
        facts.environment.cache_clear()
    assert code == 1
    assert "libanyflash.so does not load" in out and "reinstall" in out


def test_frameworks_are_not_imported():
    program = "import sys; from anyflash.cli import doctor; print(doctor.check_frameworks().text)\n"
    program += "assert not {'numpy', 'torch', 'cupy', 'jax'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert f"numpy {np.__version__}" in done.stdout.decode()


def test_without_numpy_the_self_test_says_so(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (check,) = doctor.check_results({})
    assert check.status == "note" and check.remedy == "`pip install numpy`"


@pytest.mark.parametrize("command", [["bench", "--seqlens", "16"], ["demo"]])
def test_what_cannot_run_is_told_at_once(typed, command, monkeypatch):
    broken = {"cpu": {"isa": None, "error": 'ANYFLASH_CPU asks for "foo"'}}
    monkeypatch.setattr(facts, "environment", lambda: broken)
    monkeypatch.setattr("anyflash.cli.demo._check", lambda arguments: None)
    code, out, err = typed(*command)
    assert (code, out) == (1, "") and 'ANYFLASH_CPU asks for "foo"' in err and "doctor" in err


def test_a_busy_machine(monkeypatch):
    monkeypatch.setattr(facts.os, "getloadavg", lambda: (0.1, 9, 9))
    assert facts.busy() == ""
    monkeypatch.setattr(facts.os, "getloadavg", lambda: (500.0, 9, 9))
    assert "busy (load 500.0" in facts.busy()


# The self-test itself: it must be able to fail.

WRONG = {
    "a score too many": lambda q, k, v, **o: anyflash.attention(q, k, v, **{**o, "causal": False}),
    "another scale": lambda q, k, v, **o: anyflash.attention(q, k, v, scale=0.11, **o),
    "NaN": lambda q, k, v, **o: np.full_like(q, np.nan),
    "a wrong shape": lambda q, k, v, **o: anyflash.attention(q[:, :-1], k, v, **o),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_fails_on(name, monkeypatch):
    replaced = types.SimpleNamespace(attention=WRONG[name], reference=anyflash.reference)
    monkeypatch.setattr(self_test, "anyflash", replaced)
    check = doctor._self_test("CPU", ("float32",), doctor._numpy_transfers)
    assert check.status == "fail" and "causal (float32)" in check.text


def test_the_self_test_tells_an_exception(monkeypatch):
    def refuses(q, k, v, **options):
        raise NotImplementedError("no such row")

    replaced = types.SimpleNamespace(attention=refuses, reference=anyflash.reference)
    monkeypatch.setattr(self_test, "anyflash", replaced)
    check = doctor._self_test("CPU", ("float32",), doctor._numpy_transfers)
    assert "NotImplementedError: no such row" in check.text


def test_rounding():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1.0, 3.0e38, 1e-40], np.float32)
    expected = np.array([1, 1 + 2**-6, -1, 3.0e38, 1e-40])
    assert np.allclose(self_test.rounded(x, "bfloat16"), expected, rtol=2**-8, atol=1e-41)
    assert self_test.rounded(x, "bfloat16")[:2].tolist() == [1.0, 1.015625]
    assert self_test.rounded(x[:3], "float16")[2] == -1
    assert self_test.rounded(x, "float32") is not None


# Console


def test_progress_in_a_file_is_rare():
    stream = io.StringIO()
    with console.Progress("work", 1000, stream) as progress:
        for _ in range(1000):
            progress.note("item")
            progress.step()
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_erased():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with console.Progress("work", 4, stream) as progress:
        progress.step(2)
        progress.note("half")
        progress.note("too soon to be shown")
    shown = stream.getvalue()
    assert "work  50 %" in shown and "half" in shown and "too soon" not in shown
    assert shown.endswith("\r") and shown.split("\r")[-2].strip() == ""


def test_table():
    text = console.table(["name", "n"], [["a", "10"], ["long", "5"]])
    assert text.splitlines() == ["name   n", "----  --", "a     10", "long   5"]


@pytest.mark.parametrize(
    "size, text", [(None, "-"), (3 * 2**19, "1.5"), (2**30, "1,024"), (0, "0.0")]
)
def test_megabytes(size, text):
    assert console.megabytes(size) == text
