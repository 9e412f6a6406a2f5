"""SentencePiece's tokenizer.model and Llama's tokenizer.json against sentencepiece, transformers and the tokenizers library."""

import io
import json
import struct

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protobuf
from transformers import AutoTokenizer

from llmforge.errors import ConvertError, DataError
from llmforge.formats import sentencepiece as formats
from llmforge.formats.sentencepiece import read_sentencepiece_model
from llmforge.tokenizers import BPETokenizer, SentencePieceTokenizer, load_tokenizer
from llmforge.tokenizers import sentencepiece as tokenizer_module

SPANISH = (
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.\n"
    "—¡Señor! —dijo Sancho—, ¿qué «gigantes»? I'll say we'RE 12, 345 or 2024... aaa aaaa  aaaaa\tdef f(x):\n    return  x\n"
)

# Where tokenizers differ, if they do.
TRICKY = [
    *" \n\r\t\0\x7f'.,-<>|¿ñéaZ0",
    "  ",
    "     ",
    "\r\n",
    "la",
    " lugar",
    "aa",
    "2024",
    "e\u0301",
    "ﬁ",
    "🙂",
    "👨‍👩‍👧",
    "中",
    "한",
]
TRICKY += [
    "\u00a0",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\x85",
    "²",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "0x",
    "<s",
    "def f",
    "\U0010ffff",
]
some_text = st.lists(st.sampled_from(TRICKY) | st.characters(exclude_categories=["Cs"]), max_size=25).map("".join)
some_text = some_text.filter(lambda text: "▁" not in text)


def train(**changes) -> bytes:
    """A toy tokenizer.model, trained by sentencepiece itself with the settings of Llama 2."""
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
        **changes,
    }
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SPANISH.split("\n") * 3), model_writer=file, **options
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def model_bytes():
    return train()


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no_prefix"])
def pair(request, tmp_path_factory):
    """Our tokenizer, sentencepiece's, and the folder of the file; with and without the space before a text."""
    folder = tmp_path_factory.mktemp("sp")
    (folder / "tokenizer.model").write_bytes(train(add_dummy_prefix=request.param))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return SentencePieceTokenizer.from_model_file(folder / "tokenizer.model"), reference, folder


@pytest.fixture(scope="module")
def tokenizer(model_bytes, tmp_path_factory):
    return from_bytes(model_bytes, tmp_path_factory.mktemp("toy"))


def from_bytes(data, folder):
    (folder / "tokenizer.model").write_bytes(data)
    return SentencePieceTokenizer.from_model_file(folder / "tokenizer.model")


def edited(data, edit) -> bytes:
    """The model after `edit` of its protobuf message."""
    model = protobuf.ModelProto()
    model.ParseFromString(data)
    edit(model)
    return model.SerializeToString()


# The file


