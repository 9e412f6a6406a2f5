"""The training loop. It knows no model family: any module with `forward(idx) -> logits` will do."""

from llmforge.training.checkpoint import (
    ModelFiles,
    WholeModel,
    find_checkpoint,
    list_checkpoints,
    validation_loss,
    verify_manifest,
)
from llmforge.training.config import TrainConfig
from llmforge.training.devices import arithmetic_dtype, pick_device
from llmforge.training.loss import (
    IGNORED,
    LossFunction,
    chunked_cross_entropy,
    chunked_next_token_loss,
    next_token_loss,
)
from llmforge.training.metrics import EvalMetrics, StepMetrics, TrainResult, read_log
from llmforge.training.optim import build_optimizer
from llmforge.training.schedule import learning_rate
from llmforge.training.trainer import Dataset, Trainer

__all__ = [
    "IGNORED",
    "Dataset",
    "EvalMetrics",
    "LossFunction",
    "ModelFiles",
    "StepMetrics",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WholeModel",
    "arithmetic_dtype",
    "build_optimizer",
    "chunked_cross_entropy",
    "chunked_next_token_loss",
    "find_checkpoint",
    "learning_rate",
    "list_checkpoints",
    "next_token_loss",
    "pick_device",
    "read_log",
    "validation_loss",
    "verify_manifest",
]
