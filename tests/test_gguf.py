"""GGUF files in the real llama.cpp, and what cannot be one."""

import json
import math
import re
from dataclasses import replace

import gguf
import llama_cpp  # the reference: where it is missing these tests fail, they are not skipped
import numpy as np
import pytest
import torch
from torch import nn

from llmforge.convert import export_gguf, export_hf, load
from llmforge.convert.gpt2 import GPT2
from llmforge.deploy import verify, verify_gguf
from llmforge.errors import CheckpointError, ConvertError, DataError
from llmforge.formats.gguf import read_gguf_header, read_gguf_tensors
from llmforge.models import GPT, GPTConfig
from llmforge.tokenizers import PRE_TOKENIZERS, BPETokenizer, CharTokenizer

TEXT = (
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme , no ha mucho tiempo que vivía un hidalgo...\n\n"
    "—¡Ay, señor! —dijo Sancho—. ¿«Yelmo» o bacía? ¡Ñu!   Año 1605, 12.345 maravedís;\tvergüenza\r\n— it's <|endoftext|>\n"
)
CHARS = CharTokenizer.from_text(TEXT)
BPE = {pre: BPETokenizer.from_texts([TEXT], vocab_size=300, pre_tokenizer=pre) for pre in PRE_TOKENIZERS}
assert llama_cpp.__version__


