"""Llama against transformers' Llama, Mistral, Qwen2, Qwen3 and Arcee, in both directions; and the layers that it is made of."""

import copy
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmforge.convert import export_gguf, export_hf, load
from llmforge.convert.from_hf import _own_config
from llmforge.convert.published import FAMILIES
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.models import GPT, GPTConfig, Llama, LlamaConfig
from llmforge.nn import (
    RMSNorm,
    RopeScaling,
    SwiGLU,
    apply_rope,
    attention_mask,
    causal_attention,
    rope_angles,
    rope_frequencies,
)
from llmforge.tokenizers import CharTokenizer

BASE = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=4.0)
WINDOWED = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)

# Name -> transformers' model, its settings, ours where they have other names, and ours without what the case is about.
CASES = {
    "plain": ("Llama", {}, {}, dict(rope_theta=1_000.0)),
    "multi-query": ("Llama", dict(num_key_value_heads=1), None, dict(rms_norm_eps=1e-2)),
    "multi-head tied": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True), None, dict(rope_theta=1_000.0)),
    "wide heads": ("Llama", dict(head_dim=24, rope_theta=500_000.0), None, dict(rope_theta=10_000.0)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True), None, dict(rope_theta=1_000.0)),
    "llama3": ("Llama", dict(rope_theta=500_000.0, rope_scaling=LLAMA3), None, dict(rope_scaling=None)),
    "linear": ("Llama", dict(rope_scaling=LINEAR), None, dict(rope_scaling=None)),
    "yarn": ("Llama", dict(rope_scaling=YARN), None, dict(rope_scaling=None)),
    "yarn with all it has": (
        "Llama",
        dict(rope_scaling={**YARN, "beta_fast": 6.0, "beta_slow": 2.0, "attention_factor": 1.4}),
        None,
        dict(rope_scaling=RopeScaling(**YARN)),
    ),
    "mistral": ("Mistral", dict(sliding_window=7), None, dict(sliding_window=None)),
    "mistral without a window": ("Mistral", dict(sliding_window=None), None, dict(sliding_window=7)),
    "qwen2": ("Qwen2", {}, dict(qkv_bias=True), dict(sliding_window=7)),
    "qwen2 windowed": (
        "Qwen2",
        WINDOWED,
        dict(qkv_bias=True, sliding_window=5, max_window_layers=1),
        dict(max_window_layers=2),
    ),
    "qwen2 yarn": (
        "Qwen2",
        dict(rope_scaling=YARN, rope_theta=1e6, tie_word_embeddings=True),
        dict(qkv_bias=True, rope_scaling=YARN, rope_theta=1e6, tie_word_embeddings=True),
        dict(rope_scaling=None),
    ),
    "qwen3": ("Qwen3", dict(head_dim=32), dict(qk_norm=True, head_dim=32), dict(rope_theta=1_000.0)),
    "qwen3 with biases": (
        "Qwen3",
        dict(head_dim=32, attention_bias=True),
        dict(qk_norm=True, head_dim=32, attention_bias=True),
        dict(rope_theta=1_000.0),
    ),
    "qwen3 windowed": (
        "Qwen3",
        dict(head_dim=16, **WINDOWED),
        dict(qk_norm=True, sliding_window=5, max_window_layers=1),
        dict(sliding_window=None),
    ),
    "arcee": ("Arcee", {}, dict(hidden_act="relu2"), dict(rope_theta=1_000.0)),
    "arcee with all it has": (
        "Arcee",
        dict(attention_bias=True, mlp_bias=True, head_dim=24, tie_word_embeddings=True, rope_scaling=YARN),
        dict(
            hidden_act="relu2",
            attention_bias=True,
            mlp_bias=True,
            head_dim=24,
            tie_word_embeddings=True,
            rope_scaling=YARN,
        ),
        dict(rope_scaling=None),
    ),
}
ALL = pytest.mark.parametrize("case", CASES)


def shaken(model):
    """Every parameter matters: gains and biases, too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def theirs(case: str, **changes):
    """transformers' model; its configs change the dicts that they are given."""
    kind, values, _, _ = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**BASE, **values, **changes}))
    return shaken(getattr(transformers, f"{kind}ForCausalLM")(config))


