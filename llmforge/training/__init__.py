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
from llmforge.training.mup import mup_init_
from llmforge.training.optim import build_optimizer
from llmforge.training.scaling_law import ScalingLaw, fit_scaling_law
from llmforge.training.schedule import learning_rate
from llmforge.training.sweeps import SweepPoint, SweepResult, SweepRun, sweep
from llmforge.training.trainer import Dataset, Trainer

__all__ = [
    "IGNORED",
    "Dataset",
    "EvalMetrics",
    "LossFunction",
    "ModelFiles",
    "ScalingLaw",
    "StepMetrics",
    "SweepPoint",
    "SweepResult",
    "SweepRun",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WholeModel",
    "arithmetic_dtype",
    "build_optimizer",
    "chunked_cross_entropy",
    "chunked_next_token_loss",
    "find_checkpoint",
    "fit_scaling_law",
    "learning_rate",
    "list_checkpoints",
    "mup_init_",
    "next_token_loss",
    "pick_device",
    "read_log",
    "sweep",
    "validation_loss",
    "verify_manifest",
]
