"""What the tokenizers that run on the `tokenizers` library share: special tokens, and the settings of published files."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken

from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers.base import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    join_pieces,
    read_tokenizer_file,
    write_tokenizer_files,
)

# Names of tokens that end a turn or a text: those after which llama.cpp stops by itself (src/llama-vocab.cpp, special_eog_ids).
END_TOKENS = frozenset([
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
])  # fmt: skip

# What tokenizer_config.json calls its special tokens; chat templates know them by these names.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_MAX_TEMPLATE_BYTES = 2**20
_MAX_VOCAB_SIZE = 2**20  # the library reserves memory for so many; the largest vocabularies in use have 2**18
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class BackendTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` and the tokenizer_config.json beside it.

    Raises:
        DataError: the config names tokens that cannot be added.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        _add_tokens_of_config_(backend, self._config)
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        backend.encode_special_tokens = True  # special tokens in a text are text
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self._tokens: list[str | None] = [None] * (
            max(vocabulary.values(), default=-1) + 1
        )  # None: an id without a token
        for token, i in vocabulary.items():
            self._tokens[i] = token
        self._pieces = [
            b"" if token is None else token.encode() if i in self._added else self._bytes_of(i, token)
            for i, token in enumerate(self._tokens)
        ]
        self._special_tokens = {
            key: name for key in SPECIAL_TOKENS if (name := token_name(self._config.get(key))) and name in vocabulary
        }
        self._special_ids = {key: vocabulary[name] for key, name in self._special_tokens.items()}
        if self._first_id is not None and self._first_id >= len(self._tokens):
            raise DataError(f"the post-processor puts the id {self._first_id} first, of {len(self._tokens):,} tokens")

    def _bytes_of(self, i: int, token: str) -> bytes:
        """The bytes that a token of the model stands for."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def eos_token_id(self) -> int | None:
        return self._special_ids.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_ids.get("bos_token") if self._first_id is None else self._first_id

    @property
    def add_bos(self) -> bool:
        # As transformers 5 decides it: add_bos_token of tokenizer_config.json counts only where there is no tokenizer.json.
        return self._first_id is not None

    @cached_property
    def _first_id(self) -> int | None:
        """The id that the tokenizer.json puts before a text."""
        processor = self._backend.post_processor
        state: Any = json.loads(processor.__getstate__()) if processor is not None else {"type": None}
        for step in state["processors"] if state["type"] == "Sequence" else [state]:
            if step["type"] == "TemplateProcessing" and (first := step["single"][:1]) and "SpecialToken" in first[0]:
                name = first[0]["SpecialToken"]["id"]
                ids: list[int] = step["special_tokens"].get(name, {"ids": []})["ids"]
                if not ids:
                    raise DataError(
                        f"the post-processor puts {name!r} first, for which it has no id: the file is damaged"
                    )
                return ids[0]
        return None

    @cached_property
    def end_token_ids(self) -> frozenset[int]:  # type: ignore[override]
        named = {token.content: i for i, token in self._added.items() if token.special and token.content in END_TOKENS}
        if {"<|return|>", "<|call|>"} <= named.keys() or {"<|calls|>", "<|flush|>"} <= named.keys():
            named.pop("<|end|>", None)  # in these formats it ends a message, not the turn
        eos = self.eos_token_id
        return frozenset(named.values()) | (frozenset() if eos is None else {eos})

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self._special_tokens

    @property
    def chat_template(self) -> str | None:
        return template_of(self._config)

    def with_chat_template(self, template: str | None) -> Tokenizer:
        other = copy.copy(self)
        other._config = {key: value for key, value in self._config.items() if key != "chat_template"}
        if template is not None:
            other._config["chat_template"] = template
        return other

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, after: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        backend = self._special_backend if special else self._backend
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in self._encodings(backend, texts)]

    def encode_special(self, text: str) -> list[int]:
        return self._encode(self._special_backend, text)

    @cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        # A second one, since switching the first to and fro would not be safe among threads.
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return join_pieces(self._pieces, ids)

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_tokenizer_files(folder, self._backend.to_str(pretty=True), self._config)

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        ids: list[int] = self._encode_all(backend, [text]).tolist()
        return ids

    def _encode_all(self, backend: tokenizers.Tokenizer, parts: Sequence[str]) -> npt.NDArray[np.uint32]:
        encodings = self._encodings(backend, parts)
        return np.fromiter((i for encoding in encodings for i in encoding.ids), dtype=np.uint32)

    def _encodings(self, backend: tokenizers.Tokenizer, parts: Sequence[str]) -> list[tokenizers.Encoding]:
        try:
            return backend.encode_batch_fast(parts, add_special_tokens=False)
        except TypeError as error:
            text = next((part for part in parts if _has_surrogate(part)), parts[0])
            raise DataError(
                f"cannot encode {text[:40]!r}: it has half of a surrogate pair, which is no character"
            ) from error

    def _plain_added(self) -> list[AddedToken]:
        """Added tokens that are found in ordinary text."""
        return [token for token in self._added.values() if not token.special]

    def _gguf_tokens(self) -> tuple[list[str], list[int]]:
        """Tokens and their types as GGUF has them."""
        tokens = [f"[UNUSED{i}]" if token is None else token for i, token in enumerate(self._tokens)]
        return tokens, [self._gguf_type(i, token) for i, token in enumerate(self._tokens)]

    def _gguf_type(self, i: int, token: str | None) -> int:
        if i in self._added:
            if not self._added[i].special:
                return USER_DEFINED
            return UNKNOWN if i == self._unknown_id() else CONTROL
        if token is None:
            return UNUSED
        return BYTE if self._is_byte(i) else NORMAL

    def _unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary does not have; None where it has everything."""
        return None

    def _is_byte(self, i: int) -> bool:
        """Whether the token stands for one byte of a character that the vocabulary does not have."""
        return False


def load_backend(path: str | os.PathLike[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any] | None]:
    """Read a tokenizer.json, and the settings beside it (see `read_config`).

    Raises:
        DataError: a file is damaged or none of a tokenizer.
    """
    path = Path(path)
    content = read_tokenizer_file(path)
    config = read_config(path.parent)
    backend = backend_of(path.read_text(encoding="utf-8"), path)
    for token in content.get("added_tokens") or []:
        if (its_id := backend.token_to_id(token["content"])) != token["id"]:  # the library numbers them itself
            raise DataError(
                f"{path} gives {token['content']!r} the id {token['id']}, but it would get {its_id}: the file is damaged"
            )
    return backend, config


def backend_of(tokenizer_json: str, where: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json's content; `where` names it in errors."""
    try:
        return tokenizers.Tokenizer.from_str(tokenizer_json)
    except BaseException as error:
        # The library raises bare Exceptions, and its panics are not even that.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{where} is not a tokenizer.json that can be read: {error}") from error
        raise