def our_config(case: str) -> LlamaConfig:
    _, values, ours, _ = CASES[case]
    return LlamaConfig.from_dict({**BASE, **(values if ours is None else ours)})


def ours(case: str = "plain", **changes) -> Llama:
    return shaken(Llama(our_config(case).replace(**changes)))


def logits_of(model: nn.Module) -> torch.Tensor:
    idx = torch.arange(96).view(2, 48) * 31 % 97
    with torch.no_grad():
        out = model(idx)
    return out if isinstance(out, torch.Tensor) else out.logits


def difference(left: nn.Module, right: nn.Module) -> float:
    return (logits_of(left) - logits_of(right)).abs().max().item()


def read(folder) -> Llama:
    """No warning: all that transformers writes is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load(folder)[0]


def edit_config(folder, *without, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values = {key: value for key, value in {**values, **changes}.items() if key not in without}
    path.write_text(json.dumps(values), encoding="utf-8")


# 1e-5 for the order of float sums: on this build it is 0 in all cases.
@ALL
def test_a_folder_of_transformers_gives_the_same_logits(tmp_path, case):
    model = theirs(case)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if case in ("plain", "qwen3") else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (case in ("plain", "qwen3"))
    mine = read(tmp_path)
    assert mine.config.replace(head_dim=None) == our_config(case).replace(head_dim=None)
    assert mine.config.head_width == our_config(case).head_width
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == mine.config.tie_word_embeddings
    assert difference(mine, model) < 1e-5
    # Controls: the same weights without what the case is about, and a single changed weight.
    other = Llama(mine.config.replace(**CASES[case][3])).eval()
    other.load_state_dict(mine.state_dict())
    assert difference(other, model) > 1e-3
    with torch.no_grad():
        list(mine.model.layers[1].self_attn.parameters())[-1].view(-1)[3] += 0.5
    assert difference(mine, model) > 1e-4


@ALL
def test_transformers_computes_the_same_from_an_exported_folder(tmp_path, case):
    model = ours(case)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    export_hf(model, None, tmp_path / "hf", max_shard_bytes=50_000 if case == "plain" else 5_000_000)
    written, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())  # no missing, unexpected or mismatched key
    kind = CASES[case][0] if case != "mistral without a window" else "Llama"
    assert type(written).__name__ == f"{kind}ForCausalLM"
    assert difference(model, written) < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())  # never edited
    back = read(tmp_path / "hf")
    assert torch.equal(logits_of(back), logits_of(model))
    assert all(p.is_contiguous() for p in back.parameters())
    with torch.no_grad():
        written.model.layers[2].mlp.down_proj.weight[3, 5] += 0.5
    assert difference(model, written) > 1e-4


@ALL
def test_a_folder_is_exported_as_what_it_holds(tmp_path, case):
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    report = export_hf(tmp_path / "theirs", None, tmp_path / "out")
    written, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(written) is type(model)
    assert difference(written, model) < 1e-5
    assert report.tensors == {"float32": len(list(model.parameters()))}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_keeps_its_type_and_another_can_be_asked_for(tmp_path, dtype):
    model = theirs("plain").to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    assert export_hf(tmp_path / "theirs", None, tmp_path / "same").file_type == str(dtype).removeprefix("torch.")
    for name, tensor in load_file(tmp_path / "same" / "model.safetensors").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, model.state_dict()[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype == dtype
    export_hf(tmp_path / "theirs", None, tmp_path / "wide", dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert difference(read(tmp_path / "wide"), wide) < 1e-5
    assert load(tmp_path / "theirs", dtype=dtype)[0].lm_head.weight.dtype == dtype
    assert load(tmp_path / "theirs")[0].lm_head.weight.dtype == torch.float32


# Both spellings of one config.json; "type" is what rope_type was called at first.
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("case", ["plain", "llama3", "linear", "yarn", "qwen2 yarn"])
def test_the_older_spelling_of_rope_is_read(tmp_path, case, name):
    model = theirs(case)
    model.save_pretrained(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["rope_parameters"]  # as transformers 5
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {name: kind, **rope}
    edit_config(tmp_path, "rope_parameters", rope_theta=theta, rope_scaling=scaling)
    assert read(tmp_path).config.rope_theta == theta
    assert difference(read(tmp_path), model) < 1e-5
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path), model) < 1e-5  # and transformers agrees


def test_of_two_spellings_that_differ_transformers_choice_is_taken(tmp_path):
    theirs("llama3").save_pretrained(tmp_path)
    edit_config(tmp_path, rope_scaling=LINEAR, rope_theta=100.0)
    mine = read(tmp_path)
    assert (mine.config.rope_scaling.rope_type, mine.config.rope_theta) == ("linear", 100.0)
    assert difference(mine, AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-5


def test_the_context_of_yarn_that_is_not_said_is_the_models(tmp_path):
    without = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    model = theirs("yarn", rope_scaling=without)
    model.save_pretrained(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    edit_config(tmp_path, rope_parameters={k: v for k, v in rope.items() if k != "original_max_position_embeddings"})
    assert read(tmp_path).config.rope_scaling.original_max_position_embeddings == 64
    assert difference(read(tmp_path), model) < 1e-5


@pytest.mark.parametrize("case", ["plain", "biases", "mistral", "qwen2 windowed", "qwen3", "arcee"])
def test_gradients_are_transformers_gradients(case):
    model = theirs(case)
    mine = Llama(our_config(case)).train()
    mine.load_state_dict(model.state_dict())
    idx = torch.randint(0, 99, (2, 33))
    for m in (model, mine):
        out = m(idx[:, :-1])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in mine.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_dropout_of_attention_is_drawn_in_training_alone():
    model = ours("plain", attention_dropout=0.5)
    assert torch.equal(logits_of(model), logits_of(model))
    assert difference(model.train(), model) > 1e-3


def test_a_bfloat16_model_turns_far_positions_exactly():
    """Angles are float32: rounded frequencies would be wrong by whole turns after some hundred tokens."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = shaken(Llama(config))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(20)  # tokens far apart, too, see their distance
    low = copy.deepcopy(model).bfloat16()
    model.load_state_dict({name: p.float() for name, p in low.state_dict().items()})
    idx = torch.randint(0, 50, (1, 2048))
    with torch.no_grad():
        expected, found = model(idx), low(idx).float()
        # Control: what a buffer would become in model.bfloat16().
        model.model._frequencies = model.model._frequencies.bfloat16().float()
        rounded = model(idx)
    far = slice(1500, None)
    assert (found - expected)[:, far].std() < 0.03 * expected.std()  # rounding of bfloat16, 2^-8, some times over
    assert (rounded - expected)[:, far].std() > 0.1 * expected.std()


