"""The loss curve of a run as a PNG, drawn by matplotlib."""

from pathlib import Path


def write_loss_curve(log: Path, png: Path) -> None:
    """Draw training and validation loss of a log.jsonl over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llmforge.formats.atomic import atomic_file
    from llmforge.training import read_log

    lines = read_log(log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=png.resolve().parent.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_file(png) as tmp:
        figure.savefig(tmp, dpi=120, format="png")
