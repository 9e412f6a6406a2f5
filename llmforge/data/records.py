"""Records of examples: JSONL or JSON files, in the forms that data sets for tuning have; checked value by value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmforge.config import did_you_mean
from llmforge.errors import ConfigError, DataError, shown, some
from llmforge.tokenizers.record_files import TWICE, Place, read_records

__all__ = [
    "KINDS",
    "Continuation",
    "Conversation",
    "Example",
    "Place",
    "check_kind",
    "example_of",
    "kind_of",
    "read_records",
]

MAX_MESSAGES = 1_000  # of a conversation: each answer is rendered with all that was before it

# The kinds of records, and what they are like. The first one of these that has all its keys in a record is the record's.
KINDS: Mapping[str, str] = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "completion": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
}
_KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
# What other data sets call these, too far from the name for a guess by spelling.
_OTHER_NAMES = {
    "output": ("response", "answer", "target", "completion"),
    "instruction": ("question", "prompt", "query"),
    "completion": ("response", "answer", "output"),
    "prompt": ("question", "instruction", "input"),
    "text": ("content", "document"),
    "messages": ("conversation", "dialog", "chat"),
    "conversations": ("conversation", "dialog", "chat"),
}


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer; what a chat template wants to know beside them."""

    messages: tuple[Mapping[str, Any], ...]  # role, content; input of an Alpaca record; weight of an answer
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Continuation:
    """A text that goes on a prompt, without a template; the prompt of plain text is empty."""

    prompt: str
    completion: str


Example = Conversation | Continuation


def kind_of(record: Any) -> str:
    """Which of KINDS a record is, by its keys.

    Raises:
        DataError: none.
    """
    _check_object(record)
    for kind, keys in _KEYS.items():
        if all(key in record for key in keys):
            return kind
    forms = "; ".join(f"{kind}: {form}" for kind, form in KINDS.items())
    guess = next(
        (
            f"; did you mean {wanted!r} for {found!r}?"
            for keys in _KEYS.values()
            for wanted in keys
            if wanted not in record and (found := _other_name(wanted, record))
        ),
        "",
    )
    raise DataError(f"its keys are {_names(record)}, which is none of the known kinds{guess} Known are {forms}")


def check_kind(kind: str) -> str:
    """Raises ConfigError: there is no such kind of records."""
    if kind != "auto" and kind not in KINDS:
        raise ConfigError(f"unknown kind of records {kind!r}; {did_you_mean(kind, ['auto', *KINDS])}")
    return kind


def example_of(record: Any, kind: str) -> Example:
    """The example in a record of one of KINDS.

    Raises:
        DataError: what is wrong with which value.
    """
    _check_object(record)
    for key in _KEYS[kind]:
        if key not in record:
            found = _other_name(key, record)
            raise DataError(
                f"it has no {key!r}, its keys are {_names(record)}"
                + (
                    f"; did you mean {key!r} for {found!r}?"
                    if found
                    else f"; a record of the kind {kind} is like {KINDS[kind]}"
                )
            )
    return _READERS[kind](record)


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    instruction, context = _text(record, "instruction"), _text(record, "input", optional=True)
    if not instruction.strip() and not context.strip():
        raise DataError(
            f"instruction is {shown(instruction)} and there is no input: nothing is asked; write what is to be done"
        )
    messages: list[dict[str, Any]] = []
    if (system := _text(record, "system", optional=True)).strip():
        messages.append({"role": "system", "content": system})
    message = {"role": "user", "content": instruction}
    messages.append(message | {"input": context} if context.strip() else message)
    messages.append({"role": "assistant", "content": _text(record, "output")})
    return Conversation(tuple(messages))


def _completion(record: Mapping[str, Any]) -> Continuation:
    prompt, completion = _text(record, "prompt"), _text(record, "completion")
    if not completion:
        raise DataError("completion is empty; it must have text to learn")
    return Continuation(prompt, completion)


def _plain_text(record: Mapping[str, Any]) -> Continuation:
    text = _text(record, "text")
    if not text.strip():
        raise DataError(f"text is {shown(text)}; it must have text to learn")
    return Continuation("", text)


