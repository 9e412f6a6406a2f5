"""Adapters in the weights of their base: the bytes that peft writes, the model that was trained, and no half of a file."""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

from llmforge import GPT, CharTokenizer, GPTConfig, Llama, LlamaConfig
from llmforge.cli import merge as command
from llmforge.cli.main import main
from llmforge.convert import export_gguf, export_hf, load, open_model
from llmforge.convert.load import find_adapter
from llmforge.convert.merge import _with_delta, merge
from llmforge.convert.merge_check import merge_divergence
from llmforge.convert.published import inputs_of, publish
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.finetune import LoRAConfig, NF4Config, apply_lora_, quantize_, read_adapter, save_adapter
from llmforge.finetune.adapter_files import LoRATensors
from llmforge.formats.atomic import AppendedFile, resumable_file, resumable_folder
from llmforge.formats.lazy import LazyTensor
from llmforge.formats.safetensors import read_safetensors
from llmforge.nn.lora import lora_layers
from llmforge.quant.nf4 import dequantize_nf4, quantize_nf4

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TEXT = "In a hole in the ground there lived a hobbit.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer.from_text(TEXT)


def small_llama(vocab_size=64, **changes) -> Llama:
    return Llama(LlamaConfig(**{**SIZES, "vocab_size": vocab_size, "max_position_embeddings": 64, **changes}))


def perturb_(model) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def tuned(folder: Path, *, nf4: bool, tokenizer=None, lora=None, dtype=torch.bfloat16, **changes):
    """A base and an adapter of it in two folders; the model that was trained."""
    export_hf(small_llama(**changes), tokenizer, folder / "base", dtype=dtype)
    model, _ = load(folder / "base")
    if nf4:
        quantize_(model)
    apply_lora_(model, lora or LoRAConfig(r=4, lora_alpha=16))
    perturb_(model)
    save_adapter(model, folder / "adapter", base_model="../base")
    return model.eval()


def same_files(left: Path, right: Path) -> bool:
    names = [sorted(file.name for file in folder.iterdir()) for folder in (left, right)]
    # The model card has the folder's name.
    return names[0] == names[1] and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names[0] if name != "README.md"
    )


