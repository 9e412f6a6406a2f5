"""Model files that are cut off, corrupted or hostile: one clear error each, at once; never a crash, a hang, or memory without end."""

import io
import json
import math
import pickle
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.cli.main import main
from llmforge.convert import export_gguf, export_hf, load
from llmforge.errors import CheckpointError, ConvertError, DataError, LLMForgeError
from llmforge.formats.gguf import read_gguf_header
from llmforge.models import GPT, GPTConfig, Llama, LlamaConfig
from llmforge.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer, load_tokenizer
from llmforge.training.checkpoint import write_model_folder

MAX_MESSAGE = 600  # characters
TEXT = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, vivía un hidalgo.\n"
CHARS = CharTokenizer.from_text(TEXT)
BPE = BPETokenizer.from_texts([TEXT * 3], vocab_size=270)
Files = dict[str, bytes]  # of a folder


# --- Whole files of each kind, small


def llama(vocab_size: int = CHARS.vocab_size, **changes) -> Llama:
    shape = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return Llama(LlamaConfig(**{"vocab_size": vocab_size, "max_position_embeddings": 32, **shape, **changes}))


def gpt(**changes) -> GPT:
    return GPT(
        GPTConfig(**{**dict(vocab_size=CHARS.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=8), **changes})
    )


def sentencepiece_pieces() -> list[tuple[str, float, int]]:
    """Text, score and type of the pieces of a toy model of Llama's kind."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    merged = [("▁a", -1.0, 1), ("ab", -2.0, 1), ("▁ab", -3.0, 1)]
    letters = [(letter, -10.0 - i, 1) for i, letter in enumerate("▁ab")]
    return special + [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] + merged + letters


def sentencepiece_tokenizer() -> SentencePieceTokenizer:
    tokens, scores, types = zip(*sentencepiece_pieces(), strict=True)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return SentencePieceTokenizer.from_scores(tokens, scores, types, unk_id=0, add_space_prefix=True, config=config)


def protobuf_field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value % 2**64)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def piece(text: str | bytes, score: float, kind: int) -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return protobuf_field(1, protobuf_field(1, text) + protobuf_field(2, score) + protobuf_field(3, kind))


def tokenizer_model(pieces: list[bytes] | None = None, *, trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    whole = [piece(*values) for values in sentencepiece_pieces()] if pieces is None else pieces
    trainer = protobuf_field(3, 2) + protobuf_field(35, 1) + trainer  # BPE with byte fallback
    normalizer = protobuf_field(4, 0) + normalizer
    return b"".join(whole) + protobuf_field(2, trainer) + protobuf_field(3, normalizer)


def llama2c_bin(model: Llama, *, sizes: tuple[int, ...] | None = None) -> bytes:
    c = model.config
    sizes = sizes or (c.hidden_size, c.intermediate_size, 2, 2, 1, c.vocab_size, c.max_position_embeddings)
    numbers = sum(p.numel() for p in model.parameters()) + 32 * c.head_width  # and cosines and sines
    return struct.pack("<7i", *sizes) + bytes(4 * numbers)


def nanogpt_checkpoint(**changes) -> bytes:
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=CHARS.vocab_size, dropout=0.0)
    return torch_file({"model": dict(gpt().state_dict()), "model_args": args, **changes})


def torch_file(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Toys(dict):
    """Name -> the files of a whole model."""

    def __repr__(self) -> str:
        return "toys"


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    root = tmp_path_factory.mktemp("toys")
    bpe = BPE.vocab_size
    export_hf(llama(bpe), BPE, root / "llama")
    export_hf(llama(sliding_window=8), CHARS, root / "mistral")
    export_hf(llama(qkv_bias=True), CHARS, root / "qwen2")
    export_hf(llama(qk_norm=True), CHARS, root / "qwen3")
    export_hf(gpt(), CHARS, root / "gpt2")
    export_hf(llama(bpe), BPE, root / "sharded", max_shard_bytes=4_000)
    (root / "own").mkdir()
    write_model_folder(root / "own", gpt(), CHARS)
    for name in ("llama.gguf", "gpt2.gguf", "spm.gguf", "pt", "bin", "spm", "saved spm"):
        (root / name).mkdir()
    export_gguf(llama(bpe), BPE, root / "llama.gguf" / "x.gguf", file_type="F32")
    export_gguf(gpt(), CHARS, root / "gpt2.gguf" / "x.gguf", file_type="F32")
    spm = sentencepiece_tokenizer()
    export_gguf(llama(spm.vocab_size), spm, root / "spm.gguf" / "x.gguf", file_type="F32")
    (root / "pt" / "ckpt.pt").write_bytes(nanogpt_checkpoint())
    (root / "bin" / "model.bin").write_bytes(llama2c_bin(llama(tie_word_embeddings=True)))
    (root / "spm" / "tokenizer.model").write_bytes(tokenizer_model())
    spm.save(root / "saved spm")
    export_hf(llama(), CHARS, root / "mismatched")
    BPE.save(root / "mismatched")
    return Toys({folder.name: read(folder) for folder in root.iterdir()})


def read(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(folder: Path, files: Files) -> Path:
    """Write a folder; the path that `load` takes."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    single = [name for name in ("x.gguf", "ckpt.pt", "model.bin") if name in files]
    return folder / single[0] if single else folder


def refused(error: type[Exception], message: str, action: Any, *arguments: Any) -> None:
    """It raises exactly this class, in one line that says what is wrong and at what."""
    with warnings.catch_warnings(), pytest.raises(error, match=message) as info:
        warnings.simplefilter("ignore", UserWarning)
        action(*arguments)
    assert type(info.value) is error
    assert_clear(info.value)


