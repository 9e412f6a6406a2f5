"""Adapters held against peft (forward, gradients, merged weights, training on 4 bits), and their laws."""

import copy
import math
import warnings
from functools import partial

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import nn

from llmforge import GPT, GPTConfig, Llama, LlamaConfig, load
from llmforge.errors import ConfigError
from llmforge.finetune import (
    LoRAConfig,
    NF4Config,
    adapter_names,
    apply_lora_,
    disabled_adapters,
    load_adapter_,
    lora_config,
    merge_lora_,
    quantize_,
    scale_adapter_,
    set_adapter_,
    unload_lora_,
)
from llmforge.nn import BitLinear, Linear4bit
from llmforge.nn.lora import LoRALinear, SavedModule, lora_layers, merged, row_lengths, saved_modules
from llmforge.training.loss import chunked_next_token_loss, next_token_loss

IDX = torch.tensor([[3, 9, 1, 14, 7, 7, 20, 2], [11, 5, 60, 33, 2, 41, 0, 8]])
TARGETS = IDX.roll(-1, 1)


def hf_llama(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes})).eval()


def hf_gpt2():
    torch.manual_seed(0)
    dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")
    config = transformers.GPT2Config(vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=4, **dropouts)
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, where an error with them would not show
            nn.init.normal_(parameter, std=0.1)
    return model


def own(hf, tmp_path, *, dtype=None):
    """The same model, read from what transformers writes."""
    hf.save_pretrained(tmp_path / "base")
    return load(tmp_path / "base", dtype=dtype)[0]


def filled_(model, *, seed=1, std=0.1):
    """Values of adapters and copies, ours or peft's, that change much: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            if "lora_B" in name or name.endswith(".B") or "modules_to_save" in name or ".copies." in name:
                parameter += noise
            elif "magnitude" in name:
                parameter *= 1 + noise
    return model


def with_peft(hf, **settings):
    defaults = dict(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, of fan_in_fan_out
        return filled_(peft.get_peft_model(hf, peft.LoraConfig(**{**defaults, **settings}))).eval()


def both(build, tmp_path, *, dtype=torch.float32, **settings):
    """peft's model and ours with the same base and the same adapter, which went through peft's files."""
    hf = build().to(dtype)
    model = own(hf, tmp_path, dtype=dtype)
    theirs = with_peft(hf, **settings)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter_(model, tmp_path / "adapter")
    return theirs, model.eval()


def trained(model):
    """Gradients, or values, of what trains: by the key that peft's file gives it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default", "").replace(".adapters", "")
            key = key.replace(".modules_to_save", "").replace(".copies", "")
            key = key.replace(".lora_A.weight", ".A").replace(".lora_B.weight", ".B")
            found[key.replace(".lora_magnitude_vector.weight", ".magnitude")] = parameter
    return found


def close(key, actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda message: f"{key}: {message}")


SETTINGS = {
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "head": dict(target_modules=["q_proj", "c_attn", "lm_head"]),
    "saved": dict(modules_to_save=["lm_head", "embed_tokens", "wte"]),
    "patterns": dict(
        rank_pattern={r"[qk]_proj|c_fc": 7}, alpha_pattern={r"1\.self_attn\.v_proj|h\.1\.attn\.c_proj": 3}
    ),
}


