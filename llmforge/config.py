"""Config: a frozen, keyword-only dataclass that reads and writes dicts, JSON and YAML, and refuses what it does not know."""

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from llmforge.errors import ConfigError, shown

if typing.TYPE_CHECKING:
    from typing_extensions import Self

MAX_JSON_BYTES = 32 * 2**20  # the index of a model of 60,000 tensors has 6 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: strict names, checked types, one reason per refusal.

    Subclasses are frozen dataclasses with scalar, tuple or nested Config fields; they check ranges in `__post_init__` and may list
    `PRESETS`, named sets of field values.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Build from plain values, as JSON and YAML give them.

        Raises:
            ConfigError: an unknown field (with the nearest known one), or a value that is not of the field's type.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} needs a mapping of field to value, not {shown(values)}")
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(f"unknown {cls.__name__} field {shown(name)}; {did_you_mean(name, names)}")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.__name__} needs a value for {', '.join(map(repr, missing))}")
        return cls(**{name: _coerce(f"{cls.__name__}.{name}", value, hints[name]) for name, value in values.items()})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "Self":
        """The preset `name`, with single fields replaced.

        Raises:
            ConfigError: no such preset (with the list), or an unknown field.
        """
        if name not in cls.PRESETS:
            raise ConfigError(f"unknown {cls.__name__} preset {name!r}; {did_you_mean(name, list(cls.PRESETS))}")
        return cls.from_dict({**cls.PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> "Self":
        """A copy with some fields changed, checked like a new one."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal config."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> "Self":
        """Read one JSON object; see `from_dict`."""
        return cls.from_dict(read_json_object(path))

    @classmethod
    def from_yaml_file(cls, path: str | os.PathLike[str]) -> "Self":
        """Read one YAML mapping (safe tags only); see `from_dict`."""
        return cls.from_dict(read_yaml_mapping(path))

    def to_yaml(self) -> str:
        """The config as YAML, fields in their declared order."""
        import yaml

        class Dumper(yaml.SafeDumper):
            pass

        # Without double quotes PyYAML writes Unicode's line breaks (U+0085, U+2028, U+2029) as they are, and YAML folds them away.
        def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
            style = None if value.isprintable() else '"'
            return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

        Dumper.add_representer(str, text)
        return str(yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True))


def read_json_object(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON file that must hold one object; ConfigError names the file and the place otherwise."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe or a device may never end
            raise ConfigError(f"{path} is no ordinary file; copy or download it again")
        if size > max_bytes:
            raise ConfigError(
                f"{path} has {size:,} bytes; at most {max_bytes:,} are allowed: it is damaged or something else"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def read_yaml_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a YAML file that must hold one mapping; ConfigError names the file and the line otherwise."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping like 'lr: 0.001', not {type(values).__name__}")
    return values


def did_you_mean(name: object, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    synonyms = next((group for group in _SYNONYMS if name in group), ())
    nearest = next((synonym for synonym in synonyms if synonym in known), None)
    if nearest is None:
        nearest = next(iter(difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.6)), None)
    return f"did you mean {nearest!r}?" if nearest else f"known: {', '.join(sorted(known))}"


# What people type who come from other trainers or families; spelling distance alone would not find these.
_SYNONYMS = [
    ("lr", "learning_rate"),
    ("min_lr", "min_learning_rate"),
    ("micro_batch_size", "batch_size", "per_device_train_batch_size"),
    ("grad_accum_steps", "gradient_accumulation_steps"),
    ("max_steps", "max_iters"),
    ("warmup_steps", "warmup_iters"),
    ("eval_every_steps", "eval_interval"),
    ("eval_batches", "eval_iters"),
    ("save_every_steps", "save_steps"),
    ("grad_clip", "max_grad_norm"),
    ("schedule", "lr_scheduler_type"),
    ("out_dir", "output_dir"),
    ("block_size", "max_position_embeddings", "context_length", "max_seq_len"),
    ("n_embd", "hidden_size", "d_model", "dim"),
    ("n_layer", "num_hidden_layers", "num_layers", "n_layers"),
    ("n_head", "num_attention_heads", "num_heads", "n_heads"),
    ("num_key_value_heads", "n_kv_heads"),
    ("dropout", "attention_dropout"),
    ("bias", "attention_bias"),
]


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; strings become numbers where a number is due (YAML reads 1e-3 as a string)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        errors = []
        for choice in choices:
            if choice is not type(None):
                try:
                    return _coerce(name, value, choice)
                except ConfigError as error:
                    errors.append(error)
        raise errors[0]
    if origin is tuple:
        items = typing.get_args(hint)
        if isinstance(value, str):
            value = [item.strip() for item in value.strip("[]() ").split(",") if item.strip()]
        if not isinstance(value, (list, tuple)) or (items[-1] is not Ellipsis and len(items) != len(value)):
            raise ConfigError(f"{name} must be {_describe(hint)}, got {shown(value)}")
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        return tuple(_coerce(name, item, item_hint) for item, item_hint in zip(value, items, strict=True))
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
        return value
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint is int and not isinstance(value, bool):
        if isinstance(value, str):
            value = _number(value)
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            if abs(value) >= 2**64:
                raise ConfigError(f"{name} must be a whole number below 2**64, got {shown(value)}")
            return int(value)
    elif hint is float and not isinstance(value, bool):
        if isinstance(value, str):
            value = _number(value)
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000):  # what a float can hold
            return float(value)
    elif hint is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise ConfigError(f"{name} must be {_describe(hint)}, got {shown(value)}")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _describe(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint) or str(hint).removeprefix("<class '").removesuffix("'>")
