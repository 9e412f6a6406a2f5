"""`llmforge`: reads the command line, runs one command, turns errors into one clear message and exit code 2."""

import argparse
import sys
import warnings
from collections.abc import Sequence

import llmforge
from llmforge.cli import (
    chat,
    compare,
    demo,
    deploy,
    export,
    finetune,
    generate,
    imatrix,
    info,
    merge,
    quantize,
    runs,
    sweep,
    train,
    verify,
)
from llmforge.cli.program import first_speaks
from llmforge.errors import LLMForgeError

# None of these modules imports torch before its `run` is called: `llmforge --help` answers at once.
_COMMANDS = {
    "demo": demo,
    "train": train,
    "sweep": sweep,
    "generate": generate,
    "chat": chat,
    "finetune": finetune,
    "merge": merge,
    "export": export,
    "quantize": quantize,
    "imatrix": imatrix,
    "verify": verify,
    "compare": compare,
    "deploy": deploy,
    "info": info,
    "runs": runs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 bad input, 128 + signal when a signal stopped the run."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    for stream in (sys.stdout, sys.stderr):  # a Windows console may lack characters of the model's text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    speaker = first_speaks()
    try:
        return int(_COMMANDS[args.command].run(args))
    except LLMForgeError as error:
        if args.debug:
            raise
        print(f"{speaker}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmforge generate ... | head`
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmforge",
        description="From your own text to a language model that runs on your desktop.",
        epilog="New here? Type: llmforge demo",
    )
    parser.add_argument("--version", action="version", version=f"llmforge {llmforge.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(command)
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)
