"""llmforge chat: a conversation with a model, in the form that it was tuned for."""

import argparse
import sys

from llmforge.cli.generate import add_sampling_arguments, sampling_options
from llmforge.cli.model import add_device_arguments, add_model_arguments, load_model
from llmforge.errors import DataError

HELP = "talk with a model that was tuned for it"
DESCRIPTION = """Talk with a model in the form of its chat template. Empty line or Ctrl-D: end. /new: begin anew."""
EXAMPLES = """examples:
  llmforge chat HuggingFaceTB/SmolLM2-135M-Instruct
  llmforge chat tutor/ --system "You answer in one sentence." --temperature 0.3
  llmforge chat model.gguf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_sampling_arguments(parser, max_new_tokens=512)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from llmforge.generation import stream_text
    from llmforge.tokenizers import chat_ids

    model, tokenizer = load_model(args, device=args.device)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{args.model} has no chat template: it continues texts and does not answer; use llmforge generate"
        )
    context: int = model.context_length
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(beginning)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            said = ""
        if not said:
            return 0
        if said == "/new":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": said})
        ids = chat_ids(tokenizer, messages)
        while len(ids) + args.max_new_tokens > context and len(messages) > len(beginning) + 1:
            del messages[len(beginning) : len(beginning) + 2]  # the oldest question and its answer
            ids = chat_ids(tokenizer, messages)
        answer = ""
        for piece in stream_text(model, tokenizer, ids, **sampling_options(args)):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
