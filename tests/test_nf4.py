"""NF4: bytes and values of bitsandbytes, layers that compute with them and keep nothing else, models that are quantized as they load."""

import copy
import json
import math
import shutil
from dataclasses import replace

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from toy import toy_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config
from transformers import LlamaConfig as TheirLlamaConfig

from llmforge.convert import export_hf, load, open_model
from llmforge.convert.merge_check import merge_divergence
from llmforge.convert.published import assemble, publish
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.finetune import LoRAConfig, NF4Config, apply_lora_, quantize_, save_adapter
from llmforge.formats.safetensors import read_safetensors, write_safetensors
from llmforge.models import Llama, LlamaConfig
from llmforge.nn import Linear4bit
from llmforge.quant import nf4 as nf4_module
from llmforge.quant.dynamic8 import dequantize_dynamic, dynamic_map, quantize_dynamic
from llmforge.quant.nf4 import CODEBOOK, NF4Quantizer, NF4Tensor, dequantize_nf4, dequantize_rows_nf4, quantize_nf4

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def their_codes(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    return codes.flatten(), state.absmax


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes >> 4, codes & 15], 1).flatten()


def same(left: NF4Tensor, right: NF4Tensor) -> bool:
    parts = ("codes", "absmax", "nested_absmax", "offset")
    pairs = [(getattr(left, part), getattr(right, part)) for part in parts]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs) and left.shape == right.shape


# --- Numbers, against bitsandbytes and by hand


def test_tables_are_those_of_bitsandbytes():
    assert torch.equal(torch.tensor(CODEBOOK), bnb.get_4bit_type("nf4", device="cpu"))
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed=signed), bnb.create_dynamic_map(signed=signed))


def test_packing_by_hand():
    # absmax 2: scaled 1, -0.7, 0, 0.05; the codes of the nearest values are 15, 1, 7 and 8. Of a fifth, the low bits are those of 0.
    nf4 = quantize_nf4(torch.tensor([2.0, -1.4, 0.0, 0.1, -2.0]), double_quant=False)
    assert nf4.codes.tolist() == [15 << 4 | 1, 7 << 4 | 8, 0 << 4 | 7]
    assert nf4.absmax.tolist() == [2.0]
    assert dequantize_nf4(nf4).tolist() == [2 * torch.tensor(CODEBOOK)[i].item() for i in (15, 1, 7, 8, 0)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype, block_size):
    weight = normal(512, 1024, dtype=dtype) * 0.02
    weight[3] = 0.0
    weight[5, ::7] = 30.0
    weight[6] *= 1e-4  # subnormal in float16
    ours = quantize_nf4(weight, block_size=block_size, double_quant=False)
    codes, absmax = their_codes(weight, block_size)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)


def test_values_on_the_edges_round_as_in_bitsandbytes():
    # Each block has its largest value, and the middles of the codebook times it, as exact as float32 has them: a quotient in the
    # place of the product with the reciprocal lands on the other side for some.
    largest = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    middles = (torch.tensor(CODEBOOK)[1:] + torch.tensor(CODEBOOK)[:-1]) / 2
    edges = middles * largest
    weight = torch.cat(
        [edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(-9.0)), largest.expand(-1, 19)], 1
    )
    codes, _ = their_codes(weight, 64)
    assert torch.equal(quantize_nf4(weight, double_quant=False).codes, codes)
    divided = torch.bucketize(weight / largest, middles)
    assert not torch.equal(divided.flatten(), nibbles(codes))  # a control