def assert_clear(error: LLMForgeError) -> None:
    text = str(error)
    assert text.isprintable(), text
    assert 20 < len(text) <= MAX_MESSAGE, text


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "sharded",
        "own",
        "llama.gguf",
        "gpt2.gguf",
        "spm.gguf",
        "pt",
        "bin",
    ],
)
def test_the_whole_files_are_models(toys, tmp_path, name):
    """What the tests below spoil is good."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = load(write(tmp_path / "model", toys[name]))
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape[:2] == (1, 3)
    assert (tokenizer is None) == (name in ("pt", "bin"))


def test_the_whole_tokenizer_model_is_a_tokenizer(toys, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "model", toys["spm"]))
    assert tokenizer.decode(tokenizer.encode("ab a ñ")) == "ab a ñ"


# --- safetensors


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def parts_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


NORM = "model.norm.weight"


def entry(**changes):
    """Change the entry of one tensor."""

    def change(file: bytes) -> bytes:
        header, data = parts_of(file)
        header[NORM] |= changes
        return safetensors_bytes(header, data)

    return change


def header(edit):
    """Change the header as a dict."""

    def change(file: bytes) -> bytes:
        header, data = parts_of(file)
        edit(header)
        return safetensors_bytes(header, data)

    return change


def raw(edit):
    """Change the header as bytes."""

    def change(file: bytes) -> bytes:
        end = 8 + int.from_bytes(file[:8], "little")
        return safetensors_bytes(edit(file[8:end]), file[end:])

    return change


SAFETENSORS = {
    "0 bytes": (lambda f: b"", "is cut off: it has 0 bytes, a header alone needs more"),
    "7 bytes": (lambda f: f[:7], "is cut off: it has 7 bytes"),
    "cut in the header": (lambda f: f[:50], "is cut off: the header announces [0-9,]+ bytes, the file has 50"),
    "cut in the data": (lambda f: f[:-1], "is cut off: the header announces"),
    "bytes at the end": (lambda f: f + b"123", "is damaged: 3 bytes follow the last tensor"),
    "a header of 2**63 bytes": (lambda f: (2**63).to_bytes(8, "little") + f[8:], "a header of 9,223,372,036,854,775,808"),
    "a header of 2**64-1 bytes": (lambda f: b"\xff" * 8 + f[8:], "at most 100,000,000 are allowed"),
    "a header of 99 MB, not there": (lambda f: (99_000_000).to_bytes(8, "little") + f[8:], "announces 99,000,008 bytes"),
    "a header of 0 bytes": (lambda f: bytes(8) + f[8:], "its header is not valid JSON"),
    "a length one too small": (
        lambda f: (int.from_bytes(f[:8], "little") - 8).to_bytes(8, "little") + f[8:],
        "its header is not valid JSON|bytes follow the last tensor",
    ),
    "a byte order mark": (raw(lambda h: b"\xef\xbb\xbf" + h), "its header is not valid JSON .*BOM"),
    "not UTF-8": (raw(lambda h: h.replace(b"norm", b"n\xffrm", 1)), "its header is not valid JSON .*0xff"),
    "UTF-16": (raw(lambda h: h.decode().encode("utf-16")), "its header is not valid JSON"),
    "nested 100,000 deep": (raw(lambda h: b'{"a":' * 100_000), "its header is not valid JSON"),
    "a list": (raw(lambda h: b"[" + h + b"]"), "its header is a JSON list, not an object"),
    "NaN for a size": (raw(lambda h: h.replace(b'"shape":[8]', b'"shape":[NaN]', 1)), "must be lists of whole numbers"),
    "Infinity for an offset": (entry(data_offsets=[0, math.inf]), "'model.norm.weight' must be lists of whole numbers"),
    "a number of 5,000 digits": (raw(lambda h: h.replace(b"[8]", b"[" + b"9" * 5_000 + b"]", 1)), "4300 digits"),
    "a name twice": (raw(lambda h: b'{"a":{},"a":{},' + h[1:]), "not valid JSON .a name occurs twice"),
    "an entry that is a number": (header(lambda h: h.update(x=3)), "the entry of 'x' must have dtype, shape and data_off"),
    "an entry without shape": (header(lambda h: h[NORM].pop("shape")), "the entry of 'model.norm.weight' must have dtype"),
    "an entry with more": (entry(strides=[1]), "the entry of 'model.norm.weight' must have dtype, shape and data_offsets"),
    "an unknown dtype": (entry(dtype="F4"), "'model.norm.weight' has the unknown dtype 'F4'; known: BOOL"),
    "a dtype that is a list": (entry(dtype=["F32"]), r"has the unknown dtype \['F32'\]"),
    "a dtype of 10,000 letters": (entry(dtype="F" * 10_000), "has the unknown dtype 'FFF"),
    "a negative size": (entry(shape=[-8]), "shape and data_offsets of 'model.norm.weight' must be lists of whole numbers"),
    "a size of 2**63": (entry(shape=[2**63]), "must be lists of whole numbers"),
    "a size that is true": (entry(shape=[True]), "must be lists of whole numbers"),
    "a size that is a float": (entry(shape=[8.0]), "must be lists of whole numbers"),
    "a shape that is text": (entry(shape="8"), "must be lists of whole numbers"),
    "a shape of 10,000 sizes": (entry(shape=[1] * 10_000), "must be lists of whole numbers"),
    "a product of 2**120": (entry(shape=[2**60, 2**60]), "'model.norm.weight' of shape .* cannot fill bytes"),
    "a product of 0 with sizes of 2**62": (
        header(lambda h: h.update(x={"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]})),
        "'x' of shape .4611686018427387904, 4611686018427387904, 0. is larger than any tensor can be",
    ),
    "another shape than bytes": (entry(shape=[9]), r"'model.norm.weight' of shape \(9,\) and F32 cannot fill bytes"),
    "offsets reversed": (entry(shape=[0], data_offsets=[8, 0]), "cannot fill bytes 8 to 0"),
    "one offset": (entry(data_offsets=[0]), "must be lists of whole numbers"),
    "a negative offset": (entry(data_offsets=[-32, 0]), "must be lists of whole numbers"),
    "an offset of 2**62": (
        header(lambda h: h.update(x={"dtype": "F32", "shape": [8], "data_offsets": [2**62, 2**62 + 32]})),
        "'x' starts at byte 4,611,686,018,427,387,904 of the data",
    ),
    "two tensors in one place": (
        header(lambda h: h.update(x={**h[NORM]})),
        "starts at byte [0-9,]+ of the data, the tensor before it ends at",
    ),
    "a hole": (header(lambda h: h.pop(NORM)), "starts at byte [0-9,]+ of the data, the tensor before it ends at|bytes follow"),
    "65,537 tensors": (
        header(lambda h: h.update((str(i), {}) for i in range(65_537))),
        "65,5[0-9]+ tensors, at most 65,536 are allowed",
    ),
    "not a model": (lambda f: safetensors_bytes({}), "has 0 tensors, too few for 2 layers"),
    "integers": (
        lambda f: f.replace(b'"F32","shape":[8]', b'"I32","shape":[8]', 1),
        "is torch.int32, not floats; quantized models cannot be read",
    ),
    "a matrix of three dimensions": (
        header(lambda h: h["model.layers.0.self_attn.o_proj.weight"].update(shape=[8, 4, 2])),
        r"of another shape: model.layers.0.self_attn.o_proj.weight is \(8, 4, 2\), must be \(8, 8\)",
    ),
    "a control character in a name": (
        raw(lambda h: h.replace(b'"model.norm', b'"\\u001b[2J\\nmodel.norm', 1)),
        "unexpected: .x1b.2J.nmodel.norm.weight",
    ),
    "Git LFS's pointer": (
        lambda f: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
        "model.safetensors is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
    ),
    "a web page": (lambda f: b"<!DOCTYPE html><html>Not found</html>", "a header of [0-9,]+ bytes, at most"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_malformed_safetensors_file_is_refused(toys, tmp_path, name):
    change, message = SAFETENSORS[name]
    files = toys["llama"] | {"model.safetensors": change(toys["llama"]["model.safetensors"])}
    assert files != toys["llama"]
    refused(CheckpointError, message, load, write(tmp_path / "model", files))


def test_a_conv1d_of_three_dimensions_is_refused(toys, tmp_path):
    """Its layout differs from ours, so that it is turned before its shape is compared."""
    name = "transformer.h.0.attn.c_attn.weight"
    weights = header(lambda h: h[name].update(shape=[8, 8, 3]))(toys["gpt2"]["model.safetensors"])
    path = write(tmp_path / "model", toys["gpt2"] | {"model.safetensors": weights})
    refused(CheckpointError, r"c_attn.weight is \(8, 8, 3\), must be \(24, 8\)", load, path)


# --- The index of shards

SHARD = "model-00002-of-00003.safetensors"


def mapped(**changes):
    """Change the weight_map of an index."""

    def change(index: dict[str, Any]) -> dict[str, Any]:
        return {**index, "weight_map": {**index["weight_map"], **changes}}

    return change


INDEX = {
    "not JSON": (lambda i: b"{", "index.json is not valid JSON"),
    "0 bytes": (lambda i: b"", "index.json is not valid JSON"),
    "not UTF-8": (lambda i: b'{"\xff": 1}', "index.json is not valid JSON: .*0xff"),
    "nested 100,000 deep": (lambda i: b"[" * 100_000, "index.json is not valid JSON"),
    "a list": (lambda i: [], "index.json must hold a JSON object, not list"),
    "no weight_map": (lambda i: {"metadata": {}}, "has no 'weight_map' from tensor names to file names"),
    "a weight_map that is a list": (lambda i: {"weight_map": []}, "has no 'weight_map' from tensor names"),
    "a weight_map that is empty": (lambda i: {"weight_map": {}}, "has 0 tensors, too few for 2 layers"),
    "a file that is a number": (mapped(x=3), "has no 'weight_map' from tensor names to file names"),
    "a file above": (mapped(x="../x.safetensors"), "names '../x.safetensors'; a shard must be a .safetensors file in the same"),
    "an absolute file": (mapped(x="/etc/passwd"), "names '/etc/passwd'; a shard must be"),
    "a file of Windows": (mapped(x="..\\x.safetensors"), r"names '\.\.\\\\x.safetensors'; a shard must be"),
    "a file in a folder": (mapped(x="a/x.safetensors"), "names 'a/x.safetensors'; a shard must be"),
    "a pickle": (mapped(x="pytorch_model.bin"), "names 'pytorch_model.bin'; a shard must be a .safetensors file"),
    "no file": (mapped(x=""), "names ''; a shard must be"),
    "a file that is not there": (mapped(x="y.safetensors"), "names y.safetensors, which is not there; download or copy"),
    "a file with a NUL": (mapped(x="y\0.safetensors"), r"names y\\x00.safetensors, which is not there"),
    "a file with half a surrogate": (mapped(x="\ud800.safetensors"), r"names \\ud800.safetensors, which is not there"),
    "a file with a name of 5,000 letters": (mapped(x="y" * 5_000 + ".safetensors"), "names yyyy.*, which is not there"),
    "10,000 files": (mapped(**{f"t{i}": f"{i:05}.safetensors" for i in range(10_000)}), "00000.safetensors, which is not"),
    "a tensor that the shard has not": (mapped(x=SHARD), f"'x' is not in {SHARD} as listed there"),
    "a tensor that is not listed": (
        lambda i: {"weight_map": {k: v for k, v in i["weight_map"].items() if k != NORM}},
        "does not fit its shards: 'model.norm.weight' is in .* but not listed there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX)
def test_a_malformed_index_is_refused(toys, tmp_path, name):
    change, message = INDEX[name]
    files = dict(toys["sharded"])
    assert SHARD in files
    index = change(json.loads(files["model.safetensors.index.json"]))
    files["model.safetensors.index.json"] = index if isinstance(index, bytes) else json.dumps(index).encode()
    refused(CheckpointError, message, load, write(tmp_path / "model", files))


def test_what_an_index_says_beside_its_map_is_not_believed(toys, tmp_path):
    files = dict(toys["sharded"])
    index = json.loads(files["model.safetensors.index.json"]) | {"metadata": {"total_size": 10**300}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert load(write(tmp_path / "model", files))[0].config.num_hidden_layers == 2


def test_a_damaged_shard_is_named(toys, tmp_path):
    files = toys["sharded"] | {SHARD: toys["sharded"][SHARD][:-1]}
    refused(CheckpointError, f"{SHARD} is cut off", load, write(tmp_path / "model", files))


def test_a_file_whose_content_is_elsewhere_is_read_and_one_without_end_is_not(toys, tmp_path):
    """The cache of huggingface_hub consists of links; a device or a pipe has no size and may never end."""
    path = write(tmp_path / "model", toys["llama"])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.move(path / name, tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
    assert load(path)[1] is not None
    for name, error in (
        ("tokenizer_config.json", None),
        ("tokenizer.json", DataError),
        ("config.json", CheckpointError),
    ):
        (path / name).unlink()
        (path / name).symlink_to("/dev/zero")
        if error is not None:
            refused(error, f"{name} is no ordinary file|holds no model", load, path)


# --- config.json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def config(**changes):
    return lambda values: {**values, **changes}


CONFIG = {
    "not JSON": ("llama", lambda v: b"{", CheckpointError, "config.json is not valid JSON"),
    "0 bytes": ("llama", lambda v: b"", CheckpointError, "config.json is not valid JSON"),
    "not UTF-8": ("llama", lambda v: b'{"\xff": 1}', CheckpointError, "config.json is not valid JSON: .*0xff"),
    "UTF-16": ("llama", lambda v: json.dumps(v).encode("utf-16"), CheckpointError, "config.json is not valid JSON"),
    "nested 100,000 deep": ("llama", lambda v: b'{"a":' * 100_000, CheckpointError, "config.json is not valid JSON"),
    "a list": ("llama", lambda v: [v], CheckpointError, "config.json must hold a JSON object, not list"),
    "null": ("llama", lambda v: None, CheckpointError, "config.json must hold a JSON object, not NoneType"),
    "a number of 5,000 digits": ("llama", lambda v: b'{"a": ' + b"1" * 5_000 + b"}", CheckpointError, "4300 digits"),
    "100 MB": ("llama", lambda v: b" " * 100_000_000, CheckpointError, "config.json has 100,000,000 bytes; at most"),
    "no model_type": ("llama", lambda v: {}, CheckpointError, "names neither 'llmforge_family' nor 'model_type'"),
    "a model_type that is a list": ("llama", config(model_type=["llama"]), ConvertError, r"type \['llama'\]; supported: gpt2"),
    "a model_type that is null": ("llama", config(model_type=None), ConvertError, "a model of type None; supported: gpt2, llama"),
    "a model_type of 10 MB": ("llama", config(model_type="x" * 10**7), ConvertError, "a model of type 'xxx.*; supported"),
    "both kinds of folder": ("llama", config(llmforge_family="gpt"), CheckpointError, "unknown GPTConfig field 'architectures'"),
    "a family that is a list": ("own", config(llmforge_family=["gpt"]), CheckpointError, r"of the family \['gpt'\]; this version"),
    "a field that does not exist": ("own", config(n_embed=8), CheckpointError, "unknown GPTConfig field 'n_embed'; did you mean"),
    "a field of 10 MB": ("own", config(**{"x" * 10**7: 8}), CheckpointError, "unknown GPTConfig field 'xxx"),
    "10**9 layers": ("llama", config(num_hidden_layers=10**9), CheckpointError, "has 21 tensors, too few for 1000000000 layers"),
    "10**30 layers": ("llama", config(num_hidden_layers=10**30), ConvertError, "num_hidden_layers must be a whole number below"),
    "3 layers of 2": ("llama", config(num_hidden_layers=3), CheckpointError, "missing: model.layers.2.input_layernorm.weight|"
                      "missing: model.layers.2.self_attn"),
    "1 layer of 2": ("llama", config(num_hidden_layers=1), CheckpointError, "unexpected: model.layers.1."),
    "0 layers": ("llama", config(num_hidden_layers=0), ConvertError, r"num_hidden_layers \(0\) must be at least 1"),
    "-1 layers": ("gpt2", config(n_layer=-1), ConvertError, r"n_layer \(-1\) must be at least 1"),
    "true layers": ("llama", config(num_hidden_layers=True), ConvertError, "num_hidden_layers must be a whole number, got True"),
    "2.5 layers": ("llama", config(num_hidden_layers=2.5), ConvertError, "num_hidden_layers must be a whole number, got 2.5"),
    "no layers": ("llama", config(num_hidden_layers=None), ConvertError, "num_hidden_layers must be a whole number, got None"),
    "a list of layers": ("llama", config(num_hidden_layers=[2]), ConvertError, r"must be a whole number, got \[2\]"),
    "layers in words": ("llama", config(num_hidden_layers="two"), ConvertError, "must be a whole number, got 'two'"),
    "NaN layers": ("llama", config(num_hidden_layers=math.nan), ConvertError, "must be a whole number, got nan"),
    "infinitely many layers": ("llama", config(num_hidden_layers=math.inf), ConvertError, "must be a whole number, got inf"),
    "a vocabulary of 10**12": ("llama", config(vocab_size=10**12), CheckpointError, r"must be \(1000000000000, 8\)"),
    "a vocabulary of 2**62": ("llama", config(vocab_size=2**62), CheckpointError, "sizes that no model can have"),
    "a width of 2**62": ("llama", config(hidden_size=2**62), CheckpointError, "sizes that no model can have"),
    "a vocabulary of 10**4299": ("llama", config(vocab_size=10**4299), ConvertError, "vocab_size must be a whole number below"),
    "a vocabulary of 0": ("gpt2", config(vocab_size=0), ConvertError, r"vocab_size \(0\) must be at least 1"),
    "heads that do not divide": ("gpt2", config(n_head=3), ConvertError, r"n_embd \(8\) must be divisible by n_head \(3\)"),
    "key heads that do not divide": (
        "qwen3", config(num_key_value_heads=3), ConvertError,
        r"num_attention_heads \(2\) must be a multiple of num_key_value_heads \(3\)"),
    "0 heads": ("mistral", config(num_attention_heads=0), ConvertError, r"num_attention_heads \(0\) must be at least 1"),
    "0 key heads": ("qwen2", config(num_key_value_heads=0), ConvertError, r"num_key_value_heads \(0\) must be at least 1"),
    "heads of odd width": ("llama", config(head_dim=3), ConvertError, r"head_dim \(3\) must be even"),
    "heads of width 2**40": ("llama", config(head_dim=2**40), CheckpointError, "head_dim .1099511627776. is more than its largest tensor has"),
    "10**9 heads": ("llama", config(num_attention_heads=10**9), CheckpointError, r"must be \(4000000000, 8\)"),
    "a width that is false": ("llama", config(hidden_size=False), ConvertError, "hidden_size must be a whole number, got False"),
    "an epsilon of 0": ("llama", config(rms_norm_eps=0), ConvertError, r"rms_norm_eps \(0.0\) must be above 0"),
    "an epsilon of NaN": ("qwen2", config(rms_norm_eps=math.nan), ConvertError, r"rms_norm_eps \(nan\) must be above 0"),
    "an epsilon of 10**400": ("llama", config(rms_norm_eps=10**400), ConvertError, "rms_norm_eps must be a number, got 1000"),
    "an epsilon in a list": ("qwen3", config(rms_norm_eps=[1e-6]), ConvertError, r"rms_norm_eps must be a number, got \[1e-06\]"),
    "another epsilon in GPT-2": ("gpt2", config(layer_norm_epsilon="0"), ConvertError, "sets layer_norm_epsilon to '0', which GPT"),
    "a negative theta": ("llama", config(rope_theta=-1.0), ConvertError, r"rope_theta \(-1.0\) must be above 0"),
    "an infinite theta": ("llama", config(rope_theta=math.inf), ConvertError, r"rope_theta \(inf\) must be above 0"),
    "a window of 0": ("mistral", config(sliding_window=0), ConvertError, r"sliding_window \(0\) must be at least 1"),
    "a window in words": ("mistral", config(sliding_window="all"), ConvertError, "sliding_window must be a whole number, got 'all'"),
    "tied in words": ("llama", config(tie_word_embeddings="yes"), ConvertError, "tie_word_embeddings must be true or false, got 'yes'"),
    "tied, but it is not": ("llama", config(tie_word_embeddings=True), CheckpointError, "lm_head.weight differs from"),
    "an activation of another kind": ("llama", config(hidden_act="gelu"), ConvertError, "sets hidden_act to 'gelu', .* must be 'silu'"),
    "an activation that is a dict": ("gpt2", config(activation_function={}), ConvertError, "activation_function must be .*, got {}"),
    "dropout of 1": ("gpt2", config(resid_pdrop=1.0), ConvertError, r"dropout \(1.0\) must be at least 0 and below 1"),
    "dropout of NaN": ("llama", config(attention_dropout=math.nan), ConvertError, r"attention_dropout \(nan\) must be"),
    "quantized": ("llama", config(quantization_config={"bits": 4}), ConvertError, r"sets quantization_config to {'bits': 4}"),
    "quantized, nested 500 deep": (
        "llama", config(quantization_config=json.loads('{"a":' * 500 + "1" + "}" * 500)), ConvertError, "sets quantization_config to"),
    "an inner width of its own": ("gpt2", config(n_inner=9), ConvertError, r"n_inner \(9\) must be 4 \* n_embd \(32\)"),
    "an inner width of 10**4299": ("gpt2", config(n_inner=1, n_embd=10**4299), ConvertError, r"n_inner \(1\) must be 4 \* n_embd"),
    "layer_types that are text": ("qwen2", config(layer_types="full_attention"), ConvertError, "layer_types must be .* 'full_attention'"),
    "layer_types that alternate": (
        "qwen3", config(layer_types=["full_attention", "sliding_attention"]), ConvertError, "layer_types must be full attention"),
    "10,000 layer_types": ("qwen3", config(layer_types=["x"] * 10_000), ConvertError, "layer_types must be full attention"),
    "a window in words for yes": ("qwen2", config(use_sliding_window="no"), ConvertError, "use_sliding_window .'no'. must be true or false"),
    "mrope": ("qwen2", config(use_mrope=True), ConvertError, r"use_mrope \(True\) must be False"),
    "half of the head turned": ("llama", config(partial_rotary_factor=0.5), ConvertError, r"partial_rotary_factor \(0.5\) must be 1.0"),
}  # fmt: skip

ROPE = {
    "a list": ([1], r"rope_scaling must be an object, got \[1\]"),
    "text": ("linear", "rope_scaling must be an object, got 'linear'"),
    "a number": (8, "rope_scaling must be an object, got 8"),
    "an unknown type": ({"rope_type": "dynamic", "factor": 2.0}, r"rope_type \('dynamic'\) must be one of default, linear"),
    "a type that is a list": ({"rope_type": ["yarn"], "factor": 2.0}, r"rope_type \(\['yarn'\]\) must be one of default, linear"),
    "no factor": ({"rope_type": "linear"}, "RopeScaling needs a value for 'factor'"),
    "a factor in words": ({"type": "linear", "factor": "two"}, "factor must be a number, got 'two'"),
    "a factor of NaN": ({"rope_type": "yarn", "factor": math.nan}, r"factor \(nan\) of rope_scaling must be at least 1"),
    "a factor below 1": ({"rope_type": "linear", "factor": 0.5}, r"factor \(0.5\) of rope_scaling must be at least 1"),
    "a factor of null": ({"rope_type": "linear", "factor": None}, "factor must be a number, got None"),
    "a factor of 10**400": ({"rope_type": "linear", "factor": 10**400}, "factor must be a number, got 1000"),
    "frequencies reversed": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        r"low_freq_factor \(4.0\) must be above 0 and below high_freq_factor \(1.0\)"),
    "an original context of 0": (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 0},
        r"original_max_position_embeddings \(0\) must be at least 1"),
    "an original context of 10**400": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 10**400},
        "original_max_position_embeddings must be a whole number below"),
    "betas reversed": (
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 1.0, "beta_slow": 32.0},
        r"beta_slow \(32.0\) must be above 0 and below beta_fast \(1.0\)"),
    "an attention factor of NaN": (
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": math.nan}, r"attention_factor \(nan\) .*must be above 0"),
    "an unknown field": ({"rope_type": "linear", "factor": 2.0, "factr": 1}, "unknown RopeScaling field 'factr'; did you mean 'factor'"),
    "an unknown field of 1 MB": ({"rope_type": "linear", "factor": 2.0, "x" * 10**6: 1}, "unknown RopeScaling field 'xxx"),
    "yarn cut another way": ({"rope_type": "yarn", "factor": 8.0, "truncate": False}, "truncate of yarn must be true"),
    "half of the head": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    "a theta in words": ({"rope_type": "default", "rope_theta": "x"}, "rope_theta must be a number, got 'x'"),
}  # fmt: skip


def with_config(files: Files, change) -> Files:
    values = change(json.loads(files["config.json"]))
    return files | {"config.json": values if isinstance(values, bytes) else json.dumps(values).encode()}


@pytest.mark.parametrize("name", CONFIG)
def test_a_malformed_config_is_refused(toys, tmp_path, name):
    family, change, error, message = CONFIG[name]
    refused(error, message, load, write(tmp_path / "model", with_config(toys[family], change)))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPE)
def test_a_malformed_rope_section_is_refused(toys, tmp_path, name, key):
    section, message = ROPE[name]
    files = with_config(toys["llama"], config(**{"rope_scaling": None, key: section}))
    refused(
        ConvertError,
        message.replace("rope_scaling must be an", f"{key} must be an"),
        load,
        write(tmp_path / "model", files),
    )


@pytest.mark.parametrize("changes", [dict(rope_theta=1.0), dict(beta_fast=1.7e308, beta_slow=1.6e308)])
def test_settings_that_yarn_cannot_compute_with_are_refused(toys, tmp_path, changes):
    """Its formula divides by the logarithm of one, and takes that of what the others leave."""
    section = {"rope_type": "yarn", "factor": 2.0, **changes}
    path = write(tmp_path / "model", with_config(toys["llama"], config(rope_scaling=section)))
    refused(
        CheckpointError, "it has sizes that no model can have .(float division by zero|math domain error)", load, path
    )


def test_the_last_of_two_equal_keys_counts_as_in_transformers(toys, tmp_path):
    twice = lambda v: b'{"num_hidden_layers": 9,' + json.dumps(v).encode()[1:]  # noqa: E731
    assert load(write(tmp_path / "model", with_config(toys["llama"], twice)))[0].config.num_hidden_layers == 2


def test_unknown_settings_are_named_in_one_short_warning(toys, tmp_path):
    unknown = {"\x1b[2J\n" + "x" * 1000: 1} | {f"setting_{i}": i for i in range(5_000)}
    path = write(tmp_path / "model", with_config(toys["llama"], config(**unknown)))
    with pytest.warns(UserWarning, match="settings that are not known here and have no effect") as found:
        load(path)
    assert [str(w.message).isprintable() and len(str(w.message)) <= MAX_MESSAGE for w in found] == [True]


# --- GGUF


class Typed(NamedTuple):
    """A metadata value with its type's number; bytes are written as they are."""

    type: int
    value: Any


