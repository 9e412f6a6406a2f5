"""SentencePiece's tokenizer.model, read without SentencePiece: a list of pieces with scores, in protobuf's wire format.

Source: sentencepiece_model.proto of https://github.com/google/sentencepiece, and https://protobuf.dev/programming-guides/encoding.
"""

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.errors import DataError

MAX_BYTES = 64 * 2**20  # the largest models in use have about 10 MB
MAX_PIECES = 2**20
MAX_PIECE_BYTES = 512  # SentencePiece's trainer ends at 16 characters unless told otherwise

# Types of a piece, the same numbers as llama.cpp's token types, and of a model.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
MODEL_TYPES = {UNIGRAM: "Unigram", BPE: "BPE", WORD: "Word", CHAR: "Char"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types that are in use

# Number of a field -> its name and kind; others are skipped. Kinds: i int32, b bool, f float, s text, r raw bytes, m message.
_MODEL = {1: ("piece", "m"), 2: ("trainer_spec", "m"), 3: ("normalizer_spec", "m")}
_PIECE = {1: ("text", "s"), 2: ("score", "f"), 3: ("type", "i")}
_TRAINER = {
    3: ("model_type", "i"),
    24: ("treat_whitespace_as_suffix", "b"),
    35: ("byte_fallback", "b"),
    40: ("unk_id", "i"),
    41: ("bos_id", "i"),
    42: ("eos_id", "i"),
    43: ("pad_id", "i"),
}
_NORMALIZER = {
    1: ("name", "s"),
    2: ("precompiled_charsmap", "r"),
    3: ("add_dummy_prefix", "b"),
    4: ("remove_extra_whitespaces", "b"),
    5: ("escape_whitespaces", "b"),
}
_WIRE_TYPES = {"i": _VARINT, "b": _VARINT, "f": _FIXED32, "s": _BYTES, "r": _BYTES, "m": _BYTES}


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a tokenizer.model says; the defaults are those of the format."""

    pieces: list[Piece]  # by id, no two alike
    model_type: int = UNIGRAM
    treat_whitespace_as_suffix: bool = False
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1  # ids below 0: there is no such piece
    eos_id: int = 2
    pad_id: int = -1
    name: str = ""  # of the normalizer
    precompiled_charsmap: bytes = b""  # what it changes in a text; empty = nothing
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        DataError: no such file, not SentencePiece's, or damaged, with the byte position.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"no such file: {path}; give the path of a tokenizer.model")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes; a tokenizer.model of more than {MAX_BYTES:,} is something else"
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    _check_beginning(data, path)
    return _ModelReader(data, path).read()


def _check_beginning(data: bytes, path: Path) -> None:
    """Refuse what goes by the same name, or comes instead of a download."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        raise DataError(
            f"{path} is a vocabulary of tiktoken (base64 lines, as Meta's Llama 3 has it), not of SentencePiece; it lacks the special "
            "tokens, so the tokenizer.json of the same model is needed: it is in the model's Hugging Face repository"
        )
    if data.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    # The first piece: field 1, a message, with the text as its field 1.
    if not (data[:1] == b"\n" and b"\n" in data[2:4]):
        raise DataError(
            f"{path} is not a SentencePiece model: it begins with {data[:8]!r}, not with a piece; copy or download it again"
        )