@given(
    st.integers(1, 40), st.integers(1, 150), st.sampled_from(FLOATS), st.sampled_from([32, 64, 256]), st.integers(0, 99)
)
def test_codes_are_those_of_bitsandbytes_for_any_shape(rows, columns, dtype, block_size, seed):
    weight = normal(rows, columns, dtype=dtype, seed=seed)
    ours = quantize_nf4(weight, block_size=block_size, double_quant=False)
    codes, absmax = their_codes(weight, block_size)
    n = rows * columns
    whole = n // block_size * block_size
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.codes[: whole // 2], codes[: whole // 2])
    # A last block that is not full is divided on their CPU and multiplied by the reciprocal on their GPU, as here: where the codes
    # differ, a value must lie on the edge.
    scaled = weight.flatten()[whole:].double() / ours.absmax[-1].double()
    middles = (torch.tensor(CODEBOOK)[1:] + torch.tensor(CODEBOOK)[:-1]).double() / 2
    differ = nibbles(ours.codes)[whole:n] != nibbles(codes)[whole:n]
    assert ((scaled[differ, None] - middles).abs().amin(1) < 1e-6).all()
    assert len(ours.codes) == len(codes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 64), (3, 50), (7, 9), (1, 1), (100, 1000)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_values_are_what_bitsandbytes_makes_of_our_bytes(dtype, shape, double_quant):
    ours = quantize_nf4(normal(*shape), double_quant=double_quant)
    absmax, nested, offset = ours.absmax, None, None
    if double_quant:
        offset = ours.offset
        nested = bnb.QuantState(
            absmax=ours.nested_absmax, code=dynamic_map(signed=True), blocksize=256, dtype=torch.float32
        )
    state = bnb.QuantState(absmax, ours.shape, torch.tensor(CODEBOOK), 64, "nf4", dtype, offset, nested)
    with torch.compiler.set_stance("force_eager"):  # for odd shapes it compiles, for seconds
        theirs = bnb.dequantize_4bit(ours.codes[:, None], state)
        assert torch.equal(dequantize_nf4(ours, dtype=dtype, backend="bitsandbytes"), theirs)
    assert torch.equal(dequantize_nf4(ours, dtype=dtype), theirs)
    changed = replace(ours, codes=ours.codes ^ 16)  # a control: another code is another value
    assert not torch.equal(dequantize_nf4(changed, dtype=dtype), theirs)


def test_scales_of_scales_are_the_nearest_codes():
    weight = normal(1000, 1000) * normal(1000, 1).exp()
    plain, double = quantize_nf4(weight, double_quant=False), quantize_nf4(weight)
    absmax = plain.absmax
    assert torch.equal(double.codes, plain.codes)
    assert torch.equal(double.offset, absmax.mean())
    off = F.pad(absmax - double.offset, (0, -len(absmax) % 256)).view(-1, 256)
    assert torch.equal(double.nested_absmax, off.abs().amax(1))
    values = dynamic_map(signed=True).double() * double.nested_absmax.double()[:, None]  # of each code in each block
    distance = (off.double()[:, :, None] - values[:, None, :]).abs()
    ours = F.pad(double.absmax, (0, -len(absmax) % 256)).view(off.shape).long()
    chosen = distance.gather(2, ours[:, :, None])[:, :, 0].flatten()[: len(absmax)]
    best = distance.amin(2).flatten()[: len(absmax)]
    assert (chosen <= best + 1e-7 * off.abs().max()).all()  # float32
    worse = distance.gather(2, (ours[:, :, None] + 1).clamp(max=255))[:, :, 0].flatten()[: len(absmax)]
    assert (worse > best).float().mean() > 0.9  # a control


def test_scales_of_scales_agree_with_bitsandbytes_but_for_its_lookup_table():
    weight = normal(1000, 1024)
    _, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.offset, state.offset)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    differ = (ours.absmax.int() - state.absmax.int()).abs()
    near_zero = dynamic_map(signed=True)[ours.absmax.int()].abs() < 1e-4
    assert ((differ <= 1) | near_zero).all()  # a cell of its table, 1/32768 wide, holds one code for all values in it
    assert (differ > 0).float().mean() < 0.01


