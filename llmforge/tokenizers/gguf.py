"""The tokenizer in a GGUF file's metadata: the reverse of `Tokenizer.gguf_vocabulary().metadata()`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from llmforge.errors import ConvertError, DataError
from llmforge.tokenizers.backend import END_TOKENS, backend_of, bos_processor
from llmforge.tokenizers.base import (
    BYTE,
    CONTROL,
    END_OF_TEXT,
    NO_MERGE,
    NORMAL,
    PASS_THROUGH,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GGUFVocabulary,
    Tokenizer,
    characters_to_bytes,
    padding_token,
)
from llmforge.tokenizers.bpe import BPETokenizer, new_state
from llmforge.tokenizers.char import CharTokenizer
from llmforge.tokenizers.sentencepiece import SentencePieceTokenizer

# Names of `tokenizer.ggml.pre` -> ours; llama.cpp does the same for all of a row.
PRE_NAMES = {
    "gpt-2": "gpt-2",
    "phi-2": "gpt-2",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "smollm": "smollm",
}

MAX_TOKENS = 2**21
MAX_TOKEN_CHARS = 512  # of pieces that are merged; SentencePiece's trainer ends at 16 unless told otherwise


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, where: str) -> Tokenizer:
    """The tokenizer of a GGUF file: of the kind that wrote it, with the same ids.

    Differences that remain to llama.cpp: it gives other ids to text of special tokens' names in "llama" vocabularies, if those can
    be merged; and a tokenizer.json with NFC (Qwen) composes characters, llama.cpp and this tokenizer do not.

    Args:
        metadata: keys tokenizer.*, as `read_gguf_header` gives them; others are ignored.
        where: names the file in errors.
    Returns:
        CharTokenizer, BPETokenizer or SentencePieceTokenizer.
    Raises:
        ConvertError: no tokenizer, one of a kind that is not supported, or a damaged one.
    """
    try:
        vocabulary = _read(metadata)
        if vocabulary.model == "llama":
            return _sentencepiece(vocabulary)
        return _characters(vocabulary) or _byte_level(vocabulary)
    except (ConvertError, DataError) as error:
        raise ConvertError(f"the tokenizer in {where} cannot be used: {error}") from error


def _read(metadata: Mapping[str, Any]) -> GGUFVocabulary:
    """The vocabulary as the metadata has it, checked, without the padding at its end."""
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ConvertError(
            f"tokenizer.ggml.model is {str(model)[:40]!r}; 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) are supported"
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model == "gpt2" and (not isinstance(pre, str) or pre not in PRE_NAMES):
        raise ConvertError(
            f"tokenizer.ggml.pre is {str(pre)[:40]!r}; supported are {', '.join(PRE_NAMES)}. A wrong one would give other ids without a "
            "warning; take the model's Hugging Face folder instead"
        )
    tokens = _list(metadata, "tokens", (str,))
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ConvertError(f"there are {len(tokens):,} tokens; 1 to {MAX_TOKENS:,} are possible")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # llama.cpp's names for them
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if seen.setdefault(token, i) != i:
            raise ConvertError(f"the tokens {seen[token]} and {i} are both {token[:40]!r}; each must be another")
    types = _list(metadata, "token_type", (int,), default=[NORMAL] * len(tokens))
    scores = _list(metadata, "scores", (int, float)) if model == "llama" else []
    for name, values in (("token_type", types), ("scores", scores if model == "llama" else tokens)):
        if len(values) != len(tokens):
            raise ConvertError(f"tokenizer.ggml.{name} has {len(values):,} values for {len(tokens):,} tokens")
    ids = {
        name: _id(metadata, key, len(tokens))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ConvertError(f"tokenizer.chat_template is of the type {type(template).__name__}; it must be text")
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if not NORMAL <= kind <= BYTE:
            raise ConvertError(f"the token {i} ({token[:40]!r}) has the unknown type {kind}; 1 to 6 are known")
        # llama.cpp takes tokens of these names for special ones too, whatever their type.
        if (token in END_TOKENS and kind != UNUSED) or (kind == NORMAL and i in ids.values()):
            types[i] = UNKNOWN if i == ids["unk"] and model == "llama" else CONTROL
    end = len(tokens)
    while end > 1 and types[end - 1] == UNUSED and tokens[end - 1] == padding_token(end - 1):
        end -= 1
    llama = model == "llama"
    return GGUFVocabulary(
        model=model,
        tokens=tokens[:end],
        token_types=types[:end],
        merges=[] if llama else _list(metadata, "merges", (str,)),
        scores=scores[:end],
        pre=pre if llama else PRE_NAMES[pre],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        unk_token_id=ids["unk"],
        pad_token_id=ids["pad"],
        add_bos_token=_flag(metadata, "add_bos_token", default=llama or PRE_NAMES[pre] == "llama-bpe"),
        add_space_prefix=_flag(metadata, "add_space_prefix", default=True) if llama else None,
        chat_template=None if template == PASS_THROUGH else template,
    )


def _characters(vocabulary: GGUFVocabulary) -> CharTokenizer | None:
    """The CharTokenizer that writes this vocabulary; None if it is another's."""
    if vocabulary.tokens[-1] != END_OF_TEXT or len(vocabulary.tokens) < 2:
        return None
    try:
        chars = [characters_to_bytes(token).decode() for token in vocabulary.tokens[:-1]]
        tokenizer = CharTokenizer(chars)
    except (UnicodeDecodeError, DataError):
        return None
    written = tokenizer.gguf_vocabulary()
    same = (written.tokens, written.token_types, written.merges, written.eos_token_id) == (
        vocabulary.tokens,
        vocabulary.token_types,
        vocabulary.merges,
        vocabulary.eos_token_id,
    )
    return cast(CharTokenizer, tokenizer.with_chat_template(vocabulary.chat_template)) if same else None


