"""Vocabularies in GGUF, both ways: llama.cpp gives the same ids, and what is read back is the tokenizer that was written."""

import io
import json
import unicodedata

import llama_cpp
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmforge.errors import ConvertError
from llmforge.formats.gguf import read_gguf_header, write_gguf
from llmforge.tokenizers import (
    PRE_TOKENIZERS,
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    tokenizer_from_gguf,
)
from llmforge.tokenizers.backend import END_TOKENS

SPANISH = (
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.\n"
    "—¡Señor! —dijo Sancho—, ¿qué «gigantes»? I'll say we'RE 12, 345 or 2024... aaa aaaa  aaaaa\tdef f(x):\n    return  x\n"
) * 2
TEXTS = [
    "",
    " ",
    "  ",
    "lugar",
    " lugar",
    "\n\n",
    "a\r\nb",
    "é e\u0301",
    "🙂👨‍👩‍👧",
    "中文。한",
    "1234567",
    "I'LL we're",
    "\t\tx",
    "ſ's",
]
TEXTS += [
    SPANISH,
    "<|im_start|>user\nla<|im_end|>",
    "<s>la</s>",
    "<unk>",
    "<0x0A>",
    "\u00a0x\u3000y",
    "x\x7f\u200b",
    "<think> la",
    "<s",
    ".",
]

some_text = st.lists(st.sampled_from(TEXTS) | st.characters(exclude_categories=["Cs", "Mn", "Mc", "Cn"]), max_size=12)
some_text = some_text.map("".join).filter(lambda text: "\0" not in text)


def llama_vocabulary(metadata, folder):
    """llama.cpp with the vocabulary of some metadata."""
    write_gguf(folder / "vocabulary.gguf", "llama", metadata, [])
    return llama_cpp.Llama(str(folder / "vocabulary.gguf"), vocab_only=True, verbose=False)


def llama_ids(vocabulary, text, *, special=False, add_bos=False):
    return vocabulary.tokenize(text.encode(), add_bos=add_bos, special=special)


def through_gguf(tokenizer, folder, *, rows=None):
    """What is read from the file that holds the tokenizer's metadata; arrays and floats are then the file's."""
    write_gguf(folder / "through.gguf", "llama", tokenizer.gguf_vocabulary().metadata(rows=rows), [])
    return tokenizer_from_gguf(read_gguf_header(folder / "through.gguf").metadata, where="through.gguf")


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A toy tokenizer.model with the settings of Llama 2."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SPANISH.split("\n")),
        model_writer=file,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sp")
    (folder / "tokenizer.model").write_bytes(file.getvalue())
    return folder