def toy(tokenizer=CHARS, **changes) -> GPT:
    """A model whose every parameter matters, with logits that differ."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config.replace(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


# Untied and without biases, with each pre-tokenizer, on text that is not the one it was trained on.
@pytest.mark.parametrize(
    ("pre", "changes"),
    [
        ("gpt-2", dict(tie_word_embeddings=True, bias=True, block_size=256)),
        ("llama-bpe", dict(tie_word_embeddings=False, bias=True)),
        ("qwen2", dict(tie_word_embeddings=True, bias=False)),
        ("smollm", dict(tie_word_embeddings=False, bias=False, activation_function="gelu")),
    ],
)
def test_llama_cpp_computes_the_same_from_float32(tmp_path, pre, changes):
    tokenizer = BPE[pre]
    model = toy(tokenizer, **changes)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    export_gguf(model, tokenizer, tmp_path / "x.gguf", file_type="F32")
    text = TEXT + "".join(map(chr, range(33, 700))) + " 😀👍🏽  x\n\n\n  y  1234567 ſ'S '\u0301e\n"
    report = verify_gguf(tmp_path / "x.gguf", model, tokenizer, text=text)
    assert report.ids_equal
    assert report.pieces_equal
    assert report.detokenize_equal == (pre in ("qwen2", "smollm"))  # the others drop a space before punctuation
    assert report.kl_mean <= 1e-6  # GELU through a float16 table
    assert report.argmax_agreement > 0.999
    assert report.perplexity_file == pytest.approx(report.perplexity_model, rel=1e-3)
    assert report.greedy_equal == report.greedy_tokens or report.greedy_is_near_tie
    assert report.passed
    assert "same as the model" in str(report)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())  # never edited


@pytest.mark.parametrize(
    (
        "file_type",
        "kl_limit",
        "ratio",
    ),  # limits of random models, which are harder than trained ones; size to float32's
    [("F16", 1e-6, 0.55), ("BF16", 1e-4, 0.55), ("Q8_0", 1e-3, 0.35)],
)
def test_llama_cpp_computes_nearly_the_same_from_smaller_types(tmp_path, file_type, kl_limit, ratio):
    model = toy(n_embd=128).train()
    report = export_gguf(model, CHARS, tmp_path / "x.gguf", file_type=file_type)
    verified = verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT * 3)
    assert verified.file_type == file_type
    assert verified.ids_equal
    assert verified.pieces_equal
    assert verified.detokenize_equal
    assert verified.kl_mean <= kl_limit
    assert verified.argmax_agreement >= 0.95
    assert verified.passed
    assert model.training  # left as it was
    assert report.tensors == {file_type: 9, "F32": 2 + 2 * 8 + 1}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not model.transformer.wpe.weight)
    rest = sum(p.numel() for p in model.parameters()) - matrices + (256 - 64) * 128
    assert report.bytes - 4 * rest < ratio * 4 * matrices + 10_000


def test_verify_finds_a_single_wrong_weight_and_another_tokenizer(tmp_path):
    model = toy()
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] += 0.5
    other = CharTokenizer(["ß", *CHARS.chars[:-1]])  # as many tokens, one letter less
    report = verify_gguf(tmp_path / "x.gguf", model, other, text="En un lugar donde vivía un hidalgo.\n")
    assert not report.ids_equal
    assert report.kl_mean > report.kl_limit
    assert not report.passed
    assert "NOT the same as the model" in str(report)
    assert "DIFFERENT" in str(report)


def test_a_report_passes_only_if_every_part_is_good(tmp_path):
    model = toy()
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    good = verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT)
    assert good.passed
    parted = dict(greedy_equal=3, greedy_gap=10 * good.logit_diff_max)
    for bad in (dict(ids_equal=False), dict(pieces_equal=False), dict(kl_mean=1e-5), dict(kl_mean=math.nan), parted):
        assert not replace(good, **bad).passed
    tie = replace(good, greedy_equal=3, greedy_gap=0.5 * good.logit_diff_max)
    assert tie.passed
    assert "then a near-tie" in str(tie)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan  # after the export: NaN must not look like a divergence of 0
    assert not verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT).passed


def test_the_default_text_is_one_that_the_model_writes(tmp_path):
    tokenizer, rows = BPE["qwen2"], BPE["qwen2"].vocab_size + 50  # padded as nanoGPT's
    model = toy(tokenizer, vocab_size=rows).to(torch.bfloat16)  # compared in float32 all the same
    report = export_gguf(model, tokenizer, tmp_path / "x.gguf", file_type="F32")
    assert any(note.startswith("50 of the model's") for note in report.notes)
    verified = verify_gguf(tmp_path / "x.gguf", model, tokenizer, greedy_tokens=10)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert verified.passed
    assert verified.n_text_tokens > 20
    assert verified.greedy_tokens == 10
    tokens = read_gguf_header(tmp_path / "x.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == rows  # llama.cpp aborts at two of the same name
    assert read_gguf_header(tmp_path / "x.gguf").metadata["tokenizer.ggml.token_type"][-50:] == [5] * 50


def test_a_model_without_end_of_text_gets_a_token_that_it_never_chooses(tmp_path):
    """nanoGPT's character models: 65 rows, where the tokenizer has 66."""
    for tied, file_type in [(True, "F32"), (False, "Q8_0")]:
        model = toy(vocab_size=CHARS.vocab_size - 1, bias=False, tie_word_embeddings=tied, n_embd=96)
        export_gguf(model, CHARS, tmp_path / "x.gguf", file_type=file_type)
        report = verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT)
        assert report.kl_mean <= {"F32": 1e-6, "Q8_0": 1e-3}[file_type]
        assert report.passed
        header = read_gguf_header(tmp_path / "x.gguf")
        assert header.metadata["tokenizer.ggml.eos_token_id"] == CHARS.eos_token_id == CHARS.vocab_size - 1
        assert {t.shape[0] for t in header.tensors if t.name in ("token_embd.weight", "output.weight")} == {
            CHARS.vocab_size
        }


def answer_of_llama_cpp(folder, path, n_tokens: int) -> np.ndarray:
    """Logits of `n_tokens` tokens in one window."""
    request = dict(gguf=str(path), n_ctx=256, windows=[n_tokens], prompt_tokens=1, greedy_tokens=0)
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    (folder / "text.txt").write_text("a", encoding="utf-8")
    (np.arange(n_tokens, dtype=np.int32) % 40).tofile(folder / "ids.i32")
    verify.run_llama_cpp(folder, path, 60)
    return np.fromfile(folder / "logits.f32", dtype=np.float32).reshape(n_tokens, -1)