def test_a_value_between_two_codes_gets_the_even_one():
    table = dynamic_map(signed=True)
    codes, _ = quantize_dynamic(torch.cat([(table[:-1] + table[1:]) * 0.5, torch.ones(1)]), signed=True)
    assert (codes[:-1] % 2 == 0).float().mean() > 0.99  # 1/absmax is 1 here, so nearly all of them are exact
    values = torch.cat([table[3:250], torch.ones(1)])
    assert torch.equal(dequantize_dynamic(*quantize_dynamic(values, signed=True), signed=True), values)


@given(st.lists(st.integers(0, 300), max_size=12), st.booleans())
def test_pieces_of_any_size_give_the_same_tensor(sizes, double_quant):
    weight = normal(sum(sizes))
    quantizer = NF4Quantizer((sum(sizes),), double_quant=double_quant)
    for piece in weight.split(sizes):
        quantizer.add(piece)
    assert same(quantizer.finish(), quantize_nf4(weight, double_quant=double_quant))


@given(st.integers(1, 30), st.integers(1, 90), st.data())
def test_rows_are_decoded_alone(rows, columns, data):
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    nf4 = quantize_nf4(normal(rows, columns), block_size=32)
    assert torch.equal(dequantize_rows_nf4(nf4, start, stop), dequantize_nf4(nf4)[start:stop])


def test_rows_far_inside_find_their_scales():
    nf4 = quantize_nf4(normal(500, 100))
    whole = dequantize_nf4(nf4)
    for start in (0, 163, 164, 400, 499):
        assert torch.equal(dequantize_rows_nf4(nf4, start, 500), whole[start:])


@pytest.mark.parametrize("shape", [(100, 64), (33, 31)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_size_of_chunks_does_not_matter(monkeypatch, shape, dtype):
    weight = normal(*shape)
    before = quantize_nf4(weight)
    values = dequantize_nf4(before, dtype=dtype)
    monkeypatch.setattr(nf4_module, "_CHUNK_CPU", 128)
    assert same(quantize_nf4(weight), before)
    assert torch.equal(dequantize_nf4(before, dtype=dtype), values)


def test_nothing_and_zeros_are_themselves():
    for shape in [(0,), (3, 0)]:
        assert dequantize_nf4(quantize_nf4(torch.empty(shape))).shape == shape
    assert torch.equal(dequantize_nf4(quantize_nf4(torch.zeros(5, 50), double_quant=False)), torch.zeros(5, 50))
    assert torch.equal(dequantize_nf4(quantize_nf4(torch.zeros(5, 50))), torch.zeros(5, 50))


def test_half_a_byte_per_weight():
    assert quantize_nf4(torch.empty(4096, 4096).normal_()).nbytes / 4096**2 == pytest.approx(0.5159, abs=1e-4)


def test_what_has_no_code_is_refused():
    for bad in (math.nan, math.inf, -math.inf):
        weight = normal(10, 64)
        weight[3, 3] = bad
        with pytest.raises(ConfigError, match="NaN or infinity among the weights"):
            quantize_nf4(weight)
    with pytest.raises(ConfigError, match=r"block_size \(48\) must be one of 32, 64"):
        quantize_nf4(weight, block_size=48)
    with pytest.raises(ConfigError, match=r"block_size \(0\)"):
        NF4Config(block_size=0)
    quantizer = NF4Quantizer((2, 3))
    with pytest.raises(ConfigError, match=r"7 values do not fit a tensor of shape \(2, 3\), which has 6"):
        quantizer.add(torch.zeros(7))
    quantizer.add(torch.zeros(4))
    with pytest.raises(ConfigError, match="4 values for a tensor"):
        quantizer.finish()


# --- The layer


def layer(in_features=128, out_features=96, *, bias=True, **settings) -> Linear4bit:
    b = nn.Parameter(normal(out_features, seed=1)) if bias else None
    return Linear4bit.from_weight(normal(out_features, in_features) * 0.1, b, NF4Config(**settings))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [128, 37])
def test_forward_and_gradients_are_those_of_the_decoded_matrix(dtype, bias, in_features):
    made = layer(in_features, bias=bias)
    if bias:
        made.bias = nn.Parameter(made.bias.to(dtype))
    x = normal(2, 5, in_features, seed=2, dtype=dtype).requires_grad_()
    inputs = [x, *made.parameters()]
    y = made(x)
    reference = F.linear(x, made.dequantize(dtype), made.bias)
    assert torch.equal(y, reference)
    weights = normal(*y.shape, dtype=dtype)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), inputs) for out in (y, reference))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_layer_is_bitsandbytes_linear4bit_on_the_same_bytes():
    weight, b = normal(96, 128) * 0.1, normal(96, seed=1)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 96, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
    )
    theirs.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    theirs.bias = nn.Parameter(b)
    theirs.to("cpu")
    state = theirs.weight.quant_state
    codes, shape = theirs.weight.data.flatten(), (96, 128)
    nf4 = NF4Tensor(codes, state.absmax, state.state2.absmax, state.offset, shape, 64)
    ours = Linear4bit.from_nf4(nf4, nn.Parameter(b))
    assert torch.equal(ours.codes, layer().codes)
    x, y = (normal(4, 128, seed=2).requires_grad_() for _ in range(2))
    left, right = ours(x), theirs(y)
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)  # order of sums
    left.square().sum().backward()
    right.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=0)
    assert not torch.allclose(F.linear(x, weight, b), right, atol=1e-2)  # a control: rounding is seen