def test_a_model_built_on_meta_keeps_its_frequencies():
    with torch.device("meta"):
        model = Llama(our_config("llama3"))
    filled = ours("llama3")
    model.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(logits_of(model.eval()), logits_of(filled))


# --- Sizes

LLAMA_PRESETS = [name for name in LlamaConfig.PRESETS if name.startswith("llama")]  # the others: tests/test_modern.py


@pytest.mark.parametrize("name", LLAMA_PRESETS)
def test_presets_have_the_size_that_transformers_counts(name):
    config = LlamaConfig.from_dict(LlamaConfig.PRESETS[name])
    with torch.device("meta"):
        model = Llama(config)
        reference = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**copy.deepcopy(dict(LlamaConfig.PRESETS[name])))
        )
    assert model.num_params() == sum(p.numel() for p in reference.parameters())
    V, C, F, L = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
    H, K, D = config.num_attention_heads, config.kv_heads, config.head_width
    rows = V * C * (1 if config.tie_word_embeddings else 2)
    assert model.num_params() == rows + L * (2 * C * H * D + 2 * C * K * D + 3 * C * F + 2 * C) + C
    # Rows of 256: every matrix can be a K-quant.
    assert all(p.shape[-1] % 256 == 0 for p in model.parameters())
    for T in (None, 100):
        matrices = L * (2 * C * H * D + 2 * C * K * D + 3 * C * F) + V * C
        attention = 12 * L * (T or config.max_position_embeddings) * H * D
        assert model.flops_per_token(T) == 6 * matrices + attention
    if found := re.fullmatch(r"llama-(\d+)m", name):
        assert model.num_params() == pytest.approx(int(found.group(1)) * 1e6, rel=0.06)


