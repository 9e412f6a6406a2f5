"""GGUFs in LM Studio, Ollama and folders: the Modelfile against an evaluator of Go's templates and a parser of Ollama's rules."""

import errno
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import jinja2
import pytest
import torch

from llmforge import Llama, LlamaConfig
from llmforge.cli import deploy as deploy_command
from llmforge.convert.adapter_gguf import export_adapter_gguf
from llmforge.deploy import lmstudio, place
from llmforge.deploy.chat_form import FileChat, chat_form, go_template, stop_words
from llmforge.deploy.modelfile import check_ollama_name, kv_cache_bytes, modelfile, ollama_name, quoted
from llmforge.deploy.place import deploy_gguf
from llmforge.errors import CheckpointError, ConfigError, ConvertError, LLMForgeError
from llmforge.finetune import LoRAConfig, apply_lora_, save_adapter
from llmforge.formats.atomic import WriteError
from llmforge.formats.gguf import GGUFTensor, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.tokenizers.base import PASS_THROUGH
from llmforge.tokenizers.templates import TEMPLATES as OURS

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% else %}{{ 'Below is an instruction that "
    "describes a task.\\n\\n' }}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + "
    "message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + "
    "'\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else %}{{ ' '  + content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
TEMPLATES = {
    **{f"our {name}": template for name, template in OURS.items()},
    "chatml": CHATML,
    "default system": QWEN,
    "llama3": LLAMA3,
    "alpaca": ALPACA,
    "llama2": LLAMA2,
    "gemma": GEMMA,
}

TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
TOKENS += ["<start_of_turn>", "<end_of_turn>", "a", "b"]
SYSTEM = {"role": "system", "content": 'Be "brief".'}
TALK = [
    {"role": "user", "content": "¿Qué es {{ x }}?"},
    {"role": "assistant", "content": 'A "thing".\n\n  Yes.'},
    {"role": "user", "content": "And {% y %}?"},
    {"role": "assistant", "content": "None."},
    {"role": "user", "content": "Why"},
]


def metadata(template=CHATML, *, add_bos=True, **more):
    values = {
        "general.architecture": "llama",
        "llama.context_length": 4096,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [2, *[3] * 9, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": add_bos,
        **more,
    }
    return values if template is None else {**values, "tokenizer.chat_template": template}


def gguf(path, template=CHATML, **more):
    values = metadata(template, **more)
    arch = values.pop("general.architecture")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, arch, values, [GGUFTensor("output_norm.weight", "F32", LazyTensor.of(torch.arange(64.0)))])
    return path


def jinja(template, messages, *, bos):
    """jinja2 itself, as transformers sets it up."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages,
        bos_token=bos,
        eos_token="</s>",
        add_generation_prompt=True,
        raise_exception=refuse,
        tools=None,
    )


class Go:
    """The part of Go's text/template that TEMPLATE uses: if, else if, else, range, eq, ne, variables, strings."""

    def __init__(self, template):
        self.parts = [part for part in re.split(r"(\{\{.*?\}\}(?!\}))", template, flags=re.S) if part]

    def render(self, messages):
        self.variables = {}
        out = []
        self.run(0, out, {"Messages": messages}, True)
        return "".join(out)

    def run(self, i, out, dot, live):
        """Executes up to the matching else or end, and returns its index."""
        while i < len(self.parts):
            part = self.parts[i]
            if not part.startswith("{{"):
                if live:
                    out.append(part)
                i += 1
                continue
            action = part[2:-2].strip()
            if action == "end" or action.startswith("else"):
                return i
            if action.startswith("range "):
                items = self.value(action[6:], dot) if live else []
                for item in items:
                    self.run(i + 1, out, {"Role": item["role"], "Content": item["content"]}, True)
                i = self.run(i + 1, [], dot, False) + 1
            elif action.startswith("if "):
                i = self.branch(i, action[3:], out, dot, live)
            elif found := re.fullmatch(r"(\$\w+) :?= (.+)", action):
                if live:
                    self.variables[found[1]] = self.value(found[2], dot)
                i += 1
            else:
                if live:
                    out.append(self.value(action, dot))
                i += 1
        return i

    def branch(self, i, condition, out, dot, live):
        taken = False
        while True:
            true = live and not taken and (condition is None or self.holds(condition, dot))
            taken = taken or true
            i = self.run(i + 1, out if true else [], dot, true)
            action = self.parts[i][2:-2].strip()
            if action == "end":
                return i + 1
            condition = action.removeprefix("else").strip().removeprefix("if ") or None

    def holds(self, condition, dot):
        word, left, right = re.fullmatch(r"(eq|ne) (\S+) (\S+)", condition).groups()
        return (self.value(left, dot) == self.value(right, dot)) == (word == "eq")

    def value(self, text, dot):
        if text.startswith('"'):
            return json.loads(text)  # Go's escapes that are used here are JSON's
        return self.variables[text] if text.startswith("$") else dot[text[1:]]


def parse_modelfile(text):
    """Ollama's parser, by its rules: a value in quotes goes to the first line end after its closing quotes; no escapes."""
    commands, lines = [], text.split("\n")
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        key = None
        if name == "PARAMETER":
            key, _, value = value.partition(" ")
        quotes = '"""' if value.strip().startswith('"""') else '"' if value.strip().startswith('"') else ""
        while quotes and not (len(value.strip()) >= 2 * len(quotes) and value.strip().endswith(quotes)):
            value += "\n" + lines.pop(0)
        value = value.strip()
        commands.append((key or name, value[len(quotes) : len(value) - len(quotes)]))
    return commands


def of(commands, name):
    return [value for key, value in commands if key == name]


# The template


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("name", "system"),
    [(name, system) for name in TEMPLATES for system in (False, True) if (name, system) != ("gemma", True)],
)
def test_ollamas_template_writes_what_the_chat_template_writes(name, add_bos, system):
    text, _ = modelfile("./m.gguf", metadata(TEMPLATES[name], add_bos=add_bos))
    (template,) = of(parse_modelfile(text), "TEMPLATE")
    for turns in (1, 3, 5):
        messages = [SYSTEM, *TALK[:turns]] if system else TALK[:turns]
        expected = jinja(TEMPLATES[name], messages, bos="<s>")
        if add_bos:  # llama.cpp writes the first one
            expected = expected.removeprefix("<s>")
        assert Go(template).render(messages) == expected


def test_a_template_off_by_one_line_break_is_seen_by_the_evaluator():
    (template,) = of(parse_modelfile(modelfile("./m.gguf", metadata())[0]), "TEMPLATE")
    spoiled = template.replace("<|im_end|>\n", "<|im_end|>")
    assert spoiled != template
    assert Go(spoiled).render(TALK) != jinja(CHATML, TALK, bos="")


def test_an_answer_that_was_begun_is_continued():
    (template,) = of(parse_modelfile(modelfile("./m.gguf", metadata())[0]), "TEMPLATE")
    assert Go(template).render(TALK[:2]).endswith('<|im_start|>assistant\nA "thing".\n\n  Yes.')


def test_text_that_is_syntax_in_go_or_in_a_modelfile_survives():
    odd = '{"""\n{{ \\ {{{\u00a0\u200d'
    template = "{% for m in messages %}[{{ m.role }}" + "{{ odd }}" + "]{{ m.content }}{% endfor %}"
    template = (
        template.replace("{{ odd }}", "{{ " + json.dumps(odd) + " }}")
        + "{% if add_generation_prompt %}>{{ '{' }}{% endif %}"
    )
    text, _ = modelfile("./m.gguf", metadata(template))
    (go,) = of(parse_modelfile(text), "TEMPLATE")
    assert '"""' not in go
    assert all(c.isprintable() or c == "\n" for c in go)
    assert Go(go).render([SYSTEM, *TALK]) == jinja(template, [SYSTEM, *TALK], bos="")


def test_a_model_without_system_messages_says_so():
    chat = FileChat.from_metadata(metadata(GEMMA))
    go = Go(go_template(chat_form(chat)))
    assert go.render([SYSTEM, *TALK[:3]]) == jinja(GEMMA, TALK[:3], bos="")  # not written, and nothing else changes
    with pytest.raises(ConfigError, match="has no system messages"):
        modelfile("./m.gguf", metadata(GEMMA), system="Be brief.")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML + "{{ strftime_now('%d') }}", "depends on the date"),
        ("{{ messages | length }}" + CHATML, "more than to put texts around"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "more than to put texts around"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for %}", "faulty"),
    ],
)
def test_a_template_that_ollama_cannot_express_is_left_to_ollama(template, reason):
    text, notes = modelfile("./m.gguf", metadata(template))
    assert of(parse_modelfile(text), "TEMPLATE") == []
    assert any(reason in note and "Ollama reads the GGUF's own" in note for note in notes)


