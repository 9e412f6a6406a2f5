"""Training with the weights of the exported file: the file decodes to what the forward pass used, to the bit, and training pays off."""

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import TEXT, same, toy_data, toy_model, toy_trainer, weights

from llmforge.convert import collect_imatrix, export_gguf, export_hf, load
from llmforge.convert.quantize_aware import quantize_aware_
from llmforge.deploy import verify_gguf
from llmforge.errors import ConfigError, ConvertError
from llmforge.generation import generate
from llmforge.models import GPT, GPTConfig, Llama, LlamaConfig
from llmforge.nn import rounded
from llmforge.nn.rounded import RoundedEmbedding, RoundedLinear, float_weights_, round_weights_, rounded_weights
from llmforge.quant.ggml import round_to
from llmforge.tokenizers import BPETokenizer, CharTokenizer
from llmforge.training import next_token_loss
from llmforge.training.checkpoint import load_weights_

BPE = BPETokenizer.from_texts([TEXT], vocab_size=300, pre_tokenizer="llama-bpe")
FILE_TYPES = ["F16", "BF16", "Q8_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q6_K", "IQ4_XS", "TQ2_0"]

MODELS = {
    "gpt": (GPT, dict(bias=False)),
    "gpt untied": (GPT, dict(tie_word_embeddings=False)),
    "llama": (Llama, {}),
    "llama tied": (Llama, dict(tie_word_embeddings=True)),
    "qwen2": (Llama, dict(qkv_bias=True, tie_word_embeddings=True)),
    "qwen3": (Llama, dict(qk_norm=True, head_dim=64)),
    "mistral": (Llama, dict(sliding_window=256)),
}


