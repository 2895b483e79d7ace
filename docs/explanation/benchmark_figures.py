"""Draw the tables of the benchmarks page from `benchmarks/results/`, without measuring anything.

    python docs/explanation/benchmark_figures.py

A bar is the median of the rounds, the thin line its quartiles. What is not measured yet is left out.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from _drawing import BLUE, GRAY, ORANGE, STYLE
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Row = Mapping[str, Any]


class Panel(NamedTuple):
    """One group of bars: which rows of which file, and the number to draw."""

    file: str
    title: str
    value: str  # a field of the row
    group: str = ""  # rows whose name starts so; it is not repeated in the labels
    longer: bool = True  # whether longer bars are better


PICTURES: dict[str, list[Panel]] = {
    "training_step": [
        Panel(
            "training_step", "forward and backward, times the speed of plain PyTorch", "speed", "forward + backward, "
        ),
        Panel("training_step", "peak memory of training, MiB", "peak_mib", "whole step, ", longer=False),
    ],
    "training_step_d12": [
        Panel(
            "training_step-d12",
            "forward and backward, times the speed of plain PyTorch",
            "speed",
            "forward + backward, ",
        ),
        Panel("training_step-d12", "peak memory of training, MiB", "peak_mib", "whole step, ", longer=False),
    ],
    "peers": [
        Panel("training_step_peers", "forward and backward, tokens/s", "tokens_per_second"),
        Panel("training_step_peers", "peak memory, MiB", "peak_mib", longer=False),
    ],
    "loss": [
        Panel("loss", "times the speed of the plain formula", "speed"),
        Panel("loss", "extra memory, MiB", "extra_mib", longer=False),
    ],
    "optimizer_step": [
        Panel("optimizer_step", "times the speed of torch's, computing in float32", "speed"),
        Panel("optimizer_step", "extra memory, MiB", "extra_mib", longer=False),
    ],
    "decode": [
        Panel("decode", "batch 1, tokens/s", "tokens_per_second", "batch 1, "),
        Panel("decode", "batch 8, tokens/s", "tokens_per_second", "batch 8, "),
        Panel("decode", "batch 16, tokens/s", "tokens_per_second", "batch 16, "),
    ],
    "attention": [Panel("attention", "times the speed of full attention", "speed")],
}


def rows_of(panel: Panel) -> list[Row]:
    """Return the rows of a panel, or none if the file is missing."""
    path = RESULTS / f"{panel.file}.json"
    if not path.exists():
        return []
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return [row for row in rows if row["variant"].startswith(panel.group) and row.get(panel.value) is not None]


def ours(name: str) -> bool:
    """Return whether a row is the library's own."""
    return any(word in name for word in ("tinygpt", "LMHead", "MuonAdamW", "the same", "window"))


def draw(panels: list[Panel]) -> Figure | None:
    """Draw the panels beside each other; None if nothing was measured."""
    found = [(panel, rows) for panel in panels if (rows := rows_of(panel))]
    if not found:
        return None
    tallest = max(len(rows) for _, rows in found)
    page = Figure(figsize=(9, 0.3 * tallest + 0.8), layout="constrained")
    for axes, (panel, rows) in zip(page.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for place, row in enumerate(reversed(rows)):
            value = row[panel.value]
            axes.barh(place, value, color=BLUE if ours(row["variant"]) else GRAY, height=0.62)
            end = value
            if panel.value == "speed":
                axes.plot(row["speed_quartiles"], [place, place], color=ORANGE, lw=1.2)
                end = max(value, row["speed_quartiles"][1])
            text = f"{value:.2f}" if value < 100 else f"{value:,.0f}"
            axes.annotate(text, (end, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row["variant"].removeprefix(panel.group) for row in reversed(rows)])
        axes.set_title(f"{panel.title}\n({'longer' if panel.longer else 'shorter'} is better)", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.16 * max(row[panel.value] for row in rows))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "benchmarks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, panels in PICTURES.items():
            if (page := draw(panels)) is not None:
                path = args.out / f"{name}.svg"
                page.savefig(path, transparent=True, metadata={"Date": None})
                print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
