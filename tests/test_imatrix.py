"""Importance matrices against llama.cpp: the sums that it would make, the files that it writes, the bytes that it rounds to with them.

    python test_imatrix.py FOLDER

is llama.cpp's part, in a process of its own: a failed assertion there ends that one only. See `main` at the end.
"""

import ctypes
import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import TEXT, toy_tokenizer

from llmforge import GPT, GPTConfig, Llama, LlamaConfig, TokenDataset
from llmforge.cli import imatrix as command
from llmforge.cli import main as cli
from llmforge.convert import export_gguf, imatrix, load
from llmforge.convert.imatrix import Importance, collect_imatrix, read_imatrix, write_imatrix
from llmforge.convert.mixture import FILE_TYPES
from llmforge.errors import CheckpointError, ConfigError, ConvertError, DataError
from llmforge.training.checkpoint import write_model_folder

CHARS = toy_tokenizer()
IDS = CHARS.encode(TEXT)
FAMILIES = {"gpt": "gpt", "gpt untied": "gpt", "llama": "llama", "qwen3 tied": "llama"}


def toy(case: str = "gpt", *, width: int = 32, n_layer: int = 2) -> GPT | Llama:
    """A model in which some inputs are many times larger than others."""
    torch.manual_seed(0)
    if FAMILIES[case] == "gpt":
        shape = dict(block_size=64, n_layer=n_layer, n_head=2, n_embd=width, tie_word_embeddings=case == "gpt")
        model = GPT(GPTConfig(vocab_size=CHARS.vocab_size, **shape))
    else:
        shape = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=n_layer, num_attention_heads=4)
        shape |= dict(num_key_value_heads=2, max_position_embeddings=256)
        shape |= dict(qk_norm=True, tie_word_embeddings=True) if case == "qwen3 tied" else {}
        model = Llama(LlamaConfig(vocab_size=CHARS.vocab_size, **shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(noise * width**-0.5 if p.ndim > 1 else noise * 0.1 if name.endswith("bias") else noise.exp())
    return model.eval()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest of all columns, as a fraction."""
    return ((ours - theirs).abs() / theirs.clamp(min=1e-30)).max().item()


def close(left: Importance, right: Importance, *, within: float = 1e-5) -> bool:
    """Up to the order of float sums."""
    assert left.sums.keys() == right.sums.keys()
    return left.counts == right.counts and all(error(left.sums[n], right.sums[n]) <= within for n in left.sums)


def same(left: Importance, right: Importance) -> bool:
    assert left.sums.keys() == right.sums.keys()
    return left.counts == right.counts and all(torch.equal(left.sums[name], right.sums[name]) for name in left.sums)


def ask_llama_cpp(folder: Path, jobs: list[dict]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- What is measured


class HalfGELU(nn.Module):
    """llama.cpp's GELU: a table from float16 to float16, and nothing to compute beyond 10."""

    def forward(self, x):
        return torch.where(
            x.abs() < 10, nn.functional.gelu(x.half().float(), approximate="tanh").half().float(), x.relu()
        )


def toy_as_llama_cpp_computes_it(case: str) -> GPT | Llama:
    model = toy(case)
    for block in model.transformer.h if "gpt" in case else []:
        block.mlp.act = HalfGELU()
    return model


CHUNKS = np.array(IDS[: 4 * 64]).reshape(4, 64)


@pytest.fixture(scope="module")
def sums_of_llama_cpp(tmp_path_factory):
    """For each case, name -> sums."""
    folder = tmp_path_factory.mktemp("sums")
    jobs = []
    for case in FAMILIES:
        path = str(folder / f"{case}.gguf")
        export_gguf(toy(case), CHARS, path, file_type="F32")
        jobs.append({"gguf": path, "chunks": CHUNKS.tolist(), "sums": str(folder / f"{case}.npz")})
    ask_llama_cpp(folder, jobs)
    return {
        case: {name: torch.from_numpy(sums) for name, sums in np.load(folder / f"{case}.npz").items()}
        for case in FAMILIES
    }


@pytest.mark.parametrize("case", FAMILIES)
def test_the_squares_are_of_what_llama_cpp_multiplies(sums_of_llama_cpp, case):
    model, theirs = toy_as_llama_cpp_computes_it(case), sums_of_llama_cpp[case]
    ours = collect_imatrix(model, CHUNKS, process_output=True)
    assert ours.sums.keys() == theirs.keys()
    assert ("output.weight" in theirs) == (case in ("gpt untied", "llama"))
    assert set(ours.counts.values()) == {4 * 64}
    # Float32 in another order; after a GELU, a value that is rounded to float16 the other way is off by 2**-10.
    within = 3e-4 if "gpt" in case else 1e-5
    errors = {name: error(ours.sums[name], theirs[name]) for name in theirs}
    assert max(errors.values()) <= within, errors
    assert errors["blk.0.attn_qkv.weight" if "gpt" in case else "blk.0.attn_q.weight"] <= 1e-6
    matrix = model.get_submodule("transformer.h.0.mlp.c_fc" if "gpt" in case else "model.layers.0.mlp.up_proj")
    with torch.no_grad():  # control: a single changed weight shows, and behind it only
        matrix.weight[3, 5] += 1.0
    changed = collect_imatrix(model, CHUNKS, process_output=True)
    assert error(changed.sums["blk.0.ffn_down.weight"], theirs["blk.0.ffn_down.weight"]) > 0.01
    assert torch.equal(changed.sums["blk.0.ffn_up.weight"], ours.sums["blk.0.ffn_up.weight"])


def test_a_case_worked_by_hand():
    model = GPT(GPTConfig(vocab_size=2, block_size=4, n_layer=1, n_head=1, n_embd=2, dropout=0.5))
    block = model.transformer.h[0]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.wte.weight.copy_(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]))  # normed: (1, -1) and (-1, 1)
        block.ln_1.weight.copy_(torch.tensor([2.0, 3.0]))
        block.ln_1.bias.copy_(torch.tensor([0.0, 1.0]))  # what enters c_attn: (2, -2) and (-2, 4)
        block.attn.c_attn.bias[4:] = torch.tensor([1.0, -2.0])  # v of every token, and so what enters c_proj
        block.ln_2.bias.copy_(torch.tensor([0.5, 0.25]))
        block.mlp.c_fc.bias.copy_(torch.tensor([10.0, 20.0, 30.0, 0, 0, 0, 0, 0]))  # gelu(10) is 10
    found = collect_imatrix(model.train(), [0, 0, 1], chunk_tokens=3)
    assert found.counts == {f"blk.0.{part}.weight": 3 for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}
    expected = {
        "attn_qkv": [4 + 4 + 4, 4 + 4 + 16],
        "attn_output": [3 * 1, 3 * 4],
        "ffn_up": [3 * 0.25, 3 * 0.0625],
        "ffn_down": [300, 1200, 2700, 0, 0, 0, 0, 0],
    }
    for name, sums in expected.items():
        torch.testing.assert_close(found.sums[f"blk.0.{name}.weight"], torch.tensor(sums, dtype=torch.float32))
    means = found.fitting({"blk.0.attn_qkv.weight": (6, 2), "token_embd.weight": (2, 2)})
    assert {name: mean.tolist() for name, mean in means.items()} == {"blk.0.attn_qkv.weight": [4.0, 8.0]}


