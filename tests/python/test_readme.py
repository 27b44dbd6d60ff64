"""The README's Python examples run as they stand (on the CPU where they name a GPU)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_example(example):
    if "torch" in example:
        pytest.importorskip("torch", reason="torch is not installed")
    exec(example.replace('"cuda"', '"cpu"').replace("4096", "96"), {})


def test_documents_that_it_links_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (README.parent / link).exists()]
