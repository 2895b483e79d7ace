"""Reading a run's folder, whatever state it is in: running, dead, cut off, half written by somebody else.

Nothing here raises for what is in the files. What cannot be read is counted and said in the report.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.checkpoint import RUN_FILE, STATE_FILE, checkpoint_step, list_checkpoints
from tinygpt.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# A step's line has 400 bytes, a sample some thousand: a longer line is no line of a run.
_LONGEST_LINE = 4 << 20
_LONGEST_TEXT = 4_000
_MOST_CHANGES = 40
# Within these bounds squares, sums and quotients stay finite; no loss, count or time is outside of them.
_LARGEST_NUMBER = 1e30
_LARGEST_STEP = 1 << 53
_LARGEST_JSON = 64 << 20
_NUMBERS = (
    *("loss", "grad_norm", "lr", "weight_decay", "momentum", "tokens", "epoch", "tokens_per_second", "mfu"),
    *("peak_memory_bytes", "elapsed_seconds", "time"),
)
# A run that wrote nothing for this long, or for ten of its usual steps, is taken for dead.
_SILENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Evaluation:
    """A line with event `"evaluation"`: what was measured after `step` finished steps."""

    step: int
    numbers: dict[str, float]
    data_hash: str

    @property
    def bpb(self) -> float:
        """Bits per byte, if they were measured."""
        return self.numbers["bpb"]

    @property
    def nats(self) -> float:
        """Mean loss in nats a token: as it was logged, or from bits a byte where tokens and bytes were logged."""
        numbers = self.numbers
        if "loss" in numbers:
            return numbers["loss"]
        num_tokens = numbers.get("num_tokens", 0.0)
        return self.bpb * math.log(2) * numbers.get("num_bytes", math.nan) / num_tokens if num_tokens else math.nan


@dataclass(frozen=True)
class Resume:
    """A line with event `"resume"`: after `step` finished steps the run went on from a checkpoint."""

    step: int
    changes: list[tuple[str, Any, Any]]


@dataclass(frozen=True)
class Sample:
    """A line with event `"sample"`: text that the model wrote after `step` finished steps."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder and the bytes of its files."""

    step: int
    folder: Path
    sizes: dict[str, int]


