"""LoRA: a frozen linear layer and the low-rank matrices that are trained beside it; and whole modules trained as copies.

    y = W x + b + scale * B A dropout(x)                       A (r, in), B (out, r)
    y = m / |W + scale B A| * (W + scale B A) x + b            DoRA, |.| the length of each row

Sources: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from llmforge.errors import ConfigError
from llmforge.nn.bitlinear import BitLinear
from llmforge.nn.rounded import RoundedLinear

_BLOCK_WEIGHTS = 2**22  # of a matrix in float32 at a time: 16 MB


class LowRank(nn.Module):
    """One adapter of one layer: A (r, in), B (out, r) and, with DoRA, magnitude (out); float32, whatever the base is.

    A starts as nn.Linear does, B with zeros: at first the layer computes what its base computes.

    Args:
        lora_alpha, use_rslora: the scale of B A is lora_alpha / r, or lora_alpha / sqrt(r).
        dropout: of the input, in training.
        magnitude: (out), of DoRA; the lengths of the rows of the base's matrix.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        lora_alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        magnitude: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device=device))
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.float())
        if not self.A.is_meta:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.lora_alpha, self.dropout, self.use_rslora = lora_alpha, dropout, use_rslora
        self.factor = 1.0  # on top of the scale, see `scale_adapter_`; no part of a file

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.factor * self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}, dora={self.magnitude is not None}"


class LoRALinear(nn.Module):
    """A linear layer, and adapters by name of which some are active.

    For the backward pass of a frozen base it keeps the input, r values per token, and with dropout a byte per input; with DoRA also
    one tensor of the output's size. The adapters compute in their own dtype, or that of autocast; the result has the dtype of what
    the base gives.

    Args:
        base: nn.Linear, a subclass, or `Linear4bit`: in_features, out_features, bias and, where there is no weight, dequantize().
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()  # names that are added, in this order

    def add(
        self,
        name: str,
        *,
        r: int,
        lora_alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> LowRank:
        """A new adapter, which is not active yet; on the device of the base.

        Raises:
            ConfigError: there is one of that name.
        """
        if name in self.adapters:
            raise ConfigError(f"the layer has an adapter {name!r} already; give the new one another name")
        adapter = LowRank(
            self.in_features,
            self.out_features,
            r,
            lora_alpha=lora_alpha,
            dropout=dropout,
            use_rslora=use_rslora,
            magnitude=row_lengths(dense_weight(self.base)) if use_dora else None,
            device=next(iter([*self.base.parameters(), *self.base.buffers()])).device,
        )
        self.adapters[name] = adapter.train(self.training)
        return adapter

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        y: Tensor = self.base(input)
        for name in self.active:
            adapter = self.adapter(name)
            dropout = adapter.dropout if self.training else 0.0
            if adapter.magnitude is None:
                y = _add_low_rank(y, input, adapter, dropout)
            else:
                y = self._dora(y, input, adapter, dropout)
        return y

    def _dora(self, y: Tensor, x: Tensor, adapter: LowRank, dropout: float) -> Tensor:
        assert adapter.magnitude is not None
        lengths = row_lengths(dense_weight(self.base), adapter.A, adapter.B, adapter.scale)  # constant: section 4.3
        stretch = adapter.magnitude / lengths
        bias = self.bias
        if not dropout:
            inner = y if bias is None else y - bias.to(y.dtype)  # W x
            inner = stretch * _add_low_rank(inner, x, adapter, 0.0)
            inner = inner if bias is None else inner + bias
            return inner.to(y.dtype)
        # What dropout leaves of x goes through W a second time: the base's own part of the result has no dropout.
        x = F.dropout(x, dropout)
        inner = self.base(x)
        inner = inner if bias is None else inner - bias.to(y.dtype)
        y = (y - inner + stretch * _add_low_rank(inner, x, adapter, 0.0)).to(y.dtype)
        return y

    def adapter(self, name: str) -> LowRank:
        """The adapter of that name."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix with the active adapters in it, (out_features, in_features).

        Each sum is rounded to the base's dtype once (float32 over 4-bit codes), as peft does it, and the last to `dtype`.

        Raises:
            ConfigError: no matrix computes what the layer computes, since the base is no plain product.
        """
        check_mergeable(self.base)
        weight = dense_weight(self.base)
        for name in self.active:
            adapter = self.adapter(name)
            weight = merged(weight, adapter.A, adapter.B, adapter.scale, adapter.magnitude)
        return weight.to(dtype or weight.dtype)

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        """That of the base, which adapters leave alone."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        return f"active={', '.join(self.active) or 'none'}"


