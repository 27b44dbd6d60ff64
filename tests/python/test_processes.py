"""What only a fresh process shows: imports, missing libraries, notices, threads, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import anyflash
import numpy as np
import pytest


def python(code, *flags, **environment):
    """Runs code in a new interpreter; returns (stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_brings_nothing_along():
    out, _ = python(
        "import sys, anyflash; heavy = {'numpy', 'torch', 'jax', 'cupy', 'ctypes', 'json'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert out.strip() == "[]"


def test_import_time_lists_few_modules():
    _, err = python(
        "import anyflash",
        "-X",
        "importtime",
        "-I" if "PYTHONPATH" not in os.environ else "-s",
    )
    lines = [line for line in err.splitlines() if "anyflash" in line]
    assert 1 <= len(lines) <= 6, err


def test_a_missing_library_is_one_clear_error():
    out, _ = python(
        "import anyflash\n"
        "import numpy as np\n"
        "q = np.zeros((1, 4, 1, 8), np.float32)\n"
        "try: anyflash.attention(q, q, q)\n"
        "except RuntimeError as error: print(error)",
        ANYFLASH_LIBRARY="/nowhere/libanyflash.so",
    )
    assert out.strip() == (
        f"{'anyflash.dll' if os.name == 'nt' else 'libanyflash.so'} was not found at "
        "/nowhere/libanyflash.so; reinstall anyflash (pip install --force-reinstall anyflash), or "
        "set ANYFLASH_LIBRARY to its path"
    )


def test_a_wrong_library_is_one_clear_error(tmp_path):
    wrong = tmp_path / "libanyflash.so"
    wrong.write_bytes(b"no library")
    out, _ = python(
        "import anyflash\n"
        "import numpy as np\n"
        "q = np.zeros((1, 4, 1, 8), np.float32)\n"
        "try: anyflash.attention(q, q, q)\n"
        "except RuntimeError as error: print(error)",
        ANYFLASH_LIBRARY=str(wrong),
    )
    assert "load" in out
    assert str(wrong) in out


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_way_can_be_chosen(value):
    out, _ = python(
        "import anyflash, numpy as np\n"
        "from anyflash import _backend\n"
        "q = np.zeros((1, 4, 1, 8), np.float32)\n"
        "anyflash.attention(q, q, q)\n"
        "print(_backend.forward.__module__)",
        ANYFLASH_NO_FAST=value,
    )
    expected = ["anyflash._call"] if value == "1" else ["anyflash._fast", "anyflash._call"]
    assert out.strip() in expected


def test_versions_agree():
    from anyflash import _library

    assert _library.library().anyflash_version().decode() == anyflash.__version__


def test_notices_go_to_logging(binding, caplog):
    from anyflash import _library

    _library.show_notice("compiling a kernel")
    assert caplog.records[0].name == "anyflash"
    assert caplog.records[0].getMessage() == "compiling a kernel"


def some_problem(seed):
    random = np.random.default_rng(seed)
    n = 40 + 13 * seed
    return [random.standard_normal((2, n, 3, 32), np.float32) for _ in range(3)]


def test_threads(binding):
    problems = [some_problem(seed) for seed in range(4)]
    expected = [anyflash.attention(*tensors).tobytes() for tensors in problems]
    wrong = []

    def work(index):
        for _ in range(40):
            if anyflash.attention(*problems[index]).tobytes() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_of_threads_do_not_mix(binding):
    q = np.zeros((1, 4, 2, 8), np.float32)
    wrong = []

    def work(heads):
        k = np.zeros((1, 4, heads, 8), np.float32)
        for _ in range(200):
            try:
                anyflash.attention(q, k, k)
            except ValueError as error:
                if f"k has {heads};" not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(heads,)) for heads in (3, 5, 7, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_another_thread_runs_while_the_cpu_computes(binding):
    """The lock of the interpreter is given back: a counter moves during one long call."""
    q = np.zeros((1, 1024, 8, 64), np.float32)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            done.wait(0.0001)

    anyflash.attention(q[:, :8], q[:, :8], q[:, :8])
    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    for _ in range(5):
        anyflash.attention(q, q, q)
    moved = counted[0] - before
    done.set()
    thread.join()
    assert moved > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_the_same(tmp_path):
    code = (
        "import os, numpy as np, anyflash\n"
        "q = np.random.default_rng(0).standard_normal((2, 300, 4, 64), np.float32)\n"
        "first = anyflash.attention(q, q, q)\n"
        "child = os.fork()\n"
        "same = anyflash.attention(q, q, q).tobytes() == first.tobytes()\n"
        "if child == 0: os._exit(0 if same else 3)\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(same, os.waitstatus_to_exitcode(status))"
    )
    for no_fast in "01":
        out, _ = python(code, ANYFLASH_NO_FAST=no_fast)
        assert out.strip() == "True 0"


def test_every_public_function_documents_itself():
    for name in anyflash.__all__:
        thing = getattr(anyflash, name)
        if callable(thing):
            assert len(thing.__doc__) > 50, name
    for function in (anyflash.attention, anyflash.attention_varlen):
        for word in ("Returns:", "Raises:", "float32", "[B"):
            assert word in function.__doc__
