"""How far transformers' models with attn_implementation="anyattention" are from "eager", in fp32.

The models and batches are those of tests/python/test_transformers.py. Writes
bench/transformers_agreement.json; tools/update_tables.py makes the table in docs/transformers.md
from it.

usage: python bench/transformers_agreement.py
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))

import test_transformers as cases  # noqa: E402

OURS = cases.NAME


def relative(ours: torch.Tensor, eager: torch.Tensor, scale: torch.Tensor) -> float:
    return ((ours - eager).abs().max() / scale).item()


def differences(name: str) -> dict[str, float]:
    """The largest over batches without padding, and with it left, right and on both sides."""
    model = cases.make(name)
    most = {"logits": 0.0, "gradients": 0.0}
    for side in ("none", "left", "right", "both"):
        mask = cases.padding(side)
        ours, eager = (cases.results(model, kind, mask) for kind in (OURS, "eager"))
        most["logits"] = max(most["logits"], relative(ours[0], eager[0], eager[0].abs().max()))
        scale = max(gradient.abs().max() for gradient in eager[1].values())
        for parameter, gradient in eager[1].items():
            error = relative(ours[1][parameter], gradient, scale)
            most["gradients"] = max(most["gradients"], error)
    return most


def same_tokens(name: str) -> tuple[int, int]:
    """Generated tokens that are eager's, and all: with and without padding, two kinds of cache."""
    model, same, total = cases.make(name), 0, 0
    for side in ("none", "left"):
        mask = cases.padding(side)
        mask = torch.ones(3, cases.TOKENS, dtype=torch.long) if mask is None else mask
        for options in ({}, {"cache_implementation": "static"}):
            ours, eager = (
                cases.generated(model, kind, mask, **options)[:, cases.TOKENS :]
                for kind in (OURS, "eager")
            )
            same += int((ours == eager).sum())
            total += eager.numel()
    return same, total


def main() -> None:
    models = []
    for name in cases.MODELS:
        line: dict[str, object] = {"model": name, **differences(name)}
        if name in cases.DECODERS:
            line["same_tokens"], line["tokens"] = same_tokens(name)
        models.append(line)
        print(line)
    ours, eager = (cases.minilm_embeddings(kind) for kind in (OURS, "eager"))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "models": models,
        "minilm": (ours - eager).abs().max().item(),
    }
    path = ROOT / "bench" / "transformers_agreement.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
