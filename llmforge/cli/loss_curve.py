"""Loss curves of one run or several: as a picture, and as one HTML page that needs no network. Drawn by matplotlib."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmforge.cli.run_folder import Run, differences, flat, read_run

AXES = {"step": "step", "tokens": "tokens read", "time": "hours of training"}
METRICS = {"loss": ("loss", "val_loss", "loss (nats per token)"), "bits": (None, "val_bits_per_byte", "bits per byte")}
_TEXT: Any = {"text.parse_math": False}  # a $ in a name is a $
_ROWS_IN_PICTURE = 20  # of the table under the curves; the page has all
_COLORS = ("#0b6e99", "#d9730d", "#0f7b4f", "#ad1a72", "#6940a5", "#937264", "#c4352d", "#64748b", "#8a8d0f", "#17a2b8")


def write_loss_curve(folder: Path) -> None:
    """Draw loss.png and loss.html of a run from its log.jsonl."""
    # The folder may be "." when the command runs inside it.
    run = read_run(folder, name=folder.resolve().name)
    write_picture([run], folder / "loss.png", by="step", metric="loss")
    write_page([run], folder / "loss.html", by="step", metric="loss")


def write_picture(runs: Sequence[Run], path: Path, *, by: str, metric: str) -> None:
    """Curves of the runs in one picture, and under them the settings in which they differ.

    Args:
        path: .png, .svg or .pdf.
        by: a key of AXES.
        metric: a key of METRICS.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llmforge.formats.atomic import atomic_file

    rows, of_some = comparison(runs) if len(runs) > 1 else ({}, {})
    shown = dict(list(rows.items())[:_ROWS_IN_PICTURE])
    figure = Figure(figsize=(8.5, 4.6 + 0.26 * (len(shown) + 2) * (len(runs) > 1)), layout="constrained")
    FigureCanvasAgg(figure)
    with rc_context(_TEXT):
        if shown:
            axes, below = figure.subplots(2, 1, height_ratios=[4.6, 0.26 * (len(shown) + 2)])
            _draw_table(below, runs, shown, more=len(rows) - len(shown) + len(of_some))
        else:
            axes = figure.add_subplot()
        _draw_curves(axes, runs, by=by, metric=metric)
    with atomic_file(path) as tmp:
        figure.savefig(tmp, dpi=130, format=path.suffix.lstrip(".") or "png")


