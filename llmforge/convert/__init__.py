"""Our models to other people's files, and back."""

from llmforge.convert.load import load, open_model
from llmforge.convert.published import ExportReport
from llmforge.convert.to_gguf import export_gguf
from llmforge.convert.to_hf import export_hf

__all__ = ["ExportReport", "export_gguf", "export_hf", "load", "open_model"]
