"""BitNet in both profiles: against transformers and llama.cpp, there and back, and every known way to a wrong file refused."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import TEXT, toy_tokenizer, toy_trainer
from transformers import AutoModelForCausalLM

import llmforge as lf
from llmforge import BitNet, BitNetConfig, CheckpointError, ConfigError, ConvertError, GPTConfig, Llama, LlamaConfig
from llmforge.cli.main import main
from llmforge.convert import open_model
from llmforge.formats.gguf import GGUFTensor, read_gguf_header, read_gguf_tensors, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.nn import bit_linears
from llmforge.quant.ternary import latent_weight

CHARS = toy_tokenizer()
SHAPE = dict(
    vocab_size=CHARS.vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
PROFILES = {
    "plain": {},
    "untied": dict(tie_word_embeddings=False),
    "sub_norm": dict(sub_norm=True),
    "relu2": dict(sub_norm=True, hidden_act="relu2"),
}
FORMS = ["bitlinear", "autobitlinear", "latent"]


def toy(profile: str = "plain", **changes) -> BitNet:
    """A model whose every parameter matters, with logits that differ."""
    torch.manual_seed(1)
    model = BitNet(BitNetConfig.from_dict({**SHAPE, **PROFILES[profile], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
            p.add_(torch.randn_like(p) * (0.02 if p.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def trained():
    """Models of both profiles, trained as llama.cpp will compute them."""

    def train(**changes) -> BitNet:
        torch.manual_seed(0)
        model = BitNet(BitNetConfig.from_dict({**SHAPE, "act_quant": "group", **changes}))
        trainer = toy_trainer(model=model, max_steps=80, seq_len=64, recipe="bitnet", warmup_steps=5)
        for _ in trainer:
            pass
        return model.eval()

    return {"plain": train(), "sub_norm": train(sub_norm=True)}


def kl(left: torch.Tensor, right: torch.Tensor) -> float:
    left, right = left.double().log_softmax(-1), right.double().log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1).mean().item()


IDX = torch.randint(CHARS.vocab_size, (2, 48), generator=torch.Generator().manual_seed(3))


# The model


def test_sizes_that_no_file_can_hold_are_refused_with_the_nearest():
    for change, words in [
        (
            dict(intermediate_size=700),
            "intermediate_size (700) must be a multiple of 256, .*; the nearest are 512 and 768",
        ),
        (dict(hidden_size=100), "hidden_size (100) must be a multiple of 256, .*; the nearest is 256"),
        (dict(head_dim=32), "num_attention_heads * head_dim (128) must be a multiple of 256"),
        (
            dict(num_attention_heads=256, head_dim=2, num_key_value_heads=1),
            "head_dim (2) must be a multiple of 4: weights are packed",
        ),
        (dict(hidden_act="relu2"), "hidden_act ('relu2') must be one of 'silu'"),
        (dict(act_quant="block"), "must be one of 'token', 'group', 'none', got 'block'"),
        (dict(attention_bias=True), "attention_bias (True) is not for BitNet"),
        (dict(qk_norm=True), "qk_norm (True) is not for BitNet"),
        (dict(quantized=False), "quantized=False without sub_norm is a Llama"),
    ]:
        pattern = re.escape(words).replace(r"\.\*", ".*")
        with pytest.raises(ConfigError, match=pattern):
            BitNetConfig.from_dict({**SHAPE, **change})


def test_the_default_profile_is_llama_but_for_its_linear_layers():
    model = BitNet(BitNetConfig(**SHAPE))
    assert set(model.state_dict()) == set(Llama(model.config.float_twin()).state_dict())
    assert len(bit_linears(model)) == 14
    assert "lm_head" not in bit_linears(model)
    sub_norm = toy("sub_norm")
    extra = set(sub_norm.state_dict()) - set(model.state_dict())
    assert extra == {
        f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm")
    }
    twin = sub_norm.config.float_twin()
    assert isinstance(twin, BitNetConfig)
    assert twin.float_twin() is None
    assert bit_linears(BitNet(twin)) == {}


def test_microsofts_shape_is_the_preset():
    config = BitNetConfig.preset("bitnet-2b-4t")
    with torch.device("meta"):
        model = BitNet(config)
    assert model.num_params() == 2_412_820_480  # of microsoft/bitnet-b1.58-2B-4T-bf16
    assert config.hidden_act == "relu2"
    assert config.sub_norm
    assert config.tie_word_embeddings


@pytest.mark.parametrize("profile", PROFILES)
def test_a_cache_changes_nothing(profile):
    model = toy(profile)
    cached, uncached = (
        lf.generate(model, IDX[:1, :9], max_new_tokens=20, temperature=0.0, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)


# Hugging Face


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("profile", PROFILES)
def test_transformers_computes_the_same_and_the_folder_reads_back(profile, form, tmp_path):
    model = toy(profile)
    report = lf.export_hf(model, CHARS, tmp_path / "hf", ternary=form)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert type(theirs).__name__ == ("BitNetForCausalLM" if model.config.sub_norm else "LlamaForCausalLM")
    # Layer by layer on our own inputs: on logits, codes of 8 bits flip where sums differ in the last place.
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: (args[0], out)}))
        for name, layer in bit_linears(model).items()
    ]
    with torch.no_grad():
        ours = model(IDX)
        for name, (x, out) in inputs.items():
            torch.testing.assert_close(theirs.get_submodule(name)(x), out, rtol=0, atol=1e-5 * out.abs().max().item())
        for hook in hooks:
            hook.remove()
        logits = theirs(IDX).logits
        assert kl(ours, logits) < 2e-3
        assert (ours.argmax(-1) == logits.argmax(-1)).float().mean() > 0.9
    back, tokenizer = lf.load(tmp_path / "hf")
    assert type(back) is BitNet
    assert tokenizer is not None
    assert {**back.config.to_dict(), "head_dim": None} == {**model.config.to_dict(), "head_dim": None}
    for name, layer in bit_linears(back).items():
        codes, scale = layer.codes()
        codes_before, scale_before = model.get_submodule(name).codes()
        # Latent weights are written times rounded scale / scale: where one lies on a border, its code may be the other one.
        assert (codes != codes_before).sum() <= (2 if form == "latent" else 0)
        assert scale == scale_before
    with torch.no_grad():
        assert kl(back(IDX), ours) < 1e-4 if form == "latent" else torch.equal(back(IDX), ours)
    if form != "latent":
        assert report.tensors["uint8"] == 14
        packed = sum(
            t.nbytes for t in load_file(tmp_path / "hf" / "model.safetensors").values() if t.dtype == torch.uint8
        )
        assert packed * 4 == sum(layer.weight.numel() for layer in bit_linears(model).values())


def test_another_weight_is_another_model(tmp_path):  # the control of the test above
    model = toy()
    lf.export_hf(model, CHARS, tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        assert kl(model(IDX), theirs(IDX).logits) > 1e-2


@pytest.mark.parametrize("profile", ["plain", "sub_norm"])
def test_trained_models_agree_with_transformers(trained, profile, tmp_path):
    model = copy.deepcopy(trained[profile])
    for layer in bit_linears(model).values():
        layer.act_quant = "token"  # as transformers rounds activations
    lf.export_hf(trained[profile], CHARS, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    idx = torch.tensor([CHARS.encode(TEXT[:250])])
    with torch.no_grad():
        ours, logits = model(idx), theirs(idx).logits
    assert kl(ours, logits) < 1e-5
    assert (ours.argmax(-1) == logits.argmax(-1)).all()


def test_the_float_twins_of_both_profiles_go_to_transformers(tmp_path):
    torch.manual_seed(0)
    for name, twin in [
        ("plain", Llama(toy().config.float_twin())),
        ("sub_norm", BitNet(toy("sub_norm").config.float_twin())),
    ]:
        lf.export_hf(twin.eval(), CHARS, tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDX).logits, twin(IDX), rtol=0, atol=1e-5)
        back, _ = lf.load(tmp_path / name)
        assert type(back) is type(twin)
        assert bit_linears(back) == {}
        assert torch.equal(back(IDX), twin(IDX))


def test_microsofts_layout_loads_and_generates(tmp_path):
    """bitnet-b1.58-2B-4T: packed codes, scales that multiply, squared ReLU, bfloat16 norms and embedding, its config's keys."""
    model = toy("relu2", scale_dtype="float32")
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = bit_linears(model).get(name.removesuffix(".weight"))
        if layer is None:
            if name != "lm_head.weight":
                tensors[name] = tensor.bfloat16()
            continue
        codes, scale = layer.codes()
        quarters = (codes + 1).to(torch.uint8).view(4, -1, codes.shape[1])
        tensors[name] = sum(quarters[i] << (2 * i) for i in range(4)).to(torch.uint8)
        tensors[f"{name}_scale"] = scale.bfloat16().reshape(1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "architectures": ["BitNetForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": CHARS.vocab_size,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="not known here and have no effect: auto_map"):
        back, _ = lf.load(tmp_path)
    assert back.config.hidden_act == "relu2"
    assert back.config.sub_norm
    assert back.config.rope_theta == 500_000
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert kl(back(IDX), theirs(IDX).logits) < 1e-2  # theirs in bfloat16
    assert lf.generate(back, IDX[:1, :4], max_new_tokens=8, seed=0).shape == (1, 12)
    with pytest.raises(
        ConvertError, match="computes the gate of arch bitnet with SiLU always.*'relu2' would load and write nonsense"
    ):
        lf.export_gguf(back, CHARS, tmp_path / "x.gguf", file_type="TQ2_0")
    assert not (tmp_path / "x.gguf").exists()


# What loads and computes nonsense elsewhere is refused here: the tables of interoperability, row by row.


def folder_with(tmp_path, profile="plain", form="bitlinear", tensors=None, **changes):
    """An exported folder with other values in its config.json; None takes a key out."""
    folder = tmp_path / "hf"
    lf.export_hf(toy(profile), CHARS, folder, ternary=form)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if key == "quantization":
            config["quantization_config"] |= value
        else:
            config[key] = value
    if changes.get("quantization_config", 0) is None:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        values = load_file(folder / "model.safetensors")
        save_file(tensors(values), folder / "model.safetensors")
    return folder


def test_scales_of_the_other_convention_are_refused(tmp_path):
    for form, other, how in [
        ("bitlinear", "autobitlinear", "multiplies with weight_scale, which makes weights of"),
        ("autobitlinear", "bitlinear", "divides by weight_scale, which makes weights of"),
    ]:
        folder = folder_with(tmp_path / form, form=form, quantization={"linear_class": other})
        with pytest.raises(ConvertError, match=f"linear_class {other} {how}.*correct linear_class"):
            lf.load(folder)


def test_latent_weights_without_quantization_config_are_refused(tmp_path):
    folder = folder_with(tmp_path, "sub_norm", "latent", quantization_config=None)
    with pytest.raises(ConvertError, match='a bitnet without quantization_config.*add "quantization_config"'):
        lf.load(folder)


def test_ternary_weights_that_would_be_rounded_again_are_refused(tmp_path):
    def dequantized(values):
        for name, tensor in values.items():
            if name.endswith("_proj.weight"):
                values[name] = tensor.sign() * (tensor.abs() > tensor.abs().mean() / 2) * tensor.abs().mean()
        return values

    folder = folder_with(tmp_path, form="latent", tensors=dequantized)
    with pytest.raises(ConvertError, match=r"up_proj\.weight is ternary already|q_proj\.weight is ternary already"):
        lf.load(folder)


def test_a_packed_model_has_no_latent_weights_to_export(tmp_path):
    lf.export_hf(toy(), CHARS, tmp_path / "packed")
    with pytest.raises(
        ConvertError, match="has no latent weights: the model was read from a file of ternary ones; export it packed"
    ):
        lf.export_hf(tmp_path / "packed", CHARS, tmp_path / "latent", ternary="latent")
    assert not (tmp_path / "latent").exists()
    lf.export_hf(tmp_path / "packed", CHARS, tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(quantization={"use_rms_norm": True}), "use_rms_norm: norms inside the linear layers"),
        (
            dict(quantization={"linear_class": "bit"}),
            "linear_class 'bit' and quantization_mode 'offline'; known are bitlinear",
        ),
        (dict(quantization={"modules_to_not_convert": ["q_proj"]}), r"leaves \['q_proj'\] as floats"),
        (dict(quantization={"quant_method": "awq"}), "quantization_config"),
        (dict(hidden_act="relu2"), "hidden_act"),
        (dict(attention_bias=True), "attention_bias must be false: BitNet has no biases"),
        (dict(intermediate_size=700), r"intermediate_size \(700\) must be a multiple of 256"),
    ],
)
def test_a_folder_that_would_be_computed_otherwise_is_refused(tmp_path, change, words):
    with pytest.raises(ConvertError, match=words):
        lf.load(folder_with(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda v: {k: t for k, t in v.items() if not k.endswith("0.mlp.up_proj.weight_scale")},
            "has no weight_scale of one value",
        ),
        (
            lambda v: {k: t * 0 if k.endswith("_scale") else t for k, t in v.items()},
            "_scale is 0.0, but must be above 0",
        ),
        (lambda v: {k: t | 3 if t.dtype == torch.uint8 else t for k, t in v.items()}, "stand for none of -1, 0 and 1"),
        (
            lambda v: {k: t.float() if t.dtype == torch.uint8 else t for k, t in v.items()},
            "up_proj.weight is|holds other values|shape",
        ),
    ],
)
def test_damaged_codes_and_scales_are_refused(tmp_path, change, words):
    with pytest.raises((ConvertError, CheckpointError, ConfigError), match=words):
        lf.load(folder_with(tmp_path, tensors=change))