def state_of(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The content of the tokenizer.json that `backend` would write.

    Raises:
        DataError: ids are far apart, over which the library would count for minutes.
    """
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if max(vocabulary.values(), default=0) > 10 * len(vocabulary):
        raise DataError(f"ids reach {max(vocabulary.values())} with only {len(vocabulary)} tokens: the file is damaged")
    names = {i: token for token, i in vocabulary.items()}
    if twice := [(names[i], token) for token, i in vocabulary.items() if names[i] != token]:
        raise DataError("the tokens {!r} and {!r} have the same id: the file is damaged".format(*twice[0]))
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def check_vocab_size(vocab_size: int, smallest: int, reason: str) -> None:
    """Raises ConfigError: a vocabulary to be trained that is smaller than it can be, or larger than any."""
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size ({vocab_size}) must be at least {smallest}: {reason}")
    if vocab_size > _MAX_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size ({vocab_size}) must be at most {_MAX_VOCAB_SIZE}; 30000 is much for one's own text"
        )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings of the tokenizer in a folder: tokenizer_config.json, what older folders have in special_tokens_map.json, and
    the template that newer ones have in chat_template.jinja; None if there are none of these.
    """
    folder = Path(folder)
    config: dict[str, Any] | None = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content = read_tokenizer_file(path)
            if name == "special_tokens_map.json":
                content = {key: value for key, value in content.items() if key in SPECIAL_TOKENS}
            config = {**(config or {}), **content}
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            if path.stat().st_size > _MAX_TEMPLATE_BYTES:
                raise DataError(
                    f"{path} has {path.stat().st_size:,} bytes; a template of more than a megabyte is damaged"
                )
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        config = {**(config or {}), "chat_template": template}
    return config


def template_of(config: Mapping[str, Any]) -> str | None:
    """The chat template in a tokenizer_config.json; of several, which have names, the default one."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and not _has_surrogate(template) else None


def token_name(value: object) -> str:
    """The name of a special token of tokenizer_config.json, which is text or an object with `content`; "" if it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and not _has_surrogate(value) else ""


def bos_processor(tokens: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-processor of a tokenizer.json that puts BOS before texts; None if `config` has none, or does not want it."""
    bos = token_name(config.get("bos_token"))
    if config.get("add_bos_token") is not True or bos not in tokens:
        return None
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    before_first, before_second = ({"SpecialToken": {"id": bos, "type_id": i}} for i in range(2))
    return {
        "type": "TemplateProcessing",
        "single": [before_first, first],
        "pair": [before_first, first, before_second, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }


def _add_tokens_of_config_(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json has, as transformers does."""
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    names = {token.content for token in added.values()}
    for i, token in _declared_tokens(config):
        if token.content not in names:
            backend.add_tokens([token])
            if (its_id := backend.token_to_id(token.content)) != i:
                raise DataError(
                    f"tokenizer_config.json gives {token.content!r} the id {i}, but it would get {its_id}; "
                    "take the tokenizer.json and the tokenizer_config.json of the same model"
                )
    # A special token that the model knows as an ordinary one.
    known = {
        name
        for key in SPECIAL_TOKENS
        if (name := token_name(config.get(key))) and backend.token_to_id(name) is not None
    }
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sorted(known - special)])


def _declared_tokens(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """`added_tokens_decoder` of a tokenizer_config.json, by id."""
    declared = config.get("added_tokens_decoder", {})
    tokens = []
    for key, value in declared.items() if isinstance(declared, dict) else [(declared, None)]:
        # No more digits than an id has: int() of very long ones is an error of its own.
        valid = isinstance(key, str) and key.isdecimal() and len(key) < 10
        if not (valid and isinstance(value, dict) and token_name(value)):
            raise DataError(
                f"added_tokens_decoder of tokenizer_config.json has {str(key)[:40]!r}: {str(value)[:80]}; it must give an id an object "
                'with the token, as in {"32000": {"content": "<pad>", "special": true}}'
            )
        flags = {flag: value.get(flag) is True for flag in _FLAGS}
        tokens.append((int(key), AddedToken(value["content"], **flags)))
    return sorted(tokens, key=lambda entry: entry[0])


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
