"""From a GGUF file to the programs that run it: does it compute the same, what did rounding and tuning change, and where does it go?"""

from llmforge.deploy.compare import AnswerLoss, ComparedPrompt, Comparison, compare_models
from llmforge.deploy.place import DeployReport, deploy_gguf
from llmforge.deploy.quality import QualityReport, quantization_report
from llmforge.deploy.verify import VerifyReport, verify_gguf

__all__ = [
    "AnswerLoss",
    "ComparedPrompt",
    "Comparison",
    "DeployReport",
    "QualityReport",
    "VerifyReport",
    "compare_models",
    "deploy_gguf",
    "quantization_report",
    "verify_gguf",
]
