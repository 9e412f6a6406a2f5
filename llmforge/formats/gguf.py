"""GGUF: llama.cpp's file of metadata and tensors, version 3, little-endian.

Written on the gguf package, one tensor at a time. Read with checks of our own: `gguf.GGUFReader` trusts the counts that it finds,
so that a damaged file can keep it busy for ever.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from llmforge.errors import CheckpointError, ConvertError
from llmforge.formats.atomic import AppendedFile, resumable_file
from llmforge.formats.lazy import LazyTensor
from llmforge.quant.ggml import FLOATS, block_shape, can_decode, decode, encode

ALIGNMENT = 32  # bytes; another one needs general.alignment, and older readers ignore that
MAX_ENTRIES = 65_536  # tensors, or metadata keys: many times what the largest published files have
MAX_ITEMS = 1 << 24  # of an array; vocabularies have some hundred thousand
_CHUNK = 1 << 22  # values that are encoded or decoded at a time; on a GPU more, or it has too little to do
_CHUNK_CUDA = 1 << 25


ValueType = tuple[GGUFValueType, GGUFValueType | None]  # of a metadata value; of an array's items


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write: weights of any float type, or (uint8) rows of bytes that are in the type already."""

    name: str
    type_name: str  # "F32", "Q8_0", "Q4_K" ...
    tensor: LazyTensor
    importance: Tensor | None = None  # (n), of the columns; see `quant.ggml.encode`

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        *rows, n = self.tensor.shape
        block, block_bytes = block_shape(self.type_name)
        return (*rows, n // block_bytes * block) if self.tensor.dtype == torch.uint8 else self.tensor.shape


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
    types: dict[str, ValueType] = field(default_factory=dict)  # of the metadata


def write_gguf(
    path: str | os.PathLike[str],
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Iterable[GGUFTensor],
    *,
    types: Mapping[str, ValueType] | None = None,
    progress: Callable[[int, int], None] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Write a GGUF file; it appears under its name when it is complete.

    Args:
        arch: general.architecture.
        metadata: an int is written as u32, a float as f32, a list of ints as i32: the types that llama.cpp insists on.
        tensors: names are unique and have at most 63 bytes; rows are multiples of their type's block.
        types: of metadata that is written as another type.
        progress: called with the number of weights that are written, and of all.
        inputs: what the tensors are made from, see `resumable_file`: then those that a killed process has written are not made
            again.
    Raises:
        ConvertError: a value that a tensor's type cannot hold, with the tensor's name.
        WriteError: the file cannot be written.
    Memory: some megabytes of a tensor; the largest one that has no `read_rows`.
    """
    tensors, types = list(tensors), types or {}
    with resumable_file(path, inputs) as unfinished:
        file, marks = unfinished.path, unfinished.marks
        header = file if marks is None else marks / "header"
        writer = GGUFWriter(header, arch)
        for key, value in metadata.items():
            value_type, item_type = types[key] if key in types else (_value_type(value), None)
            writer.add_key_value(key, _encoded(value), value_type, item_type)
        for tensor in tensors:
            kind, shape = GGMLQuantizationType[tensor.type_name], tensor.shape
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), _nbytes(shape, kind), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        done, total = 0, sum(math.prod(tensor.shape) for tensor in tensors)
        # Not writer.write_tensor_data: numpy's tofile does not say why it fails (full disk, size limit).
        with AppendedFile(file, marks, header.read_bytes()) as out:
            for tensor in tensors:
                block, block_bytes = block_shape(tensor.type_name)
                size = math.prod(tensor.shape) // block * block_bytes
                padding = -out.position % ALIGNMENT
                if out.skip(padding + size):
                    done += math.prod(tensor.shape)
                    continue
                out.write(b"\0" * padding)
                for piece in _pieces(tensor):
                    out.write(piece.cpu().numpy().data)
                    done += piece.numel() // block_bytes * block
                    if progress is not None:
                        progress(done, total)
                out.mark()
            out.write(b"\0" * (-out.position % ALIGNMENT))


def _pieces(tensor: GGUFTensor) -> Iterable[Tensor]:
    """The bytes of a tensor, some rows at a time."""
    values = tensor.tensor
    if not values.numel:
        return
    if values.read_rows is None:
        values = LazyTensor.of(values.read())
    chunk = _CHUNK_CUDA if values.rows(0, 1).is_cuda else _CHUNK
    for piece in values.blocks(max_bytes=chunk * values.dtype.itemsize):
        if piece.dtype == torch.uint8:
            yield piece.contiguous()
            continue
        try:
            yield encode(piece.detach(), tensor.type_name, importance=tensor.importance)
        except ConvertError as error:
            raise ConvertError(f"{tensor.name}: {error}") from error


def read_gguf_tensors(path: str | os.PathLike[str], header: "GGUFHeader") -> dict[str, LazyTensor]:
    """The tensors of a file by name: floats as they are, other types decoded to float32 when they are read.

    Raises:
        CheckpointError: a type that cannot be decoded.
    """
    return {info.name: _lazy(Path(path), info) for info in header.tensors}


def read_gguf_bytes(path: str | os.PathLike[str], info: GGUFTensorInfo) -> LazyTensor:
    """A tensor of a file as it lies there: (.., bytes of a row) uint8."""
    block, block_bytes = block_shape(info.type_name)
    shape = (*info.shape[:-1], info.shape[-1] // block * block_bytes)
    return LazyTensor.in_file(Path(path), torch.uint8, shape, info.offset)


def _lazy(path: Path, info: GGUFTensorInfo) -> LazyTensor:
    if not can_decode(info.type_name):
        raise CheckpointError(
            f"{path} has the tensor {info.name!r} in {info.type_name}, which cannot be decoded; take a file of another type"
        )
    if info.type_name in FLOATS:
        return LazyTensor.in_file(path, FLOATS[info.type_name], info.shape, info.offset)
    data = read_gguf_bytes(path, info)
    by_row = data.read_rows

    def read() -> Tensor:
        values, done = torch.empty(data.num_rows, info.shape[-1]), 0
        step = max(1, _CHUNK // max(1, info.shape[-1]))
        for rows in data.blocks(max_bytes=step * data.row_length):
            values[done : done + len(rows)] = decode(rows, info.type_name)
            done += len(rows)
        return values.view(info.shape)

    def read_rows(start: int, stop: int) -> Tensor:
        return decode(data.rows(start, stop), info.type_name)

    return LazyTensor(info.shape, torch.float32, read, read_rows if by_row is not None else None)


def read_gguf_header(path: str | os.PathLike[str], *, exact_text: bool = False) -> GGUFHeader:
    """Read metadata and the list of tensors.

    Args:
        exact_text: keep bytes that are not UTF-8 (as lone surrogates), to write them again; otherwise they become U+FFFD.
    Raises:
        CheckpointError: not a GGUF file, or one that is cut off or damaged, with the byte position.
    """
    try:
        with Path(path).open("rb") as stream:
            return _HeaderReader(stream, Path(path), "surrogateescape" if exact_text else "replace").read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


class _HeaderReader:
    """Reads front to back; no count or length is believed that the rest of the file could not hold."""

    def __init__(self, stream: BinaryIO, path: Path, text_errors: str) -> None:
        self.stream, self.path, self.text_errors = stream, path, text_errors
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
        types: dict[str, ValueType] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in metadata:
                raise self.damaged(f"the key {key!r} occurs twice")
            metadata[key], types[key] = self.value(self.number("I"))
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
        return GGUFHeader(metadata, tensors, types)

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

    def value(self, type_number: int) -> tuple[Any, ValueType]:
        if type_number == GGUFValueType.STRING:
            return self.text(), (GGUFValueType.STRING, None)
        if type_number in _NUMBERS:
            return self.number(_NUMBERS[type_number]), (GGUFValueType(type_number), None)
        if type_number != GGUFValueType.ARRAY:
            raise self.damaged(f"unknown value type {type_number}")
        item_type, count = self.number("I"), self.number("Q")
        if count > MAX_ITEMS:
            raise self.damaged(f"an array of {count:,} items; at most {MAX_ITEMS:,} are allowed")
        if item_type != GGUFValueType.STRING and item_type not in _NUMBERS:
            raise self.damaged(f"unknown type {item_type} of an array's items")
        value_type = (GGUFValueType.ARRAY, GGUFValueType(item_type))
        if item_type == GGUFValueType.STRING:
            self.announce(8 * count, "an array")  # each string has its length at least
            return [self.text() for _ in range(count)], value_type
        layout = _NUMBERS[item_type]
        data = self.take(count * struct.calcsize(layout), "an array")
        return np.frombuffer(data, dtype=f"<{layout}").tolist(), value_type

    def number(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}"), "a number"))[0]

    def text(self) -> str:
        return self.take(self.number("Q"), "a text").decode("utf-8", errors=self.text_errors)

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


def _encoded(value: Any) -> Any:
    """Texts with bytes that are not UTF-8 as they were read."""
    if isinstance(value, list):
        return [_encoded(item) for item in value] if value and isinstance(value[0], str) else value
    return value.encode("utf-8", errors="surrogateescape") if isinstance(value, str) else value


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes
