"""Tokenizers against transformers, tiktoken, and rules worked out by hand; and the laws that any text must obey."""

import base64
import json
import string
import unicodedata

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.errors import ConfigError, ConvertError, DataError
from llmforge.tokenizers import (
    PRE_TOKENIZERS,
    BPETokenizer,
    CharTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    bpe,
    load_tokenizer,
    text_files,
)
from llmforge.tokenizers import base as tokenizers_base
from llmforge.tokenizers.base import bytes_to_characters

SPANISH = (
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.\r\n\r\n"
    "—¡Señor! —dijo Sancho—, ¿qué «gigantes»? I'll say we'RE 12, 345 or 2024...\r\n  Capítulo IX\t\n"
) * 6

# Where tokenizers differ, if they do: line ends, runs of spaces, contractions, digits, marks, emoji, no-break and wide spaces, CJK.
TRICKY = [
    *" \n\r\t'.,-_<>|=@7¿¡«»—ñéaZsS",
    "  ",
    "\r\n",
    "\n\n",
    "'ll",
    "'RE",
    "'s",
    "'ſ",
    "ll ",
    "2024",
    "e\u0301",
    "ﬁ",
    "İ",
]
TRICKY += [
    "🙂",
    "👨‍👩‍👧",
    "中",
    "。",
    "ไทย",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    "\x1c",
    "\u200b",
    "\ufeff",
    "Ⅷ",
    "²",
    "٣",
    "\0",
]
TRICKY += ["<|endoftext|>", " señor", "lugar "]
some_text = st.lists(st.sampled_from(TRICKY) | st.characters(exclude_categories=["Cs"]), max_size=30).map("".join)

BYTES = {bytes_to_characters(bytes([byte])): byte for byte in range(256)}


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def bpe_tokenizer(request):
    return BPETokenizer.from_texts([SPANISH], vocab_size=360, pre_tokenizer=request.param)


@pytest.fixture(scope="module")
def char_tokenizer():
    return CharTokenizer.from_text(SPANISH + "".join(TRICKY))


@pytest.mark.parametrize("kind", ["bpe", "char", "tiktoken"])
def test_own_vocabularies_have_one_special_token(kind, toy_encoding, char_tokenizer):
    encoding, trained = toy_encoding
    tokenizer = {"bpe": trained, "char": char_tokenizer, "tiktoken": TiktokenTokenizer(encoding)}[kind]
    eos, text = tokenizer.eos_token_id, "la<|endoftext|><|endoftext|> de"
    assert tokenizer.bos_token_id == eos
    assert tokenizer.end_token_ids == {eos}
    assert tokenizer.add_bos is False
    assert tokenizer.prompt_ids(text) == tokenizer.encode(text)
    assert eos not in tokenizer.encode(text)
    assert tokenizer.encode_special(text) == [*tokenizer.encode("la"), eos, eos, *tokenizer.encode(" de")]
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"
    assert tokenizer.chat_template is None
    assert [i for ids in tokenizer.encode_pieces(["una ", "olla", " de"]) for i in ids] == tokenizer.encode(
        "una olla de"
    )


def load_in_transformers(tokenizer, folder):
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    # Both kinds of folder: with the config.json of a model whose own tokenizer class is another, and split_special_tokens, since
    # our encode takes a literal "<|endoftext|>" as text.
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0}))
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=True)


# Characters


def test_char_ids_are_nanogpts():
    text = "¡Señor Quijote!\r\n"
    chars = sorted(set(text))  # data/shakespeare_char/prepare.py
    stoi = {ch: i for i, ch in enumerate(chars)}
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.encode(text) == [stoi[c] for c in text]
    assert tokenizer.encode_array(text).dtype == np.uint32
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (len(chars) + 1, len(chars))
    assert "".join(tokenizer.chars) == "".join(chars)


@given(st.text(min_size=1))
def test_char_round_trip_on_any_text(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode_array(text)) == text.encode()


