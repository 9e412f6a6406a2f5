"""Conversations as text and ids, against transformers' apply_chat_template on templates as published models have them."""

import json

import pytest
from transformers import AutoTokenizer

from llmforge.errors import DataError
from llmforge.tokenizers import BPETokenizer, CharTokenizer, chat_ids, load_tokenizer, render_chat

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|im_end|>" }}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n'+ message['content'] | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- set ns = namespace(index=0) %}
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set loop_messages = messages[1:] if system else messages %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == 'user' %}
        {%- if system is not none and loop.last %}
            {{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token}}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if ns.index > 7 %}{% break %}{%- endif %}
{%- endfor %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "zephyr": ZEPHYR}

CHAT = [
    {"role": "system", "content": "Sé breve & <claro>."},
    {"role": "user", "content": "  ¿Qué tal? 🙂\n"},
    {"role": "assistant", "content": "Bien.\n\nGracias"},
    {"role": "user", "content": "<|im_end|> o </s>"},
]


def with_template(template, folder, **config):
    """A small tokenizer with ChatML's tokens and a template, and transformers' of the same files."""
    BPETokenizer.from_texts(["una olla de algo más vaca que carnero " * 9], vocab_size=280).save(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    names = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    size = len(content["model"]["vocab"]) + (1 if "<|endoftext|>" not in content["model"]["vocab"] else 0)
    content["added_tokens"] += [{"id": size + i, "content": name, **flags} for i, name in enumerate(names)]
    path.write_text(json.dumps(content), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]], ids=["system", "turns", "one"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_published_templates_render_as_in_transformers(tmp_path, name, messages, add_generation_prompt):
    tokenizer = with_template(TEMPLATES[name], tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    options = {"add_generation_prompt": add_generation_prompt}
    text = render_chat(tokenizer, messages, **options)
    assert text == reference.apply_chat_template(messages, tokenize=False, **options)
    ids = chat_ids(tokenizer, messages, **options)
    assert ids == reference.apply_chat_template(messages, return_dict=False, **options)
    assert ids != tokenizer.encode(text)  # with the names of special tokens as text
    assert tokenizer.decode(ids) == text


def test_rendering_by_hand(tmp_path):
    tokenizer = with_template(CHATML, tmp_path)
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHola<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(tokenizer, [{"role": "user", "content": "Hola"}]) == expected
    start, end = tokenizer.encode_special("<|im_start|><|im_end|>")
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hola"}])
    assert (ids.count(start), ids.count(end)) == (3, 2)


def test_tools_and_other_variables_reach_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "clima", "parameters": {"ñ": [1, 2.5, None, True]}}}]
    messages = [
        *CHAT[1:2],
        {"role": "assistant", "tool_calls": [{"function": {"name": "clima", "arguments": {"a": "<b>"}}}]},
    ]
    tokenizer = with_template(LLAMA3, tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    text = render_chat(tokenizer, messages, tools=tools, date_string="1 Ene 1605")
    assert text == reference.apply_chat_template(messages, tools=tools, date_string="1 Ene 1605", tokenize=False, add_generation_prompt=True)  # fmt: skip
    assert "1 Ene 1605" in text
    assert '"ñ": [\n' in text
    assert '{"a": "<b>"}' in text


def test_messages_are_not_changed_and_objects_stay_outside(tmp_path):
    class Opened(str):
        def read(self):
            raise AssertionError("a template called a method")

    tokenizer = with_template("{{ messages[0].content.read }}|{{ messages[0].content }}", tmp_path)
    assert render_chat(tokenizer, [{"role": "user", "content": Opened("hola")}]) == "|hola"
    with pytest.raises(DataError, match=r"a value of the type object cannot be given to a chat template"):
        render_chat(tokenizer, [{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for %}", "is faulty in line 1: Expected an expression"),
        ("a\n{% if x %}", "is faulty in line 2"),
        ("{% nonsense %}", "unknown tag 'nonsense'"),
        ("{{ x | nofilter }}", "No filter named 'nofilter'"),
        ("{{ raise_exception('Roles must alternate!') }}", "refuses these messages: Roles must alternate!"),
        ("{{ messages.__class__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str'"),
        ("{{ messages[0]['__class__'].mro() }}", "refuses these messages"),
        ("{{ render.__globals__ }}{{ lipsum.__globals__ }}", "is undefined|'__globals__'"),
        ("{{ ''|attr('__class__') }}", "'__class__'"),
        ("{{ messages.append(1) }}", "'append' of 'list'"),
        ("{{ absent.field }}", "'absent' is undefined"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{{ messages + 'x' }}", "fails with TypeError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "fails with RecursionError"),
        ("{{ range(1000000) }}", "fails with OverflowError"),
        ("{% include 'other' %}", "fails with TypeError: no loader|no loader"),
        ("{{ strftime_now(5) }}", "fails with TypeError"),
    ],
)
def test_faulty_templates_are_data_errors(tmp_path, template, what):
    tokenizer = with_template(template, tmp_path)
    with pytest.raises(DataError, match=what):
        render_chat(tokenizer, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("message", ["hola", {"content": "x"}, {"role": 5}, None])
def test_messages_of_another_form_are_named(tmp_path, message):
    tokenizer = with_template(CHATML, tmp_path)
    with pytest.raises(DataError, match=r"message 1 is .*; it must be like \{\"role\""):
        render_chat(tokenizer, [CHAT[0], message])


def test_a_tokenizer_without_template_says_so():
    with pytest.raises(DataError, match="has no chat template: this is a base model"):
        chat_ids(CharTokenizer("abc"), CHAT)
