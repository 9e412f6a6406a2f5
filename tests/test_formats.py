"""Bytes on disk: what other programs read, and that a damaged file ends in one clear error, never in a hang or a traceback."""

import json
import os
import resource
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmforge.errors import CheckpointError
from llmforge.formats.atomic import WriteError, atomic_folder
from llmforge.formats.gguf import GGUFTensor, read_gguf_header, read_gguf_tensors, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import read_safetensors, write_safetensors
from llmforge.quant.ggml import encode


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "half": torch.randn(3).half(),  # 6 bytes: what follows must still be aligned
        "matrix": torch.randn(4, 5),
        "transposed": torch.randn(6, 2).t(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False, True]),
        "bfloat": torch.randn(2, 2, 2).bfloat16(),
        "ids": torch.tensor([1, 2**40]),
        "ñ/«name»": torch.ones(1, dtype=torch.uint8),
    }


def lazy(tensors) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in dict(tensors).items()}


def assert_same_tensors(found, expected):
    found = {name: t.read() if isinstance(t, LazyTensor) else t for name, t in found.items()}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_safetensors_are_what_the_safetensors_package_reads_and_writes(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path, lazy(tensors))
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    for path in (tmp_path, tmp_path / "theirs.safetensors"):
        ours = read_safetensors(path)
        assert_same_tensors(ours, tensors)
        assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
            name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
        }


def header_of(file: Path) -> dict:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_each_tensor_is_aligned_and_the_file_says_pt(tmp_path):
    write_safetensors(tmp_path, lazy(some_tensors()))
    header = header_of(tmp_path / "model.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}  # transformers refuses a file without
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "U8": 1}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_weights_can_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path, lazy(some_tensors()))
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_shards_hold_what_fits_and_the_index_lists_it(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)} | {"large": torch.randn(50, 10)}
    write_safetensors(tmp_path, lazy(tensors), max_shard_bytes=900)  # two of 400 bytes fit; the large one is alone
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 7 * 400 + 2000
    assert {name: index["weight_map"][name] for name in ("t0", "t1", "t2", "large")} == {
        "t0": files[0],
        "t1": files[0],
        "t2": files[1],
        "large": files[4],
    }
    assert_same_tensors(read_safetensors(tmp_path), tensors)


def test_writing_holds_one_tensor_in_memory(tmp_path):
    alive, most = set(), 0

    def made(i):
        nonlocal most
        tensor = torch.full((100,), float(i))
        alive.add(i)
        weakref.finalize(tensor, alive.discard, i)
        most = max(most, len(alive))
        return tensor

    tensors = {f"t{i}": LazyTensor((100,), torch.float32, partial(made, i)) for i in range(12)}
    write_safetensors(tmp_path, tensors, max_shard_bytes=4000)  # ten in a file
    assert most <= 2  # one, and its successor while the name is bound anew
    assert_same_tensors(read_safetensors(tmp_path), {f"t{i}": torch.full((100,), float(i)) for i in range(12)})


def test_reading_a_tensor_leaves_the_others_on_disk(tmp_path):
    write_safetensors(tmp_path, {f"t{i}": LazyTensor.of(torch.full((2**20,), float(i))) for i in range(8)})
    tensors = read_safetensors(tmp_path)
    mapped = [
        line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if str(tmp_path) in line
    ]
    assert mapped == []  # headers alone were read
    values = tensors["t3"].read()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in maps if str(tmp_path) in line]
    first, last = (int(number, 16) for number in line.split()[0].split("-"))
    assert last - first < 2 * 4 * 2**20
    assert values[5] == 3
    del values  # and its mapping ends with it
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_change_of_what_was_read_does_not_reach_the_file(tmp_path):
    write_safetensors(tmp_path, lazy({"a": torch.ones(3)}))
    read_safetensors(tmp_path)["a"].read().zero_()
    assert read_safetensors(tmp_path)["a"].read().tolist() == [1, 1, 1]


