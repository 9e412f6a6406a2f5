"""What a model family owes to the exporters and readers. A family fills one subclass; `gpt2.py` shows each row at work."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from llmforge.errors import ConvertError
from llmforge.models import LanguageModel, ModelConfig

Tensors = dict[str, Tensor]  # by our names, each shared tensor once


class Family(ABC):
    """Names, settings and layout of one family in other people's files."""

    model_class: ClassVar[type[LanguageModel]]
    config_class: ClassVar[type[ModelConfig]]
    layers_field: ClassVar[str]  # of the config

    hf_model_type: ClassVar[str]
    hf_architecture: ClassVar[str]
    hf_fields: ClassVar[Mapping[str, tuple[str, Any]]]  # Hugging Face's key -> our field, and what an absent key means
    hf_fixed: ClassVar[Mapping[str, Any]]  # keys that can have one value only
    hf_ignored: ClassVar[str]  # keys that do not change what is computed, separated by blanks

    gguf_arch: ClassVar[str]
    gguf_float32: ClassVar[frozenset[str]]  # GGUF names of matrices that are not encoded otherwise

    def complete(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors]:
        """Config and tensors of the same model with everything that the family's files must have."""
        return config, tensors

    def append_eos_row(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors]:
        """One more token, which the model never chooses; all other logits stay."""
        raise ConvertError("the model has no row for <|endoftext|>; train it with a tokenizer that reserves one")

    def hf_layout(self, name: str, tensor: Tensor) -> Tensor:
        """Our layout -> Hugging Face's, and back, under our name."""
        return tensor

    def own_name(self, hf_name: str) -> str | None:
        """Hugging Face's name -> ours; None for what is dropped on purpose."""
        return hf_name

    def config_to_hf(self, config: Any) -> dict[str, Any]:
        """Keys beside those of the tables."""
        return {}

    def config_from_hf(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a config.json in the form that the tables expect."""
        return values

    def for_gguf(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors, list[str]]:
        """Config and tensors as llama.cpp needs them, and what the user should know about it."""
        return config, tensors, []

    @abstractmethod
    def gguf_name(self, name: str) -> str:
        """Our name -> GGUF's."""

    @abstractmethod
    def gguf_metadata(self, config: Any) -> dict[str, Any]:
        """Keys below `<arch>.`"""
