"""How the ternary layers of a run are doing: what their codes do while they train, and warnings when that is not what it should be."""

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.nn import BitLinear, bit_linears

# What healthy runs stay away from. A third of the codes is 0 as a rule. At the end of a small model's 500 steps 6 % of them change per
# 100 steps if the learning rate has fallen, and 21 % if it has not.
_FEW_ZEROS, _MANY_ZEROS = 0.1, 0.6
_MANY_FLIPS = 0.15
_MANY_LOST = 0.8


class TernaryDiagnosis:
    """Observes the BitLinears of a model, now and then.

    Args:
        model: with BitLinear layers.
        max_steps: of the run: what is normal depends on how far it is.
    """

    def __init__(self, model: nn.Module, *, max_steps: int) -> None:
        self.model, self.max_steps = model, max_steps
        self._codes: dict[str, Tensor] = {}
        self._step = 0
        self._most_flips = 0.0  # of a call: the layers' median
        self._warned: set[str] = set()
        for name, layer in bit_linears(model).items():
            if layer.weight.dtype != torch.float32:
                self._warn(
                    "dtype",
                    f"the latent weights of {name} are {layer.weight.dtype}, in which small updates are lost and the codes freeze; keep "
                    "them in float32 (TrainConfig.dtype sets the type of the arithmetic alone)",
                )

    def observe(self, step: int, run: Callable[[], object]) -> dict[str, dict[str, float]]:
        """Per layer: `zeros`, share of weights that are 0; `flips`, share of codes that changed per 100 steps since the last call, where
        there was one; `lost` and `clipped`, shares of activations that are rounded to 0 and to the largest code.

        Args:
            step: steps done.
            run: passes a batch through the model, for the activations.
        """
        layers = bit_linears(self.model)
        found = _activations(layers, run)
        for name, layer in layers.items():
            codes = layer.codes()[0].flatten()
            found[name]["zeros"] = (codes == 0).float().mean().item()
            if name in self._codes and step > self._step:
                changed = (codes != self._codes[name]).float().mean().item()
                found[name]["flips"] = changed * 100 / (step - self._step)
            self._codes[name] = codes
        self._step = step
        self._judge(step, found)
        return found

    def _judge(self, step: int, found: dict[str, dict[str, float]]) -> None:
        progress = step / self.max_steps
        for name, layer in found.items():
            if not _FEW_ZEROS <= layer["zeros"] <= _MANY_ZEROS:
                self._warn(
                    "zeros",
                    f"{layer['zeros']:.0%} of the codes of {name} are 0 (about a third is usual): its weights have outliers, or hardly "
                    "differ in size; look at the learning rate and the weight decay",
                )
            if layer.get("lost", 0.0) > _MANY_LOST:
                self._warn(
                    "lost",
                    f"{layer['lost']:.0%} of the activations that enter {name} are rounded to 0: a few large ones set the scale; "
                    "act_quant='group' or sub_norm=True helps",
                )
        flips = [layer["flips"] for layer in found.values() if "flips" in layer]
        median = statistics.median(flips) if flips else 0.0
        self._most_flips = max(self._most_flips, median)
        # They fall with the learning rate, to nearly none at the end.
        if progress >= 0.9 and median > max(_MANY_FLIPS, self._most_flips / 2):
            self._warn(
                "flips",
                f"{median:.0%} of the codes still change per 100 steps at step {step} of {self.max_steps}, so the weights do not settle; let "
                "the learning rate fall to 0 (recipe='bitnet'), or lower lr",
            )
        if flips and progress < 0.9 and max(flips) == 0:
            self._warn(
                "frozen",
                f"no code has changed in the steps up to {step}: the learning rate is too low for ternary weights (they want several times "
                "that of floats), or the latent weights are not float32",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)


def _activations(layers: dict[str, BitLinear], run: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Shares of the activation codes that are 0, and the largest, on what `run` passes through the layers."""
    found: dict[str, dict[str, float]] = {name: {} for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: BitLinear, args: tuple[Any, ...]) -> None:
            if layer.act_quant == "none":
                return
            codes = layer.input_codes(args[0])[0]
            found[name] = {
                "lost": (codes == 0).float().mean().item(),
                "clipped": (codes.abs() == 127).float().mean().item(),
            }

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found