def test_autocast_chooses_the_arithmetic():
    made, x = layer(), normal(4, 128, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    expected = F.linear(x.bfloat16(), made.dequantize(torch.bfloat16), made.bias.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == made.bias.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x.double()).dtype == torch.float64  # which autocast leaves alone


def saved_for_backward(compute) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compute()
    return saved


def test_the_graph_holds_codes_and_neither_matrix_nor_input():
    made, x = layer(256, 512, bias=False), normal(8, 256).requires_grad_()
    saved = saved_for_backward(lambda: made(x))
    assert sum(t.nbytes for t in saved) == made.nf4().nbytes < 0.53 * 256 * 512
    assert max(t.numel() for t in saved if t.is_floating_point()) <= 256 * 512 // 64 // 256
    plainly = saved_for_backward(lambda: F.linear(x, made.dequantize()))  # a control: what the layer avoids
    assert any(t.is_floating_point() and t.numel() == 256 * 512 for t in plainly)


def test_activation_checkpointing_changes_no_gradient():
    model = nn.Sequential(layer(128, 96), nn.GELU(), layer(96, 64))
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        x = normal(4, 128).requires_grad_()
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_training_step_runs_without_values():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 128))
        assert quantize_(model, NF4Config(skip=("2",))) == ["0"]
        model.requires_grad_(False)
        x = torch.randn(16, 4096, requires_grad=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
        assert x.grad.shape == x.shape
        assert quantize_nf4(torch.empty(4096, 4096)).codes.shape == (4096 * 2048,)
    assert not any("Fake" in type(t).__name__ for t in nf4_module._tables.values())  # none is kept for real ones
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
        quantize_(model)
        assert model(torch.empty(2, 64)).shape == (2, 64)


def test_compiled_layer_computes_the_same():
    made, x = layer(128, 96), normal(4, 128).requires_grad_()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), made(x))
    left, right = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, made))
    assert torch.equal(left, right)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
    ],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_casting_a_model_spoils_no_scale(cast, double_quant):
    model = nn.Sequential(layer(double_quant=double_quant))
    before = copy.deepcopy(model[0].nf4())
    cast(model)
    assert same(model[0].nf4(), before)
    assert [t.dtype for t in model.buffers()] == [t.dtype for t in layer(double_quant=double_quant).buffers()]
    assert model[0].bias.dtype != torch.float32
    assert model.to("meta")[0].codes.is_meta


