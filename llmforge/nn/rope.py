"""Rotary position embedding: a query or key is turned by an angle that grows with its position.

Half-split layout, as Hugging Face has it: the pair (i, i + D/2) of a head turns together. (Meta's own files and llama.cpp's arch
llama turn neighbours, (2i, 2i + 1); `llmforge.convert` permutes rows where files need that.)

Source: Su et al. 2021, arXiv:2104.09864.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmforge.config import Config
from llmforge.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Config):
    """How the angles of a pretrained model are stretched to a longer context.

    linear: all by `factor` (arXiv:2306.15595). llama3: slow pairs by `factor`, fast ones not at all, and those between in
    proportion, as Llama 3.1 was trained. yarn: the same idea, with the borders given in turns over the original context, and
    attention logits that are sharpened a little (arXiv:2309.00071).

    Raises:
        ConfigError: a value out of range.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float  # new context / original context
    low_freq_factor: float = 1.0  # llama3: pairs of fewer turns than this over the original context are slow
    high_freq_factor: float = 4.0  # llama3: pairs of more turns are fast
    original_max_position_embeddings: int = 8192  # llama3, yarn: the context before stretching
    beta_fast: float = 32.0  # yarn: pairs of more turns are fast
    beta_slow: float = 1.0  # yarn: pairs of fewer turns are slow
    attention_factor: float | None = None  # yarn: of cos and sin; None = 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ConfigError(f"factor ({self.factor}) of rope_scaling must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ConfigError(
                f"low_freq_factor ({self.low_freq_factor}) must be above 0 and below high_freq_factor ({self.high_freq_factor})"
            )
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ConfigError(f"beta_slow ({self.beta_slow}) must be above 0 and below beta_fast ({self.beta_fast})")
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"original_max_position_embeddings ({self.original_max_position_embeddings}) must be at least 1"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ConfigError(
                f"attention_factor ({self.attention_factor}) must be above 0; leave it out for 0.1 ln(factor) + 1"
            )

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied with."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def stretch(self, head_dim: int, theta: float) -> Tensor:
        """By how much each pair of a head turns slower: (D/2,) float32, between 1 and `factor`."""
        if self.rope_type == "linear":
            return torch.full((head_dim // 2,), self.factor, device="cpu")
        frequencies = rope_frequencies(head_dim, theta)
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            # The pair that makes `turns` turns over the original context; the ramp runs over indices of pairs, rounded outwards.
            def pair(turns: float) -> float:
                return (
                    head_dim
                    * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
                    / (2 * math.log(theta))
                )

            first = max(math.floor(pair(self.beta_fast)), 0)
            last = min(math.ceil(pair(self.beta_slow)), head_dim - 1)
            keep = 1 - (torch.arange(head_dim // 2, device="cpu") - first) / max(last - first, 0.001)
        keep = keep.clamp(0, 1)  # 1: as trained, 0: stretched by the whole factor
        return 1 / (keep + (1 - keep) / self.factor)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each pair: theta ** (-2i / D) for i = 0 .. D/2 - 1, slowed down by the scaling.

    Returns:
        (D/2,) float32
    >>> rope_frequencies(4, 10_000.0)
    tensor([1.0000, 0.0100])
    """
    # On the CPU whatever the default device is: a model that is built on "meta" must not lose them.
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (pairs / head_dim)
    return frequencies if scaling is None else frequencies / scaling.stretch(head_dim, theta)


def rope_angles(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair.

    Args:
        positions: (T,) or (B, T) int64.
        frequencies: (D/2,) float32.
        scale: multiplies both (yarn).
    Returns:
        two tensors (..., T, D/2), float32.
    """
    angles = positions[..., None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head of every token by the angles of its position.

    Args:
        x: (B, H, T, D).
        cos, sin: (T, D/2) or (B, T, D/2), from `rope_angles`.
    Returns:
        (B, H, T, D), dtype of x.
    """
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D/2)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
