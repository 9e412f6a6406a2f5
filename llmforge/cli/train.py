"""llmforge train: a text file becomes a trained model."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.cli.program import program
from llmforge.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from llmforge.cli.run_config import RunConfig
    from llmforge.config import Config
    from llmforge.tokenizers import Tokenizer
    from llmforge.training import Trainer, TrainResult

HELP = "train a model on your own text"
DESCRIPTION = """Train a small language model on text: files (UTF-8), folders of .txt files, records in .jsonl, .csv, .tsv or .parquet, or a
data set of the Hugging Face Hub (hf:owner/name). Several texts are joined, or mixed with --weights."""
EXAMPLES = """examples:
  llmforge train quijote.txt                                   a model of characters, sized for this machine
  llmforge train quijote.txt --preset char-gpt --out runs/q    10 million weights: minutes on a GPU, hours on a CPU
  llmforge train quijote.txt --tokenizer bpe --vocab-size 8000 pieces of words instead of characters
  llmforge train a.txt books/ table.csv --text-field body      several texts; of records, the field with the text
  llmforge train wiki.jsonl books/ --weights 2 1               two rows of the first for each of the second
  llmforge train quijote.txt --preset llama-15m                a small Llama with a vocabulary of its own
  llmforge train quijote.txt --preset bitnet-15m --twin        a ternary model, and its float twin to compare with
  llmforge train quijote.txt --set max_steps=500 --set lr=3e-4 change single settings
  llmforge train --config run.yaml                             all settings from a file
  llmforge train --resume runs/q                               go on after Ctrl-C, a crash or a power cut
