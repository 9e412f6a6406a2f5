"""Generation: filters against transformers' own, cache == no cache, batches, compiling, seeds, stops, and streaming."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmforge import (
    GPT,
    CharTokenizer,
    ConfigError,
    GPTConfig,
    Llama,
    LlamaConfig,
    generate,
    generate_text,
    generation,
    stream_text,
)
from llmforge.generation import Sampling, generate_batch
from llmforge.nn import KVCache, StaticKVCache

TEXT = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme: ¡ñandú, «eso» 😀!\n"


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer.from_text(TEXT)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # livelier than at initialisation: repeated tokens would hide mistakes
    return model.eval()


class Fixed(nn.Module):
    """Predicts the token after the last one, cyclically, with a few rivals; forward(idx) -> logits and nothing else."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, idx):
        return 9.0 * nn.functional.one_hot((idx + 1) % self.vocab_size, self.vocab_size).float()


PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.7),
        dict(temperature=0.6),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(repetition_penalty=0.8, temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_filters_are_transformers_filters(settings, monkeypatch):
    logits, seen = torch.randn(4, 17) * 3, torch.randint(0, 17, (4, 5))
    expected = LogitsProcessorList([PROCESSORS[k](v) for k, v in settings.items()])(seen, logits.clone()).softmax(-1)
    drawn_from = []
    monkeypatch.setattr(
        torch, "multinomial", lambda p, n, generator: drawn_from.append(p) or p.argmax(-1, keepdim=True)
    )
    Sampling(**settings).choose(logits, seen, None)
    torch.testing.assert_close(drawn_from[0], expected)
    if "top_k" in settings:
        assert (expected == 0).any()  # the filter did something


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert Sampling(temperature=0).choose(logits, torch.zeros(1, 1, dtype=torch.long), None).tolist() == [1]


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20_000, 3)
    drawn = Sampling().choose(logits, torch.zeros(20_000, 1, dtype=torch.long), torch.Generator().manual_seed(0))
    shares = drawn.bincount() / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)  # 4 standard deviations


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=0.9, top_k=20, seed=3)], ids=str)
@pytest.mark.parametrize("new_tokens", [20, 60])  # within the context of 32, and far beyond
def test_cache_equals_no_cache(model, settings, new_tokens):
    idx = torch.randint(0, model.config.vocab_size, (3, 7))
    cached = generate(model, idx, max_new_tokens=new_tokens, **settings)
    assert cached.shape == (3, 7 + new_tokens)
    assert torch.equal(cached, generate(model, idx, max_new_tokens=new_tokens, use_cache=False, **settings))


def test_greedy_beyond_the_context_is_the_plain_sliding_window(model):
    idx = torch.randint(0, model.config.vocab_size, (1, 5))
    expected = idx
    for _ in range(60):  # as nanoGPT's generate, without sampling
        expected = torch.cat([expected, model(expected[:, -32:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, idx, max_new_tokens=60, temperature=0), expected)


def test_a_prompt_longer_than_the_context_works(model):
    idx = torch.randint(0, model.config.vocab_size, (1, 50))
    assert generate(model, idx, max_new_tokens=3, seed=0).shape == (1, 53)


def test_same_seed_same_text_and_another_seed_another(model, tokenizer):
    texts = [generate_text(model, tokenizer, "En ", max_new_tokens=25, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("En ")


def test_generation_leaves_the_model_in_its_mode_and_the_global_generator_alone(tokenizer):
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8, dropout=0.5))
    state = torch.get_rng_state()
    first = generate_text(model.train(), tokenizer, "En", max_new_tokens=12, seed=1)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert first == generate_text(model.eval(), tokenizer, "En", max_new_tokens=12, seed=1)  # no dropout in either
    assert not model.training


def test_any_module_with_forward_generates():
    idx = torch.tensor([[0], [4]])
    assert generate(Fixed(5), idx, max_new_tokens=4, temperature=0).tolist() == [[0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]


def test_a_finished_row_is_filled_with_the_end_token():
    idx = torch.tensor([[0], [2]])
    out = generate(Fixed(5), idx, max_new_tokens=10, temperature=0, eos_token_id=4)
    assert out.tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 4, 4]]


def alphabet_model(text: str) -> tuple[CharTokenizer, Fixed]:
    tokenizer = CharTokenizer.from_text(text)
    return tokenizer, Fixed(tokenizer.vocab_size)


def test_text_ends_at_the_end_token_without_showing_it():
    tokenizer, model = alphabet_model("abcd")
    assert generate_text(model, tokenizer, "a", temperature=0, max_new_tokens=50) == "abcd"


@pytest.mark.parametrize("stop", ["de", ["xyz", "de"], ["ef", "de"]])
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(stop):
    tokenizer, model = alphabet_model("abcdefgh")
    assert generate_text(model, tokenizer, "a", temperature=0, max_new_tokens=50, stop=stop) == "abc"


def test_a_stop_string_is_held_back_while_streaming():
    tokenizer, model = alphabet_model("abcdefgh")
    assert list(stream_text(model, tokenizer, "a", temperature=0, stop="dex")) == ["b", "c", "def", "g", "h"]


def test_an_unfinished_stop_string_is_given_at_the_end():
    tokenizer, model = alphabet_model("abcdefgh")
    assert "".join(stream_text(model, tokenizer, "a", temperature=0, stop="hi")) == "bcdefgh"


class ByteTokenizer:
    """Each byte a token: the hardest case for streaming."""

    vocab_size, eos_token_id = 256, None

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)


