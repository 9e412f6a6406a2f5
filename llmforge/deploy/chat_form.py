"""What a chat template comes down to: the texts between the messages, as Ollama's templates and stop words need them.

Found by rendering conversations and looking at what stands between their contents, so that it holds for any template that puts texts
around messages, whoever wrote it; held against further conversations before it is believed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llmforge.errors import DataError
from llmforge.tokenizers import Tokenizer, render_chat
from llmforge.tokenizers.base import CONTROL, PASS_THROUGH, USER_DEFINED

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class FileChat:
    """What `render_chat` asks of a tokenizer, read from a GGUF's metadata: also of vocabularies that llmforge does not tokenize with."""

    chat_template: str | None  # None: a base model, which continues texts
    special_tokens: Mapping[str, str]  # by what they are for: "bos_token", "eos_token", ...
    marker_tokens: tuple[str, ...]  # names of all special tokens
    add_bos: bool  # llama.cpp puts BOS before a text by itself

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "FileChat":
        """Read the keys tokenizer.*; what is missing or of another type counts as absent."""
        tokens, types = (_list(metadata, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
        ids = {
            f"{name}_token": metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot"))
        }
        named = {
            name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens) and tokens[i]
        }
        template = metadata.get("tokenizer.chat_template")
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        # What llama.cpp does where the file does not say.
        default = model == "llama" or pre in ("llama-bpe", "llama3", "llama-v3")
        return cls(
            chat_template=template if isinstance(template, str) and template != PASS_THROUGH else None,
            special_tokens=named,
            marker_tokens=tuple(
                token for token, kind in zip(tokens, types, strict=False) if kind in (CONTROL, USER_DEFINED) and token
            ),
            add_bos=metadata.get("tokenizer.ggml.add_bos_token", default) is True,
        )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation; raises DataError as `render_chat`."""
        # render_chat looks at chat_template and special_tokens, no more.
        tokenizer = cast(Tokenizer, self)
        return render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """The texts between the messages of a conversation, by the roles on both sides."""

    user: str  # before a user's message that begins the conversation; a default system text is in it
    system: str | None  # before a system message; None: the template has none
    system_user: str
    user_assistant: str
    assistant_user: str
    prompt: str  # after the last user's message: what comes before an answer
    end: str  # after an answer that ends the conversation

    def render(self, messages: Sequence[Message]) -> str:
        """What the template makes of a conversation that ends with a user's message."""
        text, before = "", ""
        for message in messages:
            between = {
                ("", "system"): self.system,
                ("", "user"): self.user,
                ("system", "user"): self.system_user,
                ("user", "assistant"): self.user_assistant,
                ("assistant", "user"): self.assistant_user,
            }[before, message["role"]]
            text += (between or "") + message["content"]
            before = message["role"]
        return text + self.prompt


def chat_form(chat: FileChat) -> ChatForm | str:
    """The form of a chat template, or why it has none that Ollama's templates can express.

    The text of BOS is left out where llama.cpp adds it: Ollama would give the model two.
    """
    template = chat.chat_template
    if template is None:
        return "there is no chat template"
    if "strftime_now" in template:
        return "its text depends on the date"
    try:
        form = _form(chat)
    except DataError as error:
        return str(error)
    if form is None:
        return "it does more than to put texts around the messages"
    bos = chat.special_tokens.get("bos_token", "")
    if chat.add_bos and bos:
        without = {
            name: text.removeprefix(bos)
            for name, text in (("user", form.user), ("system", form.system))
            if text is not None
        }
        form = ChatForm(**{**form.__dict__, **without})
    return form


def _form(chat: FileChat) -> ChatForm | None:
    names = ("Qfirst", "Qsecond", "Qthird", "Qsystem")
    first, second, third, system = ({"role": r, "content": c} for r, c in zip(_ROLES, names, strict=True))
    found = _between(chat.render([first, second, third]), names[:3])
    finished = _between(chat.render([first, second], add_generation_prompt=False), names[:2])
    if found is None or finished is None:
        return None
    user, user_assistant, assistant_user, prompt = found
    try:
        with_system = _between(chat.render([system, first]), ("Qsystem", "Qfirst"))
    except DataError:  # "System role not supported", as Gemma's template says it
        with_system = None
        before_system, system_user = None, ""
    else:
        if with_system is None:
            return None
        before_system, system_user = with_system[:2]
    form = ChatForm(
        user=user,
        system=before_system,
        system_user=system_user,
        user_assistant=user_assistant,
        assistant_user=assistant_user,
        prompt=prompt,
        end=finished[-1],
    )
    for conversation in _CHECKS:
        if conversation[0]["role"] == "system" and form.system is None:
            continue
        if chat.render(conversation) != form.render(conversation):
            return None
    return form


_ROLES = ("user", "assistant", "user", "system")
_TEXTS = ("How many?", "Two.\n\n    x = {'a': 1}  # ¿qué?\n\nNo more.", "Why {{ so }} few?", "As it is.", "¡Gracias!")
_TURNS = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, _TEXTS, strict=False)]
_SYSTEM = {"role": "system", "content": "You answer briefly.\nIn one line."}
_CHECKS = [[*before, *_TURNS[:n]] for before in ([], [_SYSTEM]) for n in (1, 3, 5)]


