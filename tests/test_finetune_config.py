"""Tuning runs in Axolotl's words: a user's file as it stands, what each key becomes, and what is refused or said to have no effect."""

from pathlib import Path

import pytest
import yaml

from llmforge import ConfigError
from llmforge.cli.finetune_config import FinetuneConfig, read_axolotl

EXAMPLE = Path(__file__).parent.parent / "examples" / "tutor.yaml"
LEAST = {"base_model": "base", "datasets": [{"path": "tutor.jsonl", "type": "alpaca"}]}


def config(**changes):
    return FinetuneConfig.from_dict(read_axolotl({**LEAST, **changes})[0])


def test_a_users_file_runs_as_it_stands():
    known, notes = read_axolotl(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")))
    found = FinetuneConfig.from_dict(known)
    assert (found.lora_r, found.lora_alpha, found.lora_dropout) == (32, 16, 0.05)
    assert found.nf4_config is not None
    assert found.lora_config.target_modules == "all-linear"
    train = found.train_config(100, context_length=8192)
    assert (train.max_steps, train.seq_len, train.lr, train.warmup_steps, train.schedule) == (
        75,
        1024,
        2e-4,
        10,
        "cosine",
    )
    assert (train.eval_every_steps, train.save_every_steps, train.min_lr) == (6, 25, 0.0)
    assert train.activation_checkpointing == "blocks"
    # Each key that is set and has no effect is named; those that are empty or off say nothing.
    named = {note.split(" ")[0] for note in notes}
    assert named == {"model_type", "tokenizer_type", "pad_to_sequence_len", "flash_attention", "special_tokens"}


def test_every_key_of_the_users_file_is_a_field_or_accounted_for():
    values = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    for key in values:
        _, notes = read_axolotl(
            {key: 1 if values[key] is None else values[key]} if key not in ("deepspeed", "fsdp", "fsdp_config") else {}
        )
        assert not any("not known here" in note for note in notes), key


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        (dict(optimizer="adamw_torch"), "optimizer", "adamw"),
        (dict(optimizer="paged_adamw_8bit"), "optimizer", "paged_adamw8bit"),
        (dict(optimizer="adamw_bnb_8bit"), "optimizer", "adamw8bit"),
        (dict(lr_scheduler="constant_with_warmup"), "schedule", "constant"),
        (dict(cosine_min_lr_ratio=0.1, learning_rate=1e-3), "min_lr", 1e-4),
        (dict(warmup_ratio=0.1, max_steps=50), "warmup_steps", 5),
        (dict(warmup_steps=1000, max_steps=50), "warmup_steps", 49),
        (dict(num_epochs=2, micro_batch_size=4, gradient_accumulation_steps=2), "max_steps", 25),
        (dict(gradient_checkpointing=False), "activation_checkpointing", "none"),
        (dict(gradient_checkpointing="offload"), "activation_checkpointing", "offload"),
        (dict(activation_offloading=True), "activation_checkpointing", "offload"),
        (dict(max_grad_norm=None), "grad_clip", None),
        (dict(max_grad_norm=0), "grad_clip", None),
        (dict(bf16=True), "dtype", "bfloat16"),
        (dict(fp16=True), "dtype", "float16"),
        (dict(sequence_len=100_000), "seq_len", 512),
        (dict(save_total_limit=5), "keep_last", 5),
        (dict(eval_steps=7), "eval_every_steps", 7),
        (dict(saves_per_epoch=4), "save_every_steps", 25),
        (dict(learning_rate="2e-4"), "lr", 2e-4),  # as YAML reads it without a dot
        (dict(adam_beta2=0.95), "betas", (0.9, 0.95)),
    ],
    ids=str,
)
def test_what_a_key_becomes_in_the_loop(changes, field, value):
    assert getattr(config(**changes).train_config(100, context_length=512), field) == pytest.approx(value)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        (dict(lora_target_modules=["q_proj", "v_proj"]), "target_modules", ("q_proj", "v_proj")),
        (dict(lora_target_linear=True), "target_modules", "all-linear"),
        (dict(lora_modules_to_save=["lm_head"]), "modules_to_save", ("lm_head",)),
        (dict(peft_use_dora=True), "use_dora", True),
        (dict(peft_use_rslora=True), "use_rslora", True),
    ],
    ids=str,
)
def test_what_a_key_becomes_in_the_adapter(changes, field, value):
    assert getattr(config(**changes).lora_config, field) == value


def test_a_path_alone_is_a_dataset():
    assert config(datasets="tutor.jsonl").datasets == config(datasets=["tutor.jsonl"]).datasets
    assert config(datasets="tutor.jsonl").datasets[0].kind == "auto"