def test_the_sizes_of_metas_models_are_the_published_ones():
    with torch.device("meta"):
        sizes = {n: Llama(LlamaConfig.from_dict(LlamaConfig.PRESETS[n])).num_params() for n in LLAMA_PRESETS}
    assert sizes["llama-3-8b"] == 8_030_261_248
    assert sizes["llama-3.2-1b"] == 1_235_814_400


@pytest.mark.parametrize("case", ["plain", "multi-query", "wide heads", "qwen3", "arcee"])
def test_flops_are_what_torch_counts(case):
    model, T = ours(case), 48
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the fused kernel
        model(torch.zeros(1, T, dtype=torch.long)).sum().backward()
    assert model.flops_per_token(T) * T == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=0), r"vocab_size \(0\) must be at least 1"),
        (dict(hidden_size=-1), r"hidden_size \(-1\) must be at least 1"),
        (dict(intermediate_size=0), r"intermediate_size \(0\) must be at least 1"),
        (dict(num_hidden_layers=0), r"num_hidden_layers \(0\) must be at least 1"),
        (dict(num_attention_heads=0), r"num_attention_heads \(0\) must be at least 1"),
        (dict(num_key_value_heads=0), r"num_key_value_heads \(0\) must be at least 1"),
        (dict(head_dim=0), r"head_dim \(0\) must be at least 1"),
        (dict(max_position_embeddings=0), r"max_position_embeddings \(0\) must be at least 1"),
        (dict(sliding_window=0), r"sliding_window \(0\) must be at least 1"),
        (dict(num_key_value_heads=3), r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        (
            dict(hidden_size=66),
            r"hidden_size \(66\) must be divisible by num_attention_heads \(4\); try hidden_size=68",
        ),
        (dict(head_dim=15), r"head_dim \(15\) must be even"),
        (dict(hidden_size=60), r"head_dim \(15\) must be even"),
        (dict(max_window_layers=-1), r"max_window_layers \(-1\) must be 0 or more"),
        (dict(rms_norm_eps=0.0), r"rms_norm_eps \(0.0\) must be above 0"),
        (dict(rope_theta=math.nan), r"rope_theta \(nan\) must be above 0"),
        (dict(rope_theta=math.inf), r"rope_theta \(inf\) must be above 0"),
        (dict(attention_bias=True, qkv_bias=True), "attention_bias .* and qkv_bias .* exclude each other"),
        (dict(hidden_act="gelu"), "hidden_act must be one of 'silu', 'relu2', got 'gelu'"),
        (dict(residual_init="ones"), "residual_init must be one of 'scaled', 'zero', got 'ones'"),
        (dict(final_logit_softcapping=0.0), r"final_logit_softcapping \(0.0\) must be above 0; null leaves"),
        (dict(final_logit_softcapping=math.inf), r"final_logit_softcapping \(inf\) must be above 0"),
        (dict(attention_dropout=1.0), r"attention_dropout \(1.0\) must be at least 0 and below 1"),
        (dict(hidden_dim=3), "unknown LlamaConfig field 'hidden_dim'; did you mean 'hidden_size'"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0.5)), r"factor \(0.5\) of rope_scaling must be at least 1"),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_type must be one of .*, got 'dynamic'"),
        (
            dict(rope_scaling={**LLAMA3, "low_freq_factor": 4.0}),
            r"low_freq_factor \(4.0\) must be above 0 and below high_freq_factor \(4.0\)",
        ),
        (dict(rope_scaling={**YARN, "beta_slow": 40.0}), r"beta_slow \(40.0\) must be above 0 and below beta_fast"),
        (
            dict(rope_scaling={**YARN, "original_max_position_embeddings": 0}),
            r"original_max_position_embeddings \(0\) must be at least 1",
        ),
    ],
)
def test_a_bad_config_is_refused_with_its_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_dict({**BASE, **changes})


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens do not fit in max_position_embeddings \(64\)"):
        ours()(torch.zeros(1, 65, dtype=torch.long))


