"""Our models to other people's files, and back."""

from llmforge.convert.gguf import export_gguf
from llmforge.convert.hf import export_hf, load_hf
from llmforge.convert.load import load
from llmforge.convert.nanogpt import load_nanogpt
from llmforge.convert.published import ExportReport

__all__ = ["ExportReport", "export_gguf", "export_hf", "load", "load_hf", "load_nanogpt"]