class Reciting(nn.Module):
    """Says a fixed text byte by byte, whatever came before."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bytes = text.encode()

    def forward(self, idx):
        B, T = idx.shape
        nxt = torch.tensor([[self.bytes[min(t, len(self.bytes) - 1)] for t in range(T)]] * B)
        return nn.functional.one_hot(nxt, 256).float()


@given(st.text(min_size=1, max_size=12))
def test_streaming_yields_whole_characters_whose_sum_is_the_text(text):
    model, tokens = Reciting(text), len(text.encode())
    pieces = list(stream_text(model, ByteTokenizer(), "x", max_new_tokens=tokens, temperature=0))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_a_character_cut_off_by_the_length_is_marked():
    assert "".join(stream_text(Reciting("aé"), ByteTokenizer(), "x", max_new_tokens=2, temperature=0)) == "a\ufffd"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1), r"temperature \(-1.0\) must be 0 \(greedy\) or more"),
        (dict(top_k=0), r"top_k \(0\) must be at least 1"),
        (dict(top_p=0.0), r"top_p \(0.0\) must be above 0 and at most 1"),
        (dict(min_p=1.5), r"min_p \(1.5\) must be above 0"),
        (dict(repetition_penalty=0), r"repetition_penalty \(0.0\) must be above 0"),
        (dict(topk=5), "unknown Sampling field 'topk'; did you mean 'top_k'?"),
        (dict(max_new_tokens=-1), r"max_new_tokens \(-1\) must be 0 or more"),
        (dict(stop=""), "a stop string must not be empty"),
    ],
)
def test_bad_settings_are_refused(model, tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate_text(model, tokenizer, "En", **{"max_new_tokens": 3, **settings})


def test_an_empty_batch_is_refused(model):
    with pytest.raises(ConfigError, match=r"at least one token, got shape \(1, 0\)"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)


def test_an_empty_prompt_starts_from_a_line_break(model, tokenizer):
    assert generate_text(model, tokenizer, "", max_new_tokens=5, seed=0) == generate_text(
        model, tokenizer, "\n", max_new_tokens=5, seed=0
    ).removeprefix("\n")


# --- Llama, batches of prompts of different length, and the compiled step


YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=16)
FEATURES = {
    "plain": {},
    "multi-query": dict(num_key_value_heads=1),
    "window": dict(sliding_window=6),
    "window in the last layer": dict(sliding_window=5, max_window_layers=1),
    "yarn": dict(rope_scaling=YARN),
    "norms": dict(qk_norm=True, head_dim=12),
    "biases": dict(qkv_bias=True),
}


def lively(model):
    """Greedy texts of a model as it is initialised repeat one token, which would hide mistakes."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def llama(feature: str = "plain", **changes) -> Llama:
    torch.manual_seed(2)
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=32)
    return lively(Llama(LlamaConfig.from_dict({**shape, **FEATURES[feature], **changes})))


