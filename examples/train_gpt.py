"""Trains a small GPT twice, with anyflash and with the standard attention, and compares the two.

    python examples/train_gpt.py                  # on the CPU, in under 3 minutes
    python examples/train_gpt.py --preset gpu     # sequences of 8192 characters, bfloat16

The model (rotary positions, query heads that share key heads) learns to write the source of
Python's standard library, character by character. Both attentions start from the same weights and
see the same batches, for each seed. The loss curves go into a plot (--out), all figures into a JSON
file beside it, a table to the terminal. Needs torch and matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import anyflash
import torch
import torch.nn.functional as F
from anyflash.cli.console import Progress, megabytes, table
from anyflash.cli.facts import busy
from anyflash.cli.memory import PeakResident
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Settings:
    length: int  # characters of a sequence
    batch: int
    steps: int
    layers: int
    width: int
    heads: int
    key_heads: int
    rate: float = 3e-3
    dtype: torch.dtype = torch.float32


PRESETS = {
    "cpu": Settings(length=512, batch=2, steps=300, layers=3, width=128, heads=4, key_heads=2),
    "gpu": Settings(
        length=8192,
        batch=1,
        steps=200,
        layers=6,
        width=768,
        heads=12,
        key_heads=4,
        rate=1e-3,
        dtype=torch.bfloat16,
    ),
}


# The two attentions: q [B, N, H, d], k and v [B, N, Hk, d] -> [B, N, H, d]


def anyflash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return anyflash.attention(q, k, v, causal=True)


def standard_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V as everybody writes it: scores [B, H, N, N] in memory."""
    n, heads, d = q.shape[1:]
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * d**-0.5
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    p = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v)


ATTENTIONS = {"anyflash": anyflash_attention, "standard": standard_attention}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# The text: characters as numbers


def read_text(longest: int = 4_000_000) -> tuple[Tensor, int]:
    """The modules of the standard library one after the other, and how many characters it uses."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(path.read_bytes() for path in files)[:longest]
    used = sorted(set(text))
    number = torch.zeros(256, dtype=torch.long)
    number[used] = torch.arange(len(used))
    return number[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()], len(used)


def unigram_entropy(text: Tensor) -> float:
    """The loss, in nats, of who knows how frequent each character is, and no more."""
    p = text.bincount().double() / len(text)
    return -(p * p.clamp(min=1e-300).log()).sum().item()


def draw(text: Tensor, settings: Settings, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of characters [B, N], and the characters that follow each."""
    starts = torch.randint(len(text) - settings.length, (settings.batch, 1), generator=random)
    windows = text[starts + torch.arange(settings.length + 1)]
    return windows[:, :-1], windows[:, 1:]


# The model


class SelfAttention(nn.Module):
    def __init__(self, settings: Settings, attention: Attention) -> None:
        super().__init__()
        self.heads, self.key_heads = settings.heads, settings.key_heads
        self.attention = attention
        self.d = settings.width // settings.heads
        self.qkv = nn.Linear(settings.width, (self.heads + 2 * self.key_heads) * self.d, bias=False)
        self.out = nn.Linear(settings.width, settings.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.d))
        q, k, v = qkv.split([self.heads, self.key_heads, self.key_heads], dim=2)
        o = self.attention(rotate(q, rotation), rotate(k, rotation), v)
        return self.out(o.flatten(2))


def rotations(settings: Settings) -> Tensor:
    """cos and sin [2, N, 1, d / 2] of the angles by which positions turn pairs of numbers."""
    half = settings.width // settings.heads // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(settings.length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): pairs of numbers, half a head dim apart, are turned."""
    cos, sin = rotation.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    def __init__(self, settings: Settings, attention: Attention) -> None:
        super().__init__()
        width = settings.width
        self.attention = SelfAttention(settings, attention)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), rotation)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, characters: int, settings: Settings, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, settings.width)
        self.blocks = nn.ModuleList(Block(settings, attention) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, characters, bias=False)
        self.register_buffer("rotation", rotations(settings))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=settings.width**-0.5)

    def forward(self, characters: Tensor, following: Tensor) -> Tensor:
        """The mean loss, in nats a character."""
        x = self.embedding(characters)
        for block in self.blocks:
            x = block(x, self.rotation)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


# Training


@dataclasses.dataclass
class Run:
    attention: str
    seed: int
    losses: list[float] = dataclasses.field(default_factory=list)  # of each step
    held_out: float | None = None  # loss on text that was not trained on
    seconds: float = 0.0  # of all steps
    peak: int | None = None  # bytes beyond what was there before
    stopped: str = ""  # why, if it did not come to the end