def test_state_dict_round_trip_and_other_settings_are_refused():
    made = layer()
    empty = Linear4bit(128, 96)
    empty.load_state_dict(made.state_dict())
    assert same(empty.nf4(), made.nf4())
    assert torch.equal(empty(normal(3, 128)), made(normal(3, 128)))
    for other in (Linear4bit(128, 96, double_quant=False), Linear4bit(128, 96, block_size=128), Linear4bit(96, 128)):
        with pytest.raises(RuntimeError, match="Linear4bit"):
            other.load_state_dict(made.state_dict())
    assert "block_size=64, double_quant=True" in repr(made)
    assert made.num_weights == 96 * 128


# --- Models


def toy_llama(**changes) -> Llama:
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = dict(num_key_value_heads=2, max_position_embeddings=32, **sizes)
    return Llama(LlamaConfig(**{**config, **changes})).eval()


IDX = torch.arange(20)[None]


def test_linear_layers_are_exchanged_and_the_rest_stays():
    model = toy_llama(attention_bias=True)
    n_params, biases = model.num_params(), [layer.self_attn.q_proj.bias for layer in model.model.layers]
    matrices = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    names = quantize_(model)
    assert names == [name for name in matrices if name != "lm_head"]
    assert len(names) == 14
    assert type(model.lm_head) is nn.Linear
    assert model.num_params() == n_params
    assert [layer.self_attn.q_proj.bias for layer in model.model.layers] == biases
    assert not model.model.layers[0].mlp.up_proj.training
    for name in names:
        expected = dequantize_nf4(quantize_nf4(matrices[name]))
        assert torch.equal(model.get_submodule(name).dequantize(), expected)
    assert quantize_(model) == []  # again: nothing left
    assert torch.equal(copy.deepcopy(model)(IDX), model(IDX))


def test_names_to_skip_and_shared_matrices_stay():
    model = toy_llama(tie_word_embeddings=True)
    names = quantize_(model, NF4Config(skip=("q_proj", "model.layers.1.mlp.up_proj", "*.0.mlp.*")))
    assert {name.rpartition(".")[2] for name in names} == {
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    } - {"up_proj"}
    assert not any(name.startswith("model.layers.0.mlp") for name in names)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" in quantize_(toy_llama(), NF4Config(skip=()))
    twice = nn.ModuleList([shared := nn.Linear(64, 64), shared])
    assert quantize_(twice) == ["0"]
    assert twice[0] is twice[1]


