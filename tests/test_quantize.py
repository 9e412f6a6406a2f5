"""GGUF files from floats to any type: whole files against llama.cpp's quantize, and what the report says against a case by hand."""

import json
import math
import shutil
from dataclasses import replace

import llama_cpp
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from toy import TEXT, toy_tokenizer

from llmforge import collect_imatrix, export_gguf, load, quantization_report, quantize_gguf, verify_gguf
from llmforge.cli.main import main
from llmforge.cli.types import FILE_TYPES
from llmforge.convert import mixture
from llmforge.errors import CheckpointError, ConvertError, DataError
from llmforge.formats.gguf import GGUFTensor, read_gguf_bytes, read_gguf_header, read_gguf_tensors, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.models import GPT, GPTConfig, Llama, LlamaConfig
from llmforge.quant.ggml import decode, encode

CHARS = toy_tokenizer()


def gpt(**changes) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=CHARS.vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=256)
    return GPT(GPTConfig(**{**shape, **changes}))


def llama(**changes) -> Llama:
    torch.manual_seed(0)
    shape = dict(vocab_size=CHARS.vocab_size, hidden_size=256, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, intermediate_size=512, max_position_embeddings=64)
    return Llama(LlamaConfig(**{**shape, **changes}))


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: object) -> None:
    pass


def quantize_by_llama_cpp(source, target, file_type: str) -> None:
    llama_cpp.llama_log_set(_silent, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = mixture.FILE_TYPES[file_type][0], 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


def tensors_of(path) -> dict[str, tuple[str, bytes]]:
    header = read_gguf_header(path)
    return {i.name: (i.type_name, read_gguf_bytes(path, i).read().numpy().tobytes()) for i in header.tensors}


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q2_K", "Q3_K_L", "Q5_K_S", "Q8_0", "IQ4_XS", "TQ2_0"])
@pytest.mark.parametrize(
    ("model", "source_type"),
    [(gpt(), "F32"), (gpt(n_embd=96), "F16"), (llama(), "BF16"), (llama(tie_word_embeddings=True), "F32")],
    ids=["gpt", "gpt of 96", "llama", "tied llama"],
)
def test_a_quantized_file_is_that_of_llama_cpp(model, source_type, file_type, tmp_path):
    source, ours, theirs = tmp_path / "source.gguf", tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    export_gguf(model, CHARS, source, file_type=source_type)
    report = quantize_gguf(source, ours, file_type=file_type)
    quantize_by_llama_cpp(source, theirs, file_type)
    assert tensors_of(ours) == tensors_of(theirs)
    assert report.tensors == {
        t: sum(t == type_name for type_name, _ in tensors_of(ours).values()) for t in report.tensors
    }
    left, right = read_gguf_header(ours), read_gguf_header(theirs)
    assert left.metadata == right.metadata
    assert left.types == right.types
    if source_type == "F32":  # straight from the model: the same tensors, without the file between
        export_gguf(model, CHARS, tmp_path / "direct.gguf", file_type=file_type)
        assert tensors_of(tmp_path / "direct.gguf") == tensors_of(theirs)


def test_a_folder_goes_straight_to_a_quantized_file(tmp_path):
    from llmforge import export_hf

    model = llama()
    export_hf(model, CHARS, tmp_path / "hf")
    seen = []
    export_gguf(
        tmp_path / "hf", None, tmp_path / "a.gguf", file_type="Q4_K_M", progress=lambda *pair: seen.append(pair)
    )
    export_gguf(model, CHARS, tmp_path / "b.gguf", file_type="Q4_K_M")
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(tmp_path / "b.gguf")
    n_weights = model.num_params()
    assert seen[-1] == (n_weights, n_weights)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_the_file_computes_is_what_llama_cpp_computes(tmp_path):
    for model in (gpt(), llama()):
        export_gguf(model, CHARS, tmp_path / "m.gguf", file_type="Q4_K_M")
        report = verify_gguf(tmp_path / "m.gguf", model, CHARS, text=TEXT, max_tokens=128, greedy_tokens=8)
        assert report.passed, report
        assert report.kl_of_rounding > 10 * report.kl_mean  # rounding the weights costs more than what llama.cpp rounds
        assert "same as its own weights" in str(report)


def test_a_file_of_other_weights_shows_in_the_rounding(tmp_path):
    model = llama()
    export_gguf(model, CHARS, tmp_path / "m.gguf", file_type="Q4_K_M")
    good = verify_gguf(tmp_path / "m.gguf", model, CHARS, text=TEXT, max_tokens=64, greedy_tokens=4)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.flip(0))
    other = verify_gguf(tmp_path / "m.gguf", model, CHARS, text=TEXT, max_tokens=64, greedy_tokens=4)
    assert other.kl_of_rounding > 20 * good.kl_of_rounding


