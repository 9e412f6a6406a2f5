"""Muon: matrices of hidden layers are moved by orthogonal matrices, everything else by AdamW; one optimizer outside.

A matrix's momentum is replaced by the nearest orthogonal matrix, so that each of its directions moves equally far, however small its
gradient is. Beside torch.optim.Muon, with which it agrees: equal shapes are computed together, a weight that holds several matrices
(q, k and v in one) is taken apart, and the arithmetic is float32 where bfloat16 has no units (most CPUs, where it is over ten times
slower).

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from llmforge.errors import CheckpointError, ConfigError

MOMENTUM = 0.95
# Of the iteration x <- a x + (b x x' + c (x x')^2) x: steep at 0, so that small directions grow fast.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_BATCH_VALUES = 1 << 25  # of matrices that are computed together: 64 MB of bfloat16


class Muon(torch.optim.Optimizer):
    """Muon for the matrices, torch's AdamW for the other parameters.

    param_groups: the matrices', then AdamW's as they are given. `lr` of each group counts for itself; lr_factor, of the first, says
    how many times the other groups' it is meant to be, for who sets it by a schedule. State: momentum_buffer of a matrix; AdamW's.

    Args:
        matrices: each 2-D parameter, and how many matrices of equal size it holds, one below the other.
        others: parameter groups for AdamW, with weight_decay, betas and what else it takes.
        lr: of AdamW.
        muon_lr: of the matrices, per step and at a width of at most the height; taller ones move sqrt(rows / columns) times as far.
        weight_decay: of the matrices, per step and times muon_lr.
    Raises:
        ConfigError: no matrix, or one that has not two dimensions, or cannot be divided.
    """

    def __init__(
        self,
        matrices: Mapping[Tensor, int],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float = 0.02,
        weight_decay: float = 0.1,
    ) -> None:
        if not matrices:
            raise ConfigError(
                "optimizer 'muon' is for the matrices of hidden layers, and no nn.Linear but an output projection is trained here; "
                "use 'adamw'"
            )
        for p, parts in matrices.items():
            if p.ndim != 2 or p.shape[0] % parts:
                raise ConfigError(f"a parameter of the shape {tuple(p.shape)} does not hold {parts} matrices")
        group = {
            "params": list(matrices),
            "parts": list(matrices.values()),
            "lr": muon_lr,
            "lr_factor": muon_lr / lr,
            "weight_decay": weight_decay,
            "momentum": MOMENTUM,
        }
        others = [{"lr": lr, **other} for other in others]
        super().__init__([group, *others], {})
        self._share()

    def _share(self) -> None:
        """AdamW works on these very groups and this very state, which `load_state_dict` makes anew."""
        self._adamw = torch.optim.AdamW(self.param_groups[1:]) if len(self.param_groups) > 1 else None
        if self._adamw is not None:
            self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group for AdamW."""
        super().add_param_group(param_group)
        if hasattr(self, "_adamw"):
            self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, exactly.

        Raises:
            CheckpointError: it is that of another optimizer.
            ValueError: groups of another number or size.
        """
        groups = state_dict["param_groups"]
        states = [state_dict["state"].get(key, {"momentum_buffer": None}) for key in groups[0]["params"]]
        if any(set(state) != {"momentum_buffer"} for state in states):
            raise CheckpointError(
                "the state is not one of Muon; resume with the optimizer that the run was started with"
            )
        super().load_state_dict(state_dict)

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
        self._step_matrices(self.param_groups[0])
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        alike: dict[tuple[int, torch.Size], list[Tensor]] = {}
        for p, parts in zip(group["params"], group["parts"], strict=True):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            p.mul_(1 - lr * group["weight_decay"])
            alike.setdefault((parts, p.shape), []).append(p)
        for (parts, shape), members in alike.items():
            size = max(1, _BATCH_VALUES // shape.numel())
            for first in range(0, len(members), size):
                params = members[first : first + size]
                # Nesterov's: the momentum as it will be.
                updates = [_whole(torch.lerp(p.grad, self.state[p]["momentum_buffer"], momentum)) for p in params]  # type: ignore[arg-type]
                matrices = rearrange(updates, "n (parts rows) columns -> (n parts) rows columns", parts=parts)
                changes = rearrange(
                    orthogonalized(matrices), "(n parts) rows columns -> n (parts rows) columns", parts=parts
                )
                scale = max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
                for p, change in zip(params, changes.to(params[0].dtype), strict=True):
                    p.add_(_as(change, p), alpha=-lr * scale)


def orthogonalized(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """U V' of each matrix U S V', nearly: what is left of S is between 0.7 and 1.2, by five Newton-Schulz iterations.

    Args:
        x: (n, rows, columns); a matrix of zeros stays one.
        dtype: of the arithmetic; None = bfloat16 on a GPU that has it, else float32.
    Returns:
        (n, rows, columns) in that type.
    """
    if dtype is None:
        native = x.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float32
    a, b, c = _COEFFICIENTS
    x = x.to(dtype)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(model: nn.Module) -> dict[Tensor, int]:
    """The parameters that Muon takes: weight -> how many matrices it holds.

    Those of the linear layers but for `lm_head` and what shares its weight with an embedding. A module
    whose weights are otherwise says so in `matrices_of`, by the names of its layers or parameters: {"c_attn": 3, "classifier": 0}.
    """
    found: dict[Tensor, int] = {}
    excluded: set[Tensor] = set()
    for module in model.modules():
        attention = {"in_proj_weight": 3} if isinstance(module, nn.MultiheadAttention) else {}
        said: Mapping[str, int] = getattr(module, "matrices_of", attention)
        found |= {p: said[name] for name, p in module.named_parameters(recurse=False) if said.get(name)}
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear):
                excluded.update(
                    child.parameters(recurse=False) if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) else ()
                )
            elif parts := said.get(name, 0 if name == "lm_head" else 1):
                found[child.weight] = parts
            else:
                excluded.add(child.weight)
    return {p: parts for p, parts in found.items() if p.requires_grad and p not in excluded}


def _whole(update: Any) -> Tensor:
    """All rows, where each process holds some of them."""
    whole: Tensor = update.full_tensor() if hasattr(update, "full_tensor") else update
    return whole


def _as(change: Tensor, p: Any) -> Tensor:
    """The rows of it that this process holds of the parameter."""
    if not hasattr(p, "full_tensor"):
        return change
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    return DTensor.from_local(change, p.device_mesh, everywhere, run_check=False).redistribute(placements=p.placements)