def test_a_model_that_cannot_be_quantized_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"this is an nn\.Linear itself"):
        quantize_(nn.Linear(4, 4))
    model = toy_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj: NaN or infinity"):
        quantize_(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama and a GPT-2 of transformers, in bfloat16."""
    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    llama = TheirLlamaConfig(num_key_value_heads=2, max_position_embeddings=32, attention_bias=True, **shape)
    gpt2 = GPT2Config(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    made = {}
    for config in (llama, gpt2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        made[config.model_type] = tmp_path_factory.mktemp(config.model_type)
        model.save_pretrained(made[config.model_type])
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("config", [NF4Config(), NF4Config(block_size=128, double_quant=False, skip=("*.0.*",))])
def test_quantizing_while_loading_is_quantizing_what_was_loaded(folders, family, dtype, config):
    as_it_loads, _ = load(folders[family], dtype=dtype, quantize=config)
    afterwards, _ = load(folders[family], dtype=dtype)
    names = quantize_(afterwards, config)
    left, right = as_it_loads.state_dict(), afterwards.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    assert names == [name for name, m in as_it_loads.named_modules() if isinstance(m, Linear4bit)]
    assert not as_it_loads.training
    assert as_it_loads.num_params() == load(folders[family], device="meta", quantize=config)[0].num_params()


def test_a_run_is_quantized_while_loading(tmp_path):
    model = toy_model()
    export_hf(model, None, tmp_path / "hf")
    loaded, _ = load(tmp_path / "hf", quantize=NF4Config())
    quantize_(model.eval())
    idx = torch.arange(10)[None]
    assert torch.equal(loaded(idx), model(idx))


def test_matrices_are_read_by_rows_and_never_as_a_whole(folders):
    published, _ = open_model(folders["llama"])
    largest = []

    def watched(tensor):
        def read():
            raise AssertionError("read as a whole")

        def read_rows(start, stop):
            rows = tensor.read_rows(start, stop)
            largest.append(rows.numel())
            return rows

        return replace(tensor, read=read, read_rows=read_rows)

    watching = replace(published, tensors={name: watched(tensor) for name, tensor in published.tensors.items()})
    model = assemble(watching, quantize=NF4Config())
    assert torch.equal(model(IDX), load(folders["llama"], quantize=NF4Config())[0](IDX))
    assert sum(largest) == published.num_params  # each value once


def test_a_matrix_with_nan_is_named_while_loading(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "nan")
    tensors = {name: tensor.read().clone() for name, tensor in read_safetensors(folder).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][2, 2] = math.inf
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: NaN or infinity"):
        load(folder, quantize=NF4Config())


def write_tensors(folder, tensors):
    from llmforge.formats.lazy import LazyTensor

    write_safetensors(folder, {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_an_export_has_the_matrices_that_are_computed_with(folders, tmp_path, dtype):
    model, _ = load(folders["llama"], dtype=dtype, quantize=NF4Config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_hf(model, None, tmp_path / "out")
    assert report.notes == [
        "the matrices of 14 linear layers were rounded to NF4 (4 bits) in memory, and are written as computed with"
    ]
    assert report.num_params == model.num_params()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert {p.dtype for p in theirs.parameters()} == {dtype}
    up = model.model.layers[1].mlp.up_proj
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, up.dequantize(dtype))
    with torch.no_grad():
        tolerance = 1e-6 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(theirs(IDX).logits, model(IDX), atol=tolerance, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert publish(load(folders["llama"])[0]).notes == []


# --- Folders that bitsandbytes wrote


@pytest.fixture(scope="module")
def their_4bit(folders, tmp_path_factory):
    """Folders as transformers writes them with bitsandbytes, and the logits of their models in float32."""
    made = {}
    for family, folder in folders.items():
        for double_quant in (True, False):
            settings = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=torch.float32,
            )
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
            out = tmp_path_factory.mktemp(f"{family}-4bit")
            model.save_pretrained(out)
            with torch.no_grad():
                made[family, double_quant] = out, model(IDX).logits
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_4bit_folders_of_bitsandbytes_load_as_floats_or_as_they_are(their_4bit, folders, family, double_quant):
    folder, logits = their_4bit[family, double_quant]
    floats, _ = load(folder)
    packed, _ = load(folder, quantize=NF4Config(double_quant=double_quant))
    with torch.no_grad():
        torch.testing.assert_close(floats(IDX), logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed(IDX), logits, atol=1e-5, rtol=0)
        assert (load(folders[family])[0](IDX) - logits).abs().max() > 1e-2  # a control: rounding is seen
    stored = read_safetensors(folder)
    theirs = {name: tensor.read() for name, tensor in stored.items() if tensor.dtype == torch.uint8}
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == {"llama": 14, "gpt2": 8}[family]
    for name, module in layers.items():
        assert torch.equal(module.codes, theirs[f"{name}.weight"].flatten())  # taken, not rounded again
        if double_quant:
            assert torch.equal(module.absmax, theirs[f"{name}.weight.absmax"])
    other, _ = load(folder, quantize=NF4Config(double_quant=not double_quant, block_size=128))
    assert other.num_params() == floats.num_params()


def test_a_4bit_folder_can_be_exported(their_4bit, tmp_path):
    folder, logits = their_4bit["llama", True]
    export_hf(folder, None, tmp_path / "out")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDX).logits
    torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=0)


def test_a_merge_onto_a_4bit_folder_is_onto_the_codes_that_training_saw(their_4bit, tmp_path):
    folder, _ = their_4bit["llama", True]
    model, _ = load(folder, quantize=NF4Config())
    apply_lora_(model, LoRAConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(normal(*parameter.shape))
        trained = model(IDX)
    save_adapter(model, tmp_path / "adapter", base_model=str(folder))
    merged, _ = load(tmp_path / "adapter")
    torch.testing.assert_close(merged(IDX), trained, atol=1e-4, rtol=1e-5)
    divergences = merge_divergence(folder, tmp_path / "adapter", IDX[0])
    assert abs(divergences["nf4"]) < 1e-6


UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def state_of(**changes):
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [96, 64], "nested_blocksize": 256}
    values |= {"nested_dtype": "float32", "nested_offset": 0.05, **changes}
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({f"{UP}.absmax": None}, CheckpointError, r"up_proj\.weight is in NF4, but 'model.*absmax' is missing"),
        ({f"{UP}.nested_absmax": None}, CheckpointError, "nested_absmax' is missing"),
        ({UP: None}, CheckpointError, "is missing"),
        ({UP: torch.zeros(5, 1, dtype=torch.uint8)}, CheckpointError, "is 5 values of torch.uint8, must be 3,072"),
        (
            {f"{UP}.absmax": torch.zeros(96)},
            CheckpointError,
            r"absmax is 96 values of torch\.float32, must be 96 of torch\.uint8",
        ),
        ({f"{UP}.quant_map": torch.zeros(16)}, ConvertError, r"up_proj\.weight\.quant_map holds other values"),
        ({f"{UP}.nested_quant_map": torch.zeros(256)}, ConvertError, "nested_quant_map holds other values"),
        ({STATE: None}, CheckpointError, "whose quant_state is missing"),
        ({STATE: torch.tensor([123], dtype=torch.uint8)}, CheckpointError, "its quant_state is not valid JSON"),
        ({STATE: torch.tensor([91, 93], dtype=torch.uint8)}, CheckpointError, "known here of shape, blocksize, dtype"),
        ({STATE: torch.zeros(20_000, dtype=torch.uint8)}, CheckpointError, "its quant_state is 20,000 values"),
        ({STATE: state_of(shape=[96, 65])}, CheckpointError, "must be 3,120"),
        ({STATE: state_of(shape=[64, 96])}, CheckpointError, r"of another shape: model.*up_proj"),
        ({STATE: state_of(shape=[2**60, 2**60])}, CheckpointError, "known here of shape"),
        ({STATE: state_of(blocksize=0)}, CheckpointError, "known here of blocksize"),
        ({STATE: state_of(blocksize=[])}, CheckpointError, "known here of blocksize"),
        ({STATE: state_of(dtype={})}, CheckpointError, "known here of dtype"),
        ({STATE: state_of(nested_blocksize=64)}, CheckpointError, "known here of nested_blocksize"),
        ({STATE: state_of(nested_offset="x")}, CheckpointError, "known here of nested_offset"),
        ({STATE: None, f"{UP}.quant_state.bitsandbytes__fp4": state_of()}, ConvertError, "4-bit type 'fp4'"),
    ],
)
def test_a_damaged_4bit_folder_is_refused(their_4bit, tmp_path, changes, error, message):
    folder = shutil.copytree(their_4bit["llama", True][0], tmp_path / "damaged")
    tensors = {name: tensor.read().clone() for name, tensor in read_safetensors(folder).items()} | changes
    write_tensors(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(error, match=message):
        load(folder, device="meta")


def test_other_quantizations_are_refused(their_4bit, tmp_path):
    folder = shutil.copytree(their_4bit["llama", True][0], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match="quantization_config"):
        load(folder)