def test_sums_of_two_texts_add_up():
    model = toy("llama")
    first, second = IDS[: 3 * 64], IDS[500 : 500 + 64]
    both = collect_imatrix(model, first + second, chunk_tokens=64)
    added = collect_imatrix(model, first, chunk_tokens=64) + collect_imatrix(model, second, chunk_tokens=64)
    assert set(added.counts.values()) == {4 * 64}
    assert close(added, both)
    assert not close(added, collect_imatrix(model, first + first[:64], chunk_tokens=64))


def test_of_different_matrices_only_those_that_fit_are_added():
    one = Importance({"a": torch.ones(2)}, {"a": 3}, 16, ["x.txt"])
    both = one + Importance({"a": torch.ones(2), "b": torch.ones(5)}, {"a": 4, "b": 1}, 32, ["y.txt"])
    assert (both.counts, both.chunk_tokens, both.datasets) == ({"a": 7, "b": 1}, 16, ["x.txt", "y.txt"])
    assert both.sums["a"].tolist() == [2.0, 2.0]
    assert both.sums["b"].tolist() == [1.0] * 5
    assert one.counts == {"a": 3}
    with pytest.raises(ConvertError, match="importances of a have 2 and 3 columns; they are of different models"):
        one + Importance({"a": torch.ones(3)}, {"a": 1})