# The structures of published tokenizer.json files, with merges learnt from SPANISH.

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*, use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PUBLISHED = {
    "llama3": {
        "pre_tokenizer": [split(_LLAMA3), byte_level(use_regex=False)],
        "ignore_merges": True,
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"],
        "config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "model_max_length": 131072},
        "bos": "<|begin_of_text|>",
        "pre": "llama-bpe",
        "ends": {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
    },
    "qwen2": {
        "pre_tokenizer": [split(_LLAMA3.replace("{1,3}", "")), byte_level(use_regex=False)],
        "normalizer": {"type": "NFC"},
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "plain": ["<tool_call>", "<think>"],
        "config": {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "pre": "qwen2",
        "ends": {"<|endoftext|>", "<|im_end|>"},
    },
    "smollm": {
        "pre_tokenizer": [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)],
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
        "config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
        "pre": "smollm",
        "ends": {"<|endoftext|>", "<|im_end|>"},
    },
}  # fmt: skip


def write_published(name, folder):
    """A toy with the steps of a published tokenizer.json; special tokens are outside the model's vocabulary, as in the originals."""
    facts = PUBLISHED[name]
    trained = BPETokenizer.from_texts([SPANISH], vocab_size=330, pre_tokenizer=facts["pre"])
    trained.save(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary.pop("<|endoftext|>", None)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = [*facts["special"], *facts.get("plain", [])]
    content["added_tokens"] = [
        {"id": len(vocabulary) + i, "content": token, **flags, "special": token in facts["special"]}
        for i, token in enumerate(names)
    ]
    content["normalizer"] = facts.get("normalizer")
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": facts["pre_tokenizer"]}
    content["model"]["ignore_merges"] = facts.get("ignore_merges", False)
    if bos := facts.get("bos"):
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ids = {bos: {"id": bos, "ids": [len(vocabulary)], "tokens": [bos]}}
        template = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": ids}
        content["post_processor"] = {"type": "Sequence", "processors": [byte_level(use_regex=True), template]}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}", **facts["config"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return facts


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    facts = write_published(request.param, folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = llama_vocabulary(tokenizer.gguf_vocabulary().metadata(), folder)
    plain = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return facts, tokenizer, plain, AutoTokenizer.from_pretrained(folder), vocabulary, folder


def test_published_structures_give_the_ids_of_transformers_and_llama_cpp(published):
    facts, tokenizer, plain, reference, vocabulary, _ = published
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.pre_tokenizer == facts["pre"]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (len(reference), reference.eos_token_id)
    for text in TEXTS:
        assert tokenizer.encode(text) == plain(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.prompt_ids(text) == plain(text)["input_ids"]
        assert tokenizer.encode_special(text) == reference(text, add_special_tokens=False)["input_ids"]
        composed = unicodedata.normalize("NFC", text)  # llama.cpp does not do what Qwen's normalizer does
        assert tokenizer.encode(composed) == llama_ids(vocabulary, composed)
        assert tokenizer.encode_special(composed) == llama_ids(vocabulary, composed, special=True)
        assert tokenizer.prompt_ids(composed) == llama_ids(vocabulary, composed, add_bos=True)
    assert tokenizer.add_bos is ("bos" in facts)
    assert ("<think>" in reference.get_vocab()) is (
        tokenizer.encode("<think>") == tokenizer.encode_special("<think>")[:1]
    )


def test_end_tokens_are_those_where_llama_cpp_stops(published):
    facts, tokenizer, _, _, vocabulary, _ = published
    model = vocabulary._model.vocab
    ends = {i for i in range(tokenizer.vocab_size) if llama_cpp.llama_vocab_is_eog(model, i)}
    assert tokenizer.end_token_ids == ends
    assert {tokenizer.decode([i]) for i in ends} == facts["ends"]
    assert (tokenizer.bos_token_id or tokenizer.eos_token_id) == llama_cpp.llama_vocab_bos(model)


@settings(max_examples=60, deadline=None)
@given(text=some_text)
def test_published_structures_agree_on_any_text(published, text):
    _, tokenizer, plain, reference, vocabulary, _ = published
    text = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert ids == plain(text, add_special_tokens=False)["input_ids"] == llama_ids(vocabulary, text)
    assert tokenizer.encode_special(text) == reference(text, add_special_tokens=False)["input_ids"]


def test_published_structures_come_back_from_gguf(published, tmp_path):
    _, tokenizer, _, _, _, _ = published
    back = through_gguf(tokenizer, tmp_path)
    assert isinstance(back, BPETokenizer)
    assert back.gguf_vocabulary().metadata() == tokenizer.gguf_vocabulary().metadata()
    assert (back.add_bos, back.end_token_ids, back.chat_template) == (
        tokenizer.add_bos,
        tokenizer.end_token_ids,
        "{{ messages }}",
    )
    for text in map(unicodedata.normalize, ["NFC"] * len(TEXTS), TEXTS):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode_special(text) == tokenizer.encode_special(text)
    back.save(tmp_path / "saved")
    reference = AutoTokenizer.from_pretrained(tmp_path / "saved", split_special_tokens=True)
    assert reference(SPANISH)["input_ids"] == back.prompt_ids(SPANISH)


# Our own vocabularies


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
@pytest.mark.parametrize("rows", [None, 320])
def test_own_bpe_comes_back(tmp_path, pre_tokenizer, rows):
    tokenizer = BPETokenizer.from_texts([SPANISH], vocab_size=300, pre_tokenizer=pre_tokenizer)
    back = through_gguf(tokenizer, tmp_path, rows=rows)
    assert isinstance(back, BPETokenizer)
    assert (back.pre_tokenizer, back.vocab_size, back.add_bos) == (pre_tokenizer, 300, False)
    assert [back.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert back.gguf_vocabulary() == tokenizer.gguf_vocabulary()


def test_metadata_of_own_vocabularies_is_what_llama_cpp_was_given_so_far(tmp_path):
    tokenizer = BPETokenizer.from_texts([], vocab_size=257)
    metadata = tokenizer.gguf_vocabulary().metadata(rows=260)
    tokens, types = metadata.pop("tokenizer.ggml.tokens"), metadata.pop("tokenizer.ggml.token_type")
    assert (tokens[256:], types[255:]) == (
        ["<|endoftext|>", *(f"[UNUSED {i}]" for i in range(257, 260))],
        [1, 3, 5, 5, 5],
    )
    assert metadata == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.merges": ["ĠĀ Ġ"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    assert through_gguf(tokenizer, tmp_path).chat_template is None
    with pytest.raises(ConvertError, match="the model has 256 rows for 257 tokens"):
        tokenizer.gguf_vocabulary().metadata(rows=256)


@pytest.mark.parametrize("chars", [SPANISH, "abc", "🙂"])
@pytest.mark.parametrize("rows", [None, 128])
def test_characters_come_back(tmp_path, chars, rows):
    tokenizer = CharTokenizer(chars)
    back = through_gguf(tokenizer, tmp_path, rows=rows)
    assert isinstance(back, CharTokenizer)
    assert back.chars == tokenizer.chars
    vocabulary = llama_vocabulary(tokenizer.gguf_vocabulary().metadata(rows=rows), tmp_path)
    assert llama_ids(vocabulary, chars) == back.encode(chars)


# SentencePiece


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def sentencepiece_tokenizer(request, sentencepiece_folder, tmp_path_factory):
    """From the file with scores, and from one without, whose scores are derived."""
    tokenizer = SentencePieceTokenizer.from_model_file(sentencepiece_folder / "tokenizer.model")
    if request.param == "tokenizer.json":
        folder = tmp_path_factory.mktemp("json")
        tokenizer.save(folder)
        tokenizer = load_tokenizer(folder)
    return tokenizer, llama_vocabulary(tokenizer.gguf_vocabulary().metadata(), tmp_path_factory.mktemp("gguf"))


def test_llama_cpp_agrees_on_sentencepiece(sentencepiece_tokenizer):
    tokenizer, vocabulary = sentencepiece_tokenizer
    for text in TEXTS:
        assert llama_ids(vocabulary, text) == tokenizer.encode(text)
        assert llama_ids(vocabulary, text, special=True) == tokenizer.encode_special(text)
        assert llama_ids(vocabulary, text, add_bos=True) == tokenizer.prompt_ids(text)
        if not text.startswith(" "):
            assert vocabulary.detokenize(tokenizer.encode(text)).decode().removeprefix(" ") == text


@settings(max_examples=150, deadline=None)
@given(text=some_text.filter(lambda text: "▁" not in text))
def test_llama_cpp_agrees_on_sentencepiece_on_any_text(sentencepiece_tokenizer, text):
    tokenizer, vocabulary = sentencepiece_tokenizer
    assert llama_ids(vocabulary, text) == tokenizer.encode(text)


def test_llama_cpp_with_other_scores_does_not(sentencepiece_tokenizer, tmp_path):
    tokenizer, _ = sentencepiece_tokenizer
    metadata = tokenizer.gguf_vocabulary().metadata()
    metadata["tokenizer.ggml.scores"] = [-score for score in metadata["tokenizer.ggml.scores"]]
    assert llama_ids(llama_vocabulary(metadata, tmp_path), SPANISH) != tokenizer.encode(SPANISH)


@pytest.mark.parametrize("rows", [None, 448])
def test_sentencepiece_comes_back(sentencepiece_tokenizer, tmp_path, rows):
    tokenizer, _ = sentencepiece_tokenizer
    back = through_gguf(tokenizer, tmp_path, rows=rows)
    assert isinstance(back, SentencePieceTokenizer)
    assert back.gguf_vocabulary() == tokenizer.gguf_vocabulary()
    assert (back.add_bos, back.vocab_size, back.end_token_ids) == (True, 420, {2})
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode_special(text) == tokenizer.encode_special(text)
        assert back.decode(back.encode(text)) == text


def test_types_and_settings_of_sentencepiece(sentencepiece_tokenizer):
    metadata = sentencepiece_tokenizer[0].gguf_vocabulary().metadata()
    assert metadata["tokenizer.ggml.token_type"] == [2, 3, 3] + [6] * 256 + [1] * 161
    assert metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert metadata["tokenizer.ggml.add_space_prefix"] is metadata["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.merges" not in metadata
    assert all(type(score) is float for score in metadata["tokenizer.ggml.scores"])


def test_added_tokens_and_no_prefix_in_llama_cpp(sentencepiece_folder, tmp_path):
    tokenizer = SentencePieceTokenizer.from_model_file(sentencepiece_folder / "tokenizer.model")
    metadata = tokenizer.gguf_vocabulary().metadata()
    metadata["tokenizer.ggml.tokens"] += ["<think>", "<|im_end|>"]
    metadata["tokenizer.ggml.token_type"] += [4, 3]
    metadata["tokenizer.ggml.scores"] += [-1e4, -1e4]
    for prefix in (True, False):
        metadata["tokenizer.ggml.add_space_prefix"] = prefix
        ours = tokenizer_from_gguf(metadata, where="memory")
        vocabulary = llama_vocabulary(metadata, tmp_path)
        assert ours.end_token_ids == {2, 421}
        for text in (*TEXTS, "la<think>la <|im_end|> la", "<think><think>", " <think>"):
            assert ours.encode(text) == llama_ids(vocabulary, text)
            assert ours.encode_special(text) == llama_ids(vocabulary, text, special=True)


def test_split_metaspace_with_a_space_inside_a_piece_is_refused(sentencepiece_folder, tmp_path):
    SentencePieceTokenizer.from_model_file(sentencepiece_folder / "tokenizer.model").save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    content |= {"normalizer": None, "pre_tokenizer": metaspace}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConvertError, match="the piece '▁▁' has a space inside"):
        load_tokenizer(tmp_path).gguf_vocabulary()


# Metadata of others


def test_older_files_leave_things_out(tmp_path):
    metadata = BPETokenizer.from_texts([SPANISH], vocab_size=300).gguf_vocabulary().metadata()
    for key in ("add_bos_token", "token_type", "bos_token_id"):
        del metadata[f"tokenizer.ggml.{key}"]
    del metadata["tokenizer.chat_template"]
    vocabulary = llama_vocabulary(metadata, tmp_path)
    tokenizer = tokenizer_from_gguf(metadata, where="old.gguf")
    assert (tokenizer.eos_token_id, tokenizer.add_bos, tokenizer.chat_template) == (299, False, None)
    for text in [*TEXTS, "<|endoftext|>"]:
        assert tokenizer.encode(text) == llama_ids(vocabulary, text)
    metadata["tokenizer.ggml.pre"] = "llama-v3"
    metadata["tokenizer.ggml.bos_token_id"] = 299
    assert tokenizer_from_gguf(metadata, where="old.gguf").prompt_ids("x")[0] == 299  # this one's default
    assert llama_ids(llama_vocabulary(metadata, tmp_path), "x", add_bos=True)[0] == 299


def test_end_token_of_a_wrong_type_is_special_as_in_llama_cpp(tmp_path):
    metadata = BPETokenizer.from_texts([SPANISH], vocab_size=300).gguf_vocabulary().metadata()
    metadata["tokenizer.ggml.tokens"] += ["<|im_end|>", "", "<|im_start|>"]
    metadata["tokenizer.ggml.token_type"] += [4, 5, 3]
    vocabulary, tokenizer = llama_vocabulary(metadata, tmp_path), tokenizer_from_gguf(metadata, where="x.gguf")
    text = "<|im_start|>la<|im_end|>"
    assert tokenizer.encode(text) == llama_ids(vocabulary, text)
    assert tokenizer.encode_special(text) == llama_ids(vocabulary, text, special=True)
    assert tokenizer.end_token_ids == {299, 300}
    assert "<|im_end|>" in END_TOKENS


def key(name, value):
    def change(metadata):
        metadata[f"tokenizer.ggml.{name}"] = value

    return change


def item(name, i, value):
    def change(metadata):
        metadata[f"tokenizer.ggml.{name}"] = list(metadata[f"tokenizer.ggml.{name}"])
        metadata[f"tokenizer.ggml.{name}"][i] = value

    return change


def without(name):
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{name}")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without("model"), "model is 'None'; 'gpt2' .* and 'llama' .* are supported"),
        (key("model", "t5"), "model is 't5'"),
        (key("model", ["gpt2"]), r"model is \"\['gpt2'\]\""),
        (without("pre"), "pre is 'default'; supported are gpt-2, .*llama-bpe.*qwen2.*smollm"),
        (key("pre", "tekken"), "pre is 'tekken'"),
        (key("pre", 7), "pre is '7'"),
        (without("tokens"), r"tokenizer\.ggml\.tokens is missing"),
        (key("tokens", []), "there are 0 tokens"),
        (key("tokens", "abc"), "tokens is of the type str; it must be a list"),
        (item("tokens", 3, 4), "tokens has '4' at 3; it must have str values"),
        (item("tokens", 3, "A"), "the tokens 3 and .* are both 'A'|the tokens .* and 3 are both 'A'"),
        (key("token_type", [1]), r"token_type has 1 values for 300 tokens"),
        (item("token_type", 5, 9), "the token 5 .* has the unknown type 9"),
        (item("token_type", 5, 1.5), "token_type has '1.5' at 5; it must have int values"),
        (item("token_type", 5, True), "token_type has 'True' at 5"),
        (without("merges"), r"tokenizer\.ggml\.merges is missing"),
        (key("merges", {"a": 1}), "merges is of the type dict"),
        (item("merges", 2, "zz qq"), r"the merge 2 \('zz qq'\) has the part 'zz', which is no token"),
        (item("merges", 2, "ab"), r"the merge 2 \('ab'\) has the part"),
        (item("merges", 2, ""), r"the merge 2 \(''\) has the part ''"),
        (item("merges", 2, 5), "merges has '5' at 2"),
        (key("eos_token_id", 300), r"eos_token_id is '300'; it must be the id of one of the 300 tokens"),
        (key("eos_token_id", -1), "eos_token_id is '-1'"),
        (key("bos_token_id", "1"), "bos_token_id is '1'"),
        (key("padding_token_id", True), "padding_token_id is 'True'"),
        (key("add_bos_token", 1), "add_bos_token is '1'; it must be true or false"),
        (lambda metadata: metadata.update({"tokenizer.chat_template": 3}), "chat_template is of the type int"),
        (lambda metadata: item("tokens", metadata["tokenizer.ggml.tokens"].index("!"), "!!!")(metadata),
         "there is no token for byte 0x21"),
    ],
)  # fmt: skip
def test_damaged_metadata_of_byte_level_bpe_is_named(change, what):
    metadata = BPETokenizer.from_texts([SPANISH], vocab_size=300).gguf_vocabulary().metadata()
    change(metadata)
    with pytest.raises(ConvertError, match=what) as caught:
        tokenizer_from_gguf(metadata, where="toy.gguf")
    assert "the tokenizer in toy.gguf cannot be used" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (without("scores"), r"tokenizer\.ggml\.scores is missing"),
        (key("scores", [0.0]), "scores has 1 values for 420 tokens"),
        (key("scores", [0.0] * 420), "have the same score 0.0"),
        (item("scores", 300, float("nan")), "the token 300 .* has the score nan"),
        (item("scores", 300, "x"), "scores has 'x' at 300; it must have float values"),
        (item("tokens", 300, "x" * 600), "the token 300 has 600 characters; at most 512"),
        (item("tokens", 13, "x" * 60), "there is no token <0x0A>"),
        (key("add_space_prefix", "yes"), "add_space_prefix is 'yes'"),
        (key("unknown_token_id", 1.0), "unknown_token_id is '1.0'"),
    ],
)
def test_damaged_metadata_of_sentencepiece_is_named(sentencepiece_tokenizer, change, what):
    metadata = sentencepiece_tokenizer[0].gguf_vocabulary().metadata()
    change(metadata)
    with pytest.raises(ConvertError, match=what):
        tokenizer_from_gguf(metadata, where="toy.gguf")
