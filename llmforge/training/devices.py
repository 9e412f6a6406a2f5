"""Where a run computes, and in which numbers."""

import torch

from llmforge.errors import ConfigError


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None = CUDA where there is one, else MPS, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(device.type, False):
        raise ConfigError(
            f"device {name!r} is not available here: this torch ({torch.__version__}) sees no such device"
        )
    return device


def arithmetic_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of `TrainConfig.dtype`; None = bfloat16 or else float16 on CUDA, float32 elsewhere."""
    if name is not None:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
