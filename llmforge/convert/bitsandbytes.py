"""Hugging Face folders whose linear layers are NF4, as transformers writes them with bitsandbytes.

Beside a weight W, the codes (numel / 2 rounded up, 1), stand W.absmax, W.quant_map, with double quantization W.nested_absmax and
W.nested_quant_map, and W.quant_state.bitsandbytes__nf4: the bytes of a JSON object with the rest. Embeddings, norms and lm_head are
as in any folder. Source: bitsandbytes/functional.py, QuantState.as_dict (0.50).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmforge.convert.base import Tensors
from llmforge.errors import CheckpointError, ConvertError, shown
from llmforge.finetune.quantize import NF4Config
from llmforge.formats.lazy import LazyTensor
from llmforge.quant.dynamic8 import BLOCK_SIZE, dynamic_map
from llmforge.quant.nf4 import BLOCK_SIZES, CODEBOOK, NF4Quantizer, NF4Tensor, dequantize_nf4, dequantize_rows_nf4

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 10_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class NF4LazyTensor(LazyTensor):
    """A tensor that is stored in NF4; read as any other it is decoded."""

    read_codes: Callable[[], NF4Tensor] | None = None

    def read_nf4(self, device: torch.device | str) -> NF4Tensor:
        """The codes as they are stored, in memory of their own."""
        assert self.read_codes is not None
        nf4 = self.read_codes()

        def own(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, copy=True)

        codes, absmax = nf4.codes.to(device, copy=True), nf4.absmax.to(device, copy=True)
        return NF4Tensor(codes, absmax, own(nf4.nested_absmax), own(nf4.offset), nf4.shape, nf4.block_size)


def lazy_nf4(nf4: NF4Tensor, dtype: torch.dtype) -> LazyTensor:
    """A tensor in NF4 as one that is decoded when it is read."""
    by_row = partial(dequantize_rows_nf4, nf4, dtype=dtype) if len(nf4.shape) == 2 and nf4.numel else None
    return LazyTensor(nf4.shape, dtype, partial(dequantize_nf4, nf4, dtype=dtype), by_row)


def nf4_of(tensor: LazyTensor, config: NF4Config, *, device: torch.device | str = "cpu") -> NF4Tensor:
    """A tensor in NF4, made on a device some rows at a time; codes that are stored with the same settings are taken as they are.

    Raises:
        ConfigError: NaN or infinity among the values.
    """
    if isinstance(tensor, NF4LazyTensor):
        nf4 = tensor.read_nf4(device)
        if (nf4.block_size, nf4.nested_absmax is not None) == (config.block_size, config.double_quant):
            return nf4
    quantizer = NF4Quantizer(
        tensor.shape, block_size=config.block_size, double_quant=config.double_quant, device=device
    )
    for block in tensor.blocks():
        quantizer.add(block)
    return quantizer.finish()


def is_bitsandbytes_4bit(values: Mapping[str, Any]) -> bool:
    """Whether a config.json announces such tensors."""
    config = values.get("quantization_config")
    if not isinstance(config, dict):
        return False
    return config.get("quant_method", "bitsandbytes") == "bitsandbytes" and config.get("load_in_4bit") is True


def read_bitsandbytes(folder: Path, tensors: Tensors) -> Tensors:
    """The tensors with each group that makes an NF4 tensor as one.

    Raises:
        CheckpointError: a group that is not complete or does not fit together.
        ConvertError: 4-bit numbers that are not NF4, or with other tables.
    """
    tensors = dict(tensors)
    for state_name in [name for name in tensors if _STATE in name]:
        name, _, kind = state_name.partition(_STATE)
        if kind != "nf4":
            raise ConvertError(f"{folder} holds {name} in the 4-bit type {shown(kind)}; only nf4 can be read")
        try:
            tensors[name] = _grouped(name, tensors.pop(state_name), tensors)
        except KeyError as error:
            raise CheckpointError(f"{folder}: {name} is in NF4, but {error.args[0]!r} is missing") from error
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from error
    left = [name for name in tensors if name.endswith((".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"))]
    if left:
        raise CheckpointError(f"{folder}: {left[0]!r} belongs to a tensor in NF4 whose quant_state is missing")
    return tensors


def _grouped(name: str, state: LazyTensor, tensors: Tensors) -> NF4LazyTensor:
    values = _state(state)
    shape, block_size, nested = tuple(values["shape"]), values["blocksize"], "nested_blocksize" in values
    n = math.prod(shape)
    blocks = -(-n // block_size)
    codes = _part(tensors, name, torch.uint8, -(-n // 2))
    absmax = _part(tensors, f"{name}.absmax", torch.uint8 if nested else torch.float32, blocks)
    _check_map(_part(tensors, f"{name}.quant_map", torch.float32, 16), f"{name}.quant_map", torch.tensor(CODEBOOK))
    nested_absmax = None
    if nested:
        nested_absmax = _part(tensors, f"{name}.nested_absmax", torch.float32, -(-blocks // BLOCK_SIZE))
        map_name = f"{name}.nested_quant_map"
        _check_map(_part(tensors, map_name, torch.float32, 256), map_name, dynamic_map(signed=True))
    offset = values.get("nested_offset")

    def read_codes() -> NF4Tensor:
        return NF4Tensor(
            codes.read().reshape(-1),
            absmax.read().reshape(-1),
            None if nested_absmax is None else nested_absmax.read().reshape(-1),
            torch.tensor(offset, dtype=torch.float32) if nested else None,
            shape,
            block_size,
        )

    dtype = _DTYPES[values["dtype"]]

    def read() -> Tensor:
        return dequantize_nf4(read_codes(), dtype=dtype)

    def read_rows(start: int, stop: int) -> Tensor:
        return dequantize_rows_nf4(read_codes(), start, stop, dtype=dtype)

    return NF4LazyTensor(shape, dtype, read, read_rows if n else None, read_codes)


def _state(tensor: LazyTensor) -> dict[str, Any]:
    """The JSON object of a quant_state, checked."""
    if tensor.dtype != torch.uint8 or tensor.numel > _MAX_STATE_BYTES:
        raise CheckpointError(
            f"its quant_state is {tensor.numel:,} values of {tensor.dtype}, not the bytes of some JSON"
        )
    try:
        values = json.loads(bytes(tensor.read().reshape(-1).tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its quant_state is not valid JSON: {error}") from error
    shape = values.get("shape") if isinstance(values, dict) else None
    checks = {
        "shape": isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 <= n < 2**40 for n in shape),
        "blocksize": isinstance(values, dict) and values.get("blocksize") in BLOCK_SIZES,
        "dtype": isinstance(values, dict) and values.get("dtype") in list(_DTYPES),
    }
    if isinstance(values, dict) and "nested_blocksize" in values:
        checks["nested_blocksize"] = values["nested_blocksize"] == BLOCK_SIZE
        offset = values.get("nested_offset")
        checks["nested_offset"] = isinstance(offset, float) and math.isfinite(offset)
    bad = [key for key, good in checks.items() if not good]
    if bad:
        raise CheckpointError(f"its quant_state says nothing that is known here of {', '.join(bad)}: {shown(values)}")
    assert isinstance(values, dict)
    return values


def _part(tensors: Tensors, name: str, dtype: torch.dtype, numel: int) -> LazyTensor:
    part = tensors.pop(name)
    if part.dtype != dtype or part.numel != numel:
        raise CheckpointError(f"{name} is {part.numel:,} values of {part.dtype}, must be {numel:,} of {dtype}")
    return part


def _check_map(part: LazyTensor, name: str, expected: Tensor) -> None:
    if not torch.equal(part.read().reshape(-1), expected):
        raise ConvertError(f"{name} holds other values than bitsandbytes writes; quantize the original model again")
