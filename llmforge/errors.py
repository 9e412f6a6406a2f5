"""What llmforge raises when the input is at fault; every message gives the value, the rule and the way out."""

import reprlib
from collections.abc import Sequence

MAX_MESSAGE = 600  # characters; values come from files, and may be of any length


class LLMForgeError(Exception):
    """Base of the errors below: `except llmforge.LLMForgeError` catches what a user can put right.

    Its text is one line that a terminal can show, whatever the file has that it quotes; of a very long one the middle is left out.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(LLMForgeError, ValueError):
    """A setting that cannot work: an unknown field, a value out of range, two settings that exclude each other."""


class DataError(LLMForgeError, ValueError):
    """A text, token file or tokenizer that cannot be used."""


class CheckpointError(LLMForgeError, RuntimeError):
    """A checkpoint or model folder that is missing, damaged, or of another shape."""


class ConvertError(LLMForgeError, ValueError):
    """A model or file that cannot be expressed in the format asked for."""


class OutOfMemoryError(LLMForgeError, RuntimeError):
    """The device's memory does not hold what a step needs; the message says what to change, and by how much."""


class LostRankError(LLMForgeError, RuntimeError):
    """Of the processes that train one model another one has ended, or cannot be reached."""


class DivergedError(LLMForgeError, RuntimeError):
    """Training that came to values that are not finite; the message names the last good checkpoint."""


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def one_line(text: str) -> str:
    """A text without its middle, if it is long, and with control characters as escapes.

    >>> one_line("a\\n" + 1000 * "b" + "c")[:4]
    'a\\\\nb'
    """
    half = MAX_MESSAGE // 2 - 2
    for _ in range(2):  # an escape is longer than its character
        if len(text) > MAX_MESSAGE:
            text = f"{text[:half]}...{text[-half:]}"
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text


def shown(value: object) -> str:
    """`repr` of a value that a file has, cut where it is long or deep: values can be larger than the memory when written out.

    >>> shown({"a": [1, 2.5, "x" * 1000]})
    "{'a': [1, 2.5, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx']}"
    """
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a value that is too long to write"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 77, 120, 40
