"""Drawing a run, or several over each other; one drawing serves the PNG and, in the page's colors, the SVG."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.report._figure import new_figure, plain_axes, plain_text
from tinygpt.report._log import Floats, RunLog, number, objects, section
from tinygpt.report._page import Chart
from tinygpt.report._statistics import bin_series, rolling_median, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The same in the PNG and, by name, in the page's style, where dark mode has its own.
_COLORS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "line": "#d1d9e0",
    "blue": "#0a58ca",
    "band": "#9ec5fe",
    "orange": "#b35900",
    "green": "#1a7f37",
    "purple": "#6f42c1",
    "red": "#cf222e",
}
_RUN_COLORS = ("blue", "orange", "green", "purple", "red", "muted")
_MOST_POINTS = 400
_TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_WIDTH, _HEIGHT = 5.2, 3.0


def binning_note(log: RunLog) -> str:
    """Say how a long run is drawn; empty for one that is drawn step by step."""
    size = bin_series(log.step.astype(float), log.step.astype(float), _MOST_POINTS).size
    if size == 1:
        return ""
    return (
        f"Too many steps to draw each: a line is the mean of every {size} steps, and the band around it reaches from "
        "their lowest to their highest value."
    )


def draw_run(log: RunLog, *, write: Callable[[str, "Figure"], None]) -> list[Chart]:
    """Draw everything a run logged; a panel without a value is left out."""
    drawings = [
        _draw_series(log, "loss", "Training loss", "nats per token", log["loss"], smoothed=True, clip=True),
        _draw_validation(log),
        _draw_rates(log),
        _draw_series(log, "weight_decay", "Weight decay", "lead group", log["weight_decay"], color="orange"),
        _draw_series(log, "momentum", "Momentum", "lead group", log["momentum"], color="purple"),
        _draw_series(log, "gradient_norm", "Gradient norm", "before clipping", log["grad_norm"], log_scale=True),
        _draw_series(log, "speed", "Speed", "tokens per second", log["tokens_per_second"], from_zero=True),
        _draw_series(log, "memory", "Peak memory", "GiB", log["peak_memory_bytes"] / 2**30, from_zero=True),
    ]
    charts = []
    for drawing in drawings:
        if drawing is not None:
            name, title, caption, figure = drawing
            charts.append(Chart(name, title, caption, to_svg(figure, name)))
            write(name, figure)
    return charts


_Drawing = tuple[str, str, str, "Figure"]


def _draw_series(
    log: RunLog,
    name: str,
    title: str,
    unit: str,
    values: Floats,
    *,
    color: str = "blue",
    smoothed: bool = False,
    log_scale: bool = False,
    from_zero: bool = False,
    clip: bool = False,
) -> _Drawing | None:
    known = np.isfinite(values) & ((values > 0) | (not log_scale))
    if not known.any():
        return None
    figure, axes = _panel(unit)
    x, y = log.step[known].astype(float), values[known]
    bins = bin_series(x, y, _MOST_POINTS)
    caption = ""
    if bins.size > 1:
        axes.fill_between(bins.x, bins.low, bins.high, color=_COLORS["band"], linewidth=0)
        axes.plot(bins.x, bins.mean, color=_COLORS[color], linewidth=1.3)
    elif smoothed and len(y) > 20:
        window = max(5, len(y) // 20)
        axes.plot(x, y, color=_COLORS["band"], linewidth=0.8)
        axes.plot(x, smooth(y, window), color=_COLORS[color], linewidth=1.5)
        caption = f"Each step, and the mean of the last {window}."
    else:
        axes.plot(x, y, color=_COLORS[color], linewidth=1.3, marker="o" if len(y) < 20 else None, markersize=3)
    if log_scale and float(y.max()) > 5 * float(y.min()):
        axes.set_yscale("log")
    elif from_zero and float(y.max()) > 0:
        axes.set_ylim(0, 1.1 * float(y.max()))
    elif clip:
        cut = _clip_start(axes, bins.mean, bins.low)
        caption = f"{caption} {cut}".strip()
    _finish(log, axes)
    return name, f"{title} ({unit})", caption, figure


def _clip_start(axes: Any, mean: Floats, low: Floats) -> str:
    """Leave out the steep beginning of a long run, in which all of the rest would be a flat line."""
    if len(mean) < 40:
        return ""
    top = float(np.percentile(mean[len(mean) // 20 :], 99.5))
    bottom = float(low.min())
    if top <= bottom or float(mean[0]) - bottom < 2.5 * (top - bottom):
        return ""
    end = top + 0.45 * (top - bottom)
    axes.set_ylim(bottom - 0.08 * (top - bottom), end)
    return f"What is above {end:.3g} is outside of the picture."


def _draw_validation(log: RunLog) -> _Drawing | None:
    points = [(e.step, e.bpb) for e in log.validation]
    if not points:
        return None
    figure, axes = _panel("bits per byte")
    x, y = np.array(points, dtype=float).T
    bins = bin_series(x, y, _MOST_POINTS)
    axes.plot(bins.x, bins.mean, color=_COLORS["orange"], marker="o", markersize=3.5 if len(bins.x) < 60 else 0)
    place = (-2, -14) if len(y) > 1 and y[-1] < y[-2] else (-2, 8)  # where the line does not come from
    text = {"textcoords": "offset points", "ha": "right", "color": _COLORS["ink"], "fontsize": 9}
    axes.annotate(f"{y[-1]:.4f}", (x[-1], y[-1]), xytext=place, **text)
    axes.margins(y=0.15)
    caption = "" if bins.size == 1 else f"{len(y):,} evaluations, means of {bins.size}."
    _finish(log, axes)
    return "validation", "Validation (bits per byte)", caption, figure


def _draw_rates(log: RunLog) -> _Drawing | None:
    """Draw the lead group's rate as logged, and the others' where one schedule multiplies all of them."""
    lead = log["lr"]
    if not np.isfinite(lead).any():
        return None
    others = _other_rates(log)
    drawing = _draw_series(log, "learning_rate", "Learning rate", "lead group", lead, from_zero=not others)
    if drawing is None or not others:
        return drawing
    name, _, caption, figure = drawing
    axes = figure.axes[0]
    known = np.isfinite(lead)
    for factor, label, color in others:
        bins = bin_series(log.step[known].astype(float), factor * lead[known], _MOST_POINTS)
        axes.plot(bins.x, bins.mean, color=_COLORS[color], linewidth=1, label=label)
    axes.get_lines()[0].set_label("lead group, as logged")
    axes.set_yscale("log")
    axes.set_ylabel("learning rate")
    figure.set_size_inches(_WIDTH, _HEIGHT + 0.2 * (len(others) // 2 + 1))
    figure.legend(frameon=False, fontsize=7.5, labelcolor=_COLORS["ink"], ncols=2, loc="outside lower center")
    caption += " The other groups follow the same schedule: drawn from their base rates."
    return name, "Learning rates", caption.strip(), figure


def _other_rates(log: RunLog) -> list[tuple[float, str, str]]:
    """Return factor on the lead's rate, label and color of the other groups, if all follow one schedule."""
    record = log.record
    if any(key.endswith(".lr") for key in section(record, "schedules")):
        return []
    rates = [
        (str(group.get("kind")), str(group.get("name")), number(section(group, "settings").get("lr")))
        for group in objects(section(record, "optimizer"), "groups")
    ]
    base = next((rate for kind, _, rate in rates if kind == "muon"), rates[0][2] if rates else 0.0)
    seen = {round(base, 12)}
    found: list[tuple[float, str, str]] = []
    for _, name, rate in rates:
        if np.isfinite(rate) and base > 0 and rate > 0 and round(rate, 12) not in seen and len(found) < 5:
            seen.add(round(rate, 12))
            found.append((rate / base, _label(name[-48:]), _RUN_COLORS[1 + len(found)]))
    return found