@pytest.mark.parametrize("template", [None, PASS_THROUGH])
def test_a_base_model_gets_the_plain_prompt(template):
    text, notes = modelfile("./m.gguf", metadata(template))
    assert of(parse_modelfile(text), "TEMPLATE") == ["{{ .Prompt }}"]
    assert of(parse_modelfile(text), "stop") == ["</s>"]
    assert "continues what is typed" in notes[0]
    with pytest.raises(ConfigError, match="'Be brief.', but the model has no chat template"):
        modelfile("./m.gguf", metadata(template), system="Be brief.")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["</s>", "<|im_end|>", "<|im_start|>"]),
        ("llama3", ["</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        ("alpaca", ["</s>", "### Instruction:"]),
        ("our alpaca", ["</s>", "### Instruction:"]),
        ("our chatml", ["</s>", "<|im_end|>", "<|im_start|>"]),
        ("our llama3", ["</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]),
        ("llama2", ["</s>", "[INST]"]),
        ("gemma", ["</s>", "<end_of_turn>", "<start_of_turn>"]),
    ],
)
def test_stop_words_are_the_end_token_and_the_templates_markers(name, expected):
    chat = FileChat.from_metadata(metadata(TEMPLATES[name]))
    assert stop_words(chat, chat_form(chat)) == expected


# The other lines


def test_modelfile_of_a_tuned_model():
    text, notes = modelfile("./tutor.gguf", metadata(), system='You say "hi".\nBriefly.', num_ctx=2048)
    commands = parse_modelfile(text)
    assert [key for key, _ in commands] == ["FROM", "TEMPLATE", "stop", "stop", "stop", "num_ctx", "SYSTEM"]
    assert of(commands, "FROM") == ["./tutor.gguf"]
    assert of(commands, "num_ctx") == ["2048"]
    assert of(commands, "SYSTEM") == ['You say "hi".\nBriefly.']
    # 2 layers, 2 of 4 heads, 16 wide, keys and values, 2 bytes
    assert kv_cache_bytes(metadata(), 2048) == 2 * 2 * 16 * 2 * 2 * 2048
    assert "context 2,048 tokens, 0.5 MB" in notes[-1]


def test_context_is_the_models_own_and_at_most_8192():
    assert "num_ctx 4096\n" in modelfile("./m.gguf", metadata())[0]
    text, notes = modelfile("./m.gguf", metadata(**{"llama.context_length": 131072}))
    assert "num_ctx 8192\n" in text
    assert "the model has 131,072, write more with --num-ctx" in notes[-1]
    with pytest.raises(ConfigError, match=r"num_ctx \(5,000\) must be at most 4,096"):
        modelfile("./m.gguf", metadata(), num_ctx=5000)
    with pytest.raises(ConfigError, match=r"num_ctx \(0\) must be at least 1"):
        modelfile("./m.gguf", metadata(), num_ctx=0)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        'a "b" c',
        '"',
        '""',
        '"a"',
        'ends with "',
        "two\nlines",
        '\n"\n',
        '""" inside',
        " both ends ",
        'x """ y\nz',
    ],
)
def test_quoted_values_are_read_back(text):
    assert of(parse_modelfile(f"SYSTEM {quoted('system', text)}\nFROM x\n"), "SYSTEM") == [text]


