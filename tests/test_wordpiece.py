"""WordPiece against the tokenizers library, transformers and rules worked out by hand; and a model that trains with it."""

import json

import numpy as np
import pytest
import regex
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer

from llmforge import GPT, GPTConfig, TokenDataset, TrainConfig, Trainer, export_gguf, export_hf, generate_text, load
from llmforge.cli.main import main
from llmforge.errors import ConfigError, ConvertError, DataError
from llmforge.tokenizers import BPETokenizer, WordPieceTokenizer, load_tokenizer, text_files, wordpiece

SPANISH = (
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.\r\n\r\n"
    "—¡Señor! —dijo Sancho—, ¿qué «gigantes» son áéíóúüñ ÁÉÍÓÚÜÑ (1605)?\r\n\tCapítulo IX: «Aquí yace...»\n"
) * 12
ENGLISH = (
    "I'll say we'RE 12, 345 or 2024... a ## b, C#, ###x and ##y; snake_case , . ! ? n't do not <|endoftext|> [UNK] {x}\n"
    * 6
)

KNOWN = sorted(set(SPANISH + ENGLISH) - set(" \r\n\t"))
SPACES = [" ", "  ", "\n", "\r\n\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85"]
known_text = st.lists(
    st.sampled_from(KNOWN) | st.sampled_from([*SPACES, " lugar", "Mancha", "##", "¿qué", "«", "»,", "<|endoftext|>"]),
    max_size=30,
).map("".join)
any_text = st.lists(
    st.sampled_from([*KNOWN, *SPACES, "🙂", "中", "e\u0301", "ß", "\0", "\u200b"])
    | st.characters(exclude_categories=["Cs"]),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer.from_texts([SPANISH, ENGLISH], vocab_size=280)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "quijote.txt"
    path.write_bytes((SPANISH + ENGLISH).encode())
    return path


# Text and ids


def by_hand(text, vocabulary):
    """Words, then the longest piece from the left each time; a word that no pieces make is [UNK]."""
    ids = []
    for part in text.split():
        words = regex.findall(r"[\p{P}\p{S}]|[^\p{P}\p{S}]+", part)
        for first, word in zip([True, *[False] * len(words)], words, strict=False):
            pieces, rest, prefix = [], word, "" if first else "##"
            while rest and len(word) <= 90:
                n = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in vocabulary), 0)
                if n == 0:
                    pieces = []
                    break
                pieces.append(vocabulary[prefix + rest[:n]])
                rest, prefix = rest[n:], "##"
            ids += pieces or [vocabulary["[UNK]"]]
    return ids


@given(text=known_text)
def test_ids_are_the_longest_pieces_from_left_to_right(tokenizer, saved, text):
    vocabulary = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert tokenizer.encode(text) == by_hand(text, vocabulary)


@given(text=known_text)
def test_all_but_the_kind_of_white_space_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


def test_spanish_and_english_come_back(tokenizer):
    for text in (SPANISH, ENGLISH):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == " ".join(text.split())
        assert len(ids) < 0.6 * len(text)
        assert not {0, tokenizer.eos_token_id} & set(ids)  # neither [UNK], nor a literal <|endoftext|> as the token


def test_pieces_show_one_by_one_what_they_show_together(tokenizer):
    ids = tokenizer.encode(SPANISH)
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids).decode() == " " + tokenizer.decode(ids)


def test_a_word_that_cannot_be_spelt_is_unknown_and_its_neighbours_are_not(tokenizer):
    long = "vivía" * 40
    assert tokenizer.decode(tokenizer.encode("¡hidalgo ni🙂, niß de.")) == "¡hidalgo ni [UNK], [UNK] de."
    assert tokenizer.decode(tokenizer.encode(f"un {long} hidalgo")) == "un [UNK] hidalgo"
    # Each character of the training text spells anything, at the beginning of a word and within, wherever it stood there.
    assert 0 not in tokenizer.encode(" ".join(f"{c}{c} x{c}" for c in KNOWN))


def test_special_tokens_are_as_in_the_other_vocabularies(tokenizer):
    eos = tokenizer.eos_token_id
    assert eos == tokenizer.bos_token_id == tokenizer.vocab_size - 1 == 279
    assert tokenizer.end_token_ids == {eos}
    assert tokenizer.add_bos is False
    assert tokenizer.special_tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "[UNK]",
    }
    assert tokenizer.decode([eos]) == "<|endoftext|>"
    assert tokenizer.encode_special("de<|endoftext|> la") == [*tokenizer.encode("de"), eos, *tokenizer.encode("la")]


