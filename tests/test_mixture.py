"""The types of a file's tensors, and their bytes, held to what llama.cpp's own quantize makes of the same file."""

import ctypes
import platform
import re
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from llmforge.convert import export_gguf
from llmforge.convert.mixture import FILE_TYPES, choose_types
from llmforge.errors import ConvertError
from llmforge.models import GPT, GPTConfig, Llama, LlamaConfig
from llmforge.quant.ggml import block_shape, encode
from llmforge.quant.ggml import types as ggml_types
from llmforge.tokenizers import CharTokenizer

# ggml's own build may fuse multiply and add elsewhere; see test_ggml_types.py.
ENOUGH = 1.0 if platform.machine().lower() in ("x86_64", "amd64") else 0.999
LOG: list[str] = []


@llama_cpp.llama_log_callback
def _kept(level: int, text: bytes, user_data: object) -> None:
    LOG.append(text.decode("utf-8", "replace"))


# --- Files to quantize: small enough to do thousands of times, with the names and the numbers that the choices depend on.


@cache
def model(
    arch: str,
    n_layer: int,
    n_embd: int,
    n_ff: int,
    *,
    heads: int | tuple[int, ...] = 8,
    kv_heads: int | tuple[int, ...] | None = None,
    tied: bool = False,
    few: bool = False,
    experts: int = 0,
) -> tuple[dict, dict]:
    """Metadata and shapes. Matrices have two rows each: llama.cpp's quantize looks at each tensor alone."""
    metadata = {"general.architecture": arch, f"{arch}.block_count": n_layer, f"{arch}.embedding_length": n_embd}
    metadata |= {f"{arch}.feed_forward_length": n_ff, f"{arch}.context_length": 32}
    metadata |= {f"{arch}.attention.head_count": list(heads) if isinstance(heads, tuple) else heads}
    if kv_heads is not None:
        metadata[f"{arch}.attention.head_count_kv"] = list(kv_heads) if isinstance(kv_heads, tuple) else kv_heads
    if experts:
        metadata |= {f"{arch}.expert_count": experts, f"{arch}.expert_used_count": 2}
    metadata[f"{arch}.attention.layer_norm_{'' if arch == 'gpt2' else 'rms_'}epsilon"] = 1e-5

    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, n_embd), "output_norm.weight": (n_embd,)}
    shapes |= {} if tied else {"output.weight": (2, n_embd)}
    if arch == "gpt2":
        shapes |= {"position_embd.weight": (3, n_embd), "output_norm.bias": (n_embd,)}
        matrices, norms = ["attn_qkv", "attn_output", "ffn_up"], ["attn_norm", "ffn_norm"]
    else:
        matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"]
        norms = ["attn_norm", "ffn_norm"]
    norms += {"bitnet": ["attn_sub_norm", "ffn_sub_norm"], "qwen3": ["attn_q_norm", "attn_k_norm"]}.get(arch, [])
    if arch == "arcee":
        matrices.remove("ffn_gate")
    if few:
        matrices, norms = ["attn_v", "attn_output"], []
    for i in range(n_layer):
        shapes |= {f"blk.{i}.{name}.weight": (n_embd,) for name in norms}
        shapes |= {f"blk.{i}.{name}.weight": (2, n_embd) for name in matrices}
        shapes |= {f"blk.{i}.ffn_down{'_exps' if experts else ''}.weight": (2, 2, n_ff) if experts else (2, n_ff)}
        if experts:
            shapes |= {f"blk.{i}.ffn_gate_inp.weight": (experts, n_embd)}
        if arch in ("gpt2", "qwen2"):
            shapes |= {f"blk.{i}.{name}.bias": (2,) for name in matrices}
    return metadata, shapes


