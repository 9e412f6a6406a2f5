"""What every model family owes to the rest of the package."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from llmforge.config import Config
from llmforge.nn import KVCache, Linear4bit, PackedBitLinear


class ModelConfig(Config):
    """A family's configuration; `FAMILY` is the name under which files know it."""

    FAMILY: ClassVar[str]


class LanguageModel(nn.Module, ABC):
    """A decoder: token ids in, logits out, always (B, T) -> (B, T, V).

    A family sets `config`, `context_length` and `lm_head` (the output projection), and implements `features`.
    """

    config: ModelConfig
    context_length: int  # most tokens that one forward pass can hold
    lm_head: nn.Linear

    @abstractmethod
    def features(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Hidden states before the output projection: (B, T) int64 -> (B, T, C).

        With a cache, `idx` holds only the tokens that the cache has not read yet, the cache says which positions they have and what
        they may see, and it advances by T.
        """

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        logits: Tensor = self.lm_head(self.features(idx))
        return logits

    def num_params(self) -> int:
        """Number of trainable, frozen and packed weights, shared ones counted once."""
        packed = sum(m.num_weights for m in self.modules() if isinstance(m, (Linear4bit, PackedBitLinear)))
        return packed + sum(p.numel() for p in self.parameters())

    @abstractmethod
    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Floating-point operations of training on one token of a sequence of `seq_len` tokens, forward and backward."""
