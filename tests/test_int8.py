"""Token embedding and output projection in 8 bits: rounding, layers, training, files."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmforge import generate
from llmforge.cli.dry_run import dry_run, profile_run
from llmforge.cli.finetune_config import FinetuneConfig
from llmforge.convert import export_hf, load
from llmforge.convert.published import publish
from llmforge.errors import CheckpointError, ConfigError
from llmforge.finetune import LoRAConfig, NF4Config, apply_lora_, merge_lora_, quantize_, save_adapter
from llmforge.finetune.adapter_files import read_adapter
from llmforge.finetune.memory import EMBEDDINGS, MemoryPlan
from llmforge.models import Llama, LlamaConfig
from llmforge.nn import Embedding8bit, HostEmbedding8bit, Int8Matrix, Linear4bit, Linear8bit, int8, offload_embedding_
from llmforge.quant.int8 import dequantize_int8_rows, quantize_int8_rows
from llmforge.training import next_token_loss
from llmforge.training.loss import chunked_next_token_loss

V, C = 99, 32
LLAMA = dict(vocab_size=V, hidden_size=C, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, max_position_embeddings=64)
IN_8 = NF4Config(embedding_bits=8)


def llama(**changes):
    torch.manual_seed(0)
    return Llama(LlamaConfig(**{**LLAMA, **changes}))


def in_8(model):
    quantize_(model, IN_8)
    return model


def decoded(model):
    """The model with float matrices of the same values, in plain layers, made here by hand."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Embedding8bit):
            new = nn.Embedding.from_pretrained(module.matrix.codes.float() * module.matrix.scales[:, None])
        elif isinstance(module, Linear8bit):
            new = nn.Linear(C, V, bias=False)
            new.weight = nn.Parameter(module.matrix.codes.float() * module.matrix.scales[:, None], requires_grad=False)
        else:
            continue
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = new
    return model


@pytest.fixture
def slices_of_10_rows(monkeypatch):
    monkeypatch.setattr(int8, "_SLICE_WEIGHTS", 10 * C)


# Numbers


def test_a_row_is_rounded_as_it_is_by_hand():
    # Scales of 1, 0 and 2; halves go to the even code.
    row = torch.tensor(
        [[127.0, -126.5, 125.5, 0.5, -1.5, 0.0], [0, 0, 0, 0, 0, 0], [-254.0, 2.0, 3.0, 1.0, 5.0, 127.0]]
    )
    codes, scales = quantize_int8_rows(row)
    assert codes.tolist() == [[127, -126, 126, 0, -2, 0], [0] * 6, [-127, 1, 2, 0, 2, 64]]
    assert codes.dtype is torch.int8
    assert scales.dtype is torch.float32
    assert scales.tolist() == [1.0, 0.0, 2.0]
    assert dequantize_int8_rows(codes, scales)[2].tolist() == [-254.0, 2.0, 4.0, 0.0, 4.0, 128.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(-40, 37), st.integers(0, 2**31))
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(rows, n, exponent, seed):
    weight = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    codes, scales = quantize_int8_rows(weight)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    off = (dequantize_int8_rows(codes, scales).double() - weight.double()).abs()
    assert (off <= step * (0.5 + 1e-4) + 1e-43).all()  # the least float is 1.4e-45, and a scale no finer
    assert codes.abs().amax() <= 127


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_code_are_refused(bad):
    with pytest.raises(ConfigError, match="NaN or infinity"):
        quantize_int8_rows(torch.tensor([[1.0, bad]]))
    model = llama()
    model.lm_head.weight.data[7, 3] = bad
    with pytest.raises(ConfigError, match="lm_head: NaN or infinity"):
        in_8(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_values_are_float32_products_rounded_once(dtype):
    matrix = Int8Matrix.from_weight(torch.randn(V, C))
    product = matrix.codes.float() * matrix.scales[:, None]
    assert torch.equal(matrix.dequantize(dtype), product.to(dtype))
    assert not torch.equal(matrix.dequantize(dtype), matrix.codes.to(dtype) * matrix.scales[:, None].to(dtype))


# Layers


@pytest.mark.parametrize("bias", [False, True])
def test_head_is_the_product_with_its_matrix_forward_and_backward(bias, slices_of_10_rows):
    torch.manual_seed(0)
    b = nn.Parameter(torch.randn(V)) if bias else None
    layer = Linear8bit(Int8Matrix.from_weight(torch.randn(V, C)), b)
    weight = layer.matrix.codes.float() * layer.matrix.scales[:, None]
    x, grad = torch.randn(3, 5, C, requires_grad=True), torch.randn(3, 5, V)
    wanted = [x, *([b] if bias else [])]
    plain = F.linear(x, weight, b)
    expected = torch.autograd.grad(plain, wanted, grad)
    y = layer(x)
    torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-5)