def train(
    run: Run, text: Tensor, characters: int, settings: Settings, device: str, progress: Progress
) -> None:
    """One training run; fills `run`."""
    torch.manual_seed(run.seed)
    random = torch.Generator().manual_seed(run.seed)
    memory = Memory(device)
    model = GPT(characters, settings, ATTENTIONS[run.attention]).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, betas=(0.9, 0.95))
    mixed = torch.autocast(device, settings.dtype, enabled=settings.dtype != torch.float32)
    learned, held_out = text[: -len(text) // 20], text[-len(text) // 20 :]

    def loss_of(source: Tensor) -> Tensor:
        batch = (x.to(device) for x in draw(source, settings, random))
        with mixed:
            return model(*batch)

    start = time.perf_counter()
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * schedule(step, settings.steps)
        loss = loss_of(learned)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        run.losses.append(loss.item())
        progress.step()
        progress.note(f"{run.attention}, seed {run.seed}: loss {run.losses[-1]:.3f}")
    run.seconds = time.perf_counter() - start
    run.peak = memory.peak()
    with torch.no_grad():
        run.held_out = sum(loss_of(held_out).item() for _ in range(8)) / 8


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: up in a tenth of the steps, then down along a cosine."""
    up = max(steps // 10, 1)
    if step < up:
        return (step + 1) / up
    return 0.5 + 0.5 * math.cos(math.pi * (step - up) / max(steps - up, 1))


class Memory:
    """The highest memory of a run beyond what was there before: torch's on the GPU, the process's
    on the CPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.resident = PeakResident()

    def peak(self) -> int | None:
        if self.gpu:
            return torch.cuda.max_memory_allocated() - self.before
        return self.resident.growth()


def train_all(
    settings: Settings, seeds: int, device: str, text: Tensor, characters: int
) -> list[Run]:
    """Each attention from each seed. One that runs out of GPU memory is told, not tried again."""
    runs, failed = [], {}
    with Progress("training", 2 * seeds * settings.steps) as progress:
        for seed in range(seeds):
            for attention in ATTENTIONS:
                run = Run(attention, seed, stopped=failed.get(attention, ""))
                runs.append(run)
                if not run.stopped:
                    try:
                        train(run, text, characters, settings, device, progress)
                    except torch.cuda.OutOfMemoryError as error:
                        run.stopped = failed[attention] = str(error).partition(". ")[0]
                progress.step(settings.steps - len(run.losses))
    return runs


# What came of it


def summary(runs: list[Run]) -> list[dict[str, object]]:
    """One line for each attention: means over the seeds, the highest memory."""
    lines = []
    for attention in ATTENTIONS:
        mine = [run for run in runs if run.attention == attention]
        finished = [run for run in mine if not run.stopped]
        count = max(len(finished), 1)
        lines.append(
            {
                "attention": attention,
                "loss": sum(run.held_out for run in finished) / count if finished else None,
                "seconds": sum(run.seconds for run in finished) / count if finished else None,
                "peak_bytes": max((run.peak or 0 for run in finished), default=None),
                "stopped": mine[0].stopped,
            }
        )
    return lines


def largest_difference(runs: list[Run]) -> float | None:
    """Between the losses of both attentions at any step, relative to the loss."""
    by_seed: dict[int, list[list[float]]] = {}
    for run in runs:
        if not run.stopped:
            by_seed.setdefault(run.seed, []).append(run.losses)
    pairs = [zip(*losses) for losses in by_seed.values() if len(losses) == 2]
    return max((abs(a - b) / b for pair in pairs for a, b in pair), default=None)


def show(lines: list[dict[str, object]], difference: float | None) -> None:
    heads = ("attention", "loss (nats a character)", "seconds", "peak memory (MB)")
    rows = []
    for line in lines:
        if line["stopped"]:
            rows.append((line["attention"], "-", "-", line["stopped"]))
        else:
            numbers = f"{line['loss']:.4f}", f"{line['seconds']:.1f}"
            rows.append((line["attention"], *numbers, megabytes(line["peak_bytes"])))
    print(table(heads, rows))
    if difference is not None:
        print(f"largest difference of the two curves: {difference:.1e} of the loss")


def smooth(losses: list[float], over: int = 10) -> list[float]:
    """Means of the last `over` losses: batches are small, and differ."""
    starts = (max(i - over, 0) for i in range(1, len(losses) + 1))
    return [sum(losses[start:i]) / (i - start) for i, start in enumerate(starts, 1)]


def plot(runs: list[Run], entropy: float, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    looks = {
        "anyflash": {"color": "#0b6e4f", "linewidth": 2.5, "alpha": 0.6},
        "standard": {"color": "black", "linewidth": 0.8, "linestyle": "--"},
    }
    for run in runs:
        label = f"{run.attention} attention" if run.seed == 0 else None
        if run.stopped:
            label = f"standard attention: {run.stopped[:48]}" if label else None
        steps = range(1, len(run.losses) + 1)
        panel.plot(steps, smooth(run.losses), label=label, **looks[run.attention])
    panel.axhline(entropy, color="#7a7a7a", linewidth=0.8)
    panel.annotate("entropy of single characters", (1, entropy), va="bottom", fontsize=8)
    panel.set(xlabel="step", ylabel="loss, nats a character (mean of 10 steps)")
    panel.set_title(title, fontsize=9)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("train_gpt.png"), metavar="PNG")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each attention (default 2)")
    for name in ("length", "batch", "steps", "layers"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    arguments = parser.parse_args()
    settings = PRESETS[arguments.preset]
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    fields = {field.name for field in dataclasses.fields(Settings)}
    settings = dataclasses.replace(settings, **{n: v for n, v in given.items() if n in fields})
    device = "cuda" if arguments.preset == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--preset gpu: torch finds no GPU here")

    text, characters = read_text()
    entropy = unigram_entropy(text)
    hardware = torch.cuda.get_device_name() if device == "cuda" else facts_of_cpu()
    print(
        f"{len(text):,} characters of Python's standard library, {characters} different ones, "
        f"entropy {entropy:.3f} nats; sequences of {settings.length}, on {hardware}"
    )
    remark = busy()
    runs = train_all(settings, arguments.seeds, device, text, characters)
    lines, difference = summary(runs), largest_difference(runs)
    title = f"GPT on Python's standard library: sequences of {settings.length}, {hardware}"
    plot(runs, entropy, title, arguments.out)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "remark": remark,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "anyflash": anyflash.__version__,
        },
        "settings": {**dataclasses.asdict(settings), "dtype": str(settings.dtype)},
        "unigram_entropy": entropy,
        "summary": lines,
        "largest_difference": difference,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    figures = arguments.out.with_suffix(".json")
    figures.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"curves in {arguments.out}\n")
    show(lines, difference)
    if remark:
        print(remark)
    return 0


def facts_of_cpu() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    raise SystemExit(main())