def _between(text: str, contents: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the contents; None where each is not found once, in this order."""
    if any(text.count(content) != 1 for content in contents):
        return None
    found = re.split("|".join(contents), text)
    return found if re.findall("|".join(contents), text) == list(contents) else None


def go_template(form: ChatForm) -> str:
    """The form in Go's template language, as Ollama's TEMPLATE wants it.

    A conversation that ends with an answer is continued there: nothing is written after it. Blanks between actions would be text in
    Go, so there are none.

    Source: Ollama's docs/template.md: .Messages with .Role and .Content, neighbours of one role already joined.
    """
    between = (
        f'{{{{ if eq $before "" }}}}{_literal(form.user)}'
        + (f'{{{{ else if eq $before "system" }}}}{_literal(form.system_user)}' if form.system is not None else "")
        + f"{{{{ else }}}}{_literal(form.assistant_user)}{{{{ end }}}}"
    )
    system = "" if form.system is None else f'{{{{ if eq .Role "system" }}}}{_literal(form.system)}{{{{ .Content }}}}'
    return (
        '{{ $before := "" }}{{ range .Messages }}'
        + system
        + ("{{ else if" if system else "{{ if")
        + f' eq .Role "user" }}}}{between}{{{{ .Content }}}}'
        + f'{{{{ else if eq .Role "assistant" }}}}{_literal(form.user_assistant)}{{{{ .Content }}}}{{{{ end }}}}'
        + _before_next(form)
        + f'{{{{ end }}}}{{{{ if eq $before "user" }}}}{_literal(form.prompt)}{{{{ end }}}}'
    )


def _before_next(form: ChatForm) -> str:
    if form.system is not None:
        return "{{ $before = .Role }}"
    return '{{ if ne .Role "system" }}{{ $before = .Role }}{{ end }}'  # it was not written


# What is not text in a Go template, or not in a Modelfile: braces, three quotes, and characters that Ollama's parser drops.
_SPECIAL = re.compile(
    r'\{+|"{3,}|[^\S \n\t]|[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]'
)


def _literal(text: str) -> str:
    return _SPECIAL.sub(lambda found: "{{ " + _go_string(found[0]) + " }}", text)


def _go_string(text: str) -> str:
    escaped = "".join(c if c.isprintable() and c not in '"\\' else _go_escape(c) for c in text)
    return f'"{escaped}"'


def _go_escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def stop_words(chat: FileChat, form: ChatForm | None) -> list[str]:
    """Texts at which an answer ends: the end token, and the markers of the template that begin what is not the model's to write."""
    eos, bos = chat.special_tokens.get("eos_token"), chat.special_tokens.get("bos_token")
    ends = [name for name in (eos, chat.special_tokens.get("eot_token")) if name]
    if form is None:
        return [word for word in dict.fromkeys(ends) if word.isprintable()]
    after = form.assistant_user + form.end
    markers = sorted((token for token in chat.marker_tokens if token in after), key=after.find)
    markers = [token for token in markers if token not in (eos, bos) and token.strip()]
    if not markers:  # a template of plain words: the heading of the next question
        rest = form.assistant_user
        for token in (eos, bos):
            rest = rest.replace(token, "") if token else rest
        heading = rest.strip().split("\n")[0].strip()
        markers = [heading] if len(heading) > 2 else []
    return [word for word in dict.fromkeys(ends + markers) if word.isprintable()]


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    return value if isinstance(value, list) else []