def test_a_lazy_tensor_knows_what_a_change_makes_of_it_without_reading():
    def never():
        raise AssertionError("read")

    stored = LazyTensor((2, 6), torch.float32, never)
    changed = stored.then(lambda t: t.t().to(torch.bfloat16))
    assert (changed.shape, changed.dtype, changed.numel, changed.nbytes) == ((6, 2), torch.bfloat16, 12, 24)
    with pytest.raises(AssertionError, match="read"):
        changed.read()
    assert LazyTensor.of(torch.ones(2, 6)).then(lambda t: 2 * t).then(lambda t: t[0]).read().tolist() == [2] * 6


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize("max_bytes", [1, 40, 1 << 20])
def test_the_blocks_of_a_tensor_are_its_rows(tmp_path, shape, max_bytes):
    values = torch.randn(shape)
    write_safetensors(tmp_path, lazy({"a": values}))
    stored = read_safetensors(tmp_path)["a"]
    whole = LazyTensor(shape, torch.float32, lambda: values)
    for tensor in (
        stored,
        LazyTensor.of(values),
        whole,
        stored.then(lambda t: 2 * t, by_row=True).then(lambda t: t / 2),
    ):
        blocks = list(tensor.blocks(max_bytes=max_bytes))
        assert torch.equal(torch.cat([block.flatten() for block in [torch.empty(0), *blocks]]), values.flatten())
        assert all(block.nbytes <= max(max_bytes, 4 * tensor.row_length) for block in blocks)
        if values.numel():
            rows = values.reshape(-1, tensor.row_length)
            assert torch.equal(tensor.rows(len(rows) // 2, len(rows)), rows[len(rows) // 2 :])


def test_a_tensor_that_has_rows_is_never_whole_in_memory(tmp_path):
    """From file to file, through changes that act on rows: 16 MB at a time of 40."""
    values = torch.randn(2500, 4096)
    (tmp_path / "a").mkdir()
    write_safetensors(tmp_path / "a", lazy({"a": values}))
    longest = 0

    def change(rows):
        nonlocal longest
        if not rows.is_meta:
            longest = max(longest, rows.nbytes)
        return rows.bfloat16()

    stored = read_safetensors(tmp_path / "a")["a"].then(change, by_row=True)
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b", {"a": stored})
    write_gguf(tmp_path / "q8.gguf", "llama", {}, [GGUFTensor("a", "Q8_0", stored)])
    write_gguf(tmp_path / "whole.gguf", "llama", {}, [GGUFTensor("a", "Q8_0", LazyTensor.of(values.bfloat16()))])
    assert torch.equal(read_safetensors(tmp_path / "b")["a"].read(), values.bfloat16())
    assert (tmp_path / "q8.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert 1 << 23 < longest <= 1 << 25  # of float32; the GGUF counts 4 M values


def test_rows_of_a_file_that_was_cut_off_since(tmp_path):
    write_safetensors(tmp_path, lazy({"a": torch.randn(8, 8)}))
    stored = read_safetensors(tmp_path)["a"]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    assert stored.rows(0, 6).shape == (6, 8)
    with pytest.raises(CheckpointError, match="it ends at byte"):
        stored.rows(6, 8)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "weights.bin", ""]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, file):
    write_safetensors(tmp_path, lazy({"a": torch.ones(2)}))
    (tmp_path / "folder").mkdir()
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"a shard must be a \.safetensors file in the same folder"):
        read_safetensors(tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].pop("t0"), "'t0' is in model-00001-of-00002.safetensors but not listed"),
        (lambda index: index["weight_map"].update(x="model-00002-of-00002.safetensors"), "'x' is not in model-00002"),
        (
            lambda index: index["weight_map"].update(x="model-00003-of-00003.safetensors"),
            "model-00003-of-00003.safetensors, which is not there",
        ),
        (lambda index: index.pop("weight_map"), "has no 'weight_map'"),
        (lambda index: index["weight_map"].update(t0=3), "has no 'weight_map'"),
    ],
)
def test_an_index_must_fit_its_shards(tmp_path, change, message):
    write_safetensors(tmp_path, lazy((f"t{i}", torch.ones(5)) for i in range(4)), max_shard_bytes=40)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    change(index)
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(tmp_path)