def read_by(monkeypatch, model, data, **options) -> tuple[list[list[list[int]]], Importance]:
    """The batches that a model is given."""
    batches, features = [], model.features

    def read(idx):
        assert not torch.is_grad_enabled()  # activations of all layers would stay in memory
        batches.append(idx.tolist())
        return features(idx)

    monkeypatch.setattr(model, "features", read)
    return batches, collect_imatrix(model, data, **options)


def test_a_text_is_cut_into_chunks_and_its_end_is_dropped(monkeypatch):
    batches, found = read_by(monkeypatch, toy(), list(range(11)), chunk_tokens=4)
    assert batches == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert set(found.counts.values()) == {8}
    assert found.chunk_tokens == 4


def test_each_chunk_begins_as_llama_imatrix_begins_it(monkeypatch):
    """Its tokens are bos 0 1 2 ... 10, cut into 3 x 4, and then the first of each chunk is made bos."""
    batches, found = read_by(monkeypatch, toy(), list(range(11)), chunk_tokens=4, bos_token_id=20)
    assert batches == [[[20, 0, 1, 2], [20, 4, 5, 6], [20, 8, 9, 10]]]
    assert set(found.counts.values()) == {12}


def test_rows_of_ids_are_the_chunks(monkeypatch):
    rows = ([i, i + 1, i + 2] for i in (3, 5))
    batches, found = read_by(monkeypatch, toy(), [*rows, np.array([7]), torch.tensor([8])], bos_token_id=20)
    assert batches == [[[20, 3, 4, 5], [20, 5, 6, 7]], [[20, 7], [20, 8]]]
    assert set(found.counts.values()) == {12}
    assert found.chunk_tokens == 4


def test_any_form_of_the_same_ids_gives_the_same():
    model, first = toy(), collect_imatrix(toy(), IDS[:192], chunk_tokens=64)
    array = np.array(IDS[:192], dtype=np.uint16)
    forms = [array, torch.from_numpy(array.astype(np.int32)), TokenDataset(array), array.reshape(3, 64)]
    forms += [torch.tensor(IDS[:192]).view(3, 64), (row for row in array.reshape(3, 64)), tuple(IDS[:192])]
    for form in forms:
        assert same(collect_imatrix(model, form, chunk_tokens=64), first)


def test_how_many_chunks_are_read_at_a_time_does_not_matter(monkeypatch):
    at_once = collect_imatrix(toy(), IDS, chunk_tokens=32)
    monkeypatch.setattr(imatrix, "_BATCH_TOKENS", 1)
    batches, one_by_one = read_by(monkeypatch, toy(), IDS, chunk_tokens=32)
    assert {len(batch) for batch in batches} == {1}
    assert close(at_once, one_by_one)


def test_chunks_are_long_by_default_but_fit_into_the_context():
    assert collect_imatrix(toy("gpt"), IDS).chunk_tokens == 64  # the context
    long = toy("llama")
    long.context_length = 4096
    assert collect_imatrix(long, IDS).chunk_tokens == 512  # llama-imatrix's


def test_max_chunks_and_progress():
    seen = []
    found = collect_imatrix(toy(), IDS, chunk_tokens=64, max_chunks=20, progress=lambda *counts: seen.append(counts))
    assert set(found.counts.values()) == {20 * 64}
    assert len(IDS) // 64 > 20
    assert seen == [(1280, 1280)]
    seen.clear()
    collect_imatrix(toy(), IDS * 2, bos_token_id=0, max_chunks=40, progress=lambda *counts: seen.append(counts))
    assert seen == [(2048, 2560), (2560, 2560)]


def test_the_output_projection_is_measured_on_request():
    model = toy("llama")
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([IDS[:64]]))
    with_output = collect_imatrix(model, IDS[:64], chunk_tokens=64, process_output=True)
    torch.testing.assert_close(with_output.sums["output.weight"], hidden[0].square().sum((0, 1)))
    without = collect_imatrix(model, IDS[:64], chunk_tokens=64)
    assert with_output.sums.keys() - without.sums.keys() == {"output.weight"}


def test_a_layer_that_stands_in_two_places_is_measured_in_each():
    copied, shared = toy(), toy()
    copied.transformer.h[1].mlp.load_state_dict(copied.transformer.h[0].mlp.state_dict())
    shared.transformer.h[1].mlp = shared.transformer.h[0].mlp
    ours, expected = (collect_imatrix(model, IDS, chunk_tokens=48) for model in (shared, copied))
    assert same(ours, expected)
    assert not torch.equal(ours.sums["blk.0.ffn_up.weight"], ours.sums["blk.1.ffn_up.weight"])


