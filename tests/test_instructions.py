"""Examples for tuning: what is learned, token by token; rows; splits; and what is wrong with malformed data."""

import json
import re
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_templates import bpe_with_markers, sentencepiece
from transformers import AutoTokenizer

from llmforge.data import InstructionDataset
from llmforge.data.packing import RowPlan, first_fit_decreasing
from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers import CharTokenizer, WordPieceTokenizer, chat_ids, record_files, render_chat
from llmforge.tokenizers.templates import TEMPLATES

LETTERS = "".join(map(chr, range(32, 127))) + "\n¿¡áéíóúñÑ«»—🙂"
EOS = "<|endoftext|>"
CHAR = CharTokenizer(LETTERS)
IGNORED = -100

ALPACA = {"instruction": "¿Qué es un hidalgo?", "input": "", "output": "Un señor."}
PAIRED = {"instruction": "Traduce.", "input": "año", "output": "year"}
TURNS = [
    {"role": "system", "content": "Sé breve."},
    {"role": "user", "content": "¿Qué?"},
    {"role": "assistant", "content": "Nada 🙂"},
    {"role": "user", "content": "¿Y mañana?"},
    {"role": "assistant", "content": "Tampoco."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in TURNS
]


@pytest.fixture(scope="module", params=[False, True], ids=["no_bos", "bos"])
def bpe(request, tmp_path_factory):
    return bpe_with_markers(tmp_path_factory.mktemp("bpe"), bos=request.param)


def dataset(*values, tokenizer=CHAR, **options):
    return InstructionDataset.from_records(values, tokenizer, **options)


def learned(data, n=0):
    """What is learned of an example, the stretches apart."""
    stretches = [""]
    for text, counts in data.preview(n):
        if counts:
            stretches[-1] += text
        elif stretches[-1]:
            stretches.append("")
    return [stretch for stretch in stretches if stretch]


def written(data, n=0):
    return "".join(text for text, _ in data.preview(n))


def write(folder, *lines, name="datos.jsonl"):
    path = folder / name
    lines = [json.dumps(line, ensure_ascii=False) if not isinstance(line, bytes | str) else line for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


# What is learned


def test_the_loss_of_an_alpaca_example_is_on_the_answer_character_by_character():
    data = dataset(ALPACA)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n¿Qué es un hidalgo?\n\n### Response:\n"
    )
    expected = [(character, False) for character in prompt] + [(c, True) for c in "Un señor."] + [(EOS, True)]
    assert data.preview(0) == expected
    idx, targets, positions = data.batch(0, batch_size=1, seq_len=256)
    n = len(expected)
    ids = [*CHAR.encode(prompt + "Un señor."), CHAR.eos_token_id]
    assert idx[0].tolist() == ids + [CHAR.eos_token_id] * (256 - n)
    # The answer's first letter is what follows the prompt's last one; after the end nothing is learned.
    assert targets[0].tolist() == [IGNORED] * (len(prompt) - 1) + ids[len(prompt) :] + [IGNORED] * (256 - n + 1)
    assert positions[0].tolist() == [*range(n), *range(256 - n)]


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        ("alpaca", PAIRED, ["year</s>"]),
        ("chatml", PAIRED, ["year<|im_end|>"]),
        ("llama3", PAIRED, ["year<|eot_id|>"]),
        ("alpaca", {"messages": TURNS}, ["Nada 🙂</s>", "Tampoco.</s>"]),
        ("chatml", {"messages": TURNS}, ["Nada 🙂<|im_end|>", "Tampoco.<|im_end|>"]),
        ("llama3", {"messages": TURNS}, ["Nada 🙂<|eot_id|>", "Tampoco.<|eot_id|>"]),
        ("chatml", {"conversations": SHAREGPT}, ["Nada 🙂<|im_end|>", "Tampoco.<|im_end|>"]),
        ("chatml", {"prompt": "El año ", "completion": "que viene."}, ["que viene.</s>"]),
        ("chatml", {"instruction": "¿Sí?", "output": "", "system": "Sé."}, ["<|im_end|>"]),
    ],
)
def test_answers_and_what_ends_them_are_learned_and_nothing_else(bpe, template, record, expected):
    data = dataset(record, tokenizer=bpe, template=template)
    assert learned(data) == expected
    ids, mask = data.document(0)
    pieces = [bpe.encode_special(text) for text in expected]
    assert ids[mask].tolist() == [i for piece in pieces for i in piece]  # each is tokenized for itself
    # Each answer comes after what a program gives the model to answer.
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
    starts = np.flatnonzero(mask & ~np.append(False, mask[:-1]))
    assert (ends - starts).tolist() == [len(piece) for piece in pieces]
    if "prompt" in record:
        assert ids[: starts[0]].tolist() == bpe.prompt_ids(record["prompt"])
        return
    if "instruction" in record:
        messages = [{"role": "system", "content": record["system"]}] if "system" in record else []
        message = {"role": "user", "content": record["instruction"]}
        if record.get("input"):
            joined = {"content": f"{record['instruction']}\n\n{record['input']}"}
            message |= {"input": record["input"]} if template == "alpaca" else joined
        prompts = [[*messages, message]]
    else:
        prompts = [TURNS[:2], TURNS[:4]]
    for start, prompt in zip(starts, prompts, strict=True):
        before = chat_ids(data.tokenizer, prompt, add_generation_prompt=True)
        assert ids[:start].tolist() == before
        assert before.count(bpe.bos_token_id) == (1 if bpe.add_bos or template == "llama3" else 0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_a_conversation_are_those_of_transformers(bpe, tmp_path, template):
    data = dataset({"messages": TURNS}, tokenizer=bpe, template=template)
    data.tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TURNS, return_dict=False)
    tail = {"alpaca": [], "chatml": bpe.encode("\n"), "llama3": []}[template]  # after the end nothing is needed
    assert data.document(0).ids.tolist() + tail == reference
    other = dataset({"messages": [*TURNS[:-1], {**TURNS[-1], "content": "Nunca."}]}, tokenizer=bpe, template=template)
    assert other.document(0).ids.tolist() + tail != reference