def draw_comparison(
    logs: Sequence[RunLog], names: Sequence[str], *, write: Callable[[str, "Figure"], None]
) -> list[Chart]:
    """Draw runs over each other: smoothed training loss and validation against steps, tokens and training time."""
    longest = max((float(np.nanmax(log["elapsed_seconds"], initial=0.0)) for log in logs), default=0.0)
    time_unit, seconds = next((name, size) for name, size in _TIME_UNITS if longest >= 2 * size or size == 1)
    axes_of: tuple[tuple[str, str, Callable[[RunLog], Floats]], ...] = (
        ("steps", "step", lambda log: log.step.astype(float)),
        ("tokens", "tokens (millions)", lambda log: log["tokens"] / 1e6),
        ("time", f"training time ({time_unit})", lambda log: log["elapsed_seconds"] / seconds),
    )
    charts = []
    for what, title, unit in (
        ("loss", "Training loss", "nats per token"),
        ("validation", "Validation", "bits per byte"),
    ):
        for key, label, of in axes_of:
            figure, axes = _panel(unit, label)
            drawn = 0
            for index, (log, name) in enumerate(zip(logs, names, strict=True)):
                x, y = _loss_points(log, of(log)) if what == "loss" else _validation_points(log, of(log))
                known = np.isfinite(x) & np.isfinite(y)
                if not known.any():
                    continue
                drawn += 1
                bins = bin_series(x[known], y[known], _MOST_POINTS)
                marker = "o" if len(bins.x) < 60 and what == "validation" else None
                color = _COLORS[_RUN_COLORS[index % len(_RUN_COLORS)]]
                style = ("-", "--", ":")[index // len(_RUN_COLORS) % 3]
                axes.plot(bins.x, bins.mean, style, color=color, label=_label(name), marker=marker, markersize=3)
            if not drawn:
                continue
            plain_axes(axes)
            axes.legend(frameon=False, fontsize=8, labelcolor=_COLORS["ink"])
            caption = "Running median over a twentieth of the steps." if what == "loss" else ""
            charts.append(Chart(f"{what}_{key}", f"{title} against {key}", caption, to_svg(figure, f"{what}_{key}")))
            write(f"{what}_{key}", figure)
    return charts


def _loss_points(log: RunLog, x: Floats) -> tuple[Floats, Floats]:
    known = np.isfinite(log["loss"])
    if int(known.sum()) < 3:
        return x[known], log["loss"][known]
    # A median, since a single outlier would lift a mean over its whole window.
    return x[known], rolling_median(log["loss"][known], int(known.sum()) // 20 | 1)


def _validation_points(log: RunLog, x: Floats) -> tuple[Floats, Floats]:
    points = [(e.step, e.bpb) for e in log.validation]
    if not points or not len(x):
        return np.zeros(0), np.zeros(0)
    steps, values = np.array(points, dtype=float).T
    places = np.searchsorted(log.step, steps, side="right") - 1
    return x[np.maximum(places, 0)], values


def _label(text: str) -> str:
    """Return a name of any run as a label: of limited length, in characters that fonts have."""
    return plain_text(re.sub(r"[^\x20-\x7e\xa0-\ud7ff]", "?", text)[:60])


def _panel(unit: str, x_label: str = "step") -> tuple["Figure", Any]:
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.subplots()
    axes.set_xlabel(x_label, fontsize=9, color=_COLORS["muted"])
    axes.set_ylabel(unit, fontsize=9, color=_COLORS["muted"])
    return figure, axes


def _finish(log: RunLog, axes: Any) -> None:
    plain_axes(axes)
    for index, step in enumerate(log.boundaries[-20:]):
        axes.axvline(step, color=_COLORS["green"], linestyle=":", linewidth=1.1)
        if index == 0:
            where = axes.get_xaxis_transform()
            axes.text(step, 1.01, "resumed", color=_COLORS["green"], transform=where, fontsize=8, ha="center")


def _is_round(value: float, axes: Any) -> bool:
    """Return whether a place between powers of ten deserves its number: 2 and 5, where there are few powers."""
    low, high = axes.get_ylim()
    return high < 100 * low and f"{value:e}"[0] in "25"


def to_svg(figure: "Figure", salt: str) -> str:
    """Return the figure as an SVG element whose colors are the page's and whose ids are its own."""
    import matplotlib as mpl

    axes = figure.axes[0]
    axes.tick_params(labelsize=9, which="both", colors=_COLORS["muted"])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,.10g}" if _is_round(value, axes) else "")
    axes.grid(color=_COLORS["line"], linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(_COLORS["line"])
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    # Ids of several drawings share the page.
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{salt}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)
