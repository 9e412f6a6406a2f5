"""What memory a tuning run needs, against a GPU; and the settings with which it fits."""

from typing import TYPE_CHECKING, Any

from llmforge.errors import OutOfMemoryError

if TYPE_CHECKING:
    from llmforge.cli.finetune_config import FinetuneConfig
    from llmforge.finetune.memory import MemoryEstimate, MemoryPlan
    from llmforge.models import ModelConfig

_GIB = 2**30


def fitted(
    config: "FinetuneConfig",
    model_config: "ModelConfig",
    *,
    context_length: int,
    answer_tokens: int | None,
    gpu_gb: float | None,
    change: bool,
) -> "FinetuneConfig":
    """Print what the run needs, item by item, and whether the GPU has it; where it has not, what would make it fit.

    Args:
        context_length: of the model.
        answer_tokens: most tokens of a row that are learned; None = all.
        gpu_gb: size of the GPU; None = the one at hand.
        change: return the settings that fit, not those that were given.
    Raises:
        OutOfMemoryError: `change`, and nothing fits.
    """
    import torch

    from llmforge.cli.dry_run import dry_run
    from llmforge.finetune.memory import GPU, fit

    gpu = GPU.of_size(gpu_gb) if gpu_gb is not None else GPU.at_hand()
    on_cpu = config.device == "cpu" and gpu_gb is None
    rows = config.train_config(config.micro_batch_size, context_length=context_length)
    plan = _plan(config, rows.seq_len or context_length)

    def estimate(plan: "MemoryPlan") -> "MemoryEstimate":
        return dry_run(
            model_config,
            nf4=config.nf4_config,
            lora=config.lora_config,
            plan=plan,
            dtype=None if rows.dtype is None else getattr(torch, rows.dtype),
            answer_tokens=answer_tokens,
            device_type="cpu" if on_cpu else "cuda",
        )

    needed = estimate(plan)
    print(f"A step of {plan.micro_batch_size} x {plan.seq_len:,} tokens at its worst moment:\n")
    print(needed)
    print()
    if gpu is None or on_cpu:
        print("There is no GPU to compare with; --gpu-gb 12 says whether that fits a card of 12 GB.")
        return config
    usable = f"{gpu.usable_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB usable"
    if needed.fits(gpu.usable_bytes):
        print(f"It fits the {gpu.name} ({usable}).")
        return config
    print(f"It does not fit the {gpu.name} ({usable}).")
    try:
        better, rungs = fit(plan, gpu.usable_bytes, estimate)
    except OutOfMemoryError as error:
        if change:
            raise
        print(error)
        return config
    changes = _changes(plan, better)
    named = ", then ".join(rung.name for rung in rungs)
    print(
        f"{'Taken' if change else 'The cheapest way to make it fit'}: {named}: {estimate(better).peak_bytes / _GIB:.2f} GiB."
    )
    if not change:
        print(f"--auto-fit takes it, or {' '.join(f'--set {key}={_yaml(value)}' for key, value in changes.items())}")
        return config
    return config.replace(**changes)


def _plan(config: "FinetuneConfig", seq_len: int) -> "MemoryPlan":
    from llmforge.finetune.memory import MemoryPlan

    train = config.train_config(1, context_length=seq_len)
    return MemoryPlan(
        micro_batch_size=config.micro_batch_size,
        grad_accum_steps=config.gradient_accumulation_steps,
        seq_len=seq_len,
        embedding_on_host=config.offload_embedding,
        activation_checkpointing=config.activation_checkpointing,
        optimizer="adamw" if train.optimizer == "muon" else train.optimizer,  # which is not for adapters
        mlp_tiles=config.mlp_tiles,
    )


def _changes(old: "MemoryPlan", new: "MemoryPlan") -> dict[str, Any]:
    """What is other in the second plan, as fields of FinetuneConfig."""
    changes: dict[str, Any] = {}
    if new.embedding_on_host != old.embedding_on_host:
        changes["offload_embedding"] = new.embedding_on_host
    if new.activation_checkpointing != old.activation_checkpointing:
        changes["gradient_checkpointing"] = "offload" if new.activation_checkpointing == "offload" else True
    if new.optimizer != old.optimizer:
        changes["optimizer"] = "adamw_8bit"
    if new.mlp_tiles != old.mlp_tiles:
        changes |= {"tiled_mlp": True, "tiled_mlp_num_shards": new.mlp_tiles}
    if new.micro_batch_size != old.micro_batch_size:
        changes |= {
            "micro_batch_size": new.micro_batch_size,
            "gradient_accumulation_steps": new.grad_accum_steps,
        }
    return changes


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
