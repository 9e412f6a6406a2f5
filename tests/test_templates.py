"""The templates that have names: against transformers, cases written by hand, and in every file that a tokenizer goes into."""

import json

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmforge.deploy.chat_form import ChatForm, FileChat, chat_form
from llmforge.errors import ConfigError, DataError
from llmforge.tokenizers import (
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    WordPieceTokenizer,
    chat_ids,
    load_tokenizer,
    render_chat,
    tokenizer_from_gguf,
)
from llmforge.tokenizers.base import BYTE, CONTROL, NORMAL, UNKNOWN
from llmforge.tokenizers.templates import (
    TEMPLATES,
    find_template,
    has_input,
    joined_input,
    missing_markers,
    template_name,
    with_chat_template,
)

SPANISH = "En un lugar de la Mancha, ¿qué «gigantes»? —¡Señor! ### Instruction: respuesta\n" * 9
NAMES = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]

CHATS = {
    "one": [{"role": "user", "content": "¿Qué es un hidalgo?"}],
    "input": [{"role": "user", "content": "Traduce.", "input": "año 🙂"}],
    "answered": [{"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": " Nada.\n"}],
    "system": [
        {"role": "system", "content": "Sé <breve>."},
        {"role": "user", "content": "¿Qué?"},
        {"role": "assistant", "content": "Nada."},
        {"role": "user", "content": "¿Y el </s>?", "input": "mañana"},
        {"role": "assistant", "content": "Tampoco."},
        {"role": "user", "content": "Adiós"},
    ],
}