def test_tied_and_untied_do_not_mix(tmp_path):
    def untied(values):
        return {**values, "lm_head.weight": values["model.embed_tokens.weight"] * 2}

    with pytest.raises(CheckpointError, match="differs from .*, but the config ties them"):
        lf.load(folder_with(tmp_path, tensors=untied))
    with pytest.raises(ConvertError, match="takes the token embedding for the output projection of arch bitnet"):
        lf.export_gguf(toy("sub_norm", tie_word_embeddings=False), CHARS, tmp_path / "x.gguf", file_type="TQ2_0")
    with pytest.raises(
        ConvertError, match=r"needs num_attention_heads \* head_dim \(512\) equal to hidden_size \(256\)"
    ):
        lf.export_gguf(toy("sub_norm", head_dim=128), CHARS, tmp_path / "x.gguf", file_type="TQ2_0")
    assert not (tmp_path / "x.gguf").exists()


def rewritten(tmp_path, profile, metadata=None, tensors=None):
    """A GGUF file of a model, with other metadata or more tensors."""
    lf.export_gguf(toy(profile), CHARS, tmp_path / "a.gguf", file_type="TQ2_0")
    header = read_gguf_header(tmp_path / "a.gguf")
    arch = header.metadata.pop("general.architecture")
    values = read_gguf_tensors(tmp_path / "a.gguf", header)
    described = [GGUFTensor(info.name, info.type_name, values[info.name]) for info in header.tensors]
    described += [GGUFTensor(name, "F32", LazyTensor.of(tensor)) for name, tensor in (tensors or {}).items()]
    write_gguf(tmp_path / "b.gguf", arch, {**header.metadata, **(metadata or {})}, described, types=header.types)
    return tmp_path / "b.gguf"