def test_head_computes_in_the_type_of_autocast(slices_of_10_rows):
    torch.manual_seed(0)
    layer = Linear8bit(Int8Matrix.from_weight(torch.randn(V, C)))
    weight = (layer.matrix.codes.float() * layer.matrix.scales[:, None]).bfloat16()
    x, grad = torch.randn(4, C, requires_grad=True), torch.randn(4, V).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), F.linear(x, weight)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=2**-7, atol=1e-2)
    (ours,), (theirs,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(plain, x, grad)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0.1)
    assert layer(x.double()).dtype is torch.float64
    assert layer.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


class LargestFloats(TorchDispatchMode):
    """The most floats that one tensor has had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.most = max(self.most, *found, 0)
        return out


def test_no_whole_matrix_of_floats_ever_exists(slices_of_10_rows):
    layer = Linear8bit(Int8Matrix.from_weight(torch.randn(V, C)))
    saved = []
    x = torch.randn(2, C, requires_grad=True)
    with (
        LargestFloats() as floats,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        layer(x).sum().backward()
    assert floats.most == 10 * C
    assert {t.data_ptr() for t in saved} == {layer.matrix.codes.data_ptr(), layer.matrix.scales.data_ptr()}


def test_rounding_makes_no_whole_matrix_of_floats_either(slices_of_10_rows):
    weight = torch.randn(V, C).bfloat16()
    with LargestFloats() as floats:
        matrix = Int8Matrix.from_weight(weight)
    assert floats.most == 10 * C
    codes, scales = quantize_int8_rows(weight)
    assert torch.equal(matrix.codes, codes)
    assert torch.equal(matrix.scales, scales)


def test_embedding_decodes_the_rows_that_are_looked_up_and_no_others():
    layer = Embedding8bit(Int8Matrix.from_weight(torch.randn(V, C)))
    ids = torch.tensor([[5, 98, 5], [0, 1, 2]])
    with LargestFloats() as floats:
        rows = layer(ids)
    assert floats.most == max(ids.numel() * C, V)  # V: a view of the scales
    assert torch.equal(rows, (layer.matrix.codes.float() * layer.matrix.scales[:, None])[ids])
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_codes_and_scales_stay_what_they_are_whatever_the_model_is_cast_to(cast):
    model = in_8(llama())
    before = {name: value.clone() for name, value in model.state_dict().items() if ".matrix." in name}
    assert len(before) == 4
    dtype = cast(model).model.norm.weight.dtype
    after = model.state_dict()
    assert all(after[name].dtype is value.dtype and torch.equal(after[name], value) for name, value in before.items())
    assert model.model.embed_tokens(torch.zeros(1, dtype=torch.int64)).dtype is dtype
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype is dtype


# Models


@pytest.mark.parametrize("tied", [False, True])
def test_quantize_exchanges_the_embedding_and_the_head(tied):
    model = llama(tie_word_embeddings=tied)
    params = model.num_params()
    original = model.model.embed_tokens.weight.detach().clone()
    names = quantize_(model, IN_8)
    assert names[0] == "model.embed_tokens"
    assert names[-1] == "lm_head"
    assert len(names) == 2 + 2 * 7
    assert isinstance(model.model.embed_tokens, Embedding8bit)
    assert isinstance(model.lm_head, Linear8bit)
    assert model.num_params() == params
    assert (model.lm_head.matrix is model.model.embed_tokens.matrix) is tied
    torch.testing.assert_close(model.model.embed_tokens.dequantize(), original, rtol=0, atol=original.abs().max() / 253)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert (moved.lm_head.matrix is moved.model.embed_tokens.matrix) is tied


def test_other_choices_leave_a_model_as_they_did():
    model = llama()
    assert len(quantize_(model, NF4Config())) == 2 * 7
    assert type(model.lm_head) is nn.Linear
    model = llama()  # in 4 bits by choice
    quantize_(model, NF4Config(skip=(), embedding_bits=8))
    assert isinstance(model.lm_head, Linear4bit)
    assert isinstance(model.model.embed_tokens, Embedding8bit)
    with pytest.raises(ConfigError, match="Sequential does not say which its token embedding is.*embedding_bits to 16"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), IN_8)
    with pytest.raises(ConfigError, match=r"embedding_bits \(4\) must be 8, or 16"):
        NF4Config(embedding_bits=4)
    assert NF4Config.from_dict({"block_size": 64, "double_quant": True, "skip": ["lm_head"]}) == NF4Config()
    model = llama()
    offload_embedding_(model)
    with pytest.raises(ConfigError, match="embed_tokens is a HostEmbedding, and only a plain nn.Embedding"):
        in_8(model)


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_models_without_values_get_layers_without_values(place):
    with torch.device("meta") if place == "meta" else FakeTensorMode():
        model = in_8(llama(tie_word_embeddings=True))
        codes = model.lm_head.matrix.codes
        assert codes.shape == (V, C)
        assert codes.dtype is torch.int8
        loss, _ = next_token_loss(model, (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)))
        assert loss.shape == ()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "blocks", "offload"])
def test_loss_and_gradients_are_those_of_the_decoded_model(tied, checkpointing, slices_of_10_rows):
    model = in_8(llama(tie_word_embeddings=tied))
    apply_lora_(model, LoRAConfig(r=4))
    for module in model.modules():
        if hasattr(module, "B"):
            nn.init.normal_(module.B, std=0.1)
    plain = decoded(model)
    idx, targets = torch.randint(V, (2, 2, 12))
    targets[0, :6] = -100

    def found(of, loss_fn, **options):
        loss, count = loss_fn(of, (idx, targets), **options)
        trained = [p for p in of.parameters() if p.requires_grad]
        return [loss, count, *torch.autograd.grad(loss, trained)]

    expected = found(plain.train(), next_token_loss)
    model.train().set_activation_checkpointing(checkpointing)
    for loss_fn, options in ((next_token_loss, {}), (chunked_next_token_loss, {"chunk_tokens": 5})):
        torch.testing.assert_close(found(model, loss_fn, **options), expected, rtol=1e-5, atol=1e-5)


def test_chunked_loss_never_makes_the_matrix(slices_of_10_rows):
    model = in_8(llama())
    apply_lora_(model, LoRAConfig(r=4))
    idx = torch.randint(V, (1, 4))
    with LargestFloats() as floats:
        chunked_next_token_loss(model, (idx, idx), chunk_tokens=2)[0].backward()
    assert floats.most < V * C


def test_generation_is_that_of_the_decoded_model():
    model = in_8(llama(tie_word_embeddings=True)).eval()
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(
        generate(model, prompt, max_new_tokens=8, temperature=0),
        generate(decoded(model), prompt, max_new_tokens=8, temperature=0),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_carries_codes_and_scales(tied):
    model = in_8(llama(tie_word_embeddings=tied))
    torch.manual_seed(1)
    other = Llama(LlamaConfig(**{**LLAMA, "tie_word_embeddings": tied}))
    in_8(other)
    idx = torch.randint(V, (1, 5))
    assert not torch.equal(model(idx), other(idx))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(idx), other(idx))


# The embedding in host memory


def test_an_embedding_of_8_bits_moves_to_host_memory_as_it_is():
    model = in_8(llama())
    idx = torch.randint(V, (2, 6))
    before, keys, params = model(idx), list(model.state_dict()), model.num_params()
    assert offload_embedding_(model) == ["model.embed_tokens"]
    assert offload_embedding_(model) == []
    assert isinstance(model.model.embed_tokens, HostEmbedding8bit)
    assert torch.equal(model(idx), before)
    assert list(model.state_dict()) == keys
    assert model.num_params() == params
    assert model.bfloat16().model.embed_tokens(idx).dtype is torch.bfloat16
    codes = model.model.embed_tokens.matrix.codes
    model.to("meta")  # another device than the host's
    assert model.lm_head.matrix.codes.is_meta
    assert model.model.embed_tokens.matrix.codes is codes
    with pytest.raises(ConfigError, match=r"cannot move to host memory: lm_head\.matrix is the same matrix"):
        offload_embedding_(in_8(llama(tie_word_embeddings=True)))


# Files


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base"
    export_hf(llama(tie_word_embeddings=request.param), None, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_while_loading_is_rounding_after_loading(folder, dtype, monkeypatch):
    monkeypatch.setattr("llmforge.formats.lazy.LazyTensor.blocks.__kwdefaults__", {"max_bytes": 7 * C * 4})
    streamed, _ = load(folder, quantize=IN_8, dtype=dtype)
    later, _ = load(folder)
    in_8(later)
    later.to(dtype)
    assert streamed.model.embed_tokens.dtype is dtype
    assert (streamed.lm_head.matrix is streamed.model.embed_tokens.matrix) is later.config.tie_word_embeddings
    ours, theirs = streamed.state_dict(), later.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_matrix_that_diverged_is_refused_while_loading(tmp_path):
    model = llama()
    in_4 = NF4Config()
    export_hf(model, None, tmp_path / "base")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][3, 3] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    load(tmp_path / "base", quantize=in_4)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: NaN or infinity"):
        load(tmp_path / "base", quantize=IN_8)


@pytest.mark.parametrize("tied", [False, True])
def test_export_writes_what_was_computed_with(tied, tmp_path):
    model = in_8(llama(tie_word_embeddings=tied)).bfloat16()
    report = export_hf(model, None, tmp_path / "out", dtype=torch.bfloat16)
    assert any("model.embed_tokens and lm_head had 8 bits" in note for note in report.notes)
    assert any("14 linear layers were rounded to NF4" in note for note in report.notes)
    back, _ = load(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(back.model.embed_tokens.weight, model.model.embed_tokens.dequantize(torch.bfloat16))
    assert torch.equal(back.lm_head.weight, model.lm_head.dequantize(torch.bfloat16))
    idx = torch.randint(V, (1, 7))
    torch.testing.assert_close(back(idx), model(idx), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_an_adapter_beside_8_bits_is_written_read_and_merged(tied, on_host, tmp_path):
    model = in_8(llama(tie_word_embeddings=tied)).bfloat16()
    targets = ("q_proj", "lm_head")
    assert "lm_head" in apply_lora_(model, LoRAConfig(r=4, target_modules=targets))
    if on_host and not tied:
        offload_embedding_(model)
    for module in model.modules():
        if hasattr(module, "B"):
            nn.init.normal_(module.B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    nf4 = read_adapter(tmp_path / "adapter").rounding.nf4
    assert nf4 == NF4Config(embedding_bits=8)
    idx = torch.randint(V, (1, 7))
    logits = model(idx).float()
    published = publish(model)
    merge_lora_(model)
    assert not any(isinstance(m, (Int8Matrix, Linear8bit, Embedding8bit, Linear4bit)) for m in model.modules())
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model(idx).float(), logits, rtol=5e-2, atol=5e-2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(published.tensors[name].read(), tensor), name


def test_a_tied_matrix_stays_tied_in_a_merge():
    model = in_8(llama(tie_word_embeddings=True))
    apply_lora_(model, LoRAConfig(r=4))
    merge_lora_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert not model.lm_head.weight.requires_grad


def test_a_merge_onto_nf4_rounds_neither_embedding_nor_head(tmp_path):
    base = llama()
    export_hf(base, None, tmp_path / "base")
    model, _ = load(tmp_path / "base", quantize=IN_8)
    apply_lora_(model, LoRAConfig(r=4))
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert '"embedding_bits": 8' in (tmp_path / "adapter" / "base.json").read_text()
    from llmforge.convert.load import open_model

    published, _ = open_model(tmp_path / "adapter")
    assert torch.equal(published.tensors["model.embed_tokens.weight"].read(), base.model.embed_tokens.weight)
    assert torch.equal(published.tensors["lm_head.weight"].read(), base.lm_head.weight)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(published.tensors[q_proj].read(), base.state_dict()[q_proj])
    assert any("in training they had 8 bits" in note for note in published.notes)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_what_has_8_bits_cannot_be_trained_whole(module):
    with pytest.raises(
        ConfigError, match=r"holds a (Linear|Embedding)8bit and cannot be trained whole.*embedding_bits=16"
    ):
        apply_lora_(in_8(llama()), LoRAConfig(r=4, modules_to_save=(module,)))


# Memory


def test_a_dry_run_shows_the_bytes_that_8_bits_save():
    config = LlamaConfig(**{**LLAMA, "vocab_size": 4096})
    plan = MemoryPlan(seq_len=32)
    in_16, in_8_bits, on_host = (
        dry_run(
            config, nf4=NF4Config(embedding_bits=bits), lora=LoRAConfig(r=4), plan=plan.replace(embedding_on_host=host)
        )
        for bits, host in ((16, False), (8, False), (8, True))
    )
    assert in_16.items[EMBEDDINGS] == 2 * 4096 * C * 2
    assert in_8_bits.items[EMBEDDINGS] == 2 * 4096 * (C + 4)
    assert on_host.items[EMBEDDINGS] == 4096 * (C + 4)
    tied = dry_run(config.replace(tie_word_embeddings=True), nf4=IN_8, lora=LoRAConfig(r=4), plan=plan)
    assert tied.items[EMBEDDINGS] == 4096 * (C + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_dry_run_needs_what_the_run_does(dtype, on_host, monkeypatch):
    monkeypatch.setattr(int8, "_SLICE_WEIGHTS", 300 * C)  # of 1024 rows: the logits of the run are those of many slices
    config = LlamaConfig(**{**LLAMA, "vocab_size": 1024})
    plan = MemoryPlan(seq_len=64, embedding_on_host=on_host, activation_checkpointing="offload")
    fake, real = (
        profile_run(
            config, nf4=IN_8, lora=LoRAConfig(r=4), plan=plan, dtype=dtype, device_type="cpu", fake=fake
        ).estimate
        for fake in (True, False)
    )
    assert 0 <= real.peak_bytes - fake.peak_bytes <= 8192  # tables of codes, see `dynamic8`
    assert fake.host_bytes == real.host_bytes


def test_a_tuning_run_asks_for_8_bits_beside_4_alone():
    given = {"base_model": "base", "datasets": [{"path": "a.jsonl"}], "embedding_bits": 8}
    assert FinetuneConfig.from_dict({**given, "adapter": "qlora"}).nf4_config == IN_8
    for rest in ({"adapter": "lora"}, {"adapter": None}):
        with pytest.raises(ConfigError, match="embedding_bits: 8 belongs to a base in 4 bits"):
            FinetuneConfig.from_dict({**given, **rest})
    with pytest.raises(ConfigError, match="embedding_bits"):
        FinetuneConfig.from_dict({**given, "adapter": "qlora", "embedding_bits": 4})