# --- Folders of others


@pytest.fixture
def folder(tmp_path):
    theirs("plain").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def qwen2(tmp_path):
    theirs("qwen2").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_class is Llama], ids=lambda f: f.hf_model_type)
def test_an_absent_key_means_transformers_default(family):
    defaults = transformers.AutoConfig.for_model(family.hf_model_type)
    config = _own_config(family, {"model_type": family.hf_model_type}, Path("config.json"))
    for key, (field, _) in family.hf_fields.items():
        expected = defaults.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(defaults, key, None)
        if key == "rope_scaling":
            expected = None if expected["rope_type"] == "default" else expected
        if key in ("sliding_window", "max_window_layers") and not getattr(defaults, "use_sliding_window", True):
            expected = {"sliding_window": None, "max_window_layers": 0}[key]
        found = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}.get(
            field, getattr(config, field)
        )
        if key == "head_dim" and expected is None:
            expected = defaults.hidden_size // defaults.num_attention_heads
        assert found == expected, key


def test_an_unknown_model_type_is_refused_with_what_is_supported(folder):
    edit_config(folder, model_type="mamba")
    with pytest.raises(
        ConvertError, match="of type 'mamba'; supported: gpt2, llama, bitnet, mistral, qwen2, qwen3, arcee$"
    ):
        load(folder)


def test_an_unknown_key_is_named_in_a_warning(folder):
    edit_config(folder, residual_multiplier=0.2, sparse=True)
    with pytest.warns(UserWarning, match="not known here and have no effect: residual_multiplier, sparse$"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_act="gelu"), "sets hidden_act to 'gelu', which Llama does not compute; it must be 'silu'"),
        (dict(partial_rotary_factor=0.5), r"partial_rotary_factor \(0.5\) must be 1.0"),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor must be 1"),
        (
            dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)),
            r"rope_type \('dynamic'\) must be one of default, ",
        ),
        (
            dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
            "rope_parameters must be the same for all layers, got one for each of full_attention",
        ),
        (
            dict(rope_scaling=dict(type="longrope", factor=2.0)),
            r"rope_type \('longrope'\) must be one of default, linear",
        ),
        (dict(rope_scaling=dict(type="linear")), "describes a model that cannot be built here: .*factor"),
        (dict(rope_scaling={**YARN, "mscale": 0.7}), "unknown RopeScaling field 'mscale'"),
        (dict(rope_scaling={**YARN, "truncate": False}), "truncate of yarn must be true"),
        (dict(rope_scaling="yarn"), "rope_scaling must be an object, got 'yarn'"),
        (dict(quantization_config={"bits": 4}), r"sets quantization_config to {'bits': 4}"),
        (dict(is_encoder_decoder=True), "sets is_encoder_decoder to True"),
        (dict(num_key_value_heads=3), r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        (dict(hidden_size="wide"), "hidden_size must be a whole number, got 'wide'"),
        (dict(head_dim=[16]), "head_dim must be .*, got"),
    ],
)
def test_a_setting_that_would_change_the_result_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ConvertError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
            "layer_types must be full attention, and a window from layer",
        ),
        (
            dict(WINDOWED, layer_types=["sliding_attention"] * 3),
            r"a window from layer 1 on if use_sliding_window is set; got \['sliding_attention'",
        ),
        (dict(use_mrope=True), r"use_mrope \(True\) must be False"),
    ],
)
def test_layers_that_are_mixed_otherwise_are_refused(qwen2, changes, message):
    edit_config(qwen2, **changes)
    with pytest.raises(ConvertError, match=message):
        load(qwen2)


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_old_frequency_buffers_are_dropped(folder, name):
    expected = logits_of(read(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.format(layer): torch.ones(8) for layer in range(3)}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits_of(read(folder)), expected)


