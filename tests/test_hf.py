"""Hugging Face folders against transformers itself, in both directions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llmforge.convert import export_hf, load
from llmforge.errors import CheckpointError, ConvertError
from llmforge.formats.atomic import WriteError
from llmforge.models import GPT, GPTConfig
from llmforge.tokenizers import BPETokenizer, CharTokenizer

TEXT = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, ¡vivía «un» hidalgo! ¿Señor? 1605\n"
CHARS = CharTokenizer.from_text(TEXT)


def toy(**changes) -> GPT:
    """A model whose every parameter matters: random biases and gains, and weights large enough to tell logits apart."""
    config = GPTConfig(vocab_size=CHARS.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=48)
    model = GPT(config.replace(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def logits_of(model: nn.Module) -> torch.Tensor:
    idx = torch.arange(32).view(2, 16) % 30
    with torch.no_grad():
        out = model(idx)
    return out if isinstance(out, torch.Tensor) else out.logits


def model_of(folder) -> GPT:
    return load(folder)[0]


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_from_an_exported_folder(tmp_path, bias, tied, activation):
    model = toy(bias=bias, tie_word_embeddings=tied, activation_function=activation)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    report = export_hf(model, CHARS, tmp_path / "hf")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or mismatched key
    torch.testing.assert_close(logits_of(theirs.eval()), logits_of(model), atol=1e-5, rtol=0)  # order of float sums
    assert ("lm_head.weight" in load_file(tmp_path / "hf" / "model.safetensors")) == (not tied)
    assert report.tensors == {"float32": 2 + 2 * 12 + 2 + (not tied)}
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())
    # Back again: the same model to the bit.
    back, tokenizer = load(tmp_path / "hf")
    assert torch.equal(logits_of(back), logits_of(model))
    assert all(p.is_contiguous() for p in back.parameters())
    assert isinstance(tokenizer, CharTokenizer)
    assert back.config.replace(bias=bias) == model.config
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())  # never edited
    # Negative control: a single changed weight shows.
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.weight[3, 5] += 0.5
    assert (logits_of(theirs) - logits_of(model)).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_of_transformers_is_read_back(tmp_path, tied, shard):
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=48, n_layer=2, n_head=2, tie_word_embeddings=tied)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    model = model_of(tmp_path)
    assert not model.training
    torch.testing.assert_close(logits_of(model), logits_of(theirs), atol=1e-5, rtol=0)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[3, 5] += 0.5
    assert (logits_of(model) - logits_of(theirs)).abs().max() > 1e-4


def test_the_published_gpt2_layout_is_read(tmp_path):
    """Names without `transformer.`, with the causal masks as buffers: as openai-community/gpt2 has them."""
    model = toy()
    export_hf(model, None, tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(model_of(tmp_path)), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_the_type_asked_for(tmp_path, dtype):
    model = toy()
    export_hf(model, CHARS, tmp_path, dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    back, _ = load(tmp_path)
    for name, p in back.state_dict().items():
        assert p.dtype == torch.float32
        assert torch.equal(p, model.state_dict()[name].to(dtype).float())
    assert load(tmp_path, dtype=dtype)[0].lm_head.weight.dtype == dtype


def test_shards_are_what_transformers_reads(tmp_path):
    model = toy()
    export_hf(model, CHARS, tmp_path, max_shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(model), atol=1e-5, rtol=0)
    assert torch.equal(logits_of(model_of(tmp_path)), logits_of(model))


@pytest.mark.parametrize("tokenizer", [CHARS, BPETokenizer.from_texts([TEXT * 3], vocab_size=280)], ids=["char", "bpe"])
def test_tokenizer_and_settings_reach_transformers(tmp_path, tokenizer):
    model = toy(vocab_size=tokenizer.vocab_size, dropout=0.2)
    export_hf(model, tokenizer, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == tokenizer.eos_token_id
    values = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert values["n_ctx"] == 16  # llama.cpp's own converter needs it
    assert (values["resid_pdrop"], values["embd_pdrop"], values["attn_pdrop"]) == (0.2, 0.2, 0.2)
    assert values["bos_token_id"] == values["eos_token_id"] == tokenizer.eos_token_id
    known = {*GPT2Config().to_dict(), "n_ctx", "torch_dtype"}
    assert set(values) <= known
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = written.generate(torch.tensor([tokenizer.encode("En")]), max_new_tokens=4, do_sample=False)
    assert len(ids[0]) <= len(tokenizer.encode("En")) + 4
    assert "AutoModelForCausalLM" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_vocabulary_without_end_of_text_gets_a_row_that_changes_nothing(tmp_path):
    for tied in (True, False):
        model = toy(vocab_size=CHARS.vocab_size - 1, bias=False, tie_word_embeddings=tied)  # as nanoGPT trains it
        report = export_hf(model, CHARS, tmp_path, overwrite=True)
        assert "a row for <|endoftext|>" in report.notes[0]
        logits = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
        torch.testing.assert_close(logits[..., :-1], logits_of(model), atol=1e-4, rtol=0)
        assert logits.softmax(-1)[..., -1].max() < 1e-20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (CHARS.vocab_size - 2, r"the model has 34 tokens and the tokenizer 36"),
        (
            CHARS.vocab_size + 128,
            r"the model has 164 tokens and the tokenizer 36; take the tokenizer that the model was",
        ),
    ],
)
def test_another_tokenizers_model_is_refused(tmp_path, rows, message):
    assert CHARS.vocab_size == 36
    with pytest.raises(ConvertError, match=message):
        export_hf(toy(vocab_size=rows), CHARS, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_no_row_can_be_added_to_a_vocabulary_wider_than_the_model(tmp_path):
    with pytest.raises(ConvertError, match=r"vocab_size \(35\) < n_embd \(32\)"):
        export_hf(toy(vocab_size=35, n_embd=32), CHARS, tmp_path / "hf")


def untied_by_hand(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.register_buffer("scale", torch.ones(1)), "not a plain GPT of its config; unexpected: scale"),
        (lambda m: delattr(m.transformer.ln_f, "bias"), r"missing: transformer\.ln_f\.bias"),
        (
            lambda m: setattr(m.transformer.ln_f, "weight", nn.Parameter(torch.ones(7))),
            r"of another shape: transformer\.ln_f\.weight is \(7,\), must be \(48,\)",
        ),
        (untied_by_hand, r"lm_head\.weight differs from transformer\.wte\.weight, but the config ties them"),
        (lambda m: m.lm_head.weight.data[0].fill_(torch.nan), r"transformer\.wte\.weight holds NaN or infinity"),
        (lambda m: m.transformer.ln_f.bias.data.fill_(-torch.inf), r"transformer\.ln_f\.bias holds NaN or infinity"),
    ],
)
def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path, change, message):
    model = toy()
    change(model)
    with pytest.raises(ConvertError, match=message):
        export_hf(model, CHARS, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_module_of_another_kind_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(
        ConvertError, match=r"Linear is no model that other programs know \(BitNet, GPT, Llama\); .*load its state_dict"
    ):
        export_hf(nn.Linear(2, 2), None, tmp_path / "hf")


def test_a_compiled_model_is_exported_like_any_other(tmp_path):
    model = toy()
    export_hf(torch.compile(model), CHARS, tmp_path)
    assert torch.equal(logits_of(model_of(tmp_path)), logits_of(model))


def test_a_value_too_large_for_float16_is_named(tmp_path):
    model = toy()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(ConvertError, match=r"h\.0\.mlp\.c_fc\.weight has values too large for float16"):
        export_hf(model, CHARS, tmp_path / "hf", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConvertError, match=r"dtype \(torch\.int8\) must be one of torch\.float32"):
        export_hf(model, CHARS, tmp_path / "hf", dtype=torch.int8)


def test_only_a_hugging_face_folder_is_overwritten(tmp_path):
    export_hf(toy(), CHARS, tmp_path / "hf")
    with pytest.raises(WriteError, match="exists and is not empty"):
        export_hf(toy(), CHARS, tmp_path / "hf")
    export_hf(toy(), CHARS, tmp_path / "hf", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConvertError, match="home is not a Hugging Face folder, so it is not replaced"):
        export_hf(toy(), CHARS, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(scale_attn_by_inverse_layer_idx=True), "sets scale_attn_by_inverse_layer_idx to True, .* must be False"),
        (dict(reorder_and_upcast_attn=True), "sets reorder_and_upcast_attn to True"),
        (dict(scale_attn_weights=False), "sets scale_attn_weights to False"),
        (dict(add_cross_attention=True), "sets add_cross_attention to True"),
        (dict(layer_norm_epsilon=1e-6), "sets layer_norm_epsilon to 1e-06, .* it must be 1e-05"),
        (dict(n_inner=100), r"n_inner \(100\) must be 4 \* n_embd \(192\)"),
        (
            dict(activation_function="swish"),
            "activation_function must be one of 'gelu_new', 'gelu', 'relu', got 'swish'",
        ),
        (dict(quantization_config={"bits": 4}), r"sets quantization_config to {'bits': 4}"),
        (dict(pruned_heads={"0": [1]}), "sets pruned_heads to"),
        (dict(n_embd="wide"), "n_embd must be a whole number, got 'wide'"),
        (dict(n_head=5), r"n_embd \(48\) must be divisible by n_head \(5\)"),
        (dict(model_type="mamba"), "a model of type 'mamba'; supported: gpt2"),
        (dict(model_type=None), "a model of type None; supported: gpt2"),
    ],
)
def test_a_setting_that_gpt_does_not_have_is_refused(tmp_path, setting, message):
    export_hf(toy(), CHARS, tmp_path)
    edit_config(tmp_path, **setting)
    with pytest.raises(ConvertError, match=message):
        model_of(tmp_path)


def test_settings_of_the_same_meaning_are_read(tmp_path):
    model = toy()
    export_hf(model, CHARS, tmp_path)
    edit_config(tmp_path, n_inner=192, activation_function="gelu_pytorch_tanh", add_cross_attention=None)
    assert torch.equal(logits_of(model_of(tmp_path)), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sliding_window=512, jitter=0.1), "not known here and have no effect: jitter, sliding_window"),
        (dict(embd_pdrop=0.3), "GPT has one dropout; of .*'embd_pdrop': 0.3"),
    ],
)
def test_a_setting_without_effect_is_named_in_a_warning(tmp_path, settings, message):
    export_hf(toy(), CHARS, tmp_path)
    edit_config(tmp_path, **settings)
    with pytest.warns(UserWarning, match=message):
        model_of(tmp_path)


def test_tensors_that_do_not_fit_are_listed_apart(tmp_path):
    export_hf(toy(tie_word_embeddings=False), CHARS, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.h.0.adapter"] = torch.ones(2)
    tensors["transformer.wpe.weight"] = torch.ones(8, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    expected = (
        r"missing: transformer\.h\.1\.ln_2\.bias; unexpected: transformer\.h\.0\.adapter; "
        r"of another shape: transformer\.wpe\.weight is \(8, 48\), must be \(16, 48\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        model_of(tmp_path)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    export_hf(toy(), CHARS, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["wpe.weight"] = torch.ones(16, 48)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors for transformer\.wpe\.weight"):
        model_of(tmp_path)


def test_integer_weights_are_not_taken_for_floats(tmp_path):
    export_hf(toy(), CHARS, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.ones(16, 48, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    message = rf"{tmp_path} does not fit its config: transformer\.wpe\.weight is torch\.int8, not floats"
    with pytest.raises(CheckpointError, match=message):
        model_of(tmp_path)
    with pytest.raises(CheckpointError, match=message):  # nor on the way from file to file
        export_hf(tmp_path, None, tmp_path / "out")


def test_an_impossible_size_ends_in_an_error_at_once(tmp_path):
    export_hf(toy(), CHARS, tmp_path)
    edit_config(tmp_path, n_layer=10**9)
    with pytest.raises(CheckpointError, match="has 28 tensors, too few for 1000000000 layers"):
        model_of(tmp_path)
    edit_config(tmp_path, n_layer=2, vocab_size=2**62)
    with pytest.raises(CheckpointError, match="has sizes that no model can have"):
        model_of(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
    export_hf(toy(), CHARS, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin only, a pickle .*save_pretrained"):
        model_of(tmp_path)
