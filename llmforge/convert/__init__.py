"""Our models to other people's files, and back."""

from llmforge.convert.adapter_gguf import export_adapter_gguf
from llmforge.convert.imatrix import Importance, collect_imatrix, read_imatrix, write_imatrix
from llmforge.convert.load import load, open_model
from llmforge.convert.published import ExportReport
from llmforge.convert.quantize_aware import quantize_aware_
from llmforge.convert.quantize_gguf import quantize_gguf
from llmforge.convert.to_gguf import export_gguf
from llmforge.convert.to_hf import export_hf

__all__ = [
    "ExportReport",
    "Importance",
    "collect_imatrix",
    "export_adapter_gguf",
    "export_gguf",
    "export_hf",
    "load",
    "open_model",
    "quantize_aware_",
    "quantize_gguf",
    "read_imatrix",
    "write_imatrix",
]
