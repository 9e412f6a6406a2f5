"""The optimizer: AdamW with weight decay on matrices only, or Muon beside it."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llmforge.errors import ConfigError
from llmforge.training.config import TrainConfig
from llmforge.training.muon import Muon, hidden_matrices
from llmforge.training.mup import mup_lr_factors, with_lr_factors


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; what has two or more dimensions decays, norms and biases do not (GPT-3, nanoGPT).

    With optimizer="muon" the matrices of hidden layers are Muon's; see `hidden_matrices`.

    One fused kernel does the update where torch has one for the device.

    Raises:
        ConfigError: nothing is trainable, or the optimizer asked for does not exist on this machine.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError("the model has no trainable parameter; apply_lora_ it, or call requires_grad_(True)")
    fused = all(p.device.type in ("cuda", "cpu", "mps") and p.is_floating_point() for p in params)
    matrices = hidden_matrices(model) if config.optimizer == "muon" else {}
    groups = [
        {"params": [p for p in params if p.ndim >= 2 and p not in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.mup_base_width is not None:
        groups = with_lr_factors(groups, mup_lr_factors(model, config.mup_base_width))
    if config.optimizer == "muon":
        others = [{**group, "betas": config.betas, "fused": fused} for group in groups]
        return Muon(matrices, others, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay)
    if config.optimizer != "adamw":
        adamw = _adamw_8bit(config.optimizer, on_cuda=all(p.is_cuda for p in params))
        return adamw([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def load_optimizer_state_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`; a run that began without bitsandbytes goes on with it, too.

    Raises:
        ValueError, CheckpointError: the state is another optimizer's.
    """
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from llmforge.training.adamw8bit import with_maps

        state = with_maps(state)
    optimizer.load_state_dict(state)


def _adamw_8bit(name: str, *, on_cuda: bool) -> Callable[..., torch.optim.Optimizer]:
    if on_cuda and find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim.adamw import AdamW8bit as KernelAdamW8bit
        from bitsandbytes.optim.adamw import PagedAdamW8bit

        kernels: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw8bit": KernelAdamW8bit,
            "paged_adamw8bit": PagedAdamW8bit,
        }
        return kernels[name]
    if name == "paged_adamw8bit":
        raise ConfigError(
            "optimizer 'paged_adamw8bit' needs an NVIDIA GPU and bitsandbytes (pip install 'llmforge[cuda]'); 'adamw8bit' runs anywhere"
        )
    from llmforge.training.adamw8bit import AdamW8bit

    return AdamW8bit
