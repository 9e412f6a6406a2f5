"""TokenDataset: ids on disk to batches, each a pure function of (seed, step, rank)."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmforge.data.joined import JoinedIds
from llmforge.data.near_duplicates import NearDuplicates
from llmforge.data.token_file import DOCUMENTS, Progress, TokenFile, write_document_files, write_token_file
from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers import Tokenizer
from llmforge.tokenizers.sources import Source, text_sources
from llmforge.tokenizers.text_files import find_texts

# A document of so many bytes of text is long: a split takes a part of it. Of shorter ones it takes whole ones, if there are so many, for
# each that it takes.
_LONG_BYTES, _FEW = 2**16, 10


class Batch(NamedTuple):
    """Inputs and what follows them: targets[b, t] is the id after idx[b, t]."""

    idx: Tensor  # (batch_size, seq_len) int64
    targets: Tensor  # (batch_size, seq_len) int64


class TokenDataset:
    """One long row of token ids, in memory or mapped from a file.

    >>> data = TokenDataset(np.arange(100, dtype=np.uint16))
    >>> idx, targets = data.batch(0, batch_size=2, seq_len=8)
    >>> idx.shape, bool((targets == idx + 1).all())
    (torch.Size([2, 8]), True)

    Args:
        ids: (N,) uint16 or uint32.
        vocab_size: ids are below it; None = unknown, and not checked.
        bytes_per_token: mean length of a token in UTF-8 bytes, for a loss in bits per byte; None = unknown.
        documents: of what `ids` is made, for `split`; None = one text.
    Raises:
        DataError: ids of another shape or dtype.
    """

    def __init__(
        self,
        ids: "npt.NDArray[Any] | JoinedIds",
        *,
        vocab_size: int | None = None,
        bytes_per_token: float | None = None,
        documents: "DocumentTable | None" = None,
    ) -> None:
        # A plain view of a memmap: the same mapping, sliced faster.
        self.ids: Any = ids if isinstance(ids, JoinedIds) else np.asarray(ids)
        if self.ids.ndim != 1 or self.ids.dtype not in (np.uint16, np.uint32):
            raise DataError(
                f"ids must be one row of uint16 or uint32, not {self.ids.dtype} of shape {self.ids.shape}; use np.uint32(ids)"
            )
        self.vocab_size = vocab_size
        self.bytes_per_token = bytes_per_token
        self.documents = documents
        self._epochs: dict[tuple[int, int, int, int], tuple[int, npt.NDArray[np.int64]]] = {}

    @classmethod
    def from_sources(
        cls,
        sources: Source | Iterable[Source],
        tokenizer: Tokenizer,
        *,
        drop_near_duplicates: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> "TokenDataset":
        """The ids of text from several places, as one row, or with weights as a mixture.

            TokenDataset.from_sources(["a.txt", "books/", {"path": "table.csv", "field": "body"}], tokenizer)
            TokenDataset.from_sources([{"path": "wiki.jsonl", "weight": 2}, {"path": "books/", "weight": 1}], tokenizer)

        Text files, records (JSON Lines, JSON, CSV, TSV, Parquet), folders and data sets of the Hub; see `TextSource`. Each file and each
        record is a document: the tokenizer's end-of-text id follows it. One text file alone is as with `from_text_file`. Ids are written
        once for each file, in constant memory, and what a killed process has done is kept.

        Args:
            drop_near_duplicates: leave out lines that are nearly the same as an earlier one, of 32 characters or more; see
                `NearDuplicates`. A token file then depends on the texts before it.
            cache_dir: see `from_text_file`.
            progress: called with the bytes that are read and those to read.
        Raises:
            ConfigError: no source, or weights for some of them only.
            DataError: as `from_text_file`; a record that is malformed or lacks the field, with its file and line.
        """
        named = text_sources(sources)
        groups = [source.files() for source in named]
        if len(named) == 1 and named[0].is_text_file and not drop_near_duplicates:
            texts = find_texts(named[0].path)
            return cls._from_texts(texts, tokenizer, end_of_text=None, cache_dir=cache_dir, progress=progress)
        near_duplicates = NearDuplicates() if drop_near_duplicates else None
        files = write_document_files(
            groups, tokenizer, near_duplicates=near_duplicates, cache_dir=cache_dir, progress=progress
        )
        if named[0].weight is None:
            return cls._of_documents([file for group in files for file in group], tokenizer, "the texts have")
        parts = [
            cls._of_documents(group, tokenizer, f"{source.path} has")
            for source, group in zip(named, files, strict=True)
        ]
        return MixedDataset(parts, [source.weight or 0 for source in named], names=[source.path for source in named])

    @classmethod
    def _of_documents(cls, files: Sequence[TokenFile], tokenizer: Tokenizer, who: str) -> "TokenDataset":
        files = [file for file in files if file.num_tokens]
        if not files:
            raise DataError(
                f"{who} nothing to learn from: no document has text, or all of it was left out as near-duplicates"
            )
        ids = JoinedIds.of([np.memmap(file.path, dtype=file.dtype, mode="r").view(np.ndarray) for file in files])
        tables = [np.memmap(file.documents, DOCUMENTS, mode="r") for file in files if file.documents is not None]
        text_bytes = sum(file.text_bytes for file in files)
        return TokenDataset(
            ids,
            vocab_size=tokenizer.vocab_size,
            bytes_per_token=text_bytes / len(ids),
            documents=DocumentTable(ids, tables),
        )

    @classmethod
    def from_text_file(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> "TokenDataset":
        """The ids of a UTF-8 text file; of a folder, see `from_text_folder`; of other files, `from_sources`.

        The text is taken as it stands, line ends too; only a byte order mark at its start is dropped. The ids are written to a
        file once, a few megabytes of text at a time, and used again for the same text and tokenizer.

        Args:
            cache_dir: folder for the ids; None = the folder tokens in $LLMFORGE_CACHE or ~/.cache/llmforge.
            progress: called with the bytes that are read and those to read.
        Raises:
            DataError: no such file, empty, not UTF-8 (with the position of the byte), or a character that the tokenizer lacks.
        """
        if Path(path).is_dir():
            return cls.from_text_folder(path, tokenizer, cache_dir=cache_dir, progress=progress)
        return cls._from_texts(find_texts(path), tokenizer, end_of_text=None, cache_dir=cache_dir, progress=progress)

    @classmethod
    def from_text_folder(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        pattern: str = "**/*.txt",
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> "TokenDataset":
        """The ids of the text files of a folder, sorted by name, with the end-of-text id after each; see `from_text_file`.

        Args:
            pattern: which files, as in Path.glob; empty ones are left out.
        """
        if tokenizer.eos_token_id is None:
            raise DataError(
                "this tokenizer has no end-of-text token to put between documents; join the texts to one file"
            )
        texts = find_texts(folder, pattern)
        return cls._from_texts(
            texts, tokenizer, end_of_text=tokenizer.eos_token_id, cache_dir=cache_dir, progress=progress
        )

    @classmethod
    def _from_texts(
        cls,
        texts: list[Path],
        tokenizer: Tokenizer,
        *,
        end_of_text: int | None,
        cache_dir: str | os.PathLike[str] | None,
        progress: Progress | None,
    ) -> "TokenDataset":
        file = write_token_file(texts, tokenizer, end_of_text=end_of_text, cache_dir=cache_dir, progress=progress)
        ids = np.memmap(file.path, dtype=file.dtype, mode="r")
        return cls(ids, vocab_size=tokenizer.vocab_size, bytes_per_token=file.text_bytes / file.num_tokens)

    @classmethod
    def from_bin(
        cls, path: str | os.PathLike[str], *, dtype: str = "uint16", vocab_size: int | None = None
    ) -> "TokenDataset":
        """nanoGPT's train.bin or val.bin, as they are: ids and nothing else, mapped and not read.

        Args:
            dtype: "uint16" (nanoGPT's) or "uint32".
            vocab_size: refuse batches with an id that is not below it.
        Raises:
            DataError: no such file, or not whole ids.
        """
        if dtype not in ("uint16", "uint32"):
            raise ConfigError(f"dtype ({dtype!r}) must be 'uint16' or 'uint32'")
        try:
            size, item = Path(path).stat().st_size, np.dtype(dtype).itemsize
            if size == 0 or size % item:
                raise DataError(
                    f"{path} has {size:,} bytes, which is not a whole number of {dtype} ids; is it cut off, or another dtype?"
                )
            return cls(np.memmap(path, dtype=dtype, mode="r"), vocab_size=vocab_size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of length, dtype, and up to 64 evenly spaced blocks of 4096 ids: tells other data apart without reading all."""
        digest = hashlib.sha256(f"{self.ids.dtype} {len(self)}".encode())
        for start in range(0, len(self), max(4096, len(self) // 64)):
            digest.update(self.ids[start : start + 4096].tobytes())
        return digest.hexdigest()

    def split(self, *, val_fraction: float = 0.1) -> tuple["TokenDataset", "TokenDataset"]:
        """Training and validation data; views, no copies.

        Of one text the last part is for validation, as nanoGPT does it. Of documents (`from_sources`) those whose hash says so are,
        whatever else there is, so that files that are added move none; and the last part of each document of 64 KiB of text or more.
        Where there are few short documents (fewer than 10 / val_fraction), the last part of each of them is, too.
        """
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction ({val_fraction}) must be between 0 and 1, for example 0.1")
        if self.documents is not None:
            train, val = (
                TokenDataset(ids, vocab_size=self.vocab_size, bytes_per_token=num_bytes / max(1, len(ids)))
                for ids, num_bytes in self.documents.split(val_fraction)
            )
            return train, val
        cut = int(len(self) * (1 - val_fraction))
        train, val = (
            TokenDataset(part, vocab_size=self.vocab_size, bytes_per_token=self.bytes_per_token)
            for part in (self.ids[:cut], self.ids[cut:])
        )
        return train, val

    def batch(
        self, step: int, *, batch_size: int = 1, seq_len: int = 256, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """The batch of one step on one rank: a pure function of the arguments, so that a resumed run needs no state.

        The row is cut into windows of seq_len from a random phase on, and an epoch visits each of them once, in random order;
        the next epoch has another phase and order. Sample number (step * world_size + rank) * batch_size + b of this endless
        sequence is row b: no two ranks or steps of an epoch share a window.

        Args:
            batch_size: windows per rank.
            seed: 0 .. 2**32 - 1.
        Raises:
            ConfigError: a negative step or seed, a size below 1, or a rank outside 0 .. world_size - 1.
            DataError: fewer than seq_len + 1 ids, or an id that is not below vocab_size.
        """
        _check_batch(step, batch_size, seq_len, seed, rank, world_size)
        if len(self) < seq_len + 1:
            raise DataError(
                f"the data has {len(self):,} tokens, and a window of seq_len {seq_len} needs {seq_len + 1:,}; "
                f"use a smaller block_size (seq_len), or more text"
            )
        first = (step * world_size + rank) * batch_size
        samples = range(first, first + batch_size)
        return self._batch((self._row(sample, seq_len, seed) for sample in samples), batch_size, seq_len)

    def _row(self, sample: int, seq_len: int, seed: int) -> Any:
        """(seq_len + 1,) the ids of sample number `sample` of the endless sequence."""
        # Every epoch has the same number of windows, and leaves room for the phase: a window or more, where the data is long enough.
        n_windows = max(1, len(self) // seq_len - 1)
        n_phases = len(self) - n_windows * seq_len
        epoch, place = divmod(sample, n_windows)
        key = (seed, epoch, n_windows, n_phases)
        epochs = self._epochs
        if (
            key not in epochs
        ):  # two are kept: a step may end one epoch and begin the next; a new dict, for other threads' sake
            epochs = self._epochs = {**dict(list(epochs.items())[-1:]), key: _epoch(*key)}
        phase, order = epochs[key]
        start = phase + int(order[place]) * seq_len
        return self.ids[start : start + seq_len + 1]

    def _batch(self, rows: Iterable[Any], batch_size: int, seq_len: int) -> Batch:
        windows = np.empty((batch_size, seq_len + 1), np.int64)
        for window, row in zip(windows, rows, strict=True):
            window[:] = row
        if self.vocab_size is not None and (highest := int(windows.max())) >= self.vocab_size:
            raise DataError(
                f"the data has id {highest}, the vocabulary only {self.vocab_size} tokens; it was made with another tokenizer"
            )
        ids = torch.from_numpy(windows)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def _check_batch(step: int, batch_size: int, seq_len: int, seed: int, rank: int, world_size: int) -> None:
    if step < 0 or batch_size < 1 or seq_len < 1 or not 0 <= rank < world_size or not 0 <= seed < 2**32:
        raise ConfigError(
            f"no batch for {step=}, {batch_size=}, {seq_len=}, {seed=}, {rank=}, {world_size=}; see TokenDataset.batch"
        )


def _epoch(seed: int, epoch: int, n_windows: int, n_phases: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Phase and order of the windows of one epoch."""
    # numpy froze the stream of RandomState: the same batches with any version, now and when a run is resumed next year.
    random = np.random.RandomState([seed, epoch])
    return int(random.randint(n_phases, dtype=np.int64)), random.permutation(n_windows)


class DocumentTable:
    """Where the documents of a row of ids are.

    Args:
        ids: of token files, whole ones.
        tables: (D,) of `DOCUMENTS`, one for each of them.
    """

    def __init__(self, ids: JoinedIds, tables: Sequence[npt.NDArray[Any]]) -> None:
        self.ids = ids
        self.tables = tables

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def split(self, val_fraction: float) -> tuple[tuple[JoinedIds, float], tuple[JoinedIds, float]]:
        """The ids for training and for validation, and the bytes of text of each; see `TokenDataset.split`."""
        limit = np.uint64(int(val_fraction * 2**64))
        lowest = min((int(table["hash"].min()) for table in self.tables if len(table)), default=0)
        num_short = sum(int((table["bytes"] < _LONG_BYTES).sum()) for table in self.tables)
        few = num_short < _FEW / val_fraction
        parts: tuple[list[Any], list[Any]] = ([], [])
        num_bytes = [0.0, 0.0]
        for which, table in enumerate(self.tables):
            tokens = table["tokens"]
            begins, ends = np.cumsum(tokens) - tokens, np.cumsum(tokens)
            held_out = (table["hash"] < limit) | (table["hash"] == lowest)
            cuts = np.where(held_out, begins, ends)
            cut_up = (table["bytes"] >= _LONG_BYTES) | few
            # int() of one document's tokens, as a text alone is split
            cuts = np.where(cut_up, begins + (tokens * (1 - val_fraction)).astype(np.int64), cuts)
            shares = np.stack([cuts - begins, ends - cuts]) / np.maximum(tokens, 1)
            for i, (start, end) in enumerate(((begins, cuts), (cuts, ends))):
                num_bytes[i] += float((shares[i] * table["bytes"]).sum())
                parts[i].append((which, *_runs(start, end)))
        train, val = (
            JoinedIds(
                self.ids.arrays,
                np.concatenate([np.full(len(starts), which) for which, starts, _ in part]),
                np.concatenate([starts for _, starts, _ in part]),
                np.concatenate([lengths for _, _, lengths in part]),
            )
            for part in parts
        )
        return (train, num_bytes[0]), (val, num_bytes[1])


def _runs(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Starts and lengths of ranges in order, without empty ones and with neighbours as one."""
    some = ends > starts
    starts, ends = starts[some], ends[some]
    new = np.ones(len(starts), dtype=np.bool_)
    new[1:] = starts[1:] != ends[:-1]
    last = np.append(new[1:], True)[: len(starts)]
    return starts[new], ends[last] - starts[new]


class MixedDataset(TokenDataset):
    """Several data sets, from each of which a given share of the rows comes; made by `TokenDataset.from_sources` with weights.

    Rows of the sources alternate as evenly as their weights allow, whatever their lengths: a short source with a large weight is seen
    many times while a long one is seen once. Each is visited as a data set of its own, window after window of an epoch.

    Args:
        parts: the data sets.
        weights: of each, above 0.
        names: for errors.
    """

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[float], *, names: Sequence[str]) -> None:
        self.parts, self.names = list(parts), list(names)
        self.shares = [float(weight) / float(sum(weights)) for weight in weights]
        known = [part.bytes_per_token for part in parts]
        super().__init__(
            JoinedIds.of([part.ids for part in parts]),
            vocab_size=parts[0].vocab_size,
            bytes_per_token=sum(share * (length or 0) for share, length in zip(self.shares, known, strict=True)),
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of those of the parts, and of their shares."""
        parts = [f"{part.fingerprint} {share!r}" for part, share in zip(self.parts, self.shares, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def split(self, *, val_fraction: float = 0.1) -> tuple["TokenDataset", "TokenDataset"]:
        """Each part is split; see `TokenDataset.split`."""
        halves = [part.split(val_fraction=val_fraction) for part in self.parts]
        train, val = (MixedDataset(parts, self.shares, names=self.names) for parts in zip(*halves, strict=True))
        return train, val

    def batch(
        self, step: int, *, batch_size: int = 1, seq_len: int = 256, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """As `TokenDataset.batch`: sample number (step * world_size + rank) * batch_size + b is row b."""
        _check_batch(step, batch_size, seq_len, seed, rank, world_size)
        for part, name in zip(self.parts, self.names, strict=True):
            if len(part) < seq_len + 1:
                raise DataError(
                    f"{name} has {len(part):,} tokens in this part of the data, and a window of seq_len {seq_len} needs "
                    f"{seq_len + 1:,}; use a smaller block_size (seq_len), more text there, or leave it out"
                )
        first = (step * world_size + rank) * batch_size
        samples = self._samples(first, batch_size)
        return self._batch((self.parts[k]._row(j, seq_len, seed) for k, j in samples), batch_size, seq_len)

    def _samples(self, first: int, count: int) -> list[tuple[int, int]]:
        """Samples number first .. first + count - 1 of the mixture: the part of each, and its number in that part.

        Sample j of part k is due at the time (j + 1/2) / share; samples are in the order of their times, then of their parts.
        """

        def due(k: int, j: int) -> float:
            return (j + 0.5) / self.shares[k]

        # All samples that are due before some time shortly before the first one, then the others one by one.
        time = max(0, first - len(self.shares))
        counts = []
        for k, share in enumerate(self.shares):
            j = max(0, int(time * share + 0.5))
            while due(k, j) < time:
                j += 1
            while j > 0 and due(k, j - 1) >= time:
                j -= 1
            counts.append(j)
        samples = []
        number = sum(counts)
        assert number <= first
        while number < first + count:
            k = min(range(len(counts)), key=lambda k: due(k, counts[k]))
            if number >= first:
                samples.append((k, counts[k]))
            counts[k] += 1
            number += 1
        return samples