def test_a_file_cut_anywhere_is_called_cut_off(tmp_path):
    write_safetensors(tmp_path, lazy(some_tensors()))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is cut off: .*the file has|is cut off: it has"):
            read_safetensors(tmp_path)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow the last tensor"):
        read_safetensors(tmp_path)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((10**9).to_bytes(8, "little") + b"{}", "a header of 1,000,000,000 bytes, at most 100,000,000"),
        (safetensors_bytes(b"{not json"), "its header is not valid JSON"),
        (safetensors_bytes(b"\xff\xfe{}"), "its header is not valid JSON"),
        (safetensors_bytes(b"[" * 100_000), "its header is not valid JSON"),
        (safetensors_bytes(b'{"a":1,"a":2}'), "a name occurs twice"),
        (safetensors_bytes([]), "a JSON list, not an object"),
        (safetensors_bytes({"a": 3}), "the entry of 'a' must have dtype, shape and data_offsets"),
        (safetensors_bytes({"a": entry("F13")}, bytes(8)), "unknown dtype 'F13'"),
        (safetensors_bytes({"a": entry(["F32"])}, bytes(8)), r"unknown dtype \['F32'\]"),
        (safetensors_bytes({"a": entry(shape=[-2])}, bytes(8)), "must be lists of whole numbers"),
        (safetensors_bytes({"a": entry(shape=[2.0])}, bytes(8)), "must be lists of whole numbers"),
        (safetensors_bytes({"a": entry(shape=[True, 2])}, bytes(8)), "must be lists of whole numbers"),
        (safetensors_bytes({"a": entry(shape=[2**60] * 9_000)}, bytes(8)), "must be lists of whole numbers"),
        (safetensors_bytes({"a": entry(offsets=[0])}, bytes(8)), "must be lists of whole numbers"),
        (safetensors_bytes({"a": entry(shape=[3])}, bytes(8)), r"'a' of shape \(3,\) and F32 cannot fill bytes 0 to 8"),
        (
            safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)),
            "'b' starts at byte 0 of the data, the tensor before",
        ),
        (safetensors_bytes({"a": entry(offsets=[4, 12])}, bytes(12)), "'a' starts at byte 4 of the data"),
        (
            safetensors_bytes({str(i): entry("F32", [0], [0, 0]) for i in range(65_537)}),
            "65,537 tensors, at most 65,536",
        ),
    ],
)
def test_a_damaged_header_is_refused_with_what_is_wrong(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        read_safetensors(tmp_path)


def test_a_file_that_vanishes_while_it_is_read_is_an_error(tmp_path):
    write_safetensors(tmp_path, lazy({"a": torch.ones(2)}))
    tensors = read_safetensors(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        tensors["a"].read()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: .*No such file"):
        tensors["a"].read()


def mutated(data: st.DataObject, whole: bytes) -> bytes:
    """`whole` with some bytes changed, removed or inserted; near the beginning more often."""
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 60))
        match data.draw(st.sampled_from(["set", "bit", "insert", "delete", "cut"])):
            case "set":
                content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=9))
            case "bit":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[place : place + data.draw(st.integers(1, 9))]
            case "cut":
                del content[max(place, 61) :]
        if len(content) < 61:
            break
    return bytes(content)


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safetensors")
    write_safetensors(folder, lazy({"a": torch.randn(2, 3), "b": torch.randn(4).half()}))
    return folder / "model.safetensors"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_safetensors_file_reads_or_raises_our_error(safetensors_file, data):
    file = safetensors_file.with_name("mutated.safetensors")
    file.write_bytes(mutated(data, safetensors_file.read_bytes()))
    with suppress(CheckpointError):
        for tensor in read_safetensors(file).values():
            values = tensor.read()
            assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype)


# --- GGUF


METADATA = {
    "general.name": "tóy",
    "toy.context_length": 256,
    "toy.epsilon": 2.0**-17,  # exact in float32
    "toy.flag": True,
    "toy.tokens": ["a", "Ġñ", ""],
    "toy.types": [1, 3, 4],
}


def gguf_tensors() -> tuple[dict[str, np.ndarray], list[GGUFTensor]]:
    rng = np.random.default_rng(0)
    values = {
        f"{kind}.weight": rng.standard_normal((3, 64) if kind != "F32" else (5,)).astype(np.float32)
        for kind in ("F32", "F16", "BF16", "Q8_0")
    }
    tensors = [GGUFTensor(name, name.split(".")[0], LazyTensor.of(torch.from_numpy(v))) for name, v in values.items()]
    return values, tensors


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_gguf(file, "toy", METADATA, gguf_tensors()[1])
    return file


def test_gguf_is_what_the_gguf_package_reads(gguf_file):
    values, _ = gguf_tensors()
    reader = gguf.GGUFReader(gguf_file)
    kinds = {key: [kind.name for kind in field.types] for key, field in reader.fields.items()}
    assert kinds["toy.context_length"] == ["UINT32"]  # llama.cpp refuses other integers
    assert kinds["toy.epsilon"] == ["FLOAT32"]
    assert kinds["toy.types"] == ["ARRAY", "INT32"]
    assert kinds["toy.flag"] == ["BOOL"]
    assert {key: reader.fields[key].contents() for key in METADATA} == METADATA
    for tensor in reader.tensors:
        expected = gguf.quants.quantize(values[tensor.name], tensor.tensor_type)
        assert tensor.tensor_type.name == tensor.name.split(".")[0]
        assert tensor.data.tobytes() == expected.tobytes()
        assert tensor.data_offset % 32 == 0
    assert gguf_file.stat().st_size % 32 == 0


