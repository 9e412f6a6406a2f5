"""Importance matrices: how much each input of each matrix matters, so that its rounding errors go where they matter least.

Measured as llama.cpp does: the squares of what enters a matrix, summed over the tokens of a calibration text. Their mean is the
weight of a column's rounding errors: an error e in column j changes the output by e * x[j], in the mean square by e^2 * mean(x[j]^2).

Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmforge.convert.published import publish
from llmforge.errors import CheckpointError, ConfigError, ConvertError, DataError, shown, some
from llmforge.formats.gguf import GGUFTensor, read_gguf_header, read_gguf_tensors, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.models import LanguageModel
from llmforge.quant.ggml import FLOATS

CHUNK_TOKENS = 512  # llama-imatrix's
_BATCH_TOKENS = 2048  # in one forward pass; llama-imatrix's too
_SUMS, _COUNTS = ".in_sum2", ".counts"


class _Row(Protocol):
    """A TokenDataset: one long row of ids."""

    ids: npt.NDArray[Any]


Ids = _Row | Tensor | npt.NDArray[Any] | Sequence[int] | Iterable[Sequence[int]]


@dataclass(frozen=True)
class Importance:
    """Sums of squares of the inputs of matrices, by the matrices' GGUF names."""

    sums: dict[str, Tensor]  # (in_features) float32
    counts: dict[str, int]  # tokens that went into each sum
    chunk_tokens: int = CHUNK_TOKENS  # the text was read in pieces of that many tokens
    datasets: list[str] = field(default_factory=list)  # names of the calibration texts

    def notes(self, types: Mapping[str, str]) -> list[str]:
        """Which matrices of a file (name -> type of ggml) are rounded without having been measured."""
        rounded = [name for name, given in types.items() if given not in FLOATS and name.startswith("blk.")]
        missing = [name for name in rounded if name not in self.sums]
        if not missing:
            return []
        return [f"{len(missing)} of {len(rounded)} matrices are not in the importance matrix: {some(missing)}"]

    def fitting(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Mean squares (in_features) for those of a file's tensors (name -> shape) that were measured.

        A matrix that no token came through has ones, as in llama.cpp.

        Raises:
            ConvertError: a tensor of another width, or none that was measured: the importance is another model's.
        """
        means = {}
        for name in self.sums.keys() & shapes.keys():
            if self.sums[name].shape != (shapes[name][-1],):
                raise ConvertError(
                    f"the importance of {name} has {len(self.sums[name])} columns and the tensor {shapes[name][-1]}; "
                    "it was collected from another model"
                )
            count = self.counts[name]
            means[name] = self.sums[name] / count if count else torch.ones_like(self.sums[name])
        if not means:
            raise ConvertError(
                f"the importance is of {some(sorted(self.sums)) or 'no tensor'}, and the model has none of them; "
                "it was collected from another model"
            )
        return means

    def digest(self) -> str:
        """A fingerprint of what it says of each matrix."""
        digest = hashlib.sha256()
        for name, sums in sorted(self.sums.items()):
            digest.update(f"{name} {self.counts[name]} {sums.dtype} {tuple(sums.shape)}\n".encode())
            digest.update(sums.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __add__(self, other: "Importance") -> "Importance":
        """The importance of both texts together; chunk_tokens are those of the first.

        Raises:
            ConvertError: a matrix that is not equally wide in both.
        """
        sums, counts = dict(self.sums), dict(self.counts)
        for name, more in other.sums.items():
            if name in sums and sums[name].shape != more.shape:
                raise ConvertError(
                    f"the importances of {name} have {len(sums[name])} and {len(more)} columns; they are of different models"
                )
            sums[name] = sums[name] + more if name in sums else more
            counts[name] = counts.get(name, 0) + other.counts[name]
        return Importance(sums, counts, self.chunk_tokens, self.datasets + other.datasets)


def collect_imatrix(
    model: nn.Module,
    data: Ids,
    *,
    chunk_tokens: int | None = None,
    max_chunks: int | None = None,
    bos_token_id: int | None = None,
    process_output: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Run a model on a calibration text and measure what enters the matrices of its blocks, as llama-imatrix does.

    Args:
        model: of a known family, on any device and in any float type; it is as before afterwards. It runs without dropout, and under
            an autocast around the call; squares and sums are float32.
        data: a TokenDataset, or a row of ids: cut into chunks, each read from its beginning by a forward pass of its own; what is
            left at the end is dropped. Or several rows of ids (a list of lists, a 2-D tensor): these are the chunks.
        chunk_tokens: length of a chunk; None = 512, or the model's context if that is shorter.
        max_chunks: stop after so many; None = read all.
        bos_token_id: put at the beginning of each chunk, where it takes the place of one token of a long row; what llama-imatrix
            does if the tokenizer says so (`tokenizer.bos_token_id if tokenizer.add_bos else None`). None = nothing.
        process_output: measure the output projection too, where it is not the token embedding.
        progress: called with the tokens that were read so far, and all that will be.
    Returns:
        sums on the CPU, under GGUF names.
    Raises:
        ConvertError: a model of no known family, or one that computes infinity or NaN, with the name of the matrix.
        DataError: less than a chunk of text, a chunk that is too long or empty, or ids that the model does not have.
        ConfigError: a chunk_tokens that the model's context does not hold, or a max_chunks below 1.
    """
    if max_chunks is not None and max_chunks < 1:
        raise ConfigError(f"max_chunks ({max_chunks}) must be at least 1, or None for all of the text")
    names = _matrices(model)
    inner = cast(LanguageModel, getattr(model, "_orig_mod", model))  # torch.compile(model) is a wrapper
    has_output = names.pop("output.weight", None) is not None
    size = _chunk_size(chunk_tokens, inner.context_length, bos_token_id)
    chunks = _chunks(data, size, bos_token_id)[:max_chunks]
    extra = int(bos_token_id is not None)
    done, total = 0, sum(len(chunk) + extra for chunk in chunks)
    device, vocab_size = next(inner.parameters()).device, inner.lm_head.out_features

    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        squares = x.float().reshape(-1, x.shape[-1]).square().sum(0)  # (in_features)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] = counts.get(name, 0) + x.shape[:-1].numel()

    with torch.no_grad(), _evaluating(inner), _listening(inner, names, add):
        for batch in _batches(chunks, bos_token_id):
            low, high = int(batch.min()), int(batch.max())
            if low < 0 or high >= vocab_size:
                raise DataError(
                    f"the data has id {low if low < 0 else high}, the model only 0 to {vocab_size - 1}; take the tokenizer that it was "
                    "trained with"
                )
            hidden = inner.features(
                torch.from_numpy(batch).to(device)
            )  # what is compiled is the call of the model: no hooks there
            if process_output and has_output:
                add("output.weight", hidden)
            for name, total_squares in sums.items():
                if not total_squares.isfinite().all():
                    raise ConvertError(
                        f"the squares of what enters {name} add up to infinity or NaN after {done + batch.size:,} tokens: the model "
                        "diverged, or needs float32 instead of a 16-bit type"
                    )
            done += batch.size
            if progress is not None:
                progress(done, total)
    longest = max(map(len, chunks)) + extra
    return Importance({name: sums[name].cpu() for name in sums}, counts, chunk_tokens=longest)


def write_imatrix(path: str | os.PathLike[str], importance: Importance) -> None:
    """Write a file as llama-imatrix does, for `llama-quantize --imatrix`; it appears under its name when it is complete.

    Raises:
        ConvertError: there is nothing to write.
        WriteError: the file cannot be written.
    """
    if not importance.sums:
        raise ConvertError(f"{path} would be empty: the importance has no matrix")
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": importance.datasets or [""],  # llama-quantize wants the key; the writer has no empty arrays
        "imatrix.chunk_count": max(importance.counts.values()) // importance.chunk_tokens,
        "imatrix.chunk_size": importance.chunk_tokens,
    }
    tensors = []
    for name in sorted(importance.sums):
        count = torch.tensor([float(importance.counts[name])])
        tensors.append(GGUFTensor(name + _SUMS, "F32", LazyTensor.of(importance.sums[name])))
        tensors.append(GGUFTensor(name + _COUNTS, "F32", LazyTensor.of(count)))
    write_gguf(path, "imatrix", metadata, tensors)


