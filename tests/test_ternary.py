"""Ternary weights and 8-bit activations: the arithmetic against transformers' and ggml's, the layer against the laws that it must keep."""

import copy
import pickle

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy import same, toy_data, toy_trainer, weights
from transformers.integrations import bitnet as theirs

from llmforge import GPT, BitNet, BitNetConfig, ConfigError, GPTConfig, Llama, LlamaConfig, TrainConfig, Trainer
from llmforge.models import base as models_base
from llmforge.nn import BitLinear, RMSNorm, bit_linears, constant_weights, replace_linear_, set_quantization_
from llmforge.nn import bitlinear as bitlinear_module
from llmforge.quant import ternary
from llmforge.quant.ggml import encode
from llmforge.training.schedule import learning_rate, quantization_strength, weight_decay_applies
from llmforge.training.ternary import TernaryDiagnosis

MATRICES = st.builds(
    lambda seed, rows, columns, size: (
        torch.randn(4 * rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    ),
    st.integers(0, 1000),
    st.integers(1, 8),
    st.sampled_from([1, 7, 64, 256, 512]),
    st.sampled_from([1e-3, 0.02, 1.0, 30.0]),
)


# The arithmetic


@given(MATRICES)
def test_weights_are_rounded_as_the_papers_code_does(weight):
    scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)  # transformers' WeightQuant, which is the paper's weight_quant
    expected = (weight * scale).round().clamp(-1, 1) / scale
    found = ternary.fake_ternary(weight, scale_dtype=torch.float32)
    assert torch.equal(found.sign(), expected.sign())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@given(MATRICES)
def test_codes_and_scale_are_the_rounded_matrix(weight):
    codes, scale = ternary.ternary_codes(weight)
    assert codes.dtype == torch.int8
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert scale == scale.to(torch.bfloat16).float()
    assert torch.equal(codes * scale, ternary.fake_ternary(weight))
    assert abs(scale / weight.abs().mean().clamp(min=1e-5) - 1) <= 2**-8


@given(MATRICES, st.sampled_from([torch.bfloat16, torch.float32]), st.booleans())
def test_latent_weights_of_codes_give_the_codes_again(weight, scale_dtype, grouped):
    group_size = 64 if grouped and weight.shape[1] % 64 == 0 else None
    codes, scale = ternary.ternary_codes(weight, group_size=group_size, scale_dtype=scale_dtype)
    latent = ternary.latent_weight(codes, scale)
    again, scale_again = ternary.ternary_codes(latent, group_size=group_size, scale_dtype=scale_dtype)
    assert torch.equal(codes, again)
    torch.testing.assert_close(scale_again, scale, rtol=0 if scale_dtype == torch.bfloat16 else 1e-6, atol=0)
    if (codes == 0).any() and (codes != 0).any() and group_size is None:  # the plain product would not: "ternary twice"
        assert ternary.ternary_codes(codes * scale, scale_dtype=scale_dtype)[1] < scale


@given(st.floats(1e-30, 1e30))
def test_a_scale_is_rounded_as_a_cast_to_bfloat16_does(value):
    scale = torch.tensor(value, dtype=torch.float32)
    assert torch.equal(ternary.rounded_scale(scale, torch.bfloat16), scale.bfloat16().float())
    assert torch.equal(ternary.rounded_scale(scale, torch.float32), scale)


def test_a_gaussian_matrix_has_the_known_share_of_zeros():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    codes, scale = ternary.ternary_codes(weight)
    # E|x| = sqrt(2/pi) = 0.79788; P(|x| < 0.39894) = erf(0.39894 / sqrt 2) = 0.31006
    assert abs(scale.item() - 0.79788) < 0.004
    assert abs((codes == 0).float().mean().item() - 0.31006) < 0.002


def test_a_matrix_of_zeros_stays_zero():
    codes, scale = ternary.ternary_codes(torch.zeros(4, 8))
    assert not codes.any()
    assert scale > 0
    assert not ternary.latent_weight(codes, scale).any()


