"""Generation: filters against transformers' own, cache == no cache, seeds, stops, streaming, and the sliding window."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmforge import GPT, CharTokenizer, ConfigError, GPTConfig, generate, generate_text, stream_text
from llmforge.generation import Sampling

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
