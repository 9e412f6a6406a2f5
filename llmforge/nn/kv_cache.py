"""Keys and values of the tokens already read, so that generating one token costs one token."""

from torch import Tensor


class KVCache:
    """Preallocated keys and values for every layer of one batch of sequences.

    A layer calls `update` with the keys and values of the new tokens and attends over what it gets back; after the last layer
    the model calls `advance` once. Storage is allocated at a layer's first `update`, in the dtype and on the device found there.

    Args:
        max_tokens: how many tokens fit; the model's context length as a rule.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values of one layer.

        Args:
            layer: index of the layer.
            k, v: (B, H, T, D), the T new tokens.
        Returns:
            keys and values of all S = length + T tokens, (B, H, S, D): views into the storage.
        Raises:
            ValueError: the new tokens do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"the KV cache holds {self.max_tokens} tokens, {end} are needed; start a new cache")
        if layer not in self._layers:
            B, H, _, D = k.shape
            self._layers[layer] = (k.new_empty(B, H, self.max_tokens, D), v.new_empty(B, H, self.max_tokens, D))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished forward pass as read."""
        self.length += tokens
