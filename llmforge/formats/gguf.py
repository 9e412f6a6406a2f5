"""GGUF: llama.cpp's file of metadata and tensors, version 3, little-endian.

Written on the gguf package, one tensor at a time. Read with checks of our own: `gguf.GGUFReader` trusts the counts that it finds,
so that a damaged file can keep it busy for ever.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from torch import Tensor

from llmforge.errors import CheckpointError
from llmforge.formats.atomic import atomic_file
from llmforge.formats.lazy import LazyTensor, map_tensor

ALIGNMENT = 32  # bytes; another one needs general.alignment, and older readers ignore that
MAX_ENTRIES = 65_536  # tensors, or metadata keys: many times what the largest published files have
MAX_ITEMS = 1 << 24  # of an array; vocabularies have some hundred thousand
_CHUNK = 1 << 22  # values that are encoded or decoded at a time
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write, of any float type."""

    name: str
    type_name: str  # "F32", "F16", "BF16", "Q8_0"
    tensor: LazyTensor


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Where a tensor lies in a file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int  # bytes from the beginning of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says before its tensors' bytes; arrays are lists."""

    metadata: dict[str, Any]
    tensors: list[GGUFTensorInfo]


def write_gguf(
    path: str | os.PathLike[str], arch: str, metadata: Mapping[str, Any], tensors: Iterable[GGUFTensor]
) -> None:
    """Write a GGUF file; it appears under its name when it is complete.

    Args:
        arch: general.architecture.
        metadata: an int is written as u32, a float as f32, a list of ints as i32: the types that llama.cpp insists on.
        tensors: names are unique and have at most 63 bytes; rows of a Q8_0 tensor are multiples of 32.
    Memory: the largest tensor as it is read; what is encoded is written some megabytes at a time.
    """
    tensors = list(tensors)
    with atomic_file(path) as tmp:
        writer = GGUFWriter(tmp, arch)
        for key, value in metadata.items():
            writer.add_key_value(key, value, _value_type(value))
        for tensor in tensors:
            kind, shape = GGMLQuantizationType[tensor.type_name], tensor.tensor.shape
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), _nbytes(shape, kind), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # Not writer.write_tensor_data: numpy's tofile does not say why it fails (full disk, size limit).
        with tmp.open("ab") as out:
            for tensor in tensors:
                out.write(b"\0" * (-out.tell() % ALIGNMENT))
                values = tensor.tensor.read()
                rows = values.reshape(-1, values.shape[-1])
                step = max(1, _CHUNK // values.shape[-1])
                for start in range(0, len(rows), step):
                    out.write(encode(rows[start : start + step], tensor.type_name).data)
                del values, rows  # before the next one is read
            out.write(b"\0" * (-out.tell() % ALIGNMENT))


def encode(values: Tensor, type_name: str) -> np.ndarray:
    """Float values (..., n) as the bytes of a ggml type; see `write_gguf` for what fits."""
    values = values.detach().cpu()
    if type_name in _FLOATS:  # to the nearest, ties to even, as ggml rounds
        return values.to(_FLOATS[type_name]).contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(quants.quantize(values.float().numpy(), GGMLQuantizationType[type_name]))


def read_gguf_tensors(path: str | os.PathLike[str], header: "GGUFHeader") -> dict[str, LazyTensor]:
    """The tensors of a file by name: floats as they are, other types decoded to float32 when they are read.

    Raises:
        CheckpointError: a type that cannot be decoded.
    """
    return {info.name: _lazy(Path(path), info) for info in header.tensors}


def _lazy(path: Path, info: GGUFTensorInfo) -> LazyTensor:
    if info.type_name not in _FLOATS and not _can_be_decoded(info.type_name):
        raise CheckpointError(
            f"{path} has the tensor {info.name!r} in {info.type_name}, which cannot be decoded; take a file of another type"
        )
    return LazyTensor(info.shape, _FLOATS.get(info.type_name, torch.float32), lambda: _decoded(path, info))


@cache
def _can_be_decoded(type_name: str) -> bool:
    kind = GGMLQuantizationType[type_name]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decoded(path: Path, info: GGUFTensorInfo) -> Tensor:
    if info.type_name in _FLOATS:
        return map_tensor(path, _FLOATS[info.type_name], info.shape, info.offset)
    if 0 in info.shape:
        return torch.empty(info.shape)
    kind = GGMLQuantizationType[info.type_name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    data = map_tensor(path, torch.uint8, (info.nbytes,), info.offset).numpy()
    rows = data.reshape(-1, info.shape[-1] // block * block_bytes)
    values = torch.empty(len(rows), info.shape[-1])
    step = max(1, _CHUNK // info.shape[-1])
    for start in range(0, len(rows), step):
        values[start : start + step] = torch.from_numpy(quants.dequantize(rows[start : start + step], kind))
    return values.view(info.shape)


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read metadata and the list of tensors.

    Raises:
        CheckpointError: not a GGUF file, or one that is cut off or damaged, with the byte position.
    """
    try:
        with Path(path).open("rb") as stream:
            return _HeaderReader(stream, Path(path)).read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


class _HeaderReader:
    """Reads front to back; no count or length is believed that the rest of the file could not hold."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.size = os.fstat(stream.fileno()).st_size

    def read(self) -> GGUFHeader:
        if self.size < 4 or self.stream.read(4) != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file: it does not begin with the letters GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise self.damaged(f"version {version}; 2 and 3 (little-endian) are supported")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        if max(n_tensors, n_keys) > MAX_ENTRIES:
            raise self.damaged(f"{n_tensors:,} tensors and {n_keys:,} keys; at most {MAX_ENTRIES:,} are allowed")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in metadata:
                raise self.damaged(f"the key {key!r} occurs twice")
            metadata[key] = self.value(self.number("I"))
        infos = [self.tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        data_start = -(-self.stream.tell() // alignment) * alignment
        tensors = []
        for name, shape, kind, offset in infos:
            tensor = GGUFTensorInfo(name, shape, kind.name, data_start + offset, _nbytes(shape, kind))
            if offset % alignment:
                raise self.damaged(f"the tensor {name!r} begins at {offset}, not a multiple of {alignment}")
            if tensor.offset + tensor.nbytes > self.size:
                raise CheckpointError(
                    f"{self.path} is cut off: the tensor {name!r} ends at byte {tensor.offset + tensor.nbytes:,}, "
                    f"the file has {self.size:,}"
                )
            tensors.append(tensor)
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end and tensor.nbytes:  # else a small file could announce a huge model
                raise self.damaged(f"the tensors {before!r} and {tensor.name!r} overlap")
            end, before = max(end, tensor.offset + tensor.nbytes), tensor.name
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self.damaged("two tensors have the same name")
        return GGUFHeader(metadata, tensors)

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, n_dims = self.text(), self.number("I")
        if not 1 <= n_dims <= 4:
            raise self.damaged(f"the tensor {name!r} has {n_dims} dimensions; 1 to 4 are possible")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        type_number, offset = self.number("I"), self.number("Q")
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise self.damaged(f"the tensor {name!r} has the unknown type {type_number}") from None
        if 0 in shape and math.prod(max(n, 1) for n in shape) >= 2**59:  # torch cannot count its strides
            raise self.damaged(f"the tensor {name!r} of shape {shape} is larger than any tensor can be")
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self.damaged(f"rows of {shape[-1]} do not fit {kind.name} blocks in the tensor {name!r}")
        return name, shape, kind, offset

    def value(self, type_number: int) -> Any:
        if type_number == GGUFValueType.STRING:
            return self.text()
        if type_number in _NUMBERS:
            return self.number(_NUMBERS[type_number])
        if type_number != GGUFValueType.ARRAY:
            raise self.damaged(f"unknown value type {type_number}")
        item_type, count = self.number("I"), self.number("Q")
        if count > MAX_ITEMS:
            raise self.damaged(f"an array of {count:,} items; at most {MAX_ITEMS:,} are allowed")
        if item_type == GGUFValueType.STRING:
            self.announce(8 * count, "an array")  # each string has its length at least
            return [self.text() for _ in range(count)]
        if item_type not in _NUMBERS:
            raise self.damaged(f"unknown type {item_type} of an array's items")
        layout = _NUMBERS[item_type]
        return np.frombuffer(self.take(count * struct.calcsize(layout), "an array"), dtype=f"<{layout}").tolist()

    def number(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}"), "a number"))[0]

    def text(self) -> str:
        return self.take(self.number("Q"), "a text").decode("utf-8", errors="replace")

    def take(self, count: int, what: str) -> bytes:
        self.announce(count, what)
        return self.stream.read(count)

    def announce(self, count: int, what: str) -> None:
        position = self.stream.tell()
        if position + count > self.size:
            raise CheckpointError(
                f"{self.path} is cut off or damaged: {what} of {count:,} bytes at byte {position:,}, "
                f"the file has {self.size:,}"
            )

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what} (before byte {self.stream.tell():,})")


_NUMBERS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


def _value_type(value: object) -> GGUFValueType:
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    kinds |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    return kinds[type(value)]


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes
