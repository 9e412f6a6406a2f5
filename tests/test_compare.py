"""Two models side by side: losses against transformers, llama.cpp against torch, and pages that show what was written."""

import argparse
import json
import math
import re
import shlex
import shutil
import weakref
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy import TEXT, toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmforge import BPETokenizer, Llama, LlamaConfig, SentencePieceTokenizer, export_gguf, export_hf, load
from llmforge.cli import compare as compare_command
from llmforge.cli import deploy as deploy_command
from llmforge.data import InstructionDataset
from llmforge.deploy import compare as compare_module
from llmforge.deploy.compare import AnswerLoss, ComparedPrompt, Comparison, compare_models
from llmforge.deploy.pages import MIN_COLUMNS
from llmforge.deploy.prompts import Prompt, read_prompts
from llmforge.errors import ConfigError, ConvertError, DataError
from llmforge.finetune import LoRAConfig, apply_lora_, save_adapter
from llmforge.formats.gguf import write_gguf
from llmforge.tokenizers.templates import TEMPLATES, with_chat_template

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% else %}"
    "{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
RECORDS = [
    {"instruction": "En un lugar", "input": "de la Mancha", "output": "de cuyo nombre no quiero acordarme"},
    {"prompt": "no ha mucho tiempo", "output": "que vivía un hidalgo."},
    {"messages": [{"role": "system", "content": "Cita."}, {"role": "user", "content": "hidalgo"}, {"role": "assistant", "content": "vivía"}]},
    {"prompt": "quiero acordarme"},
]  # fmt: skip