ODD_NAMES = {
    "blk.0.attn_q.weight": (1, 256),  # one row is no matrix
    "blk.0.attn_k.weight": (256, 1),
    "blk.0.ffn_up.weight": (2, 1, 256),
    "blk.0.attn_norm.weight": (2, 256),
    "blk.0.attn_q.bias": (2, 256),
    "blk.0.attn_q.scale": (2, 256),
    "blk.0.ffn_gate_inp.weight": (2, 256),
    "blk.0.ssm_conv1d.weight": (2, 256),
    "blk.0.attn_rel_b.weight": (2, 256),
    "blk.0.time_mix_w1.weight": (2, 256),
    "blk.1.attn_kv_b.weight": (2, 256),
    "blk.1.ffn_down_shexp.weight": (2, 256),
    "blk.1.cls.weight": (2, 256),
    "v.blk.0.attn_v.weight": (2, 256),  # before all layers
    "per_layer_token_embd.weight": (2, 256),
    "token_types.weight": (2, 256),
    "rope_freqs.weight": (16,),
    **{f"blk.{i}.ffn_down.weight": (2, 256) for i in range(16)},  # 10 comes after 2
    **{f"blk.{i}.attn_v.weight": (2, 256) for i in range(1, 16)},
}
MODELS = {
    "gpt2": model("gpt2", 8, 256, 1024, heads=2, tied=True),
    "gpt2 untied, odd widths": model("gpt2", 2, 384, 1536 + 32, heads=2),
    "llama of one layer": model("llama", 1, 256, 512, tied=True),
    "llama": model("llama", 8, 512, 768, kv_heads=2),
    "llama of 32 layers": model("llama", 32, 256, 256, kv_heads=1),
    "llama tied, group of 2": model("llama", 9, 256, 96, kv_heads=4, tied=True),
    "llama of widths without blocks": model("llama", 2, 96, 100, kv_heads=4),
    "llama with a list of heads": model("llama", 8, 256, 256, heads=(8,) * 8, kv_heads=(2, 8, 8, 8, 8, 8, 8, 8)),
    "llama 65B": model("llama", 80, 256, 256, kv_heads=8, few=True),
    "llama 70B": model("llama", 80, 256, 256, kv_heads=1, few=True),
    "llama 70B, group of 2": model("llama", 80, 256, 256, kv_heads=4, few=True),
    "qwen2 72B": model("qwen2", 80, 256, 256, heads=4, few=True),
    "qwen2": model("qwen2", 16, 256, 512, kv_heads=4, tied=True),
    "qwen2 untied": model("qwen2", 2, 128, 384, heads=14, kv_heads=2),
    "qwen3": model("qwen3", 8, 256, 512, kv_heads=2),
    "qwen3 of 80 layers": model("qwen3", 80, 256, 256, kv_heads=1, few=True),
    "arcee": model("arcee", 8, 256, 1024, kv_heads=2),
    "bitnet": model("bitnet", 8, 256, 512, kv_heads=2, tied=True),
    "bitnet, odd widths": model("bitnet", 26, 288, 704, heads=4, tied=True),
    "odd names": (lambda m: (m[0], {**m[1], **ODD_NAMES}))(model("llama", 16, 256, 256, kv_heads=2, few=True)),
}


