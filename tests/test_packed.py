"""Packed ternary layers: integers are exact, layers compute what BitLinear does, texts are the same, and what cannot be is refused."""

import copy
import gc
import os
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy import TEXT, toy_trainer

import llmforge
from llmforge.convert import export_gguf, export_hf
from llmforge.errors import ConfigError, ConvertError
from llmforge.generation import generate, generate_text
from llmforge.models import GPT, BitNet, BitNetConfig, GPTConfig
from llmforge.nn import BitLinear, PackedBitLinear, pack_, packed, set_quantization_
from llmforge.quant.ternary import fake_int8, int8_codes, pack_2bit
from llmforge.quant.ternary_kernel import ternary_kernel
from llmforge.tokenizers import BPETokenizer

BPE = BPETokenizer.from_texts([TEXT], vocab_size=300, pre_tokenizer="llama-bpe")
TOKENS = [0, 1, 2, 3, 17, 64, 100]  # the kernel takes two at a time, and 24 in one pass
needs_kernel = pytest.mark.skipif(ternary_kernel() is None, reason="a processor on which packed layers are not offered")


def toy(**changes) -> BitNet:
    torch.manual_seed(0)
    sizes = dict(vocab_size=BPE.vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    config = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    return BitNet(BitNetConfig(**{**config, **changes})).eval()


def layer(in_features=768, out_features=40, *, bias=False, **options) -> BitLinear:
    torch.manual_seed(in_features + out_features)
    made = BitLinear(in_features, out_features, bias=bias, **options).eval()
    for p in (made.bias, made.rms_norm.weight if made.rms_norm is not None else None):
        if p is not None:
            nn.init.normal_(p)
    return made


def as_floats(layer: BitLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a BitLinear computes, in float64, and the sum of the magnitudes that it adds up."""
    x = x if layer.rms_norm is None else layer.rms_norm(x)
    x, weight = layer.quantized_input(x).double(), layer.quantized_weight().double()
    bias = 0 if layer.bias is None else layer.bias.double()
    return F.linear(x, weight) + bias, F.linear(x.abs(), weight.abs()) + abs(bias)


def test_there_is_a_kernel_where_there_should_be():
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert ternary_kernel() is not None, "these tests need a C compiler (cc, gcc, clang, or the one that CC names)"


# --- The kernel, against sums of Python's and torch's integers


def exact_sums(x: torch.Tensor, codes: torch.Tensor, **options) -> torch.Tensor:
    """The kernel's sums of products: with a step and a scale of 1 nothing rounds."""
    padded = F.pad(codes, (0, 0, 0, -len(codes) % 4))
    return (
        ternary_kernel()
        .linear(x.float(), pack_2bit(padded), torch.tensor(1.0), out_features=len(codes), **options)
        .int()
    )


@needs_kernel
@given(st.integers(0, 60), st.integers(1, 2200), st.integers(1, 30), st.integers(0, 99))
def test_sums_of_products_are_exact(tokens, width, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, width), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (tokens, width), generator=generator)
    x[:, seed % width] = 127  # the largest: x is its own codes
    assert torch.equal(exact_sums(x, codes), (x @ codes.T.long()).int())


@needs_kernel
@pytest.mark.parametrize("value", [127, -127])
@pytest.mark.parametrize("code", [-1, 0, 1])
@pytest.mark.parametrize("width", [31, 1024, 1056, 8192])
def test_the_largest_sums_do_not_overflow(width, code, value):
    codes = torch.full((5, width), code, dtype=torch.int8)
    assert exact_sums(torch.full((3, width), value), codes).tolist() == [[width * value * code] * 5] * 3


@needs_kernel
@pytest.mark.parametrize("group", [None, 256])
def test_activations_are_rounded_to_the_same_codes(group):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 1, generator=generator) / 127
    x = x * torch.randint(-126, 126, (400, 512), generator=generator) + x / 2  # on the edges between codes, nearly
    x[:, ::256] = x[:, ::256].sign() * x.abs().amax(dim=1, keepdim=True) * (127 / 126.5)
    unit = pack_2bit(torch.eye(512, dtype=torch.int8))
    found = ternary_kernel().linear(x, unit, torch.tensor(1.0), out_features=512, act_group=group)
    assert torch.equal(found, fake_int8(x, group_size=group))


@needs_kernel
@pytest.mark.parametrize("groups", [1, 3])
def test_threads_and_neighbours_do_not_change_a_bit(groups):
    torch.manual_seed(0)
    x, codes = torch.randn(70, 768), torch.randint(-1, 2, (512, 768))
    scale = torch.rand(512, groups, 1) if groups > 1 else torch.tensor(0.5)
    kernel, n_threads = ternary_kernel(), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(kernel.linear(x, pack_2bit(codes), scale, out_features=512))
    torch.set_num_threads(n_threads)
    one_by_one = torch.cat([kernel.linear(row, pack_2bit(codes), scale, out_features=512) for row in x.split(1)])
    assert all(torch.equal(result, one_by_one) for result in results)
    if groups == 1:
        x_codes, step = int8_codes(x)
        assert torch.equal(one_by_one, (x_codes.double() @ codes.T.double()).float() * (step * scale))