"""


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train on."""
    parser.add_argument(
        "text",
        nargs="*",
        help="text file, folder of .txt files, .jsonl, .csv, .tsv or .parquet, or hf:owner/name[:config[:split]]; .gz and .zst too",
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help="of records: the field, or column, with the text (default: text)"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="how many rows come from each text, against the others (default: as many as its length gives)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="part of the text that is kept for validation (default: 0.1); whole records, by a hash, and the end of long texts",
    )
    parser.add_argument(
        "--drop-near-duplicates",
        action="store_true",
        help="leave out lines that are nearly the same as an earlier one",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_text_arguments(parser)
    parser.add_argument(
        "--preset",
        help="char-gpt, char-gpt-cpu, modern, gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-15m, llama-42m, llama-110m, llama-350m, "
        "llama-3.2-1b or llama-3-8b; with ternary weights bitnet-15m, bitnet-42m, bitnet-110m, bitnet-350m, bitnet-2b-4t or bit-gpt "
        "(default: a char model for the GPU or CPU at hand)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/NAME-OF-TEXT)")
    parser.add_argument(
        "--tokenizer",
        metavar="KIND",
        help="char, bpe (own byte-pair encoding), wordpiece (own, for transformers only, no GGUF), gpt2, or a folder with a "
        "tokenizer.json",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="size of the vocabulary of --tokenizer bpe or wordpiece"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps; same as --set max_steps=N")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the sections text, tokenizer, model, train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; may be repeated"
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="of a ternary model: train the same model as floats, too, on the same tokens, and report the gap",
    )
    parser.add_argument(
        "--twin-lr",
        type=float,
        metavar="X",
        help="learning rate of the twin (default: 1e-3, or the model's if that is lower)",
    )
    parser.add_argument(
        "--tracker",
        action="append",
        metavar="NAME",
        help="send what is logged to tensorboard, wandb or mlflow as well; may be repeated",
    )
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")


def run(args: argparse.Namespace) -> int:
    if args.resume is not None:
        return _resume(args)
    from llmforge.training.distributed import is_restart, join

    given = {"out_dir": args.out, "trackers": args.tracker}
    config = resolve_config(args, {name: value for name, value in given.items() if value is not None})
    _check_twin(config, args)
    tokenizer = join(config.train.device).first_decides(lambda: config.tokenizer.build(config.text))
    # After a process has died, torchrun starts all of them again with the command line of the beginning.
    return _train_all(config.with_vocabulary(tokenizer), tokenizer, args, resume=is_restart())


def resolve_config(args: argparse.Namespace, train: Mapping[str, object]) -> "RunConfig":
    """The run that the arguments ask for.

    Args:
        train: more settings of training, before those of --set.
    """
    from llmforge.cli.run_config import RunConfig, parse_settings
    from llmforge.config import read_yaml_mapping

    file_layer = read_yaml_mapping(args.config) if args.config is not None else {}
    text = _texts(args) or file_layer.get("text")
    if not text:
        raise ConfigError(
            "name a text file to train on: llmforge train mybook.txt (or llmforge demo to see it work first)"
        )
    preset = args.preset or file_layer.pop("preset", None) or default_preset()
    file_layer.pop("preset", None)
    options: dict[str, Any] = {"tokenizer": {}, "train": dict(train)}
    if args.tokenizer is not None:
        options["tokenizer"] = _tokenizer_option(args.tokenizer)
    if args.vocab_size is not None:
        if args.tokenizer not in (None, "bpe", "wordpiece"):
            raise ConfigError(
                f"--vocab-size is for --tokenizer bpe or wordpiece; the vocabulary of {args.tokenizer!r} follows from itself"
            )
        options["tokenizer"] = {"kind": args.tokenizer or _trained_kind(file_layer), "vocab_size": args.vocab_size}
    if args.steps is not None:
        options["train"]["max_steps"] = args.steps
    if args.val_fraction is not None:
        options["val_fraction"] = args.val_fraction
    if args.drop_near_duplicates:
        options["drop_near_duplicates"] = True
    defaults = {"text": text, "train": {"out_dir": f"runs/{stem(text)}"}}
    layers = [defaults, file_layer, {"text": text}, options, parse_settings(args.set)]
    return RunConfig.resolve(preset, layers)


def _resume(args: argparse.Namespace) -> int:
    from llmforge.cli.run_config import RunConfig, parse_settings
    from llmforge.config import read_yaml_mapping
    from llmforge.tokenizers import load_tokenizer
    from llmforge.training import find_checkpoint, list_checkpoints
    from llmforge.training.distributed import join

    given = [
        name
        for name in (
            "text",
            "text_field",
            "weights",
            "val_fraction",
            "drop_near_duplicates",
            "preset",
            "config",
            "tokenizer",
            "vocab_size",
            "out",
        )
        if getattr(args, name) not in (None, False, [])
    ]
    if given:
        raise ConfigError(
            f"--resume continues a run as it was: leave out {', '.join(given)}; single settings change with --set"
        )
    run_folder = Path(args.resume)
    if not (run_folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{run_folder} is not a run folder: it has no config.yaml; runs are made by llmforge train"
        )
    values = read_yaml_mapping(run_folder / "config.yaml")
    if "base_model" in values:
        raise CheckpointError(
            f"{run_folder} is a run of llmforge finetune; go on with {program()} finetune --resume {run_folder}"
        )
    config = RunConfig.from_dict(values)
    options = [f"max_steps={args.steps}"] * (args.steps is not None)
    options += [f"trackers={','.join(args.tracker or [])}"] * (args.tracker is not None)
    changes = parse_settings(args.set + options)
    if set(changes) - {"train"}:
        raise ConfigError(
            f"--resume can change settings of train only, not {', '.join(sorted(set(changes) - {'train'}))}"
        )
    config = config.replace(train={**config.train.to_dict(), **changes.get("train", {}), "out_dir": str(run_folder)})
    _check_twin(config, args)

    def first_vocabulary() -> "Tokenizer":
        """That which the run began with, whatever became of the text since."""
        found = load_tokenizer(find_checkpoint(run_folder)) if list_checkpoints(run_folder) else None
        return found or config.tokenizer.build(config.text)

    tokenizer = join(config.train.device).first_decides(first_vocabulary)
    config = config.with_vocabulary(tokenizer)
    return _train_all(config, tokenizer, args, resume=True)


def _texts(args: argparse.Namespace) -> "str | list[dict[str, object]] | None":
    """What the command line says about the text: a path as it is, or sources."""
    from llmforge.tokenizers.sources import TextSource

    if args.weights is not None and len(args.weights) != len(args.text):
        raise ConfigError(
            f"--weights has {len(args.weights)} numbers for {len(args.text)} texts; give one for each text, in the same order"
        )
    if not args.text:
        if args.text_field is not None:
            raise ConfigError(
                "--text-field is about texts of the command line; in a file it is text: [{path: ..., field: ...}]"
            )
        return None
    sources: list[dict[str, object]] = [{"path": path} for path in args.text]
    for source in sources if args.text_field is not None else []:
        if not TextSource.from_dict(source).is_text_file:
            source["field"] = args.text_field
    for source, weight in zip(sources, args.weights or [], strict=False):
        source["weight"] = weight
    return str(args.text[0]) if sources == [{"path": args.text[0]}] else sources


def stem(text: object) -> str:
    """Name of a run on these texts: that of the first one."""
    from llmforge.tokenizers.sources import text_sources

    path = Path(text_sources(text)[0].path.removeprefix("hf:").replace(":", "-"))  # type: ignore[arg-type]
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).stem or "text"