@given(st.integers(0, 1000), st.sampled_from([1, 5, 256, 512]), st.sampled_from([1e-8, 1e-3, 1.0, 1e4]))
def test_activations_are_rounded_as_the_papers_code_does(seed, width, size):
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(seed)) * size
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    expected = (x * scale).round().clamp(-128, 127)
    codes, step = ternary.int8_codes(x)
    assert torch.equal(codes.float(), expected)
    torch.testing.assert_close(ternary.fake_int8(x), expected / scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(codes * step, expected / scale, rtol=1e-6, atol=0)


@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-6, 1.0, 1e4]))
def test_activations_in_groups_are_rounded_as_ggml_does(seed, size):
    x = (torch.randn(4, 512, generator=torch.Generator().manual_seed(seed)) * size).float()
    x[0, :256] = 0
    for row in x:
        for block in row.view(-1, 256):
            # quantize_row_q8_K: the scale is -127 over the value of largest magnitude, codes to even
            largest = block[block.abs().argmax()].numpy()
            expected = np.zeros(256) if largest == 0 else np.rint(np.float32(-127.0) / largest * block.numpy())
            codes, step = ternary.int8_codes(block, group_size=256)
            assert np.array_equal(codes.numpy() * -np.sign(largest), np.minimum(expected, 127)) or largest == 0
            np.testing.assert_allclose(step.numpy().ravel(), abs(largest) / 127, rtol=1e-6, atol=1e-32)


def test_rounding_is_computed_in_float32_whatever_the_input():
    x, w = torch.randn(64, 256), torch.randn(64, 256) * 0.02
    half_x, half_w = x.bfloat16(), w.bfloat16()
    assert torch.equal(ternary.int8_codes(half_x)[0], ternary.int8_codes(half_x.float())[0])
    assert torch.equal(ternary.ternary_codes(half_w)[0], ternary.ternary_codes(half_w.float())[0])
    in_bf16 = (half_x * (127 / half_x.abs().amax(-1, keepdim=True))).round()
    assert (in_bf16 != ternary.int8_codes(half_x)[0]).float().mean() > 0.03  # the control: it would differ


@given(MATRICES)
def test_packing_is_that_of_transformers(weight):
    codes, _ = ternary.ternary_codes(weight)
    packed = ternary.pack_2bit(codes)
    assert torch.equal(packed, theirs.pack_weights(codes.float()))
    assert torch.equal(ternary.unpack_2bit(packed), codes)
    assert torch.equal(theirs.unpack_weights(packed, torch.float32), codes.float())


def test_codes_that_cannot_be_packed_or_unpacked_are_refused():
    with pytest.raises(ConfigError, match="6 rows of codes cannot be packed by four"):
        ternary.pack_2bit(torch.zeros(6, 2))
    with pytest.raises(ConfigError, match="the file is damaged"):
        ternary.unpack_2bit(torch.tensor([[3]], dtype=torch.uint8))
    with pytest.raises(ConfigError, match="rows of 10 values do not divide into groups of 4"):
        ternary.ternary_codes(torch.zeros(2, 10), group_size=4)


@given(st.integers(0, 1000), st.sampled_from(["TQ1_0", "TQ2_0"]))
@settings(max_examples=20)
def test_ggmls_ternary_types_hold_a_rounded_matrix_exactly(seed, type_name):
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(seed)) * 0.02
    rounded = ternary.fake_ternary(weight)
    decoded = dequantize(encode(rounded, type_name).numpy(), GGMLQuantizationType[type_name])
    assert np.array_equal(decoded, rounded.numpy())


# The layer


def layer_and_input(**options):
    torch.manual_seed(1)
    layer = BitLinear(256, 32, **options)
    return layer, torch.randn(2, 5, 256)


@pytest.mark.parametrize("act_quant", ["token", "group", "none"])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_codes_times_scales(act_quant, group_size, bias):
    layer, x = layer_and_input(act_quant=act_quant, group_size=group_size, bias=bias)
    codes, scale = layer.codes()
    matrix = (codes.view(32, -1, group_size or 256).double() * scale.double()).view(32, 256)
    if act_quant != "none":
        x_codes, step = layer.input_codes(x)
        x = (x_codes.view(2, 5, -1, 256).double() * step.double().view(2, 5, -1, 1)).view(2, 5, 256)
    expected = x.double() @ matrix.T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=0, atol=1e-5)