def write_page(runs: Sequence[Run], path: Path, *, by: str, metric: str) -> None:
    """One HTML file: curves, figures, the settings in which the runs differ (of one run: all of them), and its samples."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from llmforge.formats.atomic import atomic_file

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    drawn = io.StringIO()
    with rc_context(
        {**_TEXT, "svg.fonttype": "none"}
    ):  # letters stay letters: a small file, whose text can be searched
        _draw_curves(figure.add_subplot(), runs, by=by, metric=metric)
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    title = html.escape(" vs ".join(run.name for run in runs))
    body = [f"<h1>{title}</h1>", f'<div class="curve">{svg}</div>']
    if len(runs) > 1:
        names = ["", *(run.name for run in runs)]
        of_all, of_some = comparison(runs)
        body += ["<h2>What differs</h2>", _html_table(names, of_all, runs)]
        if of_some:
            body += ["<details><summary>Settings that only some of them have</summary>"]
            body += [_html_table(names, of_some, runs), "</details>"]
    else:
        body += [_html_table(["", runs[0].name], results(runs), runs)]
        everything = {name: [value] for name, value in flat(runs[0].settings).items()}
        body += ["<details><summary>All settings</summary>", _html_table(["setting", ""], everything), "</details>"]
    for run in runs:
        body += [f"<p class=damage>{html.escape(text)}</p>" for text in run.damage]
        if run.samples:
            body.append(f"<h2>Samples{' of ' + html.escape(run.name) if len(runs) > 1 else ''}</h2>")
        for number, (step, text) in enumerate(reversed(run.samples)):
            opened = " open" if number == 0 else ""
            body.append(
                f"<details{opened}><summary>step {step}</summary><pre>{html.escape(text.strip())}</pre></details>"
            )
    with atomic_file(path) as tmp:
        tmp.write_text(_PAGE.format(title=title, body="\n".join(body)), encoding="utf-8", errors="replace")


def results(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """What came of the runs: name -> value of each, as text."""
    table: dict[str, list[Any]] = {
        "weights": [short(run.parameters) for run in runs],
        "steps": [f"{run.step:,}" + (f" of {run.max_steps:,}" if run.max_steps else "") for run in runs],
        "state": [run.state for run in runs],
        "last validation loss": [_rounded(run.last("val_loss")) for run in runs],
        "best validation loss": [_rounded(run.best[1] if run.best else None) for run in runs],
        "bits per byte": [_rounded(run.last("val_bits_per_byte")) for run in runs],
        "tokens": [short(run.last("tokens")) for run in runs],
        "tokens/s": [short(run.tokens_per_second) for run in runs],
        "MFU": [f"{mfu:.1%}" if (mfu := run.last("mfu")) is not None else None for run in runs],
        "memory": [
            f"{used / 2**30:.1f} GB" if (used := run.last("memory_bytes")) is not None else None for run in runs
        ],
        "device": [run.about.get("device") for run in runs],
        "skipped steps": [short(skipped) if (skipped := run.last("skipped")) else None for run in runs],
    }
    return {name: row for name, row in table.items() if any(value is not None for value in row)}


def comparison(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """What differs between runs: results and the settings that all have; and the settings that only some have."""
    of_all, of_some = differences(runs)
    results_that_differ = {
        name: row for name, row in results(runs).items() if "loss" in name or any(value != row[0] for value in row[1:])
    }
    return {**results_that_differ, **of_all}, of_some


def short(value: float | None) -> str | None:
    """A number as people say it: 820k, 10.7M, 1.24G."""
    if value is None:
        return None
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"
    return f"{value:.0f}"


def _rounded(value: float | None) -> str | None:
    return f"{value:.4f}" if value is not None else None


def _draw_curves(axes: Any, runs: Sequence[Run], *, by: str, metric: str) -> None:
    train_key, val_key, label = METRICS[metric]
    heights: list[float] = []
    for index, run in enumerate(runs):
        color = _COLORS[index % len(_COLORS)]
        places = run.axis(by)
        has_val = False
        for key, is_val in ((val_key, True), (train_key, False)):
            points = [(places[step], value) for step, value in run.values(key) if step in places] if key else []
            if not points:
                continue
            x, y = [point[0] for point in points], [point[1] for point in points]
            if is_val:
                has_val = True
                marker = "o" if len(points) <= 40 else ""
                name = run.name if len(runs) > 1 else "validation"
                val_color = color if len(runs) > 1 else _COLORS[1]
                axes.plot(x, y, color=val_color, marker=marker, markersize=3.5, linewidth=1.8, label=name, zorder=3)
            else:
                name = "training" if len(runs) == 1 else "_" if has_val else run.name
                strong = 0.5 if has_val else 1.0
                if len(y) > 60:  # a noisy one, and what it means
                    axes.plot(x, y, color=color, linewidth=0.7, alpha=0.2, zorder=1)
                    y = _smooth(y)
                axes.plot(x, y, color=color, linewidth=1.2, alpha=strong, label=name, zorder=2)
            heights += y[min(len(y) - 1, len(y) // 20) :]  # the first steps would press all else to the bottom
    axes.set(xlabel=AXES[by], ylabel=label)
    if len(runs) == 1:
        axes.set_title(runs[0].name, loc="left", fontweight="bold")
    elif metric == "loss":
        axes.set_title("validation (strong) and training loss (pale)", loc="left", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if by == "tokens":
        axes.xaxis.set_major_formatter(lambda value, _: short(value) or "")
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
        low, high = min(heights), max(heights)
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
    else:
        axes.text(0.5, 0.5, "nothing logged yet", ha="center", va="center", transform=axes.transAxes, color="gray")


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours to both sides, about a twentieth of the curve, so that it does not lag behind."""
    import numpy as np

    reach = max(1, len(values) // 40)
    window = np.hanning(2 * reach + 3)[1:-1]
    sums = np.convolve(values, window, mode="full")[reach : reach + len(values)]
    weights = np.convolve(np.ones(len(values)), window, mode="full")[reach : reach + len(values)]
    return [float(value) for value in sums / weights]


def _draw_table(axes: Any, runs: Sequence[Run], rows: dict[str, list[Any]], *, more: int) -> None:
    axes.axis("off")
    names = [*rows, f"... and {more} more settings"] if more else list(rows)
    cells = [[_cell(value) for value in row] for row in rows.values()] + [[""] * len(runs)] * bool(more)
    table = axes.table(
        cellText=cells,
        rowLabels=names,
        colLabels=[_cell(run.name) for run in runs],
        loc="center",
        cellLoc="right",
        colLoc="right",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    table.scale(1, 1.25)
    for (row, column), cell in table.get_celld().items():
        cell.set_linewidth(0)
        cell.visible_edges = ""
        if row == 0 and column >= 0:
            cell.set_text_props(color=_COLORS[column % len(_COLORS)], fontweight="bold")
        elif row % 2:
            cell.set_facecolor("#f4f5f6")


def _cell(value: Any) -> str:
    text = "-" if value is None else " ".join(str(value).split())
    return text if len(text) <= 24 else f"...{text[-21:]}"


def _html_table(heads: Sequence[str], rows: dict[str, list[Any]], runs: Sequence[Run] = ()) -> str:
    colors = ["inherit", *(_COLORS[index % len(_COLORS)] for index in range(len(runs)))] if len(runs) > 1 else []
    head = "".join(
        f'<th style="color:{colors[index]}">{html.escape(text)}</th>' if colors else f"<th>{html.escape(text)}</th>"
        for index, text in enumerate(heads)
    )
    lines = [
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape('-' if value is None else str(value))}</td>" for value in row)
        + "</tr>"
        for name, row in rows.items()
    ]
    return f"<table><thead><tr>{head}</tr></thead>\n{chr(10).join(lines)}</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.curve svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th, td {{ padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e7ea; overflow-wrap: anywhere; }}
tr > th:first-child {{ font-weight: 400; color: #59636e; }}
td {{ font-variant-numeric: tabular-nums; }}
details {{ margin: .6rem 0; }} summary {{ cursor: pointer; color: #59636e; }}
pre {{ background: #f6f8fa; padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }}
.damage {{ color: #a40e26; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
