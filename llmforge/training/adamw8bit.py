"""AdamW whose state takes two bytes per parameter in place of eight, in plain torch.

Both moments are stored as dynamic 8-bit codes with a float32 scale per 256 values, and are float32 while a step is computed; so is
the step. The layout is that of bitsandbytes' AdamW8bit, whose state_dict is read here.

Source: Dettmers et al. 2022, arXiv:2110.02861; Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupled weight decay).
"""

import copy
import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from llmforge.errors import CheckpointError, ConfigError
from llmforge.quant.dynamic8 import BLOCK_SIZE, dequantize_dynamic, dynamic_map, quantize_dynamic, zero_code

MIN_8BIT_SIZE = 4096  # parameters with fewer values keep float32 moments, as in bitsandbytes: there is nothing to save
_CHUNK = 1 << 22  # values that are float32 at a time
_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts the 8-bit part of a state


class AdamW8bit(torch.optim.Optimizer):
    """torch.optim.AdamW with 8-bit moments.

    State of a parameter: step; state1 and state2, uint8 in its shape; absmax1 and absmax2, float32, the scales of its blocks of 256.
    Below MIN_8BIT_SIZE values state1 and state2 are float32, and the step is exactly AdamW's.

    A second moment that is not 0 does not become 0: it may lie below the smallest code, 3e-7 of the largest in its block, and a step
    divides by its root. (bitsandbytes rounds it to 0, and such a parameter's next step is up to 1 / sqrt(1 - beta2) times too long.)

    Args:
        params, lr, betas, eps, weight_decay: as of torch.optim.AdamW.
    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if not lr >= 0.0:
            raise ConfigError(f"lr ({lr}) must be 0 or more")
        if not eps > 0.0:
            raise ConfigError(f"eps ({eps}) must be above 0")
        if not weight_decay >= 0.0:
            raise ConfigError(f"weight_decay ({weight_decay}) must be 0 or more")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas ({betas}) must be two numbers, each at least 0 and below 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; with a closure, which computes loss and gradients first, its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse or p.is_complex():
            raise ConfigError("AdamW8bit takes dense gradients of real parameters; use torch.optim.AdamW for others")
        state = self.state[p]
        if not state:
            self._initialize(p, state)
        state["step"] += 1
        # Views, unless a tensor's memory has gaps.
        values, gradients = p.reshape(-1), grad.reshape(-1)
        first, second = state["state1"].view(-1), state["state2"].view(-1)
        for start in range(0, p.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            blocks = slice(start // BLOCK_SIZE, (start + _CHUNK) // BLOCK_SIZE)
            if "absmax1" not in state:
                exp_avg, exp_avg_sq = first[part], second[part]
            else:
                exp_avg = dequantize_dynamic(first[part], state["absmax1"][blocks], signed=True)
                exp_avg_sq = dequantize_dynamic(second[part], state["absmax2"][blocks], signed=False)
            updated = values[part].float()  # the parameter itself, where it is float32
            _adamw(updated, gradients[part].float(), exp_avg, exp_avg_sq, state["step"], group)
            if p.dtype != torch.float32:
                values[part] = updated
            if "absmax1" in state:
                first[part], state["absmax1"][blocks] = quantize_dynamic(exp_avg, signed=True)
                codes, state["absmax2"][blocks] = quantize_dynamic(exp_avg_sq, signed=False)
                second[part] = _never_zero(codes, exp_avg_sq)
        if not p.is_contiguous():
            p.copy_(values.view_as(p))

    @staticmethod
    def _initialize(p: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        if p.numel() < MIN_8BIT_SIZE:
            for number in "12":
                state[f"state{number}"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
            return
        for number, signed in (("1", True), ("2", False)):
            state[f"state{number}"] = torch.full(p.shape, zero_code(signed=signed), dtype=torch.uint8, device=p.device)
            state[f"absmax{number}"] = torch.zeros(-(-p.numel() // BLOCK_SIZE), device=p.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, of this class or bitsandbytes' AdamW8bit, exactly.

        Raises:
            CheckpointError: it is that of another optimizer, or of other parameters.
            ValueError: groups of another number or size.
        """
        states = {key: _unwrapped(state) for key, state in state_dict["state"].items()}
        # torch casts what it loads to the parameter's dtype, codes and all; so it gets the groups, and the state is put back here.
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, parameters, strict=True):
            if key not in states:
                continue
            expected: dict[str, Any] = {}
            self._initialize(p, expected)
            found = states[key]
            fits = found.keys() == expected.keys() and all(
                not isinstance(value, Tensor)
                or (
                    isinstance(found[name], Tensor)
                    and found[name].shape == value.shape
                    and found[name].dtype == value.dtype
                )
                for name, value in expected.items()
            )
            if not fits:
                raise CheckpointError(
                    f"the state of parameter {key} {_described(found)} is not one of AdamW8bit for shape {tuple(p.shape)}; "
                    "resume with the optimizer that the run was started with"
                )
            self.state[p] = {
                name: value.to(p.device, copy=True) if isinstance(value, Tensor) else copy.copy(value)
                for name, value in found.items()
            }


def with_maps(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state of this class as bitsandbytes' optimizers want it: beside its codes they keep what the codes mean."""
    maps = {"qmap1": dynamic_map(signed=True), "qmap2": dynamic_map(signed=False)}
    states = {key: {**maps, **state} if "absmax1" in state else state for key, state in state_dict["state"].items()}
    return {**state_dict, "state": states}


def _adamw(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict[str, Any]) -> None:
    """One step on float32 values, all but `grad` in place, in the order of operations of torch.optim.AdamW."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def _never_zero(codes: Tensor, values: Tensor) -> Tensor:
    """Unsigned codes, of values above 0 at least the first above 0."""
    return torch.where((codes == 0) & (values > 0), 1, codes)


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """A state of bitsandbytes without its wrapping, and without its maps, which are ours."""
    state = {**state, **state.get(_WRAPPED, {})}
    return {name: value for name, value in state.items() if name not in (_WRAPPED, "qmap1", "qmap2")}


def _described(state: dict[str, Any]) -> str:
    parts = (
        f"{name} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else str(name)
        for name, value in state.items()
    )
    return f"({', '.join(parts)})"