def test_a_layer_computes_what_transformers_layers_compute():
    layer, x = layer_and_input(scale_dtype=torch.float32)
    online = theirs.AutoBitLinear(256, 32, bias=False, online_quant=True)
    online.weight = layer.weight
    torch.testing.assert_close(online(x), layer(x), rtol=0, atol=1e-6)
    packed = theirs.BitLinear(256, 32, bias=False, dtype=torch.float32)
    codes, scale = layer.codes()
    packed.weight, packed.weight_scale = theirs.pack_weights(codes.float()), (1 / scale).reshape(1)
    torch.testing.assert_close(packed(x), layer(x), rtol=0, atol=1e-6)
    packed.weight_scale = scale.reshape(1)  # the control: the other convention
    assert (packed(x) - layer(x)).abs().max() > 1


def test_the_norm_inside_comes_before_the_rounding():
    layer, x = layer_and_input(norm=True)
    with torch.no_grad():
        layer.rms_norm.weight.uniform_(0.5, 2.0)
    plain = BitLinear(256, 32)
    plain.weight = layer.weight
    assert torch.equal(layer(x), plain(layer.rms_norm(x)))
    assert set(layer.state_dict()) == {"weight", "rms_norm.weight"}


def test_gradients_pass_as_if_nothing_were_rounded():
    layer, x = layer_and_input()
    x = (x + 0).requires_grad_()
    out = layer(x * 1)
    grad = torch.randn_like(out)
    out.backward(grad)
    quantized_x, quantized_w = ternary.fake_int8(x.detach()), layer.quantized_weight().detach()
    torch.testing.assert_close(x.grad, grad @ quantized_w)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("bto,bti->oi", grad, quantized_x))
    assert layer.weight.grad[:, :].abs().min() > 0  # the clipped ones are not masked


def test_the_scale_gets_no_gradient_of_its_own():
    # With a scale that is differentiated, every weight gets a share of sum(grad * codes) / n, and codes never settle.
    layer, _ = layer_and_input()
    layer(torch.zeros(1, 256)).sum().backward()
    assert not layer.weight.grad.any()


def test_rounding_twice_is_rounding_once():
    layer, x = layer_and_input()
    once = layer.quantized_input(x)
    assert torch.equal(ternary.int8_codes(once)[0], ternary.int8_codes(x)[0])
    torch.testing.assert_close(layer.quantized_input(once), once, rtol=1e-6, atol=0)


def test_autocast_rounds_in_float32():
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = ternary.fake_int8(x).bfloat16().float() @ ternary.fake_ternary(layer.weight).detach().T
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-3)
    assert torch.equal(layer.quantized_weight(), layer.quantized_weight().bfloat16().float())  # nothing to lose


def count_roundings(monkeypatch, name):
    calls = []
    original = getattr(bitlinear_module, name)

    def counted(*args, **options):
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(bitlinear_module, name, counted)
    return calls


def test_an_input_that_layers_share_is_rounded_once(monkeypatch):
    model = BitNet(BITNET)
    calls = count_roundings(monkeypatch, "fake_int8")
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    assert len(calls) == 4 * BITNET.num_hidden_layers  # for q, k, v; for o; for gate and up; for down: 4, not 7


def test_a_shared_input_is_rounded_anew_when_it_or_the_mode_changes(monkeypatch):
    layer, x = layer_and_input()
    calls = count_roundings(monkeypatch, "fake_int8")
    first = layer(x)
    layer(x)
    assert len(calls) == 1
    with torch.no_grad():
        layer(x)  # without a graph: another result
    x.mul_(2)
    assert not torch.equal(layer(x), first)
    assert len(calls) == 3
    other = BitLinear(256, 32, act_quant="group")
    torch.testing.assert_close(other.quantized_input(x), ternary.fake_int8(x, group_size=256))


