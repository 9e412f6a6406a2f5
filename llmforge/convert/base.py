"""What a model family owes to the exporters and readers. A family fills one subclass; `gpt2.py` shows each row at work."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmforge.errors import ConvertError
from llmforge.formats.lazy import LazyTensor
from llmforge.models import LanguageModel, ModelConfig

Tensors = dict[str, LazyTensor]  # by our names, each shared tensor once


class Family(ABC):
    """Names, settings and layout of one family in other people's files. Several families may share one of our models."""

    model_class: ClassVar[type[LanguageModel]]
    config_class: ClassVar[type[ModelConfig]]
    layers_field: ClassVar[str]  # of the config

    hf_model_type: ClassVar[str]
    hf_architecture: ClassVar[str]
    hf_fields: ClassVar[Mapping[str, tuple[str, Any]]]  # Hugging Face's key -> our field, and what an absent key means
    hf_fixed: ClassVar[Mapping[str, Any]]  # keys that can have one value only
    hf_quantized: ClassVar[bool] = False  # config.json may have a quantization_config, which `from_hf` looks at
    hf_ignored: ClassVar[str]  # keys that do not change what is computed, separated by blanks
    implied: ClassVar[
        Mapping[str, Any]
    ] = {}  # values of our fields that all files of the family have without saying so

    gguf_arch: ClassVar[str]
    gguf_names: ClassVar[Mapping[str, str]]  # our module -> GGUF's; of those in layers, what follows the layer's number
    layers_prefix: ClassVar[str]  # of our names, before the layer's number
    gguf_fields: ClassVar[
        Mapping[str, tuple[str, Any]]
    ]  # GGUF's key below `<arch>.` -> our field, and what absence means

    def expresses(self, config: Any) -> bool:
        """Whether the family has all that this config of `config_class` says."""
        return True

    def refusal(self, config: Any) -> str | None:
        """Which settings keep a config out of all model types of its class, and the way out; None = nothing can be said."""
        return None

    def reads_hf(self, values: Mapping[str, Any]) -> bool:
        """Whether a config.json describes a model of the family."""
        return values.get("model_type") == self.hf_model_type

    def reads_gguf(self, arch: object, types: Mapping[str, str], tensors: Tensors) -> bool:
        """Whether a GGUF file holds one, by its architecture, the types of its tensors, and these, under GGUF's names."""
        return arch == self.gguf_arch

    def blueprint(self, config: Any) -> LanguageModel:
        """The model of a config on the meta device: shapes without values."""
        with torch.device("meta"), _WithoutValues():
            return self.model_class(config)

    def complete(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors]:
        """Config and tensors of the same model with everything that the family's files must have."""
        return config, tensors

    def append_eos_row(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors]:
        """One more token, which the model never chooses; all other logits stay."""
        raise ConvertError("the model has no row for <|endoftext|>; train it with a tokenizer that reserves one")

    def hf_layout(self, name: str, tensor: Tensor) -> Tensor:
        """Our layout -> Hugging Face's, and back, under our name."""
        return tensor

    def hf_keeps_rows(self, name: str) -> bool:
        """Whether each row of a tensor, by our name, is a row of Hugging Face's: so that it can be read by rows."""
        return True

    def own_name(self, hf_name: str) -> str | None:
        """Hugging Face's name -> ours; None for what is dropped on purpose."""
        return hf_name

    def config_to_hf(self, config: Any) -> dict[str, Any]:
        """Keys beside those of the tables."""
        return {}

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a config.json in the form that the tables expect."""
        return values

    def to_hf(self, config: Any, tensors: Tensors, ternary: str) -> tuple[Any, Tensors, dict[str, Any], list[str]]:
        """Config and tensors as transformers needs them, more keys of config.json, and what the user should know about it.

        Args:
            ternary: the form of ternary weights, where there are any; see `export_hf`.
        """
        return config, tensors, {}, []

    def from_hf(self, values: Mapping[str, Any], tensors: Tensors) -> Tensors:
        """The reverse, of the tensors: `values` of config.json."""
        return tensors

    def to_gguf(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors, list[str]]:
        """Config and tensors as llama.cpp needs them, still under our names, and what the user should know about it."""
        return config, tensors, []

    @abstractmethod
    def from_gguf(
        self, values: dict[str, Any], metadata: dict[str, Any], tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        """The reverse.

        Args:
            values: of our fields, as the table reads them.
            metadata: the other keys below `<arch>.`; those that are read here are taken out.
            tensors: in llama.cpp's layout, under our names.
        """

    def gguf_name(self, name: str) -> str:
        """Our name -> GGUF's."""
        return _renamed(name, self.layers_prefix, "blk.", self.gguf_names)

    def own_gguf_name(self, gguf_name: str) -> str:
        """GGUF's name -> ours. Raises KeyError for a name that is not the family's."""
        return _renamed(
            gguf_name, "blk.", self.layers_prefix, {theirs: ours for ours, theirs in self.gguf_names.items()}
        )

    def gguf_types(self, config: Any, file_type: str) -> dict[str, str]:
        """Types of tensors beside those of the mixture, by GGUF's names."""
        return {}

    def gguf_notes(self, config: Any, file_type: str) -> list[str]:
        """What such a file computes otherwise than the model."""
        return []

    def gguf_metadata(self, config: Any) -> dict[str, Any]:
        """Keys below `<arch>.` beside those of the table."""
        return {}


def _renamed(name: str, prefix: str, new_prefix: str, names: Mapping[str, str]) -> str:
    """The name of a tensor with the name of its module exchanged: model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    module, _, kind = name.rpartition(".")
    if not module.startswith(prefix):
        return f"{names[module]}.{kind}"
    layer, _, part = module.removeprefix(prefix).partition(".")
    return f"{new_prefix}{layer}.{names[part]}.{kind}"


class _WithoutValues(TorchFunctionMode):
    """Skips the initialisation of values that a tensor on "meta" does not have: it would load torch's compiler, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