@dataclass
class GGUFTensor:
    dims: list[int]  # as in the file: fastest first
    data: bytes
    type: int = 0  # F32
    offset: int | None = None  # None = after the one before


@dataclass
class GGUFFile:
    """What a GGUF file says, to be changed at will."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    alignment: int = 32
    more_metadata: list[tuple[str, Any]] = field(default_factory=list)
    more_tensors: list[tuple[str, GGUFTensor]] = field(default_factory=list)
    head: bytes | None = None  # magic, version, counts

    def __bytes__(self) -> bytes:
        metadata = [*self.metadata.items(), *self.more_metadata]
        tensors = [*self.tensors.items(), *self.more_tensors]
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) if self.head is None else self.head
        out = bytearray(head)
        for key, value in metadata:
            out += gguf_text(key) + gguf_value(value)
        data = bytearray()
        for name, tensor in tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            out += gguf_text(name) + struct.pack("<I", len(tensor.dims))
            out += b"".join(struct.pack("<Q", n) for n in tensor.dims) + struct.pack("<IQ", tensor.type, offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return bytes(out) + bytes(-len(out) % self.alignment) + bytes(data)


def gguf_text(text: str | bytes) -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def type_of(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return 4 if 0 <= value < 2**32 else 11 if -(2**63) <= value < 2**63 else 10
    return {bool: 7, float: 12 if isinstance(value, float) and abs(value) > 3e38 else 6, str: 8, list: 9}[type(value)]


def gguf_value(value: Any) -> bytes:
    kind, value = value if isinstance(value, Typed) else (type_of(value), value)
    return struct.pack("<I", kind) + gguf_content(kind, value)


def gguf_content(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if kind == 8:
        return gguf_text(value)
    if kind == 9:
        item = max((type_of(v) for v in value), default=4)
        item = 5 if item == 4 else item  # token types are i32
        return struct.pack("<IQ", item, len(value)) + b"".join(gguf_content(item, v) for v in value)
    return struct.pack(f"<{NUMBERS[kind]}", value)


def gguf_of(file: bytes, folder: Path) -> GGUFFile:
    (folder / "whole.gguf").write_bytes(file)
    header = read_gguf_header(folder / "whole.gguf")
    tensors = {t.name: GGUFTensor(list(t.shape[::-1]), file[t.offset : t.offset + t.nbytes]) for t in header.tensors}
    return GGUFFile(dict(header.metadata), tensors)


def meta(**changes):
    """Set keys of the metadata, with __ for a dot; None removes one."""

    def change(g: GGUFFile) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            g.metadata.pop(key, None)
            if value is not None:
                g.metadata[key] = value

    return change


def tensor(name: str = "output_norm.weight", **changes):
    def change(g: GGUFFile) -> None:
        for key, value in changes.items():
            setattr(g.tensors[name], key, value)

    return change


def head(data: bytes):
    return lambda g: setattr(g, "head", data)


def counts(n_tensors: int, n_keys: int, *, version: int = 3):
    return head(b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys))


def array(item: int, count: int, content: bytes = b"") -> Typed:
    return Typed(9, struct.pack("<IQ", item, count) + content)


def tokens(edit):
    return lambda g: g.metadata.update({"tokenizer.ggml.tokens": edit(g.metadata["tokenizer.ggml.tokens"])})


def types(edit):
    return lambda g: g.metadata.update({"tokenizer.ggml.token_type": edit(g.metadata["tokenizer.ggml.token_type"])})


def with_tensor(name: str, *dims: int, kind: int = 0, data: bytes | None = None, offset: int | None = None):
    content = bytes(4 * math.prod(dims)) if data is None else data
    return lambda g: g.more_tensors.append((name, GGUFTensor(list(dims), content, kind, offset)))


TOKENIZER = ConvertError
# Kind of file, change, error, message.
GGUF = {
    # The container
    "another magic": ("llama", head(b"GGML" + bytes(20)), CheckpointError, "is not a GGUF file: it does not begin with the letters"),
    "version 0": ("llama", counts(1, 1, version=0), CheckpointError, "version 0; 2 and 3 .little-endian. are supported"),
    "version 1": ("llama", counts(1, 1, version=1), CheckpointError, "version 1; 2 and 3"),
    "version 4": ("llama", counts(1, 1, version=4), CheckpointError, "version 4; 2 and 3"),
    "big-endian": ("llama", head(b"GGUF" + struct.pack(">IQQ", 3, 1, 1)), CheckpointError, "version 50331648; 2 and 3 .little-end"),
    "2**63 tensors": ("llama", counts(2**63, 1), CheckpointError, "9,223,372,036,854,775,808 tensors and 1 keys; at most 65,536"),
    "2**63 keys": ("llama", counts(1, 2**63), CheckpointError, "9,223,372,036,854,775,808 keys; at most 65,536 are allowed"),
    "65,536 keys, not there": ("llama", counts(1, 65_536), CheckpointError, "is cut off or damaged|unknown value type"),
    "0 tensors": ("llama", lambda g: g.tensors.clear(), CheckpointError, "has no token_embd.weight, so it holds no model"),
    "a key of 2**62 bytes": (
        "llama", lambda g: setattr(g, "head", b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62)), CheckpointError,
        "a text of 4,611,686,018,427,387,904 bytes at byte 32, the file has"),
    "a key twice": (
        "llama", lambda g: g.more_metadata.append(("llama.block_count", 3)), CheckpointError, "the key 'llama.block_count' occurs twice"),
    "an unknown value type": ("llama", meta(x=Typed(13, b"")), CheckpointError, "unknown value type 13"),
    "an array of arrays": ("llama", meta(x=array(9, 1, struct.pack("<IQ", 4, 0))), CheckpointError, "unknown type 9 of an array's items"),
    "an array of unknown things": ("llama", meta(x=array(99, 1)), CheckpointError, "unknown type 99 of an array's items"),
    "an array of 2**40 texts": ("llama", meta(x=array(8, 2**40)), CheckpointError, "an array of 1,099,511,627,776 items; at most"),
    "an array of 2**24 texts, not there": ("llama", meta(x=array(8, 2**24)), CheckpointError, "an array of 134,217,728 bytes at byte"),
    "an array of 2**24 numbers, not there": ("llama", meta(x=array(12, 2**24)), CheckpointError, "an array of 134,217,728 bytes"),
    "a text of 2**63 bytes": ("llama", meta(x=Typed(8, struct.pack("<Q", 2**63))), CheckpointError, "a text of 9,223,372,036,854,775,808"),
    "an alignment of 0": ("llama", meta(general__alignment=0), CheckpointError, "general.alignment is 0, not a power of two"),
    "an alignment of 3": ("llama", meta(general__alignment=3), CheckpointError, "general.alignment is 3, not a power of two"),
    "an alignment of 2**31": ("llama", meta(general__alignment=2**31), CheckpointError, "is cut off: the tensor|not a multiple of"),
    "an alignment in words": ("llama", meta(general__alignment="32"), CheckpointError, "general.alignment is '32', not a power of two"),
    "an alignment of 10,000 letters": ("llama", meta(general__alignment="3" * 10_000), CheckpointError, "general.alignment is '333"),
    "a tensor twice": (
        "llama", lambda g: g.more_tensors.append(("output_norm.weight", g.tensors["output_norm.weight"])), CheckpointError,
        "two tensors have the same name"),
    "no dimension": ("llama", tensor(dims=[]), CheckpointError, "'output_norm.weight' has 0 dimensions; 1 to 4 are possible"),
    "5 dimensions": ("llama", tensor(dims=[8, 1, 1, 1, 1]), CheckpointError, "'output_norm.weight' has 5 dimensions; 1 to 4"),
    "2**32-1 dimensions": (
        "llama", lambda g: g.more_tensors.append((b"x", GGUFTensor([1] * 9, b""))), CheckpointError, "'x' has 9 dimensions; 1 to 4"),
    "a size of 0": ("llama", tensor(dims=[0]), CheckpointError, r"model.norm.weight is \(0,\), must be \(8,\)"),
    "a size of 2**63": ("llama", tensor(dims=[2**63]), CheckpointError, "tensor 'output_norm.weight' ends at byte"),
    "a product of 2**128": ("llama", tensor(dims=[2**62, 2**62, 16]), CheckpointError, "tensor 'output_norm.weight' ends at byte"),
    "a product of 0 with sizes of 2**62": ("llama", tensor(dims=[2**62, 2**62, 0]), CheckpointError, "larger than any tensor can be"),
    "an offset behind the end": ("llama", tensor(offset=2**40), CheckpointError, "is cut off: the tensor 'output_norm.weight' ends at"),
    "an offset of 2**64-32": ("llama", tensor(offset=2**64 - 32), CheckpointError, "is cut off: the tensor 'output_norm.weight' ends"),
    "an offset between": ("llama", tensor(offset=33), CheckpointError, "'output_norm.weight' begins at 33, not a multiple of 32"),
    "two tensors in one place": ("llama", tensor(offset=0), CheckpointError, "overlap"),
    "an unknown tensor type": ("llama", tensor(type=99), CheckpointError, "'output_norm.weight' has the unknown type 99"),
    "a type of the past": ("llama", tensor(type=4), CheckpointError, "'output_norm.weight' has the unknown type 4"),
    "rows that do not fit blocks": ("llama", tensor(type=8), CheckpointError, "rows of 8 do not fit Q8_0 blocks in the tensor"),
    "integers": ("llama", tensor(type=26), CheckpointError, "'output_norm.weight' in I32, which cannot be decoded; take a file of"),
    "an intermediate type": (
        "llama", with_tensor("x", 256, kind=15, data=bytes(292)), CheckpointError, "'x' in Q8_K, which cannot be decoded; take a file"),
    # What describes the model
    "no architecture": ("llama", meta(general__architecture=None), ConvertError, "of the architecture None; supported: gpt2, llama"),
    "an unknown architecture": ("llama", meta(general__architecture="mamba"), ConvertError, "of the architecture 'mamba'; supported: gpt2"),
    "a list of architectures": ("llama", meta(general__architecture=["llama"]), ConvertError, r"of the architecture \['llama'\]; supported"),
    "another architecture": ("llama", meta(general__architecture="gpt2"), CheckpointError | ConvertError, "must be 4|does not fit"),
    "no block_count": ("llama", meta(llama__block_count=None), ConvertError, "num_hidden_layers must be a whole number, got None"),
    "no embedding_length": ("llama", meta(llama__embedding_length=None), ConvertError, "hidden_size must be a whole number, got None"),
    "no context_length": ("llama", meta(llama__context_length=None), ConvertError, "max_position_embeddings must be a whole number"),
    "no feed_forward_length": ("llama", meta(llama__feed_forward_length=None), ConvertError, "intermediate_size must be a whole number"),
    "no head_count": ("llama", meta(llama__attention__head_count=None), ConvertError, "num_attention_heads must be a whole number, got No"),
    "no epsilon": ("llama", meta(llama__attention__layer_norm_rms_epsilon=None), ConvertError, "rms_norm_eps must be a number, got None"),
    "block_count in words": ("llama", meta(llama__block_count="two"), ConvertError, "num_hidden_layers must be a whole number, got 'two'"),
    "block_count of 2.5": ("llama", meta(llama__block_count=2.5), ConvertError, "num_hidden_layers must be a whole number, got 2.5"),
    "block_count of -1": ("llama", meta(llama__block_count=Typed(5, -1)), ConvertError, r"num_hidden_layers \(-1\) must be at least 1"),
    "block_count of 10**9": ("llama", meta(llama__block_count=10**9), CheckpointError, "too few for 1000000000 layers"),
    "block_count of 2**64-1": ("llama", meta(llama__block_count=2**64 - 1), CheckpointError, "too few for 18446744073709551615 layers|below"),
    "block_count of true": ("llama", meta(llama__block_count=True), ConvertError, "num_hidden_layers must be a whole number, got True"),
    "a head_count of 0": ("llama", meta(llama__attention__head_count=0), ConvertError, r"num_attention_heads \(0\) must be at least 1"),
    "a head_count per layer": ("llama", meta(llama__attention__head_count=[2, 2]), ConvertError, "layers of different shape .attention.head_count"),
    "a head_count of 2**32-1": ("llama", meta(llama__attention__head_count=2**32 - 1), ConvertError | CheckpointError, "multiple of|must be"),
    "a head_count_kv that does not divide": (
        "llama", meta(llama__attention__head_count_kv=3), ConvertError, r"must be a multiple of num_key_value_heads \(3\)"),
    "a freq_base of NaN": ("llama", meta(llama__rope__freq_base=math.nan), ConvertError, r"rope_theta \(nan\) must be above 0"),
    "a freq_base of 0": ("llama", meta(llama__rope__freq_base=0.0), ConvertError, r"rope_theta \(0.0\) must be above 0"),
    "a freq_base of 1e300": ("llama", meta(llama__rope__freq_base=1e300), ConvertError, r"rope_theta \(inf\) must be above 0"),
    "a key_length of its own": ("llama", meta(llama__attention__key_length=6), ConvertError, r"keys \(6\), values \(4\) and what turns"),
    "a key_length that is a list": ("llama", meta(llama__attention__key_length=[4]), ConvertError, "layers of different shape .attention.key_length"),
    "a key_length in words": (
        "llama", meta(llama__attention__key_length="x", llama__attention__value_length=None, llama__rope__dimension_count=None),
        ConvertError, "head_dim must be a whole number, got 'x'"),
    "heads 2**31 wide": (
        "llama", meta(llama__attention__key_length=2**31, llama__attention__value_length=2**31, llama__rope__dimension_count=2**31),
        CheckpointError, "head_dim .2147483648. is more than its largest tensor has"),
    "a rope factor of NaN": ("llama", meta(llama__rope__scaling__factor=math.nan), ConvertError, r"factor \(nan\) of rope_scaling must"),
    "a rope factor in words": ("llama", meta(llama__rope__scaling__factor="two"), ConvertError, "factor must be a number, got 'two'"),
    "an unknown rope type": (
        "llama", meta(llama__rope__scaling__type="longrope", llama__rope__scaling__factor=2.0), ConvertError,
        r"rope.scaling.type \('longrope'\) must be none, linear or yarn"),
    "an original context of -1": (
        "llama", meta(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=2.0,
                      llama__rope__scaling__original_context_length=-1),
        ConvertError, r"original_max_position_embeddings \(-1\) must be at least 1"),
    "experts": ("llama", meta(llama__expert_count=8), ConvertError, "this is a mixture of experts, which Llama is not"),
    "rope_freqs of no model": ("llama", with_tensor("rope_freqs.weight", 2), ConvertError, "rope_freqs.weight is not the stretch of Llama"),
    "rope_freqs of another size": (
        "llama", with_tensor("rope_freqs.weight", 4096), ConvertError, "rope_freqs.weight is not the stretch of Llama"),
    "GPT-2 of another width": ("gpt2", meta(gpt2__feed_forward_length=33), ConvertError, r"feed_forward_length \(33\) must be 4 \*"),
    "GPT-2 with an epsilon of NaN": (
        "gpt2", meta(gpt2__attention__layer_norm_epsilon=math.nan), ConvertError, r"layer_norm_epsilon \(nan\) must be 1e-5"),
    "GPT-2 without an epsilon": (
        "gpt2", meta(gpt2__attention__layer_norm_epsilon=None), ConvertError, r"layer_norm_epsilon \(None\) must be 1e-5"),
    "GPT-2 with a width in words": ("gpt2", meta(gpt2__embedding_length="8"), ConvertError, "must be 4 .* embedding_length|whole number"),
    "a tensor that is missing": (
        "llama", lambda g: g.tensors.pop("blk.1.attn_q.weight"), CheckpointError, "missing: model.layers.1.self_attn.q_proj.weight"),
    "no embedding": ("llama", lambda g: g.tensors.pop("token_embd.weight"), CheckpointError, "has no token_embd.weight, so it holds no"),
    "a tensor too many": ("llama", with_tensor("blk.0.ffn_gate_inp.weight", 8), CheckpointError, "unexpected: blk.0.ffn_gate_inp.weight"),
    "a layer too many": ("llama", with_tensor("blk.2.attn_norm.weight", 8), CheckpointError, "unexpected: model.layers.2.input_layernorm"),
    "a layer without a number": ("llama", with_tensor("blk.", 8), CheckpointError, "unexpected: blk."),
    "one tensor under two names": (
        "llama", with_tensor("model.norm.weight", 8), CheckpointError, "two tensors for model.norm.weight"),
    "a tensor of another shape": (
        "llama", tensor("blk.0.attn_q.weight", dims=[16, 4]), CheckpointError, r"q_proj.weight is \(4, 16\), must be \(8, 8\)"),
    "a matrix with one dimension": (
        "llama", tensor("blk.0.attn_q.weight", dims=[64]), CheckpointError, r"q_proj.weight is \(64,\), must be \(8, 8\)"),
    "an embedding with one dimension": ("llama", tensor("token_embd.weight", dims=[64]), CheckpointError, r"is \(64,\), must be \(270, 8\)"),
    # The tokenizer
    "an unknown tokenizer": ("llama", meta(tokenizer__ggml__model="bert"), TOKENIZER, "tokenizer.ggml.model is 'bert'; 'gpt2' .* and 'llama'"),
    "no tokenizer": ("llama", meta(tokenizer__ggml__model=None), TOKENIZER, "tokenizer.ggml.model is 'None'|tokenizer.ggml.model is None"),
    "an unknown pre-tokenizer": ("llama", meta(tokenizer__ggml__pre="falcon"), TOKENIZER, "tokenizer.ggml.pre is 'falcon'; supported are"),
    "a pre-tokenizer that is a list": ("llama", meta(tokenizer__ggml__pre=["qwen2"]), TOKENIZER, "tokenizer.ggml.pre is .*; supported are"),
    "no tokens": ("llama", meta(tokenizer__ggml__tokens=None), TOKENIZER, "tokenizer.ggml.tokens is missing"),
    "tokens that are numbers": ("llama", meta(tokenizer__ggml__tokens=[1, 2]), TOKENIZER, "tokenizer.ggml.tokens has '1' at 0; it must have str"),
    "tokens that are text": ("llama", meta(tokenizer__ggml__tokens="abc"), TOKENIZER, "tokenizer.ggml.tokens is of the type str"),
    "0 tokens": ("llama", meta(tokenizer__ggml__tokens=[]), TOKENIZER, "there are 0 tokens; 1 to"),
    "a token twice": ("llama", tokens(lambda t: [*t[:-2], t[0], t[-1]]), TOKENIZER, r"the tokens 0 and 26\d are both"),
    "a type of tokens missing": ("llama", types(lambda t: t[:-1]), TOKENIZER, r"token_type has 26\d values for 2\d\d tokens"),
    "an unknown type of tokens": ("llama", types(lambda t: [7, *t[1:]]), TOKENIZER, "the token 0 .* has the unknown type 7; 1 to 6"),
    "types that are text": ("llama", types(lambda t: ["1"] * len(t)), TOKENIZER, "token_type has '1' at 0; it must have int values"),
    "no merges": ("llama", meta(tokenizer__ggml__merges=None), TOKENIZER, "tokenizer.ggml.merges is missing"),
    "a merge that is no pair": ("llama", meta(tokenizer__ggml__merges=["ab"]), TOKENIZER, r"the merge 0 \('ab'\) has the part"),
    "a merge of no tokens": ("llama", meta(tokenizer__ggml__merges=["€ €"]), TOKENIZER, "has the part '€', which is no token"),
    "merges that are numbers": ("llama", meta(tokenizer__ggml__merges=[1]), TOKENIZER, "tokenizer.ggml.merges has '1' at 0"),
    "an end out of range": ("llama", meta(tokenizer__ggml__eos_token_id=9_999), TOKENIZER, "eos_token_id is '9999'; it must be the id of one"),
    "a negative end": ("llama", meta(tokenizer__ggml__eos_token_id=-1), TOKENIZER, "eos_token_id is '-1'; it must be the id of one"),
    "an end in words": ("llama", meta(tokenizer__ggml__eos_token_id="2"), TOKENIZER, "eos_token_id is '2'; it must be the id of one"),
    "a beginning of true": ("llama", meta(tokenizer__ggml__bos_token_id=True), TOKENIZER, "bos_token_id is 'True'; it must be the id"),
    "a flag that is a number": ("llama", meta(tokenizer__ggml__add_bos_token=1), TOKENIZER, "add_bos_token is '1'; it must be true or false"),
    "a chat template that is a list": ("llama", meta(tokenizer__chat_template=["x"]), TOKENIZER, "tokenizer.chat_template is of the type list"),
    "no scores": ("spm", meta(tokenizer__ggml__scores=None), TOKENIZER, "tokenizer.ggml.scores is missing"),
    "0 scores": ("spm", meta(tokenizer__ggml__scores=[]), TOKENIZER, "scores has 0 values for 265 tokens"),
    "a score missing": ("spm", lambda g: g.metadata["tokenizer.ggml.scores"].pop(), TOKENIZER, "scores has 264 values for 265 tokens"),
    "a score of NaN": (
        "spm", lambda g: g.metadata["tokenizer.ggml.scores"].__setitem__(260, math.nan), TOKENIZER, "the token 260 .* has the score nan"),
    "no bytes": ("spm", tokens(lambda t: [f"x{token}" for token in t]), TOKENIZER, "there is no token <0x00>"),
    "more tokens than rows": (
        "llama", lambda g: (tokens(lambda t: [*t, "zzz"])(g), types(lambda t: [*t, 1])(g)), ConvertError, "the model has 270 tokens and the tokenizer 271"),
    "fewer tokens than rows": (
        "gpt2", lambda g: (meta(gpt2__vocab_size=None)(g), g.tensors["token_embd.weight"].__init__([8, 2_000], bytes(64_000))), ConvertError,
        "the model has 2,000 tokens and the tokenizer"),
}  # fmt: skip


def exported(path: Path) -> None:
    """Load, and export, which compares vocabulary and model."""
    load(path)
    export_gguf(path, None, path.with_name("out.gguf"))


@pytest.mark.parametrize("name", GGUF)
def test_a_malformed_gguf_is_refused(toys, tmp_path, name):
    toy, change, error, message = GGUF[name]
    file = gguf_of(toys[f"{toy}.gguf"]["x.gguf"], tmp_path)
    change(file)
    (tmp_path / "x.gguf").write_bytes(bytes(file))
    errors = getattr(error, "__args__", (error,))
    with pytest.raises(errors, match=message) as info:
        exported(tmp_path / "x.gguf")
    assert_clear(info.value)
    assert "x.gguf" in str(info.value) or "the model has" in str(info.value)
    assert not (tmp_path / "out.gguf").exists()


def test_an_unchanged_gguf_survives_the_rewriting(toys, tmp_path):
    """Control of the cases above: the writer of this file is right."""
    for name in ("llama.gguf", "gpt2.gguf", "spm.gguf"):
        whole = gguf_of(toys[name]["x.gguf"], tmp_path)
        (tmp_path / "x.gguf").write_bytes(bytes(whole))
        exported(tmp_path / "x.gguf")


@pytest.mark.parametrize("alignment", [1, 2, 8, 64])
def test_tensors_of_any_alignment_are_read(toys, tmp_path, alignment):
    file = gguf_of(toys["llama.gguf"]["x.gguf"], tmp_path)
    file.alignment = file.metadata["general.alignment"] = alignment
    for shift in range(4):
        file.metadata["general.name"] = "x" * shift
        (tmp_path / "x.gguf").write_bytes(bytes(file))
        model, whole = load(tmp_path / "x.gguf")[0], load(tmp_path / "whole.gguf")[0]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


# --- Tokenizers


def tokenizer_json(edit):
    """Change a tokenizer.json as a dict."""

    def change(files: Files) -> Files:
        content = json.loads(files["tokenizer.json"])
        edited = edit(content)
        content = content if edited is None or not isinstance(edited, (dict, bytes)) else edited
        return files | {"tokenizer.json": content if isinstance(content, bytes) else json.dumps(content).encode()}

    return change


def vocab(**changes):
    def edit(content):
        content["model"]["vocab"] |= changes

    return tokenizer_json(edit)


def component(name: str, value: object):
    return tokenizer_json(lambda c: c.update({name: value}))


def settings_of(**values):
    """Another tokenizer_config.json."""
    return lambda files: files | {"tokenizer_config.json": json.dumps(values).encode()}


def beside(name: str, content: bytes):
    return lambda files: files | {name: content}


ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
UNIGRAM = {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}, "added_tokens": []}
EMPTY = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
UNREADABLE = "is not a tokenizer.json that can be read"
# Toy, change, message.
TOKENIZERS = {
    "0 bytes": ("llama", beside("tokenizer.json", b""), "tokenizer.json is not valid JSON"),
    "cut off": ("llama", tokenizer_json(lambda c: json.dumps(c).encode()[:-100]), "tokenizer.json is not valid JSON"),
    "not UTF-8": ("llama", beside("tokenizer.json", b'{"\xff": 1}'), "tokenizer.json is not valid JSON: .*0xff"),
    "nested 100,000 deep": ("llama", beside("tokenizer.json", b'{"a":' * 100_000), "tokenizer.json is not valid JSON"),
    "a list": ("llama", beside("tokenizer.json", b"[]"), "tokenizer.json must hold a JSON object, not list"),
    "an empty object": ("llama", beside("tokenizer.json", b"{}"), UNREADABLE),
    "no model": ("llama", tokenizer_json(lambda c: {k: v for k, v in c.items() if k != "model"}), UNREADABLE),
    "a model that is null": ("llama", component("model", None), UNREADABLE),
    "an unknown model": ("llama", tokenizer_json(lambda c: c["model"].update(type="Magic")), UNREADABLE),
    "a Unigram model": (
        "llama", tokenizer_json(lambda c: {**c, **UNIGRAM}), "a Unigram tokenizer is not supported; take"),
    "an empty vocabulary": ("llama", tokenizer_json(lambda c: {**c, **EMPTY}), "there is no token for byte 0x00"),
    "no vocabulary": ("llama", tokenizer_json(lambda c: {**c, "model": {"type": "BPE", "merges": []}}), UNREADABLE),
    "a vocabulary that is a list": ("llama", tokenizer_json(lambda c: c["model"].update(vocab=["a"])), UNREADABLE),
    "a negative id": ("llama", vocab(zz=-1), UNREADABLE),
    "an id of 1.5": ("llama", vocab(zz=1.5), UNREADABLE),
    "an id in words": ("llama", vocab(zz="1"), UNREADABLE),
    "an id of 2**32": ("llama", vocab(zz=2**32), UNREADABLE),
    "an id of 2**32-1": ("llama", vocab(zz=2**32 - 1), "ids reach 4294967295 with only 271 tokens: the file is damaged"),
    "an id twice": ("llama", vocab(zz=5), "the tokens .* and .* have the same id: the file is damaged"),
    "merges of unknown tokens": ("llama", tokenizer_json(lambda c: c["model"]["merges"].append(["€", "€"])), "`€` out of vocabulary"),
    "a merge of three": ("llama", tokenizer_json(lambda c: c["model"]["merges"].append(["a", "b", "c"])), UNREADABLE),
    "a merge that is a number": ("llama", tokenizer_json(lambda c: c["model"]["merges"].append(3)), UNREADABLE),
    "merges that are null": ("llama", tokenizer_json(lambda c: c["model"].update(merges=None)), UNREADABLE),
    "an unknown normalizer": ("llama", component("normalizer", {"type": "Magic"}), UNREADABLE),
    "an unknown pre-tokenizer": ("llama", component("pre_tokenizer", {"type": "Magic"}), UNREADABLE),
    "an unknown decoder": ("llama", component("decoder", {"type": "Magic"}), UNREADABLE),
    "an unknown post-processor": ("llama", component("post_processor", {"type": "Magic"}), UNREADABLE),
    "a pattern that is no regular expression": (
        "llama", component("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}), UNREADABLE),
    "a post-processor with an unknown token": (
        "llama", component("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                                              "pair": [], "special_tokens": {}}), "the post-processor puts 'x' first, for which it has no id"),
    "a post-processor with an id beyond": (
        "llama", component("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
                                              "special_tokens": {"x": {"id": "x", "ids": [9_999], "tokens": ["x"]}}}),
        "the post-processor puts the id 9999 first, of 270 tokens"),
    "an added token with an id beyond": (
        "llama", component("added_tokens", [{"id": 10**6, "content": "<x>", **ADDED}]), "gives '<x>' the id 1000000, but it would get 270: the file is damaged"),
    "an added token with a negative id": ("llama", component("added_tokens", [{"id": -1, "content": "<x>", **ADDED}]), UNREADABLE),
    "an added token without content": ("llama", component("added_tokens", [{"id": 270, **ADDED}]), UNREADABLE),
    "added tokens that are a number": ("llama", component("added_tokens", 3), UNREADABLE),
    "characters out of order": ("gpt2", vocab(**{"E": 99}), "the characters of this vocabulary are not numbered by code point"),
    "characters that are words": ("gpt2", vocab(word=25), "'word' is not a single character"),
    "settings that are no JSON": ("llama", beside("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
    "settings that are a list": ("llama", beside("tokenizer_config.json", b"[]"), "tokenizer_config.json must hold a JSON object, not list"),
    "added_tokens_decoder that is a list": (
        "llama", settings_of(added_tokens_decoder=[1]), r"added_tokens_decoder of tokenizer_config.json has '\[1\]': None; it must give"),
    "added_tokens_decoder with a name": (
        "llama", settings_of(added_tokens_decoder={"x": {"content": "<x>"}}), "added_tokens_decoder of tokenizer_config.json has 'x'"),
    "added_tokens_decoder with an id of 5,000 digits": (
        "llama", settings_of(added_tokens_decoder={"9" * 5_000: {"content": "<x>"}}), "added_tokens_decoder .* has '9999"),
    "added_tokens_decoder with a hole": (
        "llama", settings_of(added_tokens_decoder={"900": {"content": "<x>"}}), "gives '<x>' the id 900, but it would get 270; take the tokeni"),
    "added_tokens_decoder without content": (
        "llama", settings_of(added_tokens_decoder={"270": {}}), "has '270': {}; it must give an id an object"),
    "a special_tokens_map that is no JSON": ("llama", beside("special_tokens_map.json", b"\0"), "special_tokens_map.json is not valid JSON"),
    "a template that is not UTF-8": ("llama", beside("chat_template.jinja", b"\xff"), "cannot read .*chat_template.jinja"),
    "a template of 2 MB": ("llama", beside("chat_template.jinja", b" " * 2**21), "chat_template.jinja has 2,097,152 bytes; a template of mor"),
    "merges.txt alone": (
        "spm", lambda f: {"merges.txt": b"a b\n"}, "has a merges.txt but no tokenizer.json, and merges.txt is not supported yet; transformers"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_malformed_tokenizer_is_refused(toys, tmp_path, name, capfd):
    toy, change, message = TOKENIZERS[name]
    files = change(toys[toy])
    assert files != toys[toy]
    folder = write(tmp_path / "model", files)
    refused(DataError, message, load_tokenizer, folder)
    if "config.json" in files:
        refused(DataError, message, load, folder)  # no model without its tokenizer


@pytest.mark.parametrize(
    "settings", [dict(chat_template=3), dict(chat_template=[{}, 3]), dict(eos_token=3), dict(eos_token={"content": []})]
)
def test_settings_of_another_type_are_no_settings(toys, tmp_path, settings):
    """As in transformers, where they belong to some other program."""
    tokenizer = load_tokenizer(write(tmp_path / "model", settings_of(**settings)(toys["llama"])))
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token_id is None


def changed_piece(index: int, *values):
    pieces = [piece(*p) for p in sentencepiece_pieces()]
    pieces[index] = piece(*values)
    return tokenizer_model(pieces)


SENTENCEPIECE = {
    "0 bytes": (b"", "is not a SentencePiece model: it begins with b''"),
    "JSON": (b'{"a": 1}', "is not a SentencePiece model: it begins with"),
    "cut off": (tokenizer_model()[:-3], "is no SentencePiece model, or damaged: a number that does not end"),
    "a length of 2**62": (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\x3f\n", "is not a SentencePiece model|bytes, [0-9]+ are left"),
    "a number that does not end": (tokenizer_model() + b"\xff" * 20, "damaged: a number that does not end"),
    "an unknown wire type": (tokenizer_model() + b"\x7f", "damaged: a field of the unknown wire type 7"),
    "a group": (tokenizer_model() + b"\x7b", "damaged: a field of the unknown wire type 3"),
    "a piece that is not UTF-8": (changed_piece(260, b"\xff", 0.0, 1), r"damaged: b'\\xff' is not UTF-8"),
    "a piece of nothing": (changed_piece(260, "", 0.0, 1), "damaged: a piece of 0 bytes; 1 to 512 are possible"),
    "a piece of 10,000 letters": (changed_piece(260, "x" * 10_000, 0.0, 1), "damaged: a piece of 10000 bytes; 1 to 512"),
    "a piece twice": (changed_piece(261, "ab", 0.0, 1), "damaged: the pieces 260 and 261 are both 'ab'"),
    "a score of NaN": (changed_piece(260, "x", math.nan, 1), "damaged: the piece 'x' has the score nan"),
    "a score of minus infinity": (changed_piece(260, "x", -math.inf, 1), "damaged: the piece 'x' has the score -inf"),
    "an unknown type": (changed_piece(260, "x", 0.0, 99), "damaged: the piece 'x' has the unknown type 99"),
    "a negative type": (changed_piece(260, "x", 0.0, -1), "damaged: the piece 'x' has the unknown type -1"),
    "no byte": (changed_piece(3, "x", 0.0, 1), "there is no piece <0x00> of the type BYTE"),
    "two unknown pieces": (changed_piece(1, "x", 0.0, 2), r"damaged: unk_id is 0, but the unknown pieces are \[0, 1\]"),
    "an end out of range": (tokenizer_model(trainer=protobuf_field(42, 999)), "damaged: eos_id is 999, but there are 265 pieces"),
    "Unigram": (tokenizer_model(trainer=protobuf_field(3, 1)), "a Unigram model of SentencePiece is not supported, BPE is"),
    "an unknown model": (tokenizer_model(trainer=protobuf_field(3, 77)), "damaged: unknown model type 77"),
    "a normalizer": (tokenizer_model(normalizer=protobuf_field(2, b"\1")), "changes texts before they are encoded"),
    "a text for a number": (tokenizer_model(trainer=protobuf_field(35, b"1")), "the field byte_fallback has the wire type 2"),
    "tiktoken's": (b"IQ== 0\nIg== 1\n", "is a vocabulary of tiktoken"),
    "Git LFS's pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_malformed_tokenizer_model_is_refused(tmp_path, name):
    content, message = SENTENCEPIECE[name]
    refused(DataError, message, load_tokenizer, write(tmp_path / "model", {"tokenizer.model": content}))


# --- Files of torch.save and of llama2.c


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def doubled(times: int) -> list:
    """A list that is small in a pickle and has 2**times items when it is written out."""
    value: list = [1]
    for _ in range(times):
        value = [value, value]
    return value


def args(**changes):
    whole = dict(n_layer=2, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=CHARS.vocab_size, dropout=0.0)
    return lambda: nanogpt_checkpoint(model_args={**whole, **changes})


def llama2c_pt(state: dict[str, torch.Tensor], **changes):
    names = dict(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=9, multiple_of=4, max_seq_len=8)
    return lambda: torch_file({"model": state, "model_args": {**names, **changes}})


def zip_of(content: bytes, *, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


W1 = "layers.0.feed_forward.w1.weight"
TORCH = {
    "0 bytes": (lambda: b"", "is cut off or not a file of torch.save"),
    "cut off": (lambda: nanogpt_checkpoint()[:-9], "is cut off or not a file of torch.save"),
    "a pickle without a zip": (lambda: pickle.dumps({"model": {}}), "is cut off or not a file of torch.save"),
    "a bomb": (lambda: zip_of(bytes(10**7), method=zipfile.ZIP_DEFLATED), "its parts are compressed or larger than the file"),
    "a zip of something else": (lambda: zip_of(b"hello"), "is damaged, or holds more than tensors and plain values"),
    "code": (lambda: torch_file({"model": Canary(Path("/nonexistent/canary"))}), "which is not read because it could run code"),
    "code in the pickle of a zip": (lambda: zip_of(pickle.dumps(Canary(Path("/x/canary")), protocol=2)), "because it could run code"),
    "a list": (lambda: torch_file([1]), "is no checkpoint of nanoGPT or llama2.c: it holds a list"),
    "no model_args": (lambda: nanogpt_checkpoint(model_args=None), "has no 'model' and 'model_args', but 'model', 'model_args'"),
    "keys that are large": (lambda: torch_file({"x" * 10**6: 1}), "has no 'model' and 'model_args', but 'xxx"),
    "a list among tensors": (lambda: nanogpt_checkpoint(model={"a": [1]}), "has something else than a tensor in 'model': 'a'"),
    "a name that is a number": (lambda: nanogpt_checkpoint(model={1: torch.ones(1)}), "something else than a tensor in 'model': 1"),
    "10**12 values that are one": (
        lambda: nanogpt_checkpoint(model={"a": torch.ones(1).expand(10**12)}), "something else than a tensor in 'model': 'a'"),
    "a size that is a tensor": (args(n_embd=torch.zeros(3, 3)), "n_embd must be a whole number, got tensor"),
    "a size of 10**5000": (args(n_embd=10**600), "n_embd must be a whole number below 2..64, got 1000"),
    "a size that is 2**60 lists": (args(n_embd=doubled(60)), r"n_embd must be a whole number, got \[\["),
    "10**9 layers": (args(n_layer=10**9), "too few for 1000000000 layers"),
    "an unknown setting": (args(**{"x" * 10**6: 1}), "has model_args that nanoGPT's GPT does not: xxx"),
    "llama2.c without layers": (llama2c_pt({}), "there is no matrix layers.0.feed_forward.w1.weight"),
    "llama2.c with a number for a matrix": (llama2c_pt({W1: torch.tensor(3.0)}), "there is no matrix layers.0.feed_forward.w1.weight"),
    "llama2.c with numbers for all matrices": (
        llama2c_pt({W1: torch.ones(3, 8), "layers.0.attention.wq.weight": torch.tensor(1.0)}), r"q_proj.weight is \(\), must be"),
    "llama2.c with 0 heads": (llama2c_pt({W1: torch.ones(3, 8)}, n_heads=0), r"num_attention_heads \(0\) must be at least 1"),
    "llama2.c with text for a width": (llama2c_pt({W1: torch.ones(3, 8)}, dim="x"), "hidden_size must be a whole number, got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_a_malformed_torch_file_is_refused(tmp_path, name):
    content, message = TORCH[name]
    (tmp_path / "ckpt.pt").write_bytes(content())
    with pytest.raises((CheckpointError, ConvertError), match=message) as info:
        load(tmp_path / "ckpt.pt")
    assert_clear(info.value)


def test_no_code_of_a_torch_file_is_run(tmp_path):
    for content in (
        torch_file({"model": Canary(tmp_path / "x")}),
        zip_of(pickle.dumps(Canary(tmp_path / "x"), protocol=2)),
    ):
        (tmp_path / "ckpt.pt").write_bytes(content)
        refused(CheckpointError, "could run code", load, tmp_path / "ckpt.pt")
        assert not (tmp_path / "x").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "x")))  # control: it would have
    assert (tmp_path / "x").exists()


def sizes(*values: int):
    return lambda: llama2c_bin(llama(tie_word_embeddings=True), sizes=values)


def of_version(version: int, *values: int, group: int = 0, size: int = 300) -> bytes:
    return (struct.pack("<Ii7iBi", 0x616B3432, version, *values, 1, group)).ljust(size, b"\0")


BIN = {
    "0 bytes": (lambda: b"", "is no .bin file of llama2.c: it has 0 bytes"),
    "cut off": (lambda: llama2c_bin(llama(tie_word_embeddings=True))[:-4], "is damaged or no .bin file of llama2.c"),
    "more": (lambda: llama2c_bin(llama(tie_word_embeddings=True)) + b"\0", "is damaged or no .bin file of llama2.c"),
    "something else": (lambda: b"PK\3\4" + bytes(1000), "is no .bin file of llama2.c: its header has the sizes"),
    "a negative width": (sizes(-8, 12, 2, 2, 1, 25, 32), r"its header has the sizes \(-8, 12"),
    "a width of 2**31-1": (sizes(2**31 - 1, 12, 2, 2, 1, 25, 32), r"its header has the sizes \(2147483647, 12"),
    "a vocabulary of -2**31": (sizes(8, 12, 2, 2, 1, -(2**31), 32), "its header has the sizes"),
    "0 heads": (sizes(8, 12, 2, 0, 1, 25, 32), "its header has the sizes"),
    "10,000,000 layers": (sizes(8, 12, 10**7, 2, 1, 25, 32), "a model of the sizes .8, 12, 10000000, .* bytes, the file"),
    "heads that do not divide": (sizes(8, 12, 2, 3, 1, 25, 32), "describes a model that cannot be built: hidden_size .8. must be divisible"),
    "version 3": (lambda: of_version(3, 8, 12, 2, 2, 1, 25, 32), "of version 3; 0, 1 and 2 are known"),
    "version -1": (lambda: of_version(-1, 8, 12, 2, 2, 1, 25, 32), "of version -1; 0, 1 and 2 are known"),
    "version 1 without a header": (lambda: of_version(1, 8, 12, 2, 2, 1, 25, 32, size=100), "of version 1; 0, 1 and 2|no .bin"),
    "a group of 0": (lambda: of_version(2, 8, 12, 2, 2, 1, 25, 32, group=0), "is damaged or no .bin file of llama2.c"),
    "a negative group": (lambda: of_version(2, 8, 12, 2, 2, 1, 25, 32, group=-8), "is damaged or no .bin file of llama2.c"),
    "a group of 2**31-1": (lambda: of_version(2, 8, 12, 2, 2, 1, 25, 32, group=2**31 - 1), "is damaged or no .bin file of llama2.c"),
}  # fmt: skip


@pytest.mark.parametrize("name", BIN)
def test_a_malformed_bin_file_is_refused(tmp_path, name):
    content, message = BIN[name]
    (tmp_path / "model.bin").write_bytes(content())
    refused(CheckpointError, message, load, tmp_path / "model.bin")


# --- The path itself


@pytest.mark.parametrize("path", ["", "x" * 5_000, "a/" * 3_000, "a\0b", "\ud800", "\n", "owner/" + "x" * 500])
def test_a_path_that_cannot_be_is_refused(path):
    with pytest.raises(CheckpointError) as info:
        load(path)
    assert_clear(info.value)


# --- The command line


def spoilt(files: Files, name: str, content: bytes) -> Files:
    assert name in files
    return files | {name: content}


# Command and what it writes, toy, spoiled files, message.
COMMANDS = {
    "info of a GGUF cut off": (["info"], "llama.gguf", lambda f: spoilt(f, "x.gguf", f["x.gguf"][:500]), "is cut off or damaged"),
    "info of a folder": (["info"], "llama", lambda f: with_config(f, config(num_hidden_layers=10**9)), "too few for 1000000000 layers"),
    "info of a tokenizer": (["info"], "llama", lambda f: spoilt(f, "tokenizer.json", b"{"), "tokenizer.json is not valid JSON"),
    "info of an index": (["info"], "sharded", lambda f: f | {SHARD: b""}, f"{SHARD} is cut off: it has 0 bytes"),
    "generate from a folder": (["generate"], "llama", lambda f: spoilt(f, "model.safetensors", b"x" * 99), "a header of 8,680"),
    "generate from a config": (["generate"], "qwen3", lambda f: with_config(f, config(head_dim="x")), "head_dim must be a whole number"),
    "generate from a GGUF": (["generate"], "gpt2.gguf", lambda f: spoilt(f, "x.gguf", b"GGUF\x04\0\0\0" + bytes(16)), "version 4; 2 and 3"),
    "generate from a pickle": (["generate"], "pt", lambda f: spoilt(f, "ckpt.pt", pickle.dumps(1)), "is cut off or not a file of torch.save"),
    "generate with the tokenizer of another model": (
        ["generate", "--prompt", "lugar", "--device", "cpu"], "mismatched", lambda f: f,
        "the model 25 tokens; take the tokenizer that it was trained with"),
    "export to GGUF": (
        ["export", "--gguf", "out"], "llama", lambda f: spoilt(f, "model.safetensors", f["model.safetensors"][:-1]), "is cut off: the header"),
    "export to GGUF of NaN": (
        ["export", "--gguf", "out"], "llama", lambda f: spoilt(f, "model.safetensors", f["model.safetensors"][:-4] + b"\xff" * 4),
        "holds NaN or infinity: the training diverged"),
    "export to Hugging Face": (["export", "--hf", "out"], "bin", lambda f: spoilt(f, "model.bin", f["model.bin"][:-1]), "is damaged or no .bin"),
    "export to Hugging Face of NaN": (
        ["export", "--hf", "out"], "llama", lambda f: spoilt(f, "model.safetensors", f["model.safetensors"][:-4] + b"\xff" * 4),
        "holds NaN or infinity: the training diverged"),
    "export of a control character": (
        ["export", "--gguf", "out"], "llama", lambda f: with_config(f, config(model_type="\x1b[2J\nll")), r"a model of type '\\x1b"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_answers_in_one_line_and_leaves_nothing(toys, tmp_path, name, capsys):
    (command, *options), toy, spoil, message = COMMANDS[name]
    path = write(tmp_path / "model", spoil(toys[toy]))
    options = [str(tmp_path / option) if option == "out" else option for option in options]
    assert main([command, str(path), *options]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert message in err or message.replace("\\\\", "\\") in err
    assert "Traceback" not in out + err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]  # no half of a file, under whatever name


def test_info_shows_no_control_characters_of_a_file(toys, tmp_path, capsys):
    file = gguf_of(toys["llama.gguf"]["x.gguf"], tmp_path)
    meta(**{"evil\x1b[2J": "\x1b[2J", "long": "x" * 10_000})(file)
    (tmp_path / "x.gguf").write_bytes(bytes(file))
    assert main(["info", str(tmp_path / "x.gguf")]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert max(map(len, out.splitlines())) < 200


# --- Memory: small files that announce terabytes

TERABYTES = {
    "safetensors header": "safetensors a header of 99 MB, not there",
    "safetensors shape": "safetensors a product of 2**120",
    "safetensors empty shape": "safetensors a product of 0 with sizes of 2**62",
    "vocabulary": "config a vocabulary of 10**12",
    "layers": "config 10**9 layers",
    "heads": "config heads of width 2**40",
    "many heads": "config 10**9 heads",
    "GGUF texts": "gguf an array of 2**24 texts, not there",
    "GGUF numbers": "gguf an array of 2**24 numbers, not there",
    "GGUF key": "gguf a key of 2**62 bytes",
    "GGUF heads": "gguf heads 2**31 wide",
    "GGUF product": "gguf a product of 2**128",
    "torch bomb": "torch a bomb",
    "torch lists": "torch a size that is 2**60 lists",
    "torch stride": "torch 10**12 values that are one",
    "llama2.c layers": "bin 10,000,000 layers",
}  # fmt: skip
MEGABYTES = 64  # beyond what the imports take
WITHIN_LIMITS = """
import resource, sys, time
from llmforge.convert import load
from llmforge.errors import LLMForgeError