def read_imatrix(path: str | os.PathLike[str]) -> Importance:
    """Read a file of `write_imatrix` or of llama-imatrix.

    Raises:
        CheckpointError: not such a file, or a damaged one.
        ConvertError: a file that llmforge has no use for: in the old format, or of a mixture of experts.
    """
    path = Path(path)
    try:
        header = read_gguf_header(path)
    except CheckpointError as error:
        if _is_legacy(path):
            raise ConvertError(
                f"{path} is an importance matrix in llama.cpp's old format; convert it with llama-imatrix --in-file "
                f"{path} -o {path.with_suffix('.gguf')}"
            ) from error
        raise
    kind, size = header.metadata.get("general.type"), header.metadata.get("imatrix.chunk_size")
    if kind != "imatrix" or type(size) is not int or size < 1:
        raise CheckpointError(
            f"{path} is not an importance matrix: general.type is {shown(kind)} and imatrix.chunk_size {shown(size)}; "
            "llmforge imatrix and llama-imatrix write them"
        )
    tensors = read_gguf_tensors(path, header)
    types = {info.name: info.type_name for info in header.tensors}
    measured = {name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)}
    counted = {name.removesuffix(_COUNTS) for name in tensors if name.endswith(_COUNTS)}
    if measured != counted or not measured:
        odd = some(sorted(measured ^ counted)) or "any matrix"
        raise CheckpointError(f"{path} is damaged: it must have both sums and counts, and has not of {odd}")
    sums, counts = {}, {}
    for name in sorted(measured):
        if types[name + _SUMS] != "F32" or types[name + _COUNTS] != "F32":
            raise CheckpointError(f"{path} is damaged: sums and counts of {name} must be F32")
        count = tensors[name + _COUNTS].read().reshape(-1)
        if len(count) > 1:
            raise ConvertError(
                f"{path} counts {len(count)} matrices in {name}: it is of a mixture of experts, which no model here is"
            )
        values = tensors[name + _SUMS].read().reshape(-1).clone()
        for what, numbers in (("sums", values), ("count", count)):
            if not len(numbers) or not (numbers.isfinite().all() and (numbers >= 0).all()):
                raise CheckpointError(f"{path} is damaged: the {what} of {name} must be finite, and 0 or more")
        sums[name], counts[name] = values, round(count.item())
    datasets = header.metadata.get("imatrix.datasets")
    named = [name for name in datasets if isinstance(name, str) and name] if isinstance(datasets, list) else []
    return Importance(sums, counts, chunk_tokens=size, datasets=named)