class SavedModule(nn.Module):
    """A module, and copies by name that are trained as a whole (`modules_to_save`); without an active one it is the module itself.

    The copies are float32, since small updates are lost in 16 bits, and compute in the dtype of the module: an embedding is cast
    after the look-up, other parameters before they are used.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    def add(self, name: str) -> nn.Module:
        """A new copy with the module's values, which is not active yet.

        Raises:
            ConfigError: there is one of that name.
        """
        if name in self.copies:
            raise ConfigError(f"the module has a copy {name!r} already; give the new one another name")
        new = copy.deepcopy(self.base).float()
        self.copies[name] = new
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active copy makes of the arguments."""
        if self.active is None:
            return self.base(*args, **kwargs)
        active, dtype = self.copies[self.active], next(self.base.parameters()).dtype
        if next(active.parameters()).dtype is dtype:
            return active(*args, **kwargs)
        if isinstance(active, nn.Embedding):
            return active(*args, **kwargs).to(dtype)
        parameters = {name: parameter.to(dtype) for name, parameter in active.named_parameters()}
        return functional_call(active, parameters, args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A module of its own with the active values, in the dtypes of the module."""
        if self.active is None:
            return self.base
        merged = copy.deepcopy(self.copies[self.active])
        dtypes = {name: parameter.dtype for name, parameter in self.base.named_parameters()}
        for name, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        return merged.requires_grad_(False)

    @property
    def in_features(self) -> Any:
        return self.base.in_features

    @property
    def out_features(self) -> Any:
        """Of a linear layer; a loss in chunks asks an output projection for it."""
        return self.base.out_features

    def extra_repr(self) -> str:
        return f"active={self.active or 'none'}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """A model's layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """A model's modules that are trained as copies, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SavedModule)}


def dense_weight(layer: nn.Module) -> Tensor:
    """The matrix that a linear layer multiplies with, (out_features, in_features); decoded, or the parameter itself without gradient.

    Raises:
        ConfigError: the layer has neither weight nor dequantize().
    """
    dequantize = getattr(layer, "dequantize", None)
    if dequantize is not None:
        decoded: Tensor = dequantize()
        return decoded
    if isinstance(layer, BitLinear):
        return layer.quantized_weight().detach()
    if isinstance(layer, RoundedLinear):
        return layer.rounded_weight().detach()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ConfigError(f"{type(layer).__name__} has no matrix: neither a weight (out, in) nor dequantize()")
    return weight.detach()


def check_mergeable(layer: nn.Module) -> None:
    """Refuse a layer that is more than a matrix and a bias.

    Raises:
        ConfigError: with the reason.
    """
    if isinstance(layer, BitLinear):
        if layer.act_quant != "none" or layer.rms_norm is not None:
            raise ConfigError(
                "a BitLinear rounds its input too, and with an adapter merged it would be ternary no more: keep the adapter beside it "
                "(save_adapter)"
            )
    elif isinstance(layer, nn.Linear) and type(layer).forward not in (nn.Linear.forward, RoundedLinear.forward):
        raise ConfigError(
            f"{type(layer).__name__} computes something of its own in forward(), which a merged nn.Linear would not: keep the adapter "
            "beside it (save_adapter)"
        )


