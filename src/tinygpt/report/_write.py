"""The report of one run."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tinygpt
from tinygpt._disk import replacing, write_text
from tinygpt.errors import ConfigError
from tinygpt.report import _findings, _health, _summary
from tinygpt.report._charts import binning_note, draw_run
from tinygpt.report._commands import next_commands
from tinygpt.report._figure import new_figure
from tinygpt.report._findings import Observation
from tinygpt.report._log import RunLog, Sample, read_run
from tinygpt.report._page import Block, Cards, Chart, Page, Paragraph, Quote, Remark, Section, to_html, to_markdown
from tinygpt.report._text import count_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_SAMPLES = 12
_ORDER = {"warning": 0, "note": 1, "good": 2}


class ReportFiles(NamedTuple):
    """Where a report was written.

    Attributes:
        markdown: The Markdown file, which shows the pictures beside it.
        html: One page with everything in it.
        pictures: The PNG files.
        summary: Its figures and observations as JSON values, as from `summarize_run`.
    """

    markdown: Path
    html: Path
    pictures: tuple[Path, ...]
    summary: dict[str, Any]


def write_report(run: str | Path, out: str | Path | None = None, *, pictures: bool = True) -> ReportFiles:
    """Write what there is to say about a run: Markdown, one self-contained HTML page, and PNG pictures.

    It is made from `metrics.jsonl` alone, with `run.json` and the newest checkpoint's `state.json` and file sizes where
    they are there. The run may be complete, running, dead, empty, or its file cut off; what could not be read is said.
    The page asks for nothing outside itself and has no script.

    Args:
        run: Folder of the run, or its `metrics.jsonl`.
        out: Folder to write to; `None` for `report` in the run's folder. A report that is there is replaced.
        pictures: Whether to draw; without, the report is text and tables, and matplotlib is not needed.

    Returns:
        The files.

    Raises:
        DataError: If there is no such run.
        ConfigError: If `out` cannot be written.
        MissingDependencyError: If there is to be a picture and matplotlib is not installed.

    Example:
        ```python no-run
        from tinygpt.report import write_report

        print(write_report("runs/demo").html)
        ```
    """
    if pictures:
        new_figure(1, 1)  # whether matplotlib is there shall be known before anything is written
    log = read_run(run)
    folder = log.folder / "report" if out is None else Path(out)
    figures = _summary.headline(log)
    found = observations(log)
    with ReportFolder(folder) as files:
        charts = draw_run(log, write=files.save_picture) if pictures else []
        page = _compose(log, figures, found, charts)
        files.write("report.md", to_markdown(page))
        files.write("report.html", to_html(page))
    summary = _summary_of(log, figures, found)
    return ReportFiles(folder / "report.md", folder / "report.html", tuple(files.pictures), summary)


def summarize_run(run: str | Path) -> dict[str, Any]:
    """Return a run's figures and observations as JSON values; what is not known is `None`.

    Args:
        run: Folder of the run, or its `metrics.jsonl`.

    Raises:
        DataError: If there is no such run.
    """
    log = read_run(run)
    return _summary_of(log, _summary.headline(log), observations(log))


def observations(log: RunLog) -> list[Observation]:
    """Compute every remark on a run, warnings first."""
    found = [*_health.reading(log), *_health.stops(log)]
    if len(log.step):
        found += _findings.plateau(log) + _findings.jumps(log) + _findings.overfitting(log)
        found += _health.anomalies(log) + _health.throughput(log) + _health.lost_time(log)
    return sorted(found, key=lambda observation: _ORDER[observation.level])


def _compose(log: RunLog, figures: Mapping[str, Any], found: Sequence[Observation], charts: Sequence[Chart]) -> Page:
    remarks: list[Block] = [Remark(o.level, o.text, o.rule) for o in found]
    sections = [
        Section("", [Cards(_summary.cards(figures))]),
        Section("Key observations", remarks or [Paragraph("There is nothing to observe yet.")]),
        Section("Loss progression", _summary.progression(log)),
        Section("Curves", [*([Paragraph(note)] if charts and (note := binning_note(log)) else []), *charts]),
        Section("Performance", _summary.performance(log, figures)),
        Section("Model", _summary.architecture(log)),
        Section("Schedule of each phase", _summary.phases(log)),
        Section("Optimizer", _summary.optimizer(log)),
        Section("Data and settings", _summary.data_and_batch(log)),
        Section("Samples over time", _samples(log.samples)),
        Section("Next", next_commands(log, str(figures["status"]))),
    ]
    parameters = figures["num_parameters"]
    facts = [f"{count_text(parameters)} parameters"] if parameters else []
    facts += [f"{figures['steps']:,} steps", f"{count_text(figures['tokens'])} tokens", str(figures["status"])]
    written = "" if math.isnan(log.last_time) else f" Its last line is of {stamp(log.last_time)}."
    subtitle = ", ".join(facts).replace("n/a tokens, ", "")
    return made_page(f"Report of {log.name}", subtitle, sections, f"the run's own files.{written}")


def made_page(title: str, subtitle: str, sections: Sequence[Section], source: str) -> Page:
    """Return the page of the sections that hold something, with a footer that says when and from what it was made."""
    footer = f"Made {stamp(time.time())} by tinygpt {tinygpt.__version__} from {source}"
    return Page(title, subtitle, [section for section in sections if section.blocks], footer)


def _samples(samples: Sequence[Sample]) -> list[Block]:
    if not samples:
        return []
    count = min(_MOST_SAMPLES, len(samples))
    places = sorted({round(index * (len(samples) - 1) / max(1, count - 1)) for index in range(count)})
    shown = [samples[place] for place in places]
    blocks: list[Block] = [Quote(f"Step {sample.step:,}", sample.prompt + sample.text) for sample in shown]
    if len(shown) < len(samples):
        blocks.insert(0, Paragraph(f"{len(shown)} of {len(samples):,} samples, evenly chosen."))
    return blocks


def _summary_of(log: RunLog, figures: Mapping[str, Any], found: Sequence[Observation]) -> dict[str, Any]:
    summary = {"run": log.name, **figures, "observations": [asdict(observation) for observation in found]}
    plain: dict[str, Any] = json_values(summary)
    return plain


def json_values(value: Any) -> Any:
    """Return what JSON can hold: numbers of numpy as numbers, and those that are not finite as `None`."""
    if isinstance(value, Mapping):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stamp(seconds: float) -> str:
    """Return a time in UTC, to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "an impossible time"


class ReportFolder:
    """Files of a report, each written beside and renamed, so that a page being looked at is never half a page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: list[Path] = []

    def __enter__(self) -> "ReportFolder":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise self._refusal(error) from None

    def write(self, name: str, content: str) -> None:
        """Write a text file."""
        write_text(self.folder / name, content)

    def save_picture(self, name: str, figure: "Figure") -> None:
        """Write a figure as PNG."""
        path = self.folder / f"{name}.png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        self.pictures.append(path)

    def _refusal(self, error: OSError) -> ConfigError:
        why = error.strerror or error
        return ConfigError(f"the report cannot be written to {self.folder}: {why}; choose another folder with out.")