def settings_of(name, build):
    settings = dict(SETTINGS[name])
    present = {"q_proj", "lm_head", "embed_tokens"} if build is hf_llama else {"c_attn", "lm_head", "wte"}
    for key in ("target_modules", "modules_to_save"):
        if key in settings:
            settings[key] = [value for value in settings[key] if value in present]
    return settings


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("build", [hf_llama, hf_gpt2])
def test_forward_gradients_and_merged_weights_are_those_of_peft(build, name, tmp_path):
    theirs, model = both(build, tmp_path, **settings_of(name, build))
    out, ours = theirs(input_ids=IDX).logits, model(IDX)
    torch.testing.assert_close(ours, out, atol=1e-5, rtol=1e-5)
    with disabled_adapters(model):
        assert (model(IDX) - out).abs().max() > 1e-2  # negative control

    for logits in (out, ours):
        nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum").backward()
    expected, found = trained(theirs), trained(model)
    assert expected.keys() == found.keys()
    assert len(found) > 2
    for key, parameter in found.items():
        close(key, parameter.grad, expected[key].grad, atol=2e-5, rtol=1e-4)

    merge_lora_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged_theirs = theirs.merge_and_unload().state_dict()
    for key, weight in model.state_dict().items():
        expected_weight = merged_theirs[key]
        if build is hf_gpt2 and ".h." in key and weight.ndim == 2:
            expected_weight = expected_weight.T
        if name == "head" and key.endswith("wte.weight"):
            continue  # peft adds the head's adapter to the embedding that is tied to it: no model that anybody trained
        torch.testing.assert_close(weight, expected_weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(IDX), ours, atol=1e-5, rtol=1e-5)  # the law: merged == unmerged


@pytest.mark.parametrize(
    "settings", [{}, dict(use_dora=True), dict(modules_to_save=["lm_head"])], ids=["lora", "dora", "saved"]
)
@pytest.mark.parametrize("build", [hf_llama, hf_gpt2])
def test_merged_bfloat16_weights_are_those_of_peft_to_the_byte(build, settings, tmp_path):
    theirs, model = both(build, tmp_path, dtype=torch.bfloat16, **settings)
    base = {key: value.clone() for key, value in unloaded(model).state_dict().items()}
    merge_lora_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.merge_and_unload().state_dict()
    changed = 0
    for key, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        reference = expected[key].T if build is hf_gpt2 and ".h." in key and weight.ndim == 2 else expected[key]
        if (
            settings.get("use_dora") and build is hf_gpt2
        ):  # peft sums a row's length over a transposed matrix, in another order
            torch.testing.assert_close(weight, reference, atol=0, rtol=2**-7)
        else:
            assert torch.equal(weight, reference), key
        changed += not torch.equal(weight, base[key])
    assert changed >= 8  # of the matrices in two layers


def unloaded(model):
    model = copy.deepcopy(model)
    unload_lora_(model)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_falls_where_it_does_in_peft(use_dora, tmp_path):
    theirs, model = both(hf_gpt2, tmp_path, lora_dropout=0.5, use_dora=use_dora)
    torch.manual_seed(7)
    out = theirs.train()(input_ids=IDX).logits
    torch.manual_seed(7)
    ours = model.train()(IDX)
    torch.testing.assert_close(ours, out, atol=1e-5, rtol=1e-5)
    for logits in (out, ours):
        logits.square().sum().backward()
    expected = trained(theirs)
    for key, parameter in trained(model).items():
        close(key, parameter.grad, expected[key].grad, atol=1e-4, rtol=1e-4)
    assert (model.eval()(IDX) - ours).abs().max() > 1e-2