@pytest.mark.parametrize("case", FAMILIES)
def test_sums_are_float32_whatever_the_model_computes_in(case):
    exact = collect_imatrix(toy(case), IDS, chunk_tokens=64, process_output=True)
    half = collect_imatrix(toy(case).bfloat16(), IDS, chunk_tokens=64, process_output=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = collect_imatrix(toy(case), IDS, chunk_tokens=64, process_output=True)
    for other in (half, mixed):
        assert {sums.dtype for sums in other.sums.values()} == {torch.float32}
        # Rounded to 8 bits: 2**-8 for each of some hundred thousand summands; sums of bfloat16 would stop growing at 256 of them.
        assert close(other, exact, within=0.1)
        assert not close(other, exact, within=1e-5)


def test_a_compiled_model_is_measured_too():
    compiled = toy()
    compiled.compile(backend="eager")
    wrapped = torch.compile(toy(), backend="eager")
    for model in (compiled, wrapped):
        model(torch.tensor([IDS[:64]]))
        assert same(collect_imatrix(model, IDS, chunk_tokens=64), collect_imatrix(toy(), IDS, chunk_tokens=64))


def state(model):
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return hooks, modes, values, [p.grad for p in model.parameters()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_also_after_an_error(monkeypatch, fails):
    model = toy()
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda module, args: None)
    before = state(model)
    if fails:
        monkeypatch.setattr(model.transformer.ln_f, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_imatrix(model, IDS)
    else:
        first = collect_imatrix(model, IDS)
        assert same(first, collect_imatrix(model, IDS))  # no dropout
    hooks, modes, values, *rest = state(model)
    assert (hooks, modes, rest) == (before[0], before[1], list(before[3:]))
    assert all(torch.equal(value, before[2][name]) for name, value in values.items())


# --- What cannot be


@pytest.mark.parametrize(
    ("data", "options", "kind", "message"),
    [
        (IDS[:40], {}, DataError, "the text has 40 tokens, and a chunk 64; take a smaller chunk_tokens, or more text"),
        (IDS[:62], {"bos_token_id": 0}, DataError, "the text has 62 tokens, and a chunk 63; "),
        ([], {}, DataError, "the text has 0 tokens, and a chunk 64; "),
        (np.zeros((0, 8), np.int64), {}, DataError, "the text has no chunk; give at least one row of ids"),
        ([[1, 2], []], {}, DataError, r"chunk 1 is float64 of shape \(0,\), but must be one row of whole numbers"),
        (
            [[1, 2], list(range(65))],
            {},
            DataError,
            "chunk 1 has 65 tokens, but must have 1 to 64; cut it, or change chunk_tokens",
        ),
        (np.zeros((2, 0), np.int64), {}, DataError, "chunk 0 has 0 tokens, but must have 1 to 64"),
        ([[[1]]], {}, DataError, r"chunk 0 is int64 of shape \(1, 1\), but must be one row of whole numbers"),
        ([0.5] * 64, {}, DataError, r"chunk 0 is float64 of shape \(64,\), but must be"),
        ("a" * 64, {}, DataError, r"chunk 0 is <U1 of shape \(64,\), but must be"),
        (
            [99] * 64,
            {},
            DataError,
            f"the data has id 99, the model only 0 to {CHARS.vocab_size - 1}; take the tokenizer",
        ),
        ([CHARS.vocab_size] * 64, {}, DataError, f"the data has id {CHARS.vocab_size}, the model only 0 to"),
        ([-1] * 64, {}, DataError, "the data has id -1, the model only 0 to"),
        (IDS, {"bos_token_id": 1000}, DataError, "the data has id 1000, the model only 0 to"),
        (
            IDS,
            {"chunk_tokens": 65},
            ConfigError,
            r"chunk_tokens \(65\) must be 1 to 64, the model's context; 512 is usual",
        ),
        (IDS, {"chunk_tokens": 0}, ConfigError, r"chunk_tokens \(0\) must be 1 to 64"),
        (IDS, {"chunk_tokens": 1, "bos_token_id": 0}, ConfigError, r"chunk_tokens \(1\) must be 2 to 64"),
        (IDS, {"max_chunks": 0}, ConfigError, r"max_chunks \(0\) must be at least 1, or None"),
    ],
)
def test_a_text_or_setting_that_cannot_be(data, options, kind, message):
    with pytest.raises(kind, match=message):
        collect_imatrix(toy(), data, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_model_that_computes_no_numbers_is_refused_with_the_name(value):
    model = toy()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[5] = value
    with pytest.raises(
        ConvertError, match="what enters blk.1.ffn_down.weight add up to infinity or NaN after 1,984 tokens"
    ):
        collect_imatrix(model, IDS[:1984])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_of_no_known_family_is_refused():
    with pytest.raises(ConvertError, match="Linear is no model that other programs know"):
        collect_imatrix(nn.Linear(2, 2), IDS)


@pytest.mark.parametrize("other", [toy(width=64), toy("llama")])
def test_the_importance_of_another_model_is_refused(tmp_path, other):
    importance = collect_imatrix(other, IDS, max_chunks=1)
    with pytest.raises(ConvertError, match="it was collected from another model"):
        export_gguf(toy(), CHARS, tmp_path / "x.gguf", file_type="Q4_0", importance=importance)
    assert list(tmp_path.iterdir()) == []


def test_an_importance_of_nothing_in_the_model_is_refused():
    with pytest.raises(ConvertError, match="the importance is of a, b, c and 1 more, and the model has none of them"):
        Importance({name: torch.ones(2) for name in "dcba"}, dict.fromkeys("abcd", 1)).fitting({"e": (2, 2)})


# --- Files

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=13
)
SUMS = st.lists(st.floats(0, width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9)


@settings(max_examples=25)
@given(
    matrices=st.dictionaries(NAMES, st.tuples(SUMS, st.integers(0, 2**24)), min_size=1, max_size=6),
    chunk_tokens=st.integers(1, 2**20),
    datasets=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
)
def test_what_is_written_is_read(tmp_path_factory, matrices, chunk_tokens, datasets):
    path = tmp_path_factory.mktemp("imatrix") / "x.gguf"
    sums = {name: torch.tensor(values) for name, (values, _) in matrices.items()}
    written = Importance(sums, {name: count for name, (_, count) in matrices.items()}, chunk_tokens, datasets)
    write_imatrix(path, written)
    back = read_imatrix(path)
    with path.open("r+b") as file:  # what was read is in memory
        file.write(b"\0" * path.stat().st_size)
    assert same(back, written)
    assert (back.chunk_tokens, back.datasets) == (chunk_tokens, datasets)


def test_a_file_has_the_keys_and_shapes_of_llama_imatrix(tmp_path):
    """As gguf-dump shows them of a file that llama-imatrix wrote; the architecture is more, and nobody's."""
    importance = replace(collect_imatrix(toy(), IDS, chunk_tokens=16, max_chunks=5), datasets=["quijote.txt"])
    write_imatrix(tmp_path / "x.gguf", importance)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {
        key: (field.contents(), field.types) for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    kinds = gguf.GGUFValueType
    assert fields == {
        "general.architecture": ("imatrix", [kinds.STRING]),
        "general.type": ("imatrix", [kinds.STRING]),
        "imatrix.datasets": (["quijote.txt"], [kinds.ARRAY, kinds.STRING]),
        "imatrix.chunk_count": (5, [kinds.UINT32]),
        "imatrix.chunk_size": (16, [kinds.UINT32]),
    }
    parts = [f"blk.{i}.{part}.weight" for i in (0, 1) for part in ("attn_output", "attn_qkv", "ffn_down", "ffn_up")]
    assert [tensor.name for tensor in reader.tensors] == [
        f"{name}.{what}" for name in parts for what in ("in_sum2", "counts")
    ]
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == [1 if what == "counts" else 128 if "ffn_down" in name else 32]
        assert np.array_equal(tensor.data, [80.0] if what == "counts" else importance.sums[name].numpy())


def test_a_matrix_that_no_token_came_through_weighs_all_columns_alike(tmp_path):
    write_imatrix(tmp_path / "x.gguf", Importance({"a": torch.zeros(3), "b": torch.ones(3)}, {"a": 0, "b": 4}))
    means = read_imatrix(tmp_path / "x.gguf").fitting({"a": (5, 3), "b": (5, 3)})
    assert {name: mean.tolist() for name, mean in means.items()} == {"a": [1.0] * 3, "b": [0.25] * 3}


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(ConvertError, match="x.gguf would be empty"):
        write_imatrix(tmp_path / "x.gguf", Importance({}, {}))
    assert list(tmp_path.iterdir()) == []


def file_of(path, tensors, **metadata):
    """A file like llama-imatrix's, of any content."""
    writer = gguf.GGUFWriter(path, "imatrix")
    for key, value in {"general.type": "imatrix", "imatrix.chunk_size": 512, **metadata}.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}.get(type(value))
        if add is not None:
            add(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values if isinstance(values, np.ndarray) else np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GOOD = {"a.in_sum2": [1.0, 2.0], "a.counts": [4.0]}
UNFIT_FILES = {
    "of a model": (
        GOOD,
        {"general.type": "model"},
        CheckpointError,
        "not an importance matrix: general.type is 'model' and",
    ),
    "of no type": (GOOD, {"general.type": None}, CheckpointError, "not an importance matrix: general.type is None and"),
    "no chunks": (GOOD, {"imatrix.chunk_size": None}, CheckpointError, "imatrix.chunk_size None; llmforge imatrix and"),
    "empty chunks": (
        GOOD,
        {"imatrix.chunk_size": 0},
        CheckpointError,
        "and imatrix.chunk_size 0; llmforge imatrix and",
    ),
    "a flag for a size": (GOOD, {"imatrix.chunk_size": True}, CheckpointError, "and imatrix.chunk_size True; "),
    "no count": (
        {**GOOD, "b.in_sum2": [1.0]},
        {},
        CheckpointError,
        "must have both sums and counts, and has not of b$",
    ),
    "no sums": ({**GOOD, "b.counts": [1.0]}, {}, CheckpointError, "must have both sums and counts, and has not of b$"),
    "no matrix": ({"a": [1.0]}, {}, CheckpointError, "must have both sums and counts, and has not of any matrix$"),
    "negative": (
        {**GOOD, "a.in_sum2": [1.0, -2.0]},
        {},
        CheckpointError,
        "the sums of a must be finite, and 0 or more",
    ),
    "NaN": ({**GOOD, "a.in_sum2": [1.0, np.nan]}, {}, CheckpointError, "the sums of a must be finite, and 0 or more"),
    "infinite": ({**GOOD, "a.in_sum2": [np.inf, 1.0]}, {}, CheckpointError, "the sums of a must be finite"),
    "a negative count": (
        {**GOOD, "a.counts": [-1.0]},
        {},
        CheckpointError,
        "the count of a must be finite, and 0 or more",
    ),
    "a NaN count": (
        {**GOOD, "a.counts": [np.nan]},
        {},
        CheckpointError,
        "the count of a must be finite, and 0 or more",
    ),
    "half sums": (
        {**GOOD, "b.in_sum2": np.ones(1, np.float16), "b.counts": [1.0]},
        {},
        CheckpointError,
        "counts of b must be F32",
    ),
    "half counts": (
        {**GOOD, "b.counts": np.ones(1, np.float16), "b.in_sum2": [1.0]},
        {},
        CheckpointError,
        "counts of b must be F32",
    ),
    "experts": (
        {"a.in_sum2": [[1.0, 2.0], [3.0, 4.0]], "a.counts": [[1.0], [2.0]]},
        {},
        ConvertError,
        "counts 2 matrices in a: it is of a mixture of experts, which no model here is",
    ),
}


@pytest.mark.parametrize("case", UNFIT_FILES)
def test_a_file_that_cannot_be_used_is_named(tmp_path, case):
    tensors, metadata, kind, message = UNFIT_FILES[case]
    with pytest.raises(kind, match=message) as caught:
        read_imatrix(file_of(tmp_path / "x.gguf", tensors, **metadata))
    assert "x.gguf" in str(caught.value)


def test_counts_and_sums_may_have_the_second_dimension_that_ggml_leaves_out(tmp_path):
    found = read_imatrix(file_of(tmp_path / "x.gguf", {"a.in_sum2": [[1.0, 2.0]], "a.counts": [[4.0]]}))
    assert (found.sums["a"].tolist(), found.counts, found.datasets) == ([1.0, 2.0], {"a": 4}, [])


def test_files_that_are_no_gguf(tmp_path):
    name = b"blk.0.attn_q.weight"
    old = struct.pack("<ii", 1, len(name)) + name + struct.pack("<iiff", 10, 2, 1.0, 2.0)
    (tmp_path / "old.dat").write_bytes(old)
    with pytest.raises(ConvertError, match="convert it with llama-imatrix --in-file .*old.dat -o .*old.gguf$"):
        read_imatrix(tmp_path / "old.dat")
    for content in (b"", b"PK\3\4 a zip", b"\1\0\0\0\xff\xff\xff\x7f", old[:20], b"\1\0\0\0\4\0\0\0text"):
        (tmp_path / "x.dat").write_bytes(content)
        with pytest.raises(CheckpointError, match="x.dat is not a GGUF file"):
            read_imatrix(tmp_path / "x.dat")
    with pytest.raises(CheckpointError, match="cannot read .*none.gguf: No such file or directory"):
        read_imatrix(tmp_path / "none.gguf")
    write_imatrix(tmp_path / "x.gguf", Importance({"a": torch.ones(300)}, {"a": 1}))
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="x.gguf is cut off"):
        read_imatrix(tmp_path / "x.gguf")


# --- What it is for


def tensors_of(path) -> dict[str, tuple[str, bytes]]:
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def measured():
    """A model whose rows fit blocks of 256, and its importance."""
    model = toy("llama", width=256, n_layer=2)
    return model, collect_imatrix(model, IDS[:1024], chunk_tokens=256)


def test_llama_cpp_makes_the_same_bytes_of_the_same_importance(tmp_path, measured):
    """Of the file that was written, with the means that llama-quantize computes from it."""
    other = toy("gpt untied", width=256)
    models = {"llama": measured, "gpt": (other, collect_imatrix(other, IDS, process_output=True))}
    types = ["Q4_K_M", "Q2_K", "IQ4_XS"]
    jobs = []
    for name, (model, importance) in models.items():
        write_imatrix(tmp_path / f"{name}.imatrix", importance)
        export_gguf(model, CHARS, tmp_path / f"{name}.F32", file_type="F32")
        targets = {str(tmp_path / f"{name}.{file_type}"): FILE_TYPES[file_type][0] for file_type in types}
        jobs.append(
            {"gguf": str(tmp_path / f"{name}.F32"), "imatrix": str(tmp_path / f"{name}.imatrix"), "types": targets}
        )
    ask_llama_cpp(tmp_path, jobs)
    for name, (model, _) in models.items():
        importance = read_imatrix(tmp_path / f"{name}.imatrix")
        for file_type in types:
            ours, theirs = tmp_path / "ours.gguf", tensors_of(tmp_path / f"{name}.{file_type}")
            export_gguf(model, CHARS, ours, file_type=file_type, importance=importance)
            assert tensors_of(ours) == theirs
            export_gguf(model, CHARS, ours, file_type=file_type)  # control
            changed = {name for name, given in tensors_of(ours).items() if given != theirs[name]}
            assert changed == importance.sums.keys()


def test_a_model_of_two_bits_computes_more_exactly_with_it(tmp_path, measured):
    """Measured on other text, as the error of what each matrix computes."""
    model, importance = measured
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][0]}))
    with torch.no_grad():
        model(torch.tensor([IDS[1100:1356]]))
    errors = []
    for given_importance in (None, importance):
        export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="Q2_K", importance=given_importance)
        rounded, _ = load(tmp_path / "x.gguf")
        weights = {name: rounded.get_submodule(name).weight - model.get_submodule(name).weight for name in inputs}
        errors.append({name: (x @ weights[name].T).square().mean().item() for name, x in inputs.items()})
    without, with_importance = errors
    assert len(without) == 14
    assert sum(with_importance.values()) < 0.7 * sum(without.values())
    assert sum(with_importance[name] < without[name] for name in without) >= 13


