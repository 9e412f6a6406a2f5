"""llmforge finetune: an open model learns from your examples."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.cli.program import program
from llmforge.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError

if TYPE_CHECKING:
    from llmforge.cli.finetune_config import FinetuneConfig
    from llmforge.data import InstructionDataset
    from llmforge.models import LlamaConfig
    from llmforge.tokenizers import Tokenizer
    from llmforge.training import Trainer

HELP = "tune an open model on your own examples, with LoRA or QLoRA"
DESCRIPTION = """Tune a model on examples (JSONL or JSON: Alpaca, ShareGPT, OpenAI messages, prompt and completion, plain text). With --qlora the
frozen base is held in 4 bits: an 8B model fits into 12 GB of GPU memory. A YAML file with Axolotl's keys runs as it stands."""
EXAMPLES = """examples:
  llmforge finetune base/ tutor.jsonl --qlora --out runs/tutor         an adapter of base/, trained on the answers in tutor.jsonl
  llmforge finetune base/ tutor.jsonl --qlora --dry-run --gpu-gb 12    what that needs, without a GPU, in seconds
  llmforge finetune llama-3-8b x.jsonl --qlora --dry-run --gpu-gb 12   the same of a preset, before anything is downloaded
  llmforge finetune config.yaml                                        all settings from a file
  llmforge finetune config.yaml --set learning_rate=1e-4 --auto-fit    change some; save memory until it fits this GPU
  llmforge finetune --resume runs/tutor                                go on after Ctrl-C, a crash or a power cut
"""


_WHAT_FITS = "--dry-run lists what needs the memory, --auto-fit saves it"
# The trainer's settings, as they are called here.
_OUR_WORDS = {
    "grad_accum_steps=": "gradient_accumulation_steps=",
    "activation_checkpointing=blocks": "gradient_checkpointing=true",
    "activation_checkpointing=offload": "gradient_checkpointing=offload",
    "optimizer=adamw8bit": "optimizer=adamw_8bit",
    "seq_len=": "sequence_len=",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", nargs="?", help="base model (folder, run, owner/name, .gguf), or a YAML file with all settings"
    )
    parser.add_argument("data", nargs="*", help="files of examples, .jsonl or .json")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora", action="store_true", help="train an adapter, the base as it is (default)")
    kind.add_argument("--qlora", action="store_true", help="train an adapter, the base in 4 bits")
    kind.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--out", metavar="FOLDER", help="run folder (default: runs/NAME-OF-DATA)")
    parser.add_argument(
        "--type",
        metavar="KIND",
        help="of the records: alpaca, sharegpt, messages, prompt-completion, text (default: auto)",
    )
    parser.add_argument(
        "--template", metavar="NAME", help="alpaca, chatml or llama3 (default: the model's own, or else alpaca)"
    )
    parser.add_argument(
        "--epochs", type=float, metavar="X", help="how often each example is seen; same as --set num_epochs=X"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps; same as --set max_steps=N")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens per row; same as --set sequence_len=N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; may be repeated"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out malformed records and count them; the first is an error else"
    )
    parser.add_argument(
        "--preview",
        action="store_true",
        help="show one example as the model sees it, what is learned of it marked, and stop",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what memory the run needs, item by item, and stop")
    parser.add_argument(
        "--gpu-gb",
        type=float,
        metavar="GB",
        help="memory of the GPU, for --dry-run and --auto-fit (default: the GPU at hand)",
    )
    parser.add_argument("--auto-fit", action="store_true", help="save memory step by step until the run fits the GPU")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")


def run(args: argparse.Namespace) -> int:
    if args.gpu_gb is not None and not (args.dry_run or args.auto_fit):
        raise ConfigError("--gpu-gb says for which GPU --dry-run or --auto-fit counts; add one of them")
    config = _resumed(args) if args.resume is not None else _configured(args)
    if args.dry_run and (preset := _preset(config.base_model)) is not None:
        _fit(config, preset, preset.max_position_embeddings, None, args)
        return 0
    from llmforge.convert import open_model
    from llmforge.training.checkpoint import check_new_run
    from llmforge.training.distributed import is_restart
    from llmforge.training.out_of_memory import is_out_of_memory

    # After a process has died, torchrun starts all of them again with the command line of the beginning.
    resume = args.resume is not None or is_restart()
    if not (resume or args.preview or args.dry_run):
        check_new_run(Path(config.output_dir))  # before minutes of loading
    try:
        published, tokenizer = open_model(config.base_model)
    except CheckpointError as error:
        if args.resume is None:
            raise
        raise CheckpointError(f"{error}. If the base of the run is elsewhere now: --set base_model=THERE") from error
    if tokenizer is None:
        raise ConfigError(f"{config.base_model} has no tokenizer files; put its tokenizer.json beside the weights")
    context = published.context_length
    train_data, val_data = _data(config, tokenizer)
    if args.preview:
        _preview(train_data)
        return 0
    if args.dry_run or args.auto_fit:
        answers = train_data.summary(min(config.sequence_len, context)).max_answer_tokens_in_a_row
        config = _fit(config, published.config, context, answers, args)
        if args.dry_run:
            return 0
    _describe_data(train_data, val_data, min(config.sequence_len, context))
    try:
        trainer = _build_trainer(config, train_data, val_data, context_length=context)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0]
        raise OutOfMemoryError(f"out of memory before the first step ({reason}); {_WHAT_FITS}") from error
    if resume and not trainer.resume() and trainer.ranks.is_first:
        print(f"{trainer.out_dir} has no checkpoint yet: starting from the beginning", file=sys.stderr)
    return _train(trainer, config)