def test_weights_are_rounded_once_per_step_not_per_micro_step(monkeypatch):
    counts = {}
    for accum in (1, 4):
        trainer = bitnet_trainer(max_steps=3, grad_accum_steps=accum, micro_batch_size=4 // accum)
        calls = count_roundings(monkeypatch, "fake_ternary")
        for _ in trainer:
            pass
        counts[accum] = len(calls)
    assert counts[1] == counts[4] == 3 * len(bit_linears(trainer.model))


def test_constant_weights_end_with_the_block():
    layer, x = layer_and_input()
    kept = constant_weights()
    with kept:
        before = layer(x)
        layer.weight.data.mul_(-1)  # no version counts this: the promise is broken, and the old matrix stays
        assert torch.equal(layer(x + 0), before)
        with torch.no_grad():
            layer.weight.mul_(1)  # this is counted
        assert torch.equal(layer(x + 0), -before)
    layer.weight.data.mul_(-1)
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_constant_weights_of_inference_serve_training():
    layer, x = layer_and_input()
    with constant_weights():
        with torch.inference_mode():
            layer(x)
        layer(x + 0).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("act_quant", ["token", "group"])
def test_compiled_and_eager_agree(act_quant):
    layer, x = layer_and_input(act_quant=act_quant)
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, dynamic=False)
    eager_out, compiled_out = layer(x * 1.0), compiled(x * 1.0)
    torch.testing.assert_close(compiled_out, eager_out, rtol=0, atol=1e-5)
    for out in (eager_out, compiled_out):
        out.square().sum().backward()
    torch.testing.assert_close(compiled.weight.grad, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_a_warm_up_is_compiled_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = BitLinear(8, 8), BitLinear(8, 8)

        def forward(self, x):
            return self.down(self.up(x).relu())

    model = Two()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(dynamic=False)
    x = torch.randn(4, 8)
    for step in range(14):  # float, 10 strengths between, ternary
        for m in (model, eager):
            set_quantization_(m, min(1.0, max(0.0, (step - 1) / 11)))
        torch.testing.assert_close(model(x * 1), eager(x * 1), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_a_layer_is_copied_and_pickled():
    layer, x = layer_and_input(bias=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="act_quant \\('row'\\) must be 'token', 'group' or 'none'"):
        BitLinear(256, 2, act_quant="row")
    with pytest.raises(
        ConfigError, match="groups of 256, which do not divide in_features \\(300\\); the nearest are 256 and 512"
    ):
        BitLinear(300, 2, act_quant="group")
    with pytest.raises(ConfigError, match="scale_dtype \\(torch.float16\\) must be torch.bfloat16 or torch.float32"):
        BitLinear(256, 2, scale_dtype=torch.float16)
    with pytest.raises(ConfigError, match="group_size makes groups of 7"):
        BitLinear(256, 2, group_size=7)


# Replacement


def test_any_model_becomes_ternary_under_the_same_names():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.stack = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 8))
            self.again = self.first  # shared
            self.attention = nn.MultiheadAttention(8, 2)  # uses the weights of its out_proj itself
            self.lm_head = nn.Linear(8, 3)

    model = Own()
    before = dict(model.named_parameters())
    assert replace_linear_(model, BitLinear) == ["first", "stack.0", "stack.2"]
    assert dict(model.named_parameters()) == before  # the same objects
    assert isinstance(model.first, BitLinear)
    assert model.again is model.first
    assert model.first.bias is before["first.bias"]
    assert type(model.lm_head) is nn.Linear
    assert model.attention.out_proj.weight is before["attention.out_proj.weight"]
    assert replace_linear_(model, BitLinear) == []  # what is a BitLinear stays
    assert replace_linear_(Own(), BitLinear, skip=("stack.*", "lm_head")) == ["first"]
    assert "lm_head" in replace_linear_(Own(), BitLinear, skip=())


def test_replaced_layers_keep_mode_device_and_options():
    model = nn.Sequential(nn.Linear(256, 4), nn.Dropout()).eval()
    replace_linear_(model, BitLinear, act_quant="group", norm=True)
    assert not model[0].training
    assert model[0].act_quant == "group"
    assert torch.equal(model[0].rms_norm.weight, torch.ones(256))
    assert model(torch.randn(3, 256)).isfinite().all()


def test_a_refused_layer_is_named_and_nothing_is_exchanged():
    model = nn.Sequential(nn.Linear(256, 10), nn.Linear(10, 256))
    with pytest.raises(ConfigError, match=r"^1: act_quant='group' makes groups of 256"):
        replace_linear_(model, BitLinear, act_quant="group")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    with pytest.raises(ConfigError, match=r"this is an nn\.Linear itself"):
        replace_linear_(nn.Linear(2, 2), BitLinear)


# Strength