def _byte_level(vocabulary: GGUFVocabulary) -> BPETokenizer:
    tokens = {
        token: i
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
        if kind != UNUSED
    }
    merges = []
    for rank, merge in enumerate(vocabulary.merges):
        if merge == NO_MERGE:
            continue
        left, _, right = merge.partition(" ")
        for part in (left, right, left + right):
            if not part or part not in tokens:
                raise ConvertError(f"the merge {rank} ({merge[:60]!r}) has the part {part[:40]!r}, which is no token")
        merges.append((left, right))
    state = new_state(vocabulary.pre, tokens, merges)
    config = _config(vocabulary)
    state |= {"added_tokens": _added_tokens(vocabulary), "post_processor": bos_processor(vocabulary.tokens, config)}
    return BPETokenizer(backend_of(json.dumps(state), "the vocabulary"), config=config)


def _sentencepiece(vocabulary: GGUFVocabulary) -> SentencePieceTokenizer:
    for i, (token, score) in enumerate(zip(vocabulary.tokens, vocabulary.scores, strict=True)):
        if not math.isfinite(score):
            raise ConvertError(f"the token {i} ({token[:40]!r}) has the score {score}, which is no number")
        if vocabulary.token_types[i] in (NORMAL, UNUSED) and len(token) > MAX_TOKEN_CHARS:
            raise ConvertError(f"the token {i} has {len(token):,} characters; at most {MAX_TOKEN_CHARS:,} are possible")
    unknown = [i for i, kind in enumerate(vocabulary.token_types) if kind == UNKNOWN]
    unk_id = vocabulary.unk_token_id if vocabulary.unk_token_id is not None else next(iter(unknown), 0)
    return SentencePieceTokenizer.from_scores(
        vocabulary.tokens,
        vocabulary.scores,
        vocabulary.token_types,
        unk_id=unk_id,
        add_space_prefix=vocabulary.add_space_prefix is not False,
        config=_config(vocabulary),
    )


def _added_tokens(vocabulary: GGUFVocabulary) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _config(vocabulary: GGUFVocabulary) -> dict[str, Any]:
    """tokenizer_config.json of the vocabulary."""
    ids = {
        "bos_token": vocabulary.bos_token_id,
        "eos_token": vocabulary.eos_token_id,
        "unk_token": vocabulary.unk_token_id,
        "pad_token": vocabulary.pad_token_id,
    }
    named = {key: vocabulary.tokens[i] for key, i in ids.items() if i is not None and i < len(vocabulary.tokens)}
    template = {} if vocabulary.chat_template is None else {"chat_template": vocabulary.chat_template}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": vocabulary.add_bos_token and "bos_token" in named,
        "clean_up_tokenization_spaces": False,
        **template,
    }


def _list(
    metadata: Mapping[str, Any], name: str, types: tuple[type, ...], *, default: list[Any] | None = None
) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, default)
    if value is None:
        raise ConvertError(f"{key} is missing")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConvertError(f"{key} is of the type {type(value).__name__}; it must be a list")
    for i, item in enumerate(value):
        if not isinstance(item, types) or isinstance(item, bool):
            raise ConvertError(f"{key} has {str(item)[:40]!r} at {i}; it must have {types[-1].__name__} values")
    return list(value)


def _id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise ConvertError(f"{key} is {str(value)[:40]!r}; it must be the id of one of the {count:,} tokens")
    return value


def _flag(metadata: Mapping[str, Any], name: str, *, default: bool) -> bool:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise ConvertError(f"{key} is {str(value)[:40]!r}; it must be true or false")
    return value