@dataclass
class RunLog:
    """A run as its files tell it. `step` counts finished steps, so that the first is 1, and so do all events."""

    name: str
    folder: Path
    step: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    numbers: dict[str, Floats] = field(default_factory=lambda: {name: np.zeros(0) for name in _NUMBERS})
    evaluations: list[Evaluation] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    records: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    stops: list[tuple[int, str]] = field(default_factory=list)
    busy_until: dict[int, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    last_time: float = math.nan
    unread_lines: list[int] = field(default_factory=list)
    cut_off: bool = False
    repeated_steps: int = 0

    def __getitem__(self, name: str) -> Floats:
        return self.numbers[name]

    @property
    def record(self) -> dict[str, Any]:
        """The newest record of what the run is made of, see `tinygpt.run_record`; empty if none was written."""
        return self.records[-1][1] if self.records else {}

    @property
    def last_step(self) -> int:
        """Finished steps."""
        return int(self.step[-1]) if len(self.step) else 0

    @property
    def num_steps(self) -> int | None:
        """Steps that the run was meant to have, as far as anything tells."""
        changed = [new for resume in self.resumes for name, _, new in resume.changes if name == "num_steps"]
        now, saved = (section(facts, "settings").get("num_steps") for facts in (self.record, self.state))
        for value in (now, *reversed(changed), saved):
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_STEP:
                return value
        return None

    @property
    def validation(self) -> list[Evaluation]:
        """The evaluations that measured bits per byte."""
        return [evaluation for evaluation in self.evaluations if "bpb" in evaluation.numbers]

    @property
    def boundaries(self) -> list[int]:
        """Numbers of finished steps after which the run went on in another process or from a checkpoint."""
        found = {resume.step for resume in self.resumes} | {step for step, _ in self.records}
        return sorted(step for step in found if 0 < step < self.last_step)

    def segments(self) -> list[slice]:
        """Return the stretches between boundaries as slices of the arrays."""
        edges = [0, *np.searchsorted(self.step, self.boundaries, side="right").tolist(), len(self.step)]
        return [slice(a, b) for a, b in pairwise(edges) if b > a]

    def status(self) -> str:
        """Return `"empty"`, `"complete"`, `"running"` or `"stopped"`."""
        if not len(self.step):
            return "empty"
        if self.num_steps is not None and self.last_step >= self.num_steps:
            return "complete"
        if self.stops and self.stops[-1][0] >= self.last_step:
            return "stopped"
        gaps = np.diff(self["time"][-200:])
        usual = float(np.median(gaps)) if len(gaps) and np.isfinite(gaps).all() else 0.0
        return "running" if time.time() - self.last_time < max(_SILENCE_SECONDS, 10 * usual) else "stopped"


def read_run(run: str | Path) -> RunLog:
    """Read a run's folder, or its `metrics.jsonl`.

    Raises:
        DataError: If there is no such folder, it has no `metrics.jsonl`, or another file is given.
    """
    path = Path(run)
    if path.is_file() and path.suffix != ".jsonl":
        raise DataError(f"{path} is a file; give the folder of a run.")
    file = path if path.is_file() else path / "metrics.jsonl"
    if not file.is_file():
        missing = f"{path} does not exist" if not path.exists() else f"{path} has no metrics.jsonl"
        raise DataError(f"{missing}; give the folder of a run, the out_dir of its TrainerConfig.")
    folder = file.parent
    log = RunLog(name=folder.resolve().name, folder=folder)
    _read_lines(log, file)
    log.identity = read_object(folder / RUN_FILE)
    for saved in list_checkpoints(folder / "checkpoints"):
        with contextlib.suppress(OSError):  # a running run removes old ones while we look
            sizes = {item.name: item.stat().st_size for item in sorted(saved.iterdir()) if item.is_file()}
            log.checkpoints.append(SavedCheckpoint(checkpoint_step(saved), saved, sizes))
    if log.checkpoints:
        log.state = section(read_object(log.checkpoints[-1].folder / STATE_FILE), "state")
    return log


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none or it cannot be read."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def section(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the object under nested keys, empty where something else is there."""
    value: Any = values
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def objects(values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the objects in the list under a key, none where something else is there."""
    found = values.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def number(value: Any) -> float:
    """Return a JSON number as a float, and NaN for everything else, a number beyond all measure included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        result = float(value)
    except OverflowError:
        return math.nan
    if abs(result) < 1 / _LARGEST_NUMBER:
        return 0.0
    return result if abs(result) < _LARGEST_NUMBER else math.nan


def _read_lines(log: RunLog, file: Path) -> None:
    steps: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in _NUMBERS}
    for line_number, line in _lines(file):
        try:
            entry = json.loads(line)
            done = entry["step"] + 1
            if type(done) is not int or not 0 <= done < _LARGEST_STEP:
                raise ValueError
            event = entry.get("event")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.unread_lines.append(line_number)
            log.cut_off = not line.endswith(b"\n")
            continue
        when = number(entry.get("time"))
        log.last_time = np.fmax(log.last_time, when).item()
        if event == "step":
            steps.append(done)
            for name, values in columns.items():
                values.append(number(entry.get(name)))
        else:
            _read_event(log, event, done, when, entry)
    if not steps:
        return
    order = np.argsort(steps, kind="stable")
    step = np.array(steps, np.int64)[order]
    last_of_its_step = np.append(step[1:] != step[:-1], True)
    log.repeated_steps = int((~last_of_its_step).sum())
    log.step = step[last_of_its_step]
    log.numbers = {name: np.array(values)[order][last_of_its_step] for name, values in columns.items()}


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        line_number = 0
        while line := stream.readline(_LONGEST_LINE):
            line_number += 1
            if len(line) == _LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_LONGEST_LINE)
                yield line_number, b"too long\n"
            elif line.strip():
                yield line_number, line


def _read_event(log: RunLog, event: Any, step: int, when: float, entry: dict[str, Any]) -> None:
    if math.isfinite(when):
        log.busy_until[step] = max(when, log.busy_until.get(step, when))
    if event == "evaluation":
        numbers = {str(key): number(value) for key, value in entry.items() if key not in ("step", "time")}
        numbers = {key: value for key, value in numbers.items() if math.isfinite(value)}
        log.evaluations.append(Evaluation(step, numbers, text(entry.get("data_hash"))))
    elif event == "resume":
        changes = entry.get("changes")
        rows = [
            (text(row[0]), row[1], row[2])
            for row in (changes if isinstance(changes, list) else ())
            if isinstance(row, list) and len(row) == 3
        ]
        log.resumes.append(Resume(step, rows[:_MOST_CHANGES]))
    elif event == "run":
        log.records.append((step, {key: value for key, value in entry.items() if key not in ("event", "step", "time")}))
    elif event == "sample" and isinstance(entry.get("text"), str):
        log.samples.append(Sample(step, text(entry.get("prompt")), text(entry["text"])))
    elif event == "stop":
        log.stops.append((step, text(entry.get("message") or entry.get("reason"))))


def text(value: Any) -> str:
    """Return text of limited length, empty for what is none."""
    if not isinstance(value, str):
        return ""
    # A lone surrogate is legal in JSON and cannot be written as UTF-8.
    clean = value[: _LONGEST_TEXT + 1].encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= _LONGEST_TEXT else clean[:_LONGEST_TEXT] + " …"