def test_a_value_that_no_modelfile_can_hold_is_refused():
    with pytest.raises(ConfigError, match="system has three quotes"):
        quoted("system", 'def f():\n    """Doc."""\n    return')
    with pytest.raises(ConfigError, match=r"system has the character U\+200D"):
        quoted("system", "family \U0001f468\u200d\U0001f469")


@pytest.mark.parametrize("name", ["tutor", "ana/tutor:v1", "host.com/ana/tutor", "_x.y-z", "a" * 80])
def test_names_by_ollamas_rules(name):
    assert check_ollama_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "mi tutor", "-x", "a/b/c/d", "a..b", "tutor:", "x:y:z", "ñandú", "a.b/c", "a" * 81, "../x"]
)
def test_other_names_are_refused_with_a_proposal(name):
    with pytest.raises(ConfigError, match="is no name for Ollama") as found:
        check_ollama_name(name)
    assert check_ollama_name(ollama_name(name)) in str(found.value)


# LM Studio


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without anything, on Linux or macOS."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(lmstudio, "PROC_VERSION", tmp_path / "version")
    monkeypatch.setattr(lmstudio, "WINDOWS_USERS", tmp_path / "mnt" / "c" / "Users")
    return home


def program(tmp_path, name, code):
    """A program on the PATH, written in Python."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("where", [".lmstudio", ".cache/lm-studio"])
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_lmstudio_gets_publisher_model_file(home, tmp_path, monkeypatch, where, platform):
    monkeypatch.setattr(sys, "platform", platform)
    (home / where).mkdir(parents=True)
    source = gguf(tmp_path / "tutor.Q4_K_M.gguf")
    report = deploy_gguf(source, "lmstudio", publisher="ana", name="tutor")
    assert report.gguf == home / where / "models" / "ana" / "tutor" / "tutor.Q4_K_M.gguf"
    assert report.gguf.read_bytes() == source.read_bytes()
    assert "lms load ana/tutor" in str(report)
    assert [entry.name for entry in report.gguf.parent.iterdir()] == ["tutor.Q4_K_M.gguf"]  # nothing temporary


def test_the_newer_folder_of_lmstudio_comes_first_and_its_settings_before_it(home, tmp_path):
    (home / ".cache" / "lm-studio").mkdir(parents=True)
    (home / ".lmstudio").mkdir()
    assert lmstudio.lmstudio_models_folder() == home / ".lmstudio" / "models"
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "big")}))
    assert lmstudio.lmstudio_models_folder() == tmp_path / "big"
    (home / ".lmstudio" / "settings.json").write_text("{broken")
    assert lmstudio.lmstudio_models_folder() == home / ".lmstudio" / "models"
    (tmp_path / "elsewhere").mkdir()
    (home / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'elsewhere'}\n")
    assert lmstudio.lmstudio_models_folder() == tmp_path / "elsewhere" / "models"


def windows(tmp_path, *people):
    (tmp_path / "version").write_text("Linux version 5.15.167.4-microsoft-standard-WSL2")
    for name in people:
        (tmp_path / "mnt" / "c" / "Users" / name / ".lmstudio").mkdir(parents=True)
    return tmp_path / "mnt" / "c" / "Users"


def test_inside_wsl_the_windows_user_is_asked_for(home, tmp_path):
    users = windows(tmp_path, "ana", "bob")
    program(tmp_path, "cmd.exe", r"print('C:\\Users\\bob\r')")
    program(tmp_path, "wslpath", f"print({str(tmp_path / 'mnt')!r} + '/c' + sys.argv[2][2:].replace(chr(92), '/'))")
    (users / "bob" / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": r"C:\Users\bob\Models"}))
    assert lmstudio.lmstudio_models_folder() == users / "bob" / "Models"


def test_inside_wsl_without_windows_programs_the_users_are_looked_through(home, tmp_path):
    users = windows(tmp_path, "ana")
    (users / "Public" / ".lmstudio").mkdir(parents=True)
    (users / "ana" / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": "D:\\llm\\models"}))
    assert lmstudio.lmstudio_models_folder() == tmp_path / "mnt" / "d" / "llm" / "models"
    windows(tmp_path, "bob")
    with pytest.raises(ConfigError, match="several Windows users have LM Studio .*--models-dir"):
        lmstudio.lmstudio_models_folder()


def test_inside_wsl_the_users_own_lmstudio_of_linux_is_found_too(home, tmp_path):
    windows(tmp_path)
    (home / ".lmstudio").mkdir()
    assert lmstudio.lmstudio_models_folder() == home / ".lmstudio" / "models"


def test_without_lmstudio_the_error_says_where_it_looked(home, tmp_path):
    with pytest.raises(ConfigError, match=f"not found for {re.escape(str(home))}.*--models-dir"):
        deploy_gguf(gguf(tmp_path / "t.gguf"), "lmstudio")


def test_another_model_is_never_replaced_in_silence(home, tmp_path):
    source, other = gguf(tmp_path / "a" / "t.gguf"), gguf(tmp_path / "b" / "t.gguf", LLAMA3)
    (home / ".lmstudio").mkdir()
    first = deploy_gguf(source, "lmstudio")
    again = deploy_gguf(source, "lmstudio")
    assert "has the same content already" in str(again)
    with pytest.raises(WriteError, match="exists and is another model.*--overwrite"):
        deploy_gguf(other, "lmstudio")
    assert first.gguf.read_bytes() == source.read_bytes()
    deploy_gguf(other, "lmstudio", overwrite=True)
    assert first.gguf.read_bytes() == other.read_bytes()


def test_a_hard_link_needs_no_second_copy(home, tmp_path, monkeypatch):
    source = gguf(tmp_path / "t.gguf")
    report = deploy_gguf(source, "lmstudio", models_dir=tmp_path / "models", link=True)
    assert os.path.samefile(source, report.gguf)
    assert "it is the file itself" in str(deploy_gguf(source, "lmstudio", models_dir=tmp_path / "models", link=True))

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(WriteError, match="on different disks.*leave out --link"):
        deploy_gguf(source, "lmstudio", models_dir=tmp_path / "models", name="other", link=True)


def test_a_full_disk_is_noticed_before_anything_is_copied(home, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(WriteError, match=r"needs 0\.0 MB, and 0\.0 MB are free"):
        deploy_gguf(gguf(tmp_path / "t.gguf"), "lmstudio", models_dir=tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_disk_that_fills_up_leaves_nothing_behind(home, tmp_path, monkeypatch):
    def full(source, target, size, progress):
        target.write_bytes(b"GG")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, "_copy", full)
    with pytest.raises(WriteError, match="the disk is full"):
        deploy_gguf(gguf(tmp_path / "t.gguf"), "lmstudio", models_dir=tmp_path / "models")
    assert [entry for entry in (tmp_path / "models").rglob("*") if entry.is_file()] == []


def test_no_permission_is_explained(home, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    source = gguf(tmp_path / "t.gguf")
    monkeypatch.setattr("tempfile.mkstemp", refuse)  # root, who may run the tests, may write anywhere
    with pytest.raises(WriteError, match="no permission to write there"):
        deploy_gguf(source, "lmstudio", models_dir=tmp_path / "models")


@pytest.mark.parametrize("name", ["a/b", "..", "", "nul", "con.x", "a b", ".x", "a.", "x" * 101])
def test_names_that_are_no_folder_are_refused(home, tmp_path, name):
    source = gguf(tmp_path / "t.gguf")
    for what in ("name", "publisher"):
        with pytest.raises(ConfigError, match=f"{what} .* must be the name of a folder on any system"):
            deploy_gguf(source, "lmstudio", models_dir=tmp_path / "m", **{what: name})


# Ollama

RECORD = "json.dump([sys.argv[1:], os.getcwd()], open({!r}, 'w'))"


def test_ollama_is_called_with_the_modelfile(home, tmp_path):
    source, record = gguf(tmp_path / "my models" / "Tutor v2.gguf"), tmp_path / "record.json"
    program(tmp_path, "ollama", RECORD.format(str(record)))
    report = deploy_gguf(source, "ollama", system="Be brief.")
    assert json.loads(record.read_text())[0] == ["create", "tutor-v2", "-f", str(source.parent / "Modelfile")]
    assert of(parse_modelfile(report.modelfile.read_text(encoding="utf-8")), "FROM") == ["./Tutor v2.gguf"]
    assert "ollama run tutor-v2" in str(report)


def test_a_modelfile_elsewhere_names_the_whole_path(home, tmp_path):
    source = gguf(tmp_path / "t.gguf")
    report = deploy_gguf(source, "ollama", name="ana/t:v1", out=tmp_path / "out")
    assert of(parse_modelfile(report.modelfile.read_text(encoding="utf-8")), "FROM") == [str(source)]
    assert f"ollama create ana/t:v1 -f {tmp_path / 'out' / 'Modelfile'}" in str(report)
    assert "not on the PATH" in str(report)


def test_ollamas_refusal_is_reported_in_its_own_words(home, tmp_path):
    program(
        tmp_path,
        "ollama",
        "print('gathering model', file=sys.stderr); sys.exit('\\x1b[2KError: could not connect to ollama')",
    )
    with pytest.raises(
        ConvertError, match=r"exit code 1\): gathering model \| Error: could not connect.*type: ollama create t -f"
    ):
        deploy_gguf(gguf(tmp_path / "t.gguf"), "ollama")
    assert (tmp_path / "Modelfile").is_file()


def test_the_ollama_of_windows_gets_windows_paths(home, tmp_path):
    windows(tmp_path)
    record = tmp_path / "record.json"
    program(tmp_path, "ollama.exe", RECORD.format(str(record)))
    program(tmp_path, "wslpath", "os.stat(sys.argv[2]); print('W:' + sys.argv[2].replace('/', chr(92)))")
    source = gguf(tmp_path / "t.gguf")
    report = deploy_gguf(source, "ollama", out=tmp_path / "out")
    modelfile_path = "W:" + str(tmp_path / "out" / "Modelfile").replace("/", "\\")
    assert json.loads(record.read_text())[0] == ["create", "t", "-f", modelfile_path]
    assert of(parse_modelfile(report.modelfile.read_text(encoding="utf-8")), "FROM") == [
        "W:" + str(source).replace("/", "\\")
    ]


def test_a_modelfile_of_ones_own_or_of_another_model_is_kept(home, tmp_path):
    first, second = gguf(tmp_path / "a.gguf"), gguf(tmp_path / "b.gguf", LLAMA3)
    deploy_gguf(first, "ollama")
    deploy_gguf(first, "ollama", num_ctx=100)
    assert "num_ctx 100\n" in (tmp_path / "Modelfile").read_text()
    with pytest.raises(WriteError, match="is of another model.*--out.*--overwrite"):
        deploy_gguf(second, "ollama")
    (tmp_path / "Modelfile").write_text("FROM ./a.gguf\n")
    with pytest.raises(WriteError, match="--overwrite"):
        deploy_gguf(first, "ollama")
    deploy_gguf(first, "ollama", overwrite=True)
    changed = (tmp_path / "Modelfile").read_text().replace("num_ctx 4096", "num_ctx 99")
    (tmp_path / "Modelfile").write_text(changed)
    with pytest.raises(WriteError, match="or was changed"):
        deploy_gguf(first, "ollama")
    assert (tmp_path / "Modelfile").read_text() == changed
    deploy_gguf(second, "ollama", overwrite=True)
    assert "FROM ./b.gguf" in (tmp_path / "Modelfile").read_text()


def test_an_adapter_that_was_exported_is_known_as_one(home, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = Llama(config)
    apply_lora_(model, LoRAConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", base_model="base")
    export_adapter_gguf(tmp_path / "adapter", Llama(config), tmp_path / "lora.gguf")
    commands = parse_modelfile(deploy_gguf(tmp_path / "lora.gguf", "ollama", base="llama3:8b").modelfile.read_text())
    assert commands == [("FROM", "llama3:8b"), ("ADAPTER", "./lora.gguf")]


def test_an_adapter_goes_upon_its_base(home, tmp_path):
    base = gguf(tmp_path / "base.gguf", LLAMA3)
    adapter = gguf(tmp_path / "adapter.gguf", None, **{"general.type": "adapter"})
    with pytest.raises(ConfigError, match="is a LoRA adapter; name its base"):
        deploy_gguf(adapter, "ollama")
    with pytest.raises(ConfigError, match="LM Studio cannot load"):
        deploy_gguf(adapter, "lmstudio", base=base)
    commands = parse_modelfile(deploy_gguf(adapter, "ollama", base=base).modelfile.read_text(encoding="utf-8"))
    assert (of(commands, "FROM"), of(commands, "ADAPTER")) == (["./base.gguf"], ["./adapter.gguf"])
    assert "<|start_header_id|>" in of(commands, "TEMPLATE")[0]
    commands = parse_modelfile(
        deploy_gguf(adapter, "ollama", base="llama3:8b", out=tmp_path / "o").modelfile.read_text(encoding="utf-8")
    )
    assert commands == [("FROM", "llama3:8b"), ("ADAPTER", str(adapter))]
    with pytest.raises(ConfigError, match="none.gguf is no file"):
        deploy_gguf(adapter, "ollama", base="none.gguf")
    with pytest.raises(ConfigError, match="is a whole model; leave it out"):
        deploy_gguf(base, "ollama", base="llama3:8b")
    with pytest.raises(ConfigError, match="is an adapter too"):
        deploy_gguf(adapter, "ollama", base=adapter)


# Folders, and all of them


def test_a_folder_gets_the_file_a_modelfile_and_a_readme(home, tmp_path):
    source = gguf(tmp_path / "t.gguf")
    report = deploy_gguf(source, tmp_path / "out", name="tutor")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "t.gguf"]
    assert (tmp_path / "out" / "t.gguf").read_bytes() == source.read_bytes()
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for command in ("llama-cli -m t.gguf", "ollama create tutor -f Modelfile", "lms load llmforge/t"):
        assert command in readme
    assert f"llama-cli -m {tmp_path / 'out' / 't.gguf'}" in str(report)
    (tmp_path / "out" / "README.md").write_text("mine", encoding="utf-8")
    assert "README.md is yours" in str(deploy_gguf(source, tmp_path / "out", name="tutor"))
    adapter = gguf(tmp_path / "adapter.gguf", None, **{"general.type": "adapter"})
    deploy_gguf(adapter, tmp_path / "both", base=source)
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["Modelfile", "README.md", "adapter.gguf", "t.gguf"]
    assert "llama-cli -m t.gguf --lora adapter.gguf" in (tmp_path / "both" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("to", ["lmstudio", "ollama", "out"])
def test_a_dry_run_says_it_all_and_does_nothing(home, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    (home / ".lmstudio").mkdir()
    program(tmp_path, "ollama", "raise SystemExit('it was run')")
    source = gguf(tmp_path / "t.gguf")
    before = sorted(tmp_path.rglob("*"))
    dry = deploy_gguf(source, to, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    program(tmp_path, "ollama", "")
    done = deploy_gguf(source, to)
    assert [line.removeprefix("would have ") for line in str(dry).splitlines()] == str(done).splitlines()
    assert dry.done
    assert all(line.startswith("would have ") for line in str(dry).splitlines()[: len(dry.done)])


@pytest.mark.parametrize("to", ["olama", "Ollama", "lm-studio", "LMStudio", "lmstduio"])
def test_a_misspelt_target_is_not_made_a_folder(tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    source = gguf(tmp_path / "t.gguf")
    with pytest.raises(ConfigError, match=f"unknown target '{to}'; did you mean '(ollama|lmstudio)'"):
        deploy_gguf(source, to)
    deploy_gguf(source, f"./{to}")
    assert (tmp_path / to / "t.gguf").is_file()


def test_files_that_are_no_whole_gguf_are_refused(home, tmp_path):
    whole = gguf(tmp_path / "t.gguf").read_bytes()
    cut, other = tmp_path / "cut.gguf", tmp_path / "other.gguf"
    cut.write_bytes(whole[:-10])
    other.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(CheckpointError, match=r"cut\.gguf is cut off"):
        deploy_gguf(cut, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        deploy_gguf(other, tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot read"):
        deploy_gguf(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match="one of 3 parts"):
        deploy_gguf(gguf(tmp_path / "part.gguf", **{"split.count": 3}), tmp_path / "out")
    with pytest.raises(ConfigError, match="one of 3 parts"):
        deploy_gguf(gguf(tmp_path / "odd.gguf", **{"split.count": "3"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_report(home, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    deploy_command.add_arguments(parser)
    args = parser.parse_args([str(gguf(tmp_path / "t.gguf")), "--to", str(tmp_path / "out"), "--dry-run"])
    assert deploy_command.run(args) == 0
    assert "would have copied" in capsys.readouterr().out


def test_every_error_is_one_that_the_command_line_explains():
    assert all(issubclass(error, LLMForgeError) for error in (WriteError, ConfigError, ConvertError, CheckpointError))