def test_gguf_reads_back(gguf_file):
    values, _ = gguf_tensors()
    header = read_gguf_header(gguf_file)
    assert {key: header.metadata[key] for key in METADATA} == METADATA
    assert header.metadata["general.architecture"] == "toy"
    # Rounding: 11 and 8 bits of mantissa; Q8_0 half a step of the largest of 32, and the scale's own rounding.
    errors = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.51 / 127}
    tensors = read_gguf_tensors(gguf_file, header)
    assert list(tensors) == [info.name for info in header.tensors] == list(values)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}
    for info in header.tensors:
        expected, tensor = torch.from_numpy(values[info.name]), tensors[info.name]
        found = tensor.read()
        assert tuple(found.shape) == tensor.shape == info.shape == tuple(expected.shape)
        assert found.dtype == tensor.dtype == dtypes[info.type_name]  # floats stay what they are in the file
        assert (found.float() - expected).abs().max() <= errors[info.type_name] * expected.abs().max()


def test_gguf_tensors_are_made_one_at_a_time(tmp_path):
    order, alive = [], weakref.WeakSet()

    def made(name):
        values = torch.zeros(1, 32)
        order.append((name, len(alive)))
        alive.add(values)
        return values

    tensors = [GGUFTensor(n, "F16", LazyTensor((1, 32), torch.float32, partial(made, n))) for n in ("a", "b", "c")]
    write_gguf(tmp_path / "x.gguf", "toy", {}, tensors)
    assert order == [("a", 0), ("b", 0), ("c", 0)]  # each one gone before the next is read


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_every_type_is_decoded_as_the_gguf_package_does(tmp_path, kind):
    """Files of others have types that are read here and not written; any bytes are values of them."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, (5, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "toy")
    writer.add_tensor("t", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf_tensors(tmp_path / "x.gguf", read_gguf_header(tmp_path / "x.gguf"))["t"]
    assert tensor.shape == (5, 512)
    assert np.array_equal(tensor.read().float().numpy(), gguf.quants.dequantize(raw, number), equal_nan=True)


def test_a_tensor_larger_than_a_chunk_is_written_and_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("llmforge.formats.gguf._CHUNK", 100)  # values: one row of 64 at a time
    values = torch.randn(2, 7, 64)
    tensors = [GGUFTensor(kind, kind, LazyTensor.of(values)) for kind in ("F32", "Q8_0")]
    write_gguf(tmp_path / "x.gguf", "toy", {}, tensors)
    found = read_gguf_tensors(tmp_path / "x.gguf", read_gguf_header(tmp_path / "x.gguf"))
    assert torch.equal(found["F32"].read(), values)
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), q8), q8)
    assert np.array_equal(found["Q8_0"].read().numpy(), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encoding_starts_from_any_float_type(dtype, kind):
    values = (torch.randn(3, 64) * torch.tensor([1e-6, 1.0, 1e3])[:, None]).to(dtype)
    expected = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind])
    assert encode(values, kind).numpy().tobytes() == expected.tobytes()


def test_a_type_that_cannot_be_decoded_is_named(tmp_path):
    number = gguf.GGMLQuantizationType.Q8_K
    _, size = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "toy")
    writer.add_tensor("odd.weight", np.zeros((1, size), np.uint8), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"x\.gguf has the tensor 'odd\.weight' in Q8_K, which cannot be decoded"):
        read_gguf_tensors(tmp_path / "x.gguf", read_gguf_header(tmp_path / "x.gguf"))


def test_a_gguf_that_is_cut_after_its_header_was_read_is_an_error(gguf_file, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_file.read_bytes())
    tensors = read_gguf_tensors(file, read_gguf_header(file))
    file.write_bytes(gguf_file.read_bytes()[:-600])
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.gguf"):
        tensors["Q8_0.weight"].read()


def test_a_gguf_cut_anywhere_is_an_error_with_its_name(gguf_file, tmp_path):
    whole, file = gguf_file.read_bytes(), tmp_path / "cut.gguf"
    assert len(whole) < 3000
    for length in [*range(0, 700), *range(700, len(whole) - 32, 50)]:  # the last 32 bytes may be padding
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is (cut off|not a GGUF file)"):
            read_gguf_header(file)


def patched(whole: bytes, old: bytes, new: bytes) -> bytes:
    assert whole.count(old) == 1
    assert len(old) == len(new)
    return whole.replace(old, new)


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: b"GGML" + w[4:], "does not begin with the letters GGUF"),
        (lambda w: w[:4] + u32(1) + w[8:], "version 1; 2 and 3"),
        (lambda w: w[:8] + u64(2**63) + w[16:], "9,223,372,036,854,775,808 tensors and 7 keys; at most 65,536"),
        (lambda w: w[:16] + u64(65_537) + w[24:], "4 tensors and 65,537 keys; at most"),
        (lambda w: patched(w, b"toy.flag" + u32(7), b"toy.flag" + u32(77)), "unknown value type 77"),
        (
            lambda w: patched(w, b"toy.types" + u32(9) + u32(5), b"toy.types" + u32(9) + u32(9)),
            "unknown type 9 of an array",
        ),
        (
            lambda w: patched(w, b"toy.types" + u32(9) + u32(5) + u64(3), b"toy.types" + u32(9) + u32(5) + u64(2**40)),
            "an array of 1,099,511,627,776 items",
        ),
        (
            lambda w: patched(
                w, b"toy.tokens" + u32(9) + u32(8) + u64(3), b"toy.tokens" + u32(9) + u32(8) + u64(2**20)
            ),
            "an array of 8,388,608 bytes",
        ),
        (
            lambda w: patched(w, u64(10) + b"F16.weight" + u32(2), u64(10) + b"F16.weight" + u32(5)),
            "'F16.weight' has 5 dimensions",
        ),
        (
            lambda w: patched(
                w, u64(10) + b"F16.weight" + u32(2) + u64(64), u64(10) + b"F16.weight" + u32(2) + u64(2**60)
            ),
            "is cut off: the tensor 'F16.weight'",
        ),
        (
            lambda w: patched(w, b"Q8_0.weight" + u32(2) + u64(64), b"Q8_0.weight" + u32(2) + u64(63)),
            "rows of 63 do not fit Q8_0",
        ),
        (lambda w: patched(w, u64(64) + u64(3) + u32(8), u64(64) + u64(3) + u32(99)), "unknown type 99"),
        (lambda w: patched(w, b"F32.weight", b"F16.weight"), "two tensors have the same name"),
        (
            lambda w: patched(w, u64(8) + b"toy.flag" + u32(7) + b"\1", u64(8) + b"toy.flag" + u32(8) + b"\1"),
            "cut off or damaged: a text of",
        ),
    ],
)
def test_a_damaged_gguf_is_refused_with_what_is_wrong(gguf_file, tmp_path, change, message):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(change(gguf_file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        read_gguf_header(file)


def test_a_gguf_with_a_key_twice_or_an_odd_alignment_is_refused(tmp_path):
    for metadata, message in [
        ({"aa": 1, "ab": 2}, "the key 'aa' occurs twice"),
        ({"general.alignment": 33}, "general.alignment is 33, not a power of two"),
    ]:
        write_gguf(tmp_path / "x.gguf", "toy", metadata, [])
        (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes().replace(b"ab", b"aa"))
        with pytest.raises(CheckpointError, match=message):
            read_gguf_header(tmp_path / "x.gguf")


def test_a_write_that_the_system_refuses_is_explained_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the next best thing to a full disk
    try:
        with (
            pytest.raises(WriteError, match=r"cannot write .*folder: the file would be larger"),
            atomic_folder(tmp_path / "folder") as tmp,
        ):
            write_safetensors(tmp, lazy({"a": torch.zeros(10_000)}))
        large = GGUFTensor("a", "F32", LazyTensor.of(torch.zeros(10_000)))
        with pytest.raises(WriteError, match=r"cannot write .*x\.gguf: the file would be larger"):
            write_gguf(tmp_path / "x.gguf", "toy", {}, [large])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_gguf_reads_or_raises_our_error(gguf_file, data):
    file = gguf_file.with_name("mutated.gguf")
    file.write_bytes(mutated(data, gguf_file.read_bytes()))
    with suppress(CheckpointError):
        header = read_gguf_header(file)
        assert all(tensor.offset + tensor.nbytes <= file.stat().st_size for tensor in header.tensors)
