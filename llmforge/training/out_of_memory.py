"""Out of memory: how it is recognised, and what would fit instead."""

import torch

from llmforge.training.config import TrainConfig


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the machine, has too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch has no class of its own for the CPU and for MPS.
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def what_would_fit(config: TrainConfig, *, rows: int, micro_batch_size: int, seq_len: int, can_checkpoint: bool) -> str:
    """The cheapest changes of the settings that need less memory, best first; the first ones leave what is computed as it is.

    Args:
        rows: sequences per step.
        micro_batch_size: sequences per forward pass, with which it did not fit.
        seq_len: tokens per sequence, as trained.
        can_checkpoint: whether the model has `set_activation_checkpointing`.
    """
    size = micro_batch_size
    ways = []
    if size > 1:
        smaller = max(part for part in range(1, size) if rows % part == 0)
        ways.append(
            f"micro_batch_size={smaller} with grad_accum_steps={rows // smaller} (the same step, {smaller}/{size} of the activations)"
        )
    if can_checkpoint and config.activation_checkpointing == "none":
        ways.append(
            "activation_checkpointing=blocks (the same step, about a third more time, a fraction of the activations)"
        )
    elif can_checkpoint and config.activation_checkpointing == "blocks":
        ways.append("activation_checkpointing=offload (the same step, block inputs in the host's memory)")
    if config.optimizer == "adamw":
        ways.append("optimizer=adamw8bit (a quarter of the optimizer's memory, in a new run)")
    if seq_len > 1:
        ways.append(f"seq_len={max(1, seq_len // 2)} (shorter contexts)")
    return ", or ".join(ways[:3])