def gpt() -> GPT:
    torch.manual_seed(2)
    return lively(GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=2, n_embd=32)))


MODELS = {**{name: lambda name=name: llama(name) for name in FEATURES}, "gpt": gpt}
EVERY = pytest.mark.parametrize("which", MODELS)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9], [10, 11, 12], [13, 2, 13, 2, 13, 2, 13, 2]]


@EVERY
@pytest.mark.parametrize("new_tokens", [20, 50])  # within the context of 32, and beyond
def test_a_llama_with_cache_writes_what_it_writes_without(which, new_tokens):
    model = MODELS[which]()
    idx = torch.randint(0, 50, (3, 7))
    found = generate(model, idx, max_new_tokens=new_tokens, temperature=0)
    expected = idx
    for _ in range(new_tokens):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected[:, -32:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(found, generate(model, idx, max_new_tokens=new_tokens, temperature=0, use_cache=False))
    assert len(set(found[0].tolist())) > 5  # a text, not one token again and again


@EVERY
def test_logits_do_not_depend_on_how_a_text_reaches_the_cache(which):
    model, idx = MODELS[which](), torch.randint(0, 50, (2, 24))
    with torch.no_grad():
        expected = model(idx)
        cache = KVCache(24)
        found = [model.lm_head(model.features(part, cache)) for part in idx.split([9, 1, 1, 13], dim=1)]
        static = KVCache(30)
        start = [model.lm_head(model.features(idx[:, :5], static))]
        static = StaticKVCache(static, idx.device)
        start += [model.lm_head(model.features(idx[:, t : t + 1], static)) for t in range(5, 24)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)  # order of float sums
    torch.testing.assert_close(torch.cat(start, dim=1), expected, atol=1e-4, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("settings", [{}, dict(repetition_penalty=1.3), dict(use_cache=False)], ids=str)
def test_a_batch_writes_what_each_prompt_gives_alone(which, settings):
    model = MODELS[which]()
    together = generate_batch(model, PROMPTS, max_new_tokens=50, temperature=0, **settings)
    alone = [
        generate(model, torch.tensor([p]), max_new_tokens=50, temperature=0, **settings)[0].tolist() for p in PROMPTS
    ]
    assert together == alone
    assert len({tuple(row[-20:]) for row in together}) == len(PROMPTS)  # each of its own


def test_a_prompt_beyond_the_context_batches_with_a_short_one():
    model, prompts = llama("window"), [torch.randint(0, 50, (45,)).tolist(), [3, 4]]
    together = generate_batch(model, prompts, max_new_tokens=9, temperature=0)
    assert together == [
        generate(model, torch.tensor([p]), max_new_tokens=9, temperature=0)[0].tolist() for p in prompts
    ]


def test_a_batch_ends_each_row_at_its_end_token():
    model = llama()
    whole = generate_batch(model, PROMPTS, max_new_tokens=20, temperature=0)
    eos = whole[0][len(PROMPTS[0]) + 4]
    found = generate_batch(model, PROMPTS, max_new_tokens=20, temperature=0, eos_token_id=eos)
    for row, prompt, expected in zip(found, PROMPTS, whole, strict=True):
        new = expected[len(prompt) :]
        assert row == prompt + (new[: new.index(eos)] if eos in new else new)
    assert any(len(row) < len(expected) for row, expected in zip(found, whole, strict=True))
    assert any(len(row) == len(expected) for row, expected in zip(found, whole, strict=True))
    inside = generate_batch(model, [[eos, 1, eos]], max_new_tokens=2, temperature=0, eos_token_id=eos)
    assert inside[0][:3] == [eos, 1, eos]  # the prompt stays whole


def test_a_batch_of_equal_prompts_needs_no_padding(monkeypatch):
    model, prompts = llama(), [[1, 2, 3], [4, 5, 6]]
    expected = generate(model, torch.tensor(prompts), max_new_tokens=8, seed=1).tolist()
    assert generate_batch(model, prompts, max_new_tokens=8, seed=1) == expected
    assert generate_batch(model, prompts, max_new_tokens=8, seed=2) != expected


def test_any_module_takes_a_batch():
    found = generate_batch(Fixed(5), [[0], [4, 2], [3]], max_new_tokens=3, temperature=0, eos_token_id=4)
    assert found == [[0, 1, 2, 3], [4, 2, 3], [3]]
    assert generate_batch(Fixed(5), [(0,), (2,)], max_new_tokens=2, temperature=0) == [[0, 1, 2], [2, 3, 4]]


@pytest.mark.parametrize(("prompts", "lengths"), [([], r"\[\]"), ([[]], r"\[0\]"), ([[1, 2], [], [3]], r"\[2, 0, 1\]")])
def test_an_empty_prompt_in_a_batch_is_refused(prompts, lengths):
    with pytest.raises(ConfigError, match=rf"needs prompts of at least one token each, got {lengths}"):
        generate_batch(llama(), prompts, max_new_tokens=1)


def test_a_batch_checks_its_settings():
    for settings, message in [(dict(topk=5), "did you mean 'top_k'"), (dict(max_new_tokens=-1), r"\(-1\) must be 0")]:
        with pytest.raises(ConfigError, match=message):
            generate_batch(llama(), [[1]], **{"max_new_tokens": 3, **settings})


@pytest.fixture
def compilations(monkeypatch):
    """Counts what is compiled, and runs it without a C++ compiler."""
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile(f, backend=counter, **options))
    torch._dynamo.reset()
    generation._compiled_read.cache_clear()
    yield counter
    generation._compiled_read.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("which", ["window", "gpt"])
def test_one_compilation_serves_all_tokens_and_later_texts(compilations, which):
    model = MODELS[which]()
    for _ in range(2):
        found = generate_batch(model, PROMPTS, max_new_tokens=24, temperature=0, compile=True)
        assert found == generate_batch(model, PROMPTS, max_new_tokens=24, temperature=0)
        assert compilations.frame_count == 1


@pytest.mark.parametrize(
    ("prompt", "settings"), [([7], dict(temperature=0)), ([7, 8, 9], dict(temperature=0.9, top_k=20, seed=3))], ids=str
)
def test_a_compiled_text_is_the_same_text(compilations, settings, prompt):
    model, idx = llama("window"), torch.tensor([prompt])
    for new_tokens in (1, 12, 50):  # no step to compile; within the context; beyond it
        found = generate(model, idx, max_new_tokens=new_tokens, compile=True, **settings)
        assert torch.equal(found, generate(model, idx, max_new_tokens=new_tokens, **settings))
    assert compilations.frame_count == 1
    assert compilations.op_count > 10


def test_compiled_text_streams_and_other_modules_ignore_compile(compilations, tokenizer, model):
    texts = [generate_text(model, tokenizer, "En", max_new_tokens=9, seed=1, compile=c) for c in (False, True)]
    assert texts[0] == texts[1]
    assert compilations.frame_count == 1
    assert generate(Fixed(5), torch.tensor([[0]]), max_new_tokens=2, temperature=0, compile=True).tolist() == [
        [0, 1, 2]
    ]
    compilations.frame_count = 0
    generate(model, torch.tensor([[1]]), max_new_tokens=3, compile=True, use_cache=False)
    assert compilations.frame_count == 0  # without a cache no step is like the next


def test_a_text_starts_from_ids_as_well(model, tokenizer):
    ids = tokenizer.encode("En un")
    pieces = "".join(stream_text(model, tokenizer, ids, max_new_tokens=9, seed=4))
    assert "En un" + pieces == generate_text(model, tokenizer, "En un", max_new_tokens=9, seed=4)


def test_a_tokenizer_says_how_texts_begin_and_where_they_end(tokenizer):
    """A model that was trained with a token before each text must see it; and any token that ends a turn ends the text."""
    special = copy.copy(tokenizer)
    first, last = tokenizer.encode("E"), tokenizer.encode("u")

    class Turns(type(tokenizer)):
        add_bos, bos_token_id, end_token_ids = True, first[0], frozenset(last)

    special.__class__ = Turns
    seen = []

    class Watched(Fixed):
        def forward(self, idx):
            seen.append(idx[0].tolist())
            return super().forward(idx)

    text = generate_text(Watched(tokenizer.vocab_size), special, "n", temperature=0, max_new_tokens=100)
    assert seen[0] == first + tokenizer.encode("n")
    assert seen[-1][-1] == last[0] - 1
    assert "u" not in text
