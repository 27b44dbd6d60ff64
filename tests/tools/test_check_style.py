"""Each rule of tools/check_style.py finds what it is there for, and nothing in clean files."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_style import check
from source_text import closure, includes, normalised, without_comments

CLEAN = {
    "CONTRIBUTING.md": "`src/core/` `src/cpu/` `src/cuda/` `src/cuda/ptx/` `src/cuda/tile/` "
    "`src/cuda/attn/` `src/cuda/sm80/` `python/anyflash/`\n",
    "src/cuda/ptx/mma.h": '#include "cuda/params.h"\nasm volatile("mma.sync");\n',
    "src/cuda/tile/fragment.h": '#include "cuda/ptx/mma.h"\n',
    "src/cuda/attn/mask.h": '#include "cuda/tile/fragment.h"\n',
    "src/cuda/sm80/forward.cuh": '#include "cuda/attn/mask.h"\n#include "cuda/sm80/shared.h"\n',
    "src/core/plan.cpp": '#include <vector>\n#include "cuda/sm80/shared_memory.h"\n'
    '// printf("asm") in a comment\nconst char* text = "exit(1) asm";\nsnprintf(a, 1, "");\n',
    "src/cpu/flash.cpp": '#include "core/problem.h"\n#include "cuda/attn/key_blocks.h"\n',
    "python/anyflash/_fast.c": "#include <Python.h>\n",
}


def problems_of(tmp_path: Path, extra: dict[str, str]) -> list[str]:
    for name, text in {**CLEAN, **extra}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [str(problem) for problem in check(tmp_path)]


def test_clean_tree_has_no_problem(tmp_path):
    assert problems_of(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("src/core/plan.cpp", 'int a;\nasm("nop");\n', "src/core/plan.cpp:2: asm belongs"),
        ("src/cuda/attn/mask.h", 'asm volatile("x");\n', "asm belongs"),
        ("src/core/plan.cpp", 'printf("x");\n', "never prints, exits or waits: printf"),
        ("src/core/plan.cpp", "std::cerr << 1;\n", "never prints"),
        ("src/cpu/flash.cpp", "std::exit (1);\n", "never prints, exits or waits: exit"),
        ("src/cuda/sm80/forward.cuh", "abort();\n", "never prints, exits or waits: abort"),
        ("src/core/plan.cpp", "cudaDeviceSynchronize();\n", "cudaDeviceSynchronize"),
        ("src/core/plan.cpp", "driver.cuCtxSynchronize();\n", "cuCtxSynchronize"),
        ("src/cuda/ptx/mma.h", '#include "cuda/tile/fragment.h"\n', "cuda/ptx must not include"),
        ("src/cuda/tile/fragment.h", '#include "cuda/attn/mask.h"\n', "cuda/tile must not include"),
        ("src/cuda/attn/mask.h", '#include "cuda/sm80/forward.cuh"\n', "cuda/attn must not"),
        ("src/cuda/attn/mask.h", '#include "core/problem.h"\n', "cuda/attn must not include"),
        ("src/cuda/attn/mask.h", "#include <cmath>\n", "no system header"),
        ("src/cuda/sm80/forward.cuh", '#include "cuda/sm90/tma.h"\n', "cuda/sm80 must not"),
        ("src/core/plan.cpp", '#include "cuda/ptx/mma.h"\n', "core must not include cuda/ptx"),
        ("src/cpu/flash.cpp", '#include "cuda/tile/fragment.h"\n', "cpu must not include"),
        ("src/core/plan.cpp", "#include <Python.h>\n", "under python/ only"),
        ("src/core/plan.cpp", "#include <torch/extension.h>\n", "under python/ only"),
        ("src/core/plan.cpp", "int " + "a" * 97 + ";\n", "102 columns, 100 are allowed"),
        ("src/core/plan.cpp", "int a; \n", "blanks at the end"),
        ("src/core/plan.cpp", "\tint a;\n", "a tab"),
        ("src/core/plan.cpp", "int a;", "no newline"),
        ("python/anyflash/a.py", "# TO" + "DO later\n", "names its issue"),
        ("src/core/plan.cpp", "int a;\n" * 600, "600 lines"),
        ("src/core/BadName.cpp", "int a;\n", "not lower_case"),
        ("src/new_room/a.cpp", "int a;\n", "does not say what `src/new_room/` is for"),
    ],
)
def test_rule_finds(tmp_path, path, text, complaint):
    assert any(complaint in problem for problem in problems_of(tmp_path, {path: text}))


def test_todo_with_its_issue_is_fine(tmp_path):
    assert problems_of(tmp_path, {"python/anyflash/a.py": "# TO" + "DO(#12): later\n"}) == []


def test_missing_contributing_is_a_problem(tmp_path):
    problems_of(tmp_path, {})
    (tmp_path / "CONTRIBUTING.md").unlink()
    assert [str(problem) for problem in check(tmp_path)] == ["CONTRIBUTING.md:1: missing"]


def test_comments_go_and_literals_stay():
    text = 'a; // b\nc = "// d"; /* e\nf */ g = \'"\'; h = R"x(/* i */)x"; // j'
    assert normalised(text) == 'a;\nc = "// d";\ng = \'"\'; h = R"x(/* i */)x";'
    assert without_comments(text).count("\n") == text.count("\n")


def test_digit_separators_are_no_literals():
    assert normalised("a = 1'000; // b\nc = 2'000;") == "a = 1'000;\nc = 2'000;"


def test_includes_are_found_with_their_lines():
    text = '// #include "no.h"\n#include "a.h"\n  #  include <b>\n'
    assert includes(text) == [(2, '"a.h"'), (3, "<b>")]


def test_closure_follows_includes(tmp_path):
    (tmp_path / "a.h").write_text('#include "b.h"\n#include <c.h>\n')
    (tmp_path / "b.h").write_text('#include "a.h"\n#include "missing.h"\n')
    (tmp_path / "c.h").write_text("")
    assert closure(tmp_path, tmp_path / "a.h") == [tmp_path / "a.h", tmp_path / "b.h"]