def write(path: Path, metadata: dict, shapes: dict) -> Path:
    """Float32 values in a GGUF file, by the gguf package."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif key != "general.architecture":
            writer.add_uint32(key, value)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, (rng.standard_normal(shape) * 0.1).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mixture")


def file_of(folder: Path, name: str) -> Path:
    path = folder / f"{name}.gguf"
    return path if path.exists() else write(path, *MODELS[name])


def importance_of(width: int) -> np.ndarray:
    """The same for all rows of a width, so that they can be encoded together."""
    return np.random.default_rng(width).random(width, np.float32) ** 4


def by_llama_cpp(
    source: Path, file_type: str, shapes: dict, *, importance: bool = False, tensor_types: dict | None = None
) -> Path | None:
    """The file that llama.cpp's quantize makes; None where it refuses. What it says is in LOG."""
    target = source.with_suffix(".quantized")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[file_type][0], 1
    if importance:
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        data = {
            name: np.tile(importance_of(shape[-1]), np.prod(shape[:-2], dtype=int)) for name, shape in matrices.items()
        }
        entries = [
            llama_cpp.llama_cpp.llama_model_imatrix_data(
                name.encode(), v.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), v.size
            )
            for name, v in data.items()
        ]
        entries.append(llama_cpp.llama_cpp.llama_model_imatrix_data(None, None, 0))
        params.imatrix = (type(entries[0]) * len(entries))(*entries)
    if tensor_types:
        override = llama_cpp.llama_cpp.llama_model_tensor_override
        pairs = [override(pattern.encode(), GGMLQuantizationType[t]) for pattern, t in tensor_types.items()]
        params.tt_overrides = (override * (len(pairs) + 1))(*pairs, override(None, 0))
    LOG.clear()
    llama_cpp.llama_log_set(_kept, ctypes.c_void_p(0))
    try:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))
    return None if failed else target


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def assert_types_of_llama_cpp(source: Path, file_type: str, metadata: dict, shapes: dict, **options) -> dict[str, str]:
    """Of every tensor; returns them."""
    importance, tensor_types = options.get("importance", False), options.get("tensor_types")
    target = by_llama_cpp(source, file_type, shapes, **options)
    assert target is not None, "".join(LOG[-3:])
    mixture = choose_types(file_type, metadata, shapes, tensor_types=tensor_types, has_importance=importance)
    ours, theirs = {name: mixture.types.get(name, "F32") for name in shapes}, types_in(target)
    assert set(mixture.types) <= set(shapes)
    assert ours == theirs, {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    said = re.findall(
        r"warning: (\S+) +- ncols +(\d+) not divisible by +\d+ \(required for type +(\S+)\)", "".join(LOG)
    )
    assert sorted((f.name, f.width, f.wanted.upper()) for f in mixture.fallbacks) == sorted(
        (name, int(width), wanted.upper()) for name, width, wanted in said
    )
    return theirs


# --- Types


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(folder, name, file_type):
    metadata, shapes = MODELS[name]
    source = file_of(folder, name)
    if file_type != "Q2_K_S":  # see below
        assert_types_of_llama_cpp(source, file_type, metadata, shapes)
    assert_types_of_llama_cpp(source, file_type, metadata, shapes, importance=True)


def test_q2_k_s_is_refused_by_llama_cpp_without_importance_where_something_is_q2_k(folder):
    for name in ("llama", "gpt2 untied, odd widths", "llama of widths without blocks"):
        metadata, shapes = MODELS[name]
        types = choose_types("Q2_K_S", metadata, shapes, has_importance=True).types
        made = by_llama_cpp(file_of(folder, name), "Q2_K_S", shapes)
        assert (made is None) == ("Q2_K" in types.values()) == (name == "llama")
        assert ("requires an importance matrix" in "".join(LOG)) == (made is None)


CHARS = CharTokenizer.from_text("En un lugar de la Mancha, de cuyo nombre no quiero acordarme")


def exported(case: str) -> torch.nn.Module:
    shape = dict(vocab_size=CHARS.vocab_size, hidden_size=256, intermediate_size=320, num_hidden_layers=2)
    shape |= dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    match case:
        case "gpt2" | "gpt2 untied":
            config = GPTConfig(vocab_size=CHARS.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=256)
            return GPT(config.replace(tie_word_embeddings=case == "gpt2"))
        case "llama":
            return Llama(LlamaConfig(**shape))
        case "llama3":
            scaling = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
            return Llama(LlamaConfig.from_dict({**shape, "rope_scaling": scaling, "tie_word_embeddings": True}))
        case "qwen2":
            return Llama(LlamaConfig(**shape, qkv_bias=True))
        case _:
            return Llama(LlamaConfig(**shape, qk_norm=True, head_dim=48))


@pytest.mark.parametrize("case", ["gpt2", "gpt2 untied", "llama", "llama3", "qwen2", "qwen3"])
def test_exported_models_get_the_types_of_llama_cpp(tmp_path, case):
    """With the metadata and the names of our own files."""
    export_gguf(exported(case), CHARS, tmp_path / "x.gguf", file_type="F32")
    reader = GGUFReader(tmp_path / "x.gguf")
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    for file_type in ("BF16", "Q2_K", "Q4_K_M", "IQ4_XS"):
        types = assert_types_of_llama_cpp(tmp_path / "x.gguf", file_type, metadata, shapes)
        assert len(set(types.values())) > 1


# --- Bytes


@pytest.mark.parametrize("importance", [False, True], ids=["alike", "importance"])
@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2 untied, odd widths", "llama", "llama of widths without blocks", "bitnet"]
)
def test_every_tensor_has_the_bytes_that_llama_cpp_gives_it(folder, name, file_type, importance, monkeypatch):
    monkeypatch.setattr(ggml_types, "COMPILE_FROM", 0)
    metadata, shapes = MODELS[name]
    importance |= file_type == "Q2_K_S"
    source = file_of(folder, name)
    target = by_llama_cpp(source, file_type, shapes, importance=importance)
    types = choose_types(file_type, metadata, shapes, has_importance=importance).types
    values = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(source).tensors}
    theirs = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(target).tensors}
    alike: dict[tuple[str, int], list[str]] = {}
    for tensor, shape in shapes.items():
        if len(shape) > 1:
            alike.setdefault((types.get(tensor, "F32"), shape[-1]), []).append(tensor)
        else:
            assert np.array_equal(theirs[tensor], values[tensor])
    for (type_name, width), tensors in alike.items():
        rows = torch.from_numpy(np.concatenate([values[tensor] for tensor in tensors]))
        ours = encode(rows, type_name, importance=torch.from_numpy(importance_of(width)) if importance else None)
        want = np.concatenate([theirs[tensor].view(np.uint8) for tensor in tensors])
        same = (ours.numpy() == want).reshape(len(want), -1, block_shape(type_name)[1]).all(2)
        assert same.mean() >= ENOUGH, f"{type_name}, rows of {width}: {same.mean():.2%} of the blocks"


