"""LoRA on any model: which layers get low-rank matrices beside their frozen ones, and how they are trained, switched and merged."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmforge.config import Config
from llmforge.errors import ConfigError, shown

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Shape and training of an adapter: y = W x + scale * B A dropout(x), W frozen, A (r, in), B (out, r).

    Fields are PEFT's. Sources: LoRA, Hu et al. 2021, arXiv:2106.09685; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732; DoRA, Liu et al.
    2024, arXiv:2402.09353.

    Raises:
        ConfigError: a rank below 1, an alpha that is not above 0, a dropout outside [0, 1), or no target.
    """

    r: int = 16  # rank; a rank above the smaller side of a matrix only costs memory
    lora_alpha: float = 32  # numerator of the scale, so that a rank can change and the learning rate stay
    lora_dropout: float = 0.0  # of the adapter's input, in training
    # "all-linear": every linear layer but the output projection; names: the last parts of layers' names, or whole ones; any other
    # text: a regular expression that whole names match.
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False  # scale lora_alpha / sqrt(r) in place of lora_alpha / r, for ranks of 64 and more
    use_dora: bool = False  # train the length of each row of W + scale * B A by itself; slower, better at small ranks
    modules_to_save: tuple[
        str, ...
    ] = ()  # modules trained whole, by their last parts or whole names: "embed_tokens", "lm_head"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r ({self.r}) must be at least 1; 8 to 64 are common")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"lora_alpha ({self.lora_alpha}) must be above 0; r or 2 * r are common")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout ({self.lora_dropout}) must be at least 0 and below 1; 0.05 is common")
        if not self.target_modules or (isinstance(self.target_modules, tuple) and not all(self.target_modules)):
            raise ConfigError(
                f"target_modules ({shown(self.target_modules)}) must name layers, like ('q_proj', 'v_proj'), or be {ALL_LINEAR!r}"
            )
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            compiled(self.target_modules)
        if not all(self.modules_to_save):
            raise ConfigError(f"modules_to_save ({shown(self.modules_to_save)}) must name modules, like ('lm_head',)")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def targets(name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether a layer's name is meant, as PEFT reads it; "all-linear" means every one here.

    >>> targets("model.layers.0.self_attn.q_proj", ["q_proj"]), targets("model.layers.0.self_attn.q_proj", "q_proj")
    (True, False)
    """
    if isinstance(target_modules, str):
        return target_modules == ALL_LINEAR or compiled(target_modules).fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression for names of layers.

    Raises:
        ConfigError: it is none, or too long to be meant.
    """
    if len(pattern) > 1000:
        raise ConfigError(f"the pattern {shown(pattern)} has {len(pattern):,} characters; at most 1,000 are allowed")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"the pattern {shown(pattern)} is no regular expression: {error}") from error