def test_unknown_character_is_named_with_its_place():
    tokenizer = CharTokenizer.from_text("abc ")
    with pytest.raises(DataError, match=r"character 'ß' \(U\+00DF\) at position 4 is not one of the 4 .* BPETokenizer"):
        tokenizer.encode("aab ßc🙂")
    with pytest.raises(
        DataError, match=r"U\+1F642\) at position 1 "
    ):  # beyond the largest code point of the vocabulary
        tokenizer.encode("a🙂")
    with pytest.raises(DataError, match=r"'\\udcff' \(U\+DCFF\) at position 0 "):
        tokenizer.encode("\udcff")


@pytest.mark.parametrize(
    ("chars", "message"), [("", "at least one"), (["ab"], "'ab' is not a single"), (["\ud800"], r"'\\ud800' is not")]
)
def test_char_vocabulary_of_no_characters_is_refused(chars, message):
    with pytest.raises(DataError, match=message):
        CharTokenizer(chars)


def test_char_vocabulary_of_a_file_does_not_depend_on_the_chunks(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("\ufeffaño\r\n🙂".encode())
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 3)  # within ñ and 🙂
    assert CharTokenizer.from_text_file(tmp_path / "a.txt").chars == tuple(sorted("año\r\n🙂"))
    (tmp_path / "b.txt").write_bytes(b"xyz")
    assert CharTokenizer.from_text_file(tmp_path).chars == tuple(sorted("año\r\n🙂xyz"))


@pytest.mark.parametrize("ids", [[3], [-1], [0, 99, 1]])
def test_id_outside_the_vocabulary_is_refused(ids):
    bad = next(i for i in ids if i not in (0, 1))
    with pytest.raises(DataError, match=f"id {bad} is outside the vocabulary of 3 tokens"):
        CharTokenizer("ab").decode(ids)


# Byte-level BPE


@given(text=some_text)
def test_bpe_round_trip_on_any_text(bpe_tokenizer, text):
    ids = bpe_tokenizer.encode(text)
    assert bpe_tokenizer.decode(ids) == text
    assert bpe_tokenizer.decode_bytes(ids) == text.encode()
    assert bpe_tokenizer.eos_token_id not in ids
    np.testing.assert_array_equal(bpe_tokenizer.encode_array(text), ids)


def test_bpe_vocabulary_is_bytes_then_merges_then_end_of_text(bpe_tokenizer):
    assert bpe_tokenizer.vocab_size == 360
    assert bpe_tokenizer.eos_token_id == 359
    assert bpe_tokenizer.decode([359]) == "<|endoftext|>"
    assert {bpe_tokenizer.decode_bytes([i]) for i in range(256)} == {bytes([byte]) for byte in range(256)}
    assert len(bpe_tokenizer.encode(SPANISH)) < 0.6 * len(SPANISH)


def test_bpe_decodes_parts_of_characters():
    tokenizer = BPETokenizer.from_texts([], vocab_size=257)
    first, second = tokenizer.encode("ñ")
    assert tokenizer.decode_bytes([first]) == b"\xc3"
    assert tokenizer.decode([first]) == "\ufffd"
    assert tokenizer.decode([first, second]) == "ñ"


# What llama.cpp computes for each name (src/llama-vocab.cpp), in the regex package; smollm cuts digits out first.
_LLAMA_CPP = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def llama_cpp_words(name, text):
    if name != "smollm":
        return regex.findall(_LLAMA_CPP[name], text)
    parts = regex.findall(r"\p{N}|\P{N}+", text)
    return [word for part in parts for word in regex.findall(_LLAMA_CPP["gpt-2"], part)]