# --- On the command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(cli._COMMANDS, "imatrix", command)
    (tmp_path / "model").mkdir()
    write_model_folder(tmp_path / "model", toy(), CHARS)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_the_command_writes_what_was_measured(folder, capsys):
    arguments = ["imatrix", str(folder / "model"), str(folder / "text.txt"), "--out", str(folder / "imatrix.gguf")]
    assert (
        cli.main([*arguments, "--chunk-tokens", "32", "--max-chunks", "9", "--device", "cpu", "--process-output"]) == 0
    )
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"wrote {folder / 'imatrix.gguf'} (8 matrices; 288 tokens in 9 pieces of 32)"
    assert "export" in out.splitlines()[1]
    assert err == ""
    found = read_imatrix(folder / "imatrix.gguf")
    assert same(found, collect_imatrix(toy(), IDS, chunk_tokens=32, max_chunks=9))
    assert (found.chunk_tokens, found.datasets) == (32, [str(folder / "text.txt")])
    assert cli.main(arguments) == 0
    assert "in 32 pieces of 64)" in capsys.readouterr().out
    assert set(read_imatrix(folder / "imatrix.gguf").counts.values()) == {len(IDS) // 64 * 64}


def test_the_command_begins_chunks_as_the_tokenizer_says(folder, monkeypatch):
    arguments = ["imatrix", str(folder / "model"), str(folder / "text.txt"), "--out", str(folder / "imatrix.gguf")]
    monkeypatch.setattr(type(CHARS), "add_bos", True)
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    assert same(read_imatrix(folder / "imatrix.gguf"), collect_imatrix(toy(), IDS, bos_token_id=CHARS.bos_token_id))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR/model", "DIR/none.txt"], "none.txt"),
        (["DIR/model", "DIR/short.txt"], "the text has 5 tokens, and a chunk 64"),
        (["DIR/none", "DIR/text.txt"], "none"),
        (["DIR/model", "DIR/text.txt", "--chunk-tokens", "100"], "chunk_tokens (100) must be 1 to 64"),
        (["DIR/model", "DIR/text.txt", "--max-chunks", "0"], "max_chunks (0) must be at least 1"),
        (["DIR/model", "DIR/text.txt", "--out", "DIR"], "is a folder; name a file inside it"),
    ],
)
def test_bad_input_is_one_clear_message(folder, capsys, arguments, message):
    (folder / "short.txt").write_text("En un", encoding="utf-8")
    arguments = [argument.replace("DIR", str(folder)) for argument in arguments]
    assert cli.main(["imatrix", "--out", str(folder / "x.gguf"), "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (folder / "x.gguf").exists()


# --- llama.cpp's part


class GGMLTensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )

    def values(self) -> np.ndarray:
        """Of a float32 matrix in the memory of the CPU."""
        assert (self.type, self.nb[0], self.ne[2], self.ne[3]) == (0, 4, 1, 1)
        assert self.nb[1] == 4 * self.ne[0]
        data = ctypes.cast(self.data, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(data, (self.ne[1], self.ne[0]))


def main(folder: Path) -> None:
    """Do what jobs.json lists: {"gguf", "chunks": ids (N, T), "sums": .npz} or {"gguf", "imatrix", "types": {file: number}}."""
    for job in json.loads((folder / "jobs.json").read_text(encoding="utf-8")):
        if "sums" in job:
            np.savez(job["sums"], **sums_of_squares(job["gguf"], job["chunks"]))
        for target, file_type in job.get("types", {}).items():
            quantize(job["gguf"], target, file_type, job["imatrix"])


def sums_of_squares(path: str, chunks: list[list[int]]) -> dict[str, np.ndarray]:
    """What llama-imatrix --process-output sums up, in float64: by name of a weight, the squares of what it is multiplied with."""
    import llama_cpp
    from llama_cpp._ggml import libggml

    libggml.ggml_op_desc.argtypes, libggml.ggml_op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p
    sums: dict[str, np.ndarray] = {}

    @llama_cpp.llama_cpp.ggml_backend_sched_eval_callback
    def look(pointer: int, ask: bool, _: int) -> bool:
        tensor = GGMLTensor.from_address(pointer)
        if libggml.ggml_op_desc(pointer) != b"MUL_MAT":
            return not ask
        weight, x = (GGMLTensor.from_address(tensor.src[i]) for i in (0, 1))
        name = weight.name.decode()
        wanted = name.startswith("blk.") or name == "output.weight"
        if wanted and not ask:
            sums[name] = sums.get(name, 0.0) + (x.values().astype(np.float64) ** 2).sum(0)
        return wanted or not ask

    n = len(chunks[0])
    model_params, params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False  # else some CPUs have the weights in another order and under no name
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32  # the file is compared, not the cache's rounding
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cb_eval = look
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    for chunk in chunks:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = n
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
    return sums


def quantize(path: str, target: str, file_type: int, imatrix_file: str) -> None:
    """`llama-quantize --imatrix imatrix_file path target file_type`"""
    import llama_cpp

    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in gguf.GGUFReader(imatrix_file).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    means = {name: tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"][0] for name in names}
    entry = llama_cpp.llama_cpp.llama_model_imatrix_data
    entries = [
        entry(name.encode(), mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), mean.size)
        for name, mean in means.items()
    ]
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, file_type
    params.imatrix = (entry * (len(entries) + 1))(*entries, entry())
    assert llama_cpp.llama_model_quantize(path.encode(), target.encode(), params) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