def bpe_with_markers(folder, *, bos=False):
    """A byte-level BPE with the special tokens of all templates, saved in a folder; texts begin with <s> if `bos`."""
    BPETokenizer.from_texts([SPANISH], vocab_size=300).save(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    first = 1 + max(*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    content["added_tokens"] += [{"id": first + i, "content": name, **flags} for i, name in enumerate(NAMES)]
    if bos:
        special, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ids = {"<s>": {"id": "<s>", "ids": [first + NAMES.index("<s>")], "tokens": ["<s>"]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, text],
            "pair": [special, text, text],
            "special_tokens": ids,
        }
    path.write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def sentencepiece(*, add_bos=True):
    """A vocabulary of Llama 2's kind: three special tokens, bytes, letters."""
    letters = ["▁", *sorted(set(SPANISH) - set(" \n"))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(letters)]
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": add_bos}
    scores = [0.0] * 259 + [-float(i) for i in range(len(letters))]
    return SentencePieceTokenizer.from_scores(tokens, scores, types, unk_id=0, add_space_prefix=True, config=config)


def gpt2_like():
    """tiktoken with GPT-2's pattern and a vocabulary of single bytes."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = {bytes([byte]): byte for byte in range(256)}
    return TiktokenTokenizer(
        tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    )


@pytest.fixture(scope="module", params=[False, True], ids=["no_bos", "bos"])
def bpe(request, tmp_path_factory):
    return bpe_with_markers(tmp_path_factory.mktemp("bpe"), bos=request.param)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_named_templates_render_as_in_transformers(bpe, tmp_path, name, chat, add_generation_prompt):
    tokenizer = with_chat_template(bpe, name)
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    options = {"add_generation_prompt": add_generation_prompt}
    text = render_chat(tokenizer, CHATS[chat], **options)
    assert text == reference.apply_chat_template(CHATS[chat], tokenize=False, **options)
    ids = chat_ids(tokenizer, CHATS[chat], **options)
    assert ids == reference.apply_chat_template(CHATS[chat], return_dict=False, **options)
    assert ids.count(tokenizer.bos_token_id) == (
        tokenizer.add_bos or name == "llama3"
    )  # once, where texts begin with it
    assert tokenizer.decode(ids) == text


BELOW = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(
    ("name", "chat", "expected"),
    [
        ("alpaca", "one", f"{BELOW}. {WRITE}### Instruction:\n¿Qué es un hidalgo?\n\n### Response:\n"),
        (
            "alpaca",
            "input",
            f"{BELOW}, paired with an input that provides further context. {WRITE}### Instruction:\nTraduce.\n\n### Input:\naño 🙂\n\n"
            "### Response:\n",
        ),
        (
            "alpaca",
            "system",
            "Sé <breve>.\n\n### Instruction:\n¿Qué?\n\n### Response:\nNada.</s>\n\n### Instruction:\n¿Y el </s>?\n\n### Input:\nmañana\n\n"
            "### Response:\nTampoco.</s>\n\n### Instruction:\nAdiós\n\n### Response:\n",
        ),
        ("chatml", "one", "<|im_start|>user\n¿Qué es un hidalgo?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3",
            "answered",
            "<s><|start_header_id|>user<|end_header_id|>\n\n¿Qué?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNada.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_named_templates_by_hand(tmp_path, name, chat, expected):
    tokenizer = with_chat_template(bpe_with_markers(tmp_path), name)
    assert render_chat(tokenizer, CHATS[chat]) == expected
    if name == "alpaca" and chat == "one":
        answered = [*CHATS[chat], {"role": "assistant", "content": "Yo."}]
        assert render_chat(tokenizer, answered, add_generation_prompt=False) == expected + "Yo.</s>"


def test_alpaca_refuses_roles_that_it_does_not_have(tmp_path):
    tokenizer = with_chat_template(CharTokenizer("ab"), "alpaca")
    for messages, what in (
        ([{"role": "tool", "content": "a"}], "message 0 has the role tool"),
        ([*CHATS["one"], {"role": "system", "content": "a"}], "message 1 has the role system"),
    ):
        with pytest.raises(DataError, match=what):
            render_chat(tokenizer, messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_can_express_the_named_templates(bpe, name):
    """Another reader, which looks at nothing but what is rendered."""
    metadata = with_chat_template(bpe, name).gguf_vocabulary().metadata()
    form = chat_form(FileChat.from_metadata(metadata))
    assert isinstance(form, ChatForm), form
    assert form.end == {"alpaca": "</s>", "chatml": "<|im_end|>\n", "llama3": "<|eot_id|>"}[name]
    assert not form.user.startswith("<s>") or not bpe.add_bos


TOKENIZERS = {
    "char": lambda folder: CharTokenizer(SPANISH),
    "bpe": lambda folder: BPETokenizer.from_texts([SPANISH], vocab_size=280),
    "tiktoken": lambda folder: gpt2_like(),
    "sentencepiece": lambda folder: sentencepiece(),
    "wordpiece": lambda folder: WordPieceTokenizer.from_texts([SPANISH], vocab_size=90),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request, tmp_path):
    return TOKENIZERS[request.param](tmp_path)


def test_a_template_goes_with_the_tokenizer_into_its_files(tokenizer, tmp_path):
    assert tokenizer.chat_template is None
    tuned = with_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template is None  # a copy
    assert template_name(tuned) == "chatml"
    assert tuned.encode("En un lugar") == tokenizer.encode("En un lugar")
    tuned.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tuned.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tuned.chat_template
    if not isinstance(tokenizer, WordPieceTokenizer):
        metadata = tuned.gguf_vocabulary().metadata()
        assert metadata["tokenizer.chat_template"] == tuned.chat_template
        assert tokenizer_from_gguf(metadata, where="a file").chat_template == tuned.chat_template
        assert tokenizer.gguf_vocabulary().metadata()["tokenizer.chat_template"] != tuned.chat_template
    again = with_chat_template(tuned, "{{ messages[0]['content'] }}")
    again.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "{{ messages[0]['content'] }}"
    again.with_chat_template(None).save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None


def test_the_tokenizers_own_template_comes_first(tokenizer):
    assert template_name(with_chat_template(tokenizer)) == "alpaca"
    own = tokenizer.with_chat_template("{{ 1 }}")
    assert with_chat_template(own) is own
    assert with_chat_template(own, "tokenizer_default") is own
    assert template_name(own) is None


def test_templates_begin_with_bos_where_texts_do(bpe):
    for name in TEMPLATES:
        assert with_chat_template(bpe, name).chat_template.startswith("{{ bos_token }}") == (
            bpe.add_bos or name == "llama3"
        )


def test_an_unknown_template_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown chat template 'lama3'; did you mean 'llama3'"):
        with_chat_template(CharTokenizer("ab"), "lama3")
    with pytest.raises(ConfigError, match="known: alpaca, chatml, llama3"):
        find_template("vicuna")
    with pytest.raises(DataError, match="the chat template is faulty in line 1"):
        with_chat_template(CharTokenizer("ab"), "{% for %}")


def test_markers_that_are_no_tokens_are_named(bpe, tokenizer):
    assert missing_markers(with_chat_template(bpe, "llama3")) == []
    missing = missing_markers(with_chat_template(tokenizer, "chatml"))
    assert missing == ["<|im_start|>", "<|im_end|>"]
    assert missing_markers(with_chat_template(tokenizer, "alpaca")) == []


def test_an_input_has_its_place_in_alpaca_and_is_joined_elsewhere(bpe):
    message = CHATS["input"][0]
    assert [name for name in TEMPLATES if has_input(with_chat_template(bpe, name))] == ["alpaca"]
    assert not has_input(bpe)
    assert joined_input(message) == {"role": "user", "content": "Traduce.\n\naño 🙂"}
    assert joined_input(CHATS["one"][0]) == CHATS["one"][0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_batch_of_texts_has_the_ids_of_each(name, tmp_path_factory):
    tokenizer = TOKENIZERS[name](tmp_path_factory.mktemp("batch"))
    eos = tokenizer.decode([tokenizer.eos_token_id])

    @given(texts=st.lists(st.lists(st.sampled_from([*sorted(set(SPANISH)), eos]), max_size=9).map("".join), max_size=5))
    def law(texts):
        if name == "char":
            texts = [text.replace(eos, "") for text in texts]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
        special = tokenizer.encode_batch(texts, special=True)
        assert [ids.tolist() for ids in special] == [tokenizer.encode_special(text) for text in texts]

    law()


@pytest.mark.parametrize("special", [False, True])
def test_no_space_is_put_before_a_text_that_goes_on_another(special):
    tokenizer = sentencepiece()
    space, e, n = (tokenizer.encode("E")[0], tokenizer.encode("E")[1], tokenizer.encode("n")[1])
    assert tokenizer.encode("En") == [space, e, n]
    texts = ["En", " En", "", "\n", "En</s>En", "</s>En"]
    after = [ids.tolist() for ids in tokenizer.encode_batch(texts, special=special, after=True)]
    end = [2, space, e, n] if special else tokenizer.encode("</s>En")[1:]
    assert after == [[e, n], [space, e, n], [], [3 + 10], [e, n, *end], end]
    for text, ids in zip(texts, after, strict=True):
        whole = tokenizer.encode_special("n" + text) if special else tokenizer.encode("n" + text)
        assert [space, n, *ids] == whole  # in a vocabulary without merges
