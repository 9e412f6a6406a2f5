"""Conversations as the text, and the ids, that a model was tuned on: chat templates, rendered as transformers does it.

A template comes with a model, from whoever made that: it runs in jinja's sandbox and sees nothing but plain values.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmforge.errors import DataError
from llmforge.tokenizers.base import Tokenizer


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation, in the format that the tokenizer's chat template gives.

    Args:
        messages: {"role": "user", "content": "..."} and so on; what else may be in them is the template's matter.
        add_generation_prompt: end with what comes before an answer.
        variables: more for the template, such as tools=[...] or enable_thinking=False; plain values, as JSON has them.
    Raises:
        DataError: there is no template, it is faulty, or it refuses these messages.
    """
    template = tokenizer.chat_template
    if template is None:
        raise DataError(
            "the tokenizer has no chat template: this is a base model, which continues texts; give it a prompt instead of messages"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {i} is {message!r}; it must be like " + '{"role": "user", "content": "Hello"}')
    values = {"messages": list(messages), "tools": None, "documents": None, **variables}
    try:
        plain = {name: _plain(value) for name, value in values.items()}
        compiled = _compile(template)
        return compiled.render(**{**tokenizer.special_tokens, **plain}, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is faulty in line {error.lineno}: {error.message}; {_WAY_OUT}") from error
    except jinja2.TemplateError as error:  # also what the template raises about the messages
        raise DataError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # whatever a faulty expression in it raises
        raise DataError(f"the chat template fails with {type(error).__name__}: {error}; {_WAY_OUT}") from error


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The ids of `render_chat`; the template writes the special tokens, BOS too, and none is added.

    As in transformers, names of special tokens in a message are these tokens too.

    Raises:
        DataError: as `render_chat`.
    """
    return tokenizer.encode_special(
        render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt, **variables)
    )


def check_template(template: str) -> None:
    """Raises DataError: the template is not Jinja."""
    try:
        _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is faulty in line {error.lineno}: {error.message}; {_WAY_OUT}") from error


_WAY_OUT = "take the template from the model's tokenizer_config.json, or correct it there"


class _GenerationBlocks(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what the model wrote, is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which refuses at once: a forbidden attribute that is only printed would be an empty text otherwise."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter writes < and > as escapes, for web pages.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _plain(value: Any) -> Any:
    """The value rebuilt of plain types, so that a template has no object with methods that do something."""
    if type(value) is str:  # most are
        return value
    if value is None or isinstance(value, bool | int | float | str):
        kinds = (bool, int, float, str)
        return next((kind(value) for kind in kinds if isinstance(value, kind)), None)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise DataError(
        f"a value of the type {type(value).__name__} cannot be given to a chat template; text, numbers, lists and dicts can"
    )