# --- Types that are asked for


OVERRIDES = [
    {"attn_v": "Q8_0"},
    {r"ffn_down\.weight": "Q6_K", "ffn_": "Q4_0"},
    {"ffn_": "Q4_0", r"ffn_down\.weight": "Q6_K"},  # the first counts
    {r"blk\.(0|1|2)\.attn_v": "Q5_0", r"blk\.[45]\.ffn_down": "IQ4_NL"},  # those that are left are counted as if alone
    {"^output.weight$": "Q4_0", "token_embd": "F16"},
    {"_norm": "Q8_0", "": "Q5_1"},
    {"attn_(q|k)": "BF16", "attn_output": "F32", r"\.ffn_up\b": "TQ2_0"},
    {"ffn_up|ffn_gate": "MXFP4", "attn": "Q2_K"},
]


@pytest.mark.parametrize("tensor_types", OVERRIDES, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama of widths without blocks", "odd names"])
def test_types_that_are_asked_for_are_given_as_llama_cpp_gives_them(folder, name, tensor_types):
    metadata, shapes = MODELS[name]
    fitting = {p: t for p, t in tensor_types.items() if any(re.search(p, tensor) for tensor in shapes)}
    plain = choose_types("Q4_K_M", metadata, shapes).types
    for file_type in ("Q4_K_M", "Q3_K_M", "Q4_0", "Q8_0"):
        options = dict(importance=file_type == "Q4_0", tensor_types=fitting)
        types = assert_types_of_llama_cpp(file_of(folder, name), file_type, metadata, shapes, **options)
        if file_type == "Q4_K_M" and name == "llama":
            assert types != {tensor: plain.get(tensor, "F32") for tensor in shapes}  # control


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16"])
def test_a_file_of_floats_takes_no_types(folder, file_type):
    metadata, shapes = MODELS["llama"]
    with pytest.raises(ConvertError, match=f"tensor types are for a quantized file type, not {file_type}; take Q8_0"):
        choose_types(file_type, metadata, shapes, tensor_types={"attn_v": "Q8_0"})
    # And so it is: llama.cpp does not look at them.
    types = by_llama_cpp(file_of(folder, "llama"), file_type, shapes, tensor_types={"attn_v": "Q8_0"})
    assert set(types_in(types).values()) == {"F32", file_type}


# --- What is said


def test_notes_name_the_tensors_that_fell_back_and_the_widths_that_would_not():
    metadata, shapes = model("llama", 2, 256, 384, tied=True)
    assert choose_types("Q4_K_M", metadata, shapes).notes() == [
        "1 tensors with rows of 384 are Q5_0 instead of Q4_K, whose blocks have 256 weights; widths of 256 or 512 would fit: "
        "blk.0.ffn_down.weight",
        "1 tensors with rows of 384 are Q8_0 instead of Q6_K, whose blocks have 256 weights; widths of 256 or 512 would fit: "
        "blk.1.ffn_down.weight",
    ]
    metadata, shapes = model("llama", 5, 32, 40, kv_heads=2, tied=True)
    notes = choose_types("Q8_0", metadata, shapes).notes()
    assert notes == [
        "5 tensors with rows of 40 are F16 instead of Q8_0, whose blocks have 32 weights; widths of 32 or 64 would fit: "
        "blk.0.ffn_down.weight, blk.1.ffn_down.weight, blk.2.ffn_down.weight and 2 more"
    ]
    [fallback] = choose_types("TQ2_0", *model("bitnet", 1, 256, 160, tied=True)).fallbacks
    assert (fallback.name, fallback.width, fallback.wanted, fallback.given) == (
        "blk.0.ffn_down.weight",
        160,
        "TQ2_0",
        "Q4_0",
    )
    [note] = choose_types("TQ2_0", *model("bitnet", 1, 256, 160, tied=True)).notes()
    assert "widths of 256 would fit" in note  # not 0
    assert choose_types("Q4_K_M", *MODELS["llama"]).notes() == []


@pytest.mark.parametrize(
    ("file_type", "tensor_types", "message"),
    [
        ("Q4_K", {}, r"^file_type \('Q4_K'\) must be one of F32, F16, BF16, Q4_0, .*, Q4_K_M, .*, TQ2_0$"),
        ("q4_k_m", {}, r"^file_type \('q4_k_m'\) must be one of"),
        ("Q8_0", {"attn_v": "Q4_K_M"}, r"^tensor type 'Q4_K_M' \(of 'attn_v'\) must be one of F32, F16, .*, MXFP4$"),
        ("Q8_0", {"attn_v": "IQ2_XXS"}, r"^tensor type 'IQ2_XXS' \(of 'attn_v'\) must be one of"),
        (
            "Q8_0",
            {"attn_(v": "Q6_K"},
            r"^tensor name pattern 'attn_\(v' is no regular expression: missing \), unterminated",
        ),
        (
            "Q8_0",
            {"atn_v": "Q6_K"},
            r"^no tensor's name contains 'atn_v'; names are like token_embd\.weight, .* and \d+ more$",
        ),
    ],
    ids=str,
)
def test_types_that_do_not_exist_are_refused(file_type, tensor_types, message):
    with pytest.raises(ConvertError, match=message):
        choose_types(file_type, *MODELS["llama"], tensor_types=tensor_types)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, r"^llama\.block_count is None in the file's metadata, but must be a number"),
        ({"llama.block_count": "8"}, r"^llama\.block_count is '8' in"),
        ({"llama.attention.head_count": -1}, r"^llama\.attention\.head_count is -1 in"),
        ({"llama.attention.head_count_kv": [2.5]}, r"^llama\.attention\.head_count_kv is 2\.5 in"),
        ({"llama.expert_count": 8}, "^the mixtures of llama models with these parts are not known"),
        ({"general.architecture": "falcon", "falcon.block_count": 2}, "^the mixtures of falcon models"),
        ({"general.architecture": None}, r"^None\.block_count is None|architecture"),
    ],
    ids=str,
)
def test_models_that_the_choices_are_not_known_for_are_refused(changes, message):
    metadata, shapes = MODELS["llama"]
    with pytest.raises(ConvertError, match=message):
        choose_types("Q4_K_M", {**metadata, **changes}, shapes)


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0"])
def test_a_mixture_of_experts_gets_the_types_that_its_refusal_names(tmp_path, file_type):
    metadata, shapes = model("llama", 2, 256, 256, kv_heads=2, experts=8)
    with pytest.raises(ConvertError, match="take F16, BF16 or Q8_0$"):
        choose_types("Q4_K_M", metadata, shapes)
    assert_types_of_llama_cpp(write(tmp_path / "x.gguf", metadata, shapes), file_type, metadata, shapes)
