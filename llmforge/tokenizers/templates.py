"""Chat templates by name: the one place that has them, for training, the files of a tokenizer, and GGUF metadata.

Their Jinja is what transformers, llama.cpp's own renderer and `render_chat` all understand alike.
"""

import re
from collections.abc import Mapping
from typing import Any

from llmforge.config import did_you_mean
from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers.base import Tokenizer
from llmforge.tokenizers.chat import check_template, render_chat

_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."

# Stanford Alpaca's texts, with the line end after "### Response:" that Axolotl writes (and Stanford does not), and its system text in
# place of the preamble. A user's message may have an "input" beside its content. No special token but the one that ends an answer: a
# base model has seen that, which it has not of the markers of the other templates.
# Source: tatsu-lab/stanford_alpaca train.py, PROMPT_DICT; axolotl prompters.py, AlpacaPrompter.
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
    "{% elif messages[0]['input'] %}"
    f"{{{{ '{_TASK}, paired with an input that provides further context. {_REQUEST}\\n\\n' }}}}"
    f"{{% else %}}{{{{ '{_TASK}. {_REQUEST}\\n\\n' }}}}{{% endif %}}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] }}{{ eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ raise_exception('Alpaca has one system message at the beginning, user and assistant, but message ' + (loop.index0 | string)"
    " + ' has the role ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

# Source: OpenAI's chatml.md; the template of Qwen's and many others' tokenizers, without a system text of its own.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Source: Meta's llama3 llama/tokenizer.py, ChatFormat; as the tokenizer of Meta-Llama-3-8B-Instruct has it.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

TEMPLATES: Mapping[str, str] = {"alpaca": ALPACA, "chatml": CHATML, "llama3": LLAMA3}

_WRITE_BOS = "{{ bos_token }}"
_MARKER = re.compile(r"<\|[A-Za-z0-9_]+\|>")


def find_template(name: str) -> str:
    """The Jinja text of a template of TEMPLATES.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            f"unknown chat template {name[:60]!r}; {did_you_mean(name, list(TEMPLATES))} A Jinja template can be given as text, too"
        )
    return TEMPLATES[name]


def with_chat_template(tokenizer: Tokenizer, template: str | None = None) -> Tokenizer:
    """The tokenizer with a chat template, which goes with it into the folders and GGUF files that are written with it.

    Args:
        template: a name of TEMPLATES, or Jinja itself; None or "tokenizer_default" = the tokenizer's own, or else alpaca. Those of
            TEMPLATES begin with BOS where the tokenizer's texts do (`add_bos`).
    Raises:
        ConfigError: there is no template of this name.
        DataError: it is Jinja, and faulty.
    """
    if template is None or template == "tokenizer_default":
        if tokenizer.chat_template is not None:
            return tokenizer
        template = "alpaca"
    if "{{" in template or "{%" in template:
        check_template(template)
        return tokenizer.with_chat_template(template)
    text = find_template(template)
    if tokenizer.add_bos and not text.startswith(_WRITE_BOS):
        text = _WRITE_BOS + text
    return tokenizer.with_chat_template(text)


def template_name(tokenizer: Tokenizer) -> str | None:
    """The name in TEMPLATES of the tokenizer's chat template; None if it has another one, or none."""
    own = tokenizer.chat_template
    return next((name for name, text in TEMPLATES.items() if own in (text, _WRITE_BOS + text)), None)


def missing_markers(tokenizer: Tokenizer) -> list[str]:
    """The markers of the tokenizer's chat template, like <|im_end|>, that are no tokens of it: the model would see them as
    pieces of text, and a program that stops at the marker does not find it.
    """
    markers = dict.fromkeys(_MARKER.findall(tokenizer.chat_template or ""))
    special = {tokenizer.decode([i]) for i in tokenizer.end_token_ids} | set(tokenizer.special_tokens.values())
    return [name for name in markers if name not in special and not _is_token(tokenizer, name)]


def _is_token(tokenizer: Tokenizer, name: str) -> bool:
    try:
        return len(tokenizer.encode_batch([name], special=True, after=True)[0]) == 1
    except DataError:  # characters that the vocabulary lacks
        return False


def has_input(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's chat template has a place for the `input` of a user's message, as alpaca has.

    For the others, `joined_input` puts it into the message itself.
    """
    message: dict[str, Any] = {"role": "user", "content": "instruction", "input": "a context"}
    try:
        return "a context" in render_chat(tokenizer, [message])
    except DataError:  # no template, or one that wants something else first
        return False


def joined_input(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of an Alpaca record with its `input`, if it has one, at the end of its content, after an empty line."""
    others = {name: value for name, value in message.items() if name != "input"}
    return others if "input" not in message else {**others, "content": f"{message['content']}\n\n{message['input']}"}