def test_what_is_read_is_what_protobuf_reads(model_bytes, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    ours = read_sentencepiece_model(tmp_path / "tokenizer.model")
    theirs = protobuf.ModelProto()
    theirs.ParseFromString(model_bytes)
    assert [(piece.text, piece.score, piece.type) for piece in ours.pieces] == [
        (piece.piece, piece.score, piece.type) for piece in theirs.pieces
    ]
    for name in ("model_type", "byte_fallback", "treat_whitespace_as_suffix", "unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(ours, name) == getattr(theirs.trainer_spec, name)
    for name in ("name", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces", "precompiled_charsmap"):
        assert getattr(ours, name) == getattr(theirs.normalizer_spec, name)
    assert ours.pad_id == -1  # negative numbers have ten bytes


def test_settings_that_the_file_leaves_out_are_the_formats(model_bytes, tmp_path):
    def clear(model):
        model.trainer_spec.Clear()
        model.normalizer_spec.Clear()

    (tmp_path / "tokenizer.model").write_bytes(edited(model_bytes, clear))
    ours, theirs = read_sentencepiece_model(tmp_path / "tokenizer.model"), protobuf.ModelProto()
    assert ours.model_type == theirs.trainer_spec.model_type == formats.UNIGRAM
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, -1)
    assert ours.add_dummy_prefix is theirs.normalizer_spec.add_dummy_prefix is True
    assert ours.remove_extra_whitespaces is theirs.normalizer_spec.remove_extra_whitespaces is True


@settings(max_examples=400)
@given(data=st.data())
def test_damaged_model_is_a_data_error_or_a_model(model_bytes, tmp_path_factory, data):
    damaged = bytearray(model_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        # Most at the ends, where the lengths and the settings are.
        near = st.integers(0, 40) | st.integers(len(damaged) - 300, len(damaged) - 1) | st.integers(0, len(damaged) - 1)
        damaged[data.draw(near)] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    end = data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))
    folder = tmp_path_factory.mktemp("damaged")
    try:
        tokenizer = from_bytes(bytes(damaged[:end]), folder)
    except DataError as error:  # anything else is a failure
        message = str(error)
    else:
        message = ""
        assert tokenizer.decode(tokenizer.encode("ñ la\n")) == "ñ la\n"
    assert not message or str(folder / "tokenizer.model") in message


def field(number, wire_type, content=b""):
    return bytes([number << 3 | wire_type]) + content


def message(number, content):
    assert len(content) < 128
    return field(number, 2, bytes([len(content)]) + content)


PIECE = message(1, message(1, b"<unk>") + field(3, 0, b"\x02"))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is not a SentencePiece model: it begins with b''"),
        (b"GGUF\3\0\0\0", "begins with b'GGUF"),
        (b"IQ== 0\nIg== 1\n", r"vocabulary of tiktoken \(base64 lines.*Llama 3.*tokenizer\.json of the same model"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "begins with b'<!DOCTYP'"),
        (PIECE[:-1], "field 1 has 9 bytes, 8 are left"),
        (PIECE + field(2, 2, b"\xff\xff\xff\xff\x7f"), "field 2 has 34,359,738,367 bytes, 0 are left"),
        (PIECE + field(2, 2, b"\xff" * 12), "a number that does not end"),
        (PIECE + field(2, 0, b"\1"), "field trainer_spec has the wire type 0"),
        (PIECE + field(9, 3), "unknown wire type 3"),
        (PIECE + message(1, message(1, b"\xc3")), r"b'\\xc3' is not UTF-8"),
        (PIECE + message(1, message(1, b"")), "a piece of 0 bytes; 1 to 512 are possible"),
        (PIECE + message(1, b""), "a piece of 0 bytes"),
        (PIECE + message(1, message(1, b"a") + field(3, 0, b"\7")), "the piece 'a' has the unknown type 7"),
        (PIECE + message(1, message(1, b"a") + field(2, 5, struct.pack("<f", float("nan")))), "'a' has the score nan"),
        (PIECE + message(1, message(1, b"a") + field(2, 0, b"\1")), "field score has the wire type 0"),
        (PIECE + PIECE, "the pieces 0 and 1 are both '<unk>'"),
        (PIECE + message(2, field(3, 0, b"\x09")), "unknown model type 9"),
        (PIECE, "bos_id is 1, but there are 1 pieces"),
        (PIECE.replace(b"\x18\x02", b"\x18\x01") + message(1, message(1, b"a")) * 1 + message(1, message(1, b"b")),
         r"unk_id is 0, but the unknown pieces are \[\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model_is_said(tmp_path, data, what):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(DataError, match=what) as caught:
        SentencePieceTokenizer.from_model_file(path)
    assert str(path) in str(caught.value)


def test_sizes_are_checked_before_use(model_bytes, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_bytes)
    monkeypatch.setattr(formats, "MAX_PIECES", 10)
    with pytest.raises(DataError, match="more than 10 pieces"):
        read_sentencepiece_model(path)
    monkeypatch.setattr(formats, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=rf"has {len(model_bytes):,} bytes; .* more than 100 is something else"):
        read_sentencepiece_model(path)
    for nothing in (tmp_path, tmp_path / "nowhere.model"):
        with pytest.raises(DataError, match="no such file"):
            read_sentencepiece_model(nothing)


def set_type(token, kind):
    def edit(model):
        next(piece for piece in model.pieces if piece.piece == token).type = kind

    return edit


def set_field(spec, name, value):
    return lambda model: setattr(getattr(model, spec), name, value)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (set_field("trainer_spec", "model_type", 1), "a Unigram model of SentencePiece is not supported, BPE is"),
        (set_field("trainer_spec", "model_type", 4), "a Char model"),
        (set_field("trainer_spec", "byte_fallback", False), "byte_fallback is off"),
        (set_field("trainer_spec", "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix is True, False is"),
        (set_field("normalizer_spec", "remove_extra_whitespaces", True), "remove_extra_whitespaces is True, False is"),
        (set_field("normalizer_spec", "escape_whitespaces", False), "escape_whitespaces is False, True is"),
        (set_field("normalizer_spec", "precompiled_charsmap", b"\1\2"), "normalizer 'identity' changes texts"),
        (set_type("<0x41>", 1), "there is no piece <0x41> of the type BYTE"),
        (set_type("de", 5), r"the piece \d+ \('de'\) is of the type UNUSED"),
        (set_type("de", 4), r"\('de'\) is of the type USER_DEFINED and add_dummy_prefix is on"),
        (lambda model: setattr(model.pieces[262], "score", model.pieces[263].score), r"the pieces 'ch' and 'de' have the same score -4\.0"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_expressed_are_refused(model_bytes, tmp_path, edit, what):
    from_bytes(model_bytes, tmp_path)
    with pytest.raises(DataError, match=what):
        from_bytes(edited(model_bytes, edit), tmp_path)


# Ids


@settings(max_examples=200)
@given(text=some_text)
def test_ids_are_sentencepieces(pair, text):
    tokenizer, reference, _ = pair
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode_array(text), ids)


def test_sentencepieces_with_other_scores_would_be_others(model_bytes, tmp_path):
    def reverse(model):
        normal = [piece for piece in model.pieces if piece.type == 1]
        scores = [piece.score for piece in normal]
        for piece, score in zip(normal, reversed(scores), strict=True):
            piece.score = score

    tokenizer = from_bytes(edited(model_bytes, reverse), tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    right = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    assert tokenizer.encode(SPANISH) == reference.encode(SPANISH) != right.encode(SPANISH)


@settings(max_examples=200, deadline=None)
@given(text=some_text)
def test_autotokenizer_reads_what_save_writes(saved, text):
    tokenizer, reference, plain = saved
    assert plain(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert plain(text)["input_ids"] == tokenizer.prompt_ids(text)
    assert reference(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_special(text)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    """Our tokenizer, and transformers' of its folder: as it is, and with split_special_tokens, since our `encode` takes "<s>" as text."""
    tokenizer, _, _ = pair
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama"})
    )  # whose own class would read it in another way
    back = load_tokenizer(folder)
    assert isinstance(back, SentencePieceTokenizer)
    assert back.encode(SPANISH) == tokenizer.encode(SPANISH)
    plain = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return tokenizer, AutoTokenizer.from_pretrained(folder), plain


def test_llama_tokenizer_of_transformers_agrees_on_the_original_file(tokenizer, model_bytes, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("En un lugar", SPANISH, "¿Qué 🙂?", "aaaaaaa  b", ""):
        assert reference(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_special_tokens_are_text_or_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 420)
    assert not {0, 1, 2} & set(tokenizer.encode("<s>la</s><unk>"))
    la = tokenizer.encode("la")
    assert tokenizer.encode_special("<s>la</s>") == [1, *la, 2]
    assert tokenizer.decode([1, *la, 2]) == "<s> la</s>"
    assert tokenizer.end_token_ids == {2}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_decode_strips_the_first_space_and_decode_bytes_does_not(pair):
    tokenizer, reference, _ = pair
    for text in ("lugar", " lugar", "  a", "", " "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids) == text
    assert tokenizer.decode_bytes(tokenizer.encode("lugar")) == (b" lugar" if tokenizer._prefix == "each" else b"lugar")
    first, *others = tokenizer.encode("🙂")[-4:]
    assert tokenizer.decode_bytes([first]) == b"\xf0"
    assert tokenizer.decode([first, *others]) == "🙂"


def test_what_cannot_be_encoded_is_named(tokenizer):
    with pytest.raises(DataError, match=r"cannot encode '.*\\ud800'"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="id 420 is outside the vocabulary of 420"):
        tokenizer.decode([420])


# Long texts


@given(text=some_text, sizes=st.lists(st.integers(1, 6), min_size=1), part=st.integers(1, 9))
def test_parts_of_a_text_have_the_ids_of_the_whole(pair, text, sizes, part):
    tokenizer, reference, _ = pair
    whole = reference.encode(text)
    pieces, start = [], 0
    while start < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[start : start + size])
        start += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PART_CHARS", part)
        assert tokenizer.encode(text) == whole
        assert [i for ids in tokenizer.encode_pieces(pieces) for i in ids] == whole


def test_a_long_text_is_cut_where_no_piece_reaches_over(tokenizer, model_bytes, tmp_path):
    parts = [len(ids) for ids in tokenizer.encode_pieces([SPANISH] * 20)]
    assert len(parts) == 21  # the last one is what follows the last cut
    assert max(parts) < 2 * len(tokenizer.encode(SPANISH))
    assert tokenizer._last_cut("中文") == 1  # of no piece, as bytes
    assert tokenizer._last_cut("aaa") == 0

    def reach(model):
        model.pieces[-1].piece = "z▁q"

    other = from_bytes(edited(model_bytes, reach), tmp_path)
    assert (tokenizer._last_cut("z q"), other._last_cut("z q"), other._last_cut("z▁q")) == (1, 0, 0)


def test_a_text_without_a_place_to_cut_is_searched_once(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_SEARCHED_CHARS", 4)
    assert tokenizer._last_cut("中aaaa") == 0  # beyond what is searched
    assert tokenizer._last_cut("中aaa") == 1
    pieces = ["中aaaa", "aaa", "aa文", "aaa"]
    assert [i for ids in tokenizer.encode_pieces(pieces) for i in ids] == tokenizer.encode("".join(pieces))


# tokenizer.json

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.fixture
def saved_json(tokenizer, tmp_path):
    """Path and content of a tokenizer.json as Llama 2 has it, for changes."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    return path, json.loads(path.read_text(encoding="utf-8"))


def changed(path, content, **changes):
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("split", [True, False])
def test_metaspace_gives_the_librarys_ids(saved_json, scheme, split, monkeypatch):
    path, content = saved_json
    metaspace = {**METASPACE, "prepend_scheme": scheme, "split": split}
    tokenizer = SentencePieceTokenizer.from_file(changed(path, content, normalizer=None, pre_tokenizer=metaspace))
    reference = tokenizers.Tokenizer.from_file(str(path))
    monkeypatch.setattr(tokenizer_module, "_PART_CHARS", 5)
    for text in ("", " ", "lugar", " lugar", "  lugar", "a <b>", SPANISH, "🙂 \n\n  x"):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        if scheme == "never" or not text.startswith(" "):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ("<s>lugar</s> de", "<s> lugar"):
        assert tokenizer.encode_special(text) == reference.encode(text, add_special_tokens=False).ids


def test_added_tokens_are_honoured(saved_json):
    path, content = saved_json
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [*content["added_tokens"], {"id": 420, "content": "<think>", **flags, "special": False}]
    added.append({"id": 421, "content": "<|im_end|>", **flags, "special": True})
    changed(path, content, added_tokens=added)
    config = json.loads((path.parent / "tokenizer_config.json").read_text())
    declared = {"422": {"content": "<pad>", "special": True}, "0": {"content": "<unk>", "special": True}}
    config |= {
        "added_tokens_decoder": declared,
        "pad_token": "<pad>",
        "model_max_length": 77,
        "chat_template": "{{ 1 }}",
    }
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(path.parent)
    reference = AutoTokenizer.from_pretrained(path.parent)
    assert (tokenizer.vocab_size, len(reference)) == (423, 423)
    assert tokenizer.special_tokens["pad_token"] == "<pad>"
    assert tokenizer.end_token_ids == {2, 421}
    for text in ("a<think> la", "<think>", "la <think>la <|im_end|>\n<pad>x", SPANISH):
        assert tokenizer.encode_special(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert 420 in tokenizer.encode("a<think> la")
    assert not {421, 422} & set(tokenizer.encode("<|im_end|><pad>"))
    assert next(tokenizer.encode_pieces(["a<thi", "nk> la"])).tolist() == tokenizer.encode("a<think> la")
    tokenizer.save(path.parent / "again")
    back = load_tokenizer(path.parent / "again")
    assert back._config == tokenizer._config | {"clean_up_tokenization_spaces": False}
    assert back.encode_special("<pad><think>") == tokenizer.encode_special("<pad><think>")
    assert back.gguf_vocabulary() == tokenizer.gguf_vocabulary()


def test_added_tokens_of_old_folders_are_honoured(model_bytes, tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 420}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "eos_token": {"content": "</s>"}}')
    tokenizer = from_bytes(model_bytes, tmp_path)
    assert tokenizer.special_tokens["pad_token"] == "<pad>"
    assert tokenizer.encode_special("<pad>") == [420]
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 500}')
    with pytest.raises(DataError, match=r"gives '<pad>' the id 500, but it would get 420"):
        from_bytes(model_bytes, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": "x"}')
    with pytest.raises(DataError, match=r"gives '<pad>' the id 'x'; it must be a number"):
        from_bytes(model_bytes, tmp_path)


@pytest.mark.parametrize(
    ("config", "processor", "add_bos"),
    [({}, True, True), ({}, False, False), ({"add_bos_token": False}, True, True), ({"add_bos_token": True}, False, False),
     ({"bos_token": None}, True, True), ({"bos_token": "</s>"}, True, True)],
)  # fmt: skip
def test_bos_is_added_where_autotokenizer_adds_it(saved_json, config, processor, add_bos):
    path, content = saved_json
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = {"type": "Sequence", "processors": [byte_level, content["post_processor"]]}  # as Llama 3 has it
    changed(path, content, post_processor=steps if processor else None)
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    path.with_name("tokenizer_config.json").write_text(json.dumps(names | config))
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer.add_bos is add_bos
    ids = AutoTokenizer.from_pretrained(path.parent)("lugar")["input_ids"]
    assert tokenizer.prompt_ids("lugar") == ids
    assert (ids[0] == 1) is add_bos


def test_a_model_file_without_settings_has_bos(model_bytes, tmp_path):
    assert from_bytes(model_bytes, tmp_path).prompt_ids("la")[0] == 1
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert from_bytes(model_bytes, tmp_path).prompt_ids("la") == from_bytes(model_bytes, tmp_path).encode("la")
    (tmp_path / "tokenizer_config.json").unlink()
    no_bos = edited(model_bytes, set_field("trainer_spec", "bos_id", -1))
    assert from_bytes(no_bos, tmp_path).bos_token_id is None
    assert from_bytes(no_bos, tmp_path).add_bos is False


def test_user_defined_pieces_without_a_prefix_are_found_first(tmp_path):
    data = train(add_dummy_prefix=False, user_defined_symbols=["\n", "lugar de", "<code>"])
    tokenizer = from_bytes(data, tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in (SPANISH, "\n\n lugar", "<code>\n  x</code>", "un lugar dela", "<cod"):
        assert tokenizer.encode(text.replace(" de", " d")) == reference.encode(text.replace(" de", " d"))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "model", "what"),
    [
        ({"normalizer": {"type": "Lowercase"}}, {}, r"steps \['Lowercase'\] before the merges"),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, {}, r"steps \['Prepend'\]"),
        ({"pre_tokenizer": METASPACE}, {}, r"steps \['Prepend', 'Replace', 'Metaspace'\]"),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "replacement": "_"}}, {}, "spaces become '_', not U\\+2581"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, {}, "'WhitespaceSplit'"),
        ({}, {"dropout": 0.5}, "dropout is 0.5"),
        ({}, {"ignore_merges": True}, "ignore_merges is True"),
        ({}, {"end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
        ({}, {"byte_fallback": False}, "works on characters, not on bytes"),
        ({}, {"merges": [["zz", "qq"]]}, "is not a tokenizer.json that can be read"),
    ],
)  # fmt: skip
def test_tokenizer_json_of_another_kind_is_named(saved_json, changes, model, what):
    path, content = saved_json
    changed(path, content, **changes, model=content["model"] | model)
    with pytest.raises(DataError, match=what) as caught:
        load_tokenizer(path.parent)
    assert str(path) in str(caught.value)


def test_tokenizer_json_without_a_byte_is_refused(saved_json):
    path, content = saved_json
    vocabulary = {("~" if token == "<0x0A>" else token): i for token, i in content["model"]["vocab"].items()}
    changed(path, content, model=content["model"] | {"vocab": vocabulary})
    with pytest.raises(DataError, match="there is no token <0x0A>"):
        load_tokenizer(path.parent)


@pytest.mark.parametrize(
    ("declared", "what"),
    [
        ({"x": {"content": "a"}}, "has 'x'"),
        ({"9" * 30: {"content": "a"}}, "has '9999"),
        ({"420": "a"}, "has '420': a; it must give an id an object"),
        ({"420": {"content": 5}}, "has '420'"),
        ({"420": {"content": ""}}, "has '420'"),
        ({"421": {"content": "<x>"}}, "gives '<x>' the id 421, but it would get 420"),
        ([1], r"has '\[1\]'"),
    ],
)
def test_tokens_that_a_config_cannot_add_are_named(saved_json, declared, what):
    path, _ = saved_json
    path.with_name("tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    with pytest.raises(DataError, match=what):
        load_tokenizer(path.parent)


def test_byte_level_file_is_not_taken_for_one(tmp_path):
    BPETokenizer.from_texts([SPANISH], vocab_size=300).save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), BPETokenizer)
    with pytest.raises(DataError, match="a BPE tokenizer without byte fallback is not supported"):
        SentencePieceTokenizer.from_file(tmp_path / "tokenizer.json")


# Scores of a tokenizer.json


def test_derived_scores_give_the_same_merges(tokenizer, saved_json):
    path, content = saved_json
    vocabulary = SentencePieceTokenizer.from_file(path).gguf_vocabulary()
    original = tokenizer.gguf_vocabulary()
    assert vocabulary.scores != original.scores
    mergeable = {token for token, kind in zip(original.tokens, original.token_types, strict=True) if kind == 1}
    orders = [
        tokenizer_module.merges_of_scores(
            {token: score for token, score in zip(v.tokens, v.scores, strict=True) if token in mergeable}
        )
        for v in (original, vocabulary)
    ]
    assert orders[0] == orders[1] == [tuple(pair) for pair in content["model"]["merges"]]


def test_merges_without_scores_are_refused(saved_json):
    path, content = saved_json
    merges = content["model"]["merges"]
    triple = next(i for i, (left, right) in enumerate(merges) if len(left + right) > 2)
    changed(path, content, model=content["model"] | {"merges": merges[:triple] + merges[triple + 1 :]})
    with pytest.raises(ConvertError, match=r"does not merge '.+' and '.+', but llama\.cpp would"):
        load_tokenizer(path.parent).gguf_vocabulary()
    twice = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    moved = merges[:twice] + merges[twice + 1 :] + [merges[twice]]
    changed(path, content, model=content["model"] | {"merges": moved})
    with pytest.raises(ConvertError, match=r"has merges that make .* between those that make"):
        load_tokenizer(path.parent).gguf_vocabulary()
