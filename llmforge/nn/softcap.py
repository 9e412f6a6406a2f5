"""An output projection whose logits stay between two bounds."""

import torch
from torch import Tensor, nn


class SoftCappedLinear(nn.Linear):
    """nn.Linear, then `cap * tanh(y / cap)`: small values stay, none is further from 0 than the cap.

    A layer of its own, so that whatever calls the output projection alone (a loss in chunks, generation) gets the capped logits.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
        cap: the bound, above 0.
    Source: Gemma team 2024, arXiv:2408.00118, section 2 (final_logit_softcapping 30).
    >>> layer = SoftCappedLinear(1, 1, bias=False, cap=2.0)
    >>> _ = nn.init.ones_(layer.weight)
    >>> layer(torch.tensor([[0.01], [100.0]])).flatten()
    tensor([0.0100, 2.0000], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        cap: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.cap = cap

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        return self.cap * torch.tanh(super().forward(input) / self.cap)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cap={self.cap:g}"
