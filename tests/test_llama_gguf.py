"""Llama, Mistral, Qwen2, Qwen3 and Arcee in the real llama.cpp, and their GGUF files read back."""

import warnings

import gguf
import numpy as np
import pytest
import torch

from llmforge.convert import export_gguf, export_hf, llama, load
from llmforge.convert.llama import HFLlama
from llmforge.deploy import verify_gguf
from llmforge.errors import CheckpointError, ConvertError
from llmforge.formats.gguf import GGUFTensor, read_gguf_header, read_gguf_tensors, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.generation import generate_text
from llmforge.models import GPT, GPTConfig, Llama, LlamaConfig
from llmforge.tokenizers import BPETokenizer, CharTokenizer

TEXT = (
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo de los de lanza\n"
    "—¡Ay, señor! —dijo Sancho—. ¿«Yelmo» o bacía? ¡Ñu! Año 1605, 12.345 maravedís; vergüenza\n— it's <|endoftext|>\n"
)
CHARS = CharTokenizer.from_text(TEXT)
BPE = BPETokenizer.from_texts([TEXT], vocab_size=300, pre_tokenizer="llama-bpe")
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

CASES = {
    "plain": ("llama", {}),
    "multi-query": ("llama", dict(num_key_value_heads=1)),
    "multi-head": ("llama", dict(num_key_value_heads=4)),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "wide heads": ("llama", dict(head_dim=24)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", dict(rope_theta=500_000.0, rope_scaling=LLAMA3)),
    "linear": ("llama", dict(rope_scaling=LINEAR)),
    "yarn": ("llama", dict(rope_scaling=YARN)),
    "yarn with a border that no pair is at": ("llama", dict(rope_scaling={**YARN, "beta_fast": 8.0})),
    "mistral": ("llama", dict(sliding_window=256)),
    "qwen2": ("qwen2", dict(qkv_bias=True, rms_norm_eps=1e-6)),
    "qwen2 tied with yarn": ("qwen2", dict(qkv_bias=True, tie_word_embeddings=True, rope_scaling=YARN)),
    "qwen3": ("qwen3", dict(qk_norm=True, head_dim=32, rope_theta=1e6)),
    "qwen3 tied with linear": ("qwen3", dict(qk_norm=True, tie_word_embeddings=True, rope_scaling=LINEAR)),
    "arcee": ("arcee", dict(hidden_act="relu2")),
    "arcee tied with llama3": (
        "arcee",
        dict(hidden_act="relu2", tie_word_embeddings=True, rope_theta=500_000.0, rope_scaling=LLAMA3),
    ),
    "arcee with yarn": ("arcee", dict(hidden_act="relu2", head_dim=24, rope_scaling=YARN)),
}
ALL = pytest.mark.parametrize("case", CASES)


def toy(case: str = "plain", tokenizer=CHARS, **changes) -> Llama:
    """A model whose every parameter matters, with logits that differ."""
    torch.manual_seed(0)
    shape = dict(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    model = Llama(LlamaConfig.from_dict({**shape, **CASES[case][1], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
            p.add_(torch.randn_like(p) * 0.1)
    return model


def kl_of(path, model, tokenizer=CHARS, text=TEXT) -> float:
    return verify_gguf(path, model, tokenizer, text=text, greedy_tokens=16).kl_mean


# --- Out


@ALL
def test_llama_cpp_computes_the_same_from_float32(tmp_path, case):
    tokenizer = BPE if case in ("plain", "qwen2", "qwen3") else CHARS
    model = toy(case, tokenizer)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    export_gguf(model, tokenizer, tmp_path / "x.gguf", file_type="F32")
    report = verify_gguf(tmp_path / "x.gguf", model, tokenizer, text=TEXT)
    assert report.passed, str(report)
    assert report.kl_mean <= 1e-9
    assert report.perplexity_file == pytest.approx(report.perplexity_model, rel=1e-4)
    assert read_gguf_header(tmp_path / "x.gguf").metadata["general.architecture"] == CASES[case][0]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())  # never edited
    with torch.no_grad():  # control: a single changed weight shows
        model.model.layers[1].self_attn.k_proj.weight[3, 5] += 3.0
    assert kl_of(tmp_path / "x.gguf", model, tokenizer) > 1e-6


@pytest.mark.parametrize("case", ["plain", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize(("file_type", "limit"), [("F16", 1e-5), ("BF16", 3e-4), ("Q8_0", 3e-3)])
def test_llama_cpp_computes_nearly_the_same_from_smaller_types(tmp_path, case, file_type, limit):
    model = toy(case)
    report = export_gguf(model, CHARS, tmp_path / "x.gguf", file_type=file_type)
    norms = sum(p.ndim == 1 for p in model.parameters()) + (case == "llama3")
    assert report.tensors == {file_type: 2 + 2 * 7, "F32": norms}
    assert kl_of(tmp_path / "x.gguf", model) <= limit


def test_rows_that_turn_in_pairs_are_put_side_by_side(tmp_path, monkeypatch):
    """What the KL of a file without would be; and that qwen2 needs none."""
    monkeypatch.setattr(llama, "reordered", lambda config, tensors, change: dict(tensors))
    for case, wrong in [
        ("plain", True),
        ("multi-query", True),
        ("biases", True),
        ("arcee", True),
        ("qwen2", False),
        ("qwen3", False),
    ]:
        export_gguf(toy(case), CHARS, tmp_path / "x.gguf", file_type="F32")
        assert (kl_of(tmp_path / "x.gguf", toy(case)) > 1e-3) == wrong


@pytest.mark.parametrize("case", ["llama3", "linear", "yarn", "qwen2 tied with yarn"])
def test_llama_cpp_needs_to_be_told_of_the_scaling(tmp_path, monkeypatch, case):
    model = toy(case)
    for name in ("to_gguf", "gguf_metadata"):
        method = getattr(HFLlama, name)
        monkeypatch.setattr(
            HFLlama, name, lambda self, c, *more, m=method: m(self, c.replace(rope_scaling=None), *more)
        )
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    header = read_gguf_header(tmp_path / "x.gguf")
    assert "rope_freqs.weight" not in [info.name for info in header.tensors]
    assert not any("scaling" in key for key in header.metadata)
    assert kl_of(tmp_path / "x.gguf", model) > 1e-3


def test_a_window_is_exported_with_a_note_and_holds_up_to_its_length(tmp_path):
    model = toy("mistral", sliding_window=32)
    report = export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    assert any("the same up to 32 tokens, and attends to all of them beyond" in note for note in report.notes)
    assert kl_of(tmp_path / "x.gguf", model, text=TEXT[:32]) <= 1e-9
    assert kl_of(tmp_path / "x.gguf", model, text=TEXT[:150]) > 1e-5  # control: the window does something


def test_borders_that_llama_cpp_does_not_have_are_refused(tmp_path, monkeypatch):
    model = toy("yarn", rope_scaling={**YARN, "beta_slow": 2.0})
    with pytest.raises(ConvertError, match="yarn with beta_fast 32 and beta_slow 1, not 32 and 2$"):
        export_gguf(model, CHARS, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
    # And so it is: llama.cpp does not read them for these models.
    export_gguf(toy("yarn"), CHARS, tmp_path / "x.gguf", file_type="F32")
    rewritten(tmp_path / "x.gguf", rope__scaling__yarn_beta_slow=2.0)
    assert kl_of(tmp_path / "x.gguf", model) > 1e-3
    assert kl_of(tmp_path / "x.gguf", toy("yarn")) <= 1e-9


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_a_scaling_that_llama_cpp_does_not_have_is_refused(tmp_path, monkeypatch, case):
    model = toy(case, rope_scaling=LLAMA3)
    with pytest.raises(ConvertError, match=rf"no rope_scaling of the rope_type 'llama3' for {case}; linear and yarn"):
        export_gguf(model, CHARS, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
    # And so it is: llama.cpp does not load such a file.
    stretch = LazyTensor.of(model.config.rope_scaling.stretch(model.config.head_width, 10_000.0))
    monkeypatch.setattr(HFLlama, "to_gguf", lambda self, c, t: (c, {**t, "rope_freqs.weight": stretch}, []))
    export_gguf(model, CHARS, tmp_path / "x.gguf")
    with pytest.raises(ConvertError, match="wrong number of tensors"):
        verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT)


def test_an_attention_factor_that_llama_cpp_does_not_have_is_refused(tmp_path):
    for factor, refused in [(1.4, True), (0.1 * np.log(4.0) + 1.0, False)]:
        model = toy("yarn", rope_scaling={**YARN, "attention_factor": float(factor)})
        if refused:
            with pytest.raises(ConvertError, match=r"attention_factor itself as 0.1 ln\(factor\) \+ 1, not 1.4"):
                export_gguf(model, CHARS, tmp_path / "x.gguf")
        else:
            export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
            assert kl_of(tmp_path / "x.gguf", model) <= 1e-9


def test_the_file_says_what_clients_need(tmp_path):
    export_gguf(toy("qwen3"), CHARS, tmp_path / "x.gguf")
    metadata = read_gguf_header(tmp_path / "x.gguf").metadata
    assert {key.removeprefix("qwen3."): v for key, v in metadata.items() if key.startswith("qwen3.")} == {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 32,
        "rope.freq_base": 1e6,
        "vocab_size": CHARS.vocab_size,
    }
    assert metadata["general.type"] == "model"
    assert metadata["general.file_type"] == 1


@pytest.mark.parametrize("case", ["plain", "llama3", "qwen3", "tied"])
def test_a_folder_goes_to_gguf_as_the_model_does(tmp_path, case):
    model = toy(case)
    export_hf(model, CHARS, tmp_path / "hf", max_shard_bytes=40_000)
    for file_type in ("F32", "Q8_0"):
        export_gguf(tmp_path / "hf", None, tmp_path / "a.gguf", name="x", file_type=file_type)
        export_gguf(model, CHARS, tmp_path / "b.gguf", name="x", file_type=file_type)
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_rows_that_stand_for_no_token_get_names(tmp_path):
    model = toy(vocab_size=CHARS.vocab_size + 50)
    report = export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    assert any(note.startswith("50 of the model's") for note in report.notes)
    assert kl_of(tmp_path / "x.gguf", model) <= 1e-9
    back, tokenizer = load(tmp_path / "x.gguf")
    assert back.config.vocab_size == CHARS.vocab_size + 50
    assert tokenizer.vocab_size == CHARS.vocab_size


# --- In


def read(path):
    """No warning: all that is written is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load(path)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(200).view(2, 100) * 7 % 50)


def rounded(tensor: torch.Tensor, file_type: str) -> torch.Tensor:
    """The values that are left, as the gguf package has them."""
    if tensor.ndim == 1:
        return tensor
    kind = gguf.GGMLQuantizationType[file_type]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.detach().numpy(), kind), kind))


@ALL
@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
def test_what_was_written_is_read_back(tmp_path, case, file_type):
    tokenizer = BPE if case in ("plain", "qwen3") else CHARS
    model = toy(case, tokenizer)
    export_gguf(model, tokenizer, tmp_path / "x.gguf", file_type=file_type)
    back, its_tokenizer = read(tmp_path / "x.gguf")
    assert type(its_tokenizer) is type(tokenizer)
    assert its_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert not back.training
    # llama.cpp has no window for arch llama, so there is none in the file.
    assert back.config == model.config.replace(head_dim=model.config.head_width, sliding_window=None)
    for name, parameter in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], rounded(parameter, file_type)), name
    if file_type == "F32":
        assert torch.equal(logits_of(back), logits_of(model))
    assert generate_text(back, its_tokenizer, "En", max_new_tokens=5, seed=0).startswith("En")


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt_is_read_back(tmp_path, file_type, tied):
    config = GPTConfig(vocab_size=CHARS.vocab_size, block_size=256, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config.replace(tie_word_embeddings=tied)).eval()
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type=file_type)
    back, tokenizer = read(tmp_path / "x.gguf")
    assert back.config == model.config
    for name, parameter in model.state_dict().items():
        exact = name == "transformer.wpe.weight"  # never encoded
        assert torch.equal(back.state_dict()[name], parameter if exact else rounded(parameter, file_type)), name
    assert tokenizer.encode(TEXT) == CHARS.encode(TEXT)
    if file_type == "F32":
        assert torch.equal(logits_of(back), logits_of(model))
    text = generate_text(back, tokenizer, "En", max_new_tokens=9, temperature=0)
    assert generate_text(back, tokenizer, "En", max_new_tokens=9, temperature=0, use_cache=False) == text


def test_a_type_can_be_asked_for_and_goes_out_again(tmp_path):
    model = toy().bfloat16().float()  # norms, too, as published models have them
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="BF16", name="x")
    assert load(tmp_path / "x.gguf", dtype=torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16
    export_gguf(tmp_path / "x.gguf", None, tmp_path / "y.gguf", file_type="BF16", name="x")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    report = export_hf(tmp_path / "x.gguf", None, tmp_path / "hf")
    assert report.file_type == "bfloat16"  # as the matrices are
    back, tokenizer = load(tmp_path / "hf")
    assert torch.equal(logits_of(back), logits_of(load(tmp_path / "x.gguf")[0]))
    assert tokenizer.encode(TEXT) == CHARS.encode(TEXT)


def rewritten(path, *, without=(), **changes) -> None:
    """The file with other keys below `<arch>.`, or without some, and tensors of other names."""
    header = read_gguf_header(path)
    arch = header.metadata["general.architecture"]
    names = changes.pop("names", {})
    metadata = {key: value for key, value in header.metadata.items() if key.removeprefix(f"{arch}.") not in without}
    metadata |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    del metadata["general.architecture"]
    values = {name: t.read().clone() for name, t in read_gguf_tensors(path, header).items() if name not in without}
    tensors = [GGUFTensor(names.get(name, name), "F32", LazyTensor.of(v)) for name, v in values.items()]
    write_gguf(path, changes.get("arch", arch), metadata, tensors)


# As llama.cpp's converter has written them over the years.
@pytest.mark.parametrize(
    ("case", "without"),
    [
        ("plain", ["attention.key_length", "attention.value_length", "vocab_size"]),
        ("plain", ["attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"]),
        ("multi-head", ["attention.head_count_kv", "vocab_size", "rope.freq_base"]),
        ("qwen2", ["attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"]),
        ("qwen3", ["rope.dimension_count", "vocab_size"]),
    ],
)
def test_keys_that_files_may_leave_out_have_their_usual_meaning(tmp_path, case, without):
    model = toy(case)
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    rewritten(tmp_path / "x.gguf", without=without)
    assert kl_of(tmp_path / "x.gguf", model) <= 1e-9  # llama.cpp reads them so
    assert torch.equal(logits_of(read(tmp_path / "x.gguf")[0]), logits_of(model))


def test_keys_of_the_converter_that_change_nothing_are_known(tmp_path):
    model = toy("linear")
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    rewritten(tmp_path / "x.gguf", without=["rope.scaling.type", "rope.scaling.factor"], rope__scale_linear=4.0)
    assert torch.equal(logits_of(read(tmp_path / "x.gguf")[0]), logits_of(model))
    rewritten(tmp_path / "x.gguf", without=["rope.scale_linear"], rope__scaling__type="none", expert_count=0)
    assert read(tmp_path / "x.gguf")[0].config.rope_scaling is None
    rewritten(tmp_path / "x.gguf", pooling_type=3)
    with pytest.warns(UserWarning, match=r"not known here and have no effect: pooling_type$"):
        load(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(expert_count=8), ConvertError, "mixture of experts"),
        (dict(attention__key_length=32), ConvertError, r"keys \(32\), values \(16\) and what turns of them \(16\)"),
        (dict(rope__dimension_count=8), ConvertError, r"what turns of them \(8\) must be equally wide"),
        (
            dict(rope__scaling__type="longrope", rope__scaling__factor=2.0),
            ConvertError,
            r"rope.scaling.type \('longrope'\)",
        ),
        (
            dict(attention__scale=0.5),
            ConvertError,
            r"sets llama\.attention\.scale to 0\.5, which Llama does not compute; it must be 0\.0",
        ),
        (
            dict(rope__scaling__attn_factor=0.7),
            ConvertError,
            r"llama\.rope\.scaling\.attn_factor to 0\.7, .* must be 1\.0",
        ),
        (dict(feed_forward_length=[96, 48]), ConvertError, r"layers of different shape \(feed_forward_length\)"),
        (dict(attention__head_count=3), ConvertError, r"num_attention_heads \(3\) must be a multiple"),
        (dict(without=["context_length"]), ConvertError, "max_position_embeddings must be a whole number, got None"),
        (dict(without=["token_embd.weight"]), CheckpointError, "no token_embd.weight, so it holds no model"),
        (
            dict(names={"output_norm.weight": "norm.weight"}),
            CheckpointError,
            "missing: model.norm.weight; unexpected: norm",
        ),
        (dict(block_count=3), CheckpointError, "does not fit its metadata; missing: model.layers.2"),
        (dict(embedding_length=128), CheckpointError, "of another shape: model.embed_tokens.weight"),
        (
            dict(arch="mamba"),
            ConvertError,
            "architecture 'mamba'; supported: gpt2, llama, bitnet, qwen2, qwen3, arcee$",
        ),
    ],
    ids=str,
)
def test_a_file_that_is_something_else_is_refused(tmp_path, changes, error, message):
    export_gguf(toy(), CHARS, tmp_path / "x.gguf", file_type="F32")
    rewritten(tmp_path / "x.gguf", **changes)
    with pytest.raises(error, match=message):
        load(tmp_path / "x.gguf")


def test_a_stretch_of_another_kind_is_refused(tmp_path):
    export_gguf(toy("llama3"), CHARS, tmp_path / "x.gguf", file_type="F32")
    header = read_gguf_header(tmp_path / "x.gguf")
    values = {name: t.read().clone() for name, t in read_gguf_tensors(tmp_path / "x.gguf", header).items()}
    metadata = {key: value for key, value in header.metadata.items() if key != "general.architecture"}
    for wrong in (values["rope_freqs.weight"] * 2, torch.ones(4), torch.full((8,), torch.nan)):
        tensors = {**values, "rope_freqs.weight": wrong}
        raw = {name: LazyTensor.of(tensor.contiguous().view(torch.uint8)) for name, tensor in tensors.items()}
        write_gguf(tmp_path / "y.gguf", "llama", metadata, [GGUFTensor(name, "F32", t) for name, t in raw.items()])
        with pytest.raises(ConvertError, match=r"rope_freqs\.weight is not the stretch of Llama 3\.1"):
            load(tmp_path / "y.gguf")