def test_the_tokenizers_own_template_is_taken_and_alpaca_without_one(bpe):
    assert (
        dataset(ALPACA, tokenizer=bpe.with_chat_template(TEMPLATES["chatml"])).tokenizer.chat_template
        == TEMPLATES["chatml"]
    )
    assert "### Instruction" in dataset(ALPACA, tokenizer=bpe).tokenizer.chat_template
    data = dataset(ALPACA, tokenizer=bpe, template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert written(data).endswith("[¿Qué es un hidalgo?][Un señor.]</s>")  # no token ends the answer: eos does
    assert learned(data) == ["[Un señor.]</s>"]


def test_the_name_of_an_end_token_in_an_answer_does_not_end_it(bpe):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    record = {"messages": [TURNS[1], {"role": "assistant", "content": "Es </s>, sí"}]}
    assert learned(dataset(record, tokenizer=bpe, template=template)) == ["[Es </s>, sí]</s>"]
    assert learned(dataset(record, tokenizer=bpe, template="alpaca")) == ["Es </s>, sí</s>"]


def test_bos_begins_a_document_once_whoever_writes_it(bpe):
    bos = bpe.bos_token_id
    for template in (*TEMPLATES, "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"):
        ids = dataset({"messages": TURNS[1:]}, tokenizer=bpe, template=template).document(0).ids.tolist()
        if bpe.add_bos:
            assert (ids[0], ids.count(bos)) == (bos, 1)
        else:
            assert ids.count(bos) == (template == "llama3")
    for record in ({"text": "En un lugar"}, {"prompt": "En un ", "completion": "lugar"}):
        ids = dataset(record, tokenizer=bpe).document(0).ids.tolist()
        assert ids.count(bos) == bpe.add_bos
        assert ids[-1] == bpe.eos_token_id


def test_no_space_comes_between_prompt_and_answer_in_sentencepiece():
    tokenizer = sentencepiece()
    data = dataset({"prompt": "En un", "completion": " lugar"}, tokenizer=tokenizer)
    assert data.document(0).ids.tolist() == [1, *tokenizer.encode("En un lugar"), 2]
    data = dataset({"messages": TURNS}, tokenizer=tokenizer, template="alpaca")
    whole = render_chat(data.tokenizer, TURNS, add_generation_prompt=False)
    assert data.document(0).ids.tolist() == tokenizer.encode_special(whole)  # one letter each: nothing merges
    assert learned(data) == ["Nada 🙂</s>", "Tampoco.</s>"]


def test_train_on_inputs_learns_all_but_the_first_token(bpe):
    for record in (ALPACA, {"messages": TURNS}, {"prompt": "En un", "completion": " lugar"}):
        data = dataset(record, tokenizer=bpe, train_on_inputs=True)
        plain = dataset(record, tokenizer=bpe)
        assert [counts for _, counts in data.preview(0)] == [False] + [True] * (len(data.document(0).ids) - 1)
        assert data.document(0).ids.tolist() == plain.document(0).ids.tolist()
        assert data.num_answer_tokens > plain.num_answer_tokens > 0
        assert data.fingerprint != plain.fingerprint


def test_plain_text_is_learned_in_full_and_long_texts_are_several_documents():
    data = dataset({"text": "En un lugar"}, {"text": "¡Año!"})
    assert [counts for _, counts in data.preview(0)] == [False] + [True] * 11
    summary = data.summary(8)
    assert (summary.num_documents, summary.num_tokens, summary.num_too_long) == (3, 12 + 6, 1)
    _, targets, positions = data.batch(0, batch_size=summary.num_rows, seq_len=8)
    assert sum((targets != IGNORED).sum(1)).item() == summary.num_answer_tokens == 7 + 3 + 5
    assert (positions == 0).sum() >= 3


def test_answers_with_weight_zero_are_not_learned():
    messages = [TURNS[1], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    assert learned(dataset({"messages": messages})) == ["Tampoco." + EOS]


def test_a_question_at_the_end_has_no_answer_and_is_left_out():
    assert written(dataset({"messages": TURNS[1:4]})) == written(dataset({"messages": TURNS[1:3]}))


def test_tools_and_parts_of_messages_reach_the_template(bpe):
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ eos_token }}{% endfor %}"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "¿Qué "}, {"type": "text", "text": "año?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "año"}]},
        {"role": "tool", "content": "1605", "tool_call_id": "a"},
        {"role": "assistant", "content": "1605."},
    ]
    data = dataset({"messages": messages, "tools": [{"name": "año"}]}, tokenizer=bpe, template=template)
    assert written(data).removeprefix("<s>") == '[{"name": "año"}]¿Qué año?</s>[{"name": "año"}]</s>1605</s>1605.</s>'
    assert learned(data) == ['[{"name": "año"}]</s>', "1605.</s>"]


