"""Pictures of evaluations: bits per byte by domain, loss by position, the tasks of CORE."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from tinygpt.errors import ConfigError
from tinygpt.evals import CoreReport, DomainReport, PositionCurve
from tinygpt.report._figure import new_figure, plain_axes, plain_text, save_figure

_Report = TypeVar("_Report", CoreReport, DomainReport, PositionCurve)
_COLORS = ("#08519c", "#a63603", "#31a354", "#54278f", "#636363", "#d6a300", "#0a9396", "#c51b8a")


def plot_domains(reports: DomainReport | Mapping[str, DomainReport], picture: str | Path) -> Path:
    """Draw bits per byte of each domain as bars.

    Args:
        reports: One report, or several by name, such as one a model; the domains are those of the first.
        picture: Where to write; the suffix decides the format.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: If there is no report, or the domains of two differ.
        MissingDependencyError: If matplotlib is not installed.

    Example:
        ```python
        from tinygpt.evals import BpbReport, DomainReport
        from tinygpt.report import plot_domains

        prose = BpbReport(bpb=1.02, loss=2.9, num_tokens=1000, num_bytes=4100, data_hash="5f1c")
        code = BpbReport(bpb=0.81, loss=2.1, num_tokens=1000, num_bytes=3700, data_hash="77ab")
        plot_domains(DomainReport({"prose": prose, "code": code}), "domains.png")
        ```
    """
    named = {"": reports} if isinstance(reports, DomainReport) else _some(reports)
    domains = list(next(iter(named.values())).domains)
    for name, report in named.items():
        if set(report.domains) != set(domains):
            raise ConfigError(
                f"{name!r} has the domains {', '.join(report.domains)}; the first has {', '.join(domains)}."
            )
    height = 0.8 / len(named)
    figure = new_figure(8, 1.2 + (0.35 + 0.25 * len(named)) * len(domains))
    axes = figure.subplots()
    for index, (name, report) in enumerate(named.items()):
        places = [place + (index - (len(named) - 1) / 2) * height for place in range(len(domains))]
        values = [report[domain].bpb for domain in domains]
        bars = axes.barh(places, values, height=height, color=_COLORS[index % len(_COLORS)], label=plain_text(name))
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axes.set_yticks(range(len(domains)), [plain_text(domain) for domain in domains])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("bits per byte")
    plain_axes(axes, grid="x")
    if len(named) > 1:
        figure.legend(loc="outside lower center", ncols=len(named), frameon=False)
    return save_figure(figure, picture)


def plot_positions(curves: PositionCurve | Mapping[str, PositionCurve], picture: str | Path) -> Path:
    """Draw bits per byte against the position in the row, with a band of one standard error to each side.

    Args:
        curves: One curve, or several by name.
        picture: Where to write; the suffix decides the format.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: If there is no curve.
        MissingDependencyError: If matplotlib is not installed.

    Example:
        ```python
        from tinygpt.evals import PositionCurve
        from tinygpt.report import plot_positions

        curve = PositionCurve(
            starts=(0, 512),
            ends=(512, 1024),
            loss=(3.1, 2.9),
            loss_error=(0.02, 0.02),
            bpb=(1.01, 0.95),
            bpb_error=(0.01, 0.01),
            num_tokens=(51_200, 51_200),
            data_hash="5f1c",
        )
        plot_positions(curve, "positions.png")
        ```
    """
    named = {"": curves} if isinstance(curves, PositionCurve) else _some(curves)
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    for index, (name, curve) in enumerate(named.items()):
        color = _COLORS[index % len(_COLORS)]
        x = [(start + end - 1) / 2 for start, end in zip(curve.starts, curve.ends, strict=True)]
        errors = [0.0 if math.isnan(error) else error for error in curve.bpb_error]
        low = [value - error for value, error in zip(curve.bpb, errors, strict=True)]
        high = [value + error for value, error in zip(curve.bpb, errors, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        marker = "o" if len(x) <= 64 else None
        axes.plot(x, curve.bpb, color=color, marker=marker, markersize=4, linewidth=1.5, label=plain_text(name))
    axes.set_xlabel("position in the row (tokens read before, less one)")
    axes.set_ylabel("bits per byte")
    plain_axes(axes)
    if len(named) > 1:
        axes.legend(frameon=False)
    return save_figure(figure, picture)


def plot_core(reports: CoreReport | Mapping[str, CoreReport], picture: str | Path) -> Path:
    """Draw the centered accuracy of each task of CORE with its interval; 0 is guessing.

    Args:
        reports: One report, or several by name; the tasks are those of the first.
        picture: Where to write; the suffix decides the format.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: If there is no report, or the tasks of two differ.
        MissingDependencyError: If matplotlib is not installed.
    """
    named = {"": reports} if isinstance(reports, CoreReport) else _some(reports)
    labels = [task.label for task in next(iter(named.values())).tasks]
    for name, report in named.items():
        if {task.label for task in report.tasks} != set(labels):
            raise ConfigError(f"{name!r} has other tasks than the first report: {', '.join(labels)}.")
    figure = new_figure(8, 1.6 + 0.3 * (len(labels) + 1) * (0.6 + 0.4 * len(named)))
    axes = figure.subplots()
    for index, (name, report) in enumerate(named.items()):
        values = [*(report[label].centered for label in labels), report.core]
        intervals = [*(report[label].interval for label in labels), report.interval]
        shift = (index - (len(named) - 1) / 2) * 0.8 / len(named)
        places = [place + shift for place in range(len(values))]
        color = _COLORS[index % len(_COLORS)]
        axes.hlines(places, *zip(*intervals, strict=True), color=color, linewidth=1.2, alpha=0.6)
        label = f"{plain_text(name)} CORE {report.core:.4f}".strip()
        axes.plot(values, places, "o", color=color, markersize=5, label=label)
    axes.axvline(0, color="#636363", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(labels) + 1), [*map(plain_text, labels), "CORE"])
    axes.invert_yaxis()
    axes.set_xlabel("centered accuracy: 0 is guessing, 1 is perfect; lines hold 95 % of bootstrap draws")
    plain_axes(axes, grid="x")
    figure.legend(loc="outside lower center", ncols=min(4, len(named)), frameon=False)
    return save_figure(figure, picture)


def _some(reports: Mapping[str, _Report]) -> Mapping[str, _Report]:
    if not reports:
        raise ConfigError("there is nothing to draw; give at least one report.")
    return reports
