"""From a GGUF file to the programs that run it: does llama.cpp compute the same as the model, and what did rounding cost?"""

from llmforge.deploy.quality import QualityReport, quantization_report
from llmforge.deploy.verify import VerifyReport, verify_gguf

__all__ = ["QualityReport", "VerifyReport", "quantization_report", "verify_gguf"]