@given(text=any_text)
def test_a_text_may_be_cut_where_safe_cut_says(tokenizer, text):
    cut = tokenizer.safe_cut(text)
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:] + "!x") == tokenizer.encode(text + "!x")


def test_a_text_is_not_cut_within_an_added_token(saved, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    library.add_tokens(["de la"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("lugar de la Mancha")[1] == tokenizer.vocab_size - 1
    assert tokenizer.safe_cut("lugar de") == 0
    assert tokenizer.decode(tokenizer.encode("lugar de la Mancha")) == "lugar de la Mancha"


def test_a_long_text_has_the_ids_of_its_parts(tokenizer, monkeypatch):
    ids = tokenizer.encode(SPANISH)
    monkeypatch.setattr(wordpiece, "_PART_CHARS", 7)
    assert tokenizer.encode(SPANISH) == ids
    pieces = (SPANISH[i : i + 5] for i in range(0, len(SPANISH), 5))
    parts = [part.tolist() for part in tokenizer.encode_pieces(pieces)]
    assert len(parts) > 10
    assert [i for part in parts for i in part] == ids


# Training the vocabulary


def test_training_repeats_and_does_not_depend_on_the_chunks(text_file, tmp_path, monkeypatch):
    files = set()
    for number, chunk_bytes in enumerate((2**20, 2**20, 2**20, 100)):
        monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk_bytes)
        WordPieceTokenizer.from_text_file([text_file], vocab_size=250).save(tmp_path / str(number))
        files.add((tmp_path / str(number) / "tokenizer.json").read_bytes())
    assert len(files) == 1


def test_vocabulary_sizes_that_cannot_be():
    message = r"vocab_size \(11\) must be at least 12: two for each of the 5 characters .* BPETokenizer needs 257"
    with pytest.raises(ConfigError, match=message):
        WordPieceTokenizer.from_texts(["ab ñ\n c"], vocab_size=11)
    smallest = WordPieceTokenizer.from_texts(["ab ñ\n c"], vocab_size=12)  # a, b, c, ñ and #
    assert smallest.decode(smallest.encode("cañabañ#")) == "cañabañ#"
    for kind in (WordPieceTokenizer, BPETokenizer):  # the library would end the process
        with pytest.raises(ConfigError, match=r"vocab_size \(100000000000\) must be at most 1048576"):
            kind.from_texts([SPANISH], vocab_size=10**11)
        assert kind.from_texts([SPANISH], vocab_size=30_000).vocab_size < 30_000  # no more pairs that occur twice
    with pytest.raises(DataError, match="needs at least one word"):
        WordPieceTokenizer.from_texts([" \n\t"])


def test_only_what_occurs_twice_is_learnt():
    ids = [
        WordPieceTokenizer.from_texts([text], vocab_size=99).encode("hidalgo")
        for text in ("hidalgo", "hidalgo hidalgo")
    ]
    assert [len(one) for one in ids] == [7, 1]


# Files


def test_a_saved_tokenizer_is_the_same_one(tokenizer, saved, tmp_path):
    back = load_tokenizer(saved)
    assert type(back) is WordPieceTokenizer
    assert (back.vocab_size, back.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_token_id)
    assert back.encode(SPANISH + ENGLISH) == tokenizer.encode(SPANISH + ENGLISH)
    back.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    (tmp_path / "tokenizer_config.json").unlink()  # what it says is known without it
    assert load_tokenizer(tmp_path).eos_token_id == tokenizer.eos_token_id


@given(text=any_text)
def test_autotokenizer_agrees(in_transformers, tokenizer, text):
    library, reference = in_transformers
    ids = tokenizer.encode(text)
    assert reference(text)["input_ids"] == ids
    assert library.encode(text).ids == ids
    assert reference.decode(ids) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def in_transformers(saved):
    # As the tokenizers of the other kinds are tested: our `encode` takes a literal "<|endoftext|>" as text.
    library = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    library.encode_special_tokens = True
    return library, AutoTokenizer.from_pretrained(saved, split_special_tokens=True)


def test_berts_own_files_are_refused_by_name(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hola"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.json: the normalizer of this WordPiece tokenizer .* BPETokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"continuing_subword_prefix": "@@"}, "continuing_subword_prefix is '@@', '##' is supported"),
        ({"vocab": {"a": 0}}, r"there is no token \[UNK\]"),
    ],
)
def test_a_changed_file_is_refused(saved, tmp_path, change, message):
    content = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


# A model


def toy_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    shape = dict(block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    return GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))


