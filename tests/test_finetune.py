"""llmforge finetune, as a user types it: from a base and examples to an adapter that is a model; resumed, previewed, refused."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import llmforge as lf
from llmforge.cli.main import main
from llmforge.formats.safetensors import read_safetensors
from llmforge.tokenizers.templates import ALPACA
from llmforge.training import chunked_next_token_loss, list_checkpoints, read_log

QUESTIONS = ("¿Qué es una variable?", "¿Qué hace print?", "What is a list?", "¿Cómo se suma?", "¿Qué es un bucle?")
RECORDS = [
    {"instruction": question, "input": f"ejemplo {i}" if i % 3 == 0 else "", "output": f"Respuesta número {i}: «sí»."}
    for i, question in enumerate(QUESTIONS * 6)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base") / "base"
    texts = [" ".join(str(value) for value in record.values()) for record in RECORDS]
    tokenizer = lf.BPETokenizer.from_texts([*texts, *3 * [ALPACA]], vocab_size=600)
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = lf.LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=256, **shape)
    lf.export_hf(lf.Llama(config), tokenizer, folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "tutor.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def finetune(*arguments):
    return main(["finetune", *map(str, arguments), *(() if "--resume" in arguments else ("--set", "device=cpu"))])


def adapter_of(folder):
    return {name: tensor.read() for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("kind", ["--lora", "--qlora"])
def test_examples_become_an_adapter_that_is_a_model(kind, base, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert finetune(base, data, kind, "--out", out, "--epochs", 8, "--seq-len", 192, "--set", "learning_rate=0.01") == 0
    printed = capsys.readouterr().out
    assert "adapters of rank 16 on 14 layers" in printed
    assert ("in NF4" in printed) == (kind == "--qlora")
    losses = [line["val_loss"] for line in read_log(out / "log.jsonl") if "val_loss" in line]
    before = float(printed.split("held out loss ")[1].split()[0])
    assert losses[-1] < before - 1
    tuned, tokenizer = lf.load(out)
    plain, _ = lf.load(base)
    assert "### Response:" in tokenizer.chat_template
    idx = torch.tensor([tokenizer.encode("¿Qué es una variable?")])
    assert not torch.allclose(tuned(idx), plain(idx), atol=0.1)
    # peft reads it, on the original weights; with rounded ones ours is the trained model, and a little apart
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), list_checkpoints(out)[-1])
    ours, _ = lf.load(base, adapter=out, merge_base="original")
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)
    assert main(["export", str(out), "--gguf", str(tmp_path / "tuned.gguf"), "--file-type", "Q8_0"]) == 0
    assert lf.load(tmp_path / "tuned.gguf")[1].chat_template == tokenizer.chat_template
    with pytest.raises(lf.CheckpointError, match="already holds"):
        assert finetune("--debug", base, data, kind, "--out", out) == 2


def test_a_run_does_not_begin_in_the_folder_of_a_model_or_of_another_run(base, data, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    file = tmp_path / "file"
    file.write_text("")
    for out, why in ((model, "holds a model (config.json)"), (file, "is a file")):
        assert finetune(model, data, "--steps", 1, "--out", out) == 2
        printed = capsys.readouterr()
        assert why in printed.err
        assert "examples" not in printed.out  # nothing was read before
    assert sorted(entry.name for entry in model.iterdir()) == sorted(entry.name for entry in base.iterdir())
    lf.load(model)


def test_resume_equals_an_uninterrupted_run(base, data, tmp_path, capsys):
    arguments = ["--qlora", "--steps", 6, "--seq-len", 192, "--set", "save_steps=2", "--set", "lora_dropout=0.1"]
    arguments += ["--set", "save_total_limit=9"]
    assert finetune(base, data, "--out", tmp_path / "whole", *arguments) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):  # as if the power had gone in step 3
        shutil.rmtree(tmp_path / "cut" / f"step-{step:06d}")
    assert finetune("--resume", tmp_path / "cut") == 0
    whole, resumed = (adapter_of(tmp_path / run / "step-000006") for run in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = adapter_of(tmp_path / "whole" / "step-000002")
    assert not all(torch.equal(whole[name], start[name]) for name in whole)
    assert [line["step"] for line in read_log(tmp_path / "cut" / "log.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_yaml_file_of_axolotls_runs_as_it_stands(base, data, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    values = dict(base_model=str(base), adapter="qlora", load_in_4bit=True, sequence_len=192, sample_packing=True)
    values |= dict(
        lora_r=4,
        lora_alpha=8,
        lora_dropout=0.05,
        lora_target_linear=True,
        datasets=[{"path": str(data), "type": "alpaca"}],
    )
    values |= dict(micro_batch_size=2, gradient_accumulation_steps=2, num_epochs=1, optimizer="paged_adamw_32bit")
    values |= dict(learning_rate=0.0002, lr_scheduler="cosine", warmup_steps=2, val_set_size=0.1, flash_attention=True)
    values |= dict(output_dir=str(tmp_path / "run"), bf16="auto", gradient_checkpointing=True, wandb_project=None)
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert finetune(config) == 0
    captured = capsys.readouterr()
    assert (
        "note: flash_attention has no effect here: the fastest exact attention of the device is taken" in captured.err
    )
    assert "adapters of rank 4 on 14 layers" in captured.out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (saved["lora_r"], saved["sequence_len"], saved["adapter"]) == (4, 192, "qlora")


def test_full_tuning_writes_a_whole_model(base, data, tmp_path, capsys):
    assert finetune(base, data, "--full", "--out", tmp_path / "run", "--steps", 2, "--seq-len", 192) == 0
    assert "all weights" in capsys.readouterr().out
    assert (tmp_path / "run" / "step-000002" / "model.safetensors").is_file()
    tuned, plain = lf.load(tmp_path / "run")[0], lf.load(base)[0]
    assert not torch.equal(tuned.lm_head.weight, plain.lm_head.weight)


def test_memory_switches_do_not_change_what_is_learned(base, data, tmp_path, capsys):
    adapters = []
    switches = [
        [],
        ["--set", "gradient_checkpointing=false"],
        ["--set", "gradient_checkpointing=offload", "--set", "offload_embedding=true"],
        ["--set", "tiled_mlp=true", "--set", "tiled_mlp_num_shards=3"],
    ]
    for number, switch in enumerate(switches):
        out = tmp_path / str(number)
        assert finetune(base, data, "--qlora", "--out", out, "--steps", 2, "--seq-len", 192, *switch) == 0
        adapters.append(adapter_of(out / "step-000002"))
    for adapter in adapters[1:]:
        for name, values in adapter.items():
            torch.testing.assert_close(values, adapters[0][name], atol=1e-6, rtol=1e-4)


def test_the_held_out_loss_is_of_all_examples_whatever_the_micro_batch(base, data, tmp_path):
    tokenizer = lf.load(base)[1]
    held_out = lf.InstructionDataset.from_file(data, tokenizer).split(val_fraction=0.3)[1]
    rows = held_out.num_sequences(192)
    losses = []
    for size in (1, rows - 1, rows + 2):
        config = lf.TrainConfig(max_steps=1, micro_batch_size=size, seq_len=192, device="cpu", eval_batches=None)
        trainer = lf.Trainer(lf.load(base)[0], held_out, config=config, loss_fn=chunked_next_token_loss)
        metrics = trainer.evaluate(held_out)
        assert metrics.num_targets == held_out.num_answer_tokens
        losses.append(metrics.loss)
    assert rows > 2
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_preview_shows_what_is_learned(base, data, tmp_path, capsys):
    assert finetune(base, data, "--preview") == 0
    printed = capsys.readouterr().out
    assert "### Instruction:\n" in printed
    assert "### Response:\n[[Respuesta número" in printed
    assert "<|endoftext|>]]" in printed
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_what_a_run_needs_and_what_makes_it_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "finetune",
        "llama-3-8b",
        "any.jsonl",
        "--qlora",
        "--seq-len",
        "1024",
        "--set",
        "lora_r=32",
        "--dry-run",
    ]
    assert main([*arguments, "--gpu-gb", "12"]) == 0
    fits = capsys.readouterr().out
    assert "It fits the GPU of 12 GB (11.2 of 12.0 GiB usable)." in fits
    assert main([*arguments, "--gpu-gb", "7"]) == 0
    does_not = capsys.readouterr().out
    assert "It does not fit the GPU of 7 GB" in does_not
    assert "--auto-fit takes it, or --set offload_embedding=true" in does_not


def test_a_dry_run_counts_in_the_arithmetic_that_was_asked_for(base, data, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("llmforge.cli.dry_run.dry_run", lambda *_, dtype, **__: seen.append(dtype))
    for settings in ([], ["--set", "bf16=false"], ["--set", "bf16=true"]):
        with pytest.raises(AttributeError):  # there is no estimate
            finetune(base, data, "--dry-run", "--gpu-gb", 12, *settings)
    assert seen == [None, torch.float32, torch.bfloat16]


def test_auto_fit_takes_the_cheapest_way(base, data, tmp_path, capsys):
    arguments = ["--qlora", "--steps", 1, "--seq-len", 192, "--set", "micro_batch_size=8", "--gpu-gb", 0.5]
    assert finetune(base, data, *arguments, "--auto-fit", "--out", tmp_path / "run") == 0
    assert "It fits the GPU of 0.5 GB" in capsys.readouterr().out
    assert (tmp_path / "run" / "step-000001").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a base model and examples"),
        (["{base}"], "name a file of examples for"),
        (["{base}", "nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere/base", "{data}"], "nowhere/base"),
        (["{base}", "{data}", "--set", "learning_rate"], "--set needs key=value, got 'learning_rate'"),
        (["{base}", "{data}", "--set", "lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        (["{base}", "{data}", "--set", "wandb_project=x"], "wandb_project has no effect here"),
        (["{base}", "{data}", "--template", "alpacca"], "unknown chat template 'alpacca'; did you mean 'alpaca'"),
        (["{base}", "{data}", "--type", "chatml"], "unknown type 'chatml'"),
        (["{base}", "{data}", "--type", "sharegpt"], "conversations"),
        (["{base}", "{data}", "--set", "lora_target_modules=[w_proj]"], "w_proj"),
        (["{base}", "{data}", "--set", "optimizer=paged_adamw_8bit"], "needs an NVIDIA GPU and bitsandbytes"),
        (["{base}", "{data}", "--set", "val_set_size=1000"], "1000"),
        (["{base}", "{data}", "--gpu-gb", "12"], "--gpu-gb says for which GPU"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--resume", "nowhere", "--qlora"], "leave out qlora"),
        (["--resume", "nowhere", "--skip-bad"], "leave out skip_bad"),
        (["{base}", "{data}", "--set", "lora_r=1000000000000000"], "out of memory before the first step"),
        (["missing.yaml"], "cannot read missing.yaml"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(arguments, message, base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [word.format(base=base, data=data) for word in arguments]
    assert finetune(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_malformed_line_is_named_and_can_be_skipped(base, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    lines[4] = '{"instruction": "no end'
    path.write_text("\n".join(lines), encoding="utf-8")
    arguments = [base, path, "--out", tmp_path / "run", "--steps", 1, "--seq-len", 192]
    assert finetune(*arguments) == 2
    assert "bad.jsonl" in (error := capsys.readouterr().err)
    assert "line 5" in error
    assert finetune(*arguments, "--skip-bad") == 0
    captured = capsys.readouterr()
    assert "line 5" in captured.out + captured.err


def test_a_template_of_tokens_that_the_base_lacks_is_warned_about(base, data, tmp_path, capsys):
    arguments = [base, data, "--out", tmp_path / "run", "--steps", 1, "--seq-len", 256, "--template", "chatml"]
    assert finetune(*arguments) == 0
    assert "the chat template writes <|im_start|>, <|im_end|>, which are no tokens" in capsys.readouterr().err


def test_examples_that_are_too_long_are_counted(base, data, tmp_path, capsys):
    records = [*RECORDS, {"instruction": "¿?", "output": "sí " * 200}, {"instruction": "¿Y?", "output": "no " * 200}]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    arguments = [base, data, "--steps", 1, "--seq-len", 192, "--set", "val_set_size=0"]
    assert finetune(*arguments, "--out", tmp_path / "drop") == 0
    assert "2 are longer than seq_len (192): 2 are left out" in capsys.readouterr().err
    assert finetune(*arguments, "--out", tmp_path / "stop", "--set", "excess_length_strategy=raise") == 2
    assert "longer" in capsys.readouterr().err
    assert not (tmp_path / "stop").exists()


def test_an_example_alone_is_held_out_by_nobody(base, data, capsys):
    data.write_text(json.dumps(RECORDS[0]), encoding="utf-8")
    assert finetune(base, data, "--preview") == 2
    assert "--set val_set_size=0 holds out none" in capsys.readouterr().err


def test_a_run_whose_base_has_moved_goes_on_with_it(base, data, tmp_path, capsys):
    there, run = tmp_path / "there", tmp_path / "run"
    shutil.copytree(base, tmp_path / "here")
    assert finetune(tmp_path / "here", data, "--out", run, "--steps", 1, "--seq-len", 192) == 0
    (tmp_path / "here").rename(there)
    assert finetune("--resume", run, "--steps", 2) == 2
    assert "here does not exist" in (error := capsys.readouterr().err)
    assert "--set base_model=THERE" in error
    assert finetune("--resume", run, "--steps", 2, "--set", f"base_model={there}") == 0
    assert [folder.name for folder in list_checkpoints(run)][-1] == "step-000002"


def test_out_of_memory_is_said_in_the_words_of_the_settings(base, data, tmp_path, capsys, monkeypatch):
    def full(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("llmforge.training.chunked_next_token_loss", full)
    for changes, words in (
        (["micro_batch_size=2"], "micro_batch_size=1 with gradient_accumulation_steps=2"),
        (["gradient_checkpointing=false"], "gradient_checkpointing=true"),
        (
            [],
            "gradient_checkpointing=offload (the same step, block inputs in the host's memory), or optimizer=adamw_8bit",
        ),
    ):
        settings = [word for change in changes for word in ("--set", change)]
        assert finetune(base, data, "--out", tmp_path / "run", "--seq-len", 192, *settings) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "--auto-fit saves it" in error


def test_resuming_with_the_other_command_is_explained(base, data, tmp_path, capsys):
    assert finetune(base, data, "--out", tmp_path / "run", "--steps", 1, "--seq-len", 192) == 0
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "is a run of llmforge finetune; go on with" in capsys.readouterr().err