def _preset(name: str) -> "LlamaConfig | None":
    """The shape of a published model, whose memory can be known before it is downloaded."""
    from llmforge.models import LlamaConfig

    return LlamaConfig.preset(name) if name in LlamaConfig.PRESETS and not Path(name).exists() else None


def _fit(
    config: "FinetuneConfig", model_config: Any, context: int, answers: int | None, args: argparse.Namespace
) -> "FinetuneConfig":
    from llmforge.cli.fit import fitted

    return fitted(
        config,
        model_config,
        context_length=context,
        answer_tokens=answers,
        gpu_gb=args.gpu_gb,
        change=args.auto_fit,
    )


def _configured(args: argparse.Namespace) -> "FinetuneConfig":
    """The settings of a YAML file or of the arguments, and of --set."""
    from llmforge.cli.finetune_config import FinetuneConfig, read_axolotl
    from llmforge.config import read_yaml_mapping

    if args.base is None:
        raise ConfigError("name a base model and examples: llmforge finetune base/ tutor.jsonl --qlora; or a YAML file")
    values: dict[str, Any] = {}
    if Path(args.base).suffix in (".yaml", ".yml"):
        if args.data:
            raise ConfigError(f"{args.base} names its datasets itself; leave out {', '.join(args.data)}")
        values, notes = read_axolotl(read_yaml_mapping(args.base))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    else:
        if not args.data:
            raise ConfigError(
                f"name a file of examples for {args.base}: llmforge finetune {args.base} tutor.jsonl --qlora"
            )
        values = {
            "base_model": args.base,
            "datasets": [{"path": path, "type": args.type or "auto"} for path in args.data],
            "output_dir": f"runs/{Path(args.data[0]).stem}",
        }
    given = {
        "adapter": "lora" if args.lora else "qlora" if args.qlora else None,
        "output_dir": args.out,
        "chat_template": args.template,
        "num_epochs": args.epochs,
        "max_steps": args.steps,
        "sequence_len": args.seq_len,
        "skip_bad": args.skip_bad or None,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    if args.full:
        values |= {"adapter": None, "load_in_4bit": None}
    return FinetuneConfig.from_dict({**values, **_settings(args.set)})


def _settings(settings: list[str]) -> dict[str, Any]:
    """`--set learning_rate=1e-4` as fields; the value is read as YAML reads it."""
    import yaml

    from llmforge.cli.finetune_config import read_axolotl

    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set needs key=value, got {setting!r}; for example --set learning_rate=1e-4")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: {text!r} is no value that YAML knows") from error
    known, notes = read_axolotl(values)
    if notes:
        raise ConfigError(f"--set: {notes[0]}")
    return known


def _resumed(args: argparse.Namespace) -> "FinetuneConfig":
    from llmforge.cli.finetune_config import FinetuneConfig
    from llmforge.config import read_yaml_mapping

    names = ("base", "out", "type", "template", "epochs", "seq_len")
    given = [name for name in names if getattr(args, name) is not None]
    switches = ("lora", "qlora", "full", "skip_bad", "preview", "dry_run", "auto_fit")
    given += [name for name in switches if getattr(args, name)]
    if given:
        raise ConfigError(
            f"--resume continues a run as it was: leave out {', '.join(given)}; settings change with --set"
        )
    folder = Path(args.resume)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} is not a run folder: it has no config.yaml; runs are made by llmforge finetune"
        )
    values = read_yaml_mapping(folder / "config.yaml")
    if "base_model" not in values:
        raise CheckpointError(f"{folder} is a run of llmforge train; go on with {program()} train --resume {folder}")
    changes = _settings(args.set) | ({"max_steps": args.steps} if args.steps is not None else {})
    return FinetuneConfig.from_dict({**values, **changes, "output_dir": str(folder)})


def _data(config: "FinetuneConfig", tokenizer: "Tokenizer") -> "tuple[InstructionDataset, InstructionDataset | None]":
    """Training and held-out examples."""
    from llmforge.data import InstructionDataset

    data = InstructionDataset.from_file(
        [dataset.path for dataset in config.datasets],
        tokenizer,
        kind=config.datasets[0].kind,
        template=config.chat_template,
        train_on_inputs=config.train_on_inputs,
        packing=config.sample_packing,
        too_long="error" if config.excess_length_strategy == "raise" else config.excess_length_strategy,
        skip_bad=config.skip_bad,
    )
    size = config.val_set_size
    if not size:
        return data, None
    try:
        return data.split(val_fraction=size) if size < 1 else data.split(val_size=int(size))
    except (ConfigError, DataError) as error:
        raise DataError(f"{error}; --set val_set_size=0 holds out none") from error