def toy_trainer(tokenizer, text_file, out_dir, *, seed=0):
    data = TokenDataset.from_text_file(text_file, tokenizer)
    settings = dict(max_steps=12, micro_batch_size=4, warmup_steps=2, lr=1e-2, eval_every_steps=None, device="cpu")
    settings |= dict(sample_every_steps=4, sample_tokens=5, save_every_steps=7)
    config = TrainConfig(**settings, out_dir=str(out_dir))
    return Trainer(toy_model(tokenizer, seed), data, tokenizer=tokenizer, config=config)


def test_bytes_per_token_counts_the_bytes_of_the_text_not_of_what_comes_back(tokenizer, text_file):
    data = TokenDataset.from_text_file(text_file, tokenizer)
    ids = tokenizer.encode(SPANISH + ENGLISH)
    np.testing.assert_array_equal(data.ids, ids)
    assert data.bytes_per_token == text_file.stat().st_size / len(ids)
    assert len(tokenizer.decode(ids).encode()) < text_file.stat().st_size  # white space that is lost counts


def test_documents_end_with_the_end_of_text(tokenizer, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("un hidalgo", encoding="utf-8")
    hidalgo, eos = tokenizer.encode("un hidalgo"), tokenizer.eos_token_id
    assert TokenDataset.from_text_file(tmp_path, tokenizer).ids.tolist() == [*hidalgo, eos, *hidalgo, eos]


def test_resume_within_an_epoch_equals_the_uninterrupted_run(tokenizer, text_file, tmp_path):
    whole = toy_trainer(tokenizer, text_file, tmp_path / "whole")
    assert len(whole.train_data) // 16 - 1 > 7 * 4  # step 7 is within the first epoch
    whole.train(progress=False)
    first = toy_trainer(tokenizer, text_file, tmp_path / "parts")
    for metrics in first:
        if metrics.step == 7:
            break
    checkpoint = first.save()
    # As a new process does it: the vocabulary of the checkpoint, and other initial weights.
    second = toy_trainer(load_tokenizer(checkpoint), text_file, tmp_path / "parts", seed=1)
    assert not same(weights(whole.model), weights(second.model))
    assert second.resume()
    assert second.step == 7
    second.train(progress=False)
    assert same(weights(whole.model), weights(second.model))


def test_a_prompt_of_white_space_begins_with_the_end_of_text(tokenizer):
    model = toy_model(tokenizer).eval()
    options = dict(max_new_tokens=4, temperature=0)
    assert tokenizer.prompt_ids(" \n") == tokenizer.prompt_ids("") == [tokenizer.eos_token_id]
    assert (
        generate_text(model, tokenizer, "\n", **options).strip()
        == generate_text(model, tokenizer, "", **options).strip()
    )


def test_transformers_loads_the_exported_folder_with_equal_ids_and_logits(tokenizer, tmp_path):
    model = toy_model(tokenizer).eval()
    export_hf(model, tokenizer, tmp_path / "hf")
    theirs, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    assert len(reference) == reference.vocab_size == theirs.config.vocab_size == tokenizer.vocab_size
    assert reference.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_token_id
    assert reference.unk_token_id == 0
    for text in (SPANISH, ENGLISH.replace("<|endoftext|>", "").replace("[UNK]", "")):
        ids = reference(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert reference.decode(ids) == tokenizer.decode(ids) == " ".join(text.split())
    idx = torch.tensor([tokenizer.encode(SPANISH)[:16]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-5, rtol=0)  # order of float sums
    back, its_tokenizer = load(tmp_path / "hf")
    assert isinstance(its_tokenizer, WordPieceTokenizer)
    assert same(weights(back), weights(model))


def test_there_is_no_gguf_and_the_error_says_why_before_any_work(tokenizer, tmp_path):
    message = r"only as BERT's: llama\.cpp cuts .* lower-cases .* byte-level BPE \(BPETokenizer, --tokenizer bpe\)"
    model = toy_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan  # found where a tensor is read: none is
    with pytest.raises(ConvertError, match=message):
        export_gguf(model, tokenizer, tmp_path / "a" / "model.gguf")
    assert not any(tmp_path.iterdir())


# The command line

TOY = ["--set", "n_layer=1", "--set", "n_embd=16", "--set", "n_head=2", "--set", "block_size=16", "--set", "device=cpu"]
TOY += ["--set", "eval_batches=2", "--set", "sample_tokens=5", "--preset", "char-gpt-cpu"]
WORDPIECE = ["--tokenizer", "wordpiece", "--vocab-size", "260"]


def test_train_resume_generate_and_export(text_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(text_file), "--out", str(run), "--steps", "3", *WORDPIECE, *TOY]) == 0
    out = capsys.readouterr().out
    assert "(wordpiece, vocabulary of 260)" in out
    assert f"llmforge export {run} --hf run-hf" in out  # what is printed to be typed must work
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert isinstance(load_tokenizer(run / "step-000005"), WordPieceTokenizer)
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "¿Señor: un lugar", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("¿Señor: un lugar")
    hf, gguf = tmp_path / "hf", tmp_path / "run.gguf"
    for targets in (["--gguf", str(gguf)], ["--hf", str(hf), "--gguf", str(gguf)]):
        assert main(["export", str(run), *targets]) == 2
        assert "error: a GGUF file can hold WordPiece only as BERT's" in capsys.readouterr().err
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]
    assert main(["export", str(run), "--hf", str(hf)]) == 0
    assert isinstance(load_tokenizer(hf), WordPieceTokenizer)


def test_the_ways_to_ask_for_it(text_file, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("tokenizer: {kind: wordpiece, vocab_size: 270}\n", encoding="utf-8")
    config = ["--config", str(tmp_path / "run.yaml")]
    settings = ["--set", "tokenizer.kind=wordpiece", "--set", "tokenizer.vocab_size=250"]
    for number, (ask, size) in enumerate(((settings, 250), (config, 270), ([*config, "--vocab-size", "240"], 240))):
        arguments = ["train", str(text_file), "--out", str(tmp_path / str(number)), "--steps", "1", *ask, *TOY]
        assert main(arguments) == 0
        assert f"(wordpiece, vocabulary of {size})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "wordpiece", "--vocab-size", "20"], r"vocab_size (20) must be at least "),
        (["--tokenizer", "wordpiece", "--vocab-size", "9999999"], "vocab_size (9999999) must be at most 1048576"),
        (["--tokenizer", "gpt2", "--vocab-size", "20"], "--vocab-size is for --tokenizer bpe or wordpiece"),
        (["--set", "tokenizer.kind=wordpieces"], "'char', 'bpe', 'wordpiece', 'gpt2', 'file', got 'wordpieces'"),
    ],
)
def test_bad_requests_end_in_one_message(text_file, tmp_path, capsys, arguments, message):
    assert main(["train", str(text_file), "--out", str(tmp_path / "run"), "--steps", "1", *arguments, *TOY]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_takes_a_tokenizer_that_is_there(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("En un lugar de la Mancha, de cuyo nombre no quiero acordarme.\n" * 60, encoding="utf-8")
    WordPieceTokenizer.from_text_file(text, vocab_size=120).save(tmp_path / "mine")
    toy = ["--preset", "bit-gpt", "--steps", "3", "--set", "n_layer=1", "--set", "n_embd=256", "--set", "n_head=4"]
    toy += ["--set", "block_size=16", "--set", "device=cpu", "--set", "eval_batches=1", "--set", "sample_tokens=3"]
    for number, name in enumerate((tmp_path / "mine", tmp_path / "mine" / "tokenizer.json")):
        out = tmp_path / f"run{number}"
        assert main(["train", str(text), "--out", str(out), "--tokenizer", str(name), *toy]) == 0
        model, tokenizer = load(out)
        assert isinstance(tokenizer, WordPieceTokenizer)
        assert model.config.vocab_size == tokenizer.vocab_size == load_tokenizer(tmp_path / "mine").vocab_size
        assert model.config.ternary
    assert main(["train", "--resume", str(tmp_path / "run0"), "--steps", "5"]) == 0
    capsys.readouterr()
    for arguments, words in [
        (["--tokenizer", "bqe"], "--tokenizer 'bqe' is no kind and no folder; did you mean 'bpe'?"),
        (["--tokenizer", str(tmp_path)], "has no tokenizer.json"),
        (["--set", "tokenizer.kind=file"], "tokenizer kind 'file' and path None do not fit"),
    ]:
        assert main(["train", str(text), "--out", str(tmp_path / "no"), *toy, *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("error:") == 1
    assert not (tmp_path / "no").exists()