whole, *paths = sys.argv[1:]
load(whole)  # what is imported late, is
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in paths:
    start = time.process_time()
    try:
        load(path)
    except LLMForgeError:
        print("refused" if time.process_time() - start < 2 else "slow", path)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limit of the address space")
def test_files_that_announce_terabytes_cost_nothing(toys, tmp_path):
    paths = []
    for number, case in enumerate(TERABYTES.values()):
        kind, name = case.split(" ", 1)
        folder = tmp_path / str(number)
        match kind:
            case "safetensors":
                change, _ = SAFETENSORS[name]
                files = toys["llama"] | {"model.safetensors": change(toys["llama"]["model.safetensors"])}
            case "config":
                family, change, *_ = CONFIG[name]
                files = with_config(toys[family], change)
            case "gguf":
                toy, change, *_ = GGUF[name]
                file = gguf_of(toys[f"{toy}.gguf"]["x.gguf"], tmp_path)
                change(file)
                files = {"x.gguf": bytes(file)}
            case "torch":
                files = {"ckpt.pt": TORCH[name][0]()}
            case _:
                files = {"model.bin": BIN[name][0]()}
        paths.append(str(write(folder, files)))
    whole = [str(write(tmp_path / "whole", toys["llama"]))]
    script = WITHIN_LIMITS.format(megabytes=MEGABYTES)
    done = subprocess.run([sys.executable, "-c", script, *whole, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"refused {path}" for path in paths], done.stderr


def test_a_small_file_of_many_empty_tensors_announces_no_large_model(toys, tmp_path):
    """Each layer would cost a millisecond and some kilobytes, if they were built before they are compared."""
    names = {f"model.layers.{i}.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    names["x"] = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    files = with_config(toys["llama"], config(num_hidden_layers=20_000))
    path = write(tmp_path / "model", files | {"model.safetensors": safetensors_bytes(names, bytes(32))})
    start = time.process_time()
    refused(CheckpointError, "missing: model.embed_tokens.weight", load, path)
    assert time.process_time() - start < 10  # a second on an idle machine; 20,000 layers take minutes


# --- Random changes: a model, or one of our errors

NASTY = [None, True, False, 0, -1, 1, 2, 3, 4, 2**31, 2**63, 10**30, -(10**30), 0.0, -1.0, 0.5, 1e308, 5e-324]
NASTY += [math.nan, math.inf, -math.inf, "", "4", "1e400", "x", "yarn", [], [4], {}, {"a": 1}, "\x1b\n\ud800", [[]] * 9]
simple = st.sampled_from(NASTY) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
nested = simple | st.lists(simple, max_size=4) | st.dictionaries(st.text(max_size=8), simple, max_size=4)
json_values = nested | st.lists(nested, max_size=4) | st.dictionaries(st.text(max_size=8), nested, max_size=4)
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast"]
ROPE_KEYS += ["beta_slow", "original_max_position_embeddings", "attention_factor", "truncate", "partial_rotary_factor"]
rope_sections = st.dictionaries(
    st.sampled_from(ROPE_KEYS),
    json_values | st.sampled_from(["linear", "llama3", "yarn", "default", 2.0, 16, 1.0]),
    max_size=6,
)
EXTRA_KEYS = ["layer_types", "use_sliding_window", "max_window_layers", "sliding_window", "rope_parameters", "n_inner"]
EXTRA_KEYS += [
    "quantization_config",
    "partial_rotary_factor",
    "attn_pdrop",
    "is_encoder_decoder",
    "use_mrope",
    "head_dim",
]


def examples(count: int) -> settings:
    """The same examples in every run, or 20 times as many new ones: pytest --hypothesis-profile=search."""
    return settings(max_examples=count if settings.default.derandomize else 20 * count)


def opened(path: Path) -> None:
    """A model that computes, or one of our errors; in any case soon."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            model, tokenizer = load(path)
        except LLMForgeError as error:
            assert_clear(error)
        else:
            with torch.no_grad():
                assert model(torch.zeros(1, 1, dtype=torch.long)).shape[:2] == (1, 1)
            if tokenizer is not None:
                used(tokenizer)
    assert time.process_time() - start < 3


def used(tokenizer) -> None:
    try:
        ids = tokenizer.prompt_ids("En un lugar ñ\n") + tokenizer.encode_special("<|endoftext|> a")
        tokenizer.decode(ids)
        tokenizer.gguf_vocabulary().metadata()
    except LLMForgeError as error:
        assert_clear(error)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("random")


def changed_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """`whole` with some bytes changed, removed or inserted; near the beginning more often."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 300) | st.integers(0, len(whole)))
        match data.draw(st.sampled_from(["set", "bit", "number", "insert", "delete", "cut"])):
            case "set":
                content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=9))
            case "bit" if place < len(content):
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "number":
                content[place : place + 8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[place : place + data.draw(st.integers(1, 9))]
            case "cut":
                del content[max(place, 100) :]
    return bytes(content)


# Toy -> the file that is changed.
BYTES_OF = {
    "llama": "model.safetensors",
    "sharded": "model.safetensors.index.json",
    "qwen3": "config.json",
    "mistral": "tokenizer.json",
    "llama.gguf": "x.gguf",
    "spm.gguf": "x.gguf",
    "pt": "ckpt.pt",
    "bin": "model.bin",
}


@pytest.mark.parametrize("toy", BYTES_OF)
@examples(60)
@given(data=st.data())
def test_any_change_of_bytes_gives_a_model_or_our_error(toys, scratch, toy, data):
    files, name = toys[toy], BYTES_OF[toy]
    opened(write(scratch / f"bytes-{toy}", files | {name: changed_bytes(data, files[name])}))


@pytest.mark.parametrize(("toy", "name"), [("llama", "tokenizer.json"), ("spm", "tokenizer.model")])
@examples(80)
@given(data=st.data())
def test_any_change_of_bytes_gives_a_tokenizer_or_our_error(toys, scratch, toy, name, data):
    files = {name: changed_bytes(data, toys[toy][name])}
    tokenized(write(scratch / f"tokenizer-{toy}", files))


def tokenized(folder: Path) -> None:
    start = time.process_time()
    try:
        tokenizer = load_tokenizer(folder)
    except LLMForgeError as error:
        assert_clear(error)
    else:
        used(tokenizer)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("toy", [*FAMILIES, "own"])
@examples(60)
@given(data=st.data())
def test_any_value_in_a_config_gives_a_model_or_our_error(toys, scratch, toy, data):
    values = json.loads(toys[toy]["config.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*values, "rope_scaling", *EXTRA_KEYS]) | st.text(max_size=5))
        drawn = data.draw(rope_sections if key.startswith("rope_") and data.draw(st.booleans()) else json_values)
        values[key] = drawn
    opened(write(scratch / f"config-{toy}", with_config(toys[toy], lambda _: values)))


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The place of each value in a JSON document, those in long lists and dicts left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in list(inner)[:12] for place in places(item, (*path, key)))]


def replaced(document: Any, place: tuple, value: object) -> Any:
    if not place:
        return value
    document = document.copy()
    document[place[0]] = replaced(document[place[0]], place[1:], value)
    return document


@examples(120)
@given(data=st.data())
def test_any_value_in_a_safetensors_header_gives_a_model_or_our_error(toys, scratch, data):
    header, content = parts_of(toys["gpt2"]["model.safetensors"])
    place = data.draw(st.sampled_from(places(header)))
    file = safetensors_bytes(replaced(header, place, data.draw(json_values)), content)
    opened(write(scratch / "header", toys["gpt2"] | {"model.safetensors": file}))


@examples(60)
@given(data=st.data())
def test_any_value_in_an_index_gives_a_model_or_our_error(toys, scratch, data):
    name = "model.safetensors.index.json"
    index = json.loads(toys["sharded"][name])
    edited = replaced(index, data.draw(st.sampled_from(places(index))), data.draw(json_values))
    opened(write(scratch / "index", toys["sharded"] | {name: json.dumps(edited).encode()}))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("toy", ["llama", "mistral", "saved spm"])
@examples(60)
@given(data=st.data())
def test_any_value_in_a_tokenizer_gives_one_or_our_error(toys, scratch, toy, name, data):
    files = {key: toys[toy][key] for key in ("tokenizer.json", "tokenizer_config.json")}
    document = json.loads(files.get(name, b'{"eos_token": {"content": "</s>"}}'))
    document |= {"added_tokens_decoder": {"270": {"content": "<x>", "special": True}}} if "config" in name else {}
    for _ in range(data.draw(st.integers(1, 2))):
        document = replaced(document, data.draw(st.sampled_from(places(document))), data.draw(json_values))
    tokenized(write(scratch / f"values-{toy}-{name}", files | {name: json.dumps(document).encode()}))


gguf_values = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.integers(-3, 300),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    st.lists(st.text(max_size=4), max_size=5),
    st.lists(st.floats(width=32), max_size=5),
    st.sampled_from(
        ["yarn", "linear", "none", "qwen2", "gpt2", "llama", 2.0, 8, "\ud800".encode("utf-8", "replace").decode()]
    ),
)
GGUF_KEYS = ["rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear"]
GGUF_KEYS += [
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_count",
    "rope.freq_base",
    "vocab_size",
]