def test_wordpiece_works_too():
    tokenizer = WordPieceTokenizer.from_texts([written(dataset(ALPACA)) * 3], vocab_size=120)
    data = dataset(ALPACA, tokenizer=tokenizer)
    assert learned(data) == [" Un señor. " + EOS]


# Templates that cannot be trained with

THINKING = (  # as Qwen3 and others: what was thought is left out of all answers but the last
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_rewrites_the_prompt_is_refused():
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"cannot be trained with: .* '1¿Qué\?' became '2¿Qué\?Nada\.' at character 0"):
        dataset(ALPACA, template=rewriting)


def test_a_template_that_rewrites_earlier_answers_is_refused_where_there_are_any():
    assert learned(dataset({"messages": TURNS[:3]}, template=THINKING)) == ["<think></think>Nada 🙂" + EOS]
    with pytest.raises(
        DataError, match=r"record 1: the chat template writes what is before message 4 otherwise .*'<think></think>Nada"
    ):
        dataset({"messages": TURNS}, template=THINKING)


def test_a_template_that_refuses_a_record_says_which():
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}"
        "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    good = {"messages": TURNS[1:]}
    with pytest.raises(DataError, match="record 2: the chat template refuses these messages: Roles must alternate!"):
        dataset(good, {"messages": TURNS}, template=alternating)
    data = dataset(good, {"messages": TURNS}, template=alternating, skip_bad=True)
    assert (len(data), data.bad_records.count) == (1, 1)


def test_an_answer_without_text_in_the_template_is_refused():
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="writes nothing for the answer in message 1"):
        dataset(ALPACA, template=silent)


# Files


def test_json_lines_and_lists_are_read_alike(tmp_path):
    values = [ALPACA, PAIRED, {"instruction": "a\u2028b", "output": "línea\nnueva"}]
    tokenizer = CharTokenizer(LETTERS + "\u2028")
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    texts = {
        "a.jsonl": "\n".join(lines) + "\n",
        "no end.jsonl": "\n\n" + "\n \n".join(lines),
        "crlf.jsonl": "\r\n".join(lines) + "\r\n",
        "bom.jsonl": "\ufeff" + "\n".join(lines),
        "lines.json": "\n".join(lines),
        "list.json": json.dumps(values),
        "bom list.json": "\ufeff\n" + json.dumps(values, indent=2, ensure_ascii=False).replace("\n", "\r\n") + "\r\n",
    }
    expected = [dataset(*values, tokenizer=tokenizer).document(n).ids.tolist() for n in range(3)]
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        data = InstructionDataset.from_file(tmp_path / name, tokenizer)
        assert [data.document(n).ids.tolist() for n in range(3)] == expected, name
        assert data.kind == "alpaca"
    assert data.place(1) == f"{tmp_path / 'bom list.json'}, line 8 (record 2)"
    both = InstructionDataset.from_file([tmp_path / "a.jsonl", str(tmp_path / "list.json")], tokenizer)
    assert [both.document(n).ids.tolist() for n in range(6)] == expected * 2
    assert both.place(1) == f"{tmp_path / 'a.jsonl'}, line 2"
    assert both.fingerprint != data.fingerprint


def test_the_kind_is_seen_from_the_keys():
    kinds = {
        "alpaca": {**ALPACA, "text": "published sets have the rendered text, too", "input": None},
        "sharegpt": {"conversations": SHAREGPT, "id": "7"},
        "messages": {"messages": TURNS},
        "completion": {"prompt": "a", "completion": "b"},
        "text": {"text": "a"},
    }
    for kind, record in kinds.items():
        assert dataset(record).kind == kind
    assert dataset(kinds["alpaca"], kind="text").kind == "text"
    assert written(dataset({"conversations": TURNS})) == written(dataset({"conversations": SHAREGPT}))


RECORD = json.dumps(ALPACA, ensure_ascii=False)
MESSAGES = '{"messages": %s}'
QUESTION, ANSWER = '{"role": "user", "content": "¿Qué?"}', '{"role": "assistant", "content": "Nada."}'

