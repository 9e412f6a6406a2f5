"""safetensors: named tensors in one file, or in shards with an index.

A file is a little-endian u64 (length of the header), a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes.
Reader and writer are our own, tested against the safetensors package, for what that package (0.8) does not do: a damaged header ends
in a message that says what is wrong; a mapping ends with its tensor, so that reading a checkpoint does not fill the memory; writing
takes some rows of a tensor at a time, `save_file` all tensors, and a full disk is reported as such.

Source: https://huggingface.co/docs/safetensors (format), Hugging Face's model.safetensors.index.json.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmforge.config import read_json_object
from llmforge.errors import CheckpointError, ConfigError
from llmforge.formats.atomic import AppendedFile
from llmforge.formats.lazy import LazyTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000  # as the safetensors package
MAX_TENSORS = 65_536  # many times what the largest published models have

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors file, or of a folder with model.safetensors or its index.

    Only the headers are read here. A tensor that is read as a whole is mapped into memory, and unmapped with its last reference.

    Raises:
        CheckpointError: no such file, or one that is cut off or damaged, with its name and what is wrong.
    """
    path = Path(path)
    if path.is_file():
        return _read_entries(path)
    if (path / SINGLE_FILE).is_file():
        return _read_entries(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _read_index(path / INDEX_FILE)
    raise CheckpointError(f"{path} has no {SINGLE_FILE} and no {INDEX_FILE}")


def write_safetensors(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, LazyTensor],
    *,
    max_shard_bytes: int | None = 5_000_000_000,
    marks: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write model.safetensors into an existing folder, or shards and their index where one file would be too large.

    Args:
        folder: not made atomic here; write into the folder that `atomic_folder` or `resumable_folder` yields.
        tensors: read one by one, and some rows at a time: memory for a single tensor is needed where it has no `read_rows`.
        max_shard_bytes: most bytes of tensors in a file (a single larger tensor has a file of its own); None = always one file.
        marks: of `resumable_folder`: tensors that a killed process has written are not read again.
        progress: called with the number of bytes that are written, and of all.
    """
    folder = Path(folder)
    shards = _shards(tensors, max_shard_bytes)
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0], marks, written)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, marks, written)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, LazyTensor], max_bytes: int | None) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    room = max_bytes if max_bytes is not None else math.inf
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_bytes if max_bytes is not None else math.inf
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_file(
    path: Path, tensors: Mapping[str, LazyTensor], marks: Path | None, written: Callable[[int], None]
) -> None:
    # Wide types first, as the safetensors package does it: so each tensor is aligned to its own type.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on "format"
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with AppendedFile(path, marks, len(text).to_bytes(8, "little") + text) as out:
        for name in names:
            tensor = tensors[name]
            if out.skip(tensor.nbytes):
                written(tensor.nbytes)
                continue
            end = out.position + tensor.nbytes
            for block in tensor.blocks():
                assert block.dtype == tensor.dtype, name
                out.write(block.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
                written(block.nbytes)
            assert out.position == end, name
            out.mark()


def _read_index(index: Path) -> dict[str, LazyTensor]:
    """Entries of all shards that an index.json lists; its file names must not lead out of the folder."""
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    entries: dict[str, LazyTensor] = {}
    for file, listed in sorted(files.items()):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r}; a shard must be a .safetensors file in the same folder")
        if len(file) > 200 or not (index.parent / file).is_file():  # of longer names some systems do not want to hear
            raise CheckpointError(f"{index} names {file}, which is not there; download or copy it again")
        shard = _read_entries(index.parent / file)
        if shard.keys() != listed:
            name = min(shard.keys() ^ listed)
            where = f"is in {file} but not listed there" if name in shard else f"is not in {file} as listed there"
            raise CheckpointError(f"{index} does not fit its shards: {name!r} {where}")
        entries.update(shard)
    return entries


def _read_entries(file: Path) -> dict[str, LazyTensor]:
    """Read and check the header of one file."""

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged: {what}")

    def cut_off(announced: int, size: int) -> CheckpointError:
        return CheckpointError(f"{file} is cut off: the header announces {announced:,} bytes, the file has {size:,}")

    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{file} is cut off: it has {size} bytes, a header alone needs more")
            if header_bytes == int.from_bytes(b"version ", "little"):
                raise CheckpointError(
                    f"{file} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise damaged(f"a header of {header_bytes:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed")
            if 8 + header_bytes > size:
                raise cut_off(8 + header_bytes, size)
            header = json.loads(stream.read(header_bytes).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of which UnicodeDecodeError and JSONDecodeError are
        raise damaged(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(f"its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise damaged(f"{len(header):,} tensors, at most {MAX_TENSORS:,} are allowed")

    entries, spans = {}, []
    for name, value in header.items():
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"the entry of {name!r} must have dtype, shape and data_offsets")
        if not isinstance(value["dtype"], str) or value["dtype"] not in _DTYPES:
            raise damaged(f"{name!r} has the unknown dtype {value['dtype']!r}; known: {', '.join(_DTYPES)}")
        if not _are_sizes(value["shape"]) or not _are_sizes(value["data_offsets"]) or len(value["data_offsets"]) != 2:
            raise damaged(f"shape and data_offsets of {name!r} must be lists of whole numbers")
        dtype, shape, (start, end) = _DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        if 0 in shape and math.prod(max(n, 1) for n in shape) >= 2**59:  # torch cannot count its strides
            raise damaged(f"{name!r} of shape {shape} is larger than any tensor can be")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise damaged(f"{name!r} of shape {shape} and {value['dtype']} cannot fill bytes {start} to {end}")
        entries[name] = LazyTensor.in_file(file, dtype, shape, 8 + header_bytes + start)
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise damaged(f"{name!r} starts at byte {start:,} of the data, the tensor before it ends at {position:,}")
        position = end
    announced = 8 + header_bytes + position
    if announced > size:
        raise cut_off(announced, size)
    if announced < size:
        raise damaged(f"{size - announced:,} bytes follow the last tensor")
    return entries


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list) or len(values) > 64:  # torch's most dimensions; keeps the product below small
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values