def _check_twin(config: "RunConfig", args: argparse.Namespace) -> None:
    """Refuse a twin that cannot be, before hours of training."""
    if args.twin_lr is not None and not args.twin:
        raise ConfigError("--twin-lr is the learning rate of --twin; add --twin")
    if args.twin:
        from llmforge.cli.twin import twin_of

        twin_of(config, args.twin_lr)


def _train_all(config: "RunConfig", tokenizer: "Tokenizer", args: argparse.Namespace, *, resume: bool = False) -> int:
    """Train the model, and its twin where that is asked for."""
    trainer = build_trainer(config, tokenizer)
    if resume:
        if trainer.resume():
            print(f"resumed  {trainer.out_dir}: going on after step {trainer.step}")
        elif trainer.ranks.is_first:
            print(f"{trainer.out_dir} has no checkpoint yet: starting from the beginning", file=sys.stderr)
    code = train(trainer, config)
    if code == 0 and args.twin:
        from llmforge.cli.twin import train_twin

        code = train_twin(trainer, config, tokenizer, args.twin_lr)
    return code


def _tokenizer_option(value: str) -> dict[str, object]:
    """What --tokenizer names: a kind, or a folder (or its tokenizer.json)."""
    from llmforge.config import did_you_mean

    kinds = ["char", "bpe", "wordpiece", "gpt2"]
    if value in kinds:
        return {"kind": value}
    path = Path(value)
    if not path.exists():
        raise ConfigError(f"--tokenizer {value!r} is no kind and no folder; {did_you_mean(value, kinds)}")
    return {"kind": "file", "path": str(path.parent if path.is_file() else path)}


def _trained_kind(file_layer: Mapping[str, object]) -> str:
    """The tokenizer that --vocab-size alone means: bpe, unless the file asks for the other one that is trained on the text."""
    tokenizer = file_layer.get("tokenizer")
    return "wordpiece" if isinstance(tokenizer, Mapping) and tokenizer.get("kind") == "wordpiece" else "bpe"


def default_preset() -> str:
    """The char model that suits the device at hand."""
    import torch

    return "char-gpt" if torch.cuda.is_available() else "char-gpt-cpu"


