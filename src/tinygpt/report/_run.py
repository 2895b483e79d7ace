"""The picture of a run, drawn from its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygpt.errors import DataError
from tinygpt.metrics import read_metrics
from tinygpt.report._figure import new_figure, save_figure

_SMOOTHING = 0.9


def plot_run(
    metrics_file: str | Path, picture: str | Path, *, title: str = "", unigram_bpb: float | None = None
) -> Path:
    """Draw loss, validation bits per byte, learning rate and weight decay against steps.

    Args:
        metrics_file: The `metrics.jsonl` of a run, or its folder; evaluations are its lines with event `"evaluation"`
            and a `bpb`.
        picture: Where to write; the suffix decides the format, `.png` or `.svg` for example.
        title: Text above.
        unigram_bpb: Draw this baseline into the panel of bits per byte.

    Returns:
        The path of the picture.

    Raises:
        DataError: If the file holds no step.
        MissingDependencyError: If matplotlib is not installed.
    """
    metrics_file = Path(metrics_file)
    if metrics_file.is_dir():
        metrics_file = metrics_file / "metrics.jsonl"
    if not metrics_file.exists():
        raise DataError(f"there is no {metrics_file}.")
    records = read_metrics(metrics_file)
    if not drawable_steps(records):
        raise DataError(f"{metrics_file} holds no training step to draw.")
    return draw_records(records, picture, title=title, unigram_bpb=unigram_bpb)


def drawable_steps(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps that have every number of the picture; one that was not finite is null in the file."""
    return [
        record
        for record in records
        if record.get("event") == "step"
        and all(isinstance(record.get(name), int | float) for name in ("loss", "lr", "weight_decay"))
    ]


def draw_records(
    records: Sequence[dict[str, Any]], picture: str | Path, *, title: str = "", unigram_bpb: float | None = None
) -> Path:
    """Draw the lines of a metrics file, with at least one drawable step; see `plot_run`."""
    steps = drawable_steps(records)
    evaluations = [
        record
        for record in records
        if record.get("event") == "evaluation" and isinstance(record.get("bpb"), int | float)
    ]
    figure = new_figure(8, 8)
    loss_axes, bpb_axes, rate_axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    x = [record["step"] + 1 for record in steps]
    losses = [record["loss"] for record in steps]
    loss_axes.plot(x, losses, color="#9ecae1", linewidth=0.8, label="each step")
    loss_axes.plot(x, _smooth(losses), color="#08519c", linewidth=1.8, label="smoothed")
    loss_axes.set_ylabel("training loss (nats per token)")
    loss_axes.legend(frameon=False)
    if evaluations:
        points = [(record["step"] + 1, record["bpb"]) for record in evaluations]
        bpb_axes.plot(*zip(*points, strict=True), color="#a63603", marker="o", markersize=4, label="validation")
        bpb_axes.annotate(f"{points[-1][1]:.3f}", points[-1], xytext=(-4, 8), textcoords="offset points", ha="right")
    if unigram_bpb is not None:
        bpb_axes.axhline(unigram_bpb, color="#636363", linestyle="--", linewidth=1, label="unigram baseline")
    bpb_axes.set_ylabel("validation (bits per byte)")
    if evaluations or unigram_bpb is not None:
        bpb_axes.legend(frameon=False)
    _draw_rates(rate_axes, x, steps)
    resumes = [record["step"] + 1 for record in records if record.get("event") == "resume"]
    for axes in (loss_axes, bpb_axes, rate_axes):
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top"]].set_visible(False)
        for step in resumes:
            axes.axvline(step, color="#31a354", linestyle=":", linewidth=1.2)
    for step in resumes[:1]:
        loss_axes.text(step, 0.98, " resumed", color="#31a354", va="top", transform=loss_axes.get_xaxis_transform())
    if title:
        figure.suptitle(title)
    return save_figure(figure, picture)


def _draw_rates(axes: Any, x: list[int], steps: list[dict[str, Any]]) -> None:
    axes.plot(x, [record["lr"] for record in steps], color="#54278f", label="learning rate (left)")
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.plot(x, [record["weight_decay"] for record in steps], color="#e6550d", label="weight decay (right)")
    right.set_ylabel("weight decay")
    right.set_ylim(bottom=0)
    right.spines[["top"]].set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], frameon=False)


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average without the pull of its start towards zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append(total / weight)
    return smoothed
