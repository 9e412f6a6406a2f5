"""Model families: one family, one file, read top to bottom."""

from llmforge.models.base import LanguageModel, ModelConfig
from llmforge.models.bitnet import BitNet, BitNetConfig
from llmforge.models.gpt import GPT, GPTConfig
from llmforge.models.llama import Llama, LlamaConfig

# How files name a family -> what builds it.
FAMILIES: dict[str, tuple[type[ModelConfig], type[LanguageModel]]] = {
    GPTConfig.FAMILY: (GPTConfig, GPT),
    LlamaConfig.FAMILY: (LlamaConfig, Llama),
    BitNetConfig.FAMILY: (BitNetConfig, BitNet),
}

__all__ = [
    "FAMILIES",
    "GPT",
    "BitNet",
    "BitNetConfig",
    "GPTConfig",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
]
