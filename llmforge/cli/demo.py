"""llmforge demo: the whole way once, without data or download."""

import argparse
import sys
from pathlib import Path

from llmforge.cli.program import program
from llmforge.errors import ConvertError, DataError

HELP = "see the whole way work: train, sample, export, verify (about two minutes)"
DESCRIPTION = """Train a small model on text that every Python carries (its language reference), show samples while it learns, write a
Hugging Face folder and a GGUF file, check the GGUF in llama.cpp, and say what to type next. No data and no download needed."""
EXAMPLES = """examples:
  llmforge demo
  llmforge demo --text quijote.txt        the same with your own text
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="train on this text instead")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to put everything (default: runs/demo, or the next free name)"
    )
    parser.add_argument("--steps", type=int, default=1_200, metavar="N", help="optimizer steps (default: 1200)")


def run(args: argparse.Namespace) -> int:
    from llmforge.cli.run_config import RunConfig
    from llmforge.cli.train import build_trainer, run_trainer, stopped
    from llmforge.convert import export_gguf, export_hf

    out = Path(args.out) if args.out is not None else _free_folder(Path("runs/demo"))
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} exists and is not empty; choose another folder with --out")
    text = Path(args.text) if args.text is not None else write_python_reference(out / "python-reference.txt")
    config = RunConfig.resolve(
        "char-gpt-cpu", [_SETTINGS, {"text": str(text), "train": {"max_steps": args.steps, "out_dir": str(out)}}]
    )
    tokenizer = config.tokenizer.build(config.text)
    config = config.with_vocabulary(tokenizer)
    trainer = build_trainer(config, tokenizer)
    result = run_trainer(trainer, config)
    if result.stopped_by is not None:
        return stopped(result, trainer)

    model = trainer.model.eval()
    gguf = out / f"{out.name}.gguf"
    export_hf(model, tokenizer, out / "hf")
    print(f"wrote    {out / 'hf'} (for transformers)")
    exported = export_gguf(model, tokenizer, gguf, file_type="F16")
    print(
        f"wrote    {gguf} ({exported.file_type}, {gguf.stat().st_size / 1e6:.1f} MB, for LM Studio, Ollama, llama.cpp)"
    )
    code = _verify(gguf, trainer.model, tokenizer)
    print(f"""
What to type next:
  {program()} generate {out} --prompt "The "
  {program()} export {out} --gguf {out.name}-q8.gguf --file-type Q8_0
  {program()} info {gguf}
  {program()} train YOUR-TEXT.txt""")
    return code


# Two minutes of two CPU cores. Pieces of words, since a model of characters would spend them on learning to spell; a context of
# 256, since llama.cpp runs no shorter one, and text beyond the trained positions is no good; a large learning rate, for so few steps.
_SETTINGS = {
    "tokenizer": {"kind": "bpe", "vocab_size": 1_024},
    "model": {"block_size": 256},
    "train": {
        "micro_batch_size": 4,
        "lr": 4e-3,
        "min_lr": 1e-4,
        "eval_every_steps": 300,
        "sample_every_steps": 300,
        "sample_tokens": 80,
        "save_every_steps": 300,
    },
}


def write_python_reference(path: Path) -> Path:
    """Write the Python language reference that every CPython carries, about 465 KB of English prose, to `path`."""
    from pydoc_data.topics import topics

    from llmforge.formats.atomic import atomic_file

    with atomic_file(path) as tmp:
        tmp.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8", newline="\n")
    return path


def _verify(gguf: Path, model: object, tokenizer: object) -> int:
    """Check the GGUF in llama.cpp where it is installed; 1 if it computes something else."""
    from llmforge.deploy import verify_gguf

    try:
        report = verify_gguf(gguf, model, tokenizer)  # type: ignore[arg-type]
    except ConvertError as error:
        print(f"not verified: {error}", file=sys.stderr)
        return 0
    print(report)
    return 0 if report.passed else 1


def _free_folder(folder: Path) -> Path:
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free