def test_a_client_that_reads_past_the_context_does_not_crash(tmp_path, monkeypatch):
    model = toy(block_size=64)
    report = export_gguf(model, CHARS, tmp_path / "padded.gguf", file_type="F32")
    assert any("context padded from 64 to 256" in note for note in report.notes)
    logits = torch.from_numpy(answer_of_llama_cpp(tmp_path, tmp_path / "padded.gguf", 256))
    assert torch.isfinite(logits).all()
    with torch.no_grad():
        expected = model(torch.arange(64)[None] % 40)[0]
    assert (logits[:64] - expected).abs().max() < 0.01
    # Control: the same file as it would be without padding ends llama.cpp; verify turns that into an error with its words.
    monkeypatch.setattr(GPT2, "to_gguf", lambda self, config, tensors: (config, tensors, []))
    export_gguf(model, CHARS, tmp_path / "bare.gguf", file_type="F32")
    with pytest.raises(ConvertError, match=r"llama\.cpp could not run .*bare\.gguf \(SIGABRT\)(.|\n)*GGML_ASSERT"):
        answer_of_llama_cpp(tmp_path, tmp_path / "bare.gguf", 256)


def test_a_file_that_llama_cpp_refuses_is_an_error_with_its_words(tmp_path, monkeypatch):
    model = toy()
    name = GPT2.gguf_name
    monkeypatch.setattr(GPT2, "gguf_name", lambda self, own: name(self, own).replace("output_norm", "final_norm"))
    export_gguf(model, CHARS, tmp_path / "x.gguf")
    with pytest.raises(ConvertError, match=r"llama\.cpp could not run .*(.|\n)*output_norm\.weight"):
        verify_gguf(tmp_path / "x.gguf", model, CHARS)


def test_verify_says_what_is_missing_or_does_not_fit(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    export_gguf(toy(), CHARS, path)
    with pytest.raises(ConvertError, match="the file has a context of 256 tokens, the model of 512"):
        verify_gguf(path, toy(block_size=512), CHARS)
    with pytest.raises(
        ConvertError, match=rf"the file has {CHARS.vocab_size} tokens, the model {CHARS.vocab_size + 4}"
    ):
        verify_gguf(path, toy(vocab_size=CHARS.vocab_size + 4), CHARS, text=TEXT)
    with pytest.raises(DataError, match="the text 'E' has 1 tokens"):
        verify_gguf(path, toy(), CHARS, text="E")
    with pytest.raises(ConvertError, match=r"did not finish .*x\.gguf in 0\.01 s"):
        verify_gguf(path, toy(), CHARS, text=TEXT, timeout_seconds=0.01)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"x\.gguf is cut off"):
        verify_gguf(path, toy(), CHARS, text=TEXT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConvertError, match=r'pip install "llmforge\[verify\]"'):
        verify_gguf(path, toy(), CHARS, text=TEXT)


def test_the_file_says_what_clients_need(tmp_path):
    model = toy(block_size=300, bias=False)
    report = export_gguf(model, CHARS, tmp_path / "quijote.gguf")
    header = read_gguf_header(tmp_path / "quijote.gguf")
    vocabulary = CHARS.gguf_vocabulary()
    assert header.metadata == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "quijote",
        "general.size_label": header.metadata["general.size_label"],
        "general.file_type": 1,
        "general.quantization_version": 2,
        "gpt2.context_length": 512,
        "gpt2.embedding_length": 64,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 256,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "gpt2.vocab_size": CHARS.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": CHARS.eos_token_id,
        "tokenizer.ggml.eos_token_id": CHARS.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    types = {int(gguf.LlamaFileType.MOSTLY_F16): "F16"}
    assert types == {header.metadata["general.file_type"]: report.file_type}
    assert re.fullmatch(r"\d+(\.\d+)?[KM]", header.metadata["general.size_label"])
    # Norms, biases and positions F32; every bias of gpt2 there, though the model has none.
    assert {t.type_name for t in header.tensors if len(t.shape) == 1 or t.name == "position_embd.weight"} == {"F32"}
    assert {t.type_name for t in header.tensors if len(t.shape) == 2 and t.name != "position_embd.weight"} == {"F16"}
    biases = [t for t in header.tensors if t.name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1
    tensors = read_gguf_tensors(tmp_path / "quijote.gguf", header)
    assert not any(tensors[t.name].read().any() for t in biases)
    assert export_gguf(model, CHARS, tmp_path / "x.gguf", name="Don Q.").path == tmp_path / "x.gguf"
    assert read_gguf_header(tmp_path / "x.gguf").metadata["general.name"] == "Don Q."


def test_file_type_numbers_are_llama_cpps():
    from llmforge.convert.mixture import FILE_TYPES

    theirs = {name: "ALL_F32" if name == "F32" else f"MOSTLY_{name}" for name in FILE_TYPES}
    assert {name: int(gguf.LlamaFileType[theirs[name]]) for name in theirs} == {
        name: number for name, (number, _) in FILE_TYPES.items()
    }


def test_rows_that_q8_0_cannot_hold_are_f16(tmp_path):
    model = toy(n_embd=48)  # the rows of ffn_down have 4 * 48 = 192 = 6 * 32
    report = export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="Q8_0")
    assert report.tensors == {"F16": 7, "Q8_0": 2, "F32": 2 + 2 * 8 + 1}
    assert any(note.startswith("7 tensors with rows of 48 are F16 instead of Q8_0") for note in report.notes)
    assert verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT).passed