@settings(max_examples=150)
# \x1c is a space in the regex package only.
@given(text=st.lists(st.sampled_from([part for part in TRICKY if part != "\x1c"]), max_size=20).map("".join))
def test_words_are_llama_cpps(bpe_tokenizer, text):
    words = llama_cpp_words(bpe_tokenizer.pre_tokenizer, text)
    found = [word for word, _ in bpe_tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == [bytes_to_characters(word.encode()) for word in words]


def test_training_does_not_depend_on_the_chunks_and_repeats(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(SPANISH.encode())
    vocabularies = []
    for chunk_bytes in (2**20, 2**20, 100):
        monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
        tokenizer = BPETokenizer.from_text_file([tmp_path / "a.txt"], vocab_size=350)
        vocabularies.append(tokenizer.gguf_vocabulary())
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_bpe_learns_line_ends_and_says_what_is_wrong_with_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(SPANISH.encode())
    tokenizer = BPETokenizer.from_text_file(tmp_path, vocab_size=400)
    assert len(tokenizer.encode(".\r\n\r\n")) == 1  # one word, over the end of the line
    (tmp_path / "b.txt").write_bytes("señor".encode("latin-1"))
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text: byte 0xf1 at position 2\. .*'ñ'"):
        BPETokenizer.from_text_file(tmp_path)


def test_bpe_settings_that_cannot_be():
    with pytest.raises(ConfigError, match=r"vocab_size \(256\) must be at least 257"):
        BPETokenizer.from_texts(["abc"], vocab_size=256)
    with pytest.raises(ConfigError, match="unknown pre_tokenizer 'qwen'; did you mean 'qwen2'"):
        BPETokenizer.from_texts(["abc"], pre_tokenizer="qwen")
    with pytest.raises(DataError, match=r"cannot encode 'a\\ud800'"):
        BPETokenizer.from_texts(["abc"], vocab_size=257).encode("a\ud800")


# Hugging Face


@settings(deadline=None)
@given(text=some_text)
def test_autotokenizer_agrees_on_bpe(bpe_in_transformers, text):
    tokenizer, reference = bpe_in_transformers
    ids = reference(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert reference.decode(ids) == text


@pytest.fixture(scope="module")
def bpe_in_transformers(bpe_tokenizer, tmp_path_factory):
    return bpe_tokenizer, load_in_transformers(bpe_tokenizer, tmp_path_factory.mktemp("bpe"))


@settings(deadline=None)
@given(text=st.lists(st.sampled_from(TRICKY), max_size=30).map("".join))
def test_autotokenizer_agrees_on_characters(char_in_transformers, text):
    tokenizer, reference = char_in_transformers
    ids = reference(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert reference.decode(ids) == text


@pytest.fixture(scope="module")
def char_in_transformers(char_tokenizer, tmp_path_factory):
    return char_tokenizer, load_in_transformers(char_tokenizer, tmp_path_factory.mktemp("char"))


def test_autotokenizer_knows_the_special_token(bpe_in_transformers, char_in_transformers):
    for tokenizer, reference in (bpe_in_transformers, char_in_transformers):
        assert len(reference) == reference.vocab_size == tokenizer.vocab_size
        assert reference.eos_token_id == reference.bos_token_id == tokenizer.eos_token_id
        assert reference.decode([tokenizer.eos_token_id]) == "<|endoftext|>"
        assert reference.clean_up_tokenization_spaces is False  # version 4 would write "a." for "a ."


# Files


def test_load_tokenizer_gives_back_what_was_saved(bpe_tokenizer, char_tokenizer, tmp_path):
    for number, tokenizer in enumerate((bpe_tokenizer, char_tokenizer)):
        tokenizer.save(tmp_path / str(number))
        back = load_tokenizer(tmp_path / str(number))
        assert type(back) is type(tokenizer)
        assert back.encode(SPANISH) == tokenizer.encode(SPANISH)
        assert (back.vocab_size, back.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_token_id)
        assert back.gguf_vocabulary() == tokenizer.gguf_vocabulary()


def test_folder_without_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(DataError, match=r"has a merges\.txt but no tokenizer\.json, .* not supported yet"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(DataError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(**changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **changes}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def write_tokenizer_json(folder, *, pre_tokenizer, added=(), normalizer=None, config=None, **model):
    model = {"type": "BPE", "vocab": BYTES, "merges": [], **model}
    content = {
        "version": "1.0",
        "added_tokens": list(added),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }
    content["decoder"] = byte_level()
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tokenizer.json"


def added_token(i, content, **flags):
    defaults = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": content, **defaults, **flags}


# The patterns in the tokenizer.json of Llama 3 and Qwen 2.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gpt-2", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}),
        ("llama-bpe", {"pre_tokenizer": sequence(split(_LLAMA3), byte_level(use_regex=False)), "ignore_merges": True}),
        ("qwen2", {"pre_tokenizer": sequence(split(_QWEN2), byte_level(use_regex=False)), "normalizer": {"type": "NFC"}}),
        ("smollm", {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, byte_level())}),
        (None, {"pre_tokenizer": sequence(split(_LLAMA3), byte_level(use_regex=False))}),  # merges not ignored: not llama.cpp's
        (None, {"pre_tokenizer": sequence(split(_QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|")), byte_level(use_regex=False))}),
        (None, {"pre_tokenizer": sequence(split(_QWEN2), byte_level())}),
        (None, {"pre_tokenizer": byte_level(), "normalizer": {"type": "Lowercase"}}),
    ],
)  # fmt: skip
def test_published_files_are_recognised(tmp_path, name, content):
    tokenizer = BPETokenizer.from_file(write_tokenizer_json(tmp_path, **content))
    assert tokenizer.pre_tokenizer == name
    assert tokenizer.eos_token_id is None
    assert tokenizer.decode(tokenizer.encode("¡ñ 🙂!")) == "¡ñ 🙂!"
    if name is None:
        assert tokenizer.safe_cut("una olla") == 0
        with pytest.raises(ConvertError, match=r"llama\.cpp has no pre-tokenizer .* gpt-2, llama-bpe, qwen2, smollm"):
            tokenizer.gguf_vocabulary()


def test_qwens_normalizer_is_kept(tmp_path):
    path = write_tokenizer_json(
        tmp_path, pre_tokenizer=sequence(split(_QWEN2), byte_level(use_regex=False)), normalizer={"type": "NFC"}
    )
    tokenizer = BPETokenizer.from_file(path)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == unicodedata.normalize("NFC", "e\u0301")


def test_truncation_in_a_file_does_not_shorten_texts(tmp_path):
    path = write_tokenizer_json(tmp_path, pre_tokenizer=byte_level())
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(BPETokenizer.from_file(path).encode("abcdef")) == 6


def test_settings_of_a_published_tokenizer_survive(tmp_path):
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ messages }}",
    }
    vocab = {**BYTES, "<|im_end|>": 256, "<think>": 260}
    added = [added_token(256, "<|im_end|>", special=True), added_token(260, "<think>")]
    path = write_tokenizer_json(tmp_path / "a", pre_tokenizer=byte_level(), added=added, config=config, vocab=vocab)
    tokenizer = load_tokenizer(path.parent)
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (256, 261)
    assert tokenizer.encode("<|im_end|>") != [256]  # special: text is only text
    assert tokenizer.encode("<think>") == [260]  # an ordinary word of the vocabulary
    assert tokenizer.decode([256, 260, 257]) == "<|im_end|><think>"
    vocabulary = tokenizer.gguf_vocabulary()
    assert vocabulary.token_types == [1] * 256 + [3, 5, 5, 5, 4]
    assert len(set(vocabulary.tokens)) == 261
    tokenizer.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == config
    assert load_tokenizer(tmp_path / "b").gguf_vocabulary() == vocabulary


PRECOMPILED = {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode(b"\xff" * 8).decode(),
}  # a panic of the library


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"', "is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("[" * 100_000, "is not valid JSON"),
        ("1" * 5_000, "4300 digits"),
        ("{}", "is not a tokenizer.json"),
        ({"model": None}, "is not a tokenizer.json"),
        ({"model": {"type": "BPE", "vocab": BYTES, "merges": [["a", "nothing"]]}}, "`nothing` out of vocabulary"),
        ({"model": {"type": "BPE", "vocab": {**BYTES, "a": "x"}, "merges": []}}, 'string "x"'),
        ({"model": {"type": "BPE", "vocab": {**BYTES, "ab": 4_000_000_000}, "merges": []}}, "reach 4000000000 with only 257"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "no token for byte 0x00"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "a WordLevel tokenizer is not supported; .*GPT-2"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "add_prefix_space": True}}, "works on characters, not on bytes"),
        ({"normalizer": PRECOMPILED}, "precompiled_charsmap"),
    ],
)  # fmt: skip
def test_damaged_or_foreign_tokenizer_json_is_named(tmp_path, capfd, content, message):
    if isinstance(content, dict) and content:
        whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level(), "decoder": byte_level()}
        content = json.dumps({**whole, "model": {"type": "BPE", "vocab": BYTES, "merges": []}, **content})
    (tmp_path / "tokenizer.json").write_text(str(content), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_damaged_neighbours_and_sizes(tmp_path, monkeypatch):
    path = write_tokenizer_json(tmp_path, pre_tokenizer=byte_level())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": []}')
    assert load_tokenizer(tmp_path).eos_token_id is None
    monkeypatch.setattr(tokenizers_base, "MAX_JSON_BYTES", 1_000)
    with pytest.raises(DataError, match=rf"has {path.stat().st_size:,} bytes; at most 1,000 are allowed"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.json: No such file"):
        BPETokenizer.from_file(tmp_path / "nowhere.json")


def test_chat_template_file_beside_the_config_is_read_and_kept(tmp_path):
    path = write_tokenizer_json(tmp_path, pre_tokenizer=byte_level(), config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("{{ 'ñ' }}", encoding="utf-8")
    tokenizer = BPETokenizer.from_file(path)
    assert tokenizer.chat_template == "{{ 'ñ' }}"
    tokenizer.save(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").chat_template == "{{ 'ñ' }}"
    BPETokenizer.from_texts([], vocab_size=257).save(tmp_path)  # has none, and the old one does not stay
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"cannot read .*chat_template\.jinja: .*0xff"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(DataError, match=r"chat_template\.jinja has 1,048,577 bytes"):
        load_tokenizer(tmp_path)


def test_template_by_the_name_of_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for template, expected in ((named, "d"), (named[:1], None), ([], None), (["x"], None), (5, None), ("s", "s")):
        path = write_tokenizer_json(tmp_path, pre_tokenizer=byte_level(), config={"chat_template": template})
        assert BPETokenizer.from_file(path).chat_template == expected


def test_changed_char_vocabulary_is_refused(tmp_path):
    CharTokenizer("abc").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 0', '"a": 1').replace('"b": 1', '"b": 0'))
    with pytest.raises(DataError, match="not numbered by code point"):
        load_tokenizer(tmp_path)


# tiktoken


@pytest.fixture(scope="module")
def toy_encoding():
    tokenizer = BPETokenizer.from_texts([SPANISH], vocab_size=360, pre_tokenizer="gpt-2")
    ranks = {tokenizer.decode_bytes([i]): i for i in range(359)}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    encoding = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 359})
    return encoding, tokenizer


@given(text=some_text)
def test_tiktoken_and_its_bpe_give_the_same_ids(toy_encoding, text):
    encoding, trained = toy_encoding
    tokenizer = TiktokenTokenizer(encoding)
    ids = tokenizer.encode(text)
    assert ids == encoding.encode_ordinary(text)
    assert ids == trained.encode(text)  # another library, from the same merges
    assert tokenizer.decode(ids) == text
    assert tokenizer.safe_cut(text) == trained.safe_cut(text)


def test_tiktoken_to_bpe_finds_the_merges_again(toy_encoding, tmp_path):
    encoding, trained = toy_encoding
    tokenizer = TiktokenTokenizer(encoding)
    assert tokenizer.gguf_vocabulary() == trained.gguf_vocabulary()
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (360, 359)
    assert tokenizer.decode([359]) == "<|endoftext|>"
    tokenizer.save(tmp_path)
    back = load_tokenizer(tmp_path)
    assert isinstance(back, BPETokenizer)
    assert back.pre_tokenizer == "gpt-2"
    assert back.encode(SPANISH) == tokenizer.to_bpe().encode(SPANISH) == tokenizer.encode(SPANISH)


def test_tiktoken_without_vocabulary_says_how_to_provide_it(monkeypatch):
    def no_network(name):
        raise OSError("unreachable")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    # The file names are the sha1 of the addresses; tiktoken's own convention.
    files = "vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and .*encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
    with pytest.raises(DataError, match=rf"https://.*{files} in a folder.*TIKTOKEN_CACHE_DIR.*BPETokenizer"):
        TiktokenTokenizer("gpt2")


def test_tiktoken_refuses_other_encodings(toy_encoding):
    with pytest.raises(ConfigError, match="knows 'gpt2' only, not 'o200k_base'"):
        TiktokenTokenizer("o200k_base")
    other = tiktoken.Encoding(
        "odd", pat_str=r"\S+|\s+", mergeable_ranks=toy_encoding[0]._mergeable_ranks, special_tokens={}
    )
    with pytest.raises(ConfigError, match="the encoding 'odd' must have GPT-2's pattern"):
        TiktokenTokenizer(other)


# Cutting


@settings(max_examples=150)
@given(text=some_text, more=some_text)
def test_safe_cut_changes_no_id(bpe_tokenizer, text, more):
    cut = bpe_tokenizer.safe_cut(text)
    parts = bpe_tokenizer.encode(text[:cut]) + bpe_tokenizer.encode(text[cut:] + more)
    assert parts == bpe_tokenizer.encode(text + more)


def test_safe_cut_finds_one_where_there_is_one(bpe_tokenizer, char_tokenizer):
    assert bpe_tokenizer.safe_cut("una olla. Y") == len("una olla. Y") - len(". Y") - len(" olla")
    assert bpe_tokenizer.safe_cut("{olla.}") == len("{olla")  # no space anywhere
    assert bpe_tokenizer.safe_cut("12 34 5. ") == 0
    assert char_tokenizer.safe_cut("una olla") == 8
    assert Tokenizer.safe_cut(char_tokenizer, "una olla") == 0  # a tokenizer that knows none of its own


@pytest.mark.parametrize(
    ("token", "flags", "cut"),
    [("<think>", {}, len("a <k b")), ("b c", {}, 0), ("b", {"rstrip": True}, 0), (".", {"single_word": True}, 0), ("<x", {"lstrip": True}, len("a <k b"))],
)  # fmt: skip
def test_safe_cut_minds_added_tokens(tmp_path, token, flags, cut):
    path = write_tokenizer_json(
        tmp_path, pre_tokenizer=byte_level(), added=[added_token(BYTES.get(token, 256), token, **flags)]
    )
    tokenizer, text = BPETokenizer.from_file(path), "a <k b c"
    assert tokenizer.safe_cut(text) == cut
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)


def test_long_texts_are_encoded_in_parts_with_the_same_ids(bpe_tokenizer, monkeypatch):
    whole = bpe_tokenizer.encode(SPANISH)
    monkeypatch.setattr(bpe, "_PART_CHARS", 7)
    assert bpe_tokenizer.encode(SPANISH) == whole


# GGUF


def merged_by_hand(text, vocabulary):
    """llama.cpp's byte-level BPE without words: the leftmost pair of lowest rank first."""
    ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
    parts = list(bytes_to_characters(text.encode()))
    while True:
        pairs = [(ranks[pair], i) for i in range(len(parts) - 1) if (pair := f"{parts[i]} {parts[i + 1]}") in ranks]
        if not pairs:
            return [vocabulary.tokens.index(part) for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_gguf_vocabulary_of_characters_gives_their_ids(char_tokenizer):
    vocabulary = char_tokenizer.gguf_vocabulary()
    text = "".join(TRICKY) + "—¡Señor! 🙂"
    assert merged_by_hand(text, vocabulary) == char_tokenizer.encode(text)
    assert vocabulary.tokens[-1] == "<|endoftext|>"
    assert vocabulary.token_types == [1] * (char_tokenizer.vocab_size - 1) + [3]
    assert vocabulary.pre == "qwen2"


def test_gguf_vocabulary_of_ascii_has_a_merge_that_does_nothing():
    vocabulary = CharTokenizer(string.printable).gguf_vocabulary()
    assert len(vocabulary.merges) == 1
    assert merged_by_hand("a b\n", vocabulary) == CharTokenizer(string.printable).encode("a b\n")


def test_gguf_vocabulary_of_bpe_is_the_trained_one(bpe_tokenizer):
    vocabulary = bpe_tokenizer.gguf_vocabulary()
    words = ["señor", "acordarme", "🙂", "Mancha"]  # each a single word in all four
    assert [merged_by_hand(word, vocabulary) for word in words] == [bpe_tokenizer.encode(word) for word in words]
    assert vocabulary.pre == bpe_tokenizer.pre_tokenizer
    assert vocabulary.token_types == [1] * 359 + [3]