@torch.no_grad()
def merged(weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """A matrix with an adapter in it; the sum is computed in float32 and rounded once, to the dtype of `weight`, as peft does it.

    Rows depend on rows alone: a block of `weight`, with those of B and magnitude, gives that block of the result.

    Args:
        weight: (out, in), any float dtype.
        A, B, magnitude: (r, in), (out, r) and, with DoRA, (out), float32.
    >>> merged(torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), 0.5)
    tensor([[1.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    # peft adds adapters in 16 bits as float32 too: it casts them when it loads them.
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta: Tensor = (B.float() @ A.float()).mul_(scale).to(wide)
    if magnitude is None:
        total = delta.add_(weight)  # in place: memory costs more than the sums
    else:
        total = weight.to(wide) + delta  # laid out as `weight`, which decides in which order a length is summed
        total = (magnitude.float() / torch.linalg.norm(total, dim=1))[:, None] * total
    return total.to(weight.dtype)


@torch.no_grad()
def row_lengths(weight: Tensor, A: Tensor | None = None, B: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Euclidean lengths of the rows of weight + scale * B A: (out), float32. Some megabytes of rows exist at a time."""
    step = max(1, _BLOCK_WEIGHTS // max(1, weight.shape[1]))
    lengths = []
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        if A is not None and B is not None:
            rows = rows + scale * (B[start : start + step].float() @ A.float())
        lengths.append(torch.linalg.norm(rows, dim=1))
    return torch.cat(lengths)


def check_together(adapters: Sequence[LowRank]) -> None:
    """Refuse adapters that cannot be added.

    Raises:
        ConfigError: several, of which one is a DoRA: it scales the whole layer, so that the result would depend on their order.
    """
    if len(adapters) > 1 and any(adapter.magnitude is not None for adapter in adapters):
        raise ConfigError("a DoRA adapter scales the whole layer and cannot be added to others; activate it alone")


def _add_low_rank(y: Tensor, x: Tensor, adapter: LowRank, dropout: float) -> Tensor:
    out: Tensor = _AddLowRank.apply(y, x, adapter.A, adapter.B, adapter.scale, dropout)  # type: ignore[no-untyped-call]
    return out


class _AddLowRank(torch.autograd.Function):
    """y + scale * B A dropout(x). Kept are x as it came and A x; what is cast or dropped is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        device = x.device.type
        dtype = A.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        x2 = _dropped(x, kept, dropout, dtype).reshape(-1, x.shape[-1])
        hidden = x2 @ A.to(dtype).T  # (N, r)
        ctx.save_for_backward(x, A, B, hidden, kept)
        ctx.scale, ctx.dropout, ctx.dtype = scale, dropout, dtype
        y2 = y.reshape(-1, y.shape[-1])
        if y.dtype is dtype:
            return torch.addmm(y2, hidden, B.to(dtype).T, alpha=scale).view(y.shape)
        return (y2 + (hidden @ B.to(dtype).T).mul_(scale)).to(y.dtype).view(y.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, A, B, hidden, kept = ctx.saved_tensors
        dtype: torch.dtype = ctx.dtype
        grad2 = grad.reshape(-1, grad.shape[-1]).to(dtype)  # (N, out)
        of_hidden = (grad2 @ B.to(dtype)).mul_(ctx.scale)  # (N, r)
        of_x = of_A = of_B = None
        if ctx.needs_input_grad[1]:
            of_x = _dropped((of_hidden @ A.to(dtype)).view(x.shape), kept, ctx.dropout, x.dtype)
        if ctx.needs_input_grad[2]:
            x2 = _dropped(x, kept, ctx.dropout, dtype).reshape(-1, x.shape[-1])
            of_A = (of_hidden.T @ x2).to(A.dtype)
        if ctx.needs_input_grad[3]:
            of_B = (grad2.T @ hidden).mul_(ctx.scale).to(B.dtype)
        return grad if ctx.needs_input_grad[0] else None, of_x, of_A, of_B, None, None


def _dropped(x: Tensor, kept: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if kept is None else x * kept * (1 / (1 - dropout))
