"""What every model family owes to the rest of the package."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from llmforge.config import Config
from llmforge.errors import ConfigError, DataError
from llmforge.nn import Checkpointing, Documents, FrozenCodes, HostEmbedding, KVCache, PackedBitLinear


class ModelConfig(Config):
    """A family's configuration; `FAMILY` is the name under which files know it."""

    FAMILY: ClassVar[str]


class LanguageModel(nn.Module, ABC):
    """A decoder: token ids in, logits out, always (B, T) -> (B, T, V).

    A family sets `config`, `context_length`, `lm_head` (the output projection), `embedding_name` and `final_norm_name`, and implements
    `features`.
    Its blocks have `mlp_tiles`, and what runs them has `checkpointing`.
    """

    config: ModelConfig
    context_length: int  # most tokens that one forward pass can hold
    lm_head: nn.Linear
    embedding_name: ClassVar[str]  # path of the token embedding
    final_norm_name: ClassVar[str]  # path of the norm before lm_head

    @abstractmethod
    def features(self, idx: Tensor, kv_cache: KVCache | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Hidden states before the output projection: (B, T) int64 -> (B, T, C).

        With a cache, `idx` holds only the tokens that the cache has not read yet, the cache says which positions they have and what
        they may see, and it advances by T. With positions, (B, T) int64, each row holds several documents: positions begin again
        with 0 where a document does, and a token sees its own document alone. All of them are as if each was read for itself.

        Raises:
            ConfigError: more tokens than the context has, in a document where there are positions; a cache and positions.
            DataError: positions that do not count up from 0.
        """

    def _documents(
        self, idx: Tensor, kv_cache: KVCache | None, positions: Tensor | None, context: str
    ) -> Documents | None:
        """What is packed into the rows of `idx`; checks that what `features` is given fits the field `context` of the config."""
        if positions is not None and kv_cache is not None:
            raise ConfigError("a KV cache holds one text per row and says its positions: pass kv_cache or positions")
        if positions is not None and positions.shape != idx.shape:
            raise DataError(f"positions have the shape {tuple(positions.shape)}, but idx {tuple(idx.shape)}")
        documents = None if positions is None else Documents(positions)
        if documents is not None:
            tokens, what = max(documents.lengths), " of a document"
        else:
            tokens, what = idx.shape[1] + (kv_cache.length if kv_cache is not None else 0), ""
        if tokens > self.context_length:
            raise ConfigError(
                f"{tokens} tokens{what} do not fit in {context} ({self.context_length}); pass the last {self.context_length} of them"
            )
        return documents

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        logits: Tensor = self.lm_head(self.features(idx))
        return logits

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """How much of a forward pass in training waits for the backward pass.

        Args:
            mode: "none": all activations. "blocks": the input of each block, B*T*C values; the rest is computed again, which makes a
                step a third longer. "offload": these too wait in host memory, and the device holds one block's activations.
                Gradients are the same to the bit, where the device computes the same twice.
        Raises:
            ConfigError: another mode.
        """
        if mode not in ("none", "blocks", "offload"):
            raise ConfigError(f"activation checkpointing {mode!r} must be 'none', 'blocks' or 'offload'")
        self._set("checkpointing", mode)

    def set_mlp_tiles(self, tiles: int) -> None:
        """Compute feed-forward layers in so many slices of the tokens, so that the wide activations of a long sequence never exist at
        once; 1 = all tokens together. Backward passes compute each slice again.

        Raises:
            ConfigError: tiles below 1.
        """
        if tiles < 1:
            raise ConfigError(f"mlp_tiles ({tiles}) must be at least 1, which is all tokens together")
        self._set("mlp_tiles", tiles)

    def _set(self, name: str, value: object) -> None:
        for module in self.modules():
            if name in vars(module):
                setattr(module, name, value)

    def num_params(self) -> int:
        """Number of trainable, frozen, packed and offloaded weights, shared ones counted once."""
        no_parameters = (FrozenCodes, HostEmbedding, PackedBitLinear)
        others = sum(m.num_weights for m in self.modules() if isinstance(m, no_parameters))
        return others + sum(p.numel() for p in self.parameters())

    @abstractmethod
    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Floating-point operations of training on one token of a sequence of `seq_len` tokens, forward and backward."""