def test_gguf_files_that_llama_cpp_computes_otherwise_are_refused(tmp_path):
    assert type(lf.load(rewritten(tmp_path, "sub_norm"))[0]) is BitNet
    for profile in ("plain", "sub_norm"):
        with pytest.raises(ConvertError, match="has scales beside its weights"):
            lf.load(rewritten(tmp_path, profile, tensors={"blk.0.attn_q.scale": torch.ones(1)}))
    with pytest.raises(ConvertError, match=r"has an output\.weight, but llama\.cpp takes the token embedding"):
        lf.load(rewritten(tmp_path, "sub_norm", tensors={"output.weight": torch.ones(CHARS.vocab_size, 256)}))
    with pytest.raises(
        ConvertError, match="hidden_activation is 'relu2', but llama.cpp computes arch bitnet with SiLU"
    ):
        lf.load(rewritten(tmp_path, "sub_norm", metadata={"bitnet.hidden_activation": "relu2"}))


# GGUF


@pytest.mark.parametrize("file_type", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("profile", ["plain", "sub_norm"])
def test_llama_cpp_computes_what_training_computed(trained, profile, file_type, tmp_path):
    model, path = trained[profile], tmp_path / "model.gguf"
    report = lf.export_gguf(model, CHARS, path, file_type=file_type, tensor_types={"token_embd": "F32"})
    assert report.tensors[file_type] == 14
    assert report.notes == []
    found = lf.verify_gguf(path, model, CHARS, text=TEXT[:800])
    assert found.kl_of_rounding == 0  # the file holds the trained values
    assert found.kl_mean < 1e-6
    assert found.argmax_agreement == 1.0
    assert found.greedy_equal == found.greedy_tokens
    assert abs(found.perplexity_file / found.perplexity_model - 1) < 1e-3
    back, _ = lf.load(path)
    assert type(back) is BitNet
    assert back.config.act_quant == "group"
    with torch.no_grad():
        assert torch.equal(back(IDX), model(IDX))
    with torch.no_grad():  # the control
        other = copy.deepcopy(model)
        other.model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert lf.verify_gguf(path, other, CHARS, text=TEXT[:800]).kl_of_rounding > 1e-3


@pytest.mark.parametrize("profile", ["plain", "sub_norm"])
def test_training_per_token_differs_little(trained, profile, tmp_path):
    model, path = copy.deepcopy(trained[profile]), tmp_path / "model.gguf"
    model.config = model.config.replace(act_quant="token")
    for layer in bit_linears(model).values():
        layer.act_quant = "token"
    report = lf.export_gguf(model, CHARS, path, file_type="TQ2_0")
    assert report.tensors == {"TQ2_0": 14, "Q6_K": 1, "F32": report.tensors["F32"]}
    assert report.notes == ["llama.cpp rounds activations per 256 values here; in training they were rounded per token"]
    found = lf.verify_gguf(path, model, CHARS, text=TEXT[:800])
    assert found.kl_of_rounding is not None
    assert found.kl_of_rounding < 1e-3
    assert found.kl_mean < 1e-4


def test_other_file_types_hold_the_rounded_weights_and_say_what_differs(trained, tmp_path):
    model = trained["plain"]
    for file_type, words in [
        ("F16", "does not round activations with F16"),
        ("Q8_0", "TQ2_0 holds them exactly"),
        ("Q4_K_M", "TQ2_0 holds them exactly"),
    ]:
        path = tmp_path / f"{file_type}.gguf"
        report = lf.export_gguf(model, CHARS, path, file_type=file_type)
        assert len(report.notes) == 1
        assert words in report.notes[0]
        stored = read_gguf_tensors(path, read_gguf_header(path))["blk.1.ffn_up.weight"].read().float()
        exact = model.model.layers[1].mlp.up_proj.quantized_weight()
        torch.testing.assert_close(stored, exact, rtol=0, atol={"F16": 0.0, "Q8_0": 2e-5}.get(file_type, 5e-3))
        assert type(lf.load(path)[0]) is Llama  # which llama.cpp computes, too: floats
    found = lf.verify_gguf(tmp_path / "F16.gguf", model, CHARS, text=TEXT[:800])
    assert found.kl_mean < 1e-3


def test_embeddings_are_not_ternary_unless_asked(tmp_path):
    for profile, outputs in [
        ("plain", {"token_embd.weight": "Q6_K"}),
        ("untied", {"token_embd.weight": "Q6_K", "output.weight": "Q6_K"}),
    ]:
        lf.export_gguf(toy(profile), CHARS, tmp_path / "x.gguf", file_type="TQ2_0")
        types = {info.name: info.type_name for info in read_gguf_header(tmp_path / "x.gguf").tensors}
        assert {name: types[name] for name in outputs} == outputs
        assert {types[name] for name in types if name.startswith("blk.") and "norm" not in name} == {"TQ2_0"}
    lf.export_gguf(toy(), CHARS, tmp_path / "x.gguf", file_type="TQ2_0", tensor_types={"token_embd": "Q8_0"})
    assert {i.name: i.type_name for i in read_gguf_header(tmp_path / "x.gguf").tensors}["token_embd.weight"] == "Q8_0"


def test_a_float_model_rounded_to_ternary_blocks_is_no_bitnet(tmp_path):
    torch.manual_seed(0)
    twin = Llama(LlamaConfig.from_dict(SHAPE)).eval()
    lf.export_gguf(twin, CHARS, tmp_path / "x.gguf", file_type="TQ2_0")
    assert type(lf.load(tmp_path / "x.gguf")[0]) is Llama


def test_the_float_twin_with_sub_norms_runs_in_llama_cpp(tmp_path):
    torch.manual_seed(0)
    twin = BitNet(toy("sub_norm").config.float_twin()).eval()
    lf.export_gguf(twin, CHARS, tmp_path / "x.gguf", file_type="F32")
    assert lf.verify_gguf(tmp_path / "x.gguf", twin, CHARS, text=TEXT[:300]).passed
    back, _ = lf.load(tmp_path / "x.gguf")
    assert type(back) is BitNet
    assert not back.config.quantized
    assert torch.equal(back(IDX), twin(IDX))


def test_weights_take_2_06_bits_and_the_report_counts_the_whole_file(tmp_path):
    model = toy()
    report = lf.export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="TQ2_0")
    infos = [info for info in read_gguf_header(tmp_path / "x.gguf").tensors if info.type_name == "TQ2_0"]
    linears = sum(layer.weight.numel() for layer in bit_linears(model).values())
    assert 8 * sum(info.nbytes for info in infos) / linears == 2.0625
    assert report.bits_per_weight == 8 * (tmp_path / "x.gguf").stat().st_size / model.num_params()


