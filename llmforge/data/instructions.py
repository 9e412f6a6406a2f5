"""InstructionDataset: examples of what to answer, as rows of documents with the loss on the answers only."""

import codecs
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmforge.config import did_you_mean
from llmforge.data.documents import Document, DocumentWriter
from llmforge.data.packing import RowPlan
from llmforge.data.records import (
    Continuation,
    Conversation,
    Example,
    Place,
    check_kind,
    example_of,
    kind_of,
    read_records,
)
from llmforge.errors import ConfigError, DataError, one_line
from llmforge.tokenizers import Tokenizer
from llmforge.tokenizers.templates import with_chat_template

TooLong = Literal["drop", "truncate", "error"]

_IGNORED = -100  # a target that carries no loss, as in training
_TOO_LONG = ("drop", "truncate", "error")
_CHUNK_RECORDS = 1_024  # tokenized together, on all cores
_MULTIPLE = 8  # unpacked rows are padded to one: what matrix kernels like
_MAX_REASONS = 20


class PackedBatch(NamedTuple):
    """Rows of documents: targets[b, t] is the id after idx[b, t] where that is to be learned, else -100."""

    idx: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64; 0 where a document begins, and where the padding does


@dataclass(frozen=True, kw_only=True)
class BadRecords:
    """What `skip_bad` left out."""

    count: int = 0
    reasons: tuple[str, ...] = ()  # the first ones, with file and line


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """What examples make in rows of seq_len tokens, for every epoch and seed."""

    seq_len: int
    num_rows: int  # of an epoch
    num_documents: int  # in them
    num_tokens: int  # of the documents, that is of all positions without padding
    num_answer_tokens: int  # of these, what is learned
    num_too_long: int  # examples longer than seq_len: left out, or cut; of plain text, made several documents
    num_without_answer: int  # examples left out since nothing is left of their answer
    max_answer_tokens_in_a_row: int  # no row of any epoch has more: what a loss on answers has to hold
    efficiency: float  # num_tokens as a part of num_rows x seq_len; unpacked batches have less padding than that


@dataclass(frozen=True)
class _Samples:
    """All examples, one after the other."""

    ids: npt.NDArray[np.uint32]  # (N,)
    learned: npt.NDArray[np.bool_]  # (N,)
    offsets: npt.NDArray[np.int64]  # (S + 1,)
    keys: npt.NDArray[np.uint64]  # (S,) hashes of the contents, whatever the tokenizer and the template
    files: tuple[Path, ...]
    places: npt.NDArray[np.int64]  # (S, 3): number of the file, line, record

    @cached_property
    def num_answer_tokens(self) -> npt.NDArray[np.int64]:
        """(S,)"""
        counts: npt.NDArray[np.int64] = np.add.reduceat(self.learned, self.offsets[:-1], dtype=np.int64)
        return counts

    @cached_property
    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for part in (self.ids, self.learned, self.offsets):
            digest.update(part.tobytes())
        return digest.digest()


