"""tools/test itself: which skips it forgives, how it ends, what it repeats at the end."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "tools" / "test"
loader = importlib.machinery.SourceFileLoader("tools_test", str(PATH))
spec = importlib.util.spec_from_loader("tools_test", loader)
tool = importlib.util.module_from_spec(spec)
loader.exec_module(tool)


@pytest.mark.parametrize(
    ("reason", "forgiven"),
    [
        ("needs a GPU", True),
        ("no GPU (ANYFLASH_TEST_DEVICE=cpu runs these on the CPU)", True),
        ("this machine has no AVX-512", True),
        ("could not import 'torch': No module named 'torch'", False),
        ("the extension _fast is not built", False),
    ],
)
def test_only_missing_hardware_is_forgiven(reason, forgiven):
    lines = [f"SKIPPED [1] tests/x.py:1: {reason}"]
    tool.Tester(everything=False).judge_skips(lines)
    if forgiven:
        tool.Tester(everything=True).judge_skips(lines)
    else:
        with pytest.raises(tool.Failed, match="for want of a tool"):
            tool.Tester(everything=True).judge_skips(lines)


def test_a_stage_that_lacks_something(monkeypatch, capsys):
    def lacking(tester):
        raise tool.Missing("a thing")

    monkeypatch.setitem(tool.STAGES, "cpp", lacking)
    assert tool.run_stage(tool.Tester(everything=False), "cpp") == "skipped: needs a thing"
    assert tool.run_stage(tool.Tester(everything=True), "cpp") == "FAILED: needs a thing"
    assert "==== cpp" in capsys.readouterr().out


def test_a_failing_command_fails_its_stage(monkeypatch):
    monkeypatch.setitem(tool.STAGES, "cpp", lambda tester: tester.run("false"))
    assert tool.run_stage(tool.Tester(everything=False), "cpp").startswith("FAILED: false")


def test_closing_lines_are_kept():
    tester = tool.Tester(everything=False)
    tester.closes("pytest", ["..", "3 passed, 1 skipped in 0.1s"], r"\d+ passed.* in [\d.]+s")
    tester.closes("ctest", ["nothing"], "tests passed")
    assert tester.closing == ["pytest: 3 passed, 1 skipped in 0.1s", "ctest: ?"]


def test_commands_show_their_output_and_return_it(capfd):
    assert tool.Tester(everything=False).run("echo", "hello") == ["hello"]
    assert "hello" in capfd.readouterr().out