class _ModelReader:
    """Reads front to back; no length is believed that the message around it could not hold."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path = data, path

    def read(self) -> SentencePieceModel:
        pieces: list[Piece] = []
        settings: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for name, start, (begin, end) in self.fields(0, len(self.data), _MODEL):
            if name == "trainer_spec":
                settings |= {key: value for key, _, value in self.fields(begin, end, _TRAINER)}
            elif name == "normalizer_spec":
                settings |= {key: value for key, _, value in self.fields(begin, end, _NORMALIZER)}
            else:
                piece = self.piece(begin, end)
                if piece.text in seen:
                    raise self.damaged(
                        f"the pieces {seen[piece.text]} and {len(pieces)} are both {piece.text!r}", at=start
                    )
                seen[piece.text] = len(pieces)
                pieces.append(piece)
                if len(pieces) > MAX_PIECES:
                    raise self.damaged(f"more than {MAX_PIECES:,} pieces", at=start)
        model = SentencePieceModel(pieces=pieces, **settings)
        self.check(model)
        return model

    def piece(self, begin: int, end: int) -> Piece:
        values = {key: value for key, _, value in self.fields(begin, end, _PIECE)}
        piece = Piece(values.get("text", ""), values.get("score", 0.0), values.get("type", NORMAL))
        if not 0 < len(piece.text.encode()) <= MAX_PIECE_BYTES:
            raise self.damaged(
                f"a piece of {len(piece.text.encode())} bytes; 1 to {MAX_PIECE_BYTES} are possible", at=begin
            )
        if not NORMAL <= piece.type <= BYTE:
            raise self.damaged(f"the piece {piece.text!r} has the unknown type {piece.type}", at=begin)
        if not math.isfinite(piece.score):
            raise self.damaged(f"the piece {piece.text!r} has the score {piece.score}", at=begin)
        return piece

    def check(self, model: SentencePieceModel) -> None:
        if model.model_type not in MODEL_TYPES:
            raise self.damaged(f"unknown model type {model.model_type}", at=len(self.data))
        for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
            if (i := getattr(model, name)) >= len(model.pieces):
                raise self.damaged(f"{name} is {i}, but there are {len(model.pieces):,} pieces", at=len(self.data))
        unknown = [i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN]
        if unknown != [model.unk_id]:
            raise self.damaged(f"unk_id is {model.unk_id}, but the unknown pieces are {unknown[:3]}", at=len(self.data))

    def fields(self, begin: int, end: int, known: dict[int, tuple[str, str]]) -> Iterator[tuple[str, int, Any]]:
        """Name, position and value of the known fields of the message between two positions; (begin, end) for a message."""
        position = begin
        while position < end:
            start = position
            key, position = self.varint(position, end)
            number, wire_type = key >> 3, key & 7
            name, kind = known.get(number, ("", ""))
            if kind and wire_type != _WIRE_TYPES[kind]:
                raise self.damaged(f"the field {name} has the wire type {wire_type}", at=start)
            if wire_type == _VARINT:
                value, position = self.varint(position, end)
                if kind:
                    yield name, start, bool(value) if kind == "b" else _int32(value)
                continue
            if wire_type == _BYTES:
                length, position = self.varint(position, end)
            elif wire_type in (_FIXED32, _FIXED64):
                length = 4 if wire_type == _FIXED32 else 8
            else:
                raise self.damaged(f"a field of the unknown wire type {wire_type}", at=start)
            if number == 0 or length > end - position:
                raise self.damaged(f"the field {number} has {length:,} bytes, {end - position:,} are left", at=start)
            content, position = (position, position + length), position + length
            if kind == "m":
                yield name, start, content
            elif kind:
                yield name, start, self.content(kind, *content)

    def content(self, kind: str, begin: int, end: int) -> Any:
        data = self.data[begin:end]
        if kind == "f":
            return struct.unpack("<f", data)[0]
        if kind == "r":
            return data
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{data[:20]!r} is not UTF-8", at=begin) from error

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """A number of 7 bits per byte, the lowest first, and the position after it."""
        value = 0
        for i, byte in enumerate(self.data[position : min(position + 10, end)]):
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value, position + i + 1
        raise self.damaged("a number that does not end", at=position)

    def damaged(self, what: str, *, at: int) -> DataError:
        return DataError(
            f"{self.path} is no SentencePiece model, or damaged: {what} (byte {at:,} of {len(self.data):,}); copy or download it again"
        )


def _int32(value: int) -> int:
    """protobuf writes negative numbers as 64-bit ones."""
    value &= 0xFFFF_FFFF
    return value - 2**32 if value >= 2**31 else value