# GPT


def test_a_ternary_gpt_is_exported_as_what_it_computes(tmp_path):
    config = GPTConfig(
        vocab_size=CHARS.vocab_size, n_embd=256, n_head=4, n_layer=2, block_size=256, ternary=True, act_quant="none"
    )
    torch.manual_seed(0)
    model = lf.GPT(config).eval()
    report = lf.export_hf(model, CHARS, tmp_path / "hf")
    assert len(report.notes) == 1
    assert "no ternary GPT-2" in report.notes[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDX).logits, model(IDX), rtol=0, atol=1e-5)
    lf.export_gguf(model, CHARS, tmp_path / "x.gguf", file_type="F16")
    assert lf.verify_gguf(tmp_path / "x.gguf", model, CHARS, text=TEXT[:300]).passed
    grouped = lf.GPT(config.replace(act_quant="group")).eval()
    report = lf.export_gguf(grouped, CHARS, tmp_path / "y.gguf", file_type="TQ2_0", tensor_types={"token_embd": "F32"})
    assert report.tensors["TQ2_0"] == 8
    assert report.notes == []
    back, _ = lf.load(tmp_path / "y.gguf")
    assert torch.equal(back.transformer.h[1].mlp.c_fc.weight, grouped.transformer.h[1].mlp.c_fc.quantized_weight())
    with pytest.raises(ConvertError, match="computes GPT-2 with GELU always.*'relu' would load and write nonsense"):
        lf.export_gguf(lf.GPT(config.replace(activation_function="relu")), CHARS, tmp_path / "z.gguf")
    relu = lf.GPT(config.replace(activation_function="relu")).eval()
    lf.export_hf(relu, CHARS, tmp_path / "relu")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "relu")
        torch.testing.assert_close(theirs(IDX).logits, relu(IDX), rtol=0, atol=1e-5)