def _messages(record: Mapping[str, Any]) -> Conversation:
    return _conversation(record, "messages", ("role", "content"), ("from", "value"))


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    return _conversation(record, "conversations", ("from", "value"), ("role", "content"))


def _conversation(
    record: Mapping[str, Any], key: str, names: tuple[str, str], other_names: tuple[str, str]
) -> Conversation:
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{key} is {shown(entries)}; it must be a list of messages, at least a question and an answer")
    if len(entries) > MAX_MESSAGES:
        raise DataError(
            f"{key} has {len(entries):,} messages; at most {MAX_MESSAGES:,} are allowed: split the conversation"
        )
    messages: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        what = f"{key}[{i}]"
        if not isinstance(entry, dict):
            raise DataError(f'{what} is {shown(entry)}; it must be like {{"{names[0]}": "...", "{names[1]}": "..."}}')
        _check_object(entry, what)
        role_key, content_key = names if names[0] in entry or other_names[0] not in entry else other_names
        if role_key not in entry or content_key not in entry:
            missing = role_key if role_key not in entry else content_key
            raise DataError(f"{what} has no {missing!r}, its keys are {_names(entry)}")
        role = entry[role_key]
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{what}: {role_key} is {shown(role)}; known are {', '.join(_ROLES)}")
        message = {"role": _ROLES[role], "content": _content(entry, content_key, what)}
        if message["role"] == "system" and i > 0:
            raise DataError(f"{what} is from the system; only the first message can be")
        if message["role"] == "user" and not message["content"].strip():
            raise DataError(f"{what}: {content_key} is {shown(message['content'])}; a question must have text")
        message |= {name: entry[name] for name in ("tool_calls", "tool_call_id", "name") if entry.get(name) is not None}
        if (weight := entry.get("weight", 1)) not in (0, 1):
            raise DataError(
                f"{what}: weight is {shown(weight)}; it must be 1, or 0 for an answer that is not to be learned"
            )
        messages.append(message if weight else message | {"weight": 0})
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{key} has no answer: none of its {len(messages)} messages is from the assistant")
    if not any(message["role"] != "system" for message in messages[: answers[0]]):
        raise DataError(
            f"{key}[{answers[0]}] is an answer, but nothing was asked before it; begin with a message of the user"
        )
    if all(messages[i].get("weight") == 0 for i in answers):
        raise DataError(f"{key} has no answer to learn: all have the weight 0")
    tools = record.get("tools")
    if not isinstance(tools, list | None):
        raise DataError(f"tools is {shown(tools)}; it must be a list")
    return Conversation(tuple(messages[: answers[-1] + 1]), tools)  # a question at the end has no answer to learn


def _content(entry: Mapping[str, Any], key: str, what: str) -> str:
    value = entry[key]
    if value is None and entry.get("tool_calls"):
        return ""
    if isinstance(value, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        if not parts or not all(isinstance(part, str) for part in parts):
            raise DataError(
                f"{what}: {key} is {shown(value)}; of a list of parts, only those of the type text can be learned"
            )
        value = "".join(part for part in parts if part is not None)
    return _checked_text(value, f"{what}: {key}")


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "text": _plain_text,
}


def _text(record: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    value = record.get(key)
    return "" if optional and value is None else _checked_text(value, key)


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {shown(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half of a surrogate pair at character {error.start:,}, {shown(value[error.start : error.start + 20])}, which is "
            "no character; write the whole one"
        ) from error
    return value


def _check_object(value: Any, what: str = "it") -> None:
    if not isinstance(value, Mapping):
        raise DataError(f"{what} is {shown(value)}; a record must be an object, like {KINDS['alpaca']}")
    if TWICE in value:
        raise DataError(f"{what} has the key {shown(value[TWICE])} twice; which one counts? Take one out")


def _names(record: Mapping[Any, Any]) -> str:
    return some([shown(name) for name in record]) if record else "none"


def _other_name(key: str, record: Mapping[Any, Any]) -> str | None:
    """The key of the record that may be meant by `key`."""
    found = next((name for name in _OTHER_NAMES[key] if name in record), None)
    guess = did_you_mean(key, [name for name in record if isinstance(name, str)])
    near = next((name for name in record if guess == f"did you mean {name!r}?"), None)
    return found or near
