"""llmforge sweep: which settings are best, found with small runs."""

import argparse
import dataclasses
import functools
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.cli.program import program
from llmforge.cli.train import add_text_arguments, resolve_config, stem
from llmforge.errors import ConfigError, DivergedError

if TYPE_CHECKING:
    from llmforge.cli.run_config import RunConfig
    from llmforge.data import TokenDataset
    from llmforge.models import ModelConfig
    from llmforge.tokenizers import Tokenizer
    from llmforge.training import SweepResult, SweepRun

HELP = "find the best settings with small runs"
DESCRIPTION = """Train a small model with each combination of some settings, and say which is best. What is done is not done again: a sweep
that was stopped, or to which values are added, goes on with the same command."""
EXAMPLES = """examples:
  llmforge sweep quijote.txt --over lr=1e-3,2e-3,4e-3 --steps 300
  llmforge sweep quijote.txt --preset llama-15m --over lr=1e-3,2e-3 --over width=64,128 --steps 300 --seeds 3 --jobs 2
  llmforge sweep quijote.txt --over lr=1e-3 --extend --steps 300           double and halve lr until the best is found
"""

# Nothing that takes time beside the steps. A run keeps a checkpoint while it lasts, to go on from.
_TRAIN: Mapping[str, object] = {"sample_every_steps": None, "eval_every_steps": None, "keep_last": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="a setting as of --set, and its values with commas between; or width=..., which sizes the whole model; may be repeated",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run; same as --set max_steps=N")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each combination (default: 1)")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the sweep (default: runs/NAME-OF-TEXT-sweep)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side (default: 1)")
    parser.add_argument(
        "--extend",
        nargs="?",
        const="lr",
        metavar="KEY",
        help="go on by factors of 2 while the best value of KEY (default: lr) is the first or the last",
    )
    parser.add_argument("--preset", help="as of llmforge train")
    parser.add_argument("--tokenizer", metavar="KIND", help="as of llmforge train")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="as of llmforge train")
    parser.add_argument("--config", metavar="FILE", help="YAML file, as of llmforge train")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs")
    parser.add_argument("--json", action="store_true", help="print results.json instead of a table")


