"""TextSource: where text comes from: files and folders of text, fields of records, data sets of the Hub; as documents in pieces."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmforge.config import Config, did_you_mean
from llmforge.errors import ConfigError, DataError, shown, some
from llmforge.tokenizers.record_files import parquet_columns, read_parquet, read_records, read_table, table_columns
from llmforge.tokenizers.text_files import Tick, cut_safely, find_texts, read_text

if TYPE_CHECKING:
    from typing_extensions import Self

_JSON, _TABLES, _PARQUET = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet",)
_RECORDS = (*_JSON, *_TABLES, *_PARQUET)
_COMPRESSED = (".gz", ".zst")
_HUB = "hf:"
_FIELD = "text"  # of records, where none is named


@dataclass(frozen=True, kw_only=True)
class TextSource(Config):
    """Text to learn from, of one place.

    >>> TextSource.from_dict("books/")
    TextSource(path='books/', field=None, weight=None)
    """

    # A text file; records in .jsonl, .json, .csv, .tsv or .parquet; any of these but .parquet also as .gz or .zst; a folder of them: its
    # .txt files, or records where a field is named or there is no .txt; or "hf:owner/name", also ":config" and ":split" (else train).
    path: str
    field: str | None = None  # of records: which one has the text; None = "text", or the only column of a table
    weight: float | None = (
        None  # of a row of a batch, how likely it comes from here, against the others; None in all = by length
    )

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path of a text is empty; name a file, a folder, or hf:owner/name")
        if self.weight is not None and not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(
                f"weight ({self.weight}) of {self.path} must be above 0; leave a text out that is not to be seen"
            )

    @classmethod
    def from_dict(cls, values: Any) -> "Self":
        """As for every Config; a text alone is the path."""
        return super().from_dict({"path": os.fspath(values)} if isinstance(values, str | os.PathLike) else values)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if value is not None}

    @property
    def is_text_file(self) -> bool:
        """Whether it is one file of plain text."""
        return not self.path.startswith(_HUB) and not Path(self.path).is_dir() and not _kind(Path(self.path))

    def files(self) -> "list[TextFile | HubData]":
        """What there is to read, by name.

        Raises:
            DataError: nothing; or a field is named, and there are no records.
        """
        if self.path.startswith(_HUB):
            return [HubData(self.path, self.field or _FIELD)]
        path = Path(self.path)
        if not path.is_dir():
            find_texts(path)  # for its errors
            if self.field is not None and not _kind(path):
                raise DataError(
                    f"{path} is read as plain text, which has no field {self.field!r}; records are in files named {', '.join(_RECORDS)}"
                )
            return [TextFile(path, self.field)]
        found = sorted(
            (file for file in path.rglob("*") if file.is_file() and file.stat().st_size > 0),
            key=lambda file: file.relative_to(path).as_posix(),
        )
        texts = [file for file in found if _plain_suffix(file) == ".txt"]
        records = [file for file in found if _kind(file)]
        chosen = records or texts if self.field is not None else texts or records
        if not chosen:
            raise DataError(
                f"{path} has no file with text that matches '**/*.txt', nor records in {', '.join(_RECORDS)}; put UTF-8 text there"
            )
        return [TextFile(file, self.field if _kind(file) else None) for file in chosen]


Source = str | os.PathLike[str] | TextSource | Mapping[str, Any]


class Document(NamedTuple):
    """A text that stands for itself."""

    place: str  # file and line
    pieces: Iterator[str]  # together they are the text


class DocumentFile(Protocol):
    """A file, or what is like one, with documents."""

    def documents(self, tick: Tick | None = None) -> Iterator[Document]:
        """The documents, one after the other; each is to be read before the next. `tick` is told of bytes, whose sum is `size`."""
        ...

    @property
    def digest(self) -> bytes:
        """A hash of all that the documents depend on."""
        ...

    @property
    def size(self) -> int:
        """Bytes to read."""
        ...


def text_sources(sources: Source | Iterable[Source]) -> tuple[TextSource, ...]:
    """Sources as users name them: one, or several, each a path, a mapping or a TextSource.

    Raises:
        ConfigError: there are none, or some have a weight and others not.
    """
    if isinstance(sources, str | os.PathLike | TextSource | Mapping):
        sources = [sources]
    named = tuple(source if isinstance(source, TextSource) else TextSource.from_dict(source) for source in sources)
    if not named:
        raise ConfigError("no text is named; give at least one file or folder")
    without = [source.path for source in named if source.weight is None]
    if without and len(without) < len(named):
        raise ConfigError(
            f"some texts have a weight, and {some(without)} has none; give all of them one, or none of them"
        )
    return named


def training_pieces(sources: Source | Iterable[Source], safe_cut: Callable[[str], int]) -> Iterator[str]:
    """All text of some sources, in pieces that a vocabulary can be learnt from.

    Raises:
        DataError: a file that cannot be read.
    """
    for source in text_sources(sources):
        for file in source.files():
            for document in file.documents():
                yield from cut_safely(document.pieces, safe_cut)


@dataclass(frozen=True)
class TextFile:
    """A file of text, which is one document, or of records, of which each is one."""

    path: Path
    field: str | None = None

    def documents(self, tick: Tick | None = None) -> Iterator[Document]:
        kind = _kind(self.path)
        if not kind:
            yield Document(str(self.path), read_text(self.path, tick))
            return
        found = False
        for place, text in getattr(self, f"_{kind}")(tick):
            found = True
            if text:
                yield Document(f"{self.path}, {place}", iter((text,)))
        if not found:
            raise DataError(f"{self.path} has no records; leave it out")

    @cached_property
    def digest(self) -> bytes:
        digest = hashlib.sha256(f"{_kind(self.path)} {self.field or _FIELD} {self.path.suffix.lower()}".encode())
        try:
            with open(self.path, "rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        return digest.digest()

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    def _json(self, tick: Tick | None) -> Iterator[tuple[object, str]]:
        field = self.field or _FIELD
        for place, record in read_records(self.path, tick):
            where = f"{self.path}, {place}"
            if isinstance(record, DataError):
                raise DataError(f"{where}: {record}") from record
            if not isinstance(record, dict):
                raise DataError(f'{where} is {shown(record)}; a record must be an object, like {{"{field}": "..."}}')
            if field not in record:
                raise _no_field(where, field, record)
            yield place, _checked(record[field], where, field)

    def _table(self, tick: Tick | None) -> Iterator[tuple[object, str]]:
        yield from read_table(self.path, self._column(table_columns(self.path)), tick)

    def _parquet(self, tick: Tick | None) -> Iterator[tuple[object, str]]:
        field = self._column(parquet_columns(self.path))
        for place, value in read_parquet(self.path, field, tick):
            yield place, _checked(value, f"{self.path}, {place}", field)

    def _column(self, columns: list[str]) -> str:
        field = self.field or (columns[0] if len(columns) == 1 else _FIELD)
        if field not in columns:
            raise _no_field(str(self.path), field, columns)
        return field


@dataclass(frozen=True)
class HubData:
    """A data set that the package `datasets` loads: of the Hub, or a folder of its own; never with code of the data set's."""

    name: str  # hf:owner/name, hf:owner/name:config, hf:owner/name:config:split
    field: str

    @cached_property
    def _data(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"{self.name} needs the package datasets: pip install 'llmforge[datasets]'") from error
        if int(datasets.__version__.split(".")[0]) < 4:  # they would run the code of a data set
            raise DataError(
                f"datasets {datasets.__version__} is too old; pip install 'llmforge[datasets]' brings 4.0 or newer"
            )
        place, *options = self.name.removeprefix(_HUB).split(":")
        if Path(self.name.removeprefix(_HUB)).is_dir():
            place, options = self.name.removeprefix(_HUB), []
        if len(options) > 2:
            raise ConfigError(f"{self.name!r} has too many colons; it is hf:owner/name:config:split")
        config, split = [*options, "", ""][:2]
        try:
            saved = [name for name in ("state.json", "dataset_dict.json") if (Path(place) / name).is_file()]
            if saved:
                data = datasets.load_from_disk(place)
                if saved == ["dataset_dict.json"]:
                    data = data[split or "train"]
            else:
                data = datasets.load_dataset(place, config or None, split=split or "train")
        except Exception as error:  # of many kinds: no such data set, no such split, no network, no permission
            raise DataError(f"cannot load {self.name}: {type(error).__name__}: {error}") from error
        if self.field not in data.column_names:
            raise _no_field(self.name, self.field, data.column_names)
        return data.select_columns([self.field])

    def documents(self, tick: Tick | None = None) -> Iterator[Document]:
        data, number, ticked = self._data, 0, 0
        for batch in data.iter(batch_size=256):
            for value in batch[self.field]:
                number += 1
                where = f"{self.name}, record {number:,}"
                if text := _checked(value, where, self.field):
                    yield Document(where, iter((text,)))
            if tick is not None:
                tick(self.size * number // len(data) - ticked)
                ticked = self.size * number // len(data)

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(f"hf {self._data._fingerprint} {len(self._data)} {self.field}".encode()).digest()

    @cached_property
    def size(self) -> int:
        return int(self._data.data.nbytes)


def _kind(path: Path) -> str:
    """ "json", "table" or "parquet"; "" for plain text."""
    suffix = _plain_suffix(path)
    kinds = {"json": _JSON, "table": _TABLES, "parquet": _PARQUET}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "")


def _plain_suffix(path: Path) -> str:
    """The suffix before .gz and .zst."""
    path = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return path.suffix.lower()


def _checked(value: Any, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {shown(value)}; it must be text: name another field")
    return value


def _no_field(where: str, field: str, fields: Iterable[Any]) -> DataError:
    names = [name for name in fields if isinstance(name, str)]
    guess = did_you_mean(field, names)
    return DataError(
        f"{where} has no field {field!r}; its fields are {some([shown(name) for name in names]) or 'none'}"
        + (f"; {guess}" if guess.startswith("did") else "")
        + " The one with the text is named by --text-field, or field"
    )