class InstructionDataset:
    """Examples for tuning; made with `from_file` or `from_records`.

    >>> from llmforge.tokenizers import CharTokenizer
    >>> tokenizer = CharTokenizer.from_text("¿Qué? Nada.")
    >>> record = {"prompt": "¿Qué? ", "completion": "Nada."}
    >>> data = InstructionDataset.from_records([record], tokenizer)
    >>> "".join(text for text, learned in data.preview(0) if learned)
    'Nada.<|endoftext|>'
    >>> idx, targets, positions = data.batch(0, batch_size=1, seq_len=16)
    >>> tokenizer.decode(targets[targets >= 0])
    'Nada.<|endoftext|>'

    Attributes:
        kind: of the records, one of `records.KINDS`.
        tokenizer: with the chat template that the examples are written in; it goes with the tuned model.
        packing: a row holds several examples.
        too_long: what becomes of examples longer than a row: "drop", "truncate" (their end is lost) or "error". Plain text is cut into
            several documents instead.
        bad_records: what `skip_bad` left out.
    """

    def __init__(
        self,
        samples: _Samples,
        which: npt.NDArray[np.int64],
        tokenizer: Tokenizer,
        *,
        kind: str,
        packing: bool,
        too_long: TooLong,
        bad_records: BadRecords,
    ) -> None:
        self._samples = samples
        self._which = which  # the numbers of those that are of this set
        self.tokenizer = tokenizer
        self.kind = kind
        self.packing = packing
        self.too_long = too_long
        self.bad_records = bad_records
        self._rows: dict[int, _Rows] = {}  # by seq_len

    @classmethod
    def from_file(
        cls,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        tokenizer: Tokenizer,
        *,
        kind: str = "auto",
        template: str | None = None,
        train_on_inputs: bool = False,
        packing: bool = True,
        too_long: TooLong = "drop",
        skip_bad: bool = False,
    ) -> "InstructionDataset":
        """Read examples: UTF-8, a JSON record per line, or one list of them; of several files too, all records of one kind.

        Each answer is tokenized for itself and put after the ids that a program gives the model to answer, those of `chat_ids` with
        add_generation_prompt=True. The token that ends the answer is learned with it. See `DocumentWriter`.

        Args:
            kind: one of `records.KINDS`: "alpaca" (instruction, output; input and system, if they are there), "sharegpt"
                (conversations of from and value), "messages" (messages of role and content), "completion" (prompt and completion,
                without a template), "text" (text, all of it learned); "auto" = what the first record is.
            template: see `with_chat_template`; None = the tokenizer's own, or else alpaca.
            train_on_inputs: prompts are learned, too.
            packing, too_long: see the attributes.
            skip_bad: leave out malformed records and count them in `bad_records`; else the first is an error.
        Raises:
            ConfigError: an unknown kind, template or too_long.
            DataError: a file that cannot be read, a malformed record (with its file and line), no good one, or a template that
                cannot be trained with.
        """
        files = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        if not files:
            raise ConfigError("no file of examples is named; give one .jsonl or .json file at least")
        records = ((i, place, value) for i, file in enumerate(files) for place, value in read_records(file))
        reader = _Reader(tokenizer, kind=kind, template=template, train_on_inputs=train_on_inputs, skip_bad=skip_bad)
        return cls._read(reader, records, files, packing=packing, too_long=too_long)

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        kind: str = "auto",
        template: str | None = None,
        train_on_inputs: bool = False,
        packing: bool = True,
        too_long: TooLong = "drop",
        skip_bad: bool = False,
    ) -> "InstructionDataset":
        """Examples that are in memory; see `from_file`."""
        numbered = ((0, Place(0, i), value) for i, value in enumerate(records, start=1))
        reader = _Reader(tokenizer, kind=kind, template=template, train_on_inputs=train_on_inputs, skip_bad=skip_bad)
        return cls._read(reader, numbered, [], packing=packing, too_long=too_long)

    @classmethod
    def _read(
        cls,
        reader: "_Reader",
        records: "Iterable[_Record]",
        files: Sequence[Path],
        *,
        packing: bool,
        too_long: TooLong,
    ) -> "InstructionDataset":
        if too_long not in _TOO_LONG:
            raise ConfigError(f"unknown too_long {too_long!r}; {did_you_mean(too_long, list(_TOO_LONG))}")
        samples = reader.read(records, files)
        which = np.arange(len(samples.keys))
        bad = BadRecords(count=reader.num_bad, reasons=tuple(reader.reasons))
        return cls(
            samples, which, reader.tokenizer, kind=reader.kind, packing=packing, too_long=too_long, bad_records=bad
        )

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.tokenizer.vocab_size

    @property
    def num_samples(self) -> int:
        """Examples, those too that are too long for some seq_len."""
        return len(self._which)

    def __len__(self) -> int:
        return self.num_samples

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(num_samples,) tokens of the examples."""
        lengths: npt.NDArray[np.int64] = np.diff(self._samples.offsets)[self._which]
        return lengths

    @cached_property
    def num_answer_tokens(self) -> int:
        """What is learned of all examples."""
        return int(self._samples.num_answer_tokens[self._which].sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the ids, of what is learned of them, and of what the batches depend on beside the arguments of `batch`."""
        digest = hashlib.sha256(f"{self.packing} {self.too_long} {self.kind}".encode())
        digest.update(self._samples.digest)
        digest.update(self._which.astype(np.int64).tobytes())
        return digest.hexdigest()

    def summary(self, seq_len: int) -> RowSummary:
        """What the examples make in rows of seq_len tokens: how many rows, what is left out, how full they are.

        Raises:
            ConfigError: seq_len is below 2.
            DataError: nothing is left, or an example is longer, and too_long is "error".
        """
        return self._rows_of(seq_len).summary

    def num_sequences(self, seq_len: int) -> int:
        """Rows of an epoch, the same for every seed; raises as `summary`."""
        return self._rows_of(seq_len).summary.num_rows

    def batch(
        self, step: int, *, batch_size: int = 1, seq_len: int = 256, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> PackedBatch:
        """The batch of one step on one rank: a pure function of the arguments, so that a resumed run needs no state.

        An epoch visits each row once, in random order; the next epoch has other rows in another order. Row number
        (step * world_size + rank) * batch_size + b of this endless sequence is row b. Rows are padded at their end, packed ones to
        seq_len, others to the longest of the batch and a multiple of 8; the padding is a document without targets.

        Args:
            batch_size: rows per rank.
            seed: 0 .. 2**32 - 1.
        Raises:
            ConfigError: a negative step or seed, a size below 1, or a rank outside 0 .. world_size - 1.
            DataError: as `summary`.
        """
        if step < 0 or batch_size < 1 or not 0 <= rank < world_size or not 0 <= seed < 2**32:
            raise ConfigError(
                f"no batch for {step=}, {batch_size=}, {seed=}, {rank=}, {world_size=}; see InstructionDataset.batch"
            )
        rows = self._rows_of(seq_len)
        first = (step * world_size + rank) * batch_size
        return rows.batch([rows.plan.row(number, seed=seed) for number in range(first, first + batch_size)])

    def split(
        self, *, val_fraction: float | None = None, val_size: int | None = None, seed: int = 0
    ) -> tuple["InstructionDataset", "InstructionDataset"]:
        """Training and validation data. Where an example goes depends on its content and the seed only: not on the others, so that
        more examples move none of the old ones (with val_fraction), and equal ones stay together; nor on tokenizer and template.

        Args:
            val_fraction: chance of an example to be for validation, so about this part of them is.
            val_size: instead of val_fraction: how many examples are, and those equal to them.
        Returns:
            both with one example at least.
        Raises:
            ConfigError: not one of val_fraction (0 .. 1) and val_size (1 .. num_samples - 1).
            DataError: all examples are equal, so that they cannot be split.
        """
        if (val_fraction is None) == (val_size is None):
            raise ConfigError("give val_fraction or val_size, one of them; for example val_fraction=0.05")
        chances = _chances(self._samples.keys[self._which], seed)
        distinct = np.unique(chances)
        if len(distinct) < 2:
            raise DataError(f"the data has {self.num_samples:,} examples, all alike; a split needs two that differ")
        if val_fraction is not None:
            if not 0 < val_fraction < 1:
                raise ConfigError(f"val_fraction ({val_fraction}) must be between 0 and 1, for example 0.05")
            limit = np.uint64(int(val_fraction * 2**64))
        else:
            assert val_size is not None
            if not 1 <= val_size < self.num_samples:
                raise ConfigError(
                    f"val_size ({val_size}) must be at least 1 and below the number of examples ({self.num_samples:,})"
                )
            limit = np.sort(chances)[val_size - 1] + np.uint64(1)
        held_out = chances < np.clip(limit, distinct[0] + np.uint64(1), distinct[-1])
        return self._subset(~held_out), self._subset(held_out)

    def _subset(self, chosen: npt.NDArray[np.bool_]) -> "InstructionDataset":
        return InstructionDataset(
            self._samples,
            self._which[chosen],
            self.tokenizer,
            kind=self.kind,
            packing=self.packing,
            too_long=self.too_long,
            bad_records=self.bad_records,
        )

    def preview(self, n: int = 0) -> list[tuple[str, bool]]:
        """Example n token by token: its text, and whether it is learned.

        A character of several tokens is in the last of them, and the others are empty.

        Raises:
            ConfigError: there is no such example.
        """
        document = self.document(n)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = [decoder.decode(self.tokenizer.decode_bytes([i])) for i in document.ids.tolist()]
        texts[-1] += decoder.decode(b"", final=True)
        return list(zip(texts, document.learned.tolist(), strict=True))

    def document(self, n: int) -> Document:
        """The ids of example n, and which of them are learned.

        Raises:
            ConfigError: there is no such example.
        """
        if not 0 <= n < self.num_samples:
            raise ConfigError(f"no example {n}; there are {self.num_samples:,}, from 0 on")
        start, end = self._samples.offsets[self._which[n] :][:2]
        return Document(self._samples.ids[start:end], self._samples.learned[start:end])

    def place(self, n: int) -> str:
        """Where example n comes from: file and line."""
        file, line, record = self._samples.places[self._which[n]].tolist()
        place = str(Place(line, record))
        return f"{self._samples.files[file]}, {place}" if line else place

    def _rows_of(self, seq_len: int) -> "_Rows":
        if seq_len not in self._rows:
            if seq_len < 2:
                raise ConfigError(f"seq_len ({seq_len}) must be at least 2: a token, and the one that follows")
            self._rows[seq_len] = self._arrange(seq_len)
        return self._rows[seq_len]

    def _arrange(self, seq_len: int) -> "_Rows":
        starts, lengths = self._samples.offsets[self._which], self.lengths
        counts = self._samples.num_answer_tokens[self._which]
        long = lengths > seq_len
        num_too_long = int(long.sum())
        if num_too_long and self.kind == "text":
            # Documents of seq_len tokens each, and the rest; the first token of each is nobody's target.
            pieces = -(-lengths // seq_len)
            numbers = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            starts = np.repeat(starts, pieces) + numbers * seq_len
            lengths = np.minimum(np.repeat(lengths, pieces) - numbers * seq_len, seq_len)
            counts = lengths - 1
            starts, lengths, counts = starts[counts > 0], lengths[counts > 0], counts[counts > 0]
        elif num_too_long:
            if self.too_long == "error":
                worst = int(lengths.argmax())
                raise DataError(
                    f"{num_too_long:,} of {self.num_samples:,} examples are longer than seq_len ({seq_len:,}); the longest, "
                    f"{self.place(worst)}, has {lengths[worst]:,} tokens; raise seq_len, or let them be dropped or truncated (too_long)"
                )
            if self.too_long == "drop":
                starts, lengths, counts = starts[~long], lengths[~long], counts[~long]
            else:
                counts, lengths = counts.copy(), np.minimum(lengths, seq_len)
                for i in np.flatnonzero(long):
                    counts[i] = self._samples.learned[starts[i] : starts[i] + seq_len].sum()
        some_left = counts > 0
        num_without_answer = int((~some_left).sum())
        starts, lengths, counts = starts[some_left], lengths[some_left], counts[some_left]
        if not len(lengths):
            raise DataError(
                f"no example is left: of {self.num_samples:,}, {num_too_long:,} are longer than seq_len ({seq_len:,}), the shortest "
                f"has {int(self.lengths.min()):,} tokens; raise seq_len"
                + (", or use too_long='truncate'" if self.too_long == "drop" else "")
            )
        if num_too_long and self.kind != "text":
            left_out = num_without_answer + (num_too_long if self.too_long == "drop" else 0)
            cut = num_too_long - num_without_answer if self.too_long == "truncate" else 0
            warnings.warn(
                f"of {self.num_samples:,} examples, {num_too_long:,} are longer than seq_len ({seq_len:,}): {left_out:,} are left out"
                + (f", {cut:,} are cut" if cut else ""),
                stacklevel=4,
            )
        plan = RowPlan(lengths, seq_len, packing=self.packing)
        num_tokens = int(lengths.sum())
        summary = RowSummary(
            seq_len=seq_len,
            num_rows=plan.num_rows,
            num_documents=len(lengths),
            num_tokens=num_tokens,
            num_answer_tokens=int(counts.sum()),
            num_too_long=num_too_long,
            num_without_answer=num_without_answer,
            max_answer_tokens_in_a_row=plan.most_in_a_row(counts),
            efficiency=num_tokens / (plan.num_rows * seq_len),
        )
        eos = self.tokenizer.eos_token_id
        return _Rows(self._samples, starts, plan, summary, pad_id=0 if eos is None else eos)


class _Rows:
    """Documents in rows of one length."""

    def __init__(
        self, samples: _Samples, starts: npt.NDArray[np.int64], plan: RowPlan, summary: RowSummary, *, pad_id: int
    ) -> None:
        self._samples = samples
        self._starts = starts
        self._pad_id = pad_id
        self.plan = plan
        self.summary = summary

    def batch(self, rows: Sequence[npt.NDArray[np.int64]]) -> PackedBatch:
        """The batch of rows of documents, by their numbers."""
        seq_len = self.summary.seq_len
        if not self.plan.packing:
            longest = max(int(self.plan.lengths[row].sum()) for row in rows)
            seq_len = min(seq_len, -(-longest // _MULTIPLE) * _MULTIPLE)
        idx = np.full((len(rows), seq_len), self._pad_id, dtype=np.int64)
        targets = np.full((len(rows), seq_len), _IGNORED, dtype=np.int64)
        positions = np.zeros((len(rows), seq_len), dtype=np.int64)
        for b, row in enumerate(rows):
            at = 0
            for start, length in zip(self._starts[row].tolist(), self.plan.lengths[row].tolist(), strict=True):
                ids = self._samples.ids[start : start + length].astype(np.int64)
                learned = self._samples.learned[start + 1 : start + length]
                idx[b, at : at + length] = ids
                targets[b, at : at + length - 1] = np.where(learned, ids[1:], _IGNORED)
                positions[b, at : at + length] = np.arange(length)
                at += length
            positions[b, at:] = np.arange(seq_len - at)
        return PackedBatch(torch.from_numpy(idx), torch.from_numpy(targets), torch.from_numpy(positions))


_Record = tuple[int, Place, Any]  # number of the file, place in it, value or what is wrong with it
_T = TypeVar("_T")


class _Reader:
    """Makes samples of records."""

    def __init__(
        self, tokenizer: Tokenizer, *, kind: str, template: str | None, train_on_inputs: bool, skip_bad: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.kind = check_kind(kind)
        self.num_bad = 0
        self.reasons: list[str] = []
        self._template = template
        self._train_on_inputs = train_on_inputs
        self._skip_bad = skip_bad
        self._writer: DocumentWriter | None = None

    def read(self, records: Iterable[_Record], files: Sequence[Path]) -> _Samples:
        ids: list[npt.NDArray[np.uint32]] = []
        learned: list[npt.NDArray[np.bool_]] = []
        lengths: list[npt.NDArray[np.int64]] = []
        keys: list[npt.NDArray[np.uint64]] = []
        places: list[npt.NDArray[np.int64]] = []
        for chunk in _chunks(records, _CHUNK_RECORDS):
            good = []
            for record, outcome in zip(chunk, self._documents([value for *_, value in chunk]), strict=True):
                if isinstance(outcome, DataError):
                    self._refuse(outcome, record, files)
                else:
                    good.append((record, *outcome))
            if good:
                ids.append(np.concatenate([document.ids for _, _, document in good]))
                learned.append(np.concatenate([document.learned for _, _, document in good]))
                lengths.append(np.array([len(document.ids) for _, _, document in good]))
                keys.append(np.array([_key(example) for _, example, _ in good], dtype=np.uint64))
                places.append(np.array([(file, *place) for (file, place, _), _, _ in good]))
        if not ids:
            if self.num_bad:
                raise DataError(f"all {self.num_bad:,} records are malformed; the first: {self.reasons[0]}")
            name = ", ".join(map(str, files)) or "the list"
            raise DataError(
                f"{name}: there are no records; a file has one JSON record per line, or is one list of them"
            )
        return _Samples(
            ids=np.concatenate(ids),
            learned=np.concatenate(learned),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
            keys=np.concatenate(keys),
            files=tuple(files),
            places=np.concatenate(places),
        )

    def _documents(self, values: Sequence[Any]) -> list[tuple[Example, Document] | DataError]:
        """The example in each record, and its document; or what is wrong with it."""
        examples = [self._example(value) for value in values]
        good = [example for example in examples if not isinstance(example, DataError)]
        if self._writer is None and good:
            if isinstance(good[0], Conversation):
                self.tokenizer = with_chat_template(self.tokenizer, self._template)
            self._writer = DocumentWriter(self.tokenizer, train_on_inputs=self._train_on_inputs)
        documents = iter(self._writer.write(good) if self._writer is not None else [])
        outcomes: list[tuple[Example, Document] | DataError] = []
        for example in examples:
            if isinstance(example, DataError):
                outcomes.append(example)
                continue
            document = next(documents)
            outcomes.append(document if isinstance(document, DataError) else (example, document))
        return outcomes

    def _example(self, value: Any) -> Example | DataError:
        try:
            if isinstance(value, DataError):
                return value
            if self.kind == "auto":
                self.kind = kind_of(value)
            return example_of(value, self.kind)
        except DataError as error:
            return error

    def _refuse(self, error: DataError, record: _Record, files: Sequence[Path]) -> None:
        file, place, _ = record
        message = f"{files[file]}, {place}: {error}" if place.line else f"{place}: {error}"
        if not self._skip_bad:
            raise DataError(message) from error
        self.num_bad += 1
        if len(self.reasons) < _MAX_REASONS:
            self.reasons.append(one_line(message))


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def _key(example: Example) -> int:
    """64 bits of a hash of an example's content."""
    if isinstance(example, Continuation):
        content: Any = [example.prompt, example.completion]
    else:
        content = [list(map(dict, example.messages)), example.tools]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _chances(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each key, which looks random and depends on key and seed alone.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        mixed = keys + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        chances: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return chances
