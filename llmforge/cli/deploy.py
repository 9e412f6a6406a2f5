"""llmforge deploy: a GGUF into LM Studio, Ollama or a folder."""

import argparse

from llmforge.cli.bar import Bar

HELP = "give a GGUF to LM Studio or Ollama, or put it into a folder"
DESCRIPTION = """Copy a GGUF to where LM Studio looks for models, write Ollama's Modelfile for it and run `ollama create`, or fill a folder to
give away. It says what it did and what to type next."""
EXAMPLES = """examples:
  llmforge deploy tutor.gguf --to lmstudio
  llmforge deploy tutor.gguf --to ollama --name tutor --system "You explain code to beginners."
  llmforge deploy tutor.gguf --to out/tutor                         the file, a Modelfile and a README
  llmforge deploy adapter.gguf --to ollama --base llama3:8b         a LoRA adapter on a model of Ollama's
  llmforge deploy tutor.gguf --to lmstudio --dry-run                say what it would do
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gguf", help="GGUF file")
    parser.add_argument("--to", required=True, metavar="TARGET", help="ollama, lmstudio or a folder")
    parser.add_argument("--name", help="of the model there (default: from the file's name)")
    parser.add_argument(
        "--publisher", default="llmforge", metavar="PUB", help="LM Studio's folder above the model (default: llmforge)"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before a conversation (Modelfile)")
    parser.add_argument(
        "--num-ctx", type=int, metavar="N", help="tokens of context (Modelfile; default: the model's, at most 8192)"
    )
    parser.add_argument("--base", metavar="MODEL", help="of an adapter: its base as a GGUF, or a model of Ollama's")
    parser.add_argument("--models-dir", metavar="FOLDER", help="LM Studio's models folder (default: its own setting)")
    parser.add_argument("--out", metavar="FOLDER", help="where Ollama's Modelfile goes (default: beside the GGUF)")
    parser.add_argument("--link", action="store_true", help="a hard link instead of a copy, on the same disk")
    parser.add_argument("--overwrite", action="store_true", help="replace another model that is there")
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, and do nothing")


def run(args: argparse.Namespace) -> int:
    from llmforge.deploy.place import deploy_gguf

    report = deploy_gguf(
        args.gguf,
        args.to,
        name=args.name,
        publisher=args.publisher,
        system=args.system,
        num_ctx=args.num_ctx,
        base=args.base,
        models_dir=args.models_dir,
        out=args.out,
        link=args.link,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=Bar("B"),
    )
    print(report)
    return 0