def toy(folder, *, seed, template=TEMPLATE, vocab_size=300):
    """A Llama in a Hugging Face folder; weights that make one token clearly the most probable."""
    torch.manual_seed(seed)
    tokenizer = BPETokenizer.from_texts([TEXT], vocab_size=vocab_size)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Llama(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    export_hf(model, tokenizer, folder)
    if template is not None:
        path = folder / "tokenizer_config.json"
        values = {**json.loads(path.read_text(encoding="utf-8")), "chat_template": template}
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "base": toy(root / "base", seed=1, template=None),
        "tuned": toy(root / "tuned", seed=2),
        "other tokens": toy(root / "other", seed=3, vocab_size=280),
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(folders, prompts):
    return compare_models(folders["base"], folders["tuned"], prompts, max_new_tokens=8)


# The figures


def by_hand(folder, template):
    """Sum of -log p and number of tokens of the answers, by transformers: its tokenizer, its template, its model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats, count = 0.0, 0
    for record in RECORDS[:3]:
        messages = record.get("messages")
        if messages is None:
            question = record.get("prompt") or f"{record['instruction']}\n\n{record['input']}"
            answer = record["output"]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        ids = tokenizer(before + messages[-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        idx = torch.tensor([ids])
        with torch.no_grad():
            logits = model(idx).logits[0]
        nats += F.cross_entropy(logits[start - 1 : -1], idx[0, start:], reduction="sum").item()
        count += len(ids) - start
    return nats, count


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_loss_is_what_transformers_computes_on_the_answers_alone(compared, folders, side):
    nats, count = by_hand(folders[side], TEMPLATE)
    loss = getattr(compared, f"{side}_loss")
    assert loss.n_tokens == count
    assert loss.nats == pytest.approx(nats, rel=1e-5)  # the order of float sums
    assert loss.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    n_bytes = len("de cuyo nombre no quiero acordarme" + "que vivía un hidalgo." + "vivía") + 2  # two í of two bytes
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_another_model_has_another_loss(compared, folders):
    nats, _ = by_hand(folders["other tokens"], TEMPLATE)
    assert compared.tuned_loss.nats != pytest.approx(nats, rel=1e-2)


def test_answers_are_the_most_probable_tokens(compared, folders):
    model = AutoModelForCausalLM.from_pretrained(folders["tuned"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["tuned"])
    text = "### Instruction:\nquiero acordarme\n\n### Response:\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert compared.rows[3].tuned == tokenizer.decode(found, skip_special_tokens=True)


def test_a_base_without_a_template_reads_the_tuned_models(compared):
    assert any("base has no chat template and reads the prompts in that of" in note for note in compared.notes)


def test_changed_answers_are_counted(compared, folders, prompts):
    assert compared.changed_fraction == sum(row.base.strip() != row.tuned.strip() for row in compared.rows) / 4
    assert compared.changed_fraction > 0
    same = compare_models(folders["tuned"], folders["tuned"], prompts, max_new_tokens=8)
    assert same.changed_fraction == 0
    assert same.base_loss == same.tuned_loss
    assert "0 of 4 answers changed (0%)" in str(same)


def test_with_other_tokens_bits_per_byte_come_first(folders, prompts, compared):
    assert compared.same_tokens
    assert compared.summary()[0][0] == "loss (nats per token)"
    other = compare_models(folders["base"], folders["other tokens"], prompts, max_new_tokens=2)
    assert not other.same_tokens
    assert other.summary()[0][0] == "bits per byte"
    assert "compare the bits per byte" in str(other)
    assert other.base_loss.n_bytes == other.tuned_loss.n_bytes


def test_sampling_draws_with_the_same_seed(folders, prompts):
    options = dict(temperature=1.5, max_new_tokens=8, limit=2)
    first, again, other = (
        compare_models(folders["tuned"], folders["tuned"], prompts, seed=seed, **options) for seed in (1, 1, 2)
    )
    assert [row.base for row in first.rows] == [row.tuned for row in first.rows] == [row.base for row in again.rows]
    assert [row.base for row in first.rows] != [row.base for row in other.rows]


def test_raw_prompts_go_in_as_they_are(folders):
    result = compare_models(folders["base"], folders["tuned"], ["En un lugar"], raw=True, max_new_tokens=4)
    model, tokenizer = load(folders["tuned"])
    from llmforge import generate_text

    expected = generate_text(model, tokenizer, "En un lugar", max_new_tokens=4, temperature=0.0)
    assert "En un lugar" + result.rows[0].tuned == expected
    assert result.notes == []
    assert result.base_loss is None
    assert "perplexity" not in str(result)


def test_one_model_is_gone_before_the_other_is_loaded(folders, prompts, monkeypatch):
    loaded, alive = [], []

    def noticing(*args, **options):
        alive.append(sum(model() is not None for model in loaded))
        model, tokenizer = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(compare_module, "load", noticing)
    compare_models(folders["base"], folders["tuned"], prompts, max_new_tokens=2, limit=1)
    assert alive == [0, 0]
    assert len(loaded) == 2


def test_models_in_memory_and_progress(prompts):
    model, tokenizer = toy_model(), toy_tokenizer()
    model.train()
    seen = []
    records = [{"prompt": "En un lugar", "output": "de la Mancha"}, "hidalgo"]
    result = compare_models(
        (model, tokenizer), (model, tokenizer), records, max_new_tokens=3, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.training
    # A context of 16: the prompt of 11 tokens loses its first ones to the answer of 13.
    ids = torch.tensor(
        [tokenizer.encode("En un lugar")[-4:] + tokenizer.encode("de la Mancha") + [tokenizer.eos_token_id]]
    )
    with torch.no_grad():
        logits = model.eval()(ids[:, :-1])[0, 3:]
    expected = F.cross_entropy(logits, ids[0, 4:], reduction="sum").item()
    assert result.base_loss.nats == pytest.approx(expected, rel=1e-5)
    assert any("longer than its context and were cut" in note for note in result.notes)


def test_an_adapters_folder_is_a_model(folders, tmp_path):
    model, tokenizer = load(folders["base"])
    apply_lora_(model, LoRAConfig(r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter", base_model=str(folders["base"]))
    result = compare_models(folders["base"], tmp_path / "adapter", RECORDS[:2], max_new_tokens=8, raw=True)
    beside = compare_models(folders["base"], (model, tokenizer), RECORDS[:2], max_new_tokens=8, raw=True)
    assert [row.tuned for row in result.rows] == [row.tuned for row in beside.rows] != [row.base for row in result.rows]
    assert result.tuned_loss.nats == pytest.approx(beside.tuned_loss.nats, rel=1e-4)  # merged, and beside the weights
    assert result.tuned_loss.nats != pytest.approx(result.base_loss.nats, rel=1e-2)


def test_alpacas_input_has_the_place_that_the_template_gives_it(folders):
    model, tokenizer = load(folders["tuned"])
    tokenizer = tokenizer.with_chat_template(TEMPLATES["alpaca"])
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nEn un lugar\n\n### Input:\nde la Mancha\n\n### Response:\n"
    )
    ids = torch.tensor([tokenizer.encode(expected) + tokenizer.encode(RECORDS[0]["output"]) + [tokenizer.eos_token_id]])
    start = len(tokenizer.encode(expected))
    with torch.no_grad():
        logits = model(ids)[0]
    nats = F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()
    result = compare_models((model, tokenizer), (model, tokenizer), RECORDS[:1], max_new_tokens=1)
    assert result.base_loss.nats == pytest.approx(nats, rel=1e-5)
    assert "En un lugar\n\nde la Mancha" in str(result)


@pytest.mark.parametrize("kind", ["alpaca", "messages", "completion"])
def test_the_loss_is_the_one_that_tuning_sees(folders, kind):
    model, tokenizer = load(folders["tuned"])
    tokenizer = with_chat_template(tokenizer, "alpaca")
    records = {
        "alpaca": RECORDS[:1],
        "messages": RECORDS[2:3],
        "completion": [{"prompt": "En un lugar de", "completion": " la Mancha"}],
    }[kind]
    data = InstructionDataset.from_records(records, tokenizer, kind=kind)
    idx, targets, _ = data.batch(0, batch_size=1, seq_len=256)
    with torch.no_grad():
        nats = F.cross_entropy(model(idx)[0], targets[0], ignore_index=-100, reduction="sum").item()
    result = compare_models((model, tokenizer), (model, tokenizer), records, max_new_tokens=1)
    assert result.base_loss.nats == pytest.approx(nats, rel=1e-5)
    assert result.base_loss.n_tokens == (targets >= 0).sum()


# GGUF


@pytest.fixture(scope="module")
def ggufs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    for name in ("base", "tuned"):
        export_gguf(folders[name], None, root / f"{name}.gguf", file_type="F32")
    return {name: root / f"{name}.gguf" for name in ("base", "tuned")}


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_a_gguf_gives_what_its_folder_gives(compared, ggufs, prompts, engine):
    result = compare_models(ggufs["base"], ggufs["tuned"], prompts, max_new_tokens=8, engine=engine)
    assert [(row.base, row.tuned) for row in result.rows] == [(row.base, row.tuned) for row in compared.rows]
    for ours, theirs in ((result.base_loss, compared.base_loss), (result.tuned_loss, compared.tuned_loss)):
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-4)
        assert (ours.n_tokens, ours.n_bytes) == (theirs.n_tokens, theirs.n_bytes)
    assert result.same_tokens


def test_llama_cpp_beside_torch_raw_and_with_stops(folders, ggufs):
    prompts = [{"prompt": "En un lugar", "output": " de la Mancha"}]
    ours = compare_models(folders["tuned"], ggufs["tuned"], prompts, raw=True, engine="llama.cpp", max_new_tokens=12)
    assert ours.rows[0].base == ours.rows[0].tuned
    assert ours.base_loss.nats == pytest.approx(ours.tuned_loss.nats, rel=1e-4)
    stop = ours.rows[0].base[4:6]
    cut = compare_models(
        folders["tuned"], ggufs["tuned"], prompts, raw=True, engine="llama.cpp", max_new_tokens=12, stop=[stop]
    )
    assert cut.rows[0].base == cut.rows[0].tuned == ours.rows[0].base[: ours.rows[0].base.index(stop)]


def sentencepiece_tokenizer():
    """<unk>, <s>, </s>, the bytes, letters, and pieces of two and three of them."""
    letters = sorted(set(TEXT.replace(" ", "\u2581").replace("\n", "")) | set("IRnstructonespo:#"))
    pieces = ["\u2581d", "en", "de", "\u2581de", "ar", "ue", "an", "\u2581a", "in", "es"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return SentencePieceTokenizer.from_scores(tokens, scores, types, unk_id=0, add_space_prefix=True, config=config)


@pytest.mark.parametrize("raw", [False, True])
def test_llama_cpp_puts_no_space_before_an_answer_either(tmp_path, raw):
    tokenizer = with_chat_template(sentencepiece_tokenizer(), "alpaca")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = Llama(config).eval()
    export_gguf(model, tokenizer, tmp_path / "m.gguf", file_type="F32")
    records = [{"prompt": "En un lugar", "output": "de la Mancha"}, {"prompt": "hidalgo", "output": " que vivía"}]
    result = compare_models(
        (model, tokenizer), tmp_path / "m.gguf", records, raw=raw, engine="llama.cpp", max_new_tokens=1
    )
    assert result.same_tokens
    assert result.base_loss.nats == pytest.approx(result.tuned_loss.nats, rel=1e-4)
    ids = tokenizer.encode_batch(["de la Mancha"], after=True)[0].tolist()
    assert tokenizer.decode_bytes(ids) == b"de la Mancha"
    assert result.rows[0].base_loss.n_tokens == len(ids) + 1  # and </s>


def test_llama_cpp_cuts_at_the_context_as_torch_does(folders, ggufs):
    prompts = [{"prompt": "lugar " * 60, "output": "hidalgo " * 60}, {"prompt": "En", "output": "Mancha " * 400}]
    result = compare_models(folders["tuned"], ggufs["tuned"], prompts, raw=True, engine="llama.cpp", max_new_tokens=1)
    for row in result.rows:
        assert row.base_loss.nats == pytest.approx(row.tuned_loss.nats, rel=1e-4)
        assert (row.base_loss.n_tokens, row.base_loss.n_bytes) == (row.tuned_loss.n_tokens, row.tuned_loss.n_bytes)
    assert result.rows[1].base_loss.n_tokens == 256
    assert len(result.notes) == 2


def test_llama_cpp_needs_a_gguf(folders, prompts, monkeypatch):
    with pytest.raises(ConfigError, match="neither model is one"):
        compare_models(folders["base"], folders["tuned"], prompts, engine="llama.cpp")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConvertError, match="llama.cpp is not installed"):
        compare_models(folders["base"], folders["tuned"], prompts, engine="llama.cpp")


# Pages

EVIL = "<script>alert('x')</script> & ```` \x1b[31m red\x07\u202e"


def comparison(**changes):
    rows = [
        ComparedPrompt(
            prompt="Say <b>it</b>\nnow",
            reference="ref | erence",
            base=EVIL,
            tuned="def f():\n    return 'señor'\n" + "long words of one answer " * 8,
            base_loss=AnswerLoss(nats=8.0, n_tokens=4, n_bytes=10),
            tuned_loss=AnswerLoss(nats=2.0, n_tokens=4, n_bytes=10),
        ),
        ComparedPrompt(
            prompt="二つ", reference=None, base="同じ答え", tuned=" 同じ答え\n", base_loss=None, tuned_loss=None
        ),
    ]
    values = dict(base="a<b", tuned="t|u", rows=rows, temperature=0.0, max_new_tokens=20, seed=0, same_tokens=True)
    return Comparison(**{**values, **changes})


def cells(line):
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


@pytest.mark.parametrize("width", [20, 40, MIN_COLUMNS - 1, MIN_COLUMNS, 80, 101, 200])
def test_the_terminal_is_never_too_narrow(width):
    text = comparison().to_text(width, references=True)
    assert max(map(cells, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "\\x1b[31m" in text.replace("\n", "")
    assert "    return 'señor'" in text  # code keeps its indentation
    beside = [line for line in text.splitlines() if "[a<b]" in line and "[t|u]" in line]
    assert bool(beside) == (width >= MIN_COLUMNS)
    assert "ref | erence" in text
    assert "ref | erence" not in comparison().to_text(width)
    assert "1 of 2 answers changed" in " ".join(text.split())


def test_no_word_of_an_answer_is_lost_when_it_is_wrapped():
    words = [f"w{i}" for i in range(200)] + ["x" * 150]
    row = ComparedPrompt(prompt="p", reference=None, base=" ".join(words), tuned="t", base_loss=None, tuned_loss=None)
    for width in (30, 90):
        lines = comparison(rows=[row]).to_text(width).splitlines()
        found = " ".join(line.split(" |")[0] for line in lines[3:] if not line.startswith("---"))
        joined = re.sub(r"\s+", "", found)
        assert "".join(words) in joined


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "pre":
            self.texts.append(data)


def test_the_html_page_is_well_formed_escaped_and_needs_nothing_else():
    page = Page(comparison().to_html())
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "b"}
    assert not any(key in attributes for _, attributes in page.tags for key in ("src", "href", "onclick"))
    assert page.texts[0] == "Say <b>it</b>\nnow"
    assert page.texts[1].startswith("<script>alert('x')</script> & ````")
    assert not any(c in comparison().to_html() for c in "\x1b\x07\u202e")
    assert "ref | erence" in page.texts


def test_the_markdown_page_fences_what_it_shows():
    lines = comparison().to_markdown().split("\n")
    start = next(
        i for i, line in enumerate(lines) if line.startswith("`````")
    )  # longer than the four that the answer has
    assert lines[start] == "`````text"
    assert lines[start + 1].startswith("<script>")
    assert lines[start + 2] == "`````"
    assert "| perplexity | 7.389 | 1.649 |" in lines  # exp(2), exp(0.5)
    assert "# a\\<b and t\\|u" in lines


# Prompts


def test_all_forms_of_prompts_are_read(tmp_path):
    expected = [
        Prompt(
            ({"role": "user", "content": "En un lugar", "input": "de la Mancha"},), "de cuyo nombre no quiero acordarme"
        ),
        Prompt(({"role": "user", "content": "no ha mucho tiempo"},), "que vivía un hidalgo."),
        Prompt(({"role": "system", "content": "Cita."}, {"role": "user", "content": "hidalgo"}), "vivía"),
        Prompt(({"role": "user", "content": "quiero acordarme"},), None),
    ]
    expected.append(Prompt(({"role": "user", "content": "a"},), "b", raw=True))
    expected.append(Prompt(({"role": "user", "content": "c"},), None))
    records = [*RECORDS, {"prompt": "a", "completion": "b"}, {"conversations": [{"from": "human", "value": "c"}]}]
    lines, whole, plain = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.txt"
    lines.write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, records)), encoding="utf-8")
    whole.write_text(json.dumps(records, indent=1), encoding="utf-8")
    plain.write_text("one\n\n two\n", encoding="utf-8")
    assert read_prompts(lines) == read_prompts(whole) == expected
    assert read_prompts(lines, limit=2) == expected[:2]
    assert [prompt.text for prompt in read_prompts(plain)] == ["one", " two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON from column"),
        ('{"prompt": "a"}\n\n{"promt": "b"}', "line 3: its keys are 'promt'; a prompt is like"),
        ('{"prompt": " "}', "line 1: prompt is ' '; it must be text that is not empty"),
        ('{"prompt": 3}', "line 1: prompt is 3"),
        ('{"prompt": "a", "output": 3}', "the answer is 3; it must be text"),
        ('{"prompt": "a", "completion": 3}', "completion is 3; it must be text"),
        ('{"instruction": " "}', "nothing is asked"),
        ("3", "line 1: 3 is no prompt"),
        ('{"messages": []}', "messages is []"),
        ('{"messages": [3]}', "messages[0] is 3"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0]: role is 'robot'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing was asked before it"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "nothing was asked before it"),
        ("[1, ", "record 1"),
        (b"\xff\xfe{", "UTF-16"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        read_prompts(path)


def test_settings_that_cannot_work_are_refused(folders, prompts, tmp_path):
    both = (folders["base"], folders["tuned"], prompts)
    for options, message in (
        (dict(engine="llamacpp"), r"engine \('llamacpp'\) must be"),
        (dict(max_new_tokens=0), r"max_new_tokens \(0\) must be at least 1"),
        (dict(temperature=-1), r"temperature \(-1\) must be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_models(*both, **options)
    with pytest.raises(DataError, match="there are no prompts"):
        compare_models(folders["base"], folders["tuned"], [])
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        compare_models(folders["base"], folders["tuned"], tmp_path / "none.jsonl")


# The command


def run(*arguments, command=compare_command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    device = ["--device", "cpu"] if command is compare_command else []
    return command.run(parser.parse_args([*map(str, arguments), *device]))


@pytest.mark.parametrize("name", ["page.md", "page.html"])
def test_the_command_prints_and_writes_a_page(folders, prompts, tmp_path, capsys, monkeypatch, name, compared):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / name
    arguments = (
        folders["base"],
        folders["tuned"],
        "--prompts",
        prompts,
        "--temperature",
        0,
        "--max-new-tokens",
        8,
        "--out",
        out,
    )
    assert run(*arguments, "--answers") == 0
    printed = capsys.readouterr().out
    assert compared.to_text(100, references=True) in printed
    assert printed.endswith(f"wrote {out}\n")
    assert out.read_text(encoding="utf-8") == (compared.to_html() if name.endswith("html") else compared.to_markdown())
    with pytest.raises(ConfigError, match="exists; name another file, or replace it with --overwrite"):
        run(*arguments)
    assert run(*arguments, "--overwrite") == 0


def test_the_command_checks_its_arguments_before_it_works(tmp_path):
    for arguments, message in (
        (["--out", "page.pdf"], r"--out is 'page\.pdf'; name a \.md or \.html"),
        (["--engine", "lama.cpp"], "did you mean 'llama.cpp'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path / "a", tmp_path / "b", "--prompts", Path("p.txt"), *arguments)


def test_the_documentation_runs_as_it_stands(folders, ggufs, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    (home / ".lmstudio").mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setenv("PATH", "")
    shutil.copytree(folders["base"], "base")
    shutil.copy(ggufs["base"], "base.gguf")
    shutil.copy(ggufs["tuned"], "tutor.gguf")
    shutil.copy(prompts, "held_out.jsonl")
    Path("prompts.txt").write_text("En un lugar\nde la Mancha\n", encoding="utf-8")
    write_gguf("adapter.gguf", "llama", {"general.type": "adapter"}, [])
    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("llmforge ")]
    assert len(commands) == 8
    for _, command, *arguments in commands:
        short = ["--max-new-tokens", "4"] if command == "compare" else []
        modules = {"compare": compare_command, "deploy": deploy_command}
        assert run(*arguments, *short, command=modules[command]) == 0
    capsys.readouterr()
    assert (home / ".lmstudio" / "models" / "ana" / "tutor" / "tutor.gguf").is_file()
    for name in ("compare.html", "Modelfile", "out/adapter/Modelfile", "out/tutor/README.md"):
        assert Path(name).is_file(), name
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "docs/deploy.md", "exec"), {})
    assert Path("compare.md").read_text(encoding="utf-8").startswith("# base and tutor.gguf")