@pytest.mark.parametrize("toy", ["llama.gguf", "gpt2.gguf", "spm.gguf"])
@examples(80)
@given(data=st.data())
def test_any_metadata_in_a_gguf_give_a_model_or_our_error(toys, scratch, toy, data):
    file = gguf_of(toys[toy]["x.gguf"], scratch)
    keys = [*file.metadata, *(f"{toy.split('.')[0]}.{key}" for key in GGUF_KEYS)]
    for _ in range(data.draw(st.integers(1, 3))):
        file.metadata[data.draw(st.sampled_from(keys))] = data.draw(gguf_values)
    if data.draw(st.booleans()):
        changed = file.tensors[data.draw(st.sampled_from(list(file.tensors)))]
        changed.dims = data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 12, 32, 270, 2**32, 2**62]), max_size=5))
        changed.type = data.draw(st.integers(0, 42))
    with suppress(struct.error, KeyError):  # what the writer of this file cannot say
        content = bytes(file)
        opened(write(scratch / f"metadata-{toy}", {"x.gguf": content}))


@examples(80)
@given(data=st.data())
def test_any_sizes_in_a_bin_file_give_a_model_or_our_error(toys, scratch, data):
    whole = toys["bin"]["model.bin"]
    numbers = list(struct.unpack("<7i", whole[:28]))
    for _ in range(data.draw(st.integers(1, 2))):
        numbers[data.draw(st.integers(0, 6))] = data.draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-50, 50))
    opened(write(scratch / "sizes", {"model.bin": struct.pack("<7i", *numbers) + whole[28:]}))
