"""The number formats of ggml, held to ggml itself: its library writes the bytes, the gguf package reads them."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmforge.errors import ConvertError
from llmforge.quant.ggml import (
    ENCODABLE,
    block_shape,
    can_decode,
    codec,
    compiled,
    decode,
    encode,
    reference,
    round_to,
    vectorized,
)
from llmforge.quant.ggml import types as ggml_types
from llmforge.quant.ggml.types import TYPES, KAffine, Nonlinear, steps

# ggml compiles its C with the compiler's defaults: on x86-64 that keeps multiply and add apart; elsewhere they may be fused.
EXACT = platform.machine().lower() in ("x86_64", "amd64")

FORMS = {"torch": 1 << 60, "compiled": 0}  # name -> from how many weights on the compiled kernels are used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the gguf package's, of infinities
QUANTIZED = [name for name in ENCODABLE if name not in ("F32", "F16", "BF16")]
EVERY_TYPE = pytest.mark.parametrize("type_name", ENCODABLE)
EVERY_QUANTIZED = pytest.mark.parametrize("type_name", QUANTIZED)
IMPORTANCE = pytest.mark.parametrize("with_importance", [False, True], ids=["alike", "importance"])


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    use(request.param, monkeypatch)
    return request.param


def use(form: str, monkeypatch) -> None:
    assert form == "torch" or compiled.kernels(), (
        "these tests need a C compiler (cc, gcc, clang, or the one that CC names)"
    )
    monkeypatch.setattr(ggml_types, "COMPILE_FROM", FORMS[form])


# --- The reference


@cache
def ggml_quantize_chunk():
    spec = importlib.util.find_spec("llama_cpp")
    assert spec, "these tests need llama-cpp-python"
    libraries = Path(spec.origin).parent.joinpath("lib").iterdir()
    [path] = [path for path in libraries if re.fullmatch(r"(lib)?ggml-base\.(so|dylib|dll)", path.name)]
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    function.restype = ctypes.c_size_t
    return function


def by_ggml(values: torch.Tensor, type_name: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes that ggml writes."""
    values = values.contiguous()
    assert values.dtype == torch.float32
    weights, size = block_shape(type_name)
    data = torch.zeros(len(values), values.shape[1] // weights * size, dtype=torch.uint8)
    pointer = None if importance is None else importance.data_ptr()
    number = int(GGMLQuantizationType[type_name])
    written = ggml_quantize_chunk()(number, values.data_ptr(), data.data_ptr(), 0, *values.shape, pointer)
    assert written == data.numel()
    return data


def blocks_that_differ(ours: torch.Tensor, theirs: torch.Tensor, type_name: str) -> torch.Tensor:
    """(rows, blocks): which are not the same bytes."""
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    return (ours != theirs).view(len(ours), -1, block_shape(type_name)[1]).any(2)


def assert_blocks_of_ggml(ours: torch.Tensor, theirs: torch.Tensor, type_name: str, names: list[str]) -> None:
    """Every block the same; one in a thousand may differ where ggml was not compiled for exactness. A name for each row."""
    differ = blocks_that_differ(ours, theirs, type_name)
    if differ.float().mean() > (0 if EXACT else 1e-3):
        counts = {name: sum(int(n) for n, of in zip(differ.sum(1), names, strict=True) if of == name) for name in names}
        pytest.fail(f"{type_name}: blocks that differ of {differ.shape[1] * names.count(names[0])}: {counts}")


@cache
def weights_of_every_kind() -> tuple[torch.Tensor, list[str]]:
    """(rows, 1024), and which kind each row is of."""
    rng = np.random.default_rng(0)
    R, C = 6, 1024
    normal = rng.standard_normal
    block_scales = np.repeat(10.0 ** rng.uniform(-6, 0, (R, C // 32)), 32, 1)
    ties = rng.integers(-16, 16, (R, C)) / 2
    ties[:, ::16] = -8  # the scale is 1 then, and half of the others lie between two codes
    kinds = {
        "normal": normal((R, C)),
        "laplace": rng.laplace(size=(R, C)) * 0.02,
        "heavy tails": rng.standard_t(1.5, size=(R, C)),
        "sparse": normal((R, C)) * (rng.random((R, C)) < 0.05),  # with zeros of both signs
        "very sparse": normal((R, C)) * (rng.random((R, C)) < 0.003),
        "constant": np.ones((R, C)) * normal((R, 1)),
        "nearly constant": 1 + 1e-6 * normal((R, C)),
        "zero": np.zeros((R, C)) * normal((R, C)),
        "subnormal": normal((R, C)) * 10.0 ** rng.uniform(-46, -37, (R, 1)),
        "tiny": normal((R, C)) * 10.0 ** rng.uniform(-40, -4, (R, 1)),
        "tiny sub-blocks": normal((R, C)) * np.repeat(10.0 ** rng.uniform(-17, -13, (R, C // 16)), 16, 1),
        "a float16's smallest": normal((R, C)) * 10.0 ** rng.uniform(-9, -3, (R, 1)),
        "huge": np.clip(normal((R, C)) * 10.0 ** rng.uniform(2, 4.5, (R, 1)), -65_504, 65_504),
        "of many scales": normal((R, C)) * 10.0 ** rng.uniform(-8, 2, (R, C)),
        "blocks of many scales": normal((R, C)) * block_scales,
        "positive": rng.random((R, C)),
        "negative": -rng.random((R, C)),
        "around 5": 5 + normal((R, C)),
        "on a grid": np.round(normal((R, C)) * 4) / 4,
        "ties": ties,
        "two values": rng.choice([-0.3, 0.3], size=(R, C)),
        "ternary": rng.choice([-0.1, 0, 0.1], size=(R, C)),
        "steps": np.repeat(normal((R, C // 32)), 32, 1),
        "ramps": np.tile(np.linspace(-1, 1, 64), (R, C // 64)) * normal((R, 1)),
        "one outlier": normal((R, C)) * np.where(rng.random((R, C)) < 1 / 64, 30, 0.3),
    }
    return torch.from_numpy(np.concatenate([*kinds.values()]).astype(np.float32)), [k for k in kinds for _ in range(R)]


@cache
def importance_of_every_kind(n: int = 1024) -> torch.Tensor:
    rng = np.random.default_rng(1)
    kinds = [
        rng.random(256) ** 4 * 10 * (rng.random(256) > 0.02),
        np.repeat(rng.random(16) > 0.5, 16) * rng.random(256),  # nothing matters in half of the sub-blocks
        np.ones(256),
        10.0 ** rng.uniform(-12, 6, 256),
    ]
    return torch.from_numpy(np.concatenate(kinds).astype(np.float32))[:n].clone()


@cache
def bytes_of_ggml(type_name: str, with_importance: bool) -> torch.Tensor:
    return by_ggml(weights_of_every_kind()[0], type_name, importance_of_every_kind() if with_importance else None)


def same_floats(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Bit for bit, where one NaN is as good as another."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return (left.view(bits) == right.view(bits)) | (left.isnan() & right.isnan())


# --- The bytes


@EVERY_TYPE
@IMPORTANCE
def test_every_block_has_the_bytes_of_ggml(type_name, with_importance, form):
    values, names = weights_of_every_kind()
    importance = importance_of_every_kind() if with_importance else None
    ours = encode(values, type_name, importance=importance)
    assert_blocks_of_ggml(ours, bytes_of_ggml(type_name, with_importance), type_name, names)


@EVERY_QUANTIZED
@IMPORTANCE
def test_rows_of_any_number_of_blocks_have_the_bytes_of_ggml(type_name, with_importance, form):
    values, _ = weights_of_every_kind()
    for n_blocks in (1, 3, 4):
        n = n_blocks * block_shape(type_name)[0]
        rows = values.flatten()[: values.numel() // n * n].view(-1, n)[::n_blocks][:300].contiguous()
        importance = importance_of_every_kind(n) if with_importance else None
        ours = encode(rows, type_name, importance=importance)
        assert_blocks_of_ggml(ours, by_ggml(rows, type_name, importance), type_name, ["a row"] * len(rows))


@EVERY_QUANTIZED
def test_another_weight_or_importance_shows(type_name):
    """Control: the comparison sees one weight."""
    values, _ = weights_of_every_kind()
    changed = values[:6].clone()
    changed[3, 700] += 10
    differ = blocks_that_differ(encode(changed, type_name), bytes_of_ggml(type_name, False)[:6], type_name)
    assert differ.nonzero().tolist() == [[3, 700 // block_shape(type_name)[0]]]
    without = type_name in ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
    assert torch.equal(bytes_of_ggml(type_name, True), bytes_of_ggml(type_name, False)) == without


@EVERY_TYPE
@IMPORTANCE
def test_bytes_depend_neither_on_threads_nor_on_how_rows_are_split(type_name, with_importance, form, monkeypatch):
    values, _ = weights_of_every_kind()
    importance = importance_of_every_kind() if with_importance else None
    whole = encode(values, type_name, importance=importance)
    pieces = [encode(piece, type_name, importance=importance) for piece in values.split([1, 2, 7, 60, 80])]
    assert torch.equal(torch.cat(pieces), whole)
    monkeypatch.setattr(codec, "_PIECE", 4096)
    try:
        torch.set_num_threads(3)
        assert torch.equal(encode(values, type_name, importance=importance), whole)
    finally:
        torch.set_num_threads(1)


@EVERY_TYPE
def test_any_layout_and_float_type_is_read_and_none_is_changed(type_name, form):
    values = torch.randn(64, 256).half()
    importance = torch.rand(256)
    want = encode(values.float(), type_name, importance=importance)
    for same in (values, values.double(), values.t().contiguous().t(), values.float().t().contiguous().t()):
        before = same.clone()
        assert torch.equal(encode(same, type_name, importance=importance.double()), want)
        assert torch.equal(same, before)
    assert torch.equal(encode(values[5:6], type_name, importance=importance), want[5:6])
    every_second = torch.stack([values, -values], 2).view(64, 512)[:, ::2]
    assert torch.equal(encode(every_second, type_name, importance=importance), want)


# --- The values


BY_GGUF = [t.name for t in GGMLQuantizationType if can_decode(t.name) and t.name != "F64"]


@pytest.mark.parametrize("type_name", BY_GGUF)
@given(data=st.data())
def test_any_bytes_are_the_values_that_the_gguf_package_reads(type_name, data):
    size = 4 if type_name == "F32" else block_shape(type_name)[1]
    rows, n_blocks = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    drawn = data.draw(arrays(np.uint8, (rows, n_blocks * size)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 256, drawn.shape, np.uint8)
    for raw in (drawn, drawn ^ random):
        assert_read_as_gguf_does(torch.from_numpy(raw), type_name)


@EVERY_TYPE
@IMPORTANCE
def test_bytes_of_ggml_are_the_values_that_the_gguf_package_reads(type_name, with_importance):
    assert_read_as_gguf_does(bytes_of_ggml(type_name, with_importance), type_name)


def assert_read_as_gguf_does(data: torch.Tensor, type_name: str) -> None:
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(data.numpy(), GGMLQuantizationType[type_name])
    ours = decode(data, type_name)
    assert ours.shape == theirs.shape
    assert same_floats(ours.float(), torch.from_numpy(theirs).float()).all()


def test_can_decode_says_which_types_the_gguf_package_reads():
    for kind in GGMLQuantizationType:
        readable = kind.name == "F64" or kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        try:
            quants.dequantize(np.zeros((1, block_shape(kind.name)[1]), np.uint8), kind)
            readable = True
        except NotImplementedError:
            pass
        assert can_decode(kind.name) == readable, kind.name
        if not readable:
            with pytest.raises(ConvertError, match=f"{kind.name} cannot be decoded; it can be one of F32, F16"):
                decode(torch.zeros(1, block_shape(kind.name)[1], dtype=torch.uint8), kind.name)


@EVERY_TYPE
def test_round_to_leaves_what_is_read_back(type_name, form):
    values, _ = weights_of_every_kind()
    want = decode(encode(values, type_name), type_name).float()
    assert same_floats(round_to(values, type_name), want).all()
    of_three = values[:8].view(2, 4, 1024)
    assert same_floats(round_to(of_three, type_name), want[:8].view(2, 4, 1024)).all()
    assert same_floats(round_to(values[0], type_name), want[0]).all()
    assert same_floats(round_to(values[:9].double(), type_name), want[:9]).all()
    parameter = torch.nn.Parameter(values[:2].clone())
    assert same_floats(round_to(parameter, type_name).detach(), want[:2]).all()
    assert torch.equal(parameter, values[:2])


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_what_was_rounded_once_stays(type_name):
    """For the types whose scale is the largest weight's. It is not so for the others, whose scale is searched anew."""
    values, _ = weights_of_every_kind()
    once = round_to(values, type_name)
    assert torch.equal(round_to(once, type_name), once)  # of zeros, the sign may change


@pytest.mark.parametrize("type_name", ["TQ1_0", "TQ2_0"])
@given(scale=st.floats(2.0**-14, 65_504.0, width=16), seed=st.integers(0, 99))
def test_ternary_weights_are_kept(type_name, scale, seed):
    signs = torch.from_numpy(np.random.default_rng(seed).integers(-1, 2, (2, 512))).float()
    assert torch.equal(round_to(signs * scale, type_name), signs * scale)


# --- What cannot be encoded


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3))
NUMBERS_ONLY = pytest.mark.parametrize("type_name", [name for name in ENCODABLE if name not in ("F32", "BF16")])


@NUMBERS_ONLY
@given(shape=SHAPES, at=st.integers(0, 10_000), value=st.sampled_from(["nan", "-nan", "inf", "-inf"]))
@settings(max_examples=25)
def test_a_value_that_is_no_number_is_refused(type_name, shape, at, value):
    rows = torch.randn(shape[0], shape[1] * max(32, block_shape(type_name)[0]))
    rows.view(-1)[at % rows.numel()] = float(value)
    says = f"^a value is {'NaN' if 'nan' in value else 'infinite'}; {type_name} has finite numbers only$"
    with pytest.raises(ConvertError, match=says):
        encode(rows, type_name)
    with pytest.raises(ConvertError, match=says):
        encode(rows, type_name, importance=torch.ones(rows.shape[1]))


# The largest magnitude that each type can hold, of weights of both signs; more or less, to a factor of two.
LARGEST = {"F16": 1, "Q4_0": 8, "Q4_1": 1, "Q5_0": 16, "Q5_1": 1, "Q8_0": 127, "Q2_K": 15, "Q3_K": 4 * 32, "Q4_K": 63}
LARGEST |= {"Q5_K": 63, "Q6_K": 32 * 128, "IQ4_NL": 127, "IQ4_XS": 32 * 127, "TQ1_0": 1, "TQ2_0": 1}
LARGEST = {type_name: times * 65_504 for type_name, times in LARGEST.items()}


@pytest.mark.parametrize("type_name", LARGEST)
@given(shape=SHAPES, exponent=st.floats(1.0, 38.0), seed=st.integers(0, 99), with_importance=st.booleans())
@settings(max_examples=60)
@example(shape=(1, 1), exponent=20.0, seed=0, with_importance=False)
@example(shape=(4, 1), exponent=30.0, seed=0, with_importance=True)
def test_a_value_too_large_for_the_type_is_refused(type_name, shape, exponent, seed, with_importance):
    rng = np.random.default_rng(seed)
    n = shape[1] * max(32, block_shape(type_name)[0])
    rows = torch.from_numpy(rng.uniform(-1, 1, (shape[0], n)).astype(np.float32))
    rows[rng.integers(len(rows)), rng.integers(n)] = 1 if seed % 2 else -1
    rows *= 10.0**exponent
    importance = torch.from_numpy(rng.random(n).astype(np.float32)) if with_importance else None
    largest = 10.0**exponent
    if largest > 2 * LARGEST[type_name]:
        with pytest.raises(ConvertError) as caught:
            encode(rows, type_name, importance=importance)
        says = f"a value of {rows.abs().max().item():.3g} is too large for {type_name}; take BF16 or F32"
        assert str(caught.value) == says
    elif largest < LARGEST[type_name] / 2:
        left = decode(encode(rows, type_name, importance=importance), type_name).float()
        assert (left / largest - rows / largest).norm() < 0.6 * (rows / largest).norm()


@pytest.mark.parametrize("type_name", ["F32", "BF16", "MXFP4"])
def test_types_with_the_range_of_float32_hold_the_largest(type_name):
    values = torch.tensor([[3e38, -1e38, 1.0] + [0.0] * 29])
    assert torch.equal(encode(values, type_name), by_ggml(values, type_name))
    assert decode(encode(values, type_name), type_name).float()[0, 0].item() == pytest.approx(3e38, rel=0.15)


# --- One sub-block at a time


def numbers(largest: float, *, least: float | None = None):
    return st.one_of(
        st.floats(-largest if least is None else least, largest, width=32, allow_subnormal=True),
        st.sampled_from(
            [0.0, 1.0, 2.0, 0.5, 1e-3, 1e-15, 9e-16, 1e-38, 1e-45] + ([-0.0, -1.0] if least is None else [])
        ),
    ).map(np.float32)


@st.composite
def sub_blocks(draw, widths=(16, 32)):
    """x (N, n) and weights (N, n), 0 or more."""
    N, n = draw(st.integers(1, 3)), draw(st.sampled_from(widths))
    weights = draw(arrays(np.float32, (N, n), elements=numbers(2.0**20, least=0.0)))
    if draw(st.booleans()):
        return draw(arrays(np.float32, (N, n), elements=numbers(2.0**20))), weights
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((N, n)) * 10.0 ** draw(st.integers(-16, 4))
    if draw(st.booleans()):
        weights = rng.random((N, n)).astype(np.float32)
    return (np.abs(x) if draw(st.booleans()) else x).astype(np.float32), weights


def fast_forms():
    assert compiled.kernels(), "these tests need a C compiler (cc, gcc, clang, or the one that CC names)"
    return [vectorized, compiled.kernels()]


def assert_all_forms_agree(name: str, *inputs: np.ndarray, **options) -> None:
    """Search `name` on each row of the inputs by `reference`, and on all of them by the others."""
    with np.errstate(all="ignore"):
        rows = [getattr(reference, name)(*row, **options) for row in zip(*inputs, strict=True)]
    several = isinstance(rows[0], tuple)
    for module in fast_forms():
        given_inputs = [torch.from_numpy(values.copy()) for values in inputs]
        results = getattr(module, name)(*given_inputs, **options)
        for number, result in enumerate(results if several else [results]):
            want = [row[number] if several else row for row in rows]
            want = torch.from_numpy(np.array(want, np.float32 if result.is_floating_point() else np.uint8))
            same = same_floats(result, want) if result.is_floating_point() else result == want
            assert same.all(), f"{name} by {module}, result {number}: {result} is not {want}"
        if name != "recode":
            assert all(np.array_equal(now, was) for now, was in zip(given_inputs, inputs, strict=True))


AROUND = ggml_types._around
WIDE = ggml_types._WIDE
GRIDS = {ours.top: steps(*ours.grid, ours.top) for ours in TYPES.values() if isinstance(ours, KAffine)}
FEW = settings(max_examples=max(10, settings().max_examples // 5))


@pytest.mark.parametrize(("half", "top"), [(8, 15), (16, 31), (128, 255), (0, 15), (0, 31)])
@given(drawn=sub_blocks(widths=(32,)))
def test_rounding_without_a_search_is_the_one_that_can_be_read(half, top, drawn):
    assert_all_forms_agree("plain", drawn[0], half=half, top=top)


@pytest.mark.parametrize("top", [3, 15, 31])
@pytest.mark.parametrize("wide", [False, True], ids=["alike", "importance"])
@given(drawn=sub_blocks())
@FEW
def test_the_affine_search_is_the_one_that_can_be_read(top, wide, drawn):
    factors = steps(*WIDE, top) if wide else GRIDS[top]
    assert_all_forms_agree("affine", *drawn, top=top, factors=factors, absolute=top == 3 and not wide)


@pytest.mark.parametrize("half", [4, 8, 16, 32])
@given(drawn=sub_blocks())
@FEW
def test_the_symmetric_search_is_the_one_that_can_be_read(half, drawn):
    assert_all_forms_agree("symmetric", *drawn, half=half, factors=AROUND(half))


@given(drawn=sub_blocks(), n_passes=st.sampled_from([0, 1, 5]))
@FEW
def test_the_refined_search_is_the_one_that_can_be_read(drawn, n_passes):
    assert_all_forms_agree("refined", drawn[0], half=4, n_passes=n_passes)


@given(drawn=sub_blocks())
@FEW
def test_the_nonlinear_search_is_the_one_that_can_be_read(drawn):
    assert_all_forms_agree("nonlinear", *drawn, values=Nonlinear.VALUES, factors=Nonlinear.FACTORS)


@pytest.mark.parametrize("top", [15, 63])
@given(drawn=sub_blocks(widths=(8, 16)))
@FEW
def test_the_positive_search_is_the_one_that_can_be_read(top, drawn):
    x, weights = drawn  # a scale below 0 is rare, but ggml has its bytes for it
    factors = [
        np.float32(top),
        *(np.float32(0.1) * np.float32(i) + np.float32(top) for i in (-4, -3, -2, -1, 1, 2, 3, 4)),
    ]
    assert_all_forms_agree("positive", x, weights, top=top, factors=factors, n_passes=5)


@given(drawn=sub_blocks(widths=(16, 32, 256)), squares=st.booleans())
def test_sums_and_weights_are_those_that_can_be_read(drawn, squares):
    x, weights = drawn
    assert_all_forms_agree("sums", x, squares=squares)
    assert_all_forms_agree("magnitudes", x)
    assert_all_forms_agree("important", x, weights, weights[:, 0].copy())


@given(
    drawn=sub_blocks(),
    limits=st.sampled_from([(0, 3), (0, 15), (0, 31), (-4, 3), (-32, 31)]),
    zero=st.sampled_from([0.0, -0.0]),
)
def test_codes_for_a_rounded_scale_are_those_that_can_be_read(drawn, limits, zero):
    x, weights = drawn
    codes = (np.arange(x.size, dtype=np.uint8) % 4).reshape(x.shape)
    for step, offset in (
        (weights[:, 0] - weights[:, 1], weights[:, 2]),
        (x[:, 0], weights[:, 0] * 0),
        (x[:, 0] * 0 + zero, x[:, 1]),
    ):
        step, offset = step.astype(np.float32), offset.astype(np.float32)
        assert_all_forms_agree("recode", x, step, offset, codes, low=limits[0], high=limits[1])


@given(v=st.one_of(numbers(2.0**22), st.integers(-300, 300).map(lambda i: np.float32(i / 2))))
def test_nearest_is_pythons_own_half_to_even(v):
    with np.errstate(all="ignore"):
        assert reference.nearest(v) == round(float(v))
        assert vectorized.nearest(torch.tensor([v]), None, None).item() == round(float(v))
        assert vectorized.nearest(torch.tensor([v]), -8, 7).item() == max(-8, min(7, round(float(v))))


@given(v=st.one_of(numbers(200.0), st.integers(-300, 300).map(lambda i: np.float32(i / 2))))
def test_nearest_value_is_the_nearest_and_of_two_the_higher(v):
    values = Nonlinear.VALUES
    want = min(range(16), key=lambda i: (abs(np.float32(v) - np.float32(values[i])), -i))
    assert reference.nearest_value(v, values) == want
    assert vectorized.nearest_value(torch.tensor([v]), values).item() == want
    assert sum(v >= np.float32(threshold) for threshold in compiled._thresholds(values)) == want


def test_of_two_values_equally_near_every_form_takes_the_higher():
    values = np.array(Nonlinear.VALUES, np.float32)
    x = -np.array([[127, *(values[:-1] + values[1:]) / 2]], np.float32)  # times -1, these lie between two
    assert_all_forms_agree("nonlinear", x, np.ones_like(x), values=Nonlinear.VALUES, factors=())


def test_the_compiled_searches_take_any_number_of_sub_blocks():
    """More or fewer than the lanes of a vector, and than a thread takes at a time."""
    _, kernels = fast_forms()
    x, weights = torch.randn(40, 32), torch.rand(40, 32)
    for name, inputs, options in [
        ("affine", (x, weights), dict(top=15, factors=steps(*WIDE, 15))),
        ("symmetric", (x, weights), dict(half=8, factors=AROUND(8))),
        ("refined", (x,), dict(half=4, n_passes=5)),
        ("nonlinear", (x, weights), dict(values=Nonlinear.VALUES, factors=Nonlinear.FACTORS)),
        ("positive", (x.abs(), weights), dict(top=63, factors=[np.float32(63), np.float32(62.9)], n_passes=5)),
        ("plain", (x,), dict(half=8, top=15)),
        ("sums", (x,), dict(squares=True)),
        ("magnitudes", (x,), {}),
    ]:
        for count in range(40):
            some, every = (
                result if isinstance(result, tuple) else (result,)
                for result in (
                    getattr(kernels, name)(*(values[:n] for values in inputs), **options) for n in (count, 40)
                )
            )
            assert all(torch.equal(part, whole[:count]) for part, whole in zip(some, every, strict=True)), (name, count)


# --- Without the compiler


@pytest.fixture
def _other_kernels():
    """Kernels are looked for anew in the test, and after it."""
    compiled.kernels.cache_clear()
    yield
    compiled.kernels.cache_clear()


def assert_the_same_bytes(monkeypatch) -> None:
    monkeypatch.setattr(ggml_types, "COMPILE_FROM", 0)
    values, names = (of[::3] for of in weights_of_every_kind())
    for type_name in TYPES:
        for with_importance in (False, True):
            importance = importance_of_every_kind() if with_importance else None
            ours = encode(values, type_name, importance=importance)
            assert_blocks_of_ggml(ours, bytes_of_ggml(type_name, with_importance)[::3], type_name, names)


@pytest.mark.usefixtures("_other_kernels")
def test_without_a_compiler_the_bytes_are_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compiled.kernels() is None
    assert_the_same_bytes(monkeypatch)


def test_few_weights_need_no_compiler(monkeypatch):
    def asked():
        raise AssertionError("kernels for a few weights")

    monkeypatch.setattr(ggml_types, "kernels", asked)
    values = torch.randn(2, 512)
    for type_name in TYPES:
        assert torch.equal(encode(values, type_name), by_ggml(values, type_name))
    monkeypatch.setattr(ggml_types, "COMPILE_FROM", values.numel())
    with pytest.raises(AssertionError, match="kernels for a few weights"):  # control
        encode(values, "Q4_K")


BROKEN_COMPILERS = {
    "fails": "exit 1",
    "writes nothing": "exit 0",
    "writes no library": 'for last; do :; done; echo "no library" > "$last"',
    "writes another library": 'for last; do :; done; echo "int x;" | "$REAL" -shared -fPIC -x c - -o "$last"',
    "is killed": "kill -9 $$",
}
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
@pytest.mark.parametrize("broken", BROKEN_COMPILERS)
@pytest.mark.usefixtures("_other_kernels")
def test_a_compiler_that_does_not_work_is_left_alone(broken, monkeypatch, tmp_path):
    compiler_script(tmp_path, monkeypatch, BROKEN_COMPILERS[broken])
    assert compiled.kernels() is None
    monkeypatch.setattr(ggml_types, "COMPILE_FROM", 0)
    values = torch.randn(8, 256)
    assert torch.equal(encode(values, "Q4_K"), by_ggml(values, "Q4_K"))


@SCRIPTS
@pytest.mark.parametrize("wrong", ["-ffp-contract=fast", "-fassociative-math -fno-signed-zeros -fno-trapping-math"])
@pytest.mark.usefixtures("_other_kernels")
def test_a_compiler_with_a_will_of_its_own_does_not_change_a_byte(wrong, monkeypatch, tmp_path):
    compiler_script(tmp_path, monkeypatch, f'exec "$REAL" "$@" {wrong}')
    assert_the_same_bytes(monkeypatch)


@SCRIPTS
@pytest.mark.usefixtures("_other_kernels")
def test_a_compiler_that_does_not_know_this_processor_is_used_without_tuning(monkeypatch, tmp_path):
    compiler_script(tmp_path, monkeypatch, 'case "$*" in *march*) exit 1;; esac; exec "$REAL" "$@"')
    assert compiled.kernels() is not None
    assert_the_same_bytes(monkeypatch)


def test_nothing_is_left_of_the_compilation(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compiled.kernels.cache_clear()
    assert compiled.kernels() is not None
    assert list(tmp_path.iterdir()) == []