# The bytes of peft


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=LINEARS),
        dict(target_modules=LINEARS, use_rslora=True),
        dict(target_modules=LINEARS, use_dora=True),
        dict(target_modules=LINEARS, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["o_proj"], modules_to_save=["lm_head"], tied=True),
        dict(target_modules=LINEARS, dtype=torch.float16),
        dict(target_modules=LINEARS, dtype=torch.float32),
        dict(target_modules=["c_attn", "c_proj", "c_fc"]),
        dict(target_modules=["c_attn"], modules_to_save=["c_fc"]),
    ],
    ids=lambda settings: "-".join(map(str, settings)) + ("-gpt2" if "c_attn" in settings["target_modules"] else ""),
)
@pytest.mark.filterwarnings("ignore")
def test_merged_bytes_are_those_of_peft(tmp_path, settings):
    settings = dict(settings)
    dtype, tied = settings.pop("dtype", torch.bfloat16), settings.pop("tied", False)
    if "c_attn" in settings["target_modules"]:
        config = transformers.GPT2Config(
            vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, vocab_size=256, max_position_embeddings=64, tie_word_embeddings=tied)
        )
    theirs.to(dtype).save_pretrained(tmp_path / "base")
    with_adapter = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings))
    perturb_(with_adapter)
    with_adapter.save_pretrained(tmp_path / "adapter")
    base = type(theirs).from_pretrained(tmp_path / "base", dtype=dtype)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")

    published, _ = open_model(tmp_path / "base", adapter=tmp_path / "adapter")
    export_hf(published, None, tmp_path / "ours")
    ours, expected = read_safetensors(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")
    before = read_safetensors(tmp_path / "base")
    assert ours.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype == dtype
        assert torch.equal(ours[name].read(), tensor.read()), name
        changed += name not in before or not torch.equal(before[name].read(), tensor.read())
    assert changed >= len(settings["target_modules"])  # merged is not the base


def test_rows_do_not_depend_on_how_many_are_read():
    """A library for matrices adds in another order where there are few rows; here every row is computed among 64 or more."""
    weight, A, B = torch.randn(300, 48).bfloat16(), torch.randn(3, 48), torch.randn(300, 3)
    layer = LoRATensors(LazyTensor.of(A), LazyTensor.of(B), None, 0.7)
    merged = _with_delta(LazyTensor.of(weight.float()), layer, torch.float32)
    whole = weight.float() + (B @ A) * 0.7
    assert torch.equal(merged.read(), whole)
    for step in (1, 2, 7, 64, 100, 299):
        pieces = [merged.rows(start, min(start + step, 300)) for start in range(0, 300, step)]
        assert torch.equal(torch.cat(pieces), whole), step
    assert not torch.equal(whole, weight.float() + (B @ A) * 0.71)


# The model that was trained


def test_on_the_rounded_base_it_is_the_trained_model(tmp_path):
    """Law: the weights are those of the 4-bit layers plus the products, and so are the logits; on the original they are not."""
    model = tuned(tmp_path, nf4=True)
    base = read_safetensors(tmp_path / "base")
    published, _ = open_model(tmp_path / "adapter")
    assert "rounded to NF4 in 14 linear layers, as it was in training" in published.notes[-1]
    for name, layer in lora_layers(model).items():
        adapter = layer.adapter("default")
        rounded = dequantize_nf4(quantize_nf4(base[f"{name}.weight"].read()))
        expected = (rounded + adapter.scale * (adapter.B @ adapter.A)).bfloat16()
        assert torch.equal(published.tensors[f"{name}.weight"].read(), expected), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # never rounded
        assert torch.equal(published.tensors[name].read(), base[name].read())
    ids = torch.randint(0, 64, (120,))
    kls = merge_divergence(tmp_path / "base", tmp_path / "adapter", ids)
    assert kls["nf4"] < 1e-5 < 1e-4 < kls["original"]  # bfloat16 rounds the sums once
    exact = merge(replace(published, tensors=open_float(tmp_path)), read_adapter(tmp_path / "adapter"))
    for name, layer in lora_layers(model).items():
        assert torch.equal(exact.tensors[f"{name}.weight"].read(), layer.merged_weight()), name


def open_float(folder: Path):
    published, _ = open_model(folder / "base")
    return {name: tensor.then(lambda t: t.float(), by_row=True) for name, tensor in published.tensors.items()}


def test_layers_without_an_adapter_are_rounded_as_in_training(tmp_path):
    tuned(tmp_path, nf4=True, lora=LoRAConfig(r=4, target_modules=("q_proj",)))
    name = "model.layers.1.mlp.up_proj.weight"
    original = read_safetensors(tmp_path / "base")[name].read()
    merged = {base: open_model(tmp_path / "adapter", merge_base=base)[0].tensors[name] for base in ("nf4", "original")}
    assert torch.equal(merged["nf4"].read(), dequantize_nf4(quantize_nf4(original)).bfloat16())
    assert torch.equal(merged["original"].read(), original)
    assert merged["nf4"].dtype == torch.bfloat16


def test_the_base_is_said(tmp_path):
    tuned(tmp_path, nf4=False)
    notes = {base: open_model(tmp_path / "adapter", merge_base=base)[0].notes[-1] for base in (None, "original", "nf4")}
    assert notes[None] == notes["original"] == "merged onto the original weights"
    assert "the adapter does not say how it was in training" in notes["nf4"]
    tuned(tmp_path / "q", nf4=True)
    assert "not quite that model" in open_model(tmp_path / "q" / "adapter", merge_base="original")[0].notes[-1]
    with pytest.raises(ConfigError, match=r"merge_base \('nf5'\) must be one of original, nf4"):
        open_model(tmp_path / "adapter", merge_base="nf5")
    with pytest.raises(ConfigError, match="is of an adapter"):
        open_model(tmp_path / "base", merge_base="nf4")


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_tuned_model_in_memory_is_exported_merged(tmp_path, family, nf4, dora):
    model = (
        small_llama()
        if family == "llama"
        else GPT(GPTConfig(vocab_size=64, n_embd=64, n_layer=2, n_head=4, block_size=64))
    )
    if nf4:
        quantize_(model)
    base = publish(model)
    apply_lora_(model, LoRAConfig(r=4, use_dora=dora))
    perturb_(model)
    model.eval()
    published = publish(model)
    assert published.tensors.keys() == base.tensors.keys()
    export_hf(model, None, tmp_path / "hf")
    idx = torch.randint(0, 64, (2, 16))
    merged, _ = load(tmp_path / "hf")
    assert torch.allclose(merged(idx), model(idx), atol=1e-5)
    unmerged, _ = load_published(base, tmp_path / "base")
    assert not torch.allclose(unmerged(idx), model(idx), atol=1e-2)


def load_published(published, folder):
    export_hf(published, None, folder)
    return load(folder)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_matrix_of_which_one_use_was_trained_becomes_two(tmp_path, module):
    lora = LoRAConfig(r=4, modules_to_save=(module,))
    model = tuned(tmp_path, nf4=False, lora=lora, dtype=torch.float32, tie_word_embeddings=True)
    for source in (model, tmp_path / "adapter"):
        target = tmp_path / type(source).__name__
        report = export_hf(source, None, target, dtype=torch.float32)
        assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False, report
        idx = torch.randint(0, 64, (2, 16))
        assert torch.allclose(load(target)[0](idx), model(idx), atol=2e-5)
    assert not torch.equal(
        *[load(target)[0].state_dict()[f"{name}.weight"] for name in ("model.embed_tokens", "lm_head")]
    )


# An adapter folder is a model


def test_an_adapter_folder_is_a_model(tmp_path, tokenizer, capsys):
    model = tuned(tmp_path, nf4=True, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, dtype=torch.float32)
    idx = torch.randint(0, tokenizer.vocab_size, (1, 16))
    merged, its_tokenizer = load(tmp_path / "adapter")
    assert its_tokenizer.encode("hobbit") == tokenizer.encode("hobbit")
    assert torch.allclose(merged(idx), model(idx), atol=1e-5)
    options = ["--max-new-tokens", "8", "--seed", "1", "--device", "cpu"]
    assert main(["generate", str(tmp_path / "adapter"), "--prompt", "In a", *options]) == 0
    from_adapter = capsys.readouterr().out
    assert (
        main(["generate", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--prompt", "In a", *options])
        == 0
    )
    assert capsys.readouterr().out == from_adapter
    assert (
        main(["export", str(tmp_path / "adapter"), "--gguf", str(tmp_path / "a.gguf"), "--hf", str(tmp_path / "hf")])
        == 0
    )
    assert "note: merged onto the base rounded to NF4" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "hf"), "--gguf", str(tmp_path / "b.gguf")]) == 0
    named = [(tmp_path / name).read_bytes().replace(b"a.gguf", b"b.gguf") for name in ("a.gguf", "b.gguf")]
    assert len(named[0]) == len(named[1])
    (tmp_path / "adapter" / "tokenizer.json").write_bytes((tmp_path / "base" / "tokenizer.json").read_bytes())
    assert load(tmp_path / "adapter")[1] is not None  # its own


