"""Ollama's Modelfile: which file, how a conversation becomes text, where an answer ends, how much context.

Source: Ollama's docs/modelfile.md and parser/parser.go. The parser has no escapes: a value in quotes ends at the first line end
that follows a closing quote, and characters that do not print are dropped.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from llmforge.deploy.chat_form import FileChat, chat_form, go_template, stop_words
from llmforge.errors import ConfigError

DEFAULT_NUM_CTX = (
    8192  # the largest that is written without being asked for: Ollama reserves the whole cache at the start
)
_MARK = "# Written by llmforge deploy. Any line may be changed; then run ollama create again. "

_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


def modelfile(
    source: str,
    metadata: Mapping[str, Any],
    *,
    adapter: str | None = None,
    system: str | None = None,
    num_ctx: int | None = None,
) -> tuple[str, list[str]]:
    """The text of a Modelfile.

    Args:
        source: what FROM names: a path (relative to the Modelfile, beginning with "./", or absolute), or a model of Ollama's.
        metadata: of the GGUF with the tokenizer, as `read_gguf_header` gives it; empty where `source` is a model of Ollama's, whose
            own template and settings stay.
        adapter: path of a GGUF with a LoRA adapter.
        system: what the model is told before every conversation.
        num_ctx: tokens of context; None = all the model has, at most 8192.
    Returns:
        the text, and what the user should know about it.
    Raises:
        ConfigError: a value that a Modelfile cannot express or the model cannot use.
    """
    lines, notes = [f"FROM {_path(source)}"], []
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    if metadata:
        chat = FileChat.from_metadata(metadata)
        form = None
        if chat.chat_template is None:
            if system is not None:
                raise ConfigError(
                    f"system is {system[:40]!r}, but the model has no chat template: it continues texts and would never see it"
                )
            lines.append('TEMPLATE """{{ .Prompt }}"""')
            notes.append("no chat template: the model continues what is typed, it does not answer")
        else:
            found = chat_form(chat)
            if isinstance(found, str):
                notes.append(f"no TEMPLATE line, Ollama reads the GGUF's own chat template ({found})")
            else:
                form = found
                lines.append(f"TEMPLATE {quoted('the template', go_template(form))}")
                if "tools" in chat.chat_template:
                    notes.append("TEMPLATE has the conversation alone; remove it to use the chat template's tools")
                if form.system is None and system is not None:
                    raise ConfigError(
                        f"system is {system[:40]!r}, but the model's chat template has no system messages; put it into the question"
                    )
        lines += [f"PARAMETER stop {quoted('a stop word', word)}" for word in stop_words(chat, form)]
    context, why = _num_ctx(metadata, num_ctx)
    if context is not None:
        lines.append(f"PARAMETER num_ctx {context}")
        notes.append(why)
    if system is not None:
        lines.append(f"SYSTEM {quoted('system', system)}")
    text = "\n".join(lines) + "\n"
    return f"{_MARK}({_digest(text)})\n{text}", notes


def quoted(what: str, text: str) -> str:
    """A value as Ollama's parser reads it back unchanged; `what` names it in the error.

    Raises:
        ConfigError: there is no way to write it.
    """
    if re.search(r'"""\s*\n', text):
        raise ConfigError(
            f'{what} has three quotes (""") at the end of a line, where a Modelfile\'s value ends; use others'
        )
    lost = next((c for c in text if not (c.isprintable() or c in "\n\t")), None)
    if lost is not None:
        raise ConfigError(
            f"{what} has the character U+{ord(lost):04X}, which Ollama drops from a Modelfile; take it out"
        )
    if '"' in text or "\n" in text:
        return f'"""{text}"""'
    return f'"{text}"'


def check_ollama_name(name: str) -> str:
    """A model's name by Ollama's rules: [host/][namespace/]model[:tag].

    Raises:
        ConfigError: another one.
    Source: Ollama's types/model/name.go.
    """
    path, _, tag = name.partition(":") if ":" in name.rpartition("/")[2] else (name, "", "latest")
    *owners, model = path.split("/")
    parts = [*owners, model, tag]
    good = len(owners) <= 2 and all(_NAME_PART.fullmatch(part) and ".." not in part for part in parts)
    if not good or (owners and "." in owners[-1]):
        raise ConfigError(
            f"{name!r} is no name for Ollama: letters, digits, '_', '-' and '.', first a letter, digit or '_', at most 80, with a "
            f"':tag' after it if you like; try {ollama_name(name)!r}"
        )
    return name


def ollama_name(text: str) -> str:
    """A name for Ollama made of any text, such as the stem of a file.

    >>> ollama_name("Mi Tutor (v2).Q4_K_M")
    'mi-tutor-v2-.q4_k_m'
    """
    name = re.sub(r"[^a-z0-9_.-]+", "-", text.lower())
    return re.sub(r"\.\.+", ".", name).strip("-.")[:80].strip("-.") or "model"


def context_length(metadata: Mapping[str, Any]) -> int | None:
    """Tokens that the model was made for; None where the file does not say."""
    value = _of_architecture(metadata, "context_length")
    return value if isinstance(value, int) and value > 0 else None


def kv_cache_bytes(metadata: Mapping[str, Any], num_ctx: int) -> int | None:
    """Size of a 16-bit cache of keys and values for `num_ctx` tokens; None where the file does not say what it depends on."""
    layers, heads, width = (
        _of_architecture(metadata, key) for key in ("block_count", "attention.head_count", "embedding_length")
    )
    kv_heads = _of_architecture(metadata, "attention.head_count_kv", heads)
    if not all(isinstance(n, int) and n > 0 for n in (layers, heads, width, kv_heads)):
        return None
    key = _of_architecture(metadata, "attention.key_length", width // heads)
    value = _of_architecture(metadata, "attention.value_length", width // heads)
    if not isinstance(key, int) or not isinstance(value, int):
        return None
    return int(layers * kv_heads * (key + value) * 2 * num_ctx)


def _num_ctx(metadata: Mapping[str, Any], asked: int | None) -> tuple[int | None, str]:
    """The context to write, None for Ollama's own; and what it means."""
    longest = context_length(metadata)
    if asked is not None and asked < 1:
        raise ConfigError(f"num_ctx ({asked}) must be at least 1; leave it out for the model's own")
    if asked is not None and longest is not None and asked > longest:
        raise ConfigError(f"num_ctx ({asked:,}) must be at most {longest:,}, the model's context")
    context = asked if asked is not None else min(longest, DEFAULT_NUM_CTX) if longest is not None else None
    if context is None:
        return None, ""
    cache = kv_cache_bytes(metadata, context)
    why = f"context {context:,} tokens" + (f", {_size(cache)} of memory for its cache" if cache is not None else "")
    if asked is None and longest is not None and longest > context:
        why += f"; the model has {longest:,}, write more with --num-ctx"
    return context, why


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _of_architecture(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f"{metadata.get('general.architecture')}.{key}", default)


def _path(path: str) -> str:
    if not path.isprintable() or path != path.strip():
        raise ConfigError(f"the path {path!r} cannot be written in a Modelfile; rename the file or its folder")
    return path


def is_untouched(there: str, of: str) -> bool:
    """Whether a Modelfile is as `modelfile` wrote it, for the same files as the Modelfile `of`: then it may be written anew."""
    first, _, rest = there.partition("\n")
    return first == f"{_MARK}({_digest(rest)})" and _sources(there) == _sources(of)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sources(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("FROM ", "ADAPTER "))]
