"""The documents' Python examples run as they stand (on the CPU where they name a GPU)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
EXAMPLES = [
    example
    for page in (README, ROOT / "docs" / "transformers.md")
    for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_example(example):
    for library in ("torch", "transformers"):
        if re.search(rf"\b{library}\b", example):
            pytest.importorskip(library, reason=f"{library} is not installed")
    exec(example.replace('"cuda"', '"cpu"').replace("4096", "96"), {})


def test_documents_that_it_links_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (README.parent / link).exists()]