def test_missing_and_unexpected_tensors_are_listed_apart(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors")
    expected = (
        r"does not fit its config; missing: model\.layers\.1\.mlp\.up_proj\.weight; "
        r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias; "
        r"of another shape: model\.norm\.weight is \(32,\), must be \(64,\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        load(folder)


def test_tied_embeddings_may_be_saved_under_either_name_or_both(tmp_path):
    model = theirs("multi-head tied")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        save_file({**tensors, **{name: embedding.clone() for name in names}}, tmp_path / "model.safetensors")
        assert difference(read(tmp_path), model) < 1e-5
    twice = {**tensors, "lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but the config"
    ):
        load(tmp_path)


def test_an_index_that_leads_out_of_its_folder_is_refused(folder):
    inside = folder / "inside"
    inside.mkdir()
    (inside / "config.json").write_bytes((folder / "config.json").read_bytes())
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "../model.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"names '\.\./model\.safetensors'; a shard must be .* in the same folder"
    ):
        load(inside)


def test_a_value_that_is_not_finite_is_refused_when_it_is_exported(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConvertError, match=r"model\.layers\.2\.mlp\.down_proj\.weight holds NaN or infinity"):
        export_hf(folder, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(qkv_bias=True, qk_norm=True),
        dict(qkv_bias=True, mlp_bias=True),
        dict(qk_norm=True, mlp_bias=True),
        dict(sliding_window=4, attention_bias=True),
        dict(sliding_window=4, max_window_layers=1),
    ],
    ids=str,
)
def test_settings_that_no_model_type_has_together_are_refused(tmp_path, changes):
    chars = CharTokenizer.from_text("".join(map(chr, range(33, 131))))
    assert chars.vocab_size == 99
    for export in (export_hf, export_gguf):
        with pytest.raises(
            ConvertError, match=r"\(llama, mistral, qwen2, qwen3, arcee\) has all of these settings together"
        ):
            export(ours(**changes), chars, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_row_is_added_to_a_llama(tmp_path):
    chars = CharTokenizer.from_text("".join(map(chr, range(33, 132))))
    with pytest.raises(ConvertError, match=r"no row for <\|endoftext\|>; train it with a tokenizer that reserves one"):
        export_hf(ours(), chars, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_gpt2_is_still_gpt2(tmp_path):
    export_hf(GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8)), None, tmp_path)
    assert isinstance(load(tmp_path)[0], GPT)


# --- Layers