def test_metadata_keeps_its_types_and_every_byte(tmp_path):
    metadata = {
        "llama.block_count": 1,
        "llama.attention.head_count": 1,
        "a.u8": 7,
        "a.i64": -5,
        "a.f64": 0.1,
        "a.flag": True,
    }
    metadata |= {"a.text": "ñ\udcff", "a.list": ["x", "\udc80y"], "a.numbers": [1, 2, 3]}
    types = {
        "a.u8": (GGUFValueType.UINT8, None),
        "a.i64": (GGUFValueType.INT64, None),
        "a.f64": (GGUFValueType.FLOAT64, None),
    }
    types["a.numbers"] = (GGUFValueType.ARRAY, GGUFValueType.UINT16)
    weight = LazyTensor.of(torch.randn(4, 256))
    tensors = [GGUFTensor("token_embd.weight", "F32", weight), GGUFTensor("blk.0.ffn_up.weight", "F32", weight)]
    write_gguf(tmp_path / "in.gguf", "llama", metadata, tensors, types=types)
    assert b"\xc3\xb1\xff" in (tmp_path / "in.gguf").read_bytes()
    quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", file_type="Q4_0")
    before, after = (read_gguf_header(tmp_path / name, exact_text=True) for name in ("in.gguf", "out.gguf"))
    written = {"general.file_type": 2, "general.quantization_version": 2}
    assert after.metadata == before.metadata | written
    assert {k: after.types[k] for k in before.types} == before.types
    fields = GGUFReader(tmp_path / "out.gguf").fields  # and as the gguf package reads them
    assert fields["a.numbers"].types == [GGUFValueType.ARRAY, GGUFValueType.UINT16]
    assert bytes(fields["a.text"].parts[-1]) == b"\xc3\xb1\xff"


def test_quantizing_twice_must_be_asked_for(tmp_path):
    export_gguf(llama(), CHARS, tmp_path / "q8.gguf", file_type="Q8_0")
    with pytest.raises(ConvertError, match=r"token_embd\.weight in Q8_0 already.*--requantize"):
        quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", file_type="Q4_K_S")
    assert not (tmp_path / "q4.gguf").exists()
    quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", file_type="Q4_K_S", requantize=True)
    before, after = (read_gguf_header(tmp_path / name) for name in ("q8.gguf", "q4.gguf"))
    values = read_gguf_tensors(tmp_path / "q8.gguf", before)
    for info in after.tensors:
        expected = encode(values[info.name].read().reshape(-1, info.shape[-1]), info.type_name)
        assert read_gguf_bytes(tmp_path / "q4.gguf", info).read().flatten().equal(expected.flatten())
    # What has the type already is copied, and not asked about.
    quantize_gguf(tmp_path / "q8.gguf", tmp_path / "again.gguf", file_type="Q8_0")
    assert tensors_of(tmp_path / "again.gguf") == tensors_of(tmp_path / "q8.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata: metadata | {"split.count": 3}, "one of several parts"),
        (
            lambda metadata: metadata | {"llama.expert_count": 8},
            "mixtures of llama models with these parts are not known",
        ),
        (lambda metadata: metadata | {"llama.block_count": "two"}, r"llama\.block_count is 'two'"),
        (
            lambda metadata: {k: v for k, v in metadata.items() if k != "llama.block_count"},
            r"llama\.block_count is None",
        ),
    ],
)
def test_a_file_that_the_mixtures_are_not_for_is_refused(change, message, tmp_path):
    metadata = change({"llama.block_count": 2, "llama.attention.head_count": 2})
    tensors = [GGUFTensor("blk.0.ffn_up.weight", "F32", LazyTensor.of(torch.randn(2, 256)))]
    write_gguf(tmp_path / "in.gguf", "llama", metadata, tensors)
    with pytest.raises(ConvertError, match=message):
        quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", file_type="Q4_K_M")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_value_that_does_not_fit_names_its_tensor_and_leaves_no_file(tmp_path):
    for value, message in (
        (math.nan, "blk.0.ffn_up.weight: a value is NaN"),
        (1e8, "blk.0.ffn_up.weight: a value of 1e"),
    ):
        weight = torch.randn(2, 256)
        weight[1, 7] = value
        tensors = [GGUFTensor("blk.0.ffn_up.weight", "F32", LazyTensor.of(weight.view(torch.uint8)))]  # unseen
        write_gguf(tmp_path / "in.gguf", "llama", {"llama.block_count": 1, "llama.attention.head_count": 1}, tensors)
        with pytest.raises(ConvertError, match=message):
            quantize_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", file_type="Q4_K_M")
        assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_matrices_without_importance_are_noted(tmp_path):
    model = llama()
    whole = collect_imatrix(model, CHARS.encode(TEXT)[:256], chunk_tokens=64)
    part = replace(whole, sums={name: s for name, s in whole.sums.items() if name.startswith("blk.0.")})
    for importance, count in ((whole, 0), (part, 7)):
        report = export_gguf(model, CHARS, tmp_path / "m.gguf", file_type="Q4_K_M", importance=importance)
        assert [
            note for note in report.notes if f"{count} of 14 matrices are not in the importance" in note
        ] == report.notes
        assert len(report.notes) == (count > 0)


