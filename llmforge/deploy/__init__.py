"""From a GGUF file to the programs that run it; so far, whether llama.cpp computes the same as the model."""

from llmforge.deploy.verify import VerifyReport, verify_gguf

__all__ = ["VerifyReport", "verify_gguf"]