def test_several_adapters_are_switched_added_and_scaled_as_in_peft(tmp_path):
    hf = hf_llama()
    model = own(hf, tmp_path)
    theirs = with_peft(hf)
    theirs.add_adapter(
        "other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    filled_(theirs, seed=2)
    theirs.save_pretrained(tmp_path / "adapters")
    load_adapter_(model, tmp_path / "adapters", name="default")
    load_adapter_(model, tmp_path / "adapters" / "other", name="other")
    assert adapter_names(model) == ["default", "other"]
    base = unloaded(model)(IDX)
    results = []
    for names in (["default"], ["other"], ["default", "other"]):
        theirs.base_model.set_adapter(names)
        assert set_adapter_(model, names if len(names) > 1 else names[0])
        results.append(model(IDX))
        torch.testing.assert_close(results[-1], theirs(input_ids=IDX).logits, atol=1e-5, rtol=1e-5)
    assert all((left - right).abs().max() > 1e-2 for left, right in zip(results, [base, *results[:-1]], strict=True))
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("other", 0.3)
    assert len(scale_adapter_(model, 0.3, name="other")) == 4
    scaled = model(IDX)
    torch.testing.assert_close(scaled, theirs(input_ids=IDX).logits, atol=1e-5, rtol=1e-5)
    merge_lora_(model)
    torch.testing.assert_close(model(IDX), scaled, atol=1e-5, rtol=1e-5)
    expected = theirs.merge_and_unload(adapter_names=["default", "other"]).state_dict()
    torch.testing.assert_close(dict(model.state_dict()), {key: expected[key] for key in model.state_dict()})


def test_ten_steps_on_a_4_bit_base_have_the_losses_of_peft_and_bitsandbytes(tmp_path):
    hf = hf_llama(hidden_size=64, intermediate_size=128)
    model = own(hf, tmp_path)
    quantize_(model, NF4Config())
    for name, layer in list(hf.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                quant_type="nf4",
                compress_statistics=True,
                compute_dtype=torch.float32,
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            hf.set_submodule(name, new.to("cpu"))
    theirs = peft.get_peft_model(
        hf, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter_(model, tmp_path / "adapter")
    losses = []
    for each, logits_of in ((theirs, lambda: theirs(input_ids=IDX).logits), (model, lambda: model(IDX))):
        each.train()
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        run = []
        for _ in range(10):
            loss = nn.functional.cross_entropy(logits_of().flatten(0, 1), TARGETS.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[1][-1] < losses[1][0] - 0.5


def test_a_copy_of_a_tied_embedding_is_no_longer_tied_as_in_peft(tmp_path):
    for modules in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        folder = tmp_path / "-".join(modules)
        theirs, model = both(lambda: hf_llama(tie_word_embeddings=True), folder, modules_to_save=modules)
        out = model(IDX)
        torch.testing.assert_close(out, theirs(input_ids=IDX).logits, atol=1e-5, rtol=1e-5)
        assert model.config.tie_word_embeddings
        merge_lora_(model)
        torch.testing.assert_close(model(IDX), out, atol=1e-5, rtol=1e-5)
        assert not model.config.tie_word_embeddings
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model = own(hf_llama(tie_word_embeddings=True), tmp_path)
    apply_lora_(model, LoRAConfig(r=2))
    merge_lora_(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Laws


def llama(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=65, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return Llama(LlamaConfig(**{**shape, "num_key_value_heads": 2, "max_position_embeddings": 32, **changes}))


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=32), **changes}))


ADAPTERS = [
    LoRAConfig(r=4),
    LoRAConfig(r=80, lora_alpha=80),  # above every width
    LoRAConfig(r=4, use_dora=True),
    LoRAConfig(r=4, modules_to_save=("lm_head",)),
    LoRAConfig(r=4, target_modules=r".*\.[01]\..*(q_proj|c_fc|down_proj)"),
]


@pytest.mark.parametrize(
    "build", [llama, gpt, lambda: quantized(llama()), lambda: llama().bfloat16()], ids=["llama", "gpt", "nf4", "bf16"]
)
@pytest.mark.parametrize("config", ADAPTERS, ids=["lora", "wide", "dora", "saved", "regex"])
def test_a_new_adapter_changes_nothing_and_a_filled_one_can_be_switched_off_merged_and_removed(build, config):
    model = build().eval()
    # Of the dtype, since weights are rounded once more by a merge, results at each layer.
    tolerance = 0.05 if model.lm_head.weight.dtype is torch.bfloat16 else 2e-5
    base = model(IDX)
    apply_lora_(model, config)
    at_first = model(IDX)
    if config.use_dora:
        torch.testing.assert_close(at_first, base, atol=tolerance, rtol=tolerance)
    else:
        assert torch.equal(at_first, base)
    tuned = filled_(model)(IDX)
    assert tuned.dtype is base.dtype
    assert (tuned - base).abs().max() > 0.1
    with disabled_adapters(model):
        assert torch.equal(model(IDX), base)
        with disabled_adapters(model):
            pass
    assert torch.equal(model(IDX), tuned)
    assert torch.equal(unloaded(model)(IDX), base)
    merge_lora_(model)
    torch.testing.assert_close(model(IDX), tuned, atol=tolerance, rtol=tolerance)
    assert not any(isinstance(m, (LoRALinear, SavedModule, Linear4bit)) for m in model.modules())
    plain = gpt() if isinstance(model, GPT) else llama()
    assert model.state_dict().keys() == plain.state_dict().keys()


def quantized(model):
    quantize_(model)
    return model


def test_an_error_in_an_adapter_does_not_leave_it_switched_off():
    model = filled_(applied(llama()))
    tuned = model(IDX)
    with pytest.raises(KeyboardInterrupt), disabled_adapters(model):
        raise KeyboardInterrupt
    assert torch.equal(model(IDX), tuned)


def applied(model, config=None, **options):
    apply_lora_(model, config or LoRAConfig(r=4), **options)
    return model


def test_a_4_bit_layer_becomes_dense_and_nothing_is_rounded_twice():
    model = quantized(llama().bfloat16())
    apply_lora_(model, LoRAConfig(r=4, target_modules=("q_proj",)))
    filled_(model)
    layer = model.model.layers[0].self_attn.q_proj
    low = layer.adapter("default")
    expected = (layer.base.dequantize() + (low.B @ low.A) * low.scale).to(torch.bfloat16)
    without = model.model.layers[0].mlp.up_proj.dequantize(torch.bfloat16)
    names = merge_lora_(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, without)
    assert len(names) == 14
    model = quantized(llama())
    apply_lora_(model, LoRAConfig(r=4))
    merge_lora_(model, dtype=torch.float16)
    assert model.model.layers[1].mlp.up_proj.weight.dtype is torch.float16


def test_only_the_adapter_trains_and_switching_moves_that_along():
    model = applied(llama(), LoRAConfig(r=4, target_modules=("q_proj",), modules_to_save=("norm",)))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 2 + 1
    assert all(".adapters.default." in name or name == "model.norm.copies.default.weight" for name in names)
    apply_lora_(model, LoRAConfig(r=2, target_modules=("v_proj",)), name="second")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(".adapters.second." in name for name in names)
    assert lora_layers(model)["model.layers.0.self_attn.q_proj"].active == ()
    set_adapter_(model, "default")
    assert model.model.norm.copies["default"].weight.requires_grad
    set_adapter_(model, None)
    assert model.model.norm.copies["default"].weight.requires_grad


def first_of(layer, x, *parameters):
    return layer(x)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    for use_dora in (False, True):
        layer = LoRALinear(nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False))
        low = layer.add("default", r=2, lora_alpha=3.0, use_dora=use_dora).double()
        nn.init.normal_(low.B)
        layer.active = ("default",)
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        if use_dora:  # of A and B the gradient is not the derivative: the lengths count as constants
            torch.autograd.gradcheck(partial(first_of, layer), (x, low.magnitude))
        else:
            torch.autograd.gradcheck(partial(first_of, layer), (x, low.A, low.B))


def kept_bytes(layer, x, **autocast):
    """Bytes that the graph of a layer keeps, without parameters and without x."""
    held, known = {}, {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", **autocast):
        y = layer(x)
    return sum(held.values()), y


@pytest.mark.parametrize("base", ["bf16", "nf4"])
@pytest.mark.parametrize("autocast", [dict(enabled=False), dict(dtype=torch.bfloat16)], ids=["plain", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_backward_pass_needs_no_more_than_the_input_and_r_values_per_token(base, autocast, dropout):
    linear = nn.Linear(256, 512, bias=False).bfloat16().requires_grad_(False)
    layer = LoRALinear(linear if base == "bf16" else Linear4bit.from_weight(linear.weight, None, NF4Config()))
    layer.add("default", r=8, lora_alpha=8, dropout=dropout)
    layer.active = ("default",)
    tokens = 64
    x = torch.randn(tokens, 256).bfloat16().requires_grad_()
    kept, y = kept_bytes(layer, x, **autocast)
    assert y.dtype is torch.bfloat16
    assert kept == tokens * 8 * (2 if "dtype" in autocast else 4) + (tokens * 256 if dropout else 0)
    y.float().sum().backward()
    low = layer.adapter("default")
    assert low.A.grad.dtype is low.B.grad.dtype is torch.float32
    assert x.grad.dtype is torch.bfloat16


def test_autocast_computes_what_casting_by_hand_does():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 8).requires_grad_(False))
    low = layer.add("default", r=4, lora_alpha=8)
    nn.init.normal_(low.B)
    layer.active = ("default",)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, base = layer(x), layer.base(x)
    assert y.dtype is torch.bfloat16
    hidden = x.bfloat16() @ low.A.bfloat16().T
    torch.testing.assert_close(y, base + 2 * (hidden @ low.B.bfloat16().T), atol=0.05, rtol=0.02)


def test_a_loss_in_chunks_sees_adapters_and_copies_of_the_head():
    for config in (
        LoRAConfig(r=4, target_modules=("lm_head", "q_proj")),
        LoRAConfig(r=4, modules_to_save=("lm_head",)),
    ):
        model = filled_(applied(llama(), config))
        gradients = []
        for loss in (next_token_loss, chunked_next_token_loss):
            total, _ = loss(model, (IDX, TARGETS))
            total.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
            model.zero_grad()
        torch.testing.assert_close(gradients[0], gradients[1])


def test_a_compiled_layer_computes_the_same():
    layer = LoRALinear(nn.Linear(16, 8).requires_grad_(False))
    nn.init.normal_(layer.add("default", r=4, lora_alpha=8).B)
    layer.active = ("default",)
    x = torch.randn(5, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = layer(x)
    torch.testing.assert_close(compiled(x), y)
    y.sum().backward()
    expected = layer.adapter("default").A.grad.clone()
    layer.zero_grad()
    compiled(x).sum().backward()
    torch.testing.assert_close(layer.adapter("default").A.grad, expected)


def test_copies_train_in_float32_over_a_16_bit_model():
    model = applied(llama().bfloat16(), LoRAConfig(r=2, modules_to_save=("embed_tokens", "lm_head", "norm")))
    base = unloaded(model)(IDX)
    assert torch.equal(model(IDX), base)
    assert {copy.dtype for m in saved_modules(model).values() for copy in m.copies.parameters()} == {torch.float32}
    model(IDX).float().sum().backward()
    assert all(copy.grad is not None for m in saved_modules(model).values() for copy in m.copies.parameters())
    with torch.no_grad():
        model.lm_head.copies["default"].weight += 1.0
    merge_lora_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, (llama().lm_head.weight.bfloat16().float() + 1).bfloat16())


def test_the_users_own_layers_get_adapters_and_are_merged_only_where_a_matrix_can_say_it():
    class Named(nn.Linear):
        pass

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Named(8, 8), nn.ReLU(), Doubled(8, 4))
    assert apply_lora_(model, LoRAConfig(r=2)) == ["0", "2"]
    filled_(model)
    x = torch.randn(3, 8)
    y = model(x)
    hidden, low = model[1](model[0](x)), model[2].adapter("default")
    torch.testing.assert_close(y, model[2].base(hidden) + low.scale * hidden @ low.A.T @ low.B.T)
    with pytest.raises(ConfigError, match=r"^2: Doubled computes something of its own in forward"):
        merge_lora_(model)
    assert torch.equal(model(x), y)  # nothing was changed
    ternary = nn.Sequential(BitLinear(256, 8), BitLinear(8, 4, act_quant="none"))
    apply_lora_(ternary, LoRAConfig(r=2, target_modules=("1",)))
    y = filled_(ternary)(torch.ones(1, 256))
    merge_lora_(ternary)
    torch.testing.assert_close(ternary(torch.ones(1, 256)), y)
    apply_lora_(ternary, LoRAConfig(r=2, target_modules=("0",)))
    with pytest.raises(ConfigError, match="a BitLinear rounds its input too"):
        merge_lora_(ternary)


def test_merged_rows_depend_on_their_rows_alone():
    torch.manual_seed(0)
    weight, A, B, magnitude = torch.randn(128, 32), torch.randn(4, 32), torch.randn(128, 4), torch.rand(128)
    for length in (None, magnitude):
        whole = merged(weight, A, B, 0.5, length)
        half = merged(weight[64:], A, B[64:], 0.5, None if length is None else length[64:])
        torch.testing.assert_close(whole[64:], half)
    expected = (weight + 0.5 * B @ A).norm(dim=1)
    torch.testing.assert_close(row_lengths(weight, A, B, 0.5), expected)
    torch.testing.assert_close(merged(weight, A, B, 0.5, magnitude).norm(dim=1), magnitude)


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert LoRAConfig(r=64, lora_alpha=16).scale == 0.25
    assert LoRAConfig(r=64, lora_alpha=16, use_rslora=True).scale == 2
    model = applied(llama(), LoRAConfig(r=64, lora_alpha=16, use_rslora=True))
    assert {layer.adapter("default").scale for layer in lora_layers(model).values()} == {2.0}


def test_settings_are_found_again_in_the_model():
    config = LoRAConfig(
        r=3, lora_alpha=5, lora_dropout=0.1, target_modules=("down_proj", "q_proj"), modules_to_save=("lm_head",)
    )
    assert lora_config(applied(llama(), config)) == config
    some_of_them = LoRAConfig(r=2, target_modules=r"model\.layers\.1\..*q_proj")
    assert lora_config(applied(llama(), some_of_them)).target_modules == ("model.layers.1.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(target_modules=("q_prj",)), r"no linear layer is named 'q_prj' .* there are down_proj, gate_proj"),
        (dict(target_modules="q_proj"), "no linear layer is named 'q_proj' .* a single text is a regular expression"),
        (dict(target_modules=("embed_tokens",)), "no linear layer is named 'embed_tokens'"),
        (dict(target_modules="(q_proj"), "is no regular expression"),
        (dict(target_modules=()), "must name layers"),
        (dict(modules_to_save=("head",)), r"no module is named 'head' \(modules_to_save\); there are .*lm_head"),
        (dict(modules_to_save=("q_proj",)), "cannot have an adapter .* and be trained whole"),
        (dict(modules_to_save=("self_attn",)), "holds layers that get adapters"),
        (dict(target_modules=("q_proj",), modules_to_save=("mlp", "up_proj")), "is part of another module"),
        (dict(r=0), r"r \(0\) must be at least 1"),
        (dict(lora_alpha=0), r"lora_alpha \(0\) must be above 0"),
        (dict(lora_alpha=math.nan), r"lora_alpha \(nan\) must be above 0"),
        (dict(lora_dropout=1.0), r"lora_dropout \(1.0\) must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_applied_is_refused_and_nothing_is_changed(config, message):
    model = llama()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        apply_lora_(model, LoRAConfig(**config))
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_that_are_not_there_or_cannot_be_added_are_refused():
    model = llama()
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_lora_(model)
    apply_lora_(model, LoRAConfig(r=2, modules_to_save=("lm_head",)))
    with pytest.raises(ConfigError, match="has an adapter 'default' already"):
        apply_lora_(model, LoRAConfig(r=2))
    with pytest.raises(ConfigError, match="must be text without dots"):
        apply_lora_(model, LoRAConfig(r=2), name="a.b")
    with pytest.raises(ConfigError, match="has no adapter 'tutor'; it has default"):
        set_adapter_(model, "tutor")
    with pytest.raises(ConfigError, match=r"factor \(nan\)"):
        scale_adapter_(model, math.nan)
    apply_lora_(model, LoRAConfig(r=2, use_dora=True), name="dora")
    apply_lora_(model, LoRAConfig(r=2, modules_to_save=("lm_head",), target_modules=("q_proj",)), name="third")
    with pytest.raises(ConfigError, match="a DoRA adapter scales the whole layer"):
        set_adapter_(model, ["default", "dora"])
    with pytest.raises(
        ConfigError, match="lm_head has copies of default and third|lm_head has copies of default, third"
    ):
        set_adapter_(model, ["default", "third"])
    set_adapter_(model, None)
    with pytest.raises(ConfigError, match="no adapter is active"):
        merge_lora_(model)
    with pytest.raises(ConfigError, match="holds a Linear4bit and cannot be trained whole"):
        apply_lora_(quantized(llama()), LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=("mlp",)))
