"""Several runs over each other."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinygpt.errors import ConfigError
from tinygpt.report import _summary
from tinygpt.report._charts import draw_comparison
from tinygpt.report._figure import new_figure
from tinygpt.report._log import RunLog, objects, read_run, section
from tinygpt.report._page import Block, Paragraph, Section, Table, to_html, to_markdown
from tinygpt.report._text import bytes_text, count_text, finite_text, number_text, seconds_text, short, value_text
from tinygpt.report._write import ReportFiles, ReportFolder, json_values, made_page

_MOST_RUNS = 24
_MOST_DIFFERENCES = 300
UNKNOWN = "—"


def compare_runs(runs: Sequence[str | Path], out: str | Path = "comparison", *, pictures: bool = True) -> ReportFiles:
    """Set runs side by side: their curves against steps, tokens and time, their results, and where they differ.

    Differences are those of `run.json` and of what each run recorded of itself; what is equal in all is left out.

    Args:
        runs: Folders of two or more runs.
        out: Folder to write to; `comparison.md`, `comparison.html` and pictures there are replaced.
        pictures: Whether to draw; without, matplotlib is not needed.

    Returns:
        The files; `summary` holds `runs` with the figures of each, and `differences`.

    Raises:
        DataError: If one of the runs is not there.
        ConfigError: If there are not 2 to 24 runs, or `out` cannot be written.
        MissingDependencyError: If there is to be a picture and matplotlib is not installed.

    Example:
        ```python no-run
        from tinygpt.report import compare_runs

        print(compare_runs(["runs/one-horizon", "runs/documented"]).html)
        ```
    """
    if isinstance(runs, str | Path):
        raise ConfigError(f"runs={str(runs)!r} is one run; give a list of two or more.")
    if not 2 <= len(runs) <= _MOST_RUNS:
        raise ConfigError(f"{len(runs)} run{'s' * (len(runs) != 1)} cannot be compared; give 2 to {_MOST_RUNS}.")
    if pictures:
        new_figure(1, 1)
    logs = [read_run(run) for run in runs]
    names = _distinct_names(logs)
    figures = [_summary.headline(log) for log in logs]
    different = differences(logs)
    folder = Path(out)
    with ReportFolder(folder) as files:
        charts = draw_comparison(logs, names, write=files.save_picture) if pictures else []
        results = Table(("", *names), _results(figures), numeric=True)
        sections = [
            Section("Results", [results, *map(Paragraph, _summary.validation_warning(logs))]),
            Section("Curves", charts),
            Section("Where they differ", _difference_blocks(logs, names, different)),
        ]
        page = made_page(f"Comparison of {len(logs)} runs", ", ".join(names), sections, "the runs' own files.")
        files.write("comparison.md", to_markdown(page))
        files.write("comparison.html", to_html(page))
    by_run = [{"run": name, **values} for name, values in zip(names, figures, strict=True)]
    by_name = [{"name": key, "values": dict(zip(names, values, strict=True))} for key, values in different.items()]
    summary: dict[str, Any] = json_values({"runs": by_run, "differences": by_name})
    return ReportFiles(folder / "comparison.md", folder / "comparison.html", tuple(files.pictures), summary)


def differences(logs: Sequence[RunLog]) -> dict[str, tuple[Any, ...]]:
    """Return the settings that are not equal in all runs: by name, the value in each, `UNKNOWN` where none is recorded.

    A run that wrote no record of itself differs only in what its checkpoint tells.
    """
    tables = [_flat(_settings(log)) for log in logs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    found = {}
    for name in names:
        values = tuple(table.get(name, UNKNOWN) for table in tables)
        told = [value for value, log in zip(values, logs, strict=True) if value != UNKNOWN or log.record]
        if any(value != told[0] for value in told[1:]):
            found[name] = values
    return found


def _settings(log: RunLog) -> dict[str, Any]:
    """Return what makes a run what it is, under the same names whether a record or a checkpoint tells it."""
    record, state = log.record, log.state
    if not record:
        saved = section(state, "settings")
        schedules = {key.removeprefix("schedule "): text for key, text in saved.items() if key.startswith("schedule ")}
        config = {key: value for key, value in section(state, "model_config").items() if not key.startswith("block ")}
        told = {key: saved[key] for key in ("num_steps", "grad_clip") if key in saved}
        return {"run.json": log.identity, "settings": told, "model": {"config": config}, "schedules": schedules}
    made = {
        str(group.get("name")): section(group, "settings") for group in objects(section(record, "optimizer"), "groups")
    }
    kept = {key: value for key, value in record.items() if key not in ("record_version", "next_step", "optimizer")}
    # A run that went on with other settings than it began with is not told by its last record alone.
    for step, earlier in log.records[:-1]:
        for part in ("schedules", "settings"):
            was, now = section(earlier, part), section(record, part)
            if changed := {key: value for key, value in was.items() if value != now.get(key)}:
                kept[f"{part} from step {step + 1:,}"] = changed
    return {"run.json": log.identity, **kept, "optimizer": {"name": section(record, "optimizer").get("name"), **made}}


def _flat(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = short(f"{prefix}{key}", 120)
        if isinstance(value, Mapping) and depth < 6:
            flat |= _flat(value, f"{name}.", depth + 1)
        else:
            flat[name] = value
    return flat


def _difference_blocks(
    logs: Sequence[RunLog], names: Sequence[str], different: Mapping[str, tuple[Any, ...]]
) -> list[Block]:
    blocks: list[Block] = []
    silent = [name for name, log in zip(names, logs, strict=True) if not log.record]
    if silent:
        told = "compared is what run.json and checkpoints tell."
        blocks.append(Paragraph(f"No record of settings was written by {', '.join(silent)}; {told}"))
    if not different:
        return [*blocks, Paragraph("Nothing that is recorded differs.")]
    rows = [
        (name, *(short(value_text(value), 80) for value in values))
        for name, values in list(different.items())[:_MOST_DIFFERENCES]
    ]
    if len(different) > len(rows):
        blocks.append(Paragraph(f"The first {len(rows)} of {len(different):,} differences."))
    return [*blocks, Table(("setting", *names), rows)]


def _results(figures: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    decimals = partial(finite_text, form="{:.4f}", absent=UNKNOWN)
    shown: list[tuple[str, str, Any]] = [
        ("status", "status", str),
        ("steps", "steps", number_text),
        ("tokens", "tokens", count_text),
        ("parameters", "num_parameters", lambda value: UNKNOWN if value is None else number_text(value)),
        ("validation bpb", "validation_bpb", decimals),
        ("best validation bpb", "best_validation_bpb", decimals),
        ("training loss", "train_loss", decimals),
        ("tokens per second", "tokens_per_second", partial(finite_text, form="{:,.0f}")),
        ("step", "step_seconds", seconds_text),
        ("training time", "training_seconds", seconds_text),
        ("MFU", "mfu", partial(finite_text, form="{:.1%}")),
        ("peak memory", "peak_memory_bytes", bytes_text),
    ]
    return [(label, *(form(values[key]) for values in figures)) for label, key, form in shown]


def _distinct_names(logs: Sequence[RunLog]) -> list[str]:
    """Return the folders' names; where two are equal, with the parent's in front, and else a number."""
    names = [short(log.name, 40) for log in logs]
    if len(set(names)) < len(names):
        names = [short(f"{log.folder.resolve().parent.name}/{log.name}", 40) for log in logs]
    return [f"{name} ({index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]