def test_a_tuning_run_is_its_latest_adapter(tmp_path):
    tuned(tmp_path, nf4=False)
    run = tmp_path / "run"
    run.mkdir()
    step = run / "step-000002"
    (tmp_path / "adapter").rename(step)
    config = json.loads((step / "adapter_config.json").read_text())
    (step / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../../base"}))
    manifest = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in step.iterdir()
    }
    (step / "manifest.json").write_text(json.dumps(manifest))
    assert find_adapter(run) == step
    assert open_model(run)[0].notes == open_model(tmp_path / "base", adapter=run)[0].notes
    weights = step / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for folder in (run, step):
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has other content than was written"):
            open_model(folder)


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_K_M"])
def test_a_gguf_in_one_pass_is_that_of_the_merged_folder(tmp_path, tokenizer, file_type):
    tuned(
        tmp_path,
        nf4=True,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
    )
    model, tokenizer = open_model(tmp_path / "adapter")
    export_gguf(model, tokenizer, tmp_path / "once.gguf", file_type=file_type, name="m")
    export_hf(model, tokenizer, tmp_path / "merged")
    export_gguf(tmp_path / "merged", None, tmp_path / "twice.gguf", file_type=file_type, name="m")
    export_gguf(tmp_path / "base", None, tmp_path / "base.gguf", file_type=file_type, name="m")
    once, twice, base = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("once", "twice", "base"))
    assert once == twice
    assert once != base


