"""llmforge export: a trained model as files that other programs read."""

import argparse
from pathlib import Path

from llmforge.cli.bar import Bar
from llmforge.cli.model import add_model_arguments, find_tokenizer, load_model
from llmforge.cli.program import program
from llmforge.cli.types import add_type_arguments, type_options
from llmforge.errors import ConfigError

HELP = "write a GGUF file or a Hugging Face folder"
DESCRIPTION = """Write a model as a GGUF file (LM Studio, Ollama, llama.cpp), as a Hugging Face folder (transformers), or both.
It goes from file to file some rows of a tensor at a time, in half a gigabyte of memory. An adapter is merged on the way. An export
that was killed goes on where it stopped when it is started again."""
EXAMPLES = """examples:
  llmforge export runs/quijote --gguf quijote.gguf                     16-bit floats
  llmforge export runs/quijote --gguf quijote.gguf --file-type Q8_0    half the size, nearly the same text
  llmforge export runs/quijote --gguf quijote.gguf --file-type Q4_K_M  less than a third of it
  llmforge export runs/quijote --gguf q4.gguf --file-type Q4_K_M --report --report-text other.txt
  llmforge export runs/quijote --hf out/quijote                        for AutoModelForCausalLM
  llmforge export base/ --gguf base.gguf --file-type BF16              a downloaded Llama, Mistral or Qwen
  llmforge export base/ --adapter runs/tutor --gguf tutor.gguf --file-type Q4_K_M
  llmforge export base/ --adapter runs/tutor --adapter-gguf lora.gguf  the adapter alone, for a GGUF of the base
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file to write")
    add_type_arguments(parser, default="F16")
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure what the GGUF's type costs, show a table and write it as JSON (default: beside the GGUF)",
    )
    parser.add_argument(
        "--report-text",
        metavar="FILE",
        help="text for --report, best one that the model has not seen (default: its own)",
    )
    parser.add_argument("--hf", metavar="FOLDER", help="Hugging Face folder to write")
    parser.add_argument(
        "--adapter-gguf",
        metavar="FILE",
        help="GGUF LoRA to write, of --adapter alone: to be applied to a GGUF of the model",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the Hugging Face weights (default: as they are)",
    )
    parser.add_argument(
        "--ternary",
        choices=("bitlinear", "autobitlinear", "latent"),
        default="bitlinear",
        help="form of ternary weights in the folder: packed for either linear_class of transformers, or the float weights of training "
        "(default: bitlinear)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a Hugging Face folder that exists")


def run(args: argparse.Namespace) -> int:
    if args.gguf is None and args.hf is None and args.adapter_gguf is None:
        raise ConfigError("say what to write: --gguf FILE, --hf FOLDER, or both; or --adapter-gguf FILE")
    if args.adapter_gguf is not None and args.adapter is None:
        raise ConfigError("--adapter-gguf writes an adapter; say which one: --adapter FOLDER, after its base")
    if args.report is not None and args.gguf is None:
        raise ConfigError("--report measures a GGUF; say which one to write: --gguf FILE")
    import torch

    from llmforge.convert import export_gguf, export_hf, open_model

    if args.adapter_gguf is not None:
        _adapter_gguf(args)
    if args.gguf is None and args.hf is None:
        return 0
    model, tokenizer = open_model(
        args.model,
        checkpoint=args.checkpoint,
        revision=args.revision,
        adapter=args.adapter,
        merge_base=args.merge_base,
    )
    tokenizer = find_tokenizer(args, tokenizer)
    if args.hf is not None:
        if args.gguf is not None:
            tokenizer.gguf_vocabulary()  # one that has none is refused before anything is written
        dtype = getattr(torch, args.dtype) if args.dtype is not None else None
        report = export_hf(
            model,
            tokenizer,
            args.hf,
            dtype=dtype,
            ternary=args.ternary,
            overwrite=args.overwrite,
            progress=Bar("bytes"),
        )
        for note in report.notes:
            print(f"note: {note}")
        print(f"wrote {args.hf} (Hugging Face, {report.file_type})")
    if args.gguf is not None:
        report = export_gguf(model, tokenizer, args.gguf, progress=Bar("weights"), **type_options(args))
        for note in report.notes:
            print(f"note: {note}")
        size = f"{report.bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits per weight with all that is in the file"
        print(f"wrote {args.gguf} ({report.file_type}, {size})")
        if args.report is not None:
            _report(args)
        print(f"next  {program()} verify {args.gguf} {args.model}{_adapter_options(args)}")
    return 0


def _adapter_options(args: argparse.Namespace) -> str:
    options = "" if args.adapter is None else f" --adapter {args.adapter}"
    return options if args.merge_base is None else f"{options} --merge-base {args.merge_base}"


def _adapter_gguf(args: argparse.Namespace) -> None:
    from llmforge.convert.adapter_gguf import export_adapter_gguf
    from llmforge.convert.load import find_adapter, find_model

    base = find_model(args.model, checkpoint=args.checkpoint, revision=args.revision)
    report = export_adapter_gguf(find_adapter(args.adapter), base, args.adapter_gguf)
    for note in report.notes:
        print(f"note: {note}")
    print(f"wrote {args.adapter_gguf} (adapter, {report.file_type}, {report.bytes / 1e6:.1f} MB)")


def _report(args: argparse.Namespace) -> None:
    from llmforge.deploy import quantization_report
    from llmforge.tokenizers.text_files import read_text

    model, tokenizer = load_model(args)
    text = "".join(read_text(args.report_text)) if args.report_text is not None else None
    report = quantization_report(args.gguf, model, tokenizer, text=text)
    path = Path(args.report) if args.report else Path(args.gguf).with_suffix(".report.json")
    report.save(path)
    print(report)
    print(f"wrote {path}")
