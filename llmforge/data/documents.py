"""Examples as documents: the ids that a model sees, and which of them it learns to write."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmforge.data.records import Continuation, Conversation, Example
from llmforge.errors import DataError, shown
from llmforge.tokenizers import Tokenizer, render_chat
from llmforge.tokenizers.templates import has_input, joined_input


class Document(NamedTuple):
    """The ids of an example."""

    ids: npt.NDArray[np.uint32]  # (N,)
    learned: npt.NDArray[np.bool_]  # (N,), what carries a loss where it is the next token; never the first one


@dataclass(frozen=True)
class _Piece:
    """A stretch of a document that is tokenized for itself."""

    text: str
    learned: bool
    special: bool  # names of special tokens are these tokens
    after: bool = False  # it goes on what is before it
    overlap: int = 0  # ids at its beginning that the piece before it has already
    end: tuple[int, ...] = ()  # ids after those of the text


class DocumentWriter:
    """Writes examples as documents.

    Each answer is tokenized for itself: the ids before it are those that a program gives the model to answer, whatever the answer is.
    What ends an answer belongs to it: up to the last token after which generation stops, or eos, where the template writes none. The
    rest that the template puts after an answer, as ChatML's line end, is the beginning of the next prompt; after the last answer
    there is nothing.

    Args:
        tokenizer: with the chat template, where there are conversations.
        train_on_inputs: prompts are learned, too.
    """

    def __init__(self, tokenizer: Tokenizer, *, train_on_inputs: bool = False) -> None:
        self.tokenizer = tokenizer
        self.train_on_inputs = train_on_inputs
        self._has_input = has_input(tokenizer)
        self._ends = [tokenizer.decode([i]) for i in sorted(tokenizer.end_token_ids)]
        if tokenizer.chat_template is not None:
            self._check_template()

    def write(self, examples: Sequence[Example]) -> list[Document | DataError]:
        """The document of each example, or what is wrong with it: the template refuses it, or the vocabulary lacks a character."""
        documents: list[Document | DataError] = []
        found: list[list[_Piece]] = []
        for example in examples:
            try:
                found.append(list(self._pieces(example)))
                documents.append(_NOTHING)
            except DataError as error:
                documents.append(error)
        try:
            ids = iter(self._encode(found))
        except DataError as error:
            if len(examples) == 1:
                return [error]
            return [document for example in examples for document in self.write([example])]
        return [next(ids) if document is _NOTHING else document for document in documents]

    def _encode(self, documents: Sequence[Sequence[_Piece]]) -> Iterator[Document]:
        pieces = [piece for document in documents for piece in document]
        ids: list[npt.NDArray[np.uint32]] = [_NOTHING.ids] * len(pieces)
        for special in (False, True):
            for after in (False, True):
                which = [i for i, piece in enumerate(pieces) if (piece.special, piece.after) == (special, after)]
                texts = [pieces[i].text for i in which]
                for i, part in zip(
                    which, self.tokenizer.encode_batch(texts, special=special, after=after), strict=True
                ):
                    ids[i] = np.concatenate([part[pieces[i].overlap :], np.array(pieces[i].end, dtype=np.uint32)])
        done = iter(ids)
        return iter([self._join(document, [next(done) for _ in document]) for document in documents])

    def _join(self, pieces: Sequence[_Piece], parts: Sequence[npt.NDArray[np.uint32]]) -> Document:
        learned = [np.full(len(part), piece.learned) for piece, part in zip(pieces, parts, strict=True)]
        ids, mask = np.concatenate(parts), np.concatenate(learned)
        bos = self.tokenizer.bos_token_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != bos:
            ids, mask = np.concatenate([np.array([bos], dtype=np.uint32), ids]), np.concatenate([mask[:1], mask])
        mask[:1] = False  # nothing is before it
        return Document(ids, mask)

    def _pieces(self, example: Example) -> Iterator[_Piece]:
        if isinstance(example, Continuation):
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise DataError("the tokenizer has no end-of-text token, with which a text could end")
            learned = self.train_on_inputs or not example.prompt
            yield _Piece(
                example.prompt or example.completion, learned, special=False, end=() if example.prompt else (eos,)
            )
            if example.prompt:
                yield _Piece(example.completion, True, special=False, after=True, end=(eos,))
        else:
            yield from self._turns(example)

    def _turns(self, example: Conversation) -> Iterator[_Piece]:
        messages = [
            {name: value for name, value in message.items() if name != "weight"}
            if self._has_input
            else {name: value for name, value in joined_input(message).items() if name != "weight"}
            for message in example.messages
        ]
        tools: dict[str, Any] = {} if example.tools is None else {"tools": example.tools}
        done, end = "", None  # the text so far; the name of the token that ends it
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render_chat(self.tokenizer, messages[:i], **tools)
            if not prompt.startswith(done):
                raise DataError(
                    f"the chat template writes what is before message {i} otherwise once there are more messages: "
                    f"{_difference(done, prompt)}, so that no text of all answers has what the model sees before each; make records of "
                    "one answer each, or take another template"
                )
            whole = render_chat(self.tokenizer, messages[: i + 1], add_generation_prompt=False, **tools)
            if not whole.startswith(prompt):
                raise DataError(
                    f"the chat template writes the prompt of message {i} otherwise once it is answered: {_difference(prompt, whole)}, so "
                    "that training would not see what a program gives the model to answer; take another template"
                )
            rest, learned = prompt[len(done) :], self.train_on_inputs
            if rest:
                if end is None:
                    yield _Piece(rest, learned, special=True, after=bool(done))
                else:  # encoded with the token before it, after which a tokenizer may put a space
                    yield _Piece(end + rest, learned, special=True, overlap=1)
            cut, end = self._cut(whole, len(prompt))
            if cut == len(prompt):
                raise DataError(f"the chat template writes nothing for the answer in message {i}")
            learned = learned or example.messages[i].get("weight") != 0
            yield _Piece(whole[len(prompt) : cut], learned, special=True, after=True, end=() if end else (self._eos(),))
            done = whole[:cut]

    def _cut(self, text: str, start: int) -> tuple[int, str | None]:
        """Where the answer that begins at `start` ends, and the name of the token that ends it; None where there is none."""
        ends = [(at + len(name), name) for name in self._ends if (at := text.rfind(name, start)) >= 0]
        cut, name = max(ends, default=(len(text), None))
        # With more than white space behind it, it is of what the answer says.
        return (len(text), None) if text[cut:].strip() else (cut, name)

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "neither the chat template nor the tokenizer has a token that ends an answer; the model could not stop"
            )
        return eos

    def _check_template(self) -> None:
        """Raises DataError: the template writes prompts otherwise once they are answered, whatever they are."""
        question, answer = {"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": "Nada."}
        try:
            prompt = render_chat(self.tokenizer, [question])
            whole = render_chat(self.tokenizer, [question, answer], add_generation_prompt=False)
        except DataError:  # it wants something that the examples may have; a faulty one fails with each of them
            return
        if not whole.startswith(prompt):
            raise DataError(
                f"the chat template cannot be trained with: once it is answered it writes a prompt otherwise: {_difference(prompt, whole)}; "
                "take another template, or text records that are rendered already"
            )


_NOTHING = Document(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.bool_))


def _difference(before: str, after: str) -> str:
    """Where a text that should begin with `before` does not."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return f"{shown(before[same : same + 40])} became {shown(after[same : same + 40])} at character {same:,}"
