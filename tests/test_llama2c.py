"""llama2.c's files, written from a model of its kind that is computed here in its own way: complex numbers, neighbours turn."""

import struct

import numpy as np
import pytest
import torch

from llmforge.convert import export_gguf, export_hf, load
from llmforge.deploy import verify_gguf
from llmforge.errors import CheckpointError, ConvertError
from llmforge.models import Llama
from llmforge.tokenizers import CharTokenizer

TEXT = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, ¡no ha mucho tiempo!\n"
CHARS = CharTokenizer.from_text(TEXT)
V, DIM, HIDDEN, LAYERS, HEADS, CONTEXT = 64, 32, 48, 2, 4, 40
LAYER_PARTS = {  # in the order of the files
    "attention_norm": (DIM,),
    "attention.wq": (DIM, DIM),
    "attention.wk": None,
    "attention.wv": None,
    "attention.wo": (DIM, DIM),
    "ffn_norm": (DIM,),
    "feed_forward.w1": (HIDDEN, DIM),
    "feed_forward.w2": (DIM, HIDDEN),
    "feed_forward.w3": (HIDDEN, DIM),
}


def weights(*, kv_heads: int, tied: bool, vocab: int = V) -> dict[str, torch.Tensor]:
    state = {"tok_embeddings.weight": torch.randn(vocab, DIM)}
    for layer in range(LAYERS):
        for part, shape in LAYER_PARTS.items():
            shape = shape or (kv_heads * DIM // HEADS, DIM)
            spread = torch.randn(shape) * 0.3
            state[f"layers.{layer}.{part}.weight"] = spread + 1 if len(shape) == 1 else spread
    state["norm.weight"] = torch.randn(DIM) * 0.3 + 1
    state["output.weight"] = state["tok_embeddings.weight"] if tied else torch.randn(vocab, DIM)
    return state


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def logits_of(state: dict[str, torch.Tensor], idx: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(T,) -> (T, V), in float64, one head after the other."""
    w = {name: tensor.double() for name, tensor in state.items()}
    T, D = len(idx), DIM // HEADS
    turn = torch.exp(1j * torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D).double())  # (T, D/2)

    def turned(x):  # (T, D): neighbours are one complex number
        return torch.view_as_real(torch.view_as_complex(x.reshape(T, D // 2, 2).contiguous()) * turn).reshape(T, D)

    x = w["tok_embeddings.weight"][idx]
    for layer in range(LAYERS):
        p = {name.removeprefix(f"layers.{layer}."): t for name, t in w.items() if name.startswith(f"layers.{layer}.")}
        h = normed(x, p["attention_norm.weight"])
        q, k, v = (h @ p[f"attention.w{part}.weight"].T for part in "qkv")
        heads = []
        for head in range(HEADS):
            rows = slice(head * D, head * D + D)
            shared = head // (HEADS // kv_heads)
            kv_rows = slice(shared * D, shared * D + D)
            scores = turned(q[:, rows]) @ turned(k[:, kv_rows]).T / D**0.5
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, kv_rows])
        x = x + torch.cat(heads, dim=1) @ p["attention.wo.weight"].T
        h = normed(x, p["ffn_norm.weight"])
        gate = h @ p["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ p["feed_forward.w3.weight"].T)) @ p["feed_forward.w2.weight"].T
    return (normed(x, w["norm.weight"]) @ w["output.weight"].T).float()


def assert_computes(model: Llama, state: dict[str, torch.Tensor], kv_heads: int):
    idx = torch.arange(CONTEXT) * 13 % len(state["tok_embeddings.weight"])
    with torch.no_grad():
        found = model(idx[None])[0]
    expected = logits_of(state, idx, kv_heads)
    # Order of float sums, in logits of some ten.
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    changed = {**state, "layers.1.attention.wk.weight": state["layers.1.attention.wk.weight"].flip(0)}
    assert (logits_of(changed, idx, kv_heads) - found).abs().max() > 1e-3  # control: the order of rows matters


# --- ckpt.pt


def checkpoint(state: dict[str, torch.Tensor], kv_heads: int | None, **args) -> dict:
    """What its train.py saves."""
    args = dict(dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=kv_heads, vocab_size=V, multiple_of=16, **args)
    return {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {"max_seq_len": CONTEXT, "dropout": 0.0, **args},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.0),
        "config": {"dataset": "tinystories"},
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1, None])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_computes_what_llama2c_computes(tmp_path, kv_heads, compiled):
    state = weights(kv_heads=kv_heads or HEADS, tied=True)
    buffers = {"freqs_cos": torch.ones(CONTEXT, 4), "freqs_sin": torch.ones(CONTEXT, 4)}
    buffers |= {f"layers.{i}.attention.mask": torch.zeros(1, 1, CONTEXT, CONTEXT) for i in range(LAYERS)}
    saved = {f"_orig_mod.{name}": t for name, t in {**state, **buffers}.items()} if compiled else state
    torch.save(checkpoint(saved, kv_heads), tmp_path / "ckpt.pt")
    CHARS.save(tmp_path)
    model, tokenizer = load(tmp_path / "ckpt.pt")
    assert_computes(model, state, kv_heads or HEADS)
    assert isinstance(model, Llama)
    assert not model.training
    assert model.config.max_position_embeddings == CONTEXT
    assert model.config.intermediate_size == HIDDEN
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chars == CHARS.chars


def test_a_checkpoint_goes_on_to_llama_cpp_and_transformers(tmp_path):
    state = weights(kv_heads=2, tied=True, vocab=CHARS.vocab_size)
    saved = checkpoint(state, 2)
    saved["model_args"]["vocab_size"] = CHARS.vocab_size
    torch.save(saved, tmp_path / "ckpt.pt")
    model, _ = load(tmp_path / "ckpt.pt")
    export_gguf(tmp_path / "ckpt.pt", CHARS, tmp_path / "x.gguf", file_type="F32")
    assert verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT).kl_mean <= 1e-9
    export_hf(tmp_path / "ckpt.pt", CHARS, tmp_path / "hf")
    assert_computes(load(tmp_path / "hf")[0], state, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(lora_modules={}), ConvertError, "model_args that llama2.c does not: lora_modules"),
        (
            dict(n_heads=3, n_kv_heads=None),
            CheckpointError,
            r"hidden_size \(32\) must be divisible by num_attention_heads \(3\)",
        ),
        (dict(vocab_size=None), CheckpointError, "vocab_size must be a whole number, got None"),
        (dict(n_layers=1), CheckpointError, r"does not fit its sizes; unexpected: model\.layers\.1"),
        (dict(n_layers=3), CheckpointError, r"does not fit its sizes; missing: model\.layers\.2"),
        (dict(dim=64), CheckpointError, "of another shape: model.embed_tokens.weight"),
    ],
    ids=str,
)
def test_model_args_that_do_not_fit_are_refused(tmp_path, changes, error, message):
    saved = checkpoint(weights(kv_heads=4, tied=True), 4)
    saved["model_args"] |= changes
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(error, match=message):
        load(tmp_path / "ckpt.pt")


def test_a_checkpoint_that_is_not_tied_is_refused(tmp_path):
    torch.save(checkpoint(weights(kv_heads=4, tied=False), 4), tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path / "ckpt.pt")


# --- .bin


def floats(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().astype("<f4").tobytes()


def all_layers(state: dict[str, torch.Tensor], *parts: str) -> list[torch.Tensor]:
    return [state[f"layers.{layer}.{part}.weight"] for part in parts for layer in range(LAYERS)]


MATRICES = [part for part in LAYER_PARTS if not part.endswith("norm")]


def quantized(tensor: torch.Tensor, group: int) -> tuple[bytes, torch.Tensor]:
    """int8 and scales as bytes, and the values that they stand for."""
    groups = tensor.reshape(-1, group)
    scales = groups.abs().amax(1, keepdim=True) / 127
    whole = (groups / scales).round()
    return whole.numpy().astype(np.int8).tobytes() + floats(scales), (whole * scales).reshape(tensor.shape)


def bin_file(state, *, version: int, kv_heads: int, tied: bool, group: int = 16) -> tuple[bytes, dict]:
    """The file, and the weights that are left in it."""
    sizes = [DIM, HIDDEN, LAYERS, HEADS, kv_heads, V, CONTEXT]
    last = [] if tied else [state["output.weight"]]
    norms = [*all_layers(state, "attention_norm", "ffn_norm"), state["norm.weight"]]
    if version == 0:
        sizes[5] *= 1 if tied else -1
        D = DIM // HEADS
        angles = torch.arange(CONTEXT)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
        body = [state["tok_embeddings.weight"], *all_layers(state, *LAYER_PARTS), state["norm.weight"]]
        return struct.pack("<7i", *sizes) + b"".join(map(floats, [*body, angles.cos(), angles.sin(), *last])), state
    flags = struct.pack("<B", tied) + (struct.pack("<i", group) if version == 2 else b"")
    header = (struct.pack("<Ii7i", 0x616B3432, version, *sizes) + flags).ljust(256, b"\0")
    if version == 1:
        body = [*norms, state["tok_embeddings.weight"], *all_layers(state, *MATRICES), *last]
        return header + b"".join(map(floats, body)), state
    left, parts = dict(state), list(map(floats, norms))
    names = ["tok_embeddings", *(f"layers.{i}.{part}" for part in MATRICES for i in range(LAYERS))]
    for name in [*names, *([] if tied else ["output"])]:
        content, left[f"{name}.weight"] = quantized(state[f"{name}.weight"], group)
        parts.append(content)
    if tied:
        left["output.weight"] = left["tok_embeddings.weight"]
    return header + b"".join(parts), left


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_bin_file_computes_what_llama2c_computes(tmp_path, version, tied, kv_heads):
    state = weights(kv_heads=kv_heads, tied=tied)
    content, left = bin_file(state, version=version, kv_heads=kv_heads, tied=tied)
    (tmp_path / "model.bin").write_bytes(content)
    model, tokenizer = load(tmp_path / "model.bin")
    assert tokenizer is None
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.kv_heads == kv_heads
    assert_computes(model, left, kv_heads)
    assert torch.equal(model.lm_head.weight, left["output.weight"])
    assert (left is not state) == (version == 2)  # there the weights are rounded


@pytest.mark.parametrize("group", [2, 32])
def test_groups_of_any_size_are_read(tmp_path, group):
    content, left = bin_file(weights(kv_heads=4, tied=True), version=2, kv_heads=4, tied=True, group=group)
    (tmp_path / "model.bin").write_bytes(content)
    assert_computes(load(tmp_path / "model.bin")[0], left, 4)


def with_number(content: bytes, place: int, number: int) -> bytes:
    return content[:place] + struct.pack("<i", number) + content[place + 4 :]


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (0, lambda c: c[:20], r"is no \.bin file of llama2\.c: it has 20 bytes"),
        (0, lambda c: c[:-4], "a model of the sizes .* has [0-9,]+ bytes, the file"),
        (0, lambda c: c + bytes(4), "a model of the sizes .* has [0-9,]+ bytes, the file"),
        (0, lambda c: with_number(c, 0, 0), r"its header has the sizes \(0, 48, 2, 4"),
        (0, lambda c: with_number(c, 8, 2**30), r"its header has the sizes \(32, 48, 1073741824"),
        (0, lambda c: with_number(c, 12, -4), r"its header has the sizes \(32, 48, 2, -4"),
        (
            0,
            lambda c: with_number(with_number(c, 12, 5), 16, 5),
            r"hidden_size \(32\) must be divisible by num_attention_heads \(5\)",
        ),
        (
            0,
            lambda c: with_number(c, 16, 3),
            r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)",
        ),
        (0, lambda c: with_number(c, 20, -V), "a model of the sizes"),
        (1, lambda c: with_number(c, 4, 3), r"of version 3; 0, 1 and 2 are known"),
        (1, lambda c: c[:100], "of version 1; 0, 1 and 2 are known|has .* bytes"),
        (1, lambda c: c[:36] + b"\0" + c[37:], "a model of the sizes"),
        (2, lambda c: with_number(c, 37, 0), "a model of the sizes"),
        (2, lambda c: with_number(c, 37, -16), "a model of the sizes"),
        (2, lambda c: with_number(c, 37, 24), "a model of the sizes"),
        (2, lambda c: with_number(c, 4, 1), "a model of the sizes"),
    ],
)
def test_a_damaged_bin_file_is_refused(tmp_path, version, change, message):
    content, _ = bin_file(weights(kv_heads=4, tied=True), version=version, kv_heads=4, tied=True)
    (tmp_path / "model.bin").write_bytes(change(content))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model.bin")


def test_the_first_layout_of_version_2_is_not_taken_for_the_later_one(tmp_path):
    """For some weeks export.py wrote all scales at the end; the size is the same."""
    state = weights(kv_heads=4, tied=True)
    content, _ = bin_file(state, version=2, kv_heads=4, tied=True)
    norms = 4 * DIM * (2 * LAYERS + 1)
    matrices = [state["tok_embeddings.weight"], *all_layers(state, *MATRICES)]
    parts = [(quantized(m, 16)[0][: m.numel()], quantized(m, 16)[0][m.numel() :]) for m in matrices]
    old = content[: 256 + norms] + b"".join(q for q, _ in parts) + b"".join(s for _, s in parts)
    assert len(old) == len(content)
    (tmp_path / "model.bin").write_bytes(old)
    with pytest.raises(CheckpointError, match="which had all scales at its end; export it again"):
        load(tmp_path / "model.bin")


def test_tokenizer_files_beside_the_model_are_read(tmp_path):
    content, _ = bin_file(weights(kv_heads=4, tied=True), version=1, kv_heads=4, tied=True)
    (tmp_path / "stories.bin").write_bytes(content)
    CHARS.save(tmp_path)
    assert load(tmp_path / "stories.bin")[1].chars == CHARS.chars