def test_merge_and_export_on_the_command_line(tmp_path, tokenizer, capsys):
    tuned(tmp_path, nf4=True, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    (tmp_path / "text.txt").write_text(TEXT * 3)
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "In a hole", "completion": "a hobbit"}) + "\n")
    for file in ("text.txt", "held_out.jsonl"):
        arguments = [str(tmp_path / "base"), str(tmp_path / "adapter"), "--out", str(tmp_path / f"for-{file}")]
        assert command.run(parser.parse_args([*arguments, "--compare", str(tmp_path / file)])) == 0
        lines = capsys.readouterr().out.splitlines()
        kls = {line.split()[4].rstrip(")"): float(line.split()[-4]) for line in lines if line.startswith("KL(trained")}
        assert 0 <= kls["nf4"] < kls["original"]
    assert same_files(tmp_path / "for-text.txt", tmp_path / "for-held_out.jsonl")
    arguments = ["export", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    assert main([*arguments, "--merge-base", "original", "--gguf", str(tmp_path / "m.gguf")]) == 0
    assert "--merge-base original" in capsys.readouterr().out.splitlines()[-1]
    assert main([*arguments, "--adapter-gguf", str(tmp_path / "lora.gguf")]) == 0
    assert (tmp_path / "lora.gguf").read_bytes()[:4] == b"GGUF"
    assert main(["export", str(tmp_path / "base"), "--adapter-gguf", str(tmp_path / "lora.gguf")]) == 2
    assert "--adapter FOLDER" in capsys.readouterr().err


# What does not fit


def test_an_adapter_of_another_model_is_refused_with_what_does_not_fit(tmp_path):
    tuned(tmp_path / "a", nf4=True)
    tuned(tmp_path / "wide", nf4=True, hidden_size=96)
    tuned(tmp_path / "deep", nf4=True, num_hidden_layers=3)
    with pytest.raises(
        CheckpointError, match=r"of another shape: model\.layers\.0\.self_attn\.q_proj\.weight is \(96, 96\)"
    ):
        open_model(tmp_path / "wide" / "base", adapter=tmp_path / "a" / "adapter")
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.2\.self_attn\.q_proj"):
        open_model(tmp_path / "a" / "base", adapter=tmp_path / "deep" / "adapter")
    file = tmp_path / "a" / "adapter" / "base.json"
    values = json.loads(file.read_text())
    values["rounding"]["modules"].append("model.layers.7.mlp.up_proj")
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"rounded layers that are not there: model\.layers\.7\.mlp\.up_proj"):
        open_model(tmp_path / "a" / "adapter")


def test_an_adapter_is_not_added_twice_and_another_base_is_said(tmp_path):
    tuned(tmp_path / "one", nf4=False)
    tuned(tmp_path / "other", nf4=False)
    adapter = tmp_path / "one" / "adapter"
    with pytest.raises(ConfigError, match="the adapter itself, which would be added twice"):
        open_model(adapter, adapter=adapter)
    said = [
        any("trained on ../base" in note for note in open_model(tmp_path / name / "base", adapter=adapter)[0].notes)
        for name in ("one", "other")
    ]
    assert said == [False, True]
    (tmp_path / "one" / "base").rename(tmp_path / "moved")  # it may be the one, under its new name
    assert not any("trained on" in note for note in open_model(tmp_path / "moved", adapter=adapter)[0].notes)


def test_nothing_is_written_over_what_it_is_made_from(tmp_path, tokenizer, capsys):
    tuned(tmp_path, nf4=False, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for arguments in (
        ["merge", base, adapter, "--out", base, "--overwrite"],
        ["export", base, "--adapter", adapter, "--gguf", base / "model.safetensors"],
        ["export", base, "--adapter", adapter, "--gguf", adapter / "adapter_model.safetensors"],
        ["export", base, "--adapter", adapter, "--adapter-gguf", base / "model.safetensors"],
    ):
        assert main([*map(str, arguments)]) == 2
        assert "where the model is read from" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("base", ["../nowhere", "", None, "/no/such/folder", "a\0b", "../adapter", "x" * 5000])
def test_a_base_that_is_not_there_ends_in_how_to_give_it(tmp_path, monkeypatch, base):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tuned(tmp_path, nf4=False)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    (tmp_path / "adapter" / "base.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="itself" if base == "../adapter" else r"BASE --adapter"):
        open_model(tmp_path / "adapter")
    assert open_model(tmp_path / "base", adapter=tmp_path / "adapter")[0].config.vocab_size == 64


def test_what_is_no_adapter_is_none(tmp_path):
    tuned(tmp_path, nf4=False)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        open_model(tmp_path / "base", adapter=tmp_path / "base")


def test_an_adapter_with_nan_is_not_written(tmp_path):
    model = tuned(tmp_path, nf4=False)
    next(iter(lora_layers(model).values())).adapter("default").B.data[0, 0] = float("nan")
    save_adapter(model, tmp_path / "bad", base_model="../base")
    with pytest.raises(ConvertError, match="NaN or infinity"):
        export_hf(tmp_path / "bad", None, tmp_path / "out")
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".") or entry.name == "out"]


# Killed and started again

