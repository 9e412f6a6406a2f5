"""llmforge train --twin: the float model of the same shape, trained on the same tokens, and what the ternary one loses to it."""

import json
import math
from typing import TYPE_CHECKING

from llmforge.cli.program import program
from llmforge.errors import ConfigError

if TYPE_CHECKING:
    from llmforge.cli.run_config import RunConfig
    from llmforge.tokenizers import Tokenizer
    from llmforge.training import Trainer

FLOAT_LR = 1e-3  # the best one of small float models: benchmarks/results/ternary-quality-*.json


def twin_of(config: "RunConfig", lr: float | None = None) -> "RunConfig":
    """The run of the float twin: same text, tokens, batches and seed, with a learning rate and a schedule for floats.

    Args:
        lr: its learning rate; None = FLOAT_LR, or that of the ternary run if it is lower.
    Raises:
        ConfigError: the model has no twin, or nothing to compare by.
    """
    from llmforge.models import FAMILIES
    from llmforge.training.config import RECIPES

    make = getattr(config.model, "float_twin", None)
    twin = make() if make is not None else None
    if twin is None:
        raise ConfigError(
            f"--twin trains the float twin of a ternary model, and this {config.family} is none; take --preset bitnet-15m, for example"
        )
    if not config.val_fraction:
        raise ConfigError("--twin compares validation losses, and val_fraction is 0; leave it at 0.1")
    if config.train.out_dir is None:
        raise ConfigError("--twin needs a run folder; set out_dir")
    train = config.train.to_dict()
    schedule = {"two-stage": "linear"}.get(config.train.schedule, config.train.schedule)
    train |= {"recipe": "standard", "schedule": schedule, "lr": lr or min(FLOAT_LR, config.train.lr), "min_lr": 0.0}
    train |= {"decay_weights_fraction": 1.0, "quantize_after_fraction": 0.0, "quantize_warmup_steps": 0}
    if config.train.recipe == "bitnet" and train["weight_decay"] == RECIPES["bitnet"]["weight_decay"]:
        train["weight_decay"] = 0.1  # the float model's default
    train["out_dir"] = f"{config.train.out_dir}-twin"
    family = next(name for name, (config_class, _) in FAMILIES.items() if type(twin) is config_class)
    return config.replace(family=family, model=twin.to_dict(), train=train)


def train_twin(trainer: "Trainer", config: "RunConfig", tokenizer: "Tokenizer", lr: float | None) -> int:
    """Train the twin of a run that is done, or go on with it, and report the gap; returns the exit code."""
    from llmforge.cli.train import build_trainer, run_trainer, stopped
    from llmforge.formats.atomic import atomic_file

    twin_config = twin_of(config, lr)
    print(f"twin     the same model as floats, on the same tokens, learning rate {twin_config.train.lr:g}")
    twin = build_trainer(twin_config, tokenizer)
    twin.resume()
    result = run_trainer(twin, twin_config)
    if result.stopped_by is not None:
        code = stopped(result, twin)
        print(f"         then: {program()} train --resume {trainer.out_dir} --twin")
        return code
    ternary, floats = trainer.evaluate(), twin.evaluate()
    gap = ternary.loss - floats.loss
    report = {
        "ternary_val_loss": ternary.loss,
        "float_val_loss": floats.loss,
        "gap_nats": gap,
        "targets": ternary.num_targets,
        "ternary_lr": config.train.lr,
        "float_lr": twin_config.train.lr,
        "ternary_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens": config.train.max_steps
        * config.train.micro_batch_size
        * config.train.grad_accum_steps
        * trainer.seq_len,
        "float_run": twin_config.train.out_dir,
    }
    assert trainer.out_dir is not None
    with atomic_file(trainer.out_dir / "twin.json") as tmp:
        tmp.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"gap      ternary {ternary.loss:.4f}, float {floats.loss:.4f}: {gap:+.4f} nats per token, {math.expm1(gap):+.1%} perplexity, over "
        f"{ternary.num_targets:,} validation tokens"
    )
    print(f"files    {trainer.out_dir / 'twin.json'}; the twin is {twin_config.train.out_dir}")
    return 0