def toy(case: str = "llama", width: int = 256, vocab_size: int = BPE.vocab_size) -> GPT | Llama:
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    family, changes = MODELS[case]
    if family is GPT:
        config = GPTConfig(vocab_size=vocab_size, block_size=256, n_layer=2, n_head=4, n_embd=width, **changes)
    else:
        sizes = dict(hidden_size=width, intermediate_size=width, num_hidden_layers=2, max_position_embeddings=256)
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
        config = LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **changes)
    model = family(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def matrices(model) -> dict[str, torch.Tensor]:
    """What each layer multiplies with or looks up, under its own name, shared ones under both."""
    return {
        f"{name}.weight": module.rounded_weight().detach() if isinstance(module, rounded._Rounded) else module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def text_ids(count: int = 64) -> torch.Tensor:
    return torch.tensor([BPE.encode(TEXT)[:count]])


def verified(path, model):
    return verify_gguf(path, model, BPE, text=TEXT, max_tokens=256, greedy_tokens=8)


# --- The law: the matrices of the forward pass are those of the file


def assert_file_is_what_was_trained(model, path, tokenizer=BPE, **types):
    before = copy.deepcopy(model.state_dict())
    quantize_aware_(model, **types)
    export_gguf(model, tokenizer, path, **types)
    decoded, _ = load(path)
    used, stored = matrices(model), matrices(decoded)
    assert used.keys() == stored.keys()
    for name in used:
        rows = len(used[name])
        assert torch.equal(used[name], stored[name][:rows]), name
        assert (
            not rounded_weights(model) or name == "transformer.wpe.weight" or not torch.equal(used[name], before[name])
        )
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return decoded


@pytest.mark.parametrize(
    ("case", "file_type"), [*((case, "Q4_0") for case in MODELS), ("gpt", "Q4_K_M"), ("llama", "Q4_K_M")]
)
def test_the_file_decodes_to_what_the_forward_pass_used(tmp_path, case, file_type):
    model = toy(case)
    decoded = assert_file_is_what_was_trained(model, tmp_path / "x.gguf", file_type=file_type)
    with torch.no_grad():
        assert torch.equal(model(text_ids()), decoded(text_ids()))


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_file_decodes_to_what_the_forward_pass_used_in_every_type(tmp_path, file_type):
    assert_file_is_what_was_trained(toy("llama tied"), tmp_path / "x.gguf", file_type=file_type)


@pytest.mark.parametrize("case", ["gpt", "llama"])
def test_rows_that_do_not_fit_train_with_the_type_they_fall_back_to(tmp_path, case):
    model = toy(case, width=96)
    assert_file_is_what_was_trained(model, tmp_path / "x.gguf", file_type="Q4_K_M")
    # Blocks of 256 divide no row: Q5_0 for Q4_K, Q8_0 for Q6_K, and Q8_0 for the output.
    assert set(rounded_weights(model).values()) == {"Q5_0", "Q8_0"}


@pytest.mark.parametrize("case", ["qwen2", "gpt untied"])
def test_types_of_tensors_can_be_chosen(tmp_path, case):
    chosen = {"attn_(v|qkv)": "Q8_0", r"blk\.1\.ffn_down": "Q3_K", "token_embd": "F16"}
    model = toy(case)
    assert_file_is_what_was_trained(model, tmp_path / "x.gguf", file_type="Q4_0", tensor_types=chosen)
    given = rounded_weights(model)
    down = "model.layers.{}.mlp.down_proj.weight" if case == "qwen2" else "transformer.h.{}.mlp.c_proj.weight"
    assert (given[down.format(0)], given[down.format(1)]) == ("Q4_0", "Q3_K")
    assert next(iter(given.values())) == "F16"


def test_a_row_for_the_end_of_the_text_leaves_the_other_rows(tmp_path):
    tokenizer = CharTokenizer.from_text(TEXT)
    rows = tokenizer.vocab_size - 1
    model = toy("gpt", width=64, vocab_size=rows)  # trained without <|endoftext|>
    decoded = assert_file_is_what_was_trained(model, tmp_path / "x.gguf", tokenizer, file_type="Q4_0")
    assert decoded.config.vocab_size == rows + 1


def test_types_are_named_by_the_models_names_and_only_matrices_round():
    model = toy("llama tied")
    types = quantize_aware_(model, "Q4_K_M")
    assert types == rounded_weights(model)
    assert types["model.embed_tokens.weight"] == "Q6_K"  # as llama.cpp's output
    assert types["model.layers.1.self_attn.q_proj.weight"] == "Q4_K"
    assert types.keys() == {name for name, p in model.named_parameters() if p.ndim == 2}
    gpt = toy("gpt")
    assert "transformer.wpe.weight" not in quantize_aware_(gpt, "F16")  # positions are F32 in every file
    assert quantize_aware_(gpt, "F32") == {}


# --- llama.cpp


@pytest.mark.parametrize(("case", "file_type"), [("llama", "Q4_K_M"), ("gpt", "Q4_0")])
def test_llama_cpp_computes_what_was_trained(tmp_path, case, file_type):
    model = toy(case)
    plain = copy.deepcopy(model)
    quantize_aware_(model, file_type)
    export_gguf(model, BPE, tmp_path / "x.gguf", file_type=file_type)
    decoded, _ = load(tmp_path / "x.gguf")
    export_gguf(decoded, BPE, tmp_path / "f32.gguf", file_type="F32")  # the file's weights as they are
    # GELU goes through a float16 table there.
    assert verified(tmp_path / "f32.gguf", model).kl_mean < (1e-6 if case == "gpt" else 1e-9)
    # With quantized weights llama.cpp rounds what enters each matrix to 8 bits as well, and that is all that is left.
    report, before = verified(tmp_path / "x.gguf", model), verified(tmp_path / "x.gguf", plain)
    assert report.passed
    assert abs(report.kl_of_rounding) < 1e-12
    assert report.kl_mean < 1e-3
    assert before.kl_of_rounding > 20 * report.kl_mean


# --- Gradients


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, count = next_token_loss(model, batch)
    (loss / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", ["gpt", "llama tied", "llama"])
def test_gradients_are_those_of_a_model_with_the_rounded_weights(case):
    model = toy(case)
    replaced = copy.deepcopy(model)
    types = quantize_aware_(model, "Q4_0")
    with torch.no_grad():
        for name, p in replaced.named_parameters():
            if name in types:
                p.copy_(round_to(p, types[name]))
    batch = (text_ids(64), text_ids(65)[:, 1:])
    left, right = gradients(model, batch), gradients(replaced, batch)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(grad.abs().sum() > 0 for grad in left.values())


def test_gradients_and_logits_under_autocast_are_those_of_the_rounded_weights():
    model = toy()
    types = quantize_aware_(model, "Q4_K_M")
    replaced = toy()
    with torch.no_grad():
        for name, p in replaced.named_parameters():
            p.copy_(round_to(p, types.get(name, "F32")))  # from the float32 weight, in float32
    batch = (text_ids(64), text_ids(65)[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        left, right = gradients(model, batch), gradients(replaced, batch)
        assert model(batch[0]).dtype == torch.bfloat16
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_model_in_bfloat16_rounds_its_weights():
    model = toy().bfloat16()
    quantize_aware_(model, "Q8_0")
    used = model.lm_head.rounded_weight()
    assert used.dtype == torch.bfloat16
    assert torch.equal(used, round_to(model.lm_head.weight.float(), "Q8_0").bfloat16())


# --- The rounded matrix is computed once for each weight


@pytest.fixture
def calls(monkeypatch):
    """Types that were rounded to, one entry for each call."""
    made = []

    def counted(values, type_name):
        made.append(type_name)
        return round_to(values, type_name)

    monkeypatch.setattr(rounded, "round_to", counted)
    return made


def test_each_matrix_is_rounded_once_a_step(calls):
    model = toy_model(n_embd=32)
    count = len(quantize_aware_(model, "Q8_0"))
    assert count == 9  # the tied embedding and output is one
    trainer = toy_trainer(model=model, grad_accum_steps=3)
    for step in range(1, 4):
        next(trainer)  # with AdamW's fused kernel, which counts no version
        assert len(calls) == step * count
    trainer.evaluate()
    assert len(calls) == 4 * count  # of the last update, which the next step uses too
    trainer.evaluate()
    next(trainer)
    generate(model, torch.zeros(1, 4, dtype=torch.long), max_new_tokens=8, seed=0)
    assert len(calls) == 5 * count


@pytest.mark.parametrize("options", [dict(fused=True), dict(foreach=True), dict(foreach=False)])
def test_every_kind_of_optimizer_step_is_seen(options):
    model = nn.Sequential(nn.Linear(32, 4))
    round_weights_(model, {"0.weight": "Q8_0"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(3):
        model(torch.ones(1, 32)).sum().backward()
        optimizer.step()
        assert torch.equal(model[0].rounded_weight(), round_to(model[0].weight, "Q8_0"))


def numpy_write(weight, values):
    weight.detach().numpy()[:] = values.numpy()


def data_assign(weight, values):
    weight.data = values


def load_state(weight, values):
    layer = nn.Linear(32, 4)
    layer.weight = weight
    layer.load_state_dict({"weight": values, "bias": torch.zeros(4)})


WRITES = {
    "copy_": lambda weight, values: weight.detach().copy_(values),
    "data.copy_": lambda weight, values: weight.data.copy_(values),
    "data =": data_assign,
    "numpy": numpy_write,
    "load_state_dict": load_state,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_way_to_change_a_weight_is_seen(write):
    model = nn.Sequential(nn.Linear(32, 4))
    round_weights_(model, {"0.weight": "Q4_0"})
    old = model[0].rounded_weight().clone()
    new = model[0].weight.detach()[torch.tensor([3, 0, 1, 2])].clone()  # as many bits of each kind
    new[0, 0] += 1e-3
    write(model[0].weight, new)
    assert not torch.equal(model[0].rounded_weight(), old)
    assert torch.equal(model[0].rounded_weight(), round_to(new, "Q4_0"))


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_in_another_order_are_seen(in_place):
    layer = nn.Linear(32, 4)
    round_weights_(layer, {"weight": "Q4_0"})
    layer.rounded_weight()
    reordered = layer.weight.detach()[torch.tensor([3, 0, 1, 2])]
    if in_place:
        layer.weight.detach().copy_(reordered)
    else:
        layer.weight.data = reordered
    assert torch.equal(layer.rounded_weight(), round_to(reordered, "Q4_0"))


@pytest.mark.parametrize("shape", [(3, 33), (4, 32)])
def test_weights_at_odd_places_in_memory_are_seen(shape):
    layer = nn.Linear(shape[1], shape[0])
    everything = torch.randn(shape[0] * shape[1] + 1)
    layer.weight.data = everything[1:].view(shape)  # 4 bytes beyond a multiple of 8
    round_weights_(layer, {"weight": "F16"})
    for _ in range(2):
        assert torch.equal(layer.rounded_weight(), layer.weight.half().float())
        everything.add_(0.1)


def test_a_weight_of_columns_is_seen():
    layer = nn.Linear(32, 4)
    layer.weight.data = torch.randn(32, 4).t()
    round_weights_(layer, {"weight": "Q8_0"})
    for _ in range(2):
        assert torch.equal(layer.rounded_weight(), round_to(layer.weight, "Q8_0"))
        layer.weight.data.mul_(2)


def test_the_device_and_the_dtype_are_followed():
    model = toy()
    quantize_aware_(model, "Q4_0")
    model(text_ids())
    model.double()
    assert model(text_ids()).dtype == torch.float64
    model.float().to("meta")
    assert model.lm_head.weight.is_meta


def test_a_weight_that_diverged_is_not_hidden():
    model = nn.Sequential(nn.Linear(256, 2, bias=False))
    for type_name in ("Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "Q8_0"):
        round_weights_(model, {"0.weight": type_name})
        with torch.no_grad():
            model[0].weight.fill_(1)[0, 3] = torch.nan
        assert model(torch.ones(1, 256))[0, 0].isnan()


# --- Trainer, checkpoints, copies


def trained(out_dir=None, steps=6, file_type="Q4_0", **settings):
    model = toy_model(n_embd=32)
    quantize_aware_(model, file_type)
    trainer = toy_trainer(out_dir, model=model, max_steps=8, save_every_steps=None, **settings)
    for _ in range(steps):
        next(trainer)
    return trainer


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = trained(steps=8)
    first = trained(tmp_path, steps=3)
    first.evaluate()
    first.save()
    second = trained(tmp_path, steps=0)
    second.model(torch.zeros(1, 4, dtype=torch.long))  # rounds what is about to be replaced
    assert second.resume()
    list(second)
    assert second.step == 8
    assert same(weights(second.model), weights(whole.model))
    assert second.evaluate() == whole.evaluate()
    assert not same(weights(whole.model), weights(trained(steps=8, file_type="F32").model))


def test_a_checkpoint_is_that_of_a_float_model(tmp_path):
    trainer = trained(tmp_path / "run")
    folder = trainer.save()
    model, tokenizer = load(folder)
    assert type(model.lm_head) is nn.Linear
    assert same(weights(model), weights(trainer.model))
    export_gguf(folder, tokenizer, tmp_path / "folder.gguf", file_type="Q4_0")
    export_gguf(trainer.model, tokenizer, tmp_path / "model.gguf", file_type="Q4_0", name="folder")
    assert (tmp_path / "folder.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    plain = toy_model(n_embd=32)
    load_weights_(plain, folder)
    plain.load_state_dict(trainer.model.state_dict())
    export_hf(trainer.model, tokenizer, tmp_path / "hf")
    assert same(weights(load(tmp_path / "hf")[0]), weights(trainer.model))


def test_state_dict_and_parameters_are_those_of_the_float_model():
    model, plain = toy("llama tied"), toy("llama tied")
    quantize_aware_(model, "Q4_0")
    model(text_ids())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not dict(model.named_buffers())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert type(model) is Llama


def test_a_copy_is_rounded_by_itself():
    model = toy("llama tied")
    quantize_aware_(model, "Q4_0")
    logits = model(text_ids())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(text_ids()), logits)
    assert twin.lm_head.rounding is twin.model.embed_tokens.rounding is not model.lm_head.rounding
    with torch.no_grad():
        twin.lm_head.weight.mul_(1.5)
    assert not torch.equal(twin(text_ids()), logits)
    assert torch.equal(model(text_ids()), logits)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert file.getbuffer().nbytes < 4.1 * model.num_params() + 100_000  # the rounded matrices are not in it
    assert torch.equal(torch.load(file, weights_only=False)(text_ids()), logits)


def test_nothing_is_kept_of_models_that_are_gone():
    gc.collect()
    before = len(rounded._roundings)
    model = toy()
    assert len(quantize_aware_(model, "Q4_0")) == len(rounded._roundings) - before
    del model
    gc.collect()
    assert len(rounded._roundings) == before


# --- Evaluation, generation, compilation


def test_tied_embedding_and_output_see_the_same_rounded_matrix():
    model = toy("llama tied")
    quantize_aware_(model, "Q4_0", tensor_types={"token_embd": "Q4_0"})
    expected = round_to(model.lm_head.weight, "Q4_0")
    assert torch.equal(model.model.embed_tokens(torch.arange(5)), expected[:5])
    assert torch.equal(model.lm_head(torch.eye(256)), expected.t())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("case", ["gpt", "llama"])
def test_the_kv_cache_changes_nothing(case):
    model = toy(case)
    plain = generate(model, text_ids(8), max_new_tokens=12, temperature=0.0)
    quantize_aware_(model, "Q2_K")
    cached = generate(model, text_ids(8), max_new_tokens=12, temperature=0.0)
    assert torch.equal(cached, generate(model, text_ids(8), max_new_tokens=12, temperature=0.0, use_cache=False))
    assert not torch.equal(cached, plain)


def test_training_goes_on_after_inference_mode():
    model = toy()
    quantize_aware_(model, "Q4_0")
    with torch.inference_mode():
        logits = model(text_ids())
    again = model(text_ids())
    assert torch.equal(again, logits)
    again.sum().backward()
    with torch.inference_mode():
        model.lm_head.weight.mul_(2)
        assert torch.equal(model(text_ids()), model(text_ids()))
        made_here = toy()
        quantize_aware_(made_here, "Q4_0")
        assert torch.equal(made_here(text_ids()), logits)


def test_a_compiled_model_follows_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 8))
    plain = copy.deepcopy(model)
    for module in (model, plain):
        round_weights_(module, {"0.weight": "Q8_0", "1.weight": "Q4_0"})
    model = torch.compile(model, fullgraph=True, backend="aot_eager")
    idx = torch.arange(8)
    for _ in range(3):
        for module in (model, plain):
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
            F.cross_entropy(module(idx), idx).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(model(idx), plain(idx))
        assert same(weights(model), weights(plain))
    float_weights_(model)
    float_weights_(plain)
    torch.testing.assert_close(model(idx), plain(idx))
    wrapped = torch.compile(toy())
    assert "lm_head.weight" in quantize_aware_(wrapped, "Q4_0")


# --- Undo, again, errors


def test_undoing_gives_the_float_model_back():
    model = toy("llama tied")
    plain = copy.deepcopy(model)
    names = list(quantize_aware_(model, "Q4_0"))
    assert not torch.equal(model(text_ids()), plain(text_ids()))
    assert sorted(float_weights_(model)) == sorted(names)
    assert torch.equal(model(text_ids()), plain(text_ids()))
    assert all(type(module) is type(twin) for module, twin in zip(model.modules(), plain.modules(), strict=True))
    assert all(
        vars(module).keys() == vars(twin).keys() for module, twin in zip(model.modules(), plain.modules(), strict=True)
    )
    assert float_weights_(model) == []


def test_another_file_type_replaces_the_first(tmp_path):
    model = toy()
    quantize_aware_(model, "Q2_K")
    model(text_ids())
    assert_file_is_what_was_trained(model, tmp_path / "x.gguf", file_type="Q8_0")
    assert set(rounded_weights(model).values()) == {"Q8_0"}
    assert quantize_aware_(model, "F32") == {}
    assert not any(isinstance(module, (RoundedLinear, RoundedEmbedding)) for module in model.modules())


def test_a_file_that_is_rounded_otherwise_than_the_training_is_noted(tmp_path):
    model, path = toy(), tmp_path / "m.gguf"
    assert not any("trains with" in note for note in export_gguf(model, BPE, path, file_type="Q4_K_M").notes)
    quantize_aware_(model, "Q4_K_M")
    assert not any("trains with" in note for note in export_gguf(model, BPE, path, file_type="Q4_K_M").notes)
    notes = export_gguf(model, BPE, path, file_type="Q8_0").notes
    assert any("trains with rounded weights, but the file rounds with another type: model.embed" in n for n in notes), (
        notes
    )
    importance = collect_imatrix(model, list(range(BPE.vocab_size)) * 2, chunk_tokens=32)
    notes = export_gguf(model, BPE, path, file_type="Q4_K_M", importance=importance).notes
    assert any("rounds with an importance matrix" in note for note in notes)


def test_what_cannot_be_rounded_is_refused_and_nothing_changed():
    model = toy()
    quantize_aware_(model, "Q4_0")
    before = rounded_weights(model)
    with pytest.raises(ConvertError, match=r"file_type \('Q4_1_K'\) must be one of F32, F16"):
        quantize_aware_(model, "Q4_1_K")
    with pytest.raises(ConvertError, match="no tensor's name contains 'attn_z'"):
        quantize_aware_(model, "Q4_0", tensor_types={"attn_z": "Q8_0"})
    with pytest.raises(ConvertError, match="tensor type 'Q9'"):
        quantize_aware_(model, "Q4_0", tensor_types={"attn_v": "Q9"})
    with pytest.raises(ConvertError, match="Sequential is no model that other programs know"):
        quantize_aware_(nn.Sequential(nn.Linear(32, 32)), "Q4_0")
    assert rounded_weights(model) == before


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"0.weight": "Q8_0", "4.weight": "Q4_0"}, "the model has no weight '4.weight'; its names are like 0.weight"),
        ({"0.weight": "Q9_0"}, r"type 'Q9_0' \(of 0.weight\) must be one of F32, F16"),
        ({"0.weight": "Q4_K"}, "0.weight has rows of 32 weights, but Q4_K has blocks of 256"),
        (
            {"1.weight": "Q8_0"},
            "1.weight is not the matrix of a plain nn.Linear or nn.Embedding alone but of LayerNorm",
        ),
        ({"0.bias": "Q8_0"}, "0.bias is not the matrix"),
        ({"2.weight": "Q8_0"}, "2.weight is not the matrix of a plain nn.Linear or nn.Embedding alone but of Bilinear"),
        ({"3.weight": "Q8_0"}, "3.weight is not the matrix"),
    ],
)
def test_round_weights_names_what_it_cannot_round(types, message):
    layers = [nn.Linear(32, 32), nn.LayerNorm(32), nn.Bilinear(32, 32, 2), nn.Embedding(4, 32, max_norm=1.0)]
    model = nn.Sequential(*layers)
    with pytest.raises(ConfigError, match=message):
        round_weights_(model, types)
    assert rounded_weights(model) == {}


# --- It pays


def test_training_with_the_rounding_makes_a_better_file_than_training_without():
    _, val_data = toy_data()

    def quantized_loss(quantize_aware: bool) -> float:
        model = toy_model(n_embd=32, dropout=0.0)
        for _ in toy_trainer(model=model, max_steps=60, lr=3e-2, warmup_steps=5):  # sharp: rounding costs something
            pass
        if quantize_aware:
            quantize_aware_(model, "Q2_K")  # rows of 32 fall back to Q4_0
        for _ in toy_trainer(model=model, max_steps=60, lr=3e-3, warmup_steps=5):
            pass
        quantize_aware_(model, "Q2_K")
        return toy_trainer(model=model, eval_batches=8).evaluate(val_data).loss

    assert quantized_loss(True) < quantized_loss(False)