# --- The report


def test_the_report_says_what_a_file_lost(tmp_path):
    model = llama()
    path = tmp_path / "m.gguf"
    export_gguf(model, CHARS, path, file_type="Q4_K_M")
    report = quantization_report(path, model, CHARS, text=TEXT, max_tokens=200)
    header = read_gguf_header(path)
    sizes = {info.type_name: 0 for info in header.tensors}
    for info in header.tensors:
        sizes[info.type_name] += info.nbytes
    for found in report.types:
        assert found.bits_per_weight == 8 * sizes[found.type_name] / found.n_weights
    assert report.bits_per_weight == 8 * sum(sizes.values()) / model.num_params()
    q4 = next(found for found in report.types if found.type_name == "Q4_K")
    exact = [model.model.layers[i].mlp.up_proj.weight.data for i in range(2)]  # some of the tensors in Q4_K
    lost = [decode(encode(w, "Q4_K"), "Q4_K") - w for w in exact]
    expected = math.sqrt(sum(e.square().sum() for e in lost) / sum(w.square().sum() for w in exact))
    assert q4.relative_error == pytest.approx(expected, rel=0.05)
    # Perplexity by hand, of the model that the file holds.
    ids = torch.tensor(CHARS.encode(TEXT)[:200])
    for quality, of in ((report.float_model, model), (report.torch, load(path)[0])):
        nll = []
        for window in torch.split(ids, 64):
            with torch.no_grad():
                logits = of.eval()(window[None])[0]
            nll.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none"))
        assert quality.perplexity == pytest.approx(math.exp(torch.cat(nll).mean()), rel=1e-5)
    assert report.float_model.kl_mean == 0
    assert report.llama_cpp.kl_mean == pytest.approx(report.torch.kl_mean, rel=0.2)
    assert "file in llama.cpp" in str(report)
    report.save(tmp_path / "r.json")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["path"], saved["torch"]["perplexity"]) == ("m.gguf", report.torch.perplexity)


def test_fewer_bits_lose_more(tmp_path):
    model, losses = gpt(), []
    for file_type in ("F32", "Q8_0", "Q6_K", "Q4_K_M", "Q2_K", "TQ2_0"):
        export_gguf(model, CHARS, tmp_path / "m.gguf", file_type=file_type)
        losses.append(quantization_report(tmp_path / "m.gguf", model, CHARS, text=TEXT, llama_cpp=False).torch.kl_mean)
    assert losses[0] < 1e-10
    assert losses == sorted(losses)


def test_the_report_refuses_what_it_cannot_compare(tmp_path):
    export_gguf(llama(), CHARS, tmp_path / "m.gguf", file_type="Q4_K_M")
    with pytest.raises(ConvertError, match="which the model has not"):
        quantization_report(tmp_path / "m.gguf", llama(hidden_size=512), CHARS)
    with pytest.raises(DataError, match="the text has 1 tokens"):
        quantization_report(tmp_path / "m.gguf", llama(), CHARS, text="E")


# --- The command line


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "source.gguf"
    export_gguf(llama(), CHARS, path, file_type="F32")
    return path


