"""TokenDataset: ids on disk to batches, each a pure function of (seed, step, rank)."""

import hashlib
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmforge.data.token_file import write_token_file
from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers import Tokenizer
from llmforge.tokenizers.text_files import find_texts


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
    Raises:
        DataError: ids of another shape or dtype.
    """

    def __init__(
        self, ids: npt.NDArray[Any], *, vocab_size: int | None = None, bytes_per_token: float | None = None
    ) -> None:
        self.ids = np.asarray(ids)  # a plain view of a memmap: the same mapping, sliced faster
        if self.ids.ndim != 1 or self.ids.dtype not in (np.uint16, np.uint32):
            raise DataError(
                f"ids must be one row of uint16 or uint32, not {self.ids.dtype} of shape {self.ids.shape}; use np.uint32(ids)"
            )
        self.vocab_size = vocab_size
        self.bytes_per_token = bytes_per_token

    @classmethod
    def from_text_file(
        cls, path: str | os.PathLike[str], tokenizer: Tokenizer, *, cache_dir: str | os.PathLike[str] | None = None
    ) -> "TokenDataset":
        """The ids of a UTF-8 text file; of a folder, see `from_text_folder`.

        The text is taken as it stands, line ends too; only a byte order mark at its start is dropped. The ids are written to a
        file once, a few megabytes of text at a time, and used again for the same text and tokenizer.

        Args:
            cache_dir: folder for the ids; None = the folder tokens in $LLMFORGE_CACHE or ~/.cache/llmforge.
        Raises:
            DataError: no such file, empty, not UTF-8 (with the position of the byte), or a character that the tokenizer lacks.
        """
        if Path(path).is_dir():
            return cls.from_text_folder(path, tokenizer, cache_dir=cache_dir)
        return cls._from_texts(find_texts(path), tokenizer, end_of_text=None, cache_dir=cache_dir)

    @classmethod
    def from_text_folder(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        pattern: str = "**/*.txt",
        cache_dir: str | os.PathLike[str] | None = None,
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
        return cls._from_texts(texts, tokenizer, end_of_text=tokenizer.eos_token_id, cache_dir=cache_dir)

    @classmethod
    def _from_texts(
        cls,
        texts: list[Path],
        tokenizer: Tokenizer,
        *,
        end_of_text: int | None,
        cache_dir: str | os.PathLike[str] | None,
    ) -> "TokenDataset":
        file = write_token_file(texts, tokenizer, end_of_text=end_of_text, cache_dir=cache_dir)
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
        """Training and validation data, as nanoGPT does it: the last part is for validation. Views, no copies."""
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction ({val_fraction}) must be between 0 and 1, for example 0.1")
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
        if step < 0 or batch_size < 1 or seq_len < 1 or not 0 <= rank < world_size or not 0 <= seed < 2**32:
            raise ConfigError(
                f"no batch for {step=}, {batch_size=}, {seq_len=}, {seed=}, {rank=}, {world_size=}; see TokenDataset.batch"
            )
        if len(self) < seq_len + 1:
            raise DataError(
                f"the data has {len(self):,} tokens, and a window of seq_len {seq_len} needs {seq_len + 1:,}; "
                f"use a smaller block_size (seq_len), or more text"
            )
        # Every epoch has the same number of windows, and leaves room for the phase: a window or more, where the data is long enough.
        n_windows = max(1, len(self) // seq_len - 1)
        n_phases = len(self) - n_windows * seq_len
        windows = np.empty((batch_size, seq_len + 1), np.int64)
        first = (step * world_size + rank) * batch_size
        for row, sample in zip(windows, range(first, first + batch_size), strict=True):
            epoch, place = divmod(sample, n_windows)
            phase, order = _epoch(seed, epoch, n_windows, n_phases)
            start = phase + int(order[place]) * seq_len
            row[:] = self.ids[start : start + seq_len + 1]
        if self.vocab_size is not None and (highest := int(windows.max())) >= self.vocab_size:
            raise DataError(
                f"the data has id {highest}, the vocabulary only {self.vocab_size} tokens; it was made with another tokenizer"
            )
        ids = torch.from_numpy(windows)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@lru_cache(maxsize=4)  # those at work: a step may end one epoch and begin the next, in training and in validation data
def _epoch(seed: int, epoch: int, n_windows: int, n_phases: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Phase and order of the windows of one epoch."""
    # numpy froze the stream of RandomState: the same batches with any version, now and when a run is resumed next year.
    random = np.random.RandomState([seed, epoch])
    return int(random.randint(n_phases, dtype=np.int64)), random.permutation(n_windows)