# Imports once, then a process for each line of its input: adapter, target, kind.
WRITERS = """
import os, sys
import torch
torch.set_num_threads(1)
from llmforge.convert import export_gguf, export_hf, open_model
from llmforge.formats.lazy import LazyTensor
blocks = LazyTensor.blocks
def told(self, **options):
    print("reads", flush=True)
    yield from blocks(self, **options)
LazyTensor.blocks = told
while line := sys.stdin.readline():
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        print("end", flush=True)
        continue
    print(os.getpid(), flush=True)
    adapter, target, kind = line.rstrip().split("|")
    model, tokenizer = open_model(adapter)
    if kind == "hf":
        export_hf(model, tokenizer, target, max_shard_bytes=60_000)
    else:
        export_gguf(model, tokenizer, target, file_type="Q4_0", name="m")
    print("done", flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def writers():
    process = subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    yield process
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def write(writers, adapter: Path, target: Path, kind: str, *, kill_after: int | None = None) -> tuple[int, bool]:
    """Let a process write; returns how many tensors it read and whether it came to the end."""
    writers.stdin.write(f"{adapter}|{target}|{kind}\n")
    pid, lines = int(writers.stdout.readline()), []
    while (line := writers.stdout.readline()) not in ("end\n", ""):
        lines.append(line)
        if len(lines) == kill_after:
            time.sleep(random.uniform(0, 0.002))
            os.kill(pid, signal.SIGKILL)
    assert line == "end\n"
    return lines.count("reads\n"), "done\n" in lines


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_killed_five_times_it_ends_with_the_same_bytes_and_nothing_else(tmp_path, tokenizer, writers, kind):
    tuned(tmp_path, nf4=True, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, num_hidden_layers=4)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    reads, done = write(writers, tmp_path / "adapter", tmp_path / "whole" / "m", kind)
    assert done
    target, moments, kept = tmp_path / "killed" / "m", random.Random(0), 0
    for _ in range(5):
        _, done = write(writers, tmp_path / "adapter", target, kind, kill_after=moments.randint(1, reads // 6))
        assert not done
        assert not target.exists()
        journals = [file for file in (tmp_path / "killed").glob(".part-m/marks/*") if file.name != "header"]
        before, kept = kept, sum(len(file.read_text().splitlines()) for file in journals)
        assert kept >= before
    assert kept > 0
    read, done = write(writers, tmp_path / "adapter", target, kind)
    assert done
    assert read <= reads - kept  # what was written is not read again
    assert [entry.name for entry in (tmp_path / "killed").iterdir()] == ["m"]
    if kind == "hf":
        assert same_files(target, tmp_path / "whole" / "m")
    else:
        assert target.read_bytes() == (tmp_path / "whole" / "m").read_bytes()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("function", ["os.rename", "os.replace"])
def test_killed_while_it_gets_its_name(tmp_path, monkeypatch, function, moment):
    """The last step and what follows it: the target is there and whole, or the next writer finishes it."""
    rename = getattr(os, function.removeprefix("os."))

    def killed(source, target):
        if Path(target).name in ("f", "g"):
            if moment == "after":
                rename(source, target)
            raise Killed
        rename(source, target)

    def write_folder(overwrite: bool) -> None:
        with resumable_folder(tmp_path / "g", {"a": 1}, overwrite=overwrite) as unfinished:
            (unfinished.path / "x").write_bytes(b"new")

    with monkeypatch.context() as patch:
        patch.setattr(function, killed)
        for write in (lambda: write_some(tmp_path / "f", {"a": 1}, PARTS), lambda: write_folder(False)):
            with contextlib.suppress(Killed):
                write()
    for name in ("f", "g"):
        assert (tmp_path / name).exists() or (tmp_path / f".part-{name}" / "data").exists()
    write_some(tmp_path / "f", {"a": 1}, PARTS)
    write_folder(True)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert (tmp_path / "g" / "x").read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "g"]


class Killed(BaseException):
    """Ends a block as a signal would, as far as the block can tell."""


def write_some(path: Path, inputs, parts: list[bytes], *, until: int | None = None) -> int:
    """Write a file in parts; returns how many of them were written now."""
    with resumable_file(path, inputs) as unfinished, AppendedFile(unfinished.path, unfinished.marks, b"head") as out:
        written = 0
        for i, part in enumerate(parts):
            if i == until:
                raise Killed
            if not out.skip(len(part)):
                out.write(part)
                out.mark()
                written += 1
        return written


PARTS = [bytes([i]) * 1000 for i in range(10)]
CONTENT = b"head" + b"".join(PARTS)


def interrupted(path: Path) -> Path:
    with pytest.raises(Killed):
        write_some(path, {"a": 1}, PARTS, until=6)
    assert not path.exists()
    return path.with_name(f".part-{path.name}")


def test_an_unfinished_file_goes_on_where_it_is_whole(tmp_path):
    interrupted(tmp_path / "f")
    assert write_some(tmp_path / "f", {"a": 1}, PARTS) == 4
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_other_inputs_begin_anew(tmp_path):
    interrupted(tmp_path / "f")
    assert write_some(tmp_path / "f", {"a": 2}, PARTS) == 10
    interrupted(tmp_path / "g")
    assert write_some(tmp_path / "g", None, PARTS) == 10
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "g"]


@pytest.mark.parametrize(
    ("damage", "written"),
    [
        (lambda part: (part / "data").write_bytes((part / "data").read_bytes()[:3000]), 10),
        (lambda part: (part / "data").write_bytes(b"heaD" + (part / "data").read_bytes()[4:]), 10),
        (lambda part: (part / "data").write_bytes((part / "data").read_bytes()[:99] + b"?" * 5907), 10),
        (lambda part: (part / "data").write_bytes((part / "data").read_bytes() + b"half a part"), 4),
        (lambda part: (part / "marks" / "data").write_bytes((part / "marks" / "data").read_bytes()[:-2]), 5),
        (lambda part: (part / "marks" / "data").write_bytes((part / "marks" / "data").read_bytes() + b"70"), 4),
        (lambda part: (part / "marks" / "data").write_bytes(b"\xff\x00 1 .\n"), 10),
        (lambda part: (part / "marks" / "data").write_bytes(b"9999999999 1 .\n"), 10),
        (lambda part: (part / "marks" / "data").unlink(), 10),
        (lambda part: (part / "data").unlink(), 10),
        (lambda part: (part / "inputs.json").unlink(), 10),
        (lambda part: (part / "inputs.json").write_bytes(b"\xff"), 10),
    ],
)
def test_what_was_kept_is_checked_before_it_is_used(tmp_path, damage, written):
    damage(interrupted(tmp_path / "f"))
    assert write_some(tmp_path / "f", {"a": 1}, PARTS) == written
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_an_error_keeps_nothing(tmp_path):
    with pytest.raises(ValueError, match="bad"), resumable_file(tmp_path / "f", {"a": 1}) as unfinished:
        unfinished.path.write_bytes(b"x")
        raise ValueError("bad")
    with pytest.raises(ValueError, match="bad"), resumable_folder(tmp_path / "g", {"a": 1}) as unfinished:
        (unfinished.path / "x").write_bytes(b"x")
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_share_what_is_unfinished(tmp_path):
    with resumable_file(tmp_path / "f", {"a": 1}) as first, resumable_file(tmp_path / "f", {"a": 1}) as second:
        assert first.marks is not None
        assert second.marks is None
        first.path.write_bytes(b"first")
        second.path.write_bytes(b"second")
    assert (tmp_path / "f").read_bytes() == b"first"  # which ended last
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_change_of_the_inputs_is_seen(tmp_path):
    """An adapter that was trained on since is another one: nothing of the old merge is used."""
    tuned(tmp_path, nf4=True)
    published, _ = open_model(tmp_path / "adapter")
    before = inputs_of(published, dtype="bfloat16")
    assert {Path(name).name for name, *_ in before["files"]} >= {"model.safetensors", "adapter_model.safetensors"}
    assert before == inputs_of(open_model(tmp_path / "adapter")[0], dtype="bfloat16")
    assert before != inputs_of(open_model(tmp_path / "adapter", merge_base="original")[0], dtype="bfloat16")
    assert before != inputs_of(published, dtype="float16")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes())
    assert before != inputs_of(published, dtype="bfloat16")
    assert inputs_of(publish(small_llama())) is None


def test_nf4_config_of_the_adapter_is_used(tmp_path):
    tuned(tmp_path, nf4=True)
    file = tmp_path / "adapter" / "base.json"
    values = json.loads(file.read_text())
    values["rounding"]["nf4"] = NF4Config(block_size=128, double_quant=False).to_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    before = open_model(tmp_path / "adapter")[0].tensors[name].read()
    file.write_text(json.dumps(values))
    after = open_model(tmp_path / "adapter")[0].tensors[name].read()
    assert not torch.equal(before, after)
