"""Files of prompts, with or without the answers that one would like to have: records as tuning reads them, and less."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmforge.data.records import Continuation, example_of, read_records
from llmforge.errors import DataError, shown, some

_ANSWERS = ("output", "completion", "response", "answer")
_FORMS = '{"prompt": ...}, {"instruction": ..., "input": ..., "output": ...} or {"messages": [...]}'


@dataclass(frozen=True)
class Prompt:
    """A question, with what was said before it."""

    messages: tuple[Mapping[str, Any], ...]  # {"role", "content"} and Alpaca's "input"; the last one asks
    answer: str | None = None  # the one that a good model gives
    raw: bool = False  # a text to be continued, without a chat template, as it is tuned on
    tools: Sequence[Any] | None = None  # for the chat template

    @property
    def text(self) -> str:
        """For a model that continues texts: the contents, with an empty line between them."""
        return "\n\n".join(map(_content, self.messages))

    @property
    def title(self) -> str:
        """For people: the question, and the roles where there is more than one message."""
        if len(self.messages) == 1:
            return self.text
        return "\n\n".join(f"{message['role']}: {_content(message)}" for message in self.messages)


def _content(message: Mapping[str, Any]) -> str:
    return "\n\n".join(message[key] for key in ("content", "input") if key in message)


def read_prompts(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Prompt]:
    """Read prompts from JSON lines, a JSON list, or a text with one prompt per line.

    Args:
        path: .txt: plain lines. Else one JSON object per line, or a list of them, see `prompt_of`.
        limit: take the first so many; None = all.
    Raises:
        DataError: the file cannot be read, has no prompt, or a line that is none, with its number.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit ({limit}) must be at least 1; leave it out for all prompts")
    prompts = []
    for where, record in islice(_lines(path) if path.suffix.lower() == ".txt" else read_records(path), limit):
        try:
            if isinstance(record, DataError):
                raise record
            prompts.append(prompt_of(record))
        except DataError as error:
            raise DataError(f"{path}, {where}: {error}") from error
    if not prompts:
        raise DataError(f"{path} has no prompts; each line is like {_FORMS}, or in a .txt a prompt as it is")
    return prompts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from error
    yield from ((f"line {i:,}", line) for i, line in enumerate(text.splitlines(), start=1) if line.strip())


def prompt_of(record: Any) -> Prompt:
    """The prompt of a record.

    Args:
        record: text; {"prompt": ...}; Alpaca's {"instruction", "input", "output"}; {"messages": [{"role", "content"}, ...]}; ShareGPT's
            {"conversations": [{"from", "value"}, ...]}. "output", "response", "answer", or a last message of the assistant, is the
            answer. {"prompt", "completion"} is a text and what follows it, without a chat template.
    Raises:
        DataError: none of these.
    """
    if isinstance(record, Prompt):
        return record
    if isinstance(record, str):
        return Prompt((_question("the prompt", record),))
    if not isinstance(record, Mapping):
        raise DataError(f"{shown(record)} is no prompt; it must be like {_FORMS}")
    for key, kind in (("messages", "messages"), ("conversations", "sharegpt")):
        if key in record:
            return _conversation(record, key, kind)
    if "prompt" in record and record.get("completion") is not None:
        example = example_of(record, "completion")
        assert isinstance(example, Continuation)
        return Prompt((_question("prompt", example.prompt),), example.completion, raw=True)
    answer = next((record[key] for key in _ANSWERS if record.get(key) is not None), "")
    if not isinstance(answer, str):
        raise DataError(f"the answer is {shown(answer)}; it must be text")
    if "prompt" in record:
        return Prompt((_question("prompt", record["prompt"]),), answer or None)
    if "instruction" in record:
        example = example_of({**record, "output": answer}, "alpaca")
        assert not isinstance(example, Continuation)
        return Prompt(example.messages[:-1], answer or None)
    raise DataError(f"its keys are {some([shown(key) for key in record])}; a prompt is like {_FORMS}")


def _question(what: str, text: Any) -> dict[str, str]:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{what} is {shown(text)}; it must be text that is not empty")
    return {"role": "user", "content": text}


def _conversation(record: Mapping[str, Any], key: str, kind: str) -> Prompt:
    entries = record[key]
    answered = True
    if isinstance(entries, list) and entries and isinstance(entries[-1], Mapping):
        answered = entries[-1].get("role", entries[-1].get("from")) in ("assistant", "gpt")
    if not answered:  # a place for the answer, as the reader wants one
        record = {**record, key: [*entries, {"role": "assistant", "content": ""}]}
    example = example_of(record, kind)
    assert not isinstance(example, Continuation)
    *asked, answer = example.messages
    if asked[-1]["role"] not in ("user", "tool"):
        raise DataError(f"there is no question: before the answer comes a message of the {asked[-1]['role']}")
    return Prompt(tuple(asked), answer["content"] or None if answered else None, tools=example.tools)
