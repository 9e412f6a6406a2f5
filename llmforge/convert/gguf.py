"""GGUF files that llama.cpp, LM Studio and Ollama load, and that compute what the model computes."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import size_label
from torch import Tensor, nn

from llmforge.convert.base import Family
from llmforge.convert.load import load
from llmforge.convert.published import ExportReport, publish
from llmforge.errors import ConvertError
from llmforge.formats.gguf import GGUFTensor, write_gguf
from llmforge.tokenizers import Tokenizer
from llmforge.tokenizers.base import UNUSED

# Name -> general.file_type, llama.cpp's llama_ftype.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}

# Without a template clients assume ChatML, whose markers are junk for a model that never saw them.
_PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# Largest value of each type; the scale of a Q8_0 block is a float16.
_LARGEST = {"F16": 65_504.0, "Q8_0": 127 * 65_504.0}


def export_gguf(
    model_or_folder: nn.Module | str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    path: str | os.PathLike[str],
    *,
    file_type: str = "F16",
    name: str | None = None,
) -> ExportReport:
    """Write a GGUF file.

    Args:
        model_or_folder: a model of a known family, which is not changed, or what `load` accepts.
        tokenizer: that of the model; None = the one in the folder.
        file_type: type of the matrices: "F32", "F16", "BF16" or "Q8_0". Norms, biases and positions are F32 always, and rows that
            are no multiple of 32 are F16 instead of Q8_0.
        name: how programs show the model; None = the file's name.
    Raises:
        ConvertError: the model, the tokenizer or the file type cannot be expressed.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    if file_type not in FILE_TYPES:
        raise ConvertError(f"file_type ({file_type!r}) must be one of {', '.join(FILE_TYPES)}")
    if isinstance(model_or_folder, nn.Module):
        model = model_or_folder
    else:
        model, its_tokenizer = load(model_or_folder)
        tokenizer = tokenizer or its_tokenizer
    if tokenizer is None:
        raise ConvertError("a GGUF file contains the tokenizer; give the one that the model was trained with")
    vocabulary = _vocabulary_metadata(tokenizer)
    published = publish(model, tokenizer)
    family = published.family
    config, tensors, notes = family.for_gguf(published.config, published.tensors)
    _pad_tokens_(vocabulary, config.vocab_size)

    described = [_describe(family, own_name, tensor, file_type) for own_name, tensor in tensors.items()]
    types = Counter(tensor.type_name for tensor in described)
    if file_type == "Q8_0" and types["F16"]:
        notes.append(f"{types['F16']} tensors are F16: their rows are not a multiple of 32, as Q8_0 needs")
    n_params = sum(tensor.numel() for tensor in tensors.values())
    metadata = {
        "general.type": "model",
        "general.name": name or path.stem,
        "general.size_label": size_label(n_params, n_params, 0, 0),
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": 2,
        **{f"{family.gguf_arch}.{key}": value for key, value in family.gguf_metadata(config).items()},
        **vocabulary,
    }
    write_gguf(path, family.gguf_arch, metadata, described)
    return ExportReport(path, path.stat().st_size, file_type, types, published.notes + notes)


def _describe(family: Family, own_name: str, tensor: Tensor, file_type: str) -> GGUFTensor:
    name, type_name = family.gguf_name(own_name), file_type
    if tensor.ndim == 1 or name in family.gguf_float32:  # other types load and then abort in the first decode
        type_name = "F32"
    elif file_type == "Q8_0" and tensor.shape[-1] % 32:
        type_name = "F16"
    if (largest := tensor.abs().max().item()) > _LARGEST.get(type_name, np.inf):
        raise ConvertError(f"{own_name} has a value of {largest:.3g}, too large for {type_name}; export BF16 or F32")
    return GGUFTensor(name, tuple(tensor.shape), type_name, partial(_float32, tensor))


def _float32(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return values


def _vocabulary_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = tokenizer.gguf_vocabulary()
    eos = tokenizer.eos_token_id
    if eos is None:  # llama.cpp would take id 11, some letter
        raise ConvertError(
            "the tokenizer has no <|endoftext|>, and llama.cpp needs a token to stop at; add one as a special token"
        )
    return {
        "tokenizer.ggml.model": "gpt2",  # byte-level BPE
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": eos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": False,  # some pre-tokenizers default to True
        "tokenizer.chat_template": _PASS_THROUGH,
    }


def _pad_tokens_(vocabulary: dict[str, Any], rows: int) -> None:
    """Give rows of the embedding that stand for no token names that no text contains: llama.cpp wants as many of each."""
    # A space is no letter of the byte alphabet, so no text can have these.
    names = [f"[UNUSED {i}]" for i in range(len(vocabulary["tokenizer.ggml.tokens"]), rows)]
    vocabulary["tokenizer.ggml.tokens"] = vocabulary["tokenizer.ggml.tokens"] + names
    vocabulary["tokenizer.ggml.token_type"] = vocabulary["tokenizer.ggml.token_type"] + [UNUSED] * len(names)
