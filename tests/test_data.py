"""TokenDataset: from files to ids, the cache, and the laws of batches."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.data import TokenDataset
from llmforge.errors import ConfigError, DataError, LLMForgeError
from llmforge.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer, text_files

SPANISH = "—¡Señor! —dijo Sancho—, ¿qué «gigantes»? 🙂\r\n\r\nEn un lugar de la Mancha, de cuyo nombre... 1605\r\n" * 8


@pytest.fixture(scope="module")
def bpe_tokenizer():
    return BPETokenizer.from_texts([SPANISH], vocab_size=300)


@pytest.fixture
def spanish_file(tmp_path):
    path = tmp_path / "quijote.txt"
    path.write_bytes(SPANISH.encode())
    return path


def row(n, dtype=np.uint16, **options):
    """Ids 0, 1, 2 ...: an id is its own place."""
    return TokenDataset(np.arange(n, dtype=dtype), **options)


# From text to ids


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64, 2**22])
def test_ids_do_not_depend_on_the_chunks(spanish_file, bpe_tokenizer, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    for tokenizer in (bpe_tokenizer, CharTokenizer.from_text(SPANISH)):
        data = TokenDataset.from_text_file(spanish_file, tokenizer, cache_dir=tmp_path / "cache")
        assert data.ids.tolist() == tokenizer.encode(SPANISH)  # CRLF and all
        assert data.vocab_size == tokenizer.vocab_size
        assert data.bytes_per_token == len(SPANISH.encode()) / len(data)


@settings(deadline=None, max_examples=30)
@given(text=st.text(st.sampled_from("aé \n\r.,1🙂'"), min_size=1), chunk_bytes=st.integers(1, 9))
def test_ids_of_any_text_do_not_depend_on_the_chunks(bpe_tokenizer, tmp_path_factory, text, chunk_bytes):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
        data = TokenDataset.from_text_file(folder / "a.txt", bpe_tokenizer, cache_dir=folder / "cache")
    assert data.ids.tolist() == bpe_tokenizer.encode(text)


def test_tokenizer_without_safe_cuts_sees_the_whole_text(spanish_file, bpe_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 5)
    monkeypatch.setattr(bpe_tokenizer, "_cut_before", ())
    data = TokenDataset.from_text_file(spanish_file, bpe_tokenizer, cache_dir=tmp_path / "cache")
    assert data.ids.tolist() == bpe_tokenizer.encode(SPANISH)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 4, 100])
def test_byte_order_mark_is_dropped_at_the_start_only(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "a.txt").write_bytes("\ufeffa\ufeffb".encode())
    tokenizer = CharTokenizer("ab\ufeff")
    assert tokenizer.decode(TokenDataset.from_text_file(tmp_path / "a.txt", tokenizer).ids) == "a\ufeffb"


def test_ids_are_two_bytes_where_they_fit(tmp_path):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    for size, dtype in ((2**16 - 1, np.uint16), (2**16, np.uint32)):
        tokenizer = CharTokenizer(map(chr, range(0xE000, 0xE000 + size)))
        tokenizer = CharTokenizer([*tokenizer.chars[3:], *"abc"])
        data = TokenDataset.from_text_file(tmp_path / "a.txt", tokenizer)
        assert data.ids.dtype == dtype
        assert tokenizer.decode(data.ids) == "abc"


def test_folder_is_sorted_with_end_of_text_after_each(tmp_path):
    for name, text in {
        "b.txt": "b",
        "a.txt": "aa",
        "c/a.txt": "ab",
        "empty.txt": "",
        "notes.md": "b",
        ".txt/x": "b",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = CharTokenizer("ab")
    expected = [0, 0, 2, 1, 2, 0, 1, 2]
    assert TokenDataset.from_text_folder(tmp_path, tokenizer).ids.tolist() == expected
    assert TokenDataset.from_text_file(tmp_path, tokenizer).ids.tolist() == expected
    assert TokenDataset.from_text_folder(tmp_path, tokenizer, pattern="*.md").ids.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"has no file with text that matches '\*\.csv'"):
        TokenDataset.from_text_folder(tmp_path, tokenizer, pattern="*.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.txt is empty; name a file with text"),
        ("\ufeff".encode(), r"bad\.txt is empty"),
        ("año".encode("cp1252"), r"byte 0xf1 at position 1\. It looks like Windows-1252 .*'ñ'.* iconv -f WINDOWS-1252 -t UTF-8 bad\.txt"),
        (b"x" * 70 + "é".encode("cp1252"), "byte 0xe9 at position 70"),
        ("ñ".encode()[:1], "byte 0xc3 at position 0"),
        ("ñandú".encode("utf-16"), r"byte 0xff at position 0\. It looks like UTF-16 text; .* iconv -f UTF-16 "),
        ("abc".encode("utf-16"), r"byte 0xff at position 0\. It looks like UTF-16 text"),
        ("abc".encode("utf-32"), r"It looks like UTF-32 text; .* iconv -f UTF-32 "),
        (b"text\n" + b"\0" * 9, r"byte 0x00 at position 5\. It looks like a binary file"),
        (b"%PDF-1.7\n%\xe2\xe3", r"byte 0xe2 at position 10\. It looks like a PDF; save it as UTF-8 text$"),
        (b"PK\x03\x04\0\0", "a zip archive or office document"),
        (b"\x89PNG\r\n\x1a\n\0", "byte 0x89 at position 0. It looks like a binary file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk_bytes", [2, 2**22])
def test_text_that_cannot_be_read_is_explained(bpe_tokenizer, tmp_path, monkeypatch, content, message, chunk_bytes):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        TokenDataset.from_text_file(tmp_path / "bad.txt", bpe_tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []  # nothing half done is left


def test_missing_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder: .*quijot\.txt; check the spelling, seen from "):
        TokenDataset.from_text_file(tmp_path / "quijot.txt", CharTokenizer("ab"))


def test_unknown_character_is_named_with_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 4)
    (tmp_path / "a.txt").write_text("ababaßab", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt, from character 4 on: character 'ß' \(U\+00DF\) at position 1 "):
        TokenDataset.from_text_file(tmp_path / "a.txt", CharTokenizer("ab"), cache_dir=tmp_path / "cache")


# The cache


class CountingTokenizer(CharTokenizer):
    calls = 0

    def encode_array(self, text):
        CountingTokenizer.calls += 1
        return super().encode_array(text)


def encodings(path, tokenizer, cache_dir):
    """How often the text was encoded to make the data, and the data."""
    CountingTokenizer.calls = 0
    data = TokenDataset.from_text_file(path, tokenizer, cache_dir=cache_dir)
    return CountingTokenizer.calls, data


def test_ids_are_made_once(spanish_file, tmp_path):
    cache, tokenizer = tmp_path / "cache", CountingTokenizer(SPANISH)
    assert encodings(spanish_file, tokenizer, cache)[0] == 1
    calls, data = encodings(spanish_file, CountingTokenizer(SPANISH), cache)
    assert calls == 0
    assert tokenizer.decode(data.ids) == SPANISH
    assert data.bytes_per_token == len(SPANISH.encode()) / len(data)
    assert encodings(spanish_file, CountingTokenizer(SPANISH + "%"), cache)[0] == 1  # another vocabulary
    spanish_file.write_bytes(SPANISH.encode().replace("ñ".encode(), "é".encode(), 1))  # another text of the same size
    assert encodings(spanish_file, tokenizer, cache)[0] == 1
    assert encodings(tmp_path, tokenizer, cache)[0] == 1  # the same text as a folder: an end-of-text follows


def test_tokenizer_read_back_finds_the_same_ids(spanish_file, tmp_path, bpe_tokenizer):
    for tokenizer in (bpe_tokenizer, CharTokenizer(SPANISH)):
        tokenizer.save(tmp_path / "saved")
        for one in (tokenizer, load_tokenizer(tmp_path / "saved")):
            TokenDataset.from_text_file(spanish_file, one, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 2


@pytest.mark.parametrize("damage", ["truncate", "lose the note", "garble the note", "lose the ids"])
def test_damaged_cache_is_made_again(spanish_file, tmp_path, damage):
    cache, tokenizer = tmp_path / "cache", CountingTokenizer(SPANISH)
    encodings(spanish_file, tokenizer, cache)
    (ids_file,), (note,) = cache.glob("*.bin"), cache.glob("*.json")
    if damage == "truncate":
        os.truncate(ids_file, ids_file.stat().st_size - 2)
    elif damage == "lose the note":
        note.unlink()
    elif damage == "garble the note":
        note.write_text('{"num_tokens": null}')
    else:
        ids_file.unlink()
    calls, data = encodings(spanish_file, tokenizer, cache)
    assert (calls, tokenizer.decode(data.ids)) == (1, SPANISH)


def test_cache_folder_comes_from_the_environment(spanish_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMFORGE_CACHE", str(tmp_path / "here"))
    TokenDataset.from_text_file(spanish_file, CharTokenizer(SPANISH))
    assert len(list((tmp_path / "here" / "tokens").glob("*.bin"))) == 1
    monkeypatch.delenv("LLMFORGE_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    TokenDataset.from_text_file(spanish_file, CharTokenizer(SPANISH))
    assert len(list((tmp_path / ".cache" / "llmforge" / "tokens").glob("*.bin"))) == 1


def test_unwritable_cache_says_how_to_move_it(spanish_file, tmp_path):
    with pytest.raises(
        LLMForgeError, match=r"cannot write .*token files go to cache_dir, or to the folder in LLMFORGE_CACHE"
    ):
        TokenDataset.from_text_file(spanish_file, CharTokenizer(SPANISH), cache_dir=spanish_file / "cache")


# nanoGPT's files


def test_nanogpts_bin_is_read_as_it_is(tmp_path):
    ids = np.array([5, 0, 65_535, 7], dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")  # data/*/prepare.py
    data = TokenDataset.from_bin(tmp_path / "train.bin")
    assert data.ids.tolist() == ids.tolist()
    assert TokenDataset.from_bin(tmp_path / "train.bin", dtype="uint32").ids.tolist() == [5, 65_535 + 7 * 65_536]


@pytest.mark.parametrize(("size", "dtype"), [(0, "uint16"), (5, "uint16"), (6, "uint32")])
def test_bin_of_a_broken_size_is_refused(tmp_path, size, dtype):
    (tmp_path / "train.bin").write_bytes(b"\0" * size)
    with pytest.raises(DataError, match=rf"train\.bin has {size} bytes, which is not a whole number of {dtype} ids"):
        TokenDataset.from_bin(tmp_path / "train.bin", dtype=dtype)


def test_bin_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*train\.bin: No such file"):
        TokenDataset.from_bin(tmp_path / "train.bin")
    with pytest.raises(ConfigError, match=r"dtype \('int64'\) must be 'uint16' or 'uint32'"):
        TokenDataset.from_bin(tmp_path / "train.bin", dtype="int64")


def test_id_outside_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"the data has id 9\d, the vocabulary only 90 tokens"):
        row(100, vocab_size=90).batch(0, batch_size=10, seq_len=9)  # the whole epoch
    row(100, vocab_size=100).batch(0, batch_size=100, seq_len=9)


@pytest.mark.parametrize("ids", [np.arange(4), np.zeros((2, 2), np.uint16), [1, 2], np.zeros(3, np.float32)])
def test_ids_of_another_kind_are_refused(ids):
    with pytest.raises(DataError, match=r"must be one row of uint16 or uint32, not (int64|uint16|float32) of shape \("):
        TokenDataset(ids)


# Splits and fingerprints


@pytest.mark.parametrize("n", [10, 11, 1_115_394])
def test_split_is_nanogpts_and_copies_nothing(n):
    data = row(n, np.uint32, vocab_size=n, bytes_per_token=1.5)
    train, val = data.split(val_fraction=0.1)
    assert len(train) == int(n * 0.9)
    assert np.array_equal(np.concatenate([train.ids, val.ids]), data.ids)
    assert np.shares_memory(train.ids, data.ids)
    assert np.shares_memory(val.ids, data.ids)
    assert (val.vocab_size, val.bytes_per_token) == (n, 1.5)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 10])
def test_split_refuses_other_fractions(fraction):
    with pytest.raises(ConfigError, match=rf"val_fraction \({fraction}\) must be between 0 and 1"):
        row(10).split(val_fraction=fraction)


def test_fingerprint_knows_the_same_data_again(tmp_path):
    row(1000).ids.tofile(tmp_path / "a.bin")
    mapped = TokenDataset.from_bin(tmp_path / "a.bin")
    assert mapped.fingerprint == row(1000).fingerprint
    # Pinned: a run resumed with another version must find the same.
    assert row(3).fingerprint == "924843c3fc44bef278de8d4fdee23a1e61c69a78c20a046541765c0aa0f61c65"
    changed = row(1000).ids.copy()
    changed[777] += 1
    others = [row(1001), row(999), row(1000, np.uint32), TokenDataset(changed), *row(1000).split()]
    assert len({mapped.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_fingerprint_of_large_data_reads_blocks_of_it_everywhere():
    ids = np.zeros(2_000_000, dtype=np.uint16)
    whole = TokenDataset(ids).fingerprint
    for start in (0, 1_000_000, 1_960_000):
        changed = ids.copy()
        changed[start : start + 32_000] = 1
        assert TokenDataset(changed).fingerprint != whole


# Batches


def starts(batch):
    return batch.idx[:, 0].tolist()


def test_batch_is_windows_and_what_follows_them():
    idx, targets = row(1000).batch(3, batch_size=4, seq_len=16)
    assert idx.shape == targets.shape == (4, 16)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.is_contiguous()
    assert targets.is_contiguous()
    torch.testing.assert_close(idx, idx[:, :1] + torch.arange(16))
    torch.testing.assert_close(targets, idx + 1)


def test_batch_depends_on_its_arguments_alone():
    options = dict(batch_size=5, seq_len=10, seed=3)
    steps = [0, 40, 1, 17, 3, 40, 0]  # 19 windows: several epochs, out of order
    one_by_one = [starts(row(210).batch(step, **options)) for step in steps]
    data, other = row(210), row(400)
    for step, expected in zip(steps, one_by_one, strict=True):
        other.batch(step, batch_size=2, seq_len=7, seed=step)
        assert starts(data.batch(step, **options)) == expected
    assert starts(data.batch(0, batch_size=5, seq_len=10, seed=4)) != one_by_one[0]


def test_batches_stay_the_same_from_version_to_version():
    # Pinned: a resumed run must see the same data next year.
    assert starts(row(100).batch(0, batch_size=9, seq_len=10, seed=1337)) == [32, 42, 52, 22, 72, 12, 62, 2, 82]


@settings(deadline=None)
@given(n=st.integers(2, 200), seq_len=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_an_epoch_visits_every_window_once(n, seq_len, seed, epoch):
    if n < seq_len + 1:
        return
    n_windows = max(1, n // seq_len - 1)
    batch = row(n).batch(epoch, batch_size=n_windows, seq_len=seq_len, seed=seed)
    found = sorted(starts(batch))
    phase = found[0]
    assert found == [phase + k * seq_len for k in range(n_windows)]
    assert batch.targets.max() < n  # inside the data, and next to nothing is left out
    assert n - n_windows * seq_len < 2 * seq_len + 1


def test_epochs_differ_in_order_and_phase():
    data = row(1003)
    epochs = [starts(data.batch(epoch, batch_size=99, seq_len=10)) for epoch in range(200)]
    orders = [tuple(start // 10 for start in epoch) for epoch in epochs]
    assert len(set(orders)) == 200
    assert {min(epoch) for epoch in epochs} == set(range(13))
    assert all(orders[0] != tuple(sorted(order)) for order in orders)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_out_the_batches_of_one(world_size):
    data, options = row(500), dict(seq_len=7, seed=5)
    for step in range(30):  # over the ends of epochs
        alone = data.batch(step, batch_size=4 * world_size, **options)
        ranks = [
            data.batch(step, batch_size=4, rank=rank, world_size=world_size, **options) for rank in range(world_size)
        ]
        torch.testing.assert_close(torch.cat([batch.idx for batch in ranks]), alone.idx)


def test_steps_and_ranks_of_an_epoch_share_no_window():
    data = row(10 * 25)  # 24 windows = 4 steps of 2 ranks of 3
    found = [
        s
        for step in range(4)
        for rank in (0, 1)
        for s in starts(data.batch(step, batch_size=3, seq_len=10, rank=rank, world_size=2))
    ]
    assert len(set(found)) == 24


def test_too_short_data_gives_both_numbers_and_the_way_out():
    with pytest.raises(
        DataError, match=r"has 16 tokens, and a window of seq_len 16 needs 17; use a smaller block_size .* or more text"
    ):
        row(16).batch(0, seq_len=16)
    assert starts(row(17).batch(0, seq_len=16)) == [0]
    assert starts(row(17).batch(5, batch_size=3, seq_len=16)) == [0, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [{"step": -1}, {"batch_size": 0}, {"seq_len": 0}, {"seed": -1}, {"seed": 2**32}, {"rank": 2, "world_size": 2}],
)
def test_impossible_batches_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"no batch for .*{name}={value}"):
        row(100).batch(**{"step": 0, "seq_len": 8, **wrong})


def test_notes_beside_the_ids_are_plain_json(spanish_file, tmp_path):
    data = TokenDataset.from_text_file(spanish_file, CharTokenizer(SPANISH), cache_dir=tmp_path / "cache")
    (note,) = (tmp_path / "cache").glob("*.json")
    assert json.loads(note.read_text()) == {"num_tokens": len(data), "text_bytes": len(SPANISH.encode())}