# --- A layer, against BitLinear


@needs_kernel
@pytest.mark.parametrize("side", ["kernel", "floats"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", [None, 256, 384, 3])
@pytest.mark.parametrize("act_quant", ["token", "group"])
@torch.no_grad()
def test_a_packed_layer_computes_what_bitlinear_does(act_quant, group_size, bias, norm, side, monkeypatch):
    """On both sides of the switch, that is, even if this machine had none."""
    monkeypatch.setattr(ternary_kernel(), "most_tokens", 1 << 62 if side == "kernel" else 0)
    one = layer(bias=bias, act_quant=act_quant, group_size=group_size, norm=norm)
    two = PackedBitLinear(one)
    for tokens in TOKENS:
        x = torch.randn(tokens, 768) * 3
        expected, magnitude = as_floats(one, x)
        found = two(x)
        assert found.dtype == torch.float32
        assert found.shape == (tokens, 40)
        # Sums of up to 768 float32 products; a wrong code would be 1e-3 of the magnitude.
        assert ((found - expected).abs() <= 1e-6 * magnitude).all()
        if side == "floats":
            assert torch.equal(found, one(x))


@needs_kernel
@given(
    st.integers(1, 700), st.integers(1, 40), st.lists(st.integers(0, 5), max_size=3), st.booleans(), st.integers(0, 99)
)
@torch.no_grad()
def test_any_shape(width, rows, batch, bias, seed):
    one = layer(width, rows, bias=bias)
    x = torch.randn(*batch, width, generator=torch.Generator().manual_seed(seed))
    expected, magnitude = as_floats(one, x)
    found = PackedBitLinear(one)(x)
    assert found.shape == (*batch, rows)
    assert ((found - expected).abs() <= 1e-6 * magnitude).all()


@needs_kernel
@torch.no_grad()
def test_the_switch_is_by_tokens_and_the_kernel_s_choice(monkeypatch):
    one, asked = PackedBitLinear(layer()), []
    monkeypatch.setattr(ternary_kernel(), "most_tokens", 8)
    monkeypatch.setattr(ternary_kernel(), "decode", lambda *a, **k: asked.append(1) or torch.zeros(40, 768))
    one(torch.randn(2, 4, 768))
    assert asked == []
    one(torch.randn(3, 3, 768))
    assert asked == [1]


@needs_kernel
@pytest.mark.parametrize("act_quant", ["token", "group"])
@torch.no_grad()
def test_zeros_large_and_broken_values_are_bitlinear_s(act_quant):
    one = layer(act_quant=act_quant)
    x = torch.randn(6, 768)
    x[0] = 0
    x[1] *= 1e30
    x[2] *= 1e-9
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    found, expected = PackedBitLinear(one)(x), one(x)
    assert found[[3, 4]].isnan().all()
    assert expected[[3, 4]].isnan().all()
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[[1, 2, 5]], expected[[1, 2, 5]], rtol=1e-4, atol=1e-12)


@needs_kernel
@torch.no_grad()
def test_views_and_a_model_cast_since():
    one = layer(bias=True)
    two = PackedBitLinear(one)
    x = torch.randn(768, 12).T
    assert torch.equal(two(x), two(x.contiguous()))
    with pytest.raises(ValueError, match="x has 767 values per token, the layer takes 768"):
        two(x[:, 1:])
    half = copy.deepcopy(two).bfloat16()
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), one(x.bfloat16().float()), rtol=0.01, atol=0.01)


@needs_kernel
@torch.no_grad()
def test_without_the_kernel_a_packed_layer_still_computes(monkeypatch):
    """A packed model that was sent to another machine, or to a GPU."""
    for group_size in (None, 384):
        one = layer(out_features=39, bias=True, group_size=group_size)
        two, x = PackedBitLinear(one), torch.randn(5, 768)
        with monkeypatch.context() as patch:
            patch.setattr(packed, "ternary_kernel", lambda: None)
            assert torch.equal(two(x), one(x))


@torch.no_grad()
def test_the_kernel_gets_no_pointers_of_another_device(monkeypatch):
    monkeypatch.setattr(packed, "ternary_kernel", lambda: pytest.fail("the kernel was asked"))
    monkeypatch.setattr(packed, "unpack_2bit", lambda codes: codes.new_zeros(40, 768))  # its check needs values
    assert PackedBitLinear(layer()).to("meta")(torch.randn(3, 768, device="meta")).shape == (3, 40)