def _matrices(model: nn.Module) -> dict[str, str]:
    """GGUF name -> our module, for the matrices of the blocks and the output projection, in the order of the model.

    Token embeddings are looked up, not multiplied; and an output projection that is one has its name in a GGUF file.
    """
    published = publish(model)
    matrices = {}
    for own_name, tensor in published.tensors.items():
        name = published.family.gguf_name(own_name)
        if len(tensor.shape) == 2 and (name.startswith("blk.") or name == "output.weight"):
            matrices[name] = own_name.removesuffix(".weight")
    return matrices


@contextmanager
def _listening(model: nn.Module, names: Mapping[str, str], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `add` with a matrix's name and what enters it, whenever one is used."""
    shared: dict[nn.Module, list[str]] = {}
    for name, own_name in names.items():
        shared.setdefault(model.get_submodule(own_name), []).append(name)
    handles = []
    try:
        for module, its_names in shared.items():
            handles.append(module.register_forward_pre_hook(_hook(its_names, add)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(names: Sequence[str], add: Callable[[str, Tensor], None]) -> Callable[[nn.Module, Any], None]:
    turns = cycle(
        names
    )  # a layer that stands in several places is used in their order; a GGUF file has a copy for each

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(next(turns), args[0])

    return hook


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has the one that it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _chunk_size(chunk_tokens: int | None, context: int, bos_token_id: int | None) -> int:
    """Most tokens of a chunk, with the one at its beginning."""
    size = min(CHUNK_TOKENS, context) if chunk_tokens is None else chunk_tokens
    least = 1 if bos_token_id is None else 2
    if not least <= size <= context:
        raise ConfigError(f"chunk_tokens ({size}) must be {least} to {context}, the model's context; 512 is usual")
    return size


def _chunks(data: Ids, size: int, bos_token_id: int | None) -> list[npt.NDArray[Any]]:
    """The chunks of a text without the token at their beginning; those of a long row are views."""
    extra = int(bos_token_id is not None)
    ids: Any = getattr(data, "ids", data)
    if isinstance(ids, Tensor):
        ids = ids.cpu().numpy()
    if not isinstance(ids, np.ndarray):
        ids = list(ids)
        if all(np.ndim(item) == 0 for item in ids[:1]):
            ids = np.array(ids) if ids else np.array([], np.int64)
    if isinstance(ids, np.ndarray) and ids.ndim == 1:
        # The chunks of bos + ids, where the first token of each is then made bos.
        chunks = [ids[start : start + size - extra] for start in range(0, len(ids) + extra - size + 1, size)]
        if not chunks:
            raise DataError(
                f"the text has {len(ids):,} tokens, and a chunk {size - extra:,}; take a smaller chunk_tokens, or more text"
            )
    else:
        chunks = [item.cpu().numpy() if isinstance(item, Tensor) else np.asarray(item) for item in ids]
        if not chunks:
            raise DataError("the text has no chunk; give at least one row of ids")
    for i, chunk in enumerate(chunks):
        if chunk.ndim != 1 or chunk.dtype.kind not in "iu":
            raise DataError(f"chunk {i} is {chunk.dtype} of shape {chunk.shape}, but must be one row of whole numbers")
        if not 1 <= len(chunk) <= size - extra:
            raise DataError(
                f"chunk {i} has {len(chunk):,} tokens, but must have 1 to {size - extra:,}; cut it, or change chunk_tokens"
            )
    return chunks


def _batches(chunks: Sequence[npt.NDArray[Any]], bos_token_id: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Some chunks of one length at a time, as (B, T), with the token at their beginning."""
    extra = int(bos_token_id is not None)
    for length, group in groupby(chunks, key=len):
        rows = list(group)
        step = max(1, _BATCH_TOKENS // (length + extra))
        for start in range(0, len(rows), step):
            some_rows = rows[start : start + step]
            batch = np.empty((len(some_rows), extra + length), np.int64)
            batch[:, extra:] = some_rows
            if bos_token_id is not None:
                batch[:, 0] = bos_token_id
            yield batch


def _is_legacy(path: Path) -> bool:
    """Whether a file begins like the old format: the number of matrices, the length of a name, the name."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(8)
            n_entries, length = struct.unpack("<ii", begin) if len(begin) == 8 else (0, 0)
            name = stream.read(length) if n_entries > 0 and 0 < length < 256 else b""
    except OSError:
        return False
    return len(name) == length > 0 and name.isascii() and name.endswith(b".weight")
