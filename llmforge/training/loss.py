"""The loss is a sum and a count, so that a step's mean does not depend on how the step was split."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # target positions with this id carry no loss

# (model, micro-batch) -> (sum of the losses, number of targets), both scalar tensors.
LossFunction = Callable[[nn.Module, Sequence[Tensor]], tuple[Tensor, Tensor]]


def next_token_loss(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the next token.

    Args:
        model: maps (B, T) ids to (B, T, V) logits.
        batch: idx and targets, both (B, T) int64; targets of -100 do not count.
    Returns:
        the sum over all targets, float32 scalar; how many they are, int64 scalar.
    """
    idx, targets = batch[0], batch[1]
    logits = model(idx)
    loss_sum = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (targets != IGNORED).sum()
