"""llmforge: from your own text, or an open base model, to a file that runs on your desktop.

Importing this package does nothing but define names; torch is imported with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_NAMES = {
    "BPETokenizer": "llmforge.tokenizers",
    "BitNet": "llmforge.models",
    "BitNetConfig": "llmforge.models",
    "CharTokenizer": "llmforge.tokenizers",
    "CheckpointError": "llmforge.errors",
    "ConfigError": "llmforge.errors",
    "ConvertError": "llmforge.errors",
    "DataError": "llmforge.errors",
    "GPT": "llmforge.models",
    "GPTConfig": "llmforge.models",
    "LLMForgeError": "llmforge.errors",
    "Llama": "llmforge.models",
    "LlamaConfig": "llmforge.models",
    "SentencePieceTokenizer": "llmforge.tokenizers",
    "TiktokenTokenizer": "llmforge.tokenizers",
    "TokenDataset": "llmforge.data",
    "TrainConfig": "llmforge.training",
    "Trainer": "llmforge.training",
    "WordPieceTokenizer": "llmforge.tokenizers",
    "collect_imatrix": "llmforge.convert",
    "export_gguf": "llmforge.convert",
    "export_hf": "llmforge.convert",
    "generate": "llmforge.generation",
    "generate_batch": "llmforge.generation",
    "generate_text": "llmforge.generation",
    "load": "llmforge.convert",
    "load_tokenizer": "llmforge.tokenizers",
    "pack_": "llmforge.nn",
    "quantization_report": "llmforge.deploy",
    "quantize_aware_": "llmforge.convert",
    "quantize_gguf": "llmforge.convert",
    "read_imatrix": "llmforge.convert",
    "stream_text": "llmforge.generation",
    "verify_gguf": "llmforge.deploy",
    "write_imatrix": "llmforge.convert",
}

__all__ = [
    "GPT",
    "BPETokenizer",
    "BitNet",
    "BitNetConfig",
    "CharTokenizer",
    "CheckpointError",
    "ConfigError",
    "ConvertError",
    "DataError",
    "GPTConfig",
    "LLMForgeError",
    "Llama",
    "LlamaConfig",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "TokenDataset",
    "TrainConfig",
    "Trainer",
    "WordPieceTokenizer",
    "__version__",
    "collect_imatrix",
    "export_gguf",
    "export_hf",
    "generate",
    "generate_batch",
    "generate_text",
    "load",
    "load_tokenizer",
    "pack_",
    "quantization_report",
    "quantize_aware_",
    "quantize_gguf",
    "read_imatrix",
    "stream_text",
    "verify_gguf",
    "write_imatrix",
]

if TYPE_CHECKING:
    from llmforge.convert import (
        collect_imatrix,
        export_gguf,
        export_hf,
        load,
        quantize_aware_,
        quantize_gguf,
        read_imatrix,
        write_imatrix,
    )
    from llmforge.data import TokenDataset
    from llmforge.deploy import quantization_report, verify_gguf
    from llmforge.errors import CheckpointError, ConfigError, ConvertError, DataError, LLMForgeError
    from llmforge.generation import generate, generate_batch, generate_text, stream_text
    from llmforge.models import GPT, BitNet, BitNetConfig, GPTConfig, Llama, LlamaConfig
    from llmforge.nn import pack_
    from llmforge.tokenizers import (
        BPETokenizer,
        CharTokenizer,
        SentencePieceTokenizer,
        TiktokenTokenizer,
        WordPieceTokenizer,
        load_tokenizer,
    )
    from llmforge.training import TrainConfig, Trainer


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'llmforge' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
