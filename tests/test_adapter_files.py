"""Adapters on disk: peft reads ours and we read peft's; what is incomplete or not understood is refused with its reason."""

import json
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import IDX, close, filled_, gpt, hf_gpt2, hf_llama, llama, own, quantized, trained, unloaded
from toy import toy_tokenizer

from llmforge import CheckpointError, ConfigError
from llmforge.finetune import (
    AdapterFiles,
    LoRAConfig,
    NF4Config,
    apply_lora_,
    is_adapter_folder,
    load_adapter_,
    lora_config,
    merge_lora_,
    quantize_,
    read_adapter,
    save_adapter,
)
from llmforge.finetune.adapter_files import Rounding
from llmforge.finetune.lora import LayerSettings, attach_
from llmforge.formats.atomic import WriteError

OURS = {
    "lora": LoRAConfig(r=4, lora_alpha=6),
    "rslora": LoRAConfig(r=4, lora_alpha=6, use_rslora=True),
    "dora": LoRAConfig(r=4, lora_alpha=6, use_dora=True),
    "regex": LoRAConfig(r=4, lora_alpha=6, target_modules=r".*\.1\..*(q_proj|up_proj|c_attn|mlp.c_proj)"),
    "saved": LoRAConfig(r=4, lora_alpha=6, modules_to_save=("lm_head",)),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("build", [hf_llama, hf_gpt2])
def test_peft_loads_ours_and_computes_the_same(build, name, tmp_path):
    hf = build()
    model = own(hf, tmp_path)
    apply_lora_(model, OURS[name])
    filled_(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing or not expected, of fan_in_fan_out
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDX).logits, model(IDX), atol=1e-5, rtol=1e-5)
        assert (model(IDX) - unloaded(model)(IDX)).abs().max() > 1e-2  # negative control
    # And back, as peft writes it.
    theirs.save_pretrained(tmp_path / "again")
    again = own(build(), tmp_path)
    load_adapter_(again, tmp_path / "again")
    assert torch.equal(again(IDX), model(IDX))
    for key, parameter in trained(again).items():
        close(key, parameter, trained(model)[key], atol=0, rtol=0)


