"""How a step is split into forward passes: by the settings, or by the memory that is free."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmforge.errors import ConfigError
from llmforge.training.config import TrainConfig
from llmforge.training.loss import LossFunction

_OF_FREE_MEMORY = 0.8  # on a GPU: what is kept for the backward pass is most of what a step needs, and not all
_OF_FREE_RAM = 0.25  # on a CPU: a process that asks for too much is killed, without an error that one could act on


def split_rows(config: TrainConfig, seq_len: int, world_size: int = 1) -> tuple[int, int | None]:
    """Sequences per step, of all ranks, and per forward pass; None for the latter = to be found.

    Raises:
        ConfigError: tokens_per_step is no whole number of micro-batches, or cannot be divided over the ranks.
    """
    size = config.micro_batch_size if isinstance(config.micro_batch_size, int) else None
    if config.tokens_per_step is None:
        return (size or 1) * config.grad_accum_steps * world_size, size
    rows, rest = divmod(config.tokens_per_step, seq_len)
    if rest or rows < 1:
        raise ConfigError(
            f"tokens_per_step ({config.tokens_per_step}) must be a multiple of seq_len ({seq_len}); {max(1, rows) * seq_len} is the nearest"
        )
    if rows % world_size:
        raise ConfigError(
            f"tokens_per_step ({config.tokens_per_step}) is {rows} sequences of {seq_len}, which cannot be divided over {world_size} "
            f"processes; use {max(1, rows // world_size) * world_size * seq_len}"
        )
    if size is not None and rows % (size * world_size):
        near = max(1, rows // (size * world_size)) * size * world_size * seq_len
        raise ConfigError(
            f"tokens_per_step ({config.tokens_per_step}) is {rows} sequences of {seq_len}, no whole number of micro-batches of {size}; "
            f"use {near}, another micro_batch_size, or micro_batch_size=auto"
        )
    return rows, size


def bytes_per_row(loss_fn: LossFunction, model: nn.Module, row: Sequence[Tensor]) -> int:
    """What the forward pass of one sequence keeps for its backward pass, weights left out; each storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_fn(model, row)
    return sum(found.values())


def free_bytes(device: torch.device) -> int:
    """Memory that activations may take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_OF_FREE_MEMORY * (torch.cuda.mem_get_info(device)[0] + unused))
    return int(_OF_FREE_RAM * _free_ram())


def _free_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return 4 * 2**30