def run(args: argparse.Namespace) -> int:
    from llmforge.training import sweep

    grid = _grid(args.over)
    if args.seeds < 1:
        raise ConfigError(f"--seeds ({args.seeds}) must be at least 1")
    base = resolve_config(args, _TRAIN)
    out = Path(args.out or f"runs/{stem(base.text)}-sweep")
    seeds = [base.train.seed + number for number in range(args.seeds)]
    screen = sys.stderr if args.json else sys.stdout
    total = args.seeds * math.prod(len(values) for values in grid.values())
    steps = "" if "max_steps" in grid else f" of {base.train.max_steps} steps"
    print(f"sweep    {out}: {total} runs{steps}", file=screen, flush=True)

    def report(done: "SweepRun") -> None:
        loss = "diverged" if done.loss is None else f"loss {done.loss:.4f}"
        print(f"run      {done.folder}: {loss}, {done.values['seconds']:.0f} s", file=screen, flush=True)

    inputs = base.to_dict()
    del inputs["train"]["out_dir"], inputs["train"]["seed"]
    try:
        result = sweep(
            functools.partial(measure, args),
            grid,
            out_dir=out,
            seeds=seeds,
            jobs=args.jobs,
            extend=args.extend,
            check=functools.partial(_check, args),
            inputs=inputs,
            on_run=report,
        )
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on", file=sys.stderr)
        return 143 if "SIGTERM" in stop.args else 130
    write_picture(result, out / "sweep.png")
    if args.json:
        print(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    for line in summary(result, base, args):
        print(line, file=screen)
    return 0 if result.best() is not None else 1


def measure(args: argparse.Namespace, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the model that the arguments and these settings ask for, and say what it ended with."""
    from llmforge.formats.atomic import atomic_file
    from llmforge.training import Trainer, list_checkpoints

    start = time.perf_counter()
    config = cell_config(args, settings)
    tokenizer, train_data, val_data = _data(_of_the_text(config))
    config = config.with_vocabulary(tokenizer)
    config = config.replace(train={**config.train.to_dict(), "out_dir": str(folder)})
    model = config.new_model()
    trainer = Trainer(model, train_data, val_data=val_data, config=config.train)
    with atomic_file(folder / "config.yaml") as tmp:
        tmp.write_text(config.to_yaml(), encoding="utf-8")
    trainer.resume()
    loss: float | None = math.inf
    try:
        result = trainer.train(progress=False)
    except DivergedError:
        pass
    else:
        if result.stopped_by is not None and result.stopped_by.startswith("SIG"):
            raise KeyboardInterrupt(result.stopped_by)
        loss = result.train_loss if val_data is None else result.val_loss
        if loss is None:  # killed between its last step and its result
            loss = trainer.evaluate(val_data or train_data).loss
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    return {
        "loss": loss,
        "num_params": model.num_params(),
        "num_tokens": trainer.step * trainer.rows * trainer.seq_len,
        "seconds": round(time.perf_counter() - start, 2),
    }


def cell_config(args: argparse.Namespace, settings: Mapping[str, Any]) -> "RunConfig":
    """The run of a point of the grid."""
    changes = []
    for key, value in settings.items():
        if key == "width":
            changes += [
                f"{name}={size}" for name, size in shape_of_width(resolve_config(args, _TRAIN).model, value).items()
            ]
        else:
            changes.append(f"{key}={value}")
    return resolve_config(argparse.Namespace(**{**vars(args), "set": [*args.set, *changes]}), _TRAIN)


def shape_of_width(model: "ModelConfig", width: int) -> dict[str, int]:
    """The fields that make a model so wide, with heads as wide as before, and the feed-forward layer in the same ratio.

    Raises:
        ConfigError: a width that such heads do not divide.
    """
    name, heads = ("n_embd", "n_head") if hasattr(model, "n_embd") else ("hidden_size", "num_attention_heads")
    before, num_heads = getattr(model, name), getattr(model, heads)
    head = before // num_heads
    if not isinstance(width, int) or width < 1 or width % head:
        raise ConfigError(
            f"width ({width}) must be a multiple of {head}, the width of this model's heads; try {max(1, round(float(width) / head)) * head}"
        )
    shape = {name: width, heads: width // head}
    for scaled in ("intermediate_size", "num_key_value_heads"):
        if getattr(model, scaled, None) is not None:
            shape[scaled] = max(1, getattr(model, scaled) * width // before)
    return shape


def _grid(over: list[str]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for text in over:
        key, equals, values = text.partition("=")
        if not (key and equals and values.strip(", ")):
            raise ConfigError(f"--over needs KEY=VALUES, got {text!r}; for example --over lr=1e-3,2e-3,4e-3")
        if key in grid:
            raise ConfigError(f"--over names {key} twice; give all of its values at once")
        grid[key] = [_value(value.strip()) for value in values.split(",") if value.strip()]
    return grid


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be trained, before anything is."""
    import torch

    config = cell_config(args, settings)
    with torch.device("meta"):
        context = config.new_model().context_length
    if config.train.seq_len is not None and config.train.seq_len > context:
        raise ConfigError(f"seq_len ({config.train.seq_len}) exceeds the model's context ({context}); lower it")


def _of_the_text(config: "RunConfig") -> "RunConfig":
    """The same one for all runs that read the text alike."""
    from llmforge.models import GPTConfig
    from llmforge.training import TrainConfig

    return dataclasses.replace(config, family="gpt", model=GPTConfig(vocab_size=1), train=TrainConfig(max_steps=1))


@functools.lru_cache(maxsize=2)
def _data(config: "RunConfig") -> "tuple[Tokenizer, TokenDataset, TokenDataset | None]":
    """Tokenizer, training and validation tokens, read once for all runs of a process."""
    tokenizer = config.tokenizer.build(config.text)
    return (tokenizer, *config.data(tokenizer))


def main_key(result: "SweepResult") -> str:
    """What is on the x axis: lr, or else the first."""
    return "lr" if "lr" in result.grid else next(iter(result.grid))


def summary(result: "SweepResult", base: "RunConfig", args: argparse.Namespace) -> list[str]:
    """The table and what to make of it, line by line."""
    key, points = main_key(result), result.points()
    best = result.best()
    rows = [[*result.grid, "loss", "+-" if len(result.seeds) > 1 else ""]]
    for point in points:
        rows.append([
            *(_shown(value) for value in point.settings.values()),
            f"{point.loss:.4f}" if point.loss < float("inf") else "diverged",
            f"{point.stdev:.4f}" if len(result.seeds) > 1 else "",
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
    ]
    if best is None:
        return [*lines, "all runs diverged: try smaller learning rates"]
    for others in result.lines(key) if len(result.grid) > 1 else []:
        of_line = result.best(**others)
        if of_line is not None:
            lines.append(f"best {key} at {_pairs(others)}: {_shown(of_line.settings[key])} (loss {of_line.loss:.4f})")
    lines.append(f"best     {_pairs(best.settings)}: loss {best.loss:.4f}")
    model_keys = {"width", *base.model.to_dict()}  # that the largest model is best is no surprise
    for name in result.grid:
        edge = result.edge(name, best) if name not in model_keys else None
        if edge is not None and len({point.settings[name] for point in points}) > 1:
            beyond = "--extend goes on by factors of 2" if name == "lr" else f"--extend {name} goes on by factors of 2"
            lines.append(
                f"warning: {name} {_shown(best.settings[name])} is the {edge} that was tried, a better one may lie beyond: {beyond}"
            )
    changes = [f"{key}={value}" for key, value in best.settings.items() if key != "width"]
    if "width" in best.settings:
        changes += [f"{name}={size}" for name, size in shape_of_width(base.model, best.settings["width"]).items()]
    again = ["train", *args.text]
    for name in ("text_field", "weights", "val_fraction", "preset", "config", "tokenizer", "vocab_size"):
        if (value := getattr(args, name)) is not None:
            again += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    if args.drop_near_duplicates:
        again.append("--drop-near-duplicates")
    for change in [*args.set, *changes]:
        again += ["--set", change]
    lines.append(f"next     {program()} {shlex.join(again)}")
    return lines


def _pairs(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_picture(result: "SweepResult", png: Path) -> None:
    """Loss over the main key, one line for each combination of the others; bars are the standard deviation over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llmforge.formats.atomic import atomic_file

    key = main_key(result)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for others in result.lines(key):
        points = [point for point in result.points(**others) if point.loss < float("inf")]
        x = [point.settings[key] for point in points]
        y, bars = [point.loss for point in points], [point.stdev for point in points]
        if points:
            axes.errorbar(
                x, y, yerr=bars if any(bars) else None, fmt="o-", markersize=4, capsize=3, label=_pairs(others)
            )
            lowest = min(points, key=lambda point: point.loss)
            axes.plot([lowest.settings[key]], [lowest.loss], "k*", markersize=9)
    values = [point.settings[key] for point in result.points()]
    if all(isinstance(value, (int, float)) and value > 0 for value in values):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(values)), [_shown(value) for value in sorted(set(values))], minor=False)
    axes.set(xlabel=key, ylabel="loss (nats per token)", title=png.resolve().parent.name)
    axes.grid(alpha=0.3)
    if len(result.grid) > 1 and axes.lines:
        axes.legend()
    with atomic_file(png) as tmp:
        figure.savefig(tmp, dpi=120, format="png")