def test_ranks_and_alphas_of_single_layers_reach_peft(tmp_path):
    hf = hf_llama()
    model = own(hf, tmp_path)
    layers = {
        "model.layers.0.self_attn.q_proj": LayerSettings(2, 8.0),
        "model.layers.0.mlp.up_proj": LayerSettings(4, 3.5),
        "model.layers.1.mlp.up_proj": LayerSettings(4, 8.0),
    }
    for use_rslora in (False, True):
        name = f"rs_{use_rslora}"
        attach_(model, LoRAConfig(use_rslora=use_rslora), layers, [], name=name)
        filled_(model)
        folder = save_adapter(model, tmp_path / name, name=name)
        values = json.loads((folder / "adapter_config.json").read_text())
        assert (values["r"], values["lora_alpha"]) == (4, 8)
        assert values["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
        assert values["alpha_pattern"] == {"model.layers.0.mlp.up_proj": 3.5}
        theirs = peft.PeftModel.from_pretrained(hf_llama(), folder)
        torch.testing.assert_close(theirs(input_ids=IDX).logits, model(IDX), atol=1e-5, rtol=1e-5)
        again = own(hf_llama(), tmp_path)
        load_adapter_(again, folder, name=name)
        assert torch.equal(again(IDX), model(IDX))
        save_adapter(again, tmp_path / "twice", name=name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "twice" / file).read_bytes() == (folder / file).read_bytes()


def test_a_module_whose_name_ends_others_is_written_so_that_peft_means_it_alone(tmp_path):
    folder = saved(tmp_path)  # "norm", of which peft would think at "input_layernorm" as well
    assert read_adapter(folder).config.modules_to_save == ("model.norm",)
    theirs = peft.get_peft_model(
        hf_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    )
    filled_(theirs).save_pretrained(tmp_path / "all")
    model = own(hf_llama(), tmp_path)
    assert len(load_adapter_(model, tmp_path / "all")) == 2 + 5
    torch.testing.assert_close(model(IDX), theirs(input_ids=IDX).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_in_16_bits_is_read_as_peft_reads_it(tmp_path):
    hf = hf_llama()
    model = own(hf, tmp_path)
    folder = saved(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    load_adapter_(model, folder)
    theirs = peft.PeftModel.from_pretrained(hf, folder)
    torch.testing.assert_close(model(IDX), theirs(input_ids=IDX).logits, atol=1e-5, rtol=1e-5)


def test_all_keys_of_the_config_are_written(tmp_path):
    model = gpt()
    apply_lora_(model, LoRAConfig(r=4, lora_dropout=0.1))
    folder = save_adapter(model, tmp_path / "adapter", base_model="gpt2")
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "gpt2",
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "bias": "none",
        "fan_in_fan_out": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    assert is_adapter_folder(folder)
    assert not is_adapter_folder(tmp_path)
    adapter = read_adapter(folder)
    assert adapter.config == lora_config(model)
    assert (adapter.base_model, adapter.rounding) == ("gpt2", None)


def test_the_rounding_of_the_base_is_written_down(tmp_path):
    model = llama()
    quantize_(model, NF4Config(block_size=128, double_quant=False, skip=("lm_head", "model.layers.0.mlp.up_proj")))
    apply_lora_(model, LoRAConfig(r=2, target_modules=("q_proj", "up_proj")))
    rounding = read_adapter(save_adapter(model, tmp_path / "adapter")).rounding
    assert rounding == Rounding(
        NF4Config(block_size=128, double_quant=False, skip=("lm_head", "model.layers.0.mlp.up_proj")), rounding.modules
    )
    again = llama()
    assert quantize_(again, rounding.nf4) == list(rounding.modules)
    assert len(rounding.modules) == 13


def test_saving_replaces_an_adapter_but_nothing_else(tmp_path):
    model = llama()
    apply_lora_(model, LoRAConfig(r=2))
    folder = save_adapter(model, tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").read_bytes()
    filled_(model)
    save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(WriteError, match="exists and is not empty"):
        save_adapter(model, tmp_path / "mine")
    with pytest.raises(ConfigError, match="has no adapter 'tutor'; it has default"):
        save_adapter(model, tmp_path / "new", name="tutor")
    assert not (tmp_path / "new").exists()


# Checkpoints of tuning runs


@pytest.mark.parametrize(
    "config", [LoRAConfig(r=4, modules_to_save=("lm_head",)), LoRAConfig(r=4, use_dora=True, use_rslora=True)]
)
def test_a_resumed_run_has_the_values_of_the_interrupted_one_to_the_bit(config, tmp_path):
    def step(model, optimizer, n):
        for _ in range(n):
            torch.nn.functional.cross_entropy(model(IDX).flatten(0, 1), IDX.roll(-1, 1).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        model = quantized(llama())
        apply_lora_(model, config)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    files = AdapterFiles("base")
    model, optimizer = fresh()
    step(model, optimizer, 3)
    (tmp_path / "step").mkdir()
    write = files.capture(model, toy_tokenizer(), torch.clone)
    state = optimizer.state_dict()
    saved_state = {
        "state": {k: {n: t.clone() for n, t in v.items()} for k, v in state["state"].items()},
        "param_groups": state["param_groups"],
    }
    step(model, optimizer, 2)
    write(tmp_path / "step")  # what was captured, not what has become of it

    torch.manual_seed(5)  # other values of A
    resumed, its_optimizer = fresh()
    parameters = [p for p in resumed.parameters() if p.requires_grad]
    files.load_(tmp_path / "step", resumed)
    assert all(
        before is after for before, after in zip(parameters, its_optimizer.param_groups[0]["params"], strict=True)
    )
    its_optimizer.load_state_dict(saved_state)
    step(resumed, its_optimizer, 2)
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    adapter = read_adapter(tmp_path / "step")
    assert adapter.base_model == "base"
    assert adapter.rounding is not None
    assert (tmp_path / "step" / "tokenizer.json").exists() or any((tmp_path / "step").glob("*vocab*"))


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    model = llama()
    apply_lora_(model, LoRAConfig(r=4))
    AdapterFiles().capture(model, None, lambda tensor: tensor)(folder)
    with pytest.raises(CheckpointError, match="has no adapter 'default' to load"):
        AdapterFiles().load_(folder, llama())
    for config, message in (
        (LoRAConfig(r=8), "holds another adapter .* resume with the settings"),
        (LoRAConfig(r=4, lora_alpha=7), "has the scale 8 for .*, the model 1.75"),
        (LoRAConfig(r=4, target_modules=("q_proj",)), "holds another adapter than the model has"),
        (LoRAConfig(r=4, modules_to_save=("lm_head",)), "holds another adapter than the model has: lm_head.weight"),
    ):
        other = llama()
        apply_lora_(other, config)
        with pytest.raises(CheckpointError, match=message):
            AdapterFiles().load_(folder, other)


# Folders that are not in order


def saved(tmp_path, config=None):
    model = own(hf_llama(), tmp_path)
    apply_lora_(
        model, config or LoRAConfig(r=4, lora_alpha=6, target_modules=("q_proj", "up_proj"), modules_to_save=("norm",))
    )
    return save_adapter(filled_(model), tmp_path / "adapter")


def config_with(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def tensors_with(change):
    def rewrite(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    return rewrite


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
NORM = "base_model.model.model.norm.weight"


def renamed(old, new):
    return tensors_with(lambda tensors: tensors.update({new: tensors.pop(old)}))


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut_off(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


MALFORMED = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter: it has no adapter_config.json"),
    "config is no JSON": (text("adapter_config.json", "{"), "adapter_config.json is not valid JSON"),
    "config is a list": (text("adapter_config.json", "[]"), "must hold a JSON object, not list"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors; copy"),
    "a pickle": (pickled, r"adapter_model.bin only, a pickle .*save_pretrained"),
    "cut off": (cut_off, "adapter_model.safetensors is cut off"),
    "another kind": (config_with(peft_type="IA3"), "peft_type is 'IA3'; only adapters of the type 'LORA'"),
    "no kind": (config_with(peft_type=...), "peft_type is None"),
    "no target_modules": (config_with(target_modules=...), "has no target_modules; it is damaged"),
    "no r": (config_with(r=...), "has no r; it is damaged"),
    "r is text": (config_with(r="large"), "LoRAConfig.r must be a whole number, got 'large'"),
    "r is negative": (config_with(r=-4), r"r \(-4\) must be at least 1"),
    "another r": (config_with(r=8), r"has A \(4, 32\) and B \(32, 4\), which must be .* with r = 8"),
    "alpha is infinite": (config_with(lora_alpha=float("inf")), r"lora_alpha \(inf\) must be above 0"),
    "dropout of 1": (config_with(lora_dropout=1), r"lora_dropout \(1.0\) must be at least 0 and below 1"),
    "trained biases": (config_with(bias="all"), "sets bias to 'all': trained biases .* merge the adapter with peft"),
    "biases of B": (config_with(lora_bias=True), "sets lora_bias to True"),
    "some layers": (config_with(layers_to_transform=[0]), r"sets layers_to_transform to \[0\]"),
    "some tokens": (config_with(trainable_token_indices=[1, 2]), r"sets trainable_token_indices to \[1, 2\]"),
    "tied copies": (config_with(ensure_weight_tying=True), "sets ensure_weight_tying to True"),
    "bare parameters": (config_with(target_parameters=["experts.w"]), "sets target_parameters"),
    "PiSSA": (config_with(init_lora_weights="pissa"), "init_lora_weights to 'pissa', which changes the base's weights .* convert it"),
    "LoftQ": (config_with(init_lora_weights="loftq"), "init_lora_weights to 'loftq'"),
    "a later feature": (config_with(use_qalora=True), "sets 'use_qalora' to True, which is not known here"),
    "an endless expression": (config_with(target_modules="((([a-z_.0-9])*)*)*X"), "repeats a group .* can take forever"),
    "an endless rank": (config_with(rank_pattern={"(l|la|a|y)+X": 4}), "repeats a group .* can take forever"),
    "no expression": (config_with(target_modules="(q_proj"), "is no regular expression"),
    "a long expression": (config_with(target_modules="a" * 5000), "has 5,000 characters; at most 1,000"),
    "a target without tensors": (config_with(target_modules=["q_proj", "up_proj", "k_proj"]), "no tensors for k_proj, which target_modules"),
    "tensors without a target": (config_with(target_modules=["q_proj"]), r"has tensors for model.layers.0.mlp.up_proj.*does not name"),
    "a pattern of text": (config_with(rank_pattern={"q_proj": "4"}), "rank_pattern must map names of layers to numbers"),
    "a pattern of a list": (config_with(alpha_pattern=[4]), r"alpha_pattern must map names of layers to numbers above 0, got \[4\]"),
    "a module without tensors": (config_with(modules_to_save=["norm", "lm_head"]), "no tensors for lm_head, which modules_to_save"),
    "a base of numbers": (config_with(base_model_name_or_path=5), "base_model_name_or_path must be text, got 5"),
    "no B": (tensors_with(lambda t: t.pop(B)), "q_proj' has no B; copy or write"),
    "no A": (tensors_with(lambda t: t.pop(A)), "q_proj' has no A; copy or write"),
    "no prefix": (renamed(A, A.removeprefix("base_model.model.")), "keys that are no part of a LoRA adapter .* base_model.model.<layer>"),
    "a name of an adapter": (renamed(A, A.replace(".weight", ".default.weight")), r"no part of a LoRA adapter .*lora_A\.default"),
    "an embedding's": (renamed(A, A.replace("lora_A.weight", "lora_embedding_A")), "no part of a LoRA adapter"),
    "a module not named": (config_with(modules_to_save=None), "no part of a LoRA adapter .*model.norm.weight"),
    "a magnitude": (
        tensors_with(lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)})),
        r"has a magnitude \(DoRA\), but adapter_config.json has no use_dora",
    ),
    "no magnitude": (config_with(use_dora=True), "has no magnitude; copy or write"),
    "integers": (tensors_with(lambda t: t.update({A: t[A].int()})), "is torch.int32, but adapters are floats"),
    "a vector": (tensors_with(lambda t: t.update({A: t[A].flatten()})), r"has A \(128,\)"),
    "nothing": (tensors_with(dict.clear), "has no pair of lora_A and lora_B|has no tensors"),
    "base.json damaged": (text("base.json", '{"base_model": 5}'), "base.json: it must hold 'base_model' .* remove the file"),
    "base.json of other keys": (text("base.json", '{"rounding": {"nf4": {}}}'), "'rounding' must hold 'nf4' and 'modules'"),
    "base.json of a bad block": (
        text("base.json", '{"rounding": {"nf4": {"block_size": 60}, "modules": []}}'),
        "base.json: .*block_size",
    ),
}  # fmt: skip

MISFITS = {
    "another layer": (
        tensors_with(
            lambda t: [t.update({k.replace("layers.1.", "layers.7."): t.pop(k)}) for k in list(t) if "layers.1." in k]
        ),
        "it has tensors for model.layers.7.* and the model no such linear layer",
    ),
    "a layer is missing": (
        tensors_with(lambda t: [t.pop(key) for key in list(t) if "layers.1.self_attn" in key]),
        "target_modules names model.layers.1.self_attn.q_proj, and the file has no tensors",
    ),
    "another width": (
        tensors_with(lambda t: t.update({A: torch.ones(4, 40)})),
        r"q_proj is \(32, 40\) \(out, in\) there and \(32, 32\) in the model",
    ),
    "another module": (tensors_with(lambda t: t.update({NORM: torch.ones(40)})), r"model.norm.weight is \(40,\) there"),
    "a bias more": (
        tensors_with(lambda t: t.update({NORM.replace("weight", "bias"): torch.ones(32)})),
        "model.norm.bias is .* and not in the model",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_folder_is_refused_with_the_reason(name, tmp_path):
    folder = saved(tmp_path)
    read_adapter(folder)  # in order before
    change, message = MALFORMED[name]
    change(folder)
    with pytest.raises(CheckpointError) as refusal:
        read_adapter(folder)
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert "adapter" in str(refusal.value)  # the folder or file


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(name, tmp_path):
    folder = saved(tmp_path)
    change, message = MISFITS[name]
    change(folder)
    model = own(hf_llama(), tmp_path)
    keys = list(model.state_dict())
    with pytest.raises(CheckpointError) as refusal:
        load_adapter_(model, folder)
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert list(model.state_dict()) == keys


def test_a_head_of_another_base_is_noticed(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it saves the head as well
        theirs = peft.get_peft_model(
            hf_llama(), peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
        )
        filled_(theirs).save_pretrained(tmp_path / "adapter")
    assert list(read_adapter(tmp_path / "adapter").base) == ["lm_head.weight"]
    model = own(hf_llama(), tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    with pytest.raises(CheckpointError, match="holds lm_head.weight of its base, which differs from the model's"):
        load_adapter_(model, tmp_path / "adapter")
    with torch.no_grad():
        model.lm_head.weight.copy_(hf_llama().lm_head.weight)
    load_adapter_(model, tmp_path / "adapter")
    torch.testing.assert_close(model(IDX), theirs(input_ids=IDX).logits, atol=1e-5, rtol=1e-5)
    merge_lora_(model)