# --- Whole models


@needs_kernel
@pytest.mark.parametrize("act_quant", ["token", "group"])
@pytest.mark.parametrize("kind", ["plain", "sub_norm", "gpt"])
def test_a_packed_model_writes_the_same_text(kind, act_quant):
    if kind == "gpt":
        torch.manual_seed(0)
        shape = dict(vocab_size=BPE.vocab_size, block_size=64, n_layer=2, n_head=4, n_embd=256)
        model = GPT(GPTConfig(**shape, ternary=True, act_quant=act_quant)).eval()
    else:
        model = toy(act_quant=act_quant, sub_norm=kind == "sub_norm")
    idx = torch.randint(0, BPE.vocab_size, (2, 40))
    write = partial(generate_text, model, BPE, "En un lugar", max_new_tokens=70, temperature=0)  # beyond the context
    text = write()
    with torch.no_grad():
        expected = model(idx)
    names = pack_(model)
    assert len(names) == 2 * (4 if kind == "gpt" else 7)
    assert all(isinstance(model.get_submodule(name), PackedBitLinear) for name in names)
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        # A code on the edge between two values may fall to the other side: float sums before it have another order.
        torch.testing.assert_close(model(idx), expected, rtol=0, atol=0.05 * expected.std().item())
    assert write() == text


@needs_kernel
@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_compiled_step_calls_the_same_kernel():
    model = toy()
    pack_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    idx = torch.randint(0, BPE.vocab_size, (1, 9))
    with torch.no_grad():
        assert torch.equal(compiled(idx), model(idx))
    with pytest.raises(
        Exception, match="load the model again to train it"
    ):  # torch wraps what it meets while compiling
        torch.compile(model, backend="aot_eager")(idx).sum().backward()
    torch._dynamo.reset()


