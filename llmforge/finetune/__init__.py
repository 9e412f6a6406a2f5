"""Adapters on any model, and the frozen base under them in four bits."""

from llmforge.finetune.adapter_files import (
    Adapter,
    AdapterFiles,
    is_adapter_folder,
    load_adapter_,
    read_adapter,
    save_adapter,
)
from llmforge.finetune.lora import (
    LoRAConfig,
    adapter_names,
    apply_lora_,
    disabled_adapters,
    lora_config,
    merge_lora_,
    scale_adapter_,
    set_adapter_,
    unload_lora_,
)
from llmforge.finetune.quantize import NF4Config, quantize_

__all__ = [
    "Adapter",
    "AdapterFiles",
    "LoRAConfig",
    "NF4Config",
    "adapter_names",
    "apply_lora_",
    "disabled_adapters",
    "is_adapter_folder",
    "load_adapter_",
    "lora_config",
    "merge_lora_",
    "quantize_",
    "read_adapter",
    "save_adapter",
    "scale_adapter_",
    "set_adapter_",
    "unload_lora_",
]
