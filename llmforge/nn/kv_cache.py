"""Keys and values of the tokens already read, so that generating one token costs one token."""

from typing import Any

import torch
from torch import Tensor

from llmforge.nn.attention import attention_mask, visible


class KVCache:
    """Preallocated keys and values for every layer of one batch of sequences.

    A model asks for `positions` and `mask` of the new tokens, each layer calls `update` with their keys and values and attends over
    what it gets back, and after the last layer the model calls `advance` once. Storage is allocated at a layer's first `update`, in
    the dtype and on the device found there.

    Args:
        max_tokens: how many tokens fit.
        padding: (B,) int64, for prompts of different length: how many tokens at the beginning of each row stand for nothing.
    """

    def __init__(self, max_tokens: int, *, padding: Tensor | None = None) -> None:
        self.max_tokens = max_tokens
        self.padding = padding
        self.length = 0  # tokens read
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Position of each of the next T tokens in its text: (T,) int64, or (B, T) with padding, where padding counts as 0."""
        places = torch.arange(self.length, self.length + T, device=device)
        return places if self.padding is None else (places - self.padding[:, None]).clamp(min=0)

    def mask(self, T: int, device: torch.device, *, window: int | None = None) -> Tensor | None:
        """For `causal_attention` of the next T tokens; None where they see all of the past."""
        S = self.length + T
        if self.padding is None and (window is None or window >= S):
            return None
        return attention_mask(T, S, window=window, padding=self.padding, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values of one layer.

        Args:
            layer: index of the layer.
            k, v: (B, K, T, D), the T new tokens.
        Returns:
            keys and values of all S = length + T tokens, (B, K, S, D): views into the storage.
        Raises:
            ValueError: the new tokens do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"the KV cache holds {self.max_tokens} tokens, {end} are needed; start a new cache")
        if layer not in self._layers:
            B, K, _, D = k.shape
            # Zeros, not whatever is there: a masked NaN is still NaN.
            self._layers[layer] = (k.new_zeros(B, K, self.max_tokens, D), v.new_zeros(B, K, self.max_tokens, D))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished forward pass as read."""
        self.length += tokens


class StaticKVCache(KVCache):
    """A filled KVCache for reading one token at a time in tensors whose shapes never change.

    So one compiled step, or one CUDA graph, serves every token. The price is attention over `max_tokens` from the beginning.
    It shares the storage of the cache that it is made from.
    """

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        super().__init__(cache.max_tokens, padding=cache.padding)
        self._layers = cache._layers
        self._place = torch.tensor(
            [cache.length], device=device
        )  # of the next token; `length` stays 0, this is what counts
        # CUDA graphs may write to these from step to step.
        mark: Any = torch._dynamo.mark_static_address
        for tensor in (self._place, *(tensor for pair in self._layers.values() for tensor in pair)):
            mark(tensor)

    def positions(self, T: int, device: torch.device) -> Tensor:
        return self._place if self.padding is None else self._place - self.padding[:, None]

    def mask(self, T: int, device: torch.device, *, window: int | None = None) -> Tensor:
        places = torch.arange(self.max_tokens, device=device)
        return visible(self._place[:, None], places[None, :], window=window, padding=self.padding)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[layer]
        keys.index_copy_(2, self._place, k)
        values.index_copy_(2, self._place, v)
        return keys, values

    def advance(self, tokens: int) -> None:
        self._place += tokens
