"""Text from many sources: readers, documents, the cache that goes on after a kill, splits, mixtures, near-duplicates."""

import csv
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TEXT

from llmforge.cli.main import main
from llmforge.cli.run_config import RunConfig
from llmforge.data import MixedDataset, NearDuplicates, TokenDataset, dataset, near_duplicates, token_file
from llmforge.data.joined import JoinedIds
from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers import BPETokenizer, CharTokenizer, WordPieceTokenizer, bpe, fast_bpe, record_files, text_files
from llmforge.tokenizers.sources import TextSource, text_sources

# Accents, ñ, an accent as a combining character, CRLF, LINE SEPARATOR, quotes and separators of tables.
SPANISH = '¿Qué señor? n\u0303andu\u0301\r\nuna; "olla",\tde\u2028algo más 🙂'
RECORDS = ["Un hidalgo, de los de lanza", SPANISH, "última\n\nlínea"]


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer.from_text("".join(map(chr, range(32, 256))) + "\n\r\t" + SPANISH + "—")


@pytest.fixture(scope="module")
def bpe_tokenizer():
    return BPETokenizer.from_texts([SPANISH * 4], vocab_size=270)


def documents_of(data, tokenizer):
    """The texts between the end-of-text ids."""
    ids = np.asarray(data.ids)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [
        tokenizer.decode(part[: -1 if part[-1] == tokenizer.eos_token_id else None])
        for part in np.split(ids, ends[:-1] + 1)
    ]


def ticking():
    """A progress function, and what it was called with."""
    ticks = []
    return ticks, lambda *done: ticks.append(done)


def write_records(path, records=RECORDS, field="body"):
    """A file of records in the format that its name says, as other programs write it."""
    opened = gzip.open if path.suffix == ".gz" else open
    kind = path.suffixes[0]
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            file.writelines(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in records)
        elif kind == ".json":
            json.dump([{field: text, "id": 2} for text in records], file)
        else:
            dialect = dict(delimiter="\t") if kind == ".tsv" else dict(delimiter=";") if "semi" in path.name else {}
            writer = csv.writer(file, **dialect)
            writer.writerows([["id", field], *([str(i), text] for i, text in enumerate(records))])
    return path


# Readers


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "semi.csv", "a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("chunk_bytes", [3, 2**22])
def test_records_of_every_format_are_documents(tmp_path, tokenizer, monkeypatch, name, chunk_bytes):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    source = {"path": write_records(tmp_path / name), "field": "body"}
    data = TokenDataset.from_sources(source, tokenizer, cache_dir=tmp_path / "cache")
    assert documents_of(data, tokenizer) == RECORDS
    assert data.bytes_per_token == sum(len(text.encode()) for text in RECORDS) / len(data)


def test_parquet_is_read_by_column(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(1001)), "body": [*RECORDS, None, *(f"n. {i}" for i in range(997))]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    data = TokenDataset.from_sources({"path": tmp_path / "a.parquet", "field": "body"}, tokenizer)
    assert documents_of(data, tokenizer) == [*RECORDS, *(f"n. {i}" for i in range(997))]
    with pytest.raises(
        DataError, match=r"a\.parquet has no field 'bodi'; its fields are 'id', 'body'; did you mean 'body'\?"
    ):
        TokenDataset.from_sources({"path": tmp_path / "a.parquet", "field": "bodi"}, tokenizer)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(DataError, match=r"cannot read .*bad\.parquet"):
        TokenDataset.from_sources(tmp_path / "bad.parquet", tokenizer)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'llmforge\[parquet\]'"):
        TokenDataset.from_sources(tmp_path / "a.parquet", tokenizer)


def test_zstandard_is_read_or_explained(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"(\xb5/\xfd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "zstandard", None)
        patch.setitem(sys.modules, "compression", None)
        with pytest.raises(DataError, match="needs a package that is not installed: pip install zstandard"):
            TokenDataset.from_sources(tmp_path / "a.txt.zst", tokenizer)
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(SPANISH.encode()))
    assert tokenizer.decode(TokenDataset.from_sources(tmp_path / "a.txt.zst", tokenizer).ids) == SPANISH