def turned(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by multiplication with exp(j * position * frequency)."""
    D = x.shape[-1]
    pairs = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())  # (B, H, T, D/2)
    angles = (positions.double()[..., None] * frequencies.double()).broadcast_to(x.shape[0], x.shape[2], D // 2)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1).float()


@pytest.mark.parametrize("rows", [False, True])
def test_rope_is_multiplication_with_a_complex_number(rows):
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 0, 0, 1, 2], [7, 8, 9, 10, 11]]) if rows else torch.tensor([0, 1, 2, 3, 40])
    frequencies = rope_frequencies(8, 10_000.0)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])  # 10000 ** (-2i/8)
    found = apply_rope(x, *rope_angles(positions, frequencies))
    torch.testing.assert_close(found, turned(x, positions, frequencies), atol=1e-5, rtol=0)
    assert torch.equal(found[0, :, 0], x[0, :, 0])  # position 0 stays
    assert found[1, 0, 4, 0] != x[1, 0, 4, 0]
    doubled = apply_rope(x, *rope_angles(positions, frequencies, 2.0))
    torch.testing.assert_close(doubled, 2 * found)
    assert apply_rope(x.bfloat16(), *rope_angles(positions, frequencies)).dtype == torch.bfloat16


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_what_a_query_and_a_key_see_of_each_other_is_their_distance(m, n, shift):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(m)).double()
    frequencies = rope_frequencies(16, 100.0).double()

    def score(i, j):
        left, right = (torch.tensor([p]).double()[:, None] * frequencies for p in (i, j))
        return (apply_rope(q, left.cos(), left.sin()) * apply_rope(k, right.cos(), right.sin())).sum().item()

    assert score(m, n) == pytest.approx(score(m + shift, n + shift), abs=1e-9)


@pytest.mark.parametrize(
    ("D", "theta", "context", "scaling"),
    [
        (128, 500_000.0, 131_072, {**LLAMA3, "original_max_position_embeddings": 8192}),  # Llama 3.1
        (64, 500_000.0, 131_072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}),  # Llama 3.2
        (128, 1e6, 131_072, {**YARN, "original_max_position_embeddings": 32_768}),  # Qwen2.5, Qwen3
        (80, 10_000.0, 65_536, {**YARN, "factor": 16.0, "original_max_position_embeddings": 4096}),
        (128, 10_000.0, 16_384, LINEAR),
    ],
)
def test_scaled_frequencies_are_transformers(D, theta, context, scaling):
    config = transformers.LlamaConfig(
        hidden_size=4 * D,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    expected, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    mine = RopeScaling.from_dict(scaling)
    torch.testing.assert_close(rope_frequencies(D, theta, mine), expected, atol=0, rtol=1e-6)
    assert mine.attention_scale == pytest.approx(scale)
    stretch = mine.stretch(D, theta)
    assert stretch.min() >= 1 - 1e-6
    assert stretch.max() == pytest.approx(scaling["factor"])
    torch.testing.assert_close(rope_frequencies(D, theta) / stretch, expected, atol=0, rtol=1e-6)


@settings(max_examples=100)
@given(st.data(), st.integers(1, 7), st.integers(0, 5), st.none() | st.integers(1, 9))
def test_the_mask_is_what_a_loop_over_all_pairs_says(data, T, past, window):
    S = T + past
    padding = data.draw(st.none() | st.lists(st.integers(0, S - 1), min_size=1, max_size=3))
    mask = attention_mask(T, S, window=window, padding=None if padding is None else torch.tensor(padding))
    assert mask.shape == ((T, S) if padding is None else (len(padding), 1, T, S))
    for row, empty in enumerate(padding or [0]):
        for t in range(T):
            for key in range(S):
                query = past + t
                expected = key <= query and (window is None or query - key < window) and key >= empty
                expected = expected or key == query
                assert mask.expand(len(padding or [0]), 1, T, S)[row, 0, t, key].item() == expected


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 8), (1, 8)])
@pytest.mark.parametrize("window", [None, 3])
def test_grouped_attention_is_softmax_with_repeated_heads(H, K, T, S, window):
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    mask = None if window is None else attention_mask(T, S, window=window)
    found = causal_attention(q, k, v, mask=mask)
    for head in range(H):
        keys, values = k[:, head // (H // K)], v[:, head // (H // K)]
        scores = q[:, head] @ keys.transpose(1, 2) / math.sqrt(8)
        for t in range(T):
            for s in range(S):
                if s > S - T + t or (window is not None and S - T + t - s >= window):
                    scores[:, t, s] = -torch.inf
        torch.testing.assert_close(found[:, head], scores.softmax(-1) @ values, atol=1e-5, rtol=1e-4)


def test_rms_norm_is_torchs_and_rounds_as_transformers():
    norm, reference, rounding = RMSNorm(16, eps=1e-3), nn.RMSNorm(16, eps=1e-3), LlamaRMSNorm(16, eps=1e-3)
    gain = torch.randn(16)
    for module in (norm, reference, rounding):
        nn.init.zeros_(module.weight).data.add_(gain)
    x = torch.randn(3, 5, 16) * 0.03  # small, so that eps matters
    torch.testing.assert_close(norm(x), reference(x))
    assert (norm(x) - RMSNorm(16)(x) * gain).abs().max() > 1e-3
    low = (x * 1e3).bfloat16()
    found = norm.bfloat16()(low)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, rounding.bfloat16()(low), atol=0, rtol=2**-7)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_is_its_formula(bias):
    layer, x = shaken(SwiGLU(6, 10, bias=bias)), torch.randn(2, 3, 6)
    assert {name for name, _ in layer.named_parameters()} == {
        f"{part}_proj.{kind}"
        for part in ("gate", "up", "down")
        for kind in (["weight", "bias"] if bias else ["weight"])
    }
    p = dict(layer.named_parameters())
    gate, up = (x @ p[f"{n}_proj.weight"].T + p.get(f"{n}_proj.bias", torch.zeros(10)) for n in ("gate", "up"))
    expected = (gate / (1 + torch.exp(-gate)) * up) @ p["down_proj.weight"].T + p.get("down_proj.bias", torch.zeros(6))
    torch.testing.assert_close(layer(x), expected)
