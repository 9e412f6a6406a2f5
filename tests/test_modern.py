"""Parts of the recipe of modern small models, each against its formula; the preset, and what can be exported of them."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import toy_model, toy_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmforge import (
    GPT,
    BitNetConfig,
    CharTokenizer,
    ConvertError,
    GPTConfig,
    Llama,
    LlamaConfig,
    TrainConfig,
    export_gguf,
    export_hf,
    generate,
    load,
    verify_gguf,
)
from llmforge.cli.main import main
from llmforge.cli.run_config import RunConfig
from llmforge.errors import ConfigError
from llmforge.formats.gguf import read_gguf_header
from llmforge.nn import SoftCappedLinear, SquaredReLU
from llmforge.training import chunked_next_token_loss, next_token_loss

TEXT = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.\n" * 20
CHARS = CharTokenizer.from_text(TEXT)
SHAPE = dict(vocab_size=CHARS.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=2, max_position_embeddings=16)
IDX = torch.arange(32).view(2, 16) * 7 % CHARS.vocab_size


def llama(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig.from_dict({**SHAPE, **changes})).eval()


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(torch.randn_like(p) * 0.1)
    return model


# --- The parts


@pytest.mark.parametrize("bias", [False, True])
def test_squared_relu_is_its_formula(bias):
    layer, x = shaken(SquaredReLU(6, 10, bias=bias)), torch.randn(2, 3, 6)
    p = dict(layer.named_parameters())
    assert p.keys() == {f"{n}_proj.{kind}" for n in ("up", "down") for kind in ("weight", "bias")[: 1 + bias]}
    up = x @ p["up_proj.weight"].T + p.get("up_proj.bias", torch.zeros(10))
    expected = torch.where(up > 0, up**2, 0) @ p["down_proj.weight"].T + p.get("down_proj.bias", torch.zeros(6))
    torch.testing.assert_close(layer(x), expected)


def test_no_gate_means_two_matrices():
    gated, plain = llama(), llama(hidden_act="relu2")
    assert gated.num_params() - plain.num_params() == 2 * 32 * 64
    assert gated.flops_per_token() - plain.flops_per_token() == 6 * 2 * 32 * 64


def test_blocks_that_begin_with_zeros_change_nothing():
    for model, table, norm, ends in (
        (llama(residual_init="zero"), "model.embed_tokens", "model.norm", ("o_proj", "down_proj")),
        (toy_model(residual_init="zero"), None, "transformer.ln_f", ("c_proj",)),
    ):
        model.eval()
        if table is None:
            x = model.transformer.wte(IDX) + model.transformer.wpe(torch.arange(16))
        else:
            x = model.get_submodule(table)(IDX)
        assert torch.equal(model.features(IDX), model.get_submodule(norm)(x))
        zeros = {name for name, p in model.named_parameters() if not p.any()} - {
            name for name, p in model.named_parameters() if name.endswith("bias")
        }
        assert zeros == {f"{name}.weight" for name, m in model.named_modules() if name.endswith(ends)}
        # All other weights are what they would have been, and the model can learn: its zeros have a gradient.
        scaled = (llama if isinstance(model, Llama) else toy_model)(residual_init="scaled").state_dict()
        for name, p in model.state_dict().items():
            assert torch.equal(p, scaled[name]) == (name not in zeros), name
        model(IDX).logsumexp(-1).sum().backward()
        assert all(p.grad.any() for name, p in model.named_parameters() if name in zeros)


def test_logits_are_capped_wherever_they_are_computed():
    plain, capped = shaken(llama()), llama(final_logit_softcapping=2.0)
    capped.load_state_dict(plain.state_dict())
    assert plain.lm_head.weight.std() > 0.1
    with torch.no_grad():
        expected = 2.0 * torch.tanh(plain(IDX) / 2.0)
        assert (plain(IDX).abs() > 2.0).any()
        torch.testing.assert_close(capped(IDX), expected)
    targets = IDX.roll(1)
    reference = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    whole, chunked = next_token_loss(capped, [IDX, targets])[0], chunked_next_token_loss(capped, [IDX, targets])[0]
    for loss in (whole, chunked):
        torch.testing.assert_close(loss, reference)
    gradients = [torch.autograd.grad(loss, list(capped.parameters())) for loss in (whole, chunked)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    # With a cache and without, generation sees the same; and a cap changes what is drawn.
    settings = dict(max_new_tokens=10, seed=0, temperature=1.0)
    assert torch.equal(
        generate(capped, IDX[:1, :4], **settings), generate(capped, IDX[:1, :4], use_cache=False, **settings)
    )
    assert not torch.equal(generate(capped, IDX[:1, :4], **settings), generate(plain, IDX[:1, :4], **settings))


def test_the_cap_is_gemmas():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.5, pad_token_id=0)
    theirs = shaken(Gemma2ForCausalLM(config)).eval()
    head = SoftCappedLinear(16, 50, bias=False, cap=1.5)
    head.weight = theirs.lm_head.weight
    idx = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(head(theirs.model(idx).last_hidden_state), theirs(idx).logits)
    assert "cap=1.5" in repr(head)


# --- Files


def test_how_a_model_began_is_in_no_file_of_others(tmp_path):
    model = shaken(llama(residual_init="zero", qk_norm=True))
    export_hf(model, CHARS, tmp_path / "hf")
    assert "residual_init" not in json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F32")
    metadata = read_gguf_header(tmp_path / "x.gguf").metadata
    assert not any("init" in key for key in metadata)
    for path in (tmp_path / "hf", tmp_path / "x.gguf"):
        back = load(path)[0]
        assert back.config == model.config.replace(residual_init="scaled", head_dim=16, num_key_value_heads=2)
        assert torch.equal(back(IDX), model(IDX))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(final_logit_softcapping=30.0),
            r"final_logit_softcapping \(30\) is computed for Gemma 2 alone, .* train with final_logit_softcapping=null",
        ),
        (
            dict(hidden_act="relu2", final_logit_softcapping=30.0),
            r"final_logit_softcapping \(30\) is computed for Gemma 2",
        ),
        (
            dict(hidden_act="relu2", qk_norm=True),
            r"squared ReLU \(hidden_act='relu2'\) is the model type arcee, which has no qk_norm, .*; train without these, or",
        ),
        (dict(hidden_act="relu2", sliding_window=8), "arcee, which has no qk_norm, qkv_bias or sliding_window"),
        (dict(hidden_act="relu2", qkv_bias=True), "arcee, which has no qk_norm, qkv_bias or sliding_window"),
    ],
    ids=str,
)
def test_what_no_engine_computes_trains_saves_and_loads_and_is_refused_by_exporters(tmp_path, changes, message):
    shape = {**SHAPE, **changes}
    trainer = toy_trainer(tmp_path / "run", model=Llama(LlamaConfig.from_dict(shape)), max_steps=2, optimizer="muon")
    trainer.train(progress=False)
    back, tokenizer = load(tmp_path / "run")
    assert back.config == trainer.model.config
    assert torch.equal(back(IDX), trainer.model.eval()(IDX))
    resumed = toy_trainer(tmp_path / "run", model=Llama(LlamaConfig.from_dict(shape)), max_steps=2, optimizer="muon")
    assert resumed.resume()
    for model in (back, tmp_path / "run"):
        for export in (export_gguf, export_hf):
            with pytest.raises(ConvertError, match=message):
                export(model, tokenizer, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_biases_of_arcee_are_for_transformers_alone(tmp_path, name):
    model = shaken(llama(hidden_act="relu2", **{name: True}))
    with pytest.raises(ConvertError, match="llama.cpp's arch arcee has no biases, .* or export it for transformers"):
        export_gguf(model, CHARS, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
    export_hf(model, None, tmp_path / "hf")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(IDX).logits
        torch.testing.assert_close(theirs, model(IDX), atol=1e-4, rtol=1e-4)


def test_bitnet_has_no_capped_logits():
    shape = dict(vocab_size=9, hidden_size=256, intermediate_size=256, num_attention_heads=2)
    with pytest.raises(ConfigError, match=r"final_logit_softcapping \(30.0\) is not for BitNet"):
        BitNetConfig(**shape, final_logit_softcapping=30.0)
    with pytest.raises(ConfigError, match="residual_init must be one of|residual_init .* must be"):
        GPTConfig(vocab_size=9, residual_init="ones")


# --- The preset


def test_modern_is_as_large_as_nanogpts_model_and_exports_as_qwen3():
    modern = Llama(LlamaConfig.preset("modern", vocab_size=65))
    nanogpt = GPT(GPTConfig.preset("char-gpt-cpu", vocab_size=65))
    assert modern.num_params() == pytest.approx(nanogpt.num_params(), rel=0.015)
    assert modern.context_length == nanogpt.context_length == 64
    ours, theirs = TrainConfig.preset("modern"), TrainConfig.preset("char-gpt-cpu")
    assert ours.micro_batch_size * ours.grad_accum_steps == theirs.micro_batch_size * theirs.grad_accum_steps == 12
    assert ours.max_steps * 5 == theirs.max_steps == 2_000
    assert RunConfig.resolve("modern", [{"text": "x.txt"}]).tokenizer.kind == "char"


def test_the_command_line_trains_modern_and_its_files_compute_what_it_computes(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    run, gguf, hf = tmp_path / "run", tmp_path / "modern.gguf", tmp_path / "hf"
    arguments = ["train", str(text), "--preset", "modern", "--steps", "12", "--out", str(run)]
    arguments += ["--set", "seq_len=32", "--set", "eval_batches=2", "--set", "warmup_steps=2"]
    assert main(arguments) == 0
    assert main(["export", str(run), "--gguf", str(gguf), "--file-type", "F32"]) == 0
    assert main(["export", str(run), "--hf", str(hf)]) == 0
    assert "Llama, 128 wide, context 64" in capsys.readouterr().out
    model, tokenizer = load(run)
    losses = [json.loads(line).get("val_loss") for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [loss for loss in losses if loss][-1] < math.log(tokenizer.vocab_size) - 0.5
    report = verify_gguf(gguf, model, tokenizer, text=TEXT[:400])
    assert report.passed, str(report)
    assert report.kl_mean <= 1e-9
    assert read_gguf_header(gguf).metadata["general.architecture"] == "qwen3"
    theirs = AutoModelForCausalLM.from_pretrained(hf)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = torch.tensor([tokenizer.encode(TEXT[:64])])
    assert AutoTokenizer.from_pretrained(hf)(TEXT[:64])["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
        wrong = copy.deepcopy(model)  # control: a single changed weight shows
        wrong.model.layers[1].self_attn.q_norm.weight[3] += 2.0
        assert (wrong(ids) - theirs(ids).logits).abs().max() > 1e-4