def test_help_names_every_file_type():
    assert sorted(FILE_TYPES.replace(" or ", ", ").split(", ")) == sorted(mixture.FILE_TYPES)


def test_quantize_writes_what_the_function_writes(source, tmp_path, capsys):
    out = tmp_path / "q4.gguf"
    arguments = ["quantize", str(source), str(out), "--file-type", "Q4_K_M", "--tensor-type", r"attn_v\.weight=Q8_0"]
    assert main([*arguments, "--tensor-type", "ffn_down=Q5_K"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {out} (Q4_K_M, ")
    assert "2 Q8_0" in said
    tensor_types = {r"attn_v\.weight": "Q8_0", "ffn_down": "Q5_K"}
    quantize_gguf(source, tmp_path / "f.gguf", file_type="Q4_K_M", tensor_types=tensor_types)
    assert out.read_bytes() == (tmp_path / "f.gguf").read_bytes()
    assert {t for n, (t, _) in tensors_of(out).items() if "attn_v" in n} == {"Q8_0"}


def test_quantize_says_which_tensors_fell_back(tmp_path, capsys):
    export_gguf(gpt(n_embd=96), CHARS, tmp_path / "in.gguf", file_type="F32")
    assert main(["quantize", str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf"), "--file-type", "Q4_K_M"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert any("rows of 96 are Q5_0 instead of Q4_K, whose blocks have 256 weights; widths of 256" in n for n in notes)
    assert any("would fit: blk.0.attn_output.weight, " in note for note in notes), notes


def test_export_reports_what_the_type_costs(tmp_path, capsys):
    from llmforge import export_hf

    export_hf(llama(), CHARS, tmp_path / "hf")
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    arguments = [
        "export",
        str(tmp_path / "hf"),
        "--gguf",
        str(tmp_path / "m.gguf"),
        "--file-type",
        "Q4_K_M",
        "--report",
    ]
    assert main([*arguments, "--report-text", str(tmp_path / "t.txt")]) == 0
    said = capsys.readouterr().out
    assert "file in torch" in said
    assert json.loads((tmp_path / "m.report.json").read_text())["file_type"] == "Q4_K_M"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file-type", "Q9_K"], r"file_type ('Q9_K') must be one of F32, F16"),
        (["--file-type", "Q4_K_M", "--tensor-type", "attn_v"], "--tensor-type needs PATTERN=TYPE, got 'attn_v'"),
        (["--file-type", "Q4_K_M", "--tensor-type", "attn_v=Q9"], "tensor type 'Q9' (of 'attn_v') must be one of"),
        (["--file-type", "Q4_K_M", "--tensor-type", "nope=Q8_0"], "no tensor's name contains 'nope'"),
        (["--file-type", "Q4_K_M", "--tensor-type", "(=Q8_0"], "is no regular expression"),
        (["--file-type", "BF16", "--tensor-type", "attn_v=Q8_0"], "for a quantized file type, not BF16"),
        (["--file-type", "Q4_K_M", "--imatrix", "none.gguf"], "cannot read none.gguf"),
        (["--file-type", "Q2_K_S"], "importance"),
    ],
)
def test_bad_types_are_one_clear_error(arguments, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(source), "out.gguf", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_bad_files_are_one_clear_error(source, tmp_path, capsys):
    copy = tmp_path / "in.gguf"
    shutil.copy(source, copy)
    before = copy.read_bytes()
    assert main(["quantize", str(copy), str(copy), "--file-type", "Q4_K_M"]) == 2
    assert "is the source itself" in capsys.readouterr().err
    assert copy.read_bytes() == before
    assert main(["quantize", str(tmp_path / "none.gguf"), str(tmp_path / "o.gguf"), "--file-type", "Q4_K_M"]) == 2
    assert "cannot read" in capsys.readouterr().err
    copy.write_bytes(before[:5000])
    assert main(["quantize", str(copy), str(tmp_path / "o.gguf"), "--file-type", "Q4_K_M"]) == 2
    assert "cut off" in capsys.readouterr().err
    assert main(["export", str(source), "--hf", str(tmp_path / "hf"), "--report"]) == 2
    assert "--report measures a GGUF" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        raw = before.replace(b"general.architecture", b"general.architectura")
        copy.write_bytes(raw)
        quantize_gguf(copy, tmp_path / "o.gguf", file_type="Q8_0")
