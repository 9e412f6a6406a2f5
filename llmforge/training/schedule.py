"""Learning rate, weight decay and strength of the rounding, as pure functions of the step."""

import math

from llmforge.training.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (0-based): linear warm-up, then the schedule down to min_lr at max_steps.

    cosine: half a period (nanoGPT's; Loshchilov and Hutter 2017, arXiv:1608.03983). linear: straight down. constant: lr.
    wsd: lr, then straight down over the last decay_fraction of the steps (warm-up, stable, decay; arXiv:2404.06395). two-stage: straight
    down, and from half of the steps on by second_stage_fraction of that line (BitNet's training tips).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    min_lr = config.lr / 10 if config.min_lr is None else config.min_lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - config.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, config.max_steps - start)))  # 0 .. 1
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "two-stage" and 2 * step >= config.max_steps:
        min_lr, remaining = min(min_lr, config.second_stage_fraction * config.lr), 1 - progress
        return min_lr + remaining * (config.second_stage_fraction * config.lr - min_lr)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return min_lr + remaining * (config.lr - min_lr)


def weight_decay_applies(step: int, config: TrainConfig) -> bool:
    """Whether weights decay in step `step` (0-based)."""
    return step < round(config.decay_weights_fraction * config.max_steps)


def quantization_strength(step: int, config: TrainConfig) -> float:
    """How much of its rounding a BitLinear applies in step `step` (0-based): 0, a linear warm-up, 1."""
    steps = step - round(config.quantize_after_fraction * config.max_steps)
    if steps < 0:
        return 0.0
    return 1.0 if steps >= config.quantize_warmup_steps else (steps + 1) / (config.quantize_warmup_steps + 1)