BITNET = BitNetConfig(
    vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip


def bitnet_trainer(out_dir=None, *, model=None, **settings):
    if model is None:
        torch.manual_seed(0)
        model = BitNet(BITNET)
    return toy_trainer(out_dir, model=model, **{"lr": 3e-3, **settings})


def test_strength_0_is_the_float_twin_and_1_the_ternary_model():
    torch.manual_seed(0)
    model, twin = BitNet(BITNET), Llama(BITNET.float_twin())
    twin.load_state_dict(model.state_dict())
    idx = torch.randint(64, (2, 16))
    ternary_logits = model(idx)
    assert set_quantization_(model, 0.0) == list(bit_linears(model))
    assert len(bit_linears(model)) == 14
    assert torch.equal(model(idx), twin(idx))
    set_quantization_(model, 0.5)
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(
        layer.quantized_weight(), (layer.weight + ternary.fake_ternary(layer.weight)) / 2, rtol=1e-5, atol=1e-8
    )
    set_quantization_(model, 1.0)
    assert torch.equal(model(idx), ternary_logits)
    assert not torch.equal(ternary_logits, twin(idx))
    with pytest.raises(ConfigError, match="strength \\(1.5\\) must be between 0"):
        set_quantization_(model, 1.5)


def test_a_float_model_is_converted_and_warmed_up():
    torch.manual_seed(0)
    llama = Llama(BITNET.float_twin())
    before = weights(llama)
    model = BitNet.from_float(llama, act_quant="group")
    assert model.config.act_quant == "group"
    assert same(weights(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    set_quantization_(model, 0.0)
    idx = torch.randint(64, (1, 8))
    assert torch.equal(model(idx), llama(idx))
    trainer = bitnet_trainer(model=model, max_steps=6, quantize_warmup_steps=4)
    strengths = []
    for _ in trainer:
        strengths.append(float(bit_linears(model)["model.layers.0.mlp.up_proj"].strength))
    assert strengths == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert same(weights(llama), before)  # a copy
    with pytest.raises(ConfigError, match="sliding_window"):
        BitNet.from_float(Llama(BITNET.float_twin().replace(sliding_window=4)))


# The recipe


def test_the_recipe_gives_other_defaults_and_what_is_given_wins():
    standard, bitnet = TrainConfig(max_steps=10), TrainConfig(max_steps=10, recipe="bitnet")
    assert (standard.lr, standard.schedule, standard.decay_weights_fraction) == (1e-3, "cosine", 1.0)
    assert (bitnet.lr, bitnet.schedule, bitnet.min_lr, bitnet.decay_weights_fraction) == (2e-3, "linear", 0.0, 0.5)
    given = TrainConfig(max_steps=10, recipe="bitnet", lr=1e-3, schedule="cosine")
    assert (given.lr, given.schedule, given.decay_weights_fraction) == (1e-3, "cosine", 0.5)
    assert TrainConfig.from_dict(given.to_dict()) == given
    assert (standard.quantize_after_fraction, bitnet.quantize_after_fraction) == (0.0, 0.3)
    assert TrainConfig.preset("bitnet-110m").schedule == "two-stage"
    with pytest.raises(ConfigError, match="must be one of 'standard', 'bitnet', got 'bit'"):
        TrainConfig.from_dict(dict(max_steps=1, recipe="bit"))


def test_the_two_stage_schedule_falls_on_two_lines():
    config = TrainConfig(max_steps=100, recipe="bitnet", schedule="two-stage", lr=3e-3, warmup_steps=0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(3e-3)
    assert rates[49] == pytest.approx(3e-3 * 0.51)
    assert rates[50] == pytest.approx(2e-3 * 0.5)
    assert rates[99] == pytest.approx(2e-3 * 0.01)
    assert learning_rate(100, config) == 0
    assert [weight_decay_applies(step, config) for step in (0, 49, 50, 99)] == [True, True, False, False]
    late = config.replace(quantize_after_fraction=0.3, quantize_warmup_steps=9)
    assert [quantization_strength(step, late) for step in (0, 29, 30, 38, 39, 99)] == pytest.approx(
        [0, 0, 0.1, 0.9, 1, 1]
    )


def test_weights_stop_decaying_at_half_time_and_a_resumed_run_knows(tmp_path):
    settings = dict(max_steps=6, decay_weights_fraction=0.5, weight_decay=0.3, save_every_steps=2)
    trainer = bitnet_trainer(tmp_path / "a", **settings)
    decays = []
    for metrics in trainer:
        decays.append([group["weight_decay"] for group in trainer.optimizer.param_groups])
        if metrics.step in (2, 4):
            trainer.save()
    assert decays == [[0.3, 0.0]] * 3 + [[0.0, 0.0]] * 3
    for start in (2, 4):
        resumed = bitnet_trainer(tmp_path / "b", **settings)
        resumed.resume(tmp_path / "a" / f"step-00000{start}")
        rest = []
        for _ in resumed:
            rest.append([group["weight_decay"] for group in resumed.optimizer.param_groups])
        assert rest == decays[start:]
        assert same(weights(resumed.model), weights(trainer.model))


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(quantize_after_fraction=0.5),
        dict(quantize_warmup_steps=7, quantize_after_fraction=0.0),
        dict(grad_accum_steps=2, micro_batch_size=2),
    ],
    ids=["ternary", "float first", "warm-up", "accumulation"],
)
def test_a_resumed_ternary_run_is_the_uninterrupted_one(tmp_path, settings):
    whole = bitnet_trainer(recipe="bitnet", **settings)
    whole.train(progress=False)
    first = bitnet_trainer(tmp_path, recipe="bitnet", **settings)
    for metrics in first:
        if metrics.step == 4:  # in the middle of an epoch
            first.save()
            break
    second = bitnet_trainer(tmp_path, recipe="bitnet", **settings)
    assert second.resume()
    assert second.step == 4
    second.train(progress=False)
    assert same(weights(second.model), weights(whole.model))
    assert not same(weights(BitNet(BITNET)), weights(whole.model))


def test_ternary_models_learn():
    trainer = bitnet_trainer(max_steps=60, recipe="bitnet", warmup_steps=5)
    losses = [metrics.loss for metrics in trainer]
    assert losses[0] > 4.0
    assert sum(losses[-5:]) / 5 < 2.0
    codes = [layer.codes()[0] for layer in bit_linears(trainer.model).values()]
    assert 0.2 < torch.cat([c.flatten() for c in codes]).eq(0).float().mean() < 0.45  # about a third


def test_evaluation_and_samples_are_of_the_model_as_it_will_run():
    trainer = bitnet_trainer(max_steps=4, quantize_after_fraction=0.5)
    next(trainer)
    layer = bit_linears(trainer.model)["model.layers.0.mlp.up_proj"]
    assert layer.strength == 0
    loss = trainer.evaluate().loss
    set_quantization_(trainer.model, 0.0)
    data = toy_data()[1]
    batches = [data.batch(i, batch_size=4, seq_len=16, seed=0) for i in range(2)]
    floats = torch.stack([nn.functional.cross_entropy(trainer.model(x).flatten(0, 1), y.flatten()) for x, y in batches])
    set_quantization_(trainer.model, 1.0)
    exact = torch.stack([nn.functional.cross_entropy(trainer.model(x).flatten(0, 1), y.flatten()) for x, y in batches])
    assert loss == pytest.approx(exact.mean().item(), rel=1e-5)
    assert abs(loss - floats.mean().item()) > 1e-4


def test_settings_of_quantization_need_something_to_quantize():
    with pytest.raises(ConfigError, match="are for models with BitLinear layers, and this one has none"):
        toy_trainer(quantize_warmup_steps=2)
    with pytest.raises(ConfigError, match="end at step 12, not before max_steps \\(10\\)"):
        TrainConfig(max_steps=10, quantize_warmup_steps=12)
    with pytest.raises(ConfigError, match="quantize_after_fraction \\(1.0\\) must be at least 0 and below 1"):
        TrainConfig(max_steps=10, quantize_after_fraction=1.0)


# Diagnosis


def test_the_log_says_what_the_codes_do(tmp_path):
    import json

    trainer = bitnet_trainer(tmp_path, max_steps=20, diagnose_every_steps=10, warmup_steps=0)
    trainer.train(progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, second = [line["ternary"] for line in lines if "ternary" in line]
    assert set(first) == set(bit_linears(trainer.model)) == set(second)
    for layer in second.values():
        assert 0.1 < layer["zeros"] < 0.6
        assert layer["flips"] > 0
        assert 0 < layer["clipped"] < 0.1
        assert 0 < layer["lost"] < 0.5
    assert all("flips" not in layer for layer in first.values())


def test_flips_are_counted_per_100_steps():
    model = nn.Sequential(BitLinear(8, 4))
    diagnosis = TernaryDiagnosis(model, max_steps=1000)
    run = lambda: model(torch.randn(3, 8))  # noqa: E731
    diagnosis.observe(100, run)
    with torch.no_grad():
        model[0].weight[model[0].codes()[0] == 1] *= -1
    ones = (model[0].codes()[0] == -1).float().mean().item()
    before = diagnosis._codes["0"].clone()
    found = diagnosis.observe(150, run)["0"]
    expected = (model[0].codes()[0].flatten() != before).float().mean().item()
    assert 0 < expected <= ones
    assert found["flips"] == pytest.approx(expected * 2)
    assert found["zeros"] == (model[0].codes()[0] == 0).float().mean().item()


def test_a_recipe_that_never_settles_is_reported(tmp_path):
    trainer = bitnet_trainer(
        tmp_path, max_steps=40, lr=0.3, schedule="constant", warmup_steps=0, diagnose_every_steps=10, grad_clip=None
    )
    with pytest.warns(
        UserWarning, match=r"of the codes still change per 100 steps at step 40 of 40, .*recipe='bitnet'"
    ):
        trainer.train(progress=False)


def test_codes_that_never_change_are_reported(tmp_path):
    trainer = bitnet_trainer(tmp_path, max_steps=40, lr=1e-9, diagnose_every_steps=10)
    with pytest.warns(UserWarning, match="no code has changed in the steps up to 20: the learning rate is too low"):
        trainer.train(progress=False)


def test_a_healthy_run_warns_of_nothing(tmp_path, recwarn):
    bitnet_trainer(tmp_path, max_steps=60, recipe="bitnet", diagnose_every_steps=20).train(progress=False)
    assert [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)] == []


def test_16_bit_latents_outliers_and_lost_activations_are_reported():
    with pytest.warns(UserWarning, match="latent weights of 0 are torch.bfloat16, in which small updates are lost"):
        TernaryDiagnosis(nn.Sequential(BitLinear(8, 4).bfloat16()), max_steps=10)
    model = nn.Sequential(BitLinear(64, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 100.0
    x = torch.randn(3, 64)
    x[:, 0] = 1e4
    with pytest.warns(UserWarning, match="of the codes of 0 are 0") as caught:
        TernaryDiagnosis(model, max_steps=10).observe(1, lambda: model(x))
    messages = " ".join(str(w.message) for w in caught)
    assert "of the codes of 0 are 0" in messages
    assert "of the activations that enter 0 are rounded to 0" in messages


# GPT


def test_a_gpt_can_be_ternary():
    config = GPTConfig(
        vocab_size=50, n_embd=256, n_head=4, n_layer=1, block_size=16, ternary=True, activation_function="relu"
    )
    model = GPT(config)
    assert list(bit_linears(model)) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]
    assert isinstance(model.transformer.h[0].mlp.act, nn.ReLU)
    assert set(model.state_dict()) == set(GPT(config.replace(ternary=False)).state_dict())
    preset = GPTConfig.preset("bit-gpt")
    assert (preset.n_embd, preset.n_head, preset.n_layer, preset.block_size, preset.vocab_size) == (
        512,
        8,
        6,
        512,
        30_000,
    )
    with pytest.raises(ConfigError, match="n_embd \\(320\\) must be a multiple of 256.*the nearest are 256 and 512"):
        config.replace(n_embd=320)


def test_a_module_of_ones_own_trains_with_bitlinear():
    class Own(nn.Module):
        context_length = 16

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.mix = nn.GRU(32, 32, batch_first=True)
            self.up = BitLinear(32, 64)
            self.norm = RMSNorm(64)
            self.lm_head = nn.Linear(64, 64)

        def forward(self, idx):
            return self.lm_head(self.norm(self.up(self.mix(self.embed(idx))[0])))

    train_data, _ = toy_data()
    config = TrainConfig(max_steps=30, micro_batch_size=4, recipe="bitnet", warmup_steps=2, device="cpu")
    losses = [metrics.loss for metrics in Trainer(Own(), train_data, config=config)]
    assert losses[-1] < losses[0] - 1


def test_llama_is_as_it_was():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    assert bit_linears(Llama(config)) == {}
    assert issubclass(BitNet, models_base.LanguageModel)