# The command line


TOY = [
    "--preset",
    "bitnet-15m",
    "--tokenizer",
    "char",
    "--steps",
    "6",
    "--set",
    "hidden_size=256",
    "--set",
    "intermediate_size=256",
]
TOY += [
    "--set",
    "num_hidden_layers=1",
    "--set",
    "num_attention_heads=4",
    "--set",
    "num_key_value_heads=4",
    "--set",
    "device=cpu",
]
TOY += [
    "--set",
    "max_position_embeddings=16",
    "--set",
    "eval_batches=2",
    "--set",
    "sample_tokens=5",
    "--set",
    "warmup_steps=2",
]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "quijote.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "quijote.txt")


def test_a_ternary_run_and_its_twin(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", text, "--out", str(out), *TOY, "--set", "lr=1.5e-3", "--twin"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "twin.json").read_text())
    assert f"gap      ternary {report['ternary_val_loss']:.4f}, float {report['float_val_loss']:.4f}" in printed
    assert report["gap_nats"] == report["ternary_val_loss"] - report["float_val_loss"]
    twin, _ = open_model(tmp_path / "run-twin")
    ternary, _ = open_model(out)
    assert twin.config == ternary.config.float_twin()
    settings = [
        lf.TrainConfig.from_dict(__import__("yaml").safe_load((p / "config.yaml").read_text())["train"])
        for p in (out, tmp_path / "run-twin")
    ]
    assert settings[0].seed == settings[1].seed
    assert settings[0].max_steps == settings[1].max_steps
    assert settings[0].schedule == "linear"
    assert settings[1].schedule == "linear"
    assert (settings[0].lr, settings[1].lr) == (1.5e-3, 1e-3)
    # Once more: nothing is left to train, and the gap is the same.
    assert main(["train", "--resume", str(out), "--twin"]) == 0
    assert json.loads((out / "twin.json").read_text()) == report
    gguf = tmp_path / "x.gguf"
    assert main(["export", str(out), "--gguf", str(gguf), "--file-type", "TQ2_0"]) == 0
    bits = 8 * gguf.stat().st_size / ternary.num_params
    assert f"{bits:.2f} bits per weight with all that is in the file" in capsys.readouterr().out
    assert main(["export", str(out), "--hf", str(tmp_path / "hf"), "--ternary", "latent"]) == 0
    assert (
        "note: transformers rounds activations per token; in training they were rounded per 256 values"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--preset", "char-gpt-cpu", "--twin"],
            "--twin trains the float twin of a ternary model, and this gpt is none",
        ),
        ([*TOY, "--twin", "--set", "val_fraction=0"], "--twin compares validation losses, and val_fraction is 0"),
        ([*TOY, "--twin-lr", "1e-3"], "--twin-lr is the learning rate of --twin; add --twin"),
        ([*TOY, "--set", "hidden_size=300"], "hidden_size (300) must be a multiple of 256"),
        ([*TOY, "--set", "recipe=bit"], "must be one of 'standard', 'bitnet', got 'bit'"),
    ],
)
def test_a_wrong_call_trains_nothing(text, tmp_path, capsys, arguments, words):
    assert main(["train", text, "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_what_a_read_model_trains_on(tmp_path):
    """A packed model has latent weights again, and they move."""
    lf.export_hf(toy(act_quant="group"), CHARS, tmp_path / "hf")
    model, _ = lf.load(tmp_path / "hf")
    layer = model.model.layers[0].mlp.up_proj
    before, latent = layer.codes()[0], layer.weight.detach().clone()
    assert torch.equal(latent, latent_weight(*layer.codes()))
    for _ in toy_trainer(model=model, max_steps=20, seq_len=16, recipe="bitnet", warmup_steps=2):
        pass
    assert (layer.codes()[0] != before).any()
