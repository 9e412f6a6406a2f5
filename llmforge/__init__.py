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
    "InstructionDataset": "llmforge.data",
    "LLMForgeError": "llmforge.errors",
    "Llama": "llmforge.models",
    "LlamaConfig": "llmforge.models",
    "LoRAConfig": "llmforge.finetune",
    "NF4Config": "llmforge.finetune",
    "SentencePieceTokenizer": "llmforge.tokenizers",
    "TiktokenTokenizer": "llmforge.tokenizers",
    "TokenDataset": "llmforge.data",
    "TrainConfig": "llmforge.training",
    "Trainer": "llmforge.training",
    "WordPieceTokenizer": "llmforge.tokenizers",
    "apply_lora_": "llmforge.finetune",
    "collect_imatrix": "llmforge.convert",
    "compare_models": "llmforge.deploy",
    "deploy_gguf": "llmforge.deploy",
    "export_adapter_gguf": "llmforge.convert",
    "export_gguf": "llmforge.convert",
    "export_hf": "llmforge.convert",
    "generate": "llmforge.generation",
    "generate_batch": "llmforge.generation",
    "generate_text": "llmforge.generation",
    "load": "llmforge.convert",
    "load_adapter_": "llmforge.finetune",
    "load_tokenizer": "llmforge.tokenizers",
    "merge_lora_": "llmforge.finetune",
    "pack_": "llmforge.nn",
    "quantization_report": "llmforge.deploy",
    "quantize_": "llmforge.finetune",
    "quantize_aware_": "llmforge.convert",
    "quantize_gguf": "llmforge.convert",
    "read_imatrix": "llmforge.convert",
    "save_adapter": "llmforge.finetune",
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
    "InstructionDataset",
    "LLMForgeError",
    "Llama",
    "LlamaConfig",
    "LoRAConfig",
    "NF4Config",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "TokenDataset",
    "TrainConfig",
    "Trainer",
    "WordPieceTokenizer",
    "__version__",
    "apply_lora_",
    "collect_imatrix",
    "compare_models",
    "deploy_gguf",
    "export_adapter_gguf",
    "export_gguf",
    "export_hf",
    "generate",
    "generate_batch",
    "generate_text",
    "load",
    "load_adapter_",
    "load_tokenizer",
    "merge_lora_",
    "pack_",
    "quantization_report",
    "quantize_",
    "quantize_aware_",
    "quantize_gguf",
    "read_imatrix",
    "save_adapter",
    "stream_text",
    "verify_gguf",
    "write_imatrix",
]

if TYPE_CHECKING:
    from llmforge.convert import (
        collect_imatrix,
        export_adapter_gguf,
        export_gguf,
        export_hf,
        load,
        quantize_aware_,
        quantize_gguf,
        read_imatrix,
        write_imatrix,
    )
    from llmforge.data import (
        InstructionDataset,
        TokenDataset,
    )
    from llmforge.deploy import (
        compare_models,
        deploy_gguf,
        quantization_report,
        verify_gguf,
    )
    from llmforge.errors import (
        CheckpointError,
        ConfigError,
        ConvertError,
        DataError,
        LLMForgeError,
    )
    from llmforge.finetune import (
        LoRAConfig,
        NF4Config,
        apply_lora_,
        load_adapter_,
        merge_lora_,
        quantize_,
        save_adapter,
    )
    from llmforge.generation import (
        generate,
        generate_batch,
        generate_text,
        stream_text,
    )
    from llmforge.models import (
        GPT,
        BitNet,
        BitNetConfig,
        GPTConfig,
        Llama,
        LlamaConfig,
    )
    from llmforge.nn import (
        pack_,
    )
    from llmforge.tokenizers import (
        BPETokenizer,
        CharTokenizer,
        SentencePieceTokenizer,
        TiktokenTokenizer,
        WordPieceTokenizer,
        load_tokenizer,
    )
    from llmforge.training import (
        TrainConfig,
        Trainer,
    )


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'llmforge' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