def build_trainer(config: "RunConfig", tokenizer: "Tokenizer") -> "Trainer":
    """Data, model and trainer of a run, announced on the screen."""
    from llmforge.data import MixedDataset
    from llmforge.training import Trainer
    from llmforge.training.distributed import join

    with join(config.train.device).first_goes_ahead():
        train_data, val_data = config.data(tokenizer)
    model = config.new_model()
    trainer = Trainer(model, train_data, val_data=val_data, tokenizer=tokenizer, config=config.train)
    kind = type(tokenizer).__name__.removesuffix("Tokenizer").lower()
    val_tokens = f" + {len(val_data):,} for validation" if val_data is not None else ""
    print(
        f"text     {config.text_names}: {len(train_data):,} tokens{val_tokens} ({kind}, vocabulary of {tokenizer.vocab_size:,})"
    )
    if isinstance(train_data, MixedDataset):
        shares = zip(train_data.names, train_data.shares, train_data.parts, strict=True)
        print(
            "".join(
                f"         {share:.1%} of the rows from {name}: {len(part):,} tokens\n" for name, share, part in shares
            ),
            end="",
        )
    shape = f"{type(model).__name__}, {model.lm_head.in_features} wide, context {model.context_length}"
    print(
        f"model    {model.num_params() / 1e6:.2f} million weights: {shape}; {trainer.device}, {trainer.dtype}".replace(
            "torch.", ""
        )
        + (f"; {trainer.ranks.world_size} processes ({config.train.distributed})" if trainer.ranks.are_several else "")
    )
    return trainer


def run_trainer(trainer: "Trainer", config: "Config", *, command: str = "train") -> "TrainResult":
    """Save the run's config.yaml, train, and say what came of it.

    Args:
        command: of llmforge, which resumes the run.
    """
    from llmforge.formats.atomic import atomic_file

    trainer.check_out_dir()
    if trainer.out_dir is not None and trainer.ranks.is_first:
        with atomic_file(trainer.out_dir / "config.yaml") as tmp:
            tmp.write_text(config.to_yaml(), encoding="utf-8")
        print(
            f"run      {trainer.out_dir}: Ctrl-C saves and stops; {program()} {command} --resume {trainer.out_dir} goes on",
            flush=True,
        )
    result = trainer.train()
    report(result, trainer)
    return result


def train(trainer: "Trainer", config: "RunConfig") -> int:
    """Run the trainer, say what to type next, and return the exit code."""
    result = run_trainer(trainer, config)
    if result.stopped_by is None:
        if trainer.out_dir is not None:
            print(f'next     {program()} generate {trainer.out_dir} --prompt "..."')
            wordpiece = config.tokenizer.kind == "wordpiece"  # there is no GGUF of it
            target = f"--hf {trainer.out_dir.name}-hf" if wordpiece else f"--gguf {trainer.out_dir.name}.gguf"
            print(f"         {program()} export {trainer.out_dir} {target}")
        return 0
    return stopped(result, trainer)


def stopped(result: "TrainResult", trainer: "Trainer", *, command: str = "train") -> int:
    """Say how to go on after a signal, or when the time was up; returns the exit code that shells expect."""
    print(f"stopped by {result.stopped_by} and saved; go on with: {program()} {command} --resume {trainer.out_dir}")
    return {"SIGINT": 130, "max_seconds": 0}.get(str(result.stopped_by), 143)


def report(result: "TrainResult", trainer: "Trainer") -> None:
    """The closing lines of a run, and its loss curve."""
    from llmforge.cli.loss_curve import write_loss_curve

    losses = [
        f"{name} loss {value:.4f}"
        for name, value in (("train", result.train_loss), ("val", result.val_loss))
        if value is not None
    ]
    print(
        f"done     step {result.step} in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; {', '.join(losses)}"
    )
    if result.skipped_steps:
        print(f"         {result.skipped_steps} steps were skipped: their loss or gradient was not finite")
    if result.val_loss is not None and result.best_val_loss is not None and result.best_val_loss < result.val_loss:
        print(f"         the best validation loss was {result.best_val_loss:.4f} at step {result.best_step}: "
              f"--checkpoint best uses it")  # fmt: skip
    if trainer.out_dir is not None and trainer.ranks.is_first:
        write_loss_curve(trainer.out_dir)
        print(
            f"files    {trainer.out_dir}: {result.checkpoint.name if result.checkpoint else 'no new checkpoint'}, log.jsonl, loss.png, loss.html"
        )
