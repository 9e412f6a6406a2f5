"""A learning rate that stays where it is while the model gets wider: the maximal update parametrisation (muP).

AdamW moves each weight by about the learning rate, whatever its gradient. A layer adds up C such moves, so in a model of twice the width a
step changes the output of a layer twice as much, and the best learning rate falls. With muP models of all widths C take that of one, the
width of which is base_width. With r = base_width / C:

    matrices in the blocks      learning rate * r, initial weights of a standard deviation that falls with sqrt(C)
    output projection           learning rate * r, initial weights * r
      tied to the embedding     the final norm in its place: logits come out r times as large, and the embedding learns as fast as ever
    embeddings, gains, biases   as they are

Muon (optimizer="muon") moves an output equally far at any width: its matrices keep muon_lr, and the rest of the table is as above.

The model runs as before, so it exports like any other. A wider model has more heads of the same width D, and a feed-forward layer of the
same ratio to C. Weight decay falls with a matrix's learning rate, as AdamW multiplies them.

Source: Yang et al. 2022, arXiv:2203.03466, table 3. What of it holds here: benchmarks/lr_transfer.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.errors import ConfigError
from llmforge.nn import bit_linears

_GPT2_WIDTH = 768  # for which 0.02, with which our families begin, is the standard deviation


def mup_init_(model: nn.Module, base_width: int) -> nn.Module:
    """Scale the initial weights of a new model as muP asks, once, before it trains with `TrainConfig.mup_base_width`.

    Matrices that begin with GPT-2's standard deviation of 0.02 get 0.02 * sqrt(768 / C), so that their outputs are as large at any width.

    Raises:
        ConfigError: as `mup_lr_factors`.
    """
    factors = mup_lr_factors(model, base_width)
    output = set(_output_parameters(model))
    width = _lm_head(model).in_features
    with torch.no_grad():
        for parameter, r in factors.items():
            parameter.mul_(r if parameter in output else math.sqrt(_GPT2_WIDTH / width))
    return model


def mup_lr_factors(model: nn.Module, base_width: int) -> dict[Tensor, float]:
    """What the learning rate of a parameter is to be multiplied by; those that are not listed, by 1.

    Args:
        model: one with `lm_head`, and with `embedding_name` and `final_norm_name` where that is tied, as llmforge's families have them.
        base_width: the width whose learning rate is meant.
    Raises:
        ConfigError: a base width below 1, ternary layers, or a model that does not say where its output is.
    """
    if base_width < 1:
        raise ConfigError(f"mup_base_width ({base_width}) must be at least 1; null is the same rate for all weights")
    if bit_linears(model):
        raise ConfigError(
            "mup_base_width is for float weights: a ternary layer has a scale of its own; leave it at null"
        )
    lm_head = _lm_head(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not lm_head]
    r = base_width / lm_head.in_features
    parameters: list[Tensor] = [*(linear.weight for linear in linears), *_output_parameters(model)]
    return dict.fromkeys(parameters, r)


def with_lr_factors(groups: Sequence[Mapping[str, Any]], factors: Mapping[Tensor, float]) -> list[dict[str, Any]]:
    """An optimizer's groups, split where parameters have other factors; each new one has its `lr_factor`, which the trainer reads."""
    split: list[dict[str, Any]] = []
    for group in groups:
        of_group = [factors.get(p, 1.0) for p in group["params"]]
        for factor in dict.fromkeys(of_group):
            params = [p for p, own in zip(group["params"], of_group, strict=True) if own == factor]
            split.append({**group, "params": params, "lr_factor": group.get("lr_factor", 1.0) * factor})
    return split


def _lm_head(model: nn.Module) -> nn.Linear:
    lm_head = getattr(model, "lm_head", None)
    if not isinstance(lm_head, nn.Linear):
        raise ConfigError(
            f"mup_base_width needs a model with an lm_head, and {type(model).__name__} has none; leave it at null"
        )
    return lm_head


def _output_parameters(model: nn.Module) -> list[Tensor]:
    """What makes the logits of the final hidden states as large as they are."""
    lm_head = _lm_head(model)
    tied = [name for name, p in model.named_parameters() if p is lm_head.weight and not name.startswith("lm_head.")]
    if not tied:
        return [lm_head.weight]
    final_norm = getattr(model, "final_norm_name", None)
    if final_norm is None:
        raise ConfigError(
            f"mup_base_width scales the last norm where lm_head is tied to the embedding; say its path as {type(model).__name__}.final_norm_name"
        )
    return list(model.get_submodule(final_norm).parameters())