def test_which_bases_are_quantized():
    assert config(adapter="lora").nf4_config is None
    assert config(adapter="lora", load_in_4bit=True).nf4_config is not None
    assert config(adapter="qlora").nf4_config.double_quant
    assert config(adapter=None).lora_config is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rat=1e-4), "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (dict(adapter="ia3"), "adapter must be one of 'lora', 'qlora', got 'ia3'"),
        (dict(adapter="qlora", load_in_4bit=False), "adapter qlora means a base in 4 bits, but load_in_4bit is false"),
        (dict(adapter=None, load_in_4bit=True), "load_in_4bit freezes the base, so it needs adapter: qlora"),
        (
            dict(load_in_8bit=True),
            r"load_in_8bit \(True\) cannot be had here: the base is 16-bit or, with load_in_4bit, 4-bit",
        ),
        (dict(deepspeed="zero3.json"), r"deepspeed \('zero3.json'\) cannot be had here: one device is used"),
        (dict(fsdp=["full_shard"]), "fsdp .* cannot be had here"),
        (dict(rl="dpo"), "rl .* cannot be had here: examples are learned as they are"),
        (dict(neftune_noise_alpha=5), "no noise is added to embeddings; leave it out"),
        (dict(adam_epsilon=1e-6), "AdamW's epsilon is 1e-8"),
        (dict(loraplus_lr_ratio=16), "both matrices of an adapter have one learning rate"),
        (dict(pretraining_dataset="x"), "use datasets with type completion"),
        (dict(datasets=[]), "datasets is empty; name a file of examples"),
        (dict(datasets=7), "datasets must be .*got 7"),
        (dict(datasets=[7]), "DatasetConfig.path must be text, got 7"),
        (dict(datasets=[{"type": "alpaca"}]), "DatasetConfig needs a value for 'path'"),
        (dict(datasets=[{"path": "a", "type": "alpacca"}]), "unknown type 'alpacca'; did you mean 'alpaca'?"),
        (dict(datasets=[{"path": "a", "split": "test"}]), r"split \('test'\) must be train"),
        (dict(datasets=[{"path": "a", "ds_type": "parquet"}]), "JSON and JSONL files are read here"),
        (dict(datasets=[{"path": "a", "typ": "alpaca"}]), "unknown DatasetConfig field 'typ'; did you mean 'type'?"),
        (dict(datasets=[{"path": "a", "type": "alpaca"}, {"path": "b", "type": "sharegpt"}]), "several types"),
        (dict(lora_target_linear=True, lora_target_modules=["q_proj"]), "exclude each other; leave one out"),
        (dict(lora_r=0), "r .*0"),
        (dict(lora_dropout=1.0), "dropout"),
        (dict(lora_r="many"), "lora_r must be a whole number, got 'many'"),
        (dict(sequence_len=0), r"sequence_len \(0\) must be at least 1"),
        (dict(micro_batch_size=0), r"micro_batch_size \(0\) must be at least 1"),
        (dict(evals_per_epoch=0), r"evals_per_epoch \(0\) must be at least 1; leave it out"),
        (dict(num_epochs=0), r"num_epochs \(0.0\) must be above 0"),
        (dict(val_set_size=-1), "val_set_size .* must be a fraction below 1, or a whole number"),
        (dict(num_epochs=float("inf")), r"num_epochs \(inf\) must be above 0"),
        (dict(val_set_size=float("inf")), "val_set_size .* must be a fraction below 1, or a whole number"),
        (dict(val_set_size=float("nan")), "val_set_size .* must be a fraction below 1, or a whole number"),
        (dict(val_set_size=1.5), "val_set_size .* must be a fraction below 1, or a whole number"),
        (dict(warmup_ratio=2.0), r"warmup_ratio \(2.0\) must be at least 0 and below 1"),
        (dict(optimizer="lion"), "unknown optimizer 'lion'; known: adamw"),
        (dict(optimizer="adamw_trch"), "did you mean 'adamw_torch'?"),
        (dict(lr_scheduler="polynomial"), "unknown lr_scheduler 'polynomial'"),
        (dict(bf16=True, fp16=True), "bf16 and fp16 exclude each other"),
        (dict(gradient_checkpointing="sometimes"), "gradient_checkpointing must be"),
        (dict(excess_length_strategy="split"), "excess_length_strategy must be one of 'drop', 'truncate', 'raise'"),
        (dict(base_model=None), "FinetuneConfig needs a value for 'base_model'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_with_value_and_rule(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        (dict(), None),
        (dict(bf16="auto", fp16=False), None),
        (dict(bf16=True), "bfloat16"),
        (dict(bf16=False, fp16=True), "float16"),
        (dict(bf16=False, fp16=False), "float32"),
    ],
    ids=str,
)
def test_the_arithmetic_is_the_one_that_was_asked_for(changes, dtype):
    assert config(**changes).train_config(10, context_length=64).dtype == dtype


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="the key 1 is no text"):
        read_axolotl({**LEAST, 1: 2})


def test_an_unknown_key_is_named_and_does_not_stop_the_run():
    known, notes = read_axolotl({**LEAST, "quux_mode": True, "quux_off": None})
    assert notes == ["quux_mode is not known here and has no effect"]
    assert FinetuneConfig.from_dict(known) == config()


def test_a_family_of_keys_is_known_by_its_beginning():
    _, notes = read_axolotl({**LEAST, "wandb_project": "p", "hub_model_id": "me/it", "wandb_name": None})
    assert notes == [
        "wandb_project has no effect here: metrics are in log.jsonl and loss.png of the run",
        "hub_model_id has no effect here: nothing is uploaded",
    ]


def test_a_config_survives_its_own_yaml():
    found = config(adapter="qlora", lora_target_modules=["q_proj"], val_set_size=20, gradient_checkpointing="offload")
    assert FinetuneConfig.from_dict(yaml.safe_load(found.to_yaml())) == found