# What follows a good record of the kind, and what is said of it after "FILE, line 2: ".
BAD_LINES = {
    "cut off": ("alpaca", '{"instruction": "¿Qué', r"not valid JSON from column 17 on, '\"¿Qué': Unterminated string"),
    "not JSON": ("alpaca", "instruction,output", "not valid JSON from column 1 on, 'instruction,output': Expecting value; a file has one record"),
    "single quotes": ("alpaca", "{'instruction': 'a'}", "not valid JSON from column 2 on, .*: Expecting property name"),
    "two on a line": ("alpaca", RECORD + RECORD, "not valid JSON from column .*: Extra data"),
    "a comma at the end": ("alpaca", RECORD + ",", "not valid JSON from column .* on, ',': Extra data"),
    "a bracket alone": ("alpaca", "{", "not valid JSON from column 2"),
    "a tab in a text": ("alpaca", '{"text": "a\tb"}', "Invalid control character"),
    "an endless number": ("alpaca", '{"instruction": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
    "nested without end": ("alpaca", "[" * 200_000, "not valid JSON: maximum recursion|not valid JSON: .*recursion"),
    "Latin-1": ("alpaca", '{"instruction": "año"}'.encode("latin-1"), r"not UTF-8 text: byte 0xf1 at position \d+\. It looks like Windows-1252 text"),
    "half a character": ("alpaca", '{"instruction": "ñ'.encode()[:-1], "not UTF-8 text: byte 0xc3"),
    "a NUL": ("alpaca", b'{"instruction": "\0"}', "not UTF-8 text: byte 0x00"),
    "a number": ("alpaca", "7", "it is 7; a record must be an object, like"),
    "null": ("alpaca", "null", "it is None; a record must be an object"),
    "a list": ("alpaca", '["a", "b"]', r"it is \['a', 'b'\]; a record must be an object"),
    "nothing": ("alpaca", "{}", "it has no 'instruction', its keys are none; a record of the kind alpaca is like"),
    "another kind": ("alpaca", '{"text": "hola"}', "it has no 'instruction', its keys are 'text'; a record of the kind alpaca"),
    "another name": ("alpaca", '{"instruction": "¿Qué?", "response": "Nada"}', "it has no 'output', .* did you mean 'output' for 'response'"),
    "a misspelt name": ("alpaca", '{"instruccion": "¿Qué?", "output": "Nada"}', "did you mean 'instruction' for 'instruccion'"),
    "a key twice": ("alpaca", '{"instruction": "a", "output": "b", "output": "c"}', "it has the key 'output' twice"),
    "a number for text": ("alpaca", '{"instruction": "¿2+2?", "output": 4}', "output is 4; it must be text"),
    "null for text": ("alpaca", '{"instruction": null, "output": "x"}', "instruction is None; it must be text"),
    "NaN": ("alpaca", '{"instruction": "a", "output": NaN}', "output is nan; it must be text"),
    "a list for text": ("alpaca", '{"instruction": "a", "output": ["b"]}', r"output is \['b'\]; it must be text"),
    "an input of another type": ("alpaca", '{"instruction": "a", "input": 3, "output": "b"}', "input is 3; it must be text"),
    "a system of another type": ("alpaca", '{"instruction": "a", "system": {}, "output": "b"}', "system is {}; it must be text"),
    "no question": ("alpaca", '{"instruction": " ", "input": "", "output": "b"}', "instruction is ' ' and there is no input: nothing is asked"),
    "half a pair": ("alpaca", '{"instruction": "a", "output": "b\\ud83d"}', r"output has half of a surrogate pair at character 1"),
    "an unknown character": ("alpaca", '{"instruction": "a", "output": "ß"}', r"character 'ß' \(U\+00DF\) at position 0 is not one of the"),
    "messages as text": ("messages", '{"messages": "hola"}', "messages is 'hola'; it must be a list of messages"),
    "no messages": ("messages", MESSAGES % "[]", r"messages is \[\]; it must be a list"),
    "too many": ("messages", MESSAGES % f"[{', '.join([QUESTION, ANSWER] * 501)}]", "messages has 1,002 messages; at most 1,000"),
    "a message of text": ("messages", MESSAGES % '["hola"]', r"messages\[0\] is 'hola'; it must be like"),
    "no role": ("messages", MESSAGES % '[{"content": "a"}]', r"messages\[0\] has no 'role', its keys are 'content'"),
    "no content": ("messages", MESSAGES % '[{"role": "user"}]', r"messages\[0\] has no 'content', its keys are 'role'"),
    "an unknown role": ("messages", MESSAGES % '[{"role": "bot", "content": "a"}]', r"messages\[0\]: role is 'bot'; known are system, developer, user"),
    "a role of another type": ("messages", MESSAGES % '[{"role": [1], "content": "a"}]', r"messages\[0\]: role is \[1\]"),
    "a content of another type": ("messages", MESSAGES % f'[{QUESTION}, {{"role": "assistant", "content": 5}}]', r"messages\[1\]: content is 5; it must be text"),
    "an image": ("messages", MESSAGES % '[{"role": "user", "content": [{"type": "image_url"}]}]', r"messages\[0\]: content is .* only those of the type text"),
    "an empty question": ("messages", MESSAGES % f'[{{"role": "user", "content": "\\n"}}, {ANSWER}]', r"messages\[0\]: content is '\\n'; a question must have text"),
    "a late system": ("messages", MESSAGES % f'[{QUESTION}, {{"role": "system", "content": "a"}}]', r"messages\[1\] is from the system; only the first"),
    "no answer": ("messages", MESSAGES % f"[{QUESTION}]", "messages has no answer: none of its 1 messages is from the assistant"),
    "an answer to nothing": ("messages", MESSAGES % f"[{ANSWER}]", r"messages\[0\] is an answer, but nothing was asked before it"),
    "a weight of a half": ("messages", MESSAGES % f'[{QUESTION}, {{"role": "assistant", "content": "a", "weight": 0.5}}]', r"weight is 0\.5; it must be 1, or 0"),
    "no weight at all": ("messages", MESSAGES % f'[{QUESTION}, {{"role": "assistant", "content": "a", "weight": 0}}]', "has no answer to learn: all have the weight 0"),
    "tools as text": ("messages", f'{{"messages": [{QUESTION}, {ANSWER}], "tools": "[]"}}', r"tools is '\[\]'; it must be a list"),
    "ShareGPT with another role": ("sharegpt", '{"conversations": [{"from": "bing", "value": "a"}]}', r"conversations\[0\]: from is 'bing'; known are"),
    "ShareGPT without value": ("sharegpt", '{"conversations": [{"from": "human", "text": "a"}]}', r"conversations\[0\] has no 'value', its keys are 'from', 'text'"),
    "an empty completion": ("completion", '{"prompt": "a", "completion": ""}', "completion is empty; it must have text to learn"),
    "a prompt of messages": ("completion", '{"prompt": [{"role": "user"}], "completion": "a"}', "prompt is .*; it must be text"),
    "an empty text": ("text", '{"text": "  "}', "text is '  '; it must have text to learn"),
}  # fmt: skip
GOOD = {
    "alpaca": ALPACA,
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SHAREGPT},
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_named_with_its_value_or_counted(tmp_path, name):
    kind, line, message = BAD_LINES[name]
    path = write(tmp_path, GOOD[kind], line, GOOD[kind])
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2: ") + f".*({message})"):
        InstructionDataset.from_file(path, CHAR)
    data = InstructionDataset.from_file(path, CHAR, skip_bad=True)
    assert (len(data), data.bad_records.count) == (2, 1)
    assert re.search(message, data.bad_records.reasons[0])
    assert data.place(1) == f"{path}, line 3"
    if line[:1] in ("[", b"["):  # alone in a file, that is a list of records
        return
    with pytest.raises(DataError, match=rf"all 1 records are malformed; the first: .*line 1: .*({message})"):
        InstructionDataset.from_file(write(tmp_path, line, name="b.jsonl"), CHAR, kind=kind, skip_bad=True)


BAD_FILES = {
    "empty": (b"", "there are no records; a file has one JSON record per line"),
    "blank": (b"\n \n", "there are no records"),
    "an empty list": (b"[]\n", "there are no records"),
    "UTF-16": ('{"text": "año"}'.encode("utf-16"), r"line 1: not UTF-8 text: byte 0xff at position 0\. It looks like UTF-16 text; .*iconv"),
    "UTF-16 list": ('[{"text": "año"}]'.encode("utf-16"), "not UTF-8 text: byte 0xff at position 0"),
    "Latin-1 list": ('\n[{"text": "año"}]'.encode("latin-1"), "is not UTF-8 text: byte 0xf1 at position 13"),
    "Latin-1 list with BOM": (b"\xef\xbb\xbf" + '[{"text": "año"}]'.encode("latin-1"), "is not UTF-8 text: byte 0xf1 at position 15"),
    "gzip": (b"\x1f\x8b\x08\0\xff", "It looks like a gzip archive"),
    "Parquet": (b"PAR1\x15\x04\xff\n", "It looks like a Parquet file"),
    "CSV": (b"instruction,output\na,b\n", "line 1: not valid JSON from column 1 on, 'instruction,output': Expecting value"),
    "an object over lines": (b'{\n "instruction": "a",\n "output": "b"\n}', "line 1: not valid JSON .*; a file has one record per line, or is one list"),
    "a list in an object": (b'{"data": []}', "line 1: its keys are 'data', which is none of the known kinds"),
    "other names": (b'{"question": "a", "answer": "b"}', "its keys are 'question', 'answer', which is none .* did you mean"),
    "a list that is cut off": (b'[{"text": "a"},\n {"text": "b"}', "line 2: after record 2 comes the end of the file: it is cut off, where ',' or"),
    "a list without a comma": (b'[{"text": "a"}\n {"text": "b"}]', r"line 2: after record 1 comes '\{\"text\": \"b\"\}\]', where ',' or"),
    "a list with a comma at the end": (b'[{"text": "a"},\n]', r"line 2, column 1 is not valid JSON \(record 2\), '\]': Expecting value"),
    "a list that is damaged": (b'[{"text": "a"},\n{"text: "b"}]', r"line 2, column 10 is not valid JSON \(record 2\)"),
    "a list and more": (b'[{"text": "a"}]\n[{"text": "b"}]', r"line 2: after the list comes '\[\{"),
    "a list of lists": (b'[["a"]]', r"line 1 \(record 1\): it is \['a'\]; a record must be an object"),
    "a list that nests without end": (b"[" * 200_000, "is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_without_good_records_says_what_it_has(tmp_path, name, skip_bad):
    content, message = BAD_FILES[name]
    (tmp_path / "datos.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        InstructionDataset.from_file(tmp_path / "datos.json", CHAR, skip_bad=skip_bad)
    assert "datos.json" in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"cannot read .*nada\.jsonl: No such file or directory; check the spelling, seen from"
    ):
        InstructionDataset.from_file(tmp_path / "nada.jsonl", CHAR)
    with pytest.raises(DataError, match=r"is a folder; name its \.jsonl or \.json files"):
        InstructionDataset.from_file(tmp_path, CHAR)
    with pytest.raises(ConfigError, match="no file of examples is named"):
        InstructionDataset.from_file([], CHAR)


def test_sizes_have_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "MAX_LINE_BYTES", 200)
    path = write(tmp_path, ALPACA, {**ALPACA, "output": "a" * 3_000_000}, {**ALPACA, "output": "a" * 150}, PAIRED)
    with pytest.raises(DataError, match=r"line 2: it has 3,000,\d+ bytes; at most 200 are allowed for one record"):
        InstructionDataset.from_file(path, CHAR)
    data = InstructionDataset.from_file(path, CHAR, skip_bad=True)
    assert [data.place(n)[-6:] for n in range(len(data))] == ["line 1", "line 4"]
    assert data.bad_records.count == 2
    monkeypatch.setattr(record_files, "MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match="bytes, and a JSON list is read as a whole, up to 10; make it JSONL"):
        InstructionDataset.from_file(write(tmp_path, json.dumps([ALPACA])), CHAR)


def test_only_the_first_reasons_are_kept_and_all_are_counted():
    data = dataset(ALPACA, *[{"instruction": i} for i in range(2_000)], PAIRED, skip_bad=True)
    assert (len(data), data.bad_records.count, len(data.bad_records.reasons)) == (2, 2_000, 20)
    assert data.bad_records.reasons[0].startswith("record 2: it has no 'output'")
    assert data.place(1) == "record 2,002"


def test_the_first_malformed_record_is_the_one_that_is_named():
    """A character that the vocabulary lacks is found later than a missing key, but comes first here."""
    with pytest.raises(DataError, match="^record 2: character 'ß'"):
        dataset(ALPACA, {**ALPACA, "output": "ß"}, {"instruction": "a"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="alpacca"), "unknown kind of records 'alpacca'; did you mean 'alpaca'"),
        (dict(too_long="cut"), "unknown too_long 'cut'"),
        (dict(template="alpacca"), "unknown chat template 'alpacca'; did you mean 'alpaca'"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        dataset(ALPACA, **options)


# Rows


def toy(lengths, *, equal=False, **options):
    """Examples whose answers are a..z, of these lengths in tokens: prompt of 1, answer, eos."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    values = [{"prompt": "¿", "completion": (letters[0 if equal else i % 26] * (n - 2))} for i, n in enumerate(lengths)]
    return dataset(*values, **options)


def documents_of(batch):
    """(ids, targets) of each document of a batch, padding among them."""
    found = []
    for idx, targets, positions in zip(*batch, strict=True):
        starts = (positions == 0).nonzero().squeeze(1).tolist()
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], len(idx)], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((idx[start:end].tolist(), targets[start:end].tolist()))
    return found


def is_padding(document):
    ids, targets = document
    return set(ids) == {CHAR.eos_token_id} and set(targets) == {IGNORED}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(3, 16), min_size=1, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    packing=st.booleans(),
    epoch=st.integers(0, 3),
    ranks=st.integers(1, 3),
)
def test_an_epoch_has_every_example_once_and_no_target_reaches_over(lengths, seed, packing, epoch, ranks):
    data = toy(lengths, packing=packing)
    expected = Counter()
    for n in range(len(data)):
        ids, mask = data.document(n)
        after = [*ids[1:].tolist(), None]
        targets = [i if counts else IGNORED for i, counts in zip(after, [*mask[1:], False], strict=True)]
        expected[tuple(ids.tolist()), tuple(targets)] += 1
    rows = data.num_sequences(16)
    found = Counter()
    batches = [
        data.batch(step, batch_size=1, seq_len=16, seed=seed, rank=rank, world_size=ranks)
        for step in range(epoch * rows // ranks, (epoch + 1) * rows // ranks + 1)
        for rank in range(ranks)
        if epoch * rows <= step * ranks + rank < (epoch + 1) * rows
    ]
    assert len(batches) == rows
    for batch in batches:
        documents = documents_of(batch)
        found.update((tuple(ids), tuple(targets)) for ids, targets in documents if not is_padding((ids, targets)))
        assert batch.idx.shape[1] == 16 if packing else batch.idx.shape[1] % 8 == 0
        assert (batch.targets != IGNORED).sum() <= data.summary(16).max_answer_tokens_in_a_row
        assert packing or len([d for d in documents if not is_padding(d)]) == 1
    assert found == expected
    summary = data.summary(16)
    assert summary.num_tokens == sum(lengths)
    assert summary.num_answer_tokens == data.num_answer_tokens == sum(n - 1 for n in lengths)
    assert summary.efficiency == sum(lengths) / (16 * rows)


def test_batches_are_a_pure_function_of_their_arguments():
    """The law of resuming: nothing but the arguments counts, not what was asked before."""
    lengths = list(range(3, 30)) * 3
    data, again = toy(lengths), toy(lengths)
    steps = [data.batch(step, batch_size=2, seq_len=32, seed=7) for step in range(40)]
    for step in (39, 17, 3):
        for part, other in zip(again.batch(step, batch_size=2, seq_len=32, seed=7), steps[step], strict=True):
            assert torch.equal(part, other)
            assert part.dtype == torch.int64
    assert data.fingerprint == again.fingerprint
    one_by_one = [data.batch(i, batch_size=1, seq_len=32, seed=7).idx for i in range(4)]
    assert torch.equal(torch.cat(one_by_one), torch.cat([steps[0].idx, steps[1].idx]))
    ranks = [data.batch(0, batch_size=1, seq_len=32, seed=7, rank=r, world_size=4).idx for r in range(4)]
    assert torch.equal(torch.cat(ranks), torch.cat(one_by_one))
    assert not torch.equal(data.batch(0, batch_size=2, seq_len=32, seed=8).idx, steps[0].idx)


def test_another_epoch_has_other_rows_in_another_order():
    data = toy([8] * 40)
    rows = data.num_sequences(32)
    assert rows == 10

    def packs(epoch):
        batches = [data.batch(step, seq_len=32, seed=1) for step in range(epoch * rows, (epoch + 1) * rows)]
        return [frozenset(tuple(ids) for ids, _ in documents_of(batch)) for batch in batches]

    assert packs(0) == packs(0)
    assert packs(0) != packs(1)
    assert set(packs(0)) != set(packs(1))
    data = toy(range(9, 29))  # no two alike: the same rows in each epoch
    rows = data.num_sequences(32)
    assert set(packs(0)) == set(packs(1))
    assert packs(0) != packs(1)


def brute_force(lengths, capacity):
    rooms, rows = [], []
    for length in lengths:
        row = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        if row == len(rooms):
            rooms.append(capacity)
        rooms[row] -= length
        rows.append(row)
    return rows


@given(lengths=st.lists(st.integers(1, 30), max_size=60), capacity=st.integers(30, 40))
def test_first_fit_decreasing_is_what_its_name_says(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    assert first_fit_decreasing(lengths, capacity).tolist() == brute_force(lengths, capacity)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), seed=st.integers(0, 99), data=st.data())
def test_no_row_has_more_of_anything_than_the_plan_says(lengths, seed, data):
    lengths = np.array(lengths)
    counts = np.array([data.draw(st.integers(0, int(n))) for n in lengths])
    for packing in (True, False):
        plan = RowPlan(lengths, 20, packing=packing)
        for number in range(2 * plan.num_rows):
            row = plan.row(number, seed=seed)
            assert lengths[row].sum() <= 20
            assert counts[row].sum() <= plan.most_in_a_row(counts)


def test_unpacked_batches_are_as_long_as_their_longest_example():
    data = toy([3, 9, 40], packing=False)
    shapes = {tuple(data.batch(step, batch_size=1, seq_len=60).idx.shape) for step in range(3)}
    assert shapes == {(1, 8), (1, 16), (1, 40)}
    assert data.batch(0, batch_size=3, seq_len=60).idx.shape == (3, 40)
    assert data.batch(0, batch_size=3, seq_len=43).idx.shape == (3, 40)
    assert toy([42], packing=False).batch(0, seq_len=43).idx.shape == (1, 43)  # never longer than seq_len


def test_examples_that_are_too_long_are_dropped_and_counted():
    data = toy([4, 20, 6, 21])
    with pytest.warns(UserWarning, match=r"of 4 examples, 2 are longer than seq_len \(16\): 2 are left out"):
        summary = data.summary(16)
    assert (summary.num_documents, summary.num_too_long, summary.num_tokens) == (2, 2, 10)
    assert (len(data), data.num_samples) == (4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough; and with room for all there is nothing to say
        data.batch(0, batch_size=2, seq_len=16)
        assert data.summary(21).num_documents == 4


def test_examples_that_are_too_long_are_cut_or_an_error():
    long_prompt = {"prompt": "¿" * 30, "completion": "a"}
    values = [{"prompt": "¿", "completion": "abcdefghij"}, long_prompt, {"prompt": "¿", "completion": "b"}]
    data = dataset(*values, too_long="truncate")
    with pytest.warns(UserWarning, match=r"of 3 examples, 2 are longer than seq_len \(8\): 1 are left out, 1 are cut"):
        summary = data.summary(8)
    assert (summary.num_documents, summary.num_too_long, summary.num_without_answer) == (2, 2, 1)
    assert (summary.num_tokens, summary.num_answer_tokens) == (8 + 3, 7 + 2)
    ids = [ids for ids, _ in documents_of(data.batch(0, batch_size=2, seq_len=8))]
    assert CHAR.encode("¿abcdefg") in ids
    with pytest.raises(
        DataError,
        match=r"2 of 3 examples are longer than seq_len \(8\); the longest, record 2, has 32 tokens; raise seq_len",
    ):
        dataset(*values, too_long="error").summary(8)
    with pytest.raises(
        DataError, match=r"no example is left: of 1, 1 are longer than seq_len \(8\), the shortest has 32 tokens"
    ):
        dataset(long_prompt).batch(0, seq_len=8)
    with pytest.raises(DataError, match="no example is left"):
        dataset(long_prompt, too_long="truncate").num_sequences(8)


@pytest.mark.parametrize(
    "bad", [dict(step=-1), dict(batch_size=0), dict(seed=-1), dict(seed=2**32), dict(rank=1), dict(seq_len=1)]
)
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=re.escape(str(next(iter(bad.values()))))):
        toy([4, 5]).batch(**{"step": 0, "seq_len": 8, **bad})


# Splits

some_records = st.lists(st.integers(0, 60), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1)


def numbered(values, **options):
    return dataset(*[{"prompt": "¿", "completion": str(value)} for value in values], **options)


def answers(data):
    return ["".join(learned(data, n)).removesuffix(EOS) for n in range(len(data))]


@settings(max_examples=60)
@given(values=some_records, more=st.lists(st.integers(0, 60), max_size=20), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_a_split_is_complete_stable_and_keeps_equal_examples_together(values, more, seed, fraction):
    train, val = numbered(values).split(val_fraction=fraction, seed=seed)
    assert min(len(train), len(val)) > 0
    assert sorted(answers(train) + answers(val)) == sorted(map(str, values))
    assert not set(answers(train)) & set(answers(val))
    again, _ = numbered(values).split(val_fraction=fraction, seed=seed)
    assert answers(again) == answers(train)
    assert again.fingerprint == train.fingerprint != val.fingerprint
    if fraction == 0.3 and len(set(values)) > 20:  # else the one that must not be missing may be another
        more_train, more_val = numbered([*values, *more]).split(val_fraction=fraction, seed=seed)
        assert set(answers(train)) <= set(answers(more_train))
        assert set(answers(val)) <= set(answers(more_val))


@given(values=some_records, data=st.data())
def test_a_split_by_number_has_that_number_of_distinct_examples(values, data):
    distinct = sorted(set(values))
    size = data.draw(st.integers(1, len(distinct) - 1))
    train, val = numbered(distinct).split(val_size=size, seed=3)
    assert (len(val), len(train)) == (size, len(distinct) - size)
    bigger_train, bigger_val = numbered(values).split(val_size=size, seed=3)
    assert min(len(bigger_train), len(bigger_val)) > 0
    assert not set(answers(bigger_train)) & set(answers(bigger_val))


def test_a_split_is_about_as_large_as_asked_and_depends_on_content_alone(bpe):
    values = [{"messages": [{"role": "user", "content": f"¿{i}?"}, TURNS[2]]} for i in range(800)]
    questions = []
    for options in (
        dict(template="chatml"),
        dict(tokenizer=bpe, template="llama3"),
        dict(tokenizer=bpe, train_on_inputs=True),
    ):
        _, val = dataset(*values, **options).split(val_fraction=0.05, seed=1)
        assert 20 < len(val) < 60  # binomial: 40 with a standard deviation of 6
        questions.append({re.search(r"¿\d+\?", written(val, n))[0] for n in range(len(val))})
    assert questions[0] == questions[1] == questions[2]
    other = dataset(*values).split(val_fraction=0.05, seed=2)[1]
    assert {re.search(r"¿\d+\?", written(other, n))[0] for n in range(len(other))} != questions[0]


def test_splits_that_cannot_be_are_refused():
    data = numbered([1, 2, 3])
    for options, message in (
        (dict(), "give val_fraction or val_size"),
        (dict(val_fraction=0.1, val_size=1), "give val_fraction or val_size"),
        (dict(val_fraction=0.0), r"val_fraction \(0\.0\) must be between 0 and 1"),
        (dict(val_fraction=1.0), r"val_fraction \(1\.0\) must be between"),
        (dict(val_size=3), r"val_size \(3\) must be at least 1 and below the number of examples \(3\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.split(**options)
    with pytest.raises(DataError, match="the data has 3 examples, all alike; a split needs two that differ"):
        numbered([1, 1, 1]).split(val_fraction=0.5)
    with pytest.raises(ConfigError, match="no example 3; there are 3, from 0 on"):
        data.preview(3)


def test_halves_of_a_split_make_batches_of_their_own():
    train, val = toy([5, 6, 7, 8, 9, 10]).split(val_size=2)
    lengths = Counter()
    for data in (train, val):
        batch = data.batch(0, batch_size=data.num_sequences(16), seq_len=16)
        lengths.update(len(ids) for ids, targets in documents_of(batch) if not is_padding((ids, targets)))
        assert data.vocab_size == CHAR.vocab_size
    assert lengths == Counter([5, 6, 7, 8, 9, 10])