def _describe_data(train_data: "InstructionDataset", val_data: "InstructionDataset | None", seq_len: int) -> None:
    from llmforge.tokenizers.templates import missing_markers

    bad, rows = train_data.bad_records, train_data.summary(seq_len)  # which warns of examples that are too long
    if bad.count:
        print(f"left out {bad.count:,} malformed records: {bad.reasons[0]}")
    held_out = f" + {val_data.num_samples:,} held out" if val_data is not None else ""
    if markers := missing_markers(train_data.tokenizer):
        print(
            f"warning: the chat template writes {', '.join(markers)}, which are no tokens of this model: it reads them as text, and answers end "
            "with its end of text; --template alpaca has no such markers",
            file=sys.stderr,
        )
    print(
        f"examples {rows.num_documents:,}{held_out}; {rows.num_answer_tokens:,} answer tokens to learn, in {rows.num_rows:,} rows of "
        f"{seq_len:,}, {rows.efficiency:.0%} full"
    )


def _preview(data: "InstructionDataset") -> None:
    """The first examples as the model sees them: what is learned stands in brackets, or in colour on a terminal."""
    colour = sys.stdout.isatty()
    start, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    for number in range(min(2, data.num_samples)):
        print(f"--- {data.place(number)}")
        learned = False
        for text, is_target in data.preview(number):
            if is_target != learned:
                print(start if is_target else end, end="")
                learned = is_target
            print(text, end="")
        print(end if learned else "")
    print("--- what is in green is learned" if colour else "--- what stands in [[ ]] is learned")


def _build_trainer(
    config: "FinetuneConfig",
    train_data: "InstructionDataset",
    val_data: "InstructionDataset | None",
    *,
    context_length: int,
) -> "Trainer":
    """Model, adapter and trainer of a run, announced on the screen."""
    import torch

    from llmforge.convert import load
    from llmforge.finetune import AdapterFiles, apply_lora_
    from llmforge.nn import offload_embedding_
    from llmforge.training import Trainer, arithmetic_dtype, chunked_next_token_loss
    from llmforge.training.distributed import join

    ranks = join(config.device)
    device, lora = ranks.device(config.device), config.lora_config
    rows = train_data.num_sequences(min(config.sequence_len, context_length))
    train_config = config.train_config(rows, context_length=context_length, world_size=ranks.world_size)
    # Frozen weights are held in the type of the arithmetic; those that train are float32.
    dtype = torch.float32 if lora is None else arithmetic_dtype(train_config.dtype, device)
    model, _ = load(config.base_model, device=device, dtype=dtype, quantize=config.nf4_config)
    torch.manual_seed(config.seed)  # of the adapter's first values
    what, files = "all weights", None
    if lora is not None:
        names = apply_lora_(model, lora)
        what, files = f"adapters of rank {lora.r} on {len(names)} layers", AdapterFiles(_base_name(config.base_model))
    if config.offload_embedding:
        offload_embedding_(model)
    model.set_mlp_tiles(config.mlp_tiles)
    trainer = Trainer(
        model,
        train_data,
        val_data=val_data,
        tokenizer=train_data.tokenizer,  # with the template of the examples
        config=train_config,
        loss_fn=chunked_next_token_loss,
        model_files=files,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = (
        ""
        if config.nf4_config is None
        else " in NF4" + (", embeddings in 8 bits" if config.embedding_bits == 8 else "")
    )
    print(
        f"base     {config.base_model}: {type(model).__name__}, {(model.num_params() - trained * (lora is not None)) / 1e6:,.1f} million weights{base}"
    )
    print(
        f"trained  {what}: {trained / 1e6:,.2f} million weights; {trainer.device}, {trainer.dtype}".replace(
            "torch.", ""
        )
    )
    return trainer


def _base_name(base: str) -> str:
    """How an adapter names its base, so that it is found from any folder; owner/name stays."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _train(trainer: "Trainer", config: "FinetuneConfig") -> int:
    """Run the trainer, say what to type next, and return the exit code."""
    from llmforge.cli.train import run_trainer, stopped

    before = None
    try:
        if trainer.val_data is not None and trainer.step == 0:
            before = trainer.evaluate().loss
            print(f"held out loss {before:.4f} before training")
        result = run_trainer(trainer, config, command="finetune")
    except OutOfMemoryError as error:
        said = str(error)
        for theirs, ours in _OUR_WORDS.items():
            said = said.replace(theirs, ours)
        raise OutOfMemoryError(f"{said}; {_WHAT_FITS}") from error
    if result.stopped_by is not None:
        return stopped(result, trainer, command="finetune")
    run = Path(config.output_dir)
    if before is not None and result.val_loss is not None:
        print(f"held out loss {before:.4f} before, {result.val_loss:.4f} after")
    print(f"next     {program()} export {run} --gguf {run.name}.gguf --file-type Q4_K_M")
    print(f"         {program()} deploy {run.name}.gguf --to ollama    (or lmstudio)")
    print(f"         {program()} compare {config.base_model} {run} --prompts {config.datasets[0].path} --limit 5")
    return 0