def test_a_folder_is_exported_with_its_own_tokenizer(tmp_path):
    model = toy()
    export_hf(model, CHARS, tmp_path / "hf")
    export_gguf(tmp_path / "hf", None, tmp_path / "a.gguf", name="x")
    export_gguf(model, CHARS, tmp_path / "b.gguf", name="x")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    export_hf(model, None, tmp_path / "bare")
    assert load(tmp_path / "bare")[1] is None
    with pytest.raises(ConvertError, match="a GGUF file contains the tokenizer"):
        export_gguf(tmp_path / "bare", None, tmp_path / "c.gguf")


def with_weight(value: float) -> GPT:
    model = toy()
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = value
    return model


@pytest.mark.parametrize(
    ("model", "tokenizer", "file_type", "message"),
    [
        (toy(), CHARS, "Q9_K", r"file_type \('Q9_K'\) must be one of F32, F16, BF16, Q4_0, "),
        (nn.Linear(2, 2), CHARS, "F16", "Linear is no model that other programs know"),
        (with_weight(torch.nan), CHARS, "F16", r"h\.0\.mlp\.c_fc\.weight holds NaN or infinity"),
        (
            with_weight(-1e5),
            CHARS,
            "F16",
            r"blk\.0\.ffn_up\.weight: a value of 1e\+05 is too large for F16; take BF16 or F32",
        ),
        (with_weight(1e7), CHARS, "Q8_0", r"blk\.0\.ffn_up\.weight: a value of 1e\+07 is too large for Q8_0"),
        (toy(vocab_size=20), CHARS, "F16", r"the model has 20 tokens and the tokenizer \d+"),
        (toy(vocab_size=400), CHARS, "F16", r"the model has 400 tokens and the tokenizer \d+; take the tokenizer"),
        (toy(vocab_size=CHARS.vocab_size - 1, n_embd=32), CHARS, "F16", r"vocab_size \(\d+\) < n_embd \(32\)"),
        (toy(), None, "F16", "a GGUF file contains the tokenizer"),
    ],
)
def test_what_cannot_be_a_gguf_is_refused_with_the_reason(tmp_path, model, tokenizer, file_type, message):
    with pytest.raises(ConvertError, match=message):
        export_gguf(model, tokenizer, tmp_path / "x.gguf", file_type=file_type)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_holds_large_values(tmp_path):
    export_gguf(with_weight(1e30), CHARS, tmp_path / "x.gguf", file_type="BF16")
    header = read_gguf_header(tmp_path / "x.gguf")
    tensor = read_gguf_tensors(tmp_path / "x.gguf", header)["blk.0.ffn_up.weight"]
    assert tensor.read()[0, 0].item() == pytest.approx(1e30, rel=2**-8)


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path):
    BPE["qwen2"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(values), encoding="utf-8")
    tokenizer = BPETokenizer.from_file(path)
    with pytest.raises(ConvertError):
        export_gguf(toy(tokenizer), tokenizer, tmp_path / "x.gguf")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CharTokenizer, "eos_token_id", None)
    with pytest.raises(
        ConvertError, match=r"the tokenizer has no <\|endoftext\|>, and llama\.cpp needs a token to stop at"
    ):
        export_gguf(toy(), CHARS, tmp_path / "x.gguf")
