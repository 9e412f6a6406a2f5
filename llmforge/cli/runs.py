"""llmforge runs: the runs there are, and several of them in one picture."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.errors import CheckpointError, ConfigError, some

if TYPE_CHECKING:
    from llmforge.cli.run_folder import Run

HELP = "list runs, and compare them in one picture"
DESCRIPTION = "List the runs in a folder (default: runs), or draw the curves of several in one picture with what differs between them."
EXAMPLES = """examples:
  llmforge runs                                             all under runs/, the newest first
  llmforge runs runs/sweep --sort best                      those of a folder, the best validation loss first
  llmforge runs --compare runs/a runs/b --out compare.png   both curves, and the settings that differ
  llmforge runs --compare runs/a runs/b --by time --out compare.html
  llmforge runs --compare runs/a --out a.html               one run, while it is running
"""

_SORTS = ("when", "name", "size", "steps", "val", "best", "speed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="run folders, or folders of them (default: runs)")
    parser.add_argument(
        "--sort", choices=_SORTS, default="when", help="order of the list (default: when, newest first)"
    )
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="draw these runs in one picture")
    parser.add_argument("--out", metavar="FILE", help="of --compare: .png, .svg, .pdf or .html (default: compare.png)")
    parser.add_argument("--by", choices=("step", "tokens", "time"), default="step", help="of --compare: the x axis")
    parser.add_argument(
        "--metric",
        choices=("loss", "bits"),
        default="loss",
        help="of --compare: loss per token, or bits per byte, which is comparable between tokenizers",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.compare is not None:
        return _compare(args)
    if args.out is not None:
        raise ConfigError(
            "--out is the picture of --compare; name the runs to draw: llmforge runs --compare A B --out FILE"
        )
    runs, others = _find(args.folders)
    runs.sort(key=lambda run: _sort_key(run, args.sort))
    if args.json:
        print(json.dumps([_record(run) for run in runs], indent=2))
    elif runs:
        _print_table(runs)
    for run in runs:
        for text in run.damage:
            print(f"warning: {text}", file=sys.stderr)
    if others:
        print(f"note: no runs in {some([str(folder) for folder in others])}", file=sys.stderr)
    if not runs and not args.json:
        print("no runs yet; llmforge train TEXT makes one")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from llmforge.cli.loss_curve import comparison, write_page, write_picture
    from llmforge.cli.run_folder import is_run, read_run

    if args.folders:
        raise ConfigError(f"name all runs after --compare, {args.folders[0]!r} too")
    folders = list(dict.fromkeys(Path(name) for name in args.compare))
    for folder in folders:
        if not folder.is_dir() or not is_run(folder):
            raise CheckpointError(
                f"{folder} is no run folder: it has no log.jsonl; llmforge runs lists those there are"
            )
    runs = [read_run(folder, name=name) for folder, name in zip(folders, _names(folders), strict=True)]
    out = Path(args.out or "compare.png")
    if out.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise ConfigError(f"--out ({out}) must end in .png, .svg, .pdf or .html")
    for item in runs:
        for text in item.damage:
            print(f"warning: {text}", file=sys.stderr)
    sizes = {item.vocab_size for item in runs if item.vocab_size is not None}
    if args.metric == "loss" and len(sizes) > 1:
        print(
            f"note: vocabularies of {', '.join(f'{size:,}' for size in sorted(sizes))} tokens: their losses per token do not compare; "
            "--metric bits draws bits per byte",
            file=sys.stderr,
        )
    write = write_page if out.suffix == ".html" else write_picture
    write(runs, out, by=args.by, metric=args.metric)
    rows, of_some = comparison(runs)
    if args.json:
        print(
            json.dumps(
                {"runs": [_record(run) for run in runs], "differences": {**rows, **of_some}, "out": str(out)},
                indent=2,
                default=str,
            )
        )
        return 0
    cells = [[name, *(_cell(value) for value in row)] for name, row in rows.items()]
    print(_aligned([["", *(run.name for run in runs)], *cells], left=1))
    if of_some:
        print(
            f"and {len(of_some)} settings that only some of them have: {some(list(of_some))}; a page (--out FILE.html) has them"
        )
    print(f"\nfiles    {out}")
    return 0


def _find(names: Sequence[str]) -> tuple[list["Run"], list[Path]]:
    """The runs in the folders, each named by its path from there; and the folders without one."""
    from llmforge.cli.run_folder import find_runs, read_run

    runs, others = [], []
    tops = [Path(name) for name in names] or [Path("runs")]
    for top in tops:
        if not top.is_dir():
            if names:
                raise CheckpointError(f"{top} is no folder; name one with runs in it")
            continue
        for folder, found in find_runs(top):
            if found:
                inside = folder.relative_to(top).as_posix() if folder != top else folder.resolve().name
                runs.append(read_run(folder, name=inside))
            else:
                others.append(folder)
    return runs, others


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that differ: the last part of each path, or the whole path where two have the same."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def _sort_key(run: "Run", by: str) -> Any:
    key = {
        "name": run.name,
        "when": -run.modified,
        "size": -(run.parameters or 0) if by == "size" else 0,
        "steps": -run.step,
        "val": run.last("val_loss"),
        "best": run.best[1] if run.best else None,
        "speed": -(run.tokens_per_second or 0),
    }[by]
    return (key is None, key if key is not None else 0, run.name)


def _record(run: "Run") -> dict[str, Any]:
    """A run for machines."""
    best_step, best_loss = run.best or (None, None)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "family": run.family,
        "parameters": run.parameters,
        "step": run.step,
        "max_steps": run.max_steps,
        "train_loss": run.last("loss"),
        "val_loss": run.last("val_loss"),
        "best_val_loss": best_loss,
        "best_step": best_step,
        "bits_per_byte": run.last("val_bits_per_byte"),
        "tokens": run.last("tokens"),
        "tokens_per_second": run.tokens_per_second,
        "mfu": run.last("mfu"),
        "state": run.state,
        "modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.modified)),
        "damage": list(run.damage),
    }


def _print_table(runs: Sequence["Run"]) -> None:
    from llmforge.cli.loss_curve import short

    heads = ["run", "model", "size", "steps", "val", "best", "bits/B", "tok/s", "MFU", "state", "when"]
    rows = []
    for run in runs:
        best, mfu = run.best, run.last("mfu")
        steps = f"{run.step}/{run.max_steps}" if run.max_steps is not None else str(run.step)
        rows.append(
            [
                run.name if len(run.name) <= 32 else f"...{run.name[-29:]}",
                run.family or "-",
                short(run.parameters) or "-",
                steps,
                _number(run.last("val_loss")),
                _number(best[1] if best else None),
                _number(run.last("val_bits_per_byte")),
                short(run.tokens_per_second) or "-",
                f"{mfu:.0%}" if mfu is not None else "-",
                run.state,
                _ago(time.time() - run.modified),
            ]
        )
    shown = [column for column in range(len(heads)) if any(row[column] != "-" for row in rows)]
    # On a narrow terminal the least important columns are left out.
    width = shutil.get_terminal_size((1000, 24)).columns
    for least in ("MFU", "model", "bits/B", "size", "tok/s", "best", "state"):
        table = _aligned([[row[column] for column in shown] for row in (heads, *rows)], left=2 if 1 in shown else 1)
        if max(map(len, table.splitlines())) <= width:
            break
        shown = [column for column in shown if heads[column] != least]
    print(_aligned([[row[column] for column in shown] for row in (heads, *rows)], left=2 if 1 in shown else 1))


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Rows in columns, the first `left` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(value: Any) -> str:
    text = "-" if value is None else " ".join(str(value).split())
    return text if len(text) <= 30 else f"{text[:14]}...{text[-13:]}"


def _ago(seconds: float) -> str:
    """How long ago, in one unit.

    >>> _ago(5), _ago(7300), _ago(86400 * 3)
    ('now', '2 h ago', '3 d ago')
    """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "now"
