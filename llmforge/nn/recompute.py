"""Layers that forget what they computed on the way and compute it again in the backward pass: time for memory."""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from llmforge.nn.host import to_device, to_host

# "none": a block keeps its activations for the backward pass. "blocks": only its input (Chen et al. 2016, arXiv:1604.06174).
# "offload": its input too leaves the device, and waits in host memory.
Checkpointing = Literal["none", "blocks", "offload"]


def checkpointed(block: nn.Module, x: Tensor, *args: Any, mode: Checkpointing) -> Tensor:
    """`block(x, *args)`, which for a backward pass keeps what `mode` says; gradients are the same to the bit, dropout included.

    Only x is kept for this call alone; args are for what all blocks share. In evaluation, and where no gradients are recorded, there
    is nothing to keep, and the mode makes no difference.
    """
    if mode == "none" or not (block.training and torch.is_grad_enabled()):
        out: Tensor = block(x, *args)
        return out
    # What the block itself saves never gets to these hooks: checkpoint has its own inside.
    with saved_tensors_hooks(_pack, _unpack) if mode == "offload" else nullcontext():
        out = checkpoint(lambda x: block(x, *args), x, use_reentrant=False)
        return out


def _pack(x: Tensor) -> tuple[Tensor, torch.device]:
    return to_host(x), x.device


def _unpack(packed: tuple[Tensor, torch.device]) -> Tensor:
    return to_device(*packed)


def in_tiles(layer: nn.Module, x: Tensor, tiles: int) -> Tensor:
    """`layer(x)` of a layer that looks at each token for itself, in slices of the tokens: what is wide within it exists for one slice.

    Args:
        layer: (N, C) -> (N, C), N tokens of any rows.
        x: (..., C).
        tiles: how many slices; 1 = all tokens at once. More cost time: in the backward pass each slice is computed again.
    Returns:
        (..., C)
    """
    if tiles == 1:
        out: Tensor = layer(x)
        return out
    parts = x.flatten(0, -2).chunk(tiles)
    if torch.is_grad_enabled():
        found = [checkpoint(layer, part, use_reentrant=False) for part in parts]
    else:
        found = [layer(part) for part in parts]
    return torch.cat(found).view(*x.shape[:-1], -1)