@needs_kernel
def test_weights_take_two_bits_and_the_float_ones_are_gone():
    model = toy()
    one = model.model.layers[0].mlp.up_proj
    old, weight = weakref.ref(one), weakref.ref(one.weight)
    del one
    names = pack_(model)
    gc.collect()
    assert old() is None
    assert weight() is None
    for name in names:
        made = model.get_submodule(name)
        assert not list(made.parameters())
        sizes = {name: buffer.nbytes for name, buffer in made.named_buffers()}
        assert sizes == {"codes": made.in_features * made.out_features // 4, "scale": 4}
        assert made.num_weights == made.in_features * made.out_features


@needs_kernel
def test_codes_and_scales_are_the_state():
    model, other = toy(), toy()
    nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    layers = {name: module.codes() for name, module in model.named_modules() if isinstance(module, BitLinear)}
    for one in (model, other):
        pack_(one)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, (codes, scale) in layers.items():
        assert torch.equal(state[f"{name}.codes"], pack_2bit(codes))
        assert torch.equal(state[f"{name}.scale"], scale)
        assert f"{name}.weight" not in state
    idx = torch.randint(0, BPE.vocab_size, (1, 9))
    with torch.no_grad():
        assert not torch.equal(other(idx), model(idx))
        other.load_state_dict(state)
        assert torch.equal(other(idx), model(idx))
    with pytest.raises(RuntimeError, match="codes"):
        toy().load_state_dict(state)


@needs_kernel
def test_a_layer_in_two_places_stays_one_and_others_stay_as_they_are():
    class Other(BitLinear):
        pass

    shared = BitLinear(8, 8)
    model = nn.ModuleDict(
        dict(a=shared, b=nn.Sequential(shared, nn.ReLU()), c=BitLinear(8, 8, act_quant="none"), d=Other(8, 8))
    )
    kept = model["c"], model["d"]
    assert pack_(model) == ["a"]
    assert isinstance(model["a"], PackedBitLinear)
    assert model["a"] is model["b"][0]
    assert (model["c"], model["d"]) == kept
    assert pack_(model) == []
    assert "PackedBitLinear(in_features=8, out_features=8, bias=False, act_quant=token)" in str(model)


# --- What is refused


@needs_kernel
def test_a_packed_model_does_not_train():
    model = toy()
    pack_(model)
    logits = model(torch.zeros(1, 4, dtype=torch.long))  # with gradients on: inference works
    with pytest.raises(ConfigError, match=r"packed layers \(pack_\).*load the model again to train it"):
        logits.sum().backward()
    with pytest.raises(ConfigError, match="load the model again to train it"):
        toy_trainer(model=model, max_steps=1, seq_len=16).train()
    # What needs no gradient through packed layers trains: a new output projection on a frozen model.
    model.requires_grad_(False)
    model.lm_head = nn.Linear(256, 3)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert model.lm_head.weight.grad is not None


@needs_kernel
def test_the_gradient_of_an_inner_norm_is_refused_too():
    with pytest.raises(ConfigError, match="load the model again"):
        PackedBitLinear(layer(norm=True))(torch.randn(2, 768)).sum().backward()


@needs_kernel
@pytest.mark.parametrize("export", [export_gguf, export_hf])
def test_a_packed_model_is_not_exported(export, tmp_path):
    model = toy()
    pack_(model)
    with pytest.raises(ConvertError, match=r"packed for inference \(pack_\).*load it again to export it"):
        export(model, BPE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def half(model):
    model.model.layers[1].bfloat16()


def elsewhere(model):
    model.model.layers[1].to("meta")


def warming_up(model):
    set_quantization_(model, 0.5)


REFUSED = {
    "bfloat16": (half, r"layers.1.self_attn.q_proj is torch.bfloat16.*model.float\(\).*TQ2_0.*llama.cpp"),
    "meta": (elsewhere, r"layers.1.self_attn.q_proj is on 'meta'.*model.cpu\(\).*TQ2_0.*llama.cpp"),
    "strength": (warming_up, r"layers.0.self_attn.q_proj applies its rounding by 0.5.*set_quantization_\(model, 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_fast_is_refused_and_nothing_changes(case):
    model = toy()
    change, message = REFUSED[case]
    change(model)
    before = list(model.modules())
    with pytest.raises(ConfigError, match=message):
        pack_(model)
    assert list(model.modules()) == before


def test_a_bitlinear_itself_is_its_owner_s():
    with pytest.raises(ConfigError, match="this is a BitLinear itself"):
        pack_(BitLinear(8, 8))


@pytest.fixture
def _other_kernel():
    """The kernel is looked for anew in the test, and after it."""
    ternary_kernel.cache_clear()
    yield
    ternary_kernel.cache_clear()


@pytest.mark.usefixtures("_other_kernel")
def test_without_a_compiler_it_is_not_offered(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    model = toy()
    before = list(model.modules())
    with pytest.raises(
        ConfigError, match="needs a C compiler.*AVX2 or ARM's dot products.*TQ2_0 and run it in llama.cpp"
    ):
        pack_(model)
    assert list(model.modules()) == before
    assert pack_(nn.Sequential(nn.Linear(4, 4))) == []  # nothing to compile for


SCRIPTS = pytest.mark.skipif(sys.platform == "win32", reason="compilers that are shell scripts")


def compiler_script(folder: Path, monkeypatch, line: str) -> None:
    """The only compiler of the machine runs this line of sh; REAL is one that works."""
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nPATH="{os.environ["PATH"]}"\nREAL="{real}"\n{line}\n', encoding="utf-8")
    script.chmod(0o755)
    empty = folder / "no compilers"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setenv("CC", str(script))


@SCRIPTS
@pytest.mark.parametrize(
    "line",
    ["exit 1", 'exec "$REAL" "$@" -mno-avx2', 'sed "s/epi8(3)/epi8(1)/; s/& 3/\\& 1/" | "$REAL" "$@"'],
    ids=["fails", "an old processor", "wrong code"],
)
@pytest.mark.usefixtures("_other_kernel")
def test_a_kernel_that_is_slow_or_wrong_is_not_used(line, monkeypatch, tmp_path):
    compiler_script(tmp_path, monkeypatch, line)
    assert ternary_kernel() is None


@needs_kernel
@SCRIPTS
@pytest.mark.usefixtures("_other_kernel")
def test_without_openmp_one_thread_leaves_long_prompts_to_many(monkeypatch, tmp_path):
    compiler_script(tmp_path, monkeypatch, 'case "$*" in *fopenmp*) exit 1;; esac; exec "$REAL" "$@"')
    assert 1 <= ternary_kernel().most_tokens < 100
    one, x = layer(), torch.randn(100, 768)
    with torch.no_grad():
        torch.testing.assert_close(PackedBitLinear(one)(x), one(x))


def test_the_c_sources_ship():
    package = Path(llmforge.__file__).parent
    shipped = (package.parent / "pyproject.toml").read_text(encoding="utf-8")
    for source in package.rglob("*.c"):
        assert f'"{source.relative_to(package).as_posix()}"' in shipped


@needs_kernel
def test_seeds_and_sampling_are_those_of_the_model():
    model = toy()
    idx = torch.tensor([[1, 2, 3]])
    expected = generate(model, idx, max_new_tokens=20, seed=5, temperature=0.8)
    pack_(model)
    assert torch.equal(generate(model, idx, max_new_tokens=20, seed=5, temperature=0.8), expected)


@needs_kernel
def test_packed_weights_count_as_parameters():
    model = toy()
    before = model.num_params()
    pack_(model)
    assert model.num_params() == before > sum(p.numel() for p in model.parameters())