def test_data_sets_of_the_hub(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    write_records(tmp_path / "train.jsonl")
    write_records(tmp_path / "test.jsonl", ["prueba"])
    (tmp_path / "hub").mkdir()
    for name in ("train", "test"):
        os.rename(tmp_path / f"{name}.jsonl", tmp_path / "hub" / f"{name}.jsonl")
    data = TokenDataset.from_sources({"path": f"hf:{tmp_path / 'hub'}", "field": "body"}, tokenizer)
    assert documents_of(data, tokenizer) == RECORDS
    datasets.Dataset.from_dict({"text": RECORDS}).save_to_disk(tmp_path / "saved")
    data = TokenDataset.from_sources(f"hf:{tmp_path / 'saved'}", tokenizer)
    assert documents_of(data, tokenizer) == RECORDS
    with pytest.raises(DataError, match=r"has no field 'texto'; its fields are 'text'; did you mean 'text'\?"):
        TokenDataset.from_sources({"path": f"hf:{tmp_path / 'saved'}", "field": "texto"}, tokenizer)


class StandIn:
    """What is used of a datasets.Dataset."""

    def __init__(self, asked):
        self.asked, self.column_names, self._fingerprint = asked, ["text", "id"], "f" + "".join(map(str, asked))
        self.data = types.SimpleNamespace(nbytes=100)

    def __len__(self):
        return len(RECORDS)

    def select_columns(self, names):
        assert names == ["text"]
        return self

    def iter(self, batch_size):
        yield {"text": RECORDS[:2]}
        yield {"text": RECORDS[2:]}


def test_names_of_the_hub_mean_name_config_and_split(tmp_path, tokenizer, monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        if names[0] == "no/one":
            raise FileNotFoundError("no such data set")
        return StandIn(asked[-1])

    fake = types.SimpleNamespace(__version__="4.1.0", load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for name in ("hf:owner/name", "hf:owner/name:es", "hf:owner/name:es:test", "hf:owner/name::test"):
        ticks, tick = ticking()
        data = TokenDataset.from_sources(name, tokenizer, cache_dir=tmp_path, progress=tick)
        assert documents_of(data, tokenizer) == RECORDS
        assert ticks[-1] == (100, 100)
    assert asked == [
        ("owner/name", None, {"split": "train"}),
        ("owner/name", "es", {"split": "train"}),
        ("owner/name", "es", {"split": "test"}),
        ("owner/name", None, {"split": "test"}),
    ]
    with pytest.raises(DataError, match="cannot load hf:no/one: FileNotFoundError: no such data set"):
        TokenDataset.from_sources("hf:no/one", tokenizer)
    fake.__version__ = "2.19.0"  # it would ask whether to run the data set's own code
    with pytest.raises(DataError, match=r"datasets 2\.19\.0 is too old"):
        TokenDataset.from_sources("hf:owner/name", tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets: pip install 'llmforge\[datasets\]'"):
        TokenDataset.from_sources("hf:owner/name", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x"}\n', r"a\.jsonl, line 1 has no field 'text'; its fields are 'body' The one with the text is named by"),
        ("a.jsonl", '{"texto": "x"}\n', r"did you mean 'texto'\?"),
        ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n', r"line 2 has no field 'text'"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: text is 3; it must be text"),
        ("a.jsonl", '{"text": "a"}\n["a"]\n', r"line 2 is \['a'\]; a record must be an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not valid JSON from column"),
        ("a.jsonl", '{"text": "ab\\ud800"}\n', r"line 1 has half of a surrogate pair at character 2"),
        ("a.jsonl", "{\"text\": \"ma\xf1ana\"}".encode("latin-1"), r"line 1: .*byte 0xf1 at position 12\. It looks like Windows-1252"),
        ("a.jsonl", "\n", r"has no records"),
        ("a.json", '[{"text": "a"}, 5]', r"line 1 \(record 2\) is 5"),
        ("a.csv", "id,body\n1,x\n", r"a\.csv has no field 'text'; its fields are 'id', 'body'"),
        ("a.csv", "id,text\n1,x\n2\n", r"a\.csv, line 3 has 1 of 2 cells, and 'text' is none of them"),
        ("a.csv", "text,text\n1,x\n", r"has two columns 'text'"),
        ("a.csv", "\n\n", "has no names of columns in its first line"),
        ("a.csv", "id,text\n1," + "x" * 500, r"a\.csv, line 2 has more than 300 characters; is it a table\?"),
        ("a.csv", 'id,text\n1,"' + "x\n" * 500, r"a\.csv, line 2 is no row of a table: field larger than field limit \(300\).*quotation"),
        ("a.csv", "id,text\n1,ma\xf1ana\n".encode("latin-1"), r"a\.csv is not UTF-8 text: byte 0xf1 at position 12"),
        ("a.csv", "id,text\n1,Ω\n", r"a\.csv, line 2 \(record 1\), from character 0 on: character 'Ω' \(U\+03A9\)"),
        ("a.jsonl", '{"text": "' + "x" * 400 + '"}', r"line 1: it has \d+ bytes; at most 300"),
        ("a.txt.gz", b"no gzip", r"cannot read .*a\.txt\.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-6], r"a\.txt\.gz is damaged: Compressed file ended before"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), r"is empty"),
        ("a.txt.gz", gzip.compress("ma\xf1ana".encode("latin-1"), mtime=0), r"byte 0xf1 at position 2"),
    ],
)  # fmt: skip
def test_bad_records_are_explained(tmp_path, tokenizer, monkeypatch, name, content, message):
    monkeypatch.setattr(record_files, "MAX_LINE_BYTES", 300)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    limit = csv.field_size_limit()
    with pytest.raises(DataError, match=message):
        TokenDataset.from_sources(tmp_path / name, tokenizer, cache_dir=tmp_path / "cache")
    assert csv.field_size_limit() == limit
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_table_of_one_column_needs_no_field(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("frase\nuno\n\ndos\n", encoding="utf-8")
    data = TokenDataset.from_sources(tmp_path / "a.csv", tokenizer)
    assert documents_of(data, tokenizer) == ["uno", "dos"]


def test_a_folder_has_texts_or_records(tmp_path, tokenizer):
    for name, content in {
        "b.txt": "b",
        "c/a.txt": "c",
        "notes.md": "x",
        "empty.txt": "",
        "d.txt.gz": gzip.compress(b"d"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert documents_of(TokenDataset.from_sources(tmp_path, tokenizer), tokenizer) == ["b", "c", "d"]
    write_records(tmp_path / "z.jsonl")
    assert documents_of(TokenDataset.from_sources(tmp_path, tokenizer), tokenizer) == ["b", "c", "d"]
    data = TokenDataset.from_sources({"path": tmp_path, "field": "body"}, tokenizer)
    assert documents_of(data, tokenizer) == RECORDS
    (tmp_path / "none").mkdir()
    with pytest.raises(
        DataError, match=r"none has no file with text that matches '\*\*/\*\.txt', nor records in \.jsonl"
    ):
        TokenDataset.from_sources(tmp_path / "none", tokenizer)


def test_sources_that_cannot_be_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no text is named"):
        TokenDataset.from_sources([], tokenizer)
    with pytest.raises(ConfigError, match=r"some texts have a weight, and .*a\.txt has none"):
        TokenDataset.from_sources([{"path": "b", "weight": 1}, tmp_path / "a.txt"], tokenizer)
    with pytest.raises(ConfigError, match=r"weight \(0\.0\) of b must be above 0"):
        TextSource(path="b", weight=0.0)
    with pytest.raises(ConfigError, match=r"unknown TextSource field 'feild'; did you mean 'field'\?"):
        text_sources([{"path": "b", "feild": "x"}])
    with pytest.raises(DataError, match=r"plain text, which has no field 'body'"):
        TokenDataset.from_sources({"path": tmp_path / "a.txt", "field": "body"}, tokenizer)
    with pytest.raises(DataError, match=r"no such file or folder: .*b\.jsonl; check the spelling"):
        TokenDataset.from_sources(tmp_path / "b.jsonl", tokenizer)


def test_vocabularies_are_learnt_from_the_same_sources(tmp_path):
    words = ["una olla de algo más vaca que carnero"] * 9
    (tmp_path / "a.txt").write_text("salpicón las más noches", encoding="utf-8")
    sources = [{"path": write_records(tmp_path / "b.csv", words), "field": "body"}, tmp_path / "a.txt"]
    assert CharTokenizer.from_text_file(sources).chars == tuple(sorted(set("".join(words) + "salpicón las más noches")))
    texts = [*words, "salpicón las más noches"]
    assert BPETokenizer.from_text_file(sources, vocab_size=300).encode(words[0]) == BPETokenizer.from_texts(
        texts, vocab_size=300
    ).encode(words[0])
    assert WordPieceTokenizer.from_text_file(sources, vocab_size=90).decode([5]) == WordPieceTokenizer.from_texts(
        texts, vocab_size=90
    ).decode([5])


# Ids


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(st.text(st.sampled_from("aé \n\r.,1🙂'\u2028n\u0303"), max_size=30), min_size=1, max_size=8),
    chunk_bytes=st.integers(1, 9),
    part_chars=st.integers(1, 20),
)
def test_ids_are_those_of_each_document_whatever_the_parts(
    tmp_path_factory, bpe_tokenizer, documents, chunk_bytes, part_chars
):
    folder = tmp_path_factory.mktemp("any")
    files = []
    for i, text in enumerate(documents):
        if text:
            files.append(folder / f"{i}.txt")
            files[-1].write_bytes(text.encode())
    records = write_records(folder / "r.jsonl", documents)
    expected = [i for text in documents if text for i in (*bpe_tokenizer.encode(text), bpe_tokenizer.eos_token_id)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(token_file, "PART_CHARS", part_chars)
        patch.setattr(fast_bpe, "MIN_CHARS", 1)
        patch.setattr(bpe, "MIN_CHARS", 1)
        if not expected:
            return
        for sources in (files if len(files) > 1 else [], [{"path": records, "field": "body"}]):
            if sources:
                data = TokenDataset.from_sources(sources, bpe_tokenizer, cache_dir=folder / "cache")
                assert np.asarray(data.ids).tolist() == expected
                table = np.concatenate(data.documents.tables)
                texts = [text for text in documents if text]
                assert table["tokens"].tolist() == [len(bpe_tokenizer.encode(text)) + 1 for text in texts]
                assert table["bytes"].tolist() == [len(text.encode()) for text in texts]
                hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
                assert table["hash"].tolist() == [int.from_bytes(digest, "little") for digest in hashes]


def test_one_text_file_is_as_ever(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(SPANISH.encode())
    one = TokenDataset.from_text_file(tmp_path / "a.txt", tokenizer, cache_dir=tmp_path / "cache")
    files = set((tmp_path / "cache").iterdir())
    data = TokenDataset.from_sources([tmp_path / "a.txt"], tokenizer, cache_dir=tmp_path / "cache")
    assert tokenizer.decode(data.ids) == SPANISH  # no end-of-text
    assert data.fingerprint == one.fingerprint
    assert set((tmp_path / "cache").iterdir()) == files


def test_a_tokenizer_without_end_of_text_joins_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(CharTokenizer, "eos_token_id", None)
    data = TokenDataset.from_sources({"path": write_records(tmp_path / "a.jsonl"), "field": "body"}, tokenizer)
    assert np.asarray(data.ids).tolist() == tokenizer.encode("".join(RECORDS))
    assert [int(n) for n in data.documents.tables[0]["tokens"]] == [len(text) for text in RECORDS]


# Fast byte-level BPE


@pytest.fixture(scope="module", params=["gpt-2", "llama-bpe", "qwen2"])
def fast_tokenizer(request):
    words = SPANISH + TEXT[:2000] + " naïve don't WE'LL 1605 aaaa aaaaaaa abababab \n\n\n   x"
    return BPETokenizer.from_texts([words * 3], vocab_size=500, pre_tokenizer=request.param)


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(
        st.one_of(st.sampled_from("ab 1'\n\r\t.¿éñ\u0301\u2028🙂sS"), st.characters(exclude_categories=["Cs"]))
    )
)
def test_fast_ids_are_the_librarys(fast_tokenizer, text):
    expected = fast_tokenizer._backend.encode(text, add_special_tokens=False).ids
    ids = fast_tokenizer._fast.encode(text)
    if ids is None:
        assert not text.isascii()
    else:
        assert ids.tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "MIN_CHARS", 1)
        patch.setattr(bpe, "_PART_CHARS", 7)
        if text:
            assert fast_tokenizer.encode_array(text).tolist() == expected
            assert [ids.tolist() for ids in fast_tokenizer.encode_batch([text, "", text])] == [expected, [], expected]


def test_fast_ids_of_runs_of_one_character(fast_tokenizer):
    for character in "a \nñ1.":
        for n in (10, 1000, 30_000):
            text = character * n + "ab"
            ids = fast_tokenizer._fast.encode(text)
            assert ids is not None
            assert ids.tolist() == fast_tokenizer._backend.encode(text, add_special_tokens=False).ids


def test_characters_whose_kind_has_changed_are_left_to_the_library(fast_tokenizer):
    assert fast_bpe.encodable("¿Qué señor? n\u0303 🙂 —«»… 漢字 кириллица\u2028")
    for character in ("ẞ", "\u180e", "\u200b", "\u017f", "\U0002fffe", "\U00030000", "\ud800"):
        assert not fast_bpe.encodable("a" + character), hex(ord(character))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        fast_tokenizer._encode_fast(fast_tokenizer._fast, ["a", "\ud800"])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(normalizer={"type": "NFC"}),
        lambda state: state["model"].update(dropout=0.1),
        lambda state: state["model"]["merges"].reverse(),  # a merge before those of its parts
        lambda state: state["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
        lambda state: state["added_tokens"].append({"id": 999, "content": "olla", "special": False}),
        lambda state: state["model"]["merges"].pop(0),
    ],
)
def test_vocabularies_that_tiktoken_cannot_do_are_left_to_the_library(change):
    state = json.loads(BPETokenizer.from_texts(["una olla de algo más " * 9], vocab_size=280)._backend.to_str())
    assert fast_bpe.FastBPE.of(state) is not None
    change(state)
    assert fast_bpe.FastBPE.of(state) is None


def test_a_token_that_its_merges_do_not_make_is_noticed():
    # Of "abc", the library makes a, bc: the pair (b, c) comes first, and (ab, c) is the only one that makes abc. tiktoken would join a and bc.
    base = BPETokenizer.from_texts(["a b"], vocab_size=257)
    state = json.loads(base._backend.to_str())
    vocabulary = {token: i for token, i in state["model"]["vocab"].items() if len(token) == 1}
    vocabulary |= {"bc": 256, "ab": 257, "abc": 258, "<|endoftext|>": 259}
    tokenizer = BPETokenizer.from_merges(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")], pre_tokenizer="qwen2")
    assert tokenizer.encode("abc") == [vocabulary["a"], 256]
    assert tokenizer._fast is None


def test_threads_follow_the_librarys_settings(monkeypatch):
    for name, value, expected in (
        ("TOKENIZERS_PARALLELISM", "false", 1),
        ("RAYON_NUM_THREADS", "3", 3),
        ("RAYON_NUM_THREADS", "0", None),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            assert fast_bpe.num_threads() == (expected or len(os.sched_getaffinity(0)))


# The cache, and going on after a kill


class Counting(CharTokenizer):
    texts = 0

    def encode_batch(self, texts, **options):
        Counting.texts += len(texts)
        return super().encode_batch(texts, **options)

    def encode_part(self, part, *, first):
        Counting.texts += 1
        return super().encode_part(part, first=first)


def counted(sources, tokenizer, cache, **options):
    Counting.texts = 0
    data = TokenDataset.from_sources(sources, tokenizer, cache_dir=cache, **options)
    return Counting.texts, data


def test_files_that_are_added_do_not_make_the_others_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_SMALL_BYTES", 60)
    tokenizer, cache, texts = Counting(TEXT + "".join(RECORDS) + "0123456789x"), tmp_path / "cache", tmp_path / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text(TEXT[:100] + name, encoding="utf-8")
    write_records(tmp_path / "r.jsonl")
    sources = [texts, {"path": tmp_path / "r.jsonl", "field": "body"}]
    first, data = counted(sources, tokenizer, cache)
    assert first == 3 + len(RECORDS)
    assert counted(sources, tokenizer, cache)[0] == 0
    (texts / "aa.txt").write_text("x" * 100, encoding="utf-8")
    added, more = counted(sources, tokenizer, cache)
    assert added == 1
    assert len(more) == len(data) + 101
    (texts / "small.txt").write_text("x", encoding="utf-8")
    (texts / "tiny.txt").write_text("1", encoding="utf-8")
    assert counted(sources, tokenizer, cache)[0] == 2


def kill_after(parts, sources, cache, **options):
    """Tokenize in another process, which is killed when it comes to one part more."""

    class Killed(CharTokenizer):
        done = 0

        def encode_array(self, text):
            Killed.done += 1
            if Killed.done > parts:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode_array(text)

    process = os.fork()
    if process == 0:
        TokenDataset.from_sources(sources, Killed(LATIN), cache_dir=cache, **options)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


LATIN = "".join(map(chr, range(32, 300))) + "\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["text", "records", "near-duplicates"])
def test_a_killed_tokenization_goes_on_where_it_stopped(tmp_path, monkeypatch, kind):
    lines = [f"{i} " + "".join(random.Random(i).choices("abcdefghij ", k=60)) for i in range(200)]
    if kind == "records":
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8"
        )
        sources = [str(tmp_path / "a.jsonl")]
    else:
        (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
        (tmp_path / "b.txt").write_text("\n".join(lines[::-1]), encoding="utf-8")
        sources = [str(tmp_path / "a.txt")] if kind == "text" else [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    cache = tmp_path / "cache"
    options = dict(drop_near_duplicates=kind == "near-duplicates")
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(token_file, "PART_CHARS", 1000)
    for parts in (5, 3, 0):  # of those that are left
        kill_after(parts, sources, cache, **options)
    tokenizer = Counting(LATIN)
    whole, expected = counted(sources, tokenizer, tmp_path / "other", **options)
    left, data = counted(sources, tokenizer, cache, **options)
    if kind == "records":
        assert 0 < left < whole - 8 * 12
    else:
        assert left == whole - 8
    assert np.array_equal(np.asarray(data.ids), np.asarray(expected.ids))
    assert data.bytes_per_token == expected.bytes_per_token
    if data.documents is not None:
        for ours, theirs in zip(data.documents.tables, expected.documents.tables, strict=True):
            assert np.array_equal(ours, theirs)
    assert not list(cache.glob(".part-*"))


@pytest.mark.parametrize("name", ["ids.bin", "documents.bin", "info.json"])
def test_damaged_documents_are_made_again(tmp_path, tokenizer, name):
    source = {"path": write_records(tmp_path / "a.jsonl"), "field": "body"}
    TokenDataset.from_sources(source, tokenizer, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    os.truncate(folder / name, 10)
    data = TokenDataset.from_sources(source, tokenizer, cache_dir=tmp_path / "cache")
    assert documents_of(data, tokenizer) == RECORDS


def test_progress_ends_with_all_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 100)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    sources = [tmp_path / "a.txt", {"path": write_records(tmp_path / "b.jsonl.gz"), "field": "body"}]
    total = sum((tmp_path / name).stat().st_size for name in ("a.txt", "b.jsonl.gz"))
    for _ in range(2):  # made, and found
        ticks, tick = ticking()
        TokenDataset.from_sources(sources, tokenizer, cache_dir=tmp_path / "c", progress=tick)
        assert ticks == sorted(ticks)
        assert ticks[-1] == (total, total)
    ticks, tick = ticking()
    TokenDataset.from_text_file(tmp_path / "a.txt", tokenizer, progress=tick)
    assert ticks[-1] == (len(TEXT.encode()), len(TEXT.encode()))


def test_memory_does_not_grow_with_the_text(tmp_path):
    code = """
import sys, resource
from llmforge.data import TokenDataset
from llmforge.tokenizers import CharTokenizer
tokenizer = CharTokenizer("abc \\n")
TokenDataset.from_sources([sys.argv[1] + "/warm.jsonl"], tokenizer, cache_dir=sys.argv[1] + "/cache")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
TokenDataset.from_sources([sys.argv[1] + "/big.jsonl"], tokenizer, cache_dir=sys.argv[1] + "/cache")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    line = json.dumps({"text": "abc " * 250}) + "\n"
    for name, count in (("warm", 12_000), ("big", 48_000)):  # 12 and 48 MB
        with open(tmp_path / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(line for _ in range(count))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 12  # MB, of which the page cache of the written file is none


# Splits


def texts_and_sides(sources, tokenizer, cache, **options):
    data = TokenDataset.from_sources(sources, tokenizer, cache_dir=cache)
    train, val = data.split(**options)
    assert len(train) + len(val) == len(data)
    return set(documents_of(train, tokenizer)), set(documents_of(val, tokenizer))


def test_a_split_does_not_move_when_files_are_added(tmp_path, tokenizer):
    names = [f"registro {i}" for i in range(1200)]
    write_records(tmp_path / "a.jsonl", names[:400], "text")
    first_train, first_val = texts_and_sides(tmp_path / "a.jsonl", tokenizer, tmp_path / "c", val_fraction=0.1)
    assert first_train | first_val == set(names[:400])
    assert 20 <= len(first_val) <= 62  # 40 are expected, with a deviation of 6
    write_records(tmp_path / "0.jsonl", names[400:], "text")
    write_records(tmp_path / "z.csv", names[:9], "text")  # copies: on the same side
    sources = [tmp_path / "0.jsonl", tmp_path / "a.jsonl", tmp_path / "z.csv"]
    train, val = texts_and_sides(sources, tokenizer, tmp_path / "c", val_fraction=0.1)
    assert first_train <= train
    assert first_val <= val
    assert not train & val
    more_val = texts_and_sides(sources, tokenizer, tmp_path / "c", val_fraction=0.2)[1]
    assert val <= more_val  # nested


def test_the_end_of_each_long_text_is_held_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(dataset, "_LONG_BYTES", 500)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 1000, encoding="utf-8")
    for i in range(300):
        (tmp_path / f"s{i}.txt").write_text(f"n {i}", encoding="utf-8")
    train, val = TokenDataset.from_sources(tmp_path, tokenizer).split(val_fraction=0.1)
    counts = [Counter(tokenizer.decode(np.asarray(part.ids))) for part in (train, val)]
    # 1001 tokens with the end-of-text, which has an a itself; int(1001 * 0.9) = 900
    assert [count["b"] for count in counts] == [900, 100]
    in_val = {text for text in documents_of(val, tokenizer) if text.startswith("n ")}
    assert 10 <= len(in_val) <= 50
    total = 2000 + sum(len(f"n {i}") for i in range(300))
    expected = train.bytes_per_token * len(train) + val.bytes_per_token * len(val)
    assert expected == pytest.approx(total)


def test_few_texts_are_split_each(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a" * 99, encoding="utf-8")
    (tmp_path / "b.txt").write_text("b" * 199, encoding="utf-8")
    train, val = TokenDataset.from_sources(tmp_path, tokenizer).split(val_fraction=0.1)
    eos = tokenizer.eos_token_id
    ids = [tokenizer.encode(c)[0] for c in "ab"]
    assert np.asarray(train.ids).tolist() == [ids[0]] * 90 + [ids[1]] * 180
    assert np.asarray(val.ids).tolist() == [ids[0]] * 9 + [eos] + [ids[1]] * 19 + [eos]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), data=st.data())
def test_joined_rows_are_as_one(lengths, data):
    arrays = [np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)]
    joined, whole = JoinedIds.of([a for a in arrays if len(a)] or [arrays[0]]), np.concatenate(arrays)
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole) + 2))
    assert joined[start:stop].tolist() == whole[start:stop].tolist()
    assert JoinedIds.of([joined, whole])[:].tolist() == [*whole.tolist(), *whole.tolist()]
    assert joined.shape == whole.shape


def test_joined_data_has_the_batches_of_one_array():
    ids = np.random.RandomState(0).randint(0, 50, 1000).astype(np.uint16)
    one = TokenDataset(ids)
    joined = TokenDataset(JoinedIds.of(np.split(ids, [1, 10, 500, 998])))
    assert joined.fingerprint == one.fingerprint
    for step in (0, 7, 30):
        ours, theirs = (data.batch(step, batch_size=5, seq_len=16, seed=3) for data in (joined, one))
        assert torch.equal(ours.idx, theirs.idx)
        assert torch.equal(ours.targets, theirs.targets)


# Mixtures


def mixture(weights, sizes):
    parts = [
        TokenDataset(np.full(n, k, dtype=np.uint16), vocab_size=9, bytes_per_token=k + 1.0) for k, n in enumerate(sizes)
    ]
    return MixedDataset(parts, weights, names=[f"part {k}" for k in range(len(sizes))])


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=6),
    first=st.integers(0, 10**9),
    count=st.integers(1, 40),
)
def test_samples_of_a_mixture_are_each_parts_own_in_turn(weights, first, count):
    data = mixture(weights, [100] * len(weights))
    samples = data._samples(first, count)
    assert samples == [sample for i in range(count) for sample in data._samples(first + i, 1)]
    for k, share in enumerate(data.shares):
        numbers = [j for part, j in samples if part == k]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        for j in numbers[:1]:  # so many of its samples came before, as its share says
            assert abs(j - first * share) <= len(weights) + 1


def test_samples_of_a_mixture_miss_none():
    data = mixture([2, 1, 0.05], [100] * 3)
    samples = data._samples(0, 610)
    for k, expected in enumerate((400, 200, 10)):
        numbers = [j for part, j in samples if part == k]
        assert numbers == list(range(len(numbers)))
        assert abs(len(numbers) - expected) <= 1
    assert [k for k, _ in mixture([2, 1], [50, 50])._samples(0, 6)] == [
        0,
        1,
        0,
        0,
        1,
        0,
    ]  # by hand: times 3/4, 3/2, 9/4, 15/4, ...


def test_batches_of_a_mixture_are_pure_and_shared_by_ranks():
    data = mixture([3, 1], [200, 40])
    whole = data.batch(2, batch_size=8, seq_len=10, seed=1)
    assert Counter(whole.idx[:, 0].tolist()) == {0: 6, 1: 2}
    ranks = [data.batch(2, batch_size=4, seq_len=10, seed=1, rank=rank, world_size=2).idx for rank in range(2)]
    assert torch.equal(torch.cat(ranks), whole.idx)
    assert data.bytes_per_token == 0.75 * 1 + 0.25 * 2
    assert len({data.fingerprint, mixture([3, 2], [200, 40]).fingerprint, mixture([3, 1], [200, 41]).fingerprint}) == 3
    with pytest.raises(DataError, match=r"part 1 has 40 tokens .* needs 51"):
        data.batch(0, seq_len=50)


def test_weights_mix_sources(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a" * 2000, encoding="utf-8")
    (tmp_path / "b.txt").write_text("b" * 500, encoding="utf-8")
    sources = [{"path": tmp_path / "a.txt", "weight": 1}, {"path": tmp_path / "b.txt", "weight": 3}]
    data = TokenDataset.from_sources(sources, tokenizer)
    train, val = data.split(val_fraction=0.2)
    for part in (train, val):
        idx = part.batch(0, batch_size=40, seq_len=20).idx
        counts = Counter(tokenizer.decode(row.tolist())[0] for row in idx[:, 3:4])
        assert counts["b"] == 30
    assert len(train) + len(val) == len(data) == 2502
    assert not set(np.asarray(val.parts[0].ids).tolist()) - {tokenizer.encode("a")[0], tokenizer.eos_token_id}
    assert len(np.asarray(val.ids)) == len(val)


# Near-duplicates


def words(seed, n=16):
    return " ".join("".join(random.Random(seed * 100 + i).choices("abcdefghijklmnop", k=6)) for i in range(n))


def jaccard(a, b):
    left, right = ({line[i : i + 5] for i in range(len(line) - 4)} for line in (a, b))
    return len(left & right) / len(left | right)


def test_near_duplicate_lines_are_found_as_the_formula_says():
    similarities, found = {}, {}
    for changed in (0, 1, 3, 8, 16):
        pairs = []
        for seed in range(150):
            line = words(seed + 1000 * changed)
            other = line.split()
            for i in range(changed):
                other[i] = words(seed + 70_000 + 1000 * changed).split()[i]
            pairs.append((line, " ".join(other)))
        dropped = NearDuplicates().is_near_duplicate([line for pair in pairs for line in pair])
        assert not dropped[::2].any()
        similarities[changed] = np.mean([1 - (1 - jaccard(*pair) ** 8) ** 14 for pair in pairs])
        found[changed] = dropped[1::2].mean()
    for changed, expected in similarities.items():
        assert abs(found[changed] - expected) < 0.12, (changed, found, similarities)  # three deviations of 150 at 0.5
    assert found[0] == 1.0
    assert found[16] == 0.0


def test_case_spaces_and_composition_do_not_count_but_short_lines_do():
    line = "¿Qué señor, qué ñandú tan grande es aquel?"
    filtered = NearDuplicates()
    same = [
        line,
        line.upper(),
        "  " + line.replace(" ", "\t ") + "\r",
        line.replace("ñ", "n\u0303").replace("é", "e\u0301"),
    ]
    assert filtered.is_near_duplicate(same).tolist() == [False, True, True, True]
    assert filtered.is_near_duplicate(["—Sí.", "—Sí.", "", "", line]).tolist() == [False] * 4 + [True]
    assert not NearDuplicates().is_near_duplicate([]).any()


@pytest.mark.parametrize("chunk_bytes", [50, 2**22])
def test_lines_are_dropped_across_documents_and_sources(tmp_path, tokenizer, monkeypatch, chunk_bytes):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    one, two, three = (words(seed, 8) for seed in range(3))
    (tmp_path / "a.txt").write_bytes(f"{one}\r\n\r\n{two}\n{one}\nfin".encode())
    write_records(tmp_path / "b.jsonl", [two.upper(), f"{three}\n{one}", "corto", "corto"], "text")
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    expected = [f"{one}\r\n\r\n{two}\nfin", f"{three}\n", "corto", "corto"]
    cache = tmp_path / "cache"
    data = TokenDataset.from_sources(sources, tokenizer, drop_near_duplicates=True, cache_dir=cache)
    assert documents_of(data, tokenizer) == expected
    again = TokenDataset.from_sources(sources, tokenizer, drop_near_duplicates=True, cache_dir=cache)
    assert documents_of(again, tokenizer) == expected
    # A source that is added is compared with those before it, though they are found in the cache.
    write_records(tmp_path / "c.jsonl", [three, words(7, 8)], "text")
    data = TokenDataset.from_sources(
        [*sources, tmp_path / "c.jsonl"], tokenizer, drop_near_duplicates=True, cache_dir=cache
    )
    assert documents_of(data, tokenizer) == [*expected, words(7, 8)]
    plain = TokenDataset.from_sources(sources, tokenizer, cache_dir=cache)
    assert len(plain) > len(data)


def test_near_duplicates_use_the_memory_they_say(monkeypatch):
    assert near_duplicates.BANDS * near_duplicates.SLOTS * 4 == 234_881_024
    monkeypatch.setattr(near_duplicates, "SLOTS", 64)
    filtered = NearDuplicates()
    lines = [words(seed, 8) for seed in range(400)]
    assert filtered.is_near_duplicate(lines).sum() == 0  # what is overwritten is forgotten, and taken for nothing else
    assert filtered._tables.nbytes == 14 * 64 * 4
    assert filtered.is_near_duplicate(lines[-20:]).all()


# The command line

TOY = ["--set", "n_layer=1", "--set", "n_embd=16", "--set", "n_head=2", "--set", "block_size=16", "--set", "device=cpu"]
TOY += ["--set", "eval_batches=2", "--set", "sample_tokens=10", "--preset", "char-gpt-cpu", "--steps", "2"]


def test_train_on_many_sources_and_resume(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text(TEXT[:500], encoding="utf-8")
    write_records(tmp_path / "table.csv", [f"{TEXT[:90]} {i}" for i in range(30)])
    names = [str(tmp_path / name) for name in ("a.txt", "books", "table.csv")]
    out = tmp_path / "run"
    command = [
        "train",
        *names,
        "--text-field",
        "body",
        "--val-fraction",
        "0.2",
        "--drop-near-duplicates",
        "--out",
        str(out),
    ]
    assert main([*command, *TOY]) == 0
    shown = capsys.readouterr().out
    assert "a.txt, " in shown
    saved = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert saved["text"] == [
        {"path": names[0]},
        {"path": names[1], "field": "body"},
        {"path": names[2], "field": "body"},
    ]
    assert (saved["val_fraction"], saved["drop_near_duplicates"]) == (0.2, True)
    assert main(["train", "--resume", str(out), "--steps", "4"]) == 0
    assert "the training data" not in capsys.readouterr().err
    assert (out / "step-000004").is_dir()
    weighted = tmp_path / "weighted"
    assert main(["train", *names[:2], "--weights", "1", "3", "--out", str(weighted), *TOY]) == 0
    assert "75.0% of the rows from" in capsys.readouterr().out
    assert main(["train", "--resume", str(weighted), "--steps", "3"]) == 0
    assert main(["train", "--config", str(weighted / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert (weighted / "step-000003").is_dir()


def test_yaml_names_one_text_or_several(tmp_path):
    base = RunConfig.resolve("char-gpt-cpu", [{"text": "a.txt"}]).to_dict()
    assert base["text"] == "a.txt"
    for text, expected in (
        ({"path": "b.jsonl", "field": "body"}, [{"path": "b.jsonl", "field": "body"}]),
        (["a.txt", {"path": "b.csv", "field": "x"}], [{"path": "a.txt"}, {"path": "b.csv", "field": "x"}]),
        (
            [{"path": "a.txt", "weight": 1}, {"path": "b", "weight": "2.5"}],
            [{"path": "a.txt", "weight": 1.0}, {"path": "b", "weight": 2.5}],
        ),
    ):
        config = RunConfig.from_dict({**base, "text": text})
        assert config.to_dict()["text"] == expected
        assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    with pytest.raises(ConfigError, match=r"unknown TextSource field 'wieght'; did you mean 'weight'\?"):
        RunConfig.from_dict({**base, "text": [{"path": "a", "wieght": 1}]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "--weights", "1", "2"], "--weights has 2 numbers for 1 texts"),
        (["a.txt", "b.txt", "--weights", "1", "-2"], "must be above 0"),
        (["--text-field", "body"], "--text-field is about texts of the command line"),
        (["t.csv", "--text-field", "bodi", *TOY], "did you mean 'body'?"),
        (["t.csv", *TOY], "has no field 'text'; its fields are 'id', 'body'"),
        (["a.txt", "--val-fraction", "2", *TOY], "val_fraction (2.0) must be between 0 and 1"),
        (["--resume", "run", "--weights", "1"], "leave out weights"),
    ],
)
def test_bad_options_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    write_records(tmp_path / "t.csv")
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err
