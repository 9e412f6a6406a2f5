"""Files of prompts, with or without the answers that one would like to have."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.errors import DataError, shown

MAX_BYTES = 2**28  # of a file: a quarter of a gigabyte is more than anybody reads side by side

_ANSWERS = ("output", "completion", "response", "answer")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FORMS = '{"prompt": ...}, {"instruction": ..., "input": ..., "output": ...} or {"messages": [...]}'


@dataclass(frozen=True)
class Prompt:
    """A question, with what was said before it."""

    messages: tuple[Mapping[str, str], ...]  # {"role", "content"}; the last one is the user's
    answer: str | None = None  # the one that a good model gives

    @property
    def text(self) -> str:
        """For a model that continues texts: the contents, with an empty line between them."""
        return "\n\n".join(message["content"] for message in self.messages)

    @property
    def title(self) -> str:
        """For people: the question, and the roles where there is more than one message."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def read_prompts(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Prompt]:
    """Read prompts from JSON lines, a JSON list, or a text with one prompt per line.

    Args:
        path: .txt: plain lines. Else one JSON object per line, or a list of them: {"prompt": ...}, Alpaca's {"instruction", "input",
            "output"}, {"messages": [{"role", "content"}, ...]} or ShareGPT's {"conversations": [{"from", "value"}, ...]}; with
            "output", "completion", "response" or "answer", or a last message of the assistant, as the answer.
        limit: take the first so many; None = all.
    Raises:
        DataError: the file cannot be read, has no prompt, or a line that is none, with its number.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit ({limit}) must be at least 1; leave it out for all prompts")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read: take fewer prompts"
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    prompts = []
    for where, record in _records(path, text):
        try:
            prompts.append(prompt_of(record))
        except DataError as error:
            raise DataError(f"{path}, {where}: {error}") from error
        if len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{path} has no prompts; each line is like {_FORMS}, or in a .txt a prompt as it is")
    return prompts


def _records(path: Path, text: str) -> "list[tuple[str, Any]]":
    if path.suffix.lower() == ".txt":
        return [(f"line {i}", line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if text.lstrip().startswith("["):
        try:
            return [(f"record {i}", record) for i, record in enumerate(json.loads(text), start=1)]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
    records = []
    for i, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may have U+2028 in a text
        if line.strip():
            try:
                records.append((f"line {i}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {i} is not valid JSON: {error}; each line is like {_FORMS}") from error
    return records


def prompt_of(record: Any) -> Prompt:
    """The prompt of a record, see `read_prompts`; a text is a prompt as it is.

    Raises:
        DataError: none of the forms.
    """
    if isinstance(record, Prompt):
        return record
    if isinstance(record, str):
        return Prompt(({"role": "user", "content": _text("the prompt", record)},))
    if not isinstance(record, Mapping):
        raise DataError(f"{shown(record)} is no prompt; it must be like {_FORMS}")
    if "messages" in record or "conversations" in record:
        return _conversation(record)
    answer = next((record[key] for key in _ANSWERS if record.get(key) is not None), None)
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"the answer is {shown(answer)}; it must be text")
    if "prompt" in record:
        content = _text("prompt", record["prompt"])
    elif "instruction" in record:
        content = _text("instruction", record["instruction"])
        if record.get("input"):
            content += "\n\n" + _text("input", record["input"])
    else:
        raise DataError(f"the keys are {', '.join(map(shown, list(record)[:6]))}; a prompt is like {_FORMS}")
    system = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) else []
    return Prompt((*system, {"role": "user", "content": content}), answer or None)


def _conversation(record: Mapping[str, Any]) -> Prompt:
    entries = record["messages"] if "messages" in record else record["conversations"]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise DataError(f"the messages are {shown(entries)}; they must be a list with one message at least")
    messages = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise DataError(f"message {i} is {shown(entry)}; it must be like " + '{"role": "user", "content": "Hello"}')
        role = entry.get("role", entry.get("from"))
        if role not in _ROLES:
            raise DataError(f"message {i} has the role {shown(role)}; system, user and assistant are known")
        messages.append(
            {"role": _ROLES[role], "content": _text(f"message {i}", entry.get("content", entry.get("value")))}
        )
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise DataError("there is no question: the last message, or the one before the answer, must be the user's")
    return Prompt(tuple(messages), answer)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{what} is {shown(value)}; it must be text that is not empty")
    return value
