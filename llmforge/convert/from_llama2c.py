"""llama2.c's checkpoints: the ckpt.pt of its train.py and the .bin files of its export.py, versions 0, 1 and 2.

Names are Meta's, and so is the order of the rows of q and k: neighbours turn together. A .bin file is a header and then the tensors,
float32, all layers of one kind after the other; version 2 keeps each matrix as int8, and after it a float32 scale for every group.

Source: https://github.com/karpathy/llama2.c, model.py, export.py, and runq.c, which reads version 2.
"""

import math
import re
import struct
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmforge.convert.base import Tensors
from llmforge.convert.llama import reordered, to_halves
from llmforge.convert.published import Published, account, family_of
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.formats.lazy import LazyTensor, map_tensor
from llmforge.models import LlamaConfig

_MODEL_ARGS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "multiple_of", "norm_eps", "max_seq_len", "dropout",
)  # fmt: skip
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
# Cosines and sines, and the causal mask where it does not use flash attention.
_BUFFERS = re.compile(r"freqs_(cos|sin|cis)|layers\.\d+\.attention\.mask")
_ONCE = ("tok_embeddings", "norm", "output")  # not in every layer
_MAGIC = 0x616B3432  # "ak42", of versions 1 and 2
_HEADER_BYTES = {0: 28, 1: 256, 2: 256}


def read_llama2c(path: Path, args: dict[Any, Any], state: dict[str, Tensor]) -> Published:
    """The model of `model_args` and the tensors of `model` in a ckpt.pt.

    Raises:
        CheckpointError: tensors that do not fit the model_args.
        ConvertError: model_args that llama2.c's train.py does not write.
    """
    unknown = [str(key) for key in args if key not in _MODEL_ARGS]
    if unknown:
        raise ConvertError(f"{path} has model_args that llama2.c does not: {', '.join(unknown)}")
    gate = state.get("layers.0.feed_forward.w1.weight")
    if gate is None or gate.ndim == 0:
        raise CheckpointError(f"{path} does not fit its model_args: there is no matrix layers.0.feed_forward.w1.weight")
    values = {
        "hidden_size": args.get("dim"),
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": args.get("n_layers"),
        "num_attention_heads": args.get("n_heads"),
        "num_key_value_heads": args.get("n_kv_heads"),
        "vocab_size": args.get("vocab_size"),
        "max_position_embeddings": args.get("max_seq_len", 2048),
        "rms_norm_eps": args.get("norm_eps", 1e-5),
        "tie_word_embeddings": True,  # its train.py always does
    }
    config = _config(path, values)
    tensors = {name: LazyTensor.of(tensor) for name, tensor in state.items() if not _BUFFERS.fullmatch(name)}
    return _published(path, config, tensors)


def read_llama2c_bin(path: Path) -> Published:
    """The model of a .bin file.

    Raises:
        CheckpointError: the sizes in its header do not give the size of the file, or are those of no model.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(256)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(header) < _HEADER_BYTES[0]:
        raise CheckpointError(f"{path} is no .bin file of llama2.c: it has {size} bytes")
    version, group, shared = 0, 0, True
    sizes = struct.unpack_from("<7i", header)
    if struct.unpack_from("<I", header)[0] == _MAGIC:
        version = struct.unpack_from("<i", header, 4)[0]
        if version not in (1, 2) or len(header) < 256:
            raise CheckpointError(f"{path} is a .bin file of llama2.c of version {version}; 0, 1 and 2 are known")
        sizes, shared = struct.unpack_from("<7i", header, 8), header[36] != 0
        group = struct.unpack_from("<i", header, 37)[0] if version == 2 else 0
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes
    if version == 0:  # a negative size says that the output projection has a matrix of its own
        vocab, shared = abs(vocab), vocab > 0
    if not all(0 < value < 2**24 for value in (dim, hidden, layers, heads, kv_heads, vocab, context)):
        raise CheckpointError(f"{path} is no .bin file of llama2.c: its header has the sizes {sizes}")
    values = {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": shared,
    }
    config = _config(path, values)
    kv_dim = kv_heads * config.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (vocab, dim),
        "attention_norm": (dim,),
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "norm": (dim,),
        "output": (vocab, dim),
    }
    if shared:
        del shapes["output"]
    counts = {part: 1 if part in _ONCE else layers for part in shapes}
    expected = _HEADER_BYTES[version] + sum(counts[part] * _nbytes(shape, group) for part, shape in shapes.items())
    expected += 4 * context * config.head_width if version == 0 else 0  # cosines and sines
    if expected != size or (group and any(len(s) > 1 and math.prod(s) % group for s in shapes.values())) or group < 0:
        raise CheckpointError(
            f"{path} is damaged or no .bin file of llama2.c: a model of the sizes {sizes} has {expected:,} bytes, the file {size:,}"
        )
    order = list(shapes)
    if version > 0:  # norms first
        order.sort(key=lambda part: not part.endswith("norm"))
    entries = []
    for part in order:
        prefixes = [""] if part in _ONCE else [f"layers.{i}." for i in range(layers)]
        entries += [(f"{prefix}{part}.weight", shapes[part]) for prefix in prefixes]
    return _published(path, config, _tensors(path, entries, version, group, context * config.head_width))


def _nbytes(shape: tuple[int, ...], group: int) -> int:
    n = math.prod(shape)
    return n + 4 * (n // group) if group > 0 and len(shape) > 1 else 4 * n


def _tensors(
    path: Path, entries: list[tuple[str, tuple[int, ...]]], version: int, group: int, n_frequencies: int
) -> Tensors:
    """Where each tensor lies, in the order of the file."""
    tensors: Tensors = {}
    position = _HEADER_BYTES[version]
    for name, shape in entries:
        if name == "output.weight" and version == 0:
            position += 4 * n_frequencies
        if group and len(shape) > 1:
            tensors[name] = LazyTensor(shape, torch.float32, partial(_quantized, path, shape, position, group))
        else:
            tensors[name] = LazyTensor.in_file(path, torch.float32, shape, position)
        position += _nbytes(shape, group)
    return tensors


def _quantized(path: Path, shape: tuple[int, ...], position: int, group: int) -> Tensor:
    n = math.prod(shape)
    values = map_tensor(path, torch.int8, (n // group, group), position)
    scales = map_tensor(path, torch.float32, (n // group, 1), position + n)
    if not (scales >= 0).all() or scales.isinf().any():
        raise CheckpointError(
            f"{path} is damaged, or written in the first weeks of version 2, which had all scales at its end; export it again"
        )
    return (values.float() * scales).view(shape)


def _config(path: Path, values: dict[str, Any]) -> LlamaConfig:
    try:
        return LlamaConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from error


def _published(path: Path, config: LlamaConfig, theirs: Tensors) -> Published:
    tensors: Tensors = {}
    for name, tensor in theirs.items():
        layer, part = "", name.removesuffix(".weight")
        if found := re.fullmatch(r"layers\.(\d+)\.(.+)", part):
            layer, part = f"model.layers.{found.group(1)}.", found.group(2)
        tensors[f"{layer}{_NAMES.get(part, part)}.weight"] = tensor
    tensors = reordered(config, tensors, to_halves)
    return account(family_of(config), config, tensors, CheckpointError(f"{path} does not fit its sizes"))
