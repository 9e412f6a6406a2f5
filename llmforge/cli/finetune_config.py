"""FinetuneConfig: a tuning run in the words that Axolotl's users have, so that their YAML files run as they stand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmforge.config import Config, did_you_mean
from llmforge.errors import ConfigError, shown
from llmforge.finetune.lora import LoRAConfig
from llmforge.finetune.quantize import NF4Config
from llmforge.training import TrainConfig

_OPTIMIZERS: Mapping[str, Literal["adamw", "adamw8bit", "paged_adamw8bit"]] = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_torch_8bit": "adamw8bit",
    "paged_adamw_8bit": "paged_adamw8bit",
}
_SCHEDULES: Mapping[str, Literal["cosine", "linear", "constant", "wsd"]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
# What Axolotl calls the kinds of records, and what they are called here.
DATASET_TYPES: Mapping[str, str] = {
    "auto": "auto",
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "auto",  # sharegpt or messages: the records tell
    "messages": "messages",
    "completion": "text",
    "text": "text",
    "prompt-completion": "completion",
}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Config):
    """One file of examples."""

    path: str  # .jsonl or .json
    # alpaca; sharegpt or messages (chat_template means either); prompt-completion; completion, as Axolotl calls plain text; auto
    type: str = "auto"
    ds_type: str | None = None  # "json" has no effect: the file says what it is
    split: str | None = None  # "train" has no effect: a file has no other

    def __post_init__(self) -> None:
        if self.type not in DATASET_TYPES:
            raise ConfigError(f"datasets: unknown type {self.type!r}; {did_you_mean(self.type, list(DATASET_TYPES))}")
        if self.ds_type not in (None, "json"):
            raise ConfigError(f"datasets: ds_type ({self.ds_type!r}) must be json: JSON and JSONL files are read here")
        if self.split not in (None, "train"):
            raise ConfigError(f"datasets: split ({self.split!r}) must be train; a file here has no other part")

    @property
    def kind(self) -> str:
        """The kind of record, as `InstructionDataset` calls it."""
        return DATASET_TYPES[self.type]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """A tuning run, field by field as Axolotl's YAML has it; what is llmforge's own comes last.

    Raises:
        ConfigError: a value out of range, or two that exclude each other.
    """

    base_model: str  # what `load` accepts
    datasets: tuple[DatasetConfig, ...]
    output_dir: str = "runs/finetune"  # run folder

    adapter: Literal["lora", "qlora"] | None = "lora"  # None trains all weights
    load_in_4bit: bool | None = None  # the frozen base in NF4; None = with adapter qlora
    lora_r: int = 16
    lora_alpha: float = 32.0  # the adapter's output is multiplied by lora_alpha / lora_r
    lora_dropout: float = 0.0
    lora_target_linear: bool | None = (
        None  # all linear layers but the output projection; None = where no modules are named
    )
    lora_target_modules: tuple[str, ...] | None = None  # names of layers, like q_proj
    lora_modules_to_save: tuple[str, ...] | None = None  # trained in full beside the adapter, like lm_head
    peft_use_dora: bool = False
    peft_use_rslora: bool = False

    chat_template: str | None = (
        None  # alpaca, chatml, llama3; None or tokenizer_default = the model's own, or else alpaca
    )
    train_on_inputs: bool = False  # loss on the prompts, too
    sequence_len: int = 2048  # tokens per row; never more than the model's context
    sample_packing: bool = True  # several examples in a row; they do not see each other
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"  # of examples longer than sequence_len
    val_set_size: float = 0.05  # held out: a fraction below 1, or a number of examples; 0 = none

    micro_batch_size: int = 1  # rows per forward pass
    gradient_accumulation_steps: int = 1  # forward passes per step
    num_epochs: float = 3.0
    max_steps: int | None = None  # instead of num_epochs
    learning_rate: float = 2e-4
    lr_scheduler: str = "cosine"
    cosine_min_lr_ratio: float | None = None  # learning rate at the end, as a part of learning_rate; None = 0
    warmup_steps: int | None = None
    warmup_ratio: float | None = None  # instead of warmup_steps: a part of all steps; both None = 3 %
    optimizer: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float | None = 1.0
    seed: int = 42

    bf16: bool | Literal["auto"] | None = "auto"  # arithmetic in bfloat16; auto = on GPUs that have it, false = float32
    fp16: bool | None = None  # in float16
    gradient_checkpointing: bool | Literal["offload"] = True
    activation_offloading: bool = False  # same as gradient_checkpointing: offload
    tiled_mlp: bool = False  # feed-forward of long sequences in pieces
    tiled_mlp_num_shards: int | None = None  # how many; None = 4

    eval_steps: int | None = None
    evals_per_epoch: int | None = None  # None with eval_steps None = 4
    save_steps: int | None = None
    saves_per_epoch: int | None = None  # None with save_steps None = 1
    save_total_limit: int = 2  # newest checkpoints to keep, beside the best one
    logging_steps: int = 1

    # Not Axolotl's
    offload_embedding: bool = False  # the token embedding in the host's memory
    double_quant: bool = True  # of NF4: the scales of its blocks in 8 bits
    embedding_bits: Literal[8, 16] = 16  # of token embedding and output projection beside a base in 4 bits
    skip_bad: bool = False  # leave out malformed records, and count them, where otherwise the first is an error
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError(
                "datasets is empty; name a file of examples: datasets: [{path: tutor.jsonl, type: alpaca}]"
            )
        if len({dataset.kind for dataset in self.datasets}) > 1:
            found = ", ".join(dataset.type for dataset in self.datasets)
            raise ConfigError(f"datasets have several types ({found}); all of a run must be of one type")
        if self.adapter is None and self.load_in_4bit:
            raise ConfigError(
                "load_in_4bit freezes the base, so it needs adapter: qlora (or lora); 4-bit weights do not train"
            )
        if self.adapter == "qlora" and self.load_in_4bit is False:
            raise ConfigError("adapter qlora means a base in 4 bits, but load_in_4bit is false; use adapter: lora")
        if self.embedding_bits not in (8, 16):
            raise ConfigError(f"embedding_bits ({self.embedding_bits}) must be 8 or 16")
        if self.embedding_bits == 8 and self.nf4_config is None:
            raise ConfigError("embedding_bits: 8 belongs to a base in 4 bits; set adapter: qlora, or leave it out")
        if self.lora_target_linear and self.lora_target_modules:
            raise ConfigError(
                "lora_target_linear (all of them) and lora_target_modules exclude each other; leave one out"
            )
        for name in (
            "sequence_len",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "save_total_limit",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        for name in (
            "eval_steps",
            "evals_per_epoch",
            "save_steps",
            "saves_per_epoch",
            "logging_steps",
            "tiled_mlp_num_shards",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1; leave it out for the default")
        if not 0 < self.num_epochs < math.inf:
            raise ConfigError(f"num_epochs ({self.num_epochs}) must be above 0")
        if not (0 <= self.val_set_size < 1 or (self.val_set_size >= 1 and self.val_set_size.is_integer())):
            raise ConfigError(
                f"val_set_size ({self.val_set_size}) must be a fraction below 1, or a whole number of examples"
            )
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio ({self.warmup_ratio}) must be at least 0 and below 1")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ConfigError("warmup_steps and warmup_ratio exclude each other; leave one out")
        if self.cosine_min_lr_ratio is not None and not 0 <= self.cosine_min_lr_ratio <= 1:
            raise ConfigError(f"cosine_min_lr_ratio ({self.cosine_min_lr_ratio}) must be between 0 and 1")
        for name, known in (("optimizer", _OPTIMIZERS), ("lr_scheduler", _SCHEDULES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"unknown {name} {getattr(self, name)!r}; {did_you_mean(getattr(self, name), list(known))}"
                )
        if self.bf16 is True and self.fp16:
            raise ConfigError("bf16 and fp16 exclude each other; leave one out")
        if self.lora_config is not None:  # checks its own fields
            assert self.lora_config.r == self.lora_r

    @property
    def lora_config(self) -> LoRAConfig | None:
        """None: all weights are trained."""
        if self.adapter is None:
            return None
        return LoRAConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            use_rslora=self.peft_use_rslora,
            use_dora=self.peft_use_dora,
            modules_to_save=self.lora_modules_to_save or (),
        )

    @property
    def nf4_config(self) -> NF4Config | None:
        """None: the base is not quantized."""
        quantized = self.adapter == "qlora" if self.load_in_4bit is None else self.load_in_4bit
        return NF4Config(double_quant=self.double_quant, embedding_bits=self.embedding_bits) if quantized else None

    @property
    def activation_checkpointing(self) -> Literal["none", "blocks", "offload"]:
        if self.gradient_checkpointing == "offload" or (self.gradient_checkpointing and self.activation_offloading):
            return "offload"
        return "blocks" if self.gradient_checkpointing else "none"

    @property
    def mlp_tiles(self) -> int:
        return (self.tiled_mlp_num_shards or 4) if self.tiled_mlp else 1

    def train_config(self, num_sequences: int, *, context_length: int, world_size: int = 1) -> TrainConfig:
        """The settings of the loop, for data of so many rows.

        Args:
            num_sequences: rows in an epoch.
            context_length: of the model.
            world_size: processes, each of which reads its rows of a step.
        """
        rows = self.micro_batch_size * self.gradient_accumulation_steps * world_size
        per_epoch = max(1, round(num_sequences / rows))
        steps = self.max_steps or max(1, round(self.num_epochs * num_sequences / rows))
        warmup = round((0.03 if self.warmup_ratio is None else self.warmup_ratio) * steps)
        dtype: Literal["bfloat16", "float16", "float32"] | None = None
        if self.bf16 is True or self.fp16:
            dtype = "bfloat16" if self.bf16 is True else "float16"
        elif self.bf16 is False:
            dtype = "float32"
        return TrainConfig(
            max_steps=steps,
            micro_batch_size=self.micro_batch_size,
            grad_accum_steps=self.gradient_accumulation_steps,
            seq_len=min(self.sequence_len, context_length),
            lr=self.learning_rate,
            min_lr=self.learning_rate * (self.cosine_min_lr_ratio or 0.0),
            warmup_steps=min(warmup if self.warmup_steps is None else self.warmup_steps, steps - 1),
            schedule=_SCHEDULES[self.lr_scheduler],
            weight_decay=self.weight_decay,
            optimizer=_OPTIMIZERS[self.optimizer],
            betas=(self.adam_beta1, self.adam_beta2),
            grad_clip=self.max_grad_norm or None,
            device=self.device,
            dtype=dtype,
            activation_checkpointing=self.activation_checkpointing,
            compile=False,  # packed rows run as they are in any case, and so do layers of 4 bits
            seed=self.seed,
            log_every_steps=self.logging_steps,
            eval_every_steps=self.eval_steps or max(1, per_epoch // (self.evals_per_epoch or 4)),
            eval_batches=None,
            sample_every_steps=None,
            save_every_steps=self.save_steps or max(1, per_epoch // (self.saves_per_epoch or 1)),
            keep_last=self.save_total_limit,
            out_dir=self.output_dir,
        )


# Keys of Axolotl that change nothing of what is learned: key -> why it has no effect. A key that ends in * stands for all that begin so.
_NO_EFFECT = {
    "model_type": "the model's config.json says what it is",
    "tokenizer_type": "the tokenizer's files say what it is",
    "model_config_type": "the model's config.json says what it is",
    "base_model_config": "the model's own config.json is read",
    "is_llama_derived_model": "the model's config.json says what it is",
    "is_mistral_derived_model": "the model's config.json says what it is",
    "tokenizer_use_fast": "there is one reader of tokenizers",
    "trust_remote_code": "code of models is never run",
    "strict": "weights that do not fit are always an error",
    "lora_fan_in_fan_out": "the model's own layout is known",
    "flash_attention": "the fastest exact attention of the device is taken",
    "xformers_attention": "the fastest exact attention of the device is taken",
    "sdp_attention": "the fastest exact attention of the device is taken",
    "flex_attention": "the fastest exact attention of the device is taken",
    "s2_attention": "the fastest exact attention of the device is taken",
    "eager_attention": "the fastest exact attention of the device is taken",
    "attn_implementation": "the fastest exact attention of the device is taken",
    "tf32": "matrices are multiplied in the type of bf16 or fp16",
    "gradient_checkpointing_kwargs": "there is one way, without reentrance",
    "pad_to_sequence_len": "packed rows always have sequence_len tokens",
    "eval_sample_packing": "the held-out examples are packed as the others are",
    "eval_batch_size": "evaluation takes micro_batch_size",
    "eval_table_size": "llmforge compare shows answers side by side",
    "group_by_length": "packing fills the rows",
    "dataset_prepared_path": "the tokens of examples are made anew, in seconds",
    "dataset_processes": "the tokenizer uses all cores by itself",
    "dataset_num_proc": "the tokenizer uses all cores by itself",
    "dataset_keep_in_memory": "tokens are in memory",
    "shuffle_merged_datasets": "examples are always shuffled",
    "dataloader_*": "batches are made in the loop",
    "torch_compile*": "layers of 4 bits and the loss in chunks run as they are",
    "lora_mlp_kernel": "there is one exact way to compute adapters",
    "lora_qkv_kernel": "there is one exact way to compute adapters",
    "lora_o_kernel": "there is one exact way to compute adapters",
    "unsloth_*": "nothing of unsloth is needed",
    "liger_*": "the loss in chunks and tiled_mlp save the same memory",
    "plugins": "the loss in chunks and tiled_mlp save the same memory",
    "cut_cross_entropy": "the loss is computed in chunks of answer tokens",
    "chunked_cross_entropy*": "the loss is computed in chunks of answer tokens",
    "lora_on_cpu": "the merge streams from file to file",
    "lora_model_dir": "llmforge finetune --resume goes on with a run",
    "resume_from_checkpoint": "llmforge finetune --resume goes on with a run",
    "auto_resume_from_checkpoints": "llmforge finetune --resume goes on with a run",
    "local_rank": "one device is used",
    "ddp_*": "one device is used",
    "debug": "--debug shows more of an error",
    "wandb_*": "metrics are in log.jsonl and loss.png of the run",
    "use_wandb": "metrics are in log.jsonl and loss.png of the run",
    "mlflow_*": "metrics are in log.jsonl and loss.png of the run",
    "use_mlflow": "metrics are in log.jsonl and loss.png of the run",
    "comet_*": "metrics are in log.jsonl and loss.png of the run",
    "use_tensorboard": "metrics are in log.jsonl and loss.png of the run",
    "hub_*": "nothing is uploaded",
    "push_dataset_to_hub": "nothing is uploaded",
    "save_safetensors": "adapters are always safetensors",
    "save_only_model": "a checkpoint can always be resumed",
    "save_strategy": "save_steps or saves_per_epoch say when",
    "eval_strategy": "eval_steps or evals_per_epoch say when",
    "evaluation_strategy": "eval_steps or evals_per_epoch say when",
    "load_best_model_at_end": "--checkpoint best takes the best one",
    "early_stopping_patience": "the run ends at its last step, and the best checkpoint is kept",
    "special_tokens": "no padding token is needed, and the others are the tokenizer's own",
    "use_ray": "one device is used",
}  # fmt: skip
# Keys that would change what is learned, or how: only these values can be had.
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "load_in_8bit": ((False,), "the base is 16-bit or, with load_in_4bit, 4-bit"),
    "gptq": ((False,), "the base is 16-bit or, with load_in_4bit, 4-bit"),
    "deepspeed": ((), "one device is used, and an 8B model fits into 12 GB"),
    "fsdp": ((), "one device is used, and an 8B model fits into 12 GB"),
    "fsdp_config": ((), "one device is used, and an 8B model fits into 12 GB"),
    "rl": ((), "examples are learned as they are; preferences are not"),
    "relora_steps": ((), "there is one adapter, from the first step to the last"),
    "loraplus_lr_ratio": ((1, 1.0), "both matrices of an adapter have one learning rate"),
    "neftune_noise_alpha": ((0, 0.0), "no noise is added to embeddings"),
    "label_smoothing_factor": ((0, 0.0), "the loss is the plain cross-entropy"),
    "adam_epsilon": ((1e-8,), "AdamW's epsilon is 1e-8"),
    "lora_layers_to_transform": ((), "name the layers in lora_target_modules"),
    "pretraining_dataset": ((), "use datasets with type completion"),
    "test_datasets": ((), "val_set_size holds out a part of datasets"),
    "tokens": ((), "the vocabulary is the model's"),
    "added_tokens_overrides": ((), "the vocabulary is the model's"),
    "overrides_of_model_config": ((), "the model's config is as published"),
    "peft_layers_to_transform": ((), "name the layers in lora_target_modules"),
    "peft_init_lora_weights": ((True,), "A is random and B zero"),
    "sequence_parallel_degree": ((1,), "one device is used"),
    "context_parallel_size": ((1,), "one device is used"),
}  # fmt: skip


def read_axolotl(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of FinetuneConfig in a YAML file of Axolotl's, and a note for each key that has no effect here.

    Raises:
        ConfigError: a key that is not known, or one whose value would need something that llmforge does not do.
    """
    own = {field.name for field in fields(FinetuneConfig)}
    known: dict[str, Any] = {}
    notes, unknown = [], []
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"the key {shown(key)} is no text; write it in quotes if it is meant as one")
        if key in own:
            # An empty value is the default, as in Axolotl; None is a value of its own for these two.
            if value is not None or key in ("adapter", "max_grad_norm"):
                known[key] = value
        elif key in _FIXED:
            allowed, rule = _FIXED[key]
            if value not in (None, False, [], {}, "") and value not in allowed:
                raise ConfigError(f"{key} ({shown(value)}) cannot be had here: {rule}; leave it out")
        elif (reason := _no_effect(key)) is not None:
            if value not in (None, False, [], {}, ""):
                notes.append(f"{key} has no effect here: {reason}")
        else:
            unknown.append(key)
    for key in unknown:
        hint = did_you_mean(str(key), sorted(own))
        if "did you mean" in hint:
            raise ConfigError(f"unknown key {shown(key)}; {hint}")
    set_ones = [key for key in unknown if values[key] not in (None, False, [], {}, "")]
    notes += [f"{key} is not known here and has no effect" for key in set_ones]
    if "warmup_steps" in known and "warmup_ratio" in known:
        notes.append("warmup_ratio has no effect here: warmup_steps says how many")
        del known["warmup_ratio"]
    datasets = known.get("datasets")
    if isinstance(datasets, str):
        datasets = [datasets]
    if isinstance(datasets, Sequence):
        known["datasets"] = [_dataset(dataset, notes) for dataset in datasets]
    return known, notes


def _no_effect(key: str) -> str | None:
    if key in _NO_EFFECT:
        return _NO_EFFECT[key]
    return next((why for name, why in _NO_EFFECT.items() if name.endswith("*") and key.startswith(name[:-1])), None)


def _dataset(values: Any, notes: list[str]) -> Any:
    """A row of datasets, or a path alone, without the keys that only say what the records say by themselves."""
    if not isinstance(values, Mapping):
        return {"path": values}
    own = {field.name for field in fields(DatasetConfig)}
    recognised = (
        "conversation",
        "field_messages",
        "message_field_role",
        "message_field_content",
        "message_property_mappings",
    )
    for key in values:
        if key in recognised:
            notes.append(f"datasets: {key} has no effect here: the records are recognised by their keys")
    return {key: value for key, value in values.items() if key not in recognised and (key in own or value is not None)}
