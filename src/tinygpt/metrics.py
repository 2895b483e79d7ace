"""What a training step reports, how fast it was, and the file that keeps it."""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from tinygpt import hardware
from tinygpt.errors import CheckpointError, DataError


@dataclass(frozen=True)
class StepMetrics:
    """One finished optimizer step.

    Attributes:
        index: The step, counted from 0 over the whole run, resumes included.
        loss: Mean loss of the step's targets in nats, before the update.
        grad_norm: Euclidean norm of all gradients of the mean loss, before clipping.
        lr: Learning rate of the lead group: the first Muon group, or the first group if there is none.
        weight_decay: Weight decay of that group, 0 if it has none.
        momentum: Momentum of that group; `None` if it has none.
        tokens: Positions trained on so far in the run, this step included; masked ones count too.
        epoch: Whole passes over the data so far; `None` if the loader does not tell.
        tokens_per_second: Speed of this step, the wait for data included, evaluation and saving not.
        mfu: Share of the device's peak FLOP/s in the precision of the activations; `None` where the peak is not known.
            Products in eight bits are counted against it too, so it may come out above what the activations' precision
            could reach, even above 1.
        peak_memory_bytes: Highest memory so far: allocated on a GPU, resident on a CPU; `None` if unknown.
        elapsed_seconds: Training time of the run so far, evaluation and saving not included.
    """

    index: int
    loss: float
    grad_norm: float
    lr: float
    weight_decay: float
    momentum: float | None
    tokens: int
    epoch: int | None
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int | None
    elapsed_seconds: float


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the highest memory use so far: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_name(device: torch.device) -> str | None:
    """Return the name of a GPU as `tinygpt.hardware` knows it; `None` for a CPU, or if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return hardware.apple_gpu_name() if device.type == "mps" else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak FLOP/s in this dtype; `None` if the table does not know it."""
    name = gpu_name(device)
    return None if name is None else hardware.peak_flops(name, str(dtype).removeprefix("torch."))


class MetricsFile:
    """A JSON-lines file of a run: one line a step or event, readable while the run goes on.

    Args:
        path: The file; its folder is made if it is missing.
        next_step: Lines of this step and later ones are dropped first: a resumed run writes them again. With 0 a file
            that is there is kept as `metrics.old.jsonl`, the next one as `metrics.old-2.jsonl`.

    Raises:
        DataError: If the file exists and is not such a file.
    """

    def __init__(self, path: str | Path, *, next_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if next_step == 0:
            if self.path.exists():  # of a run that left no checkpoint; not ours to throw away
                self.path.rename(_free_name(self.path))
            self.path.touch()
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for record in _records(self.path):
                if record.get("step", -1) < next_step:
                    file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave neither the old file nor the new
        temporary.replace(self.path)

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one line; numbers that are not finite become null, what JSON does not know text.

        Raises:
            CheckpointError: If it cannot be written; half a line is taken back.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = json.dumps({"event": event, "step": step, "time": round(time.time(), 3), **clean}, default=str)
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError:
                os.truncate(self.path, size)  # the next line must not continue this one
                raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def write_step(self, metrics: StepMetrics) -> None:
        """Append a finished step."""
        fields = asdict(metrics)
        self.write("step", fields.pop("index"), **fields)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line cut off by a crash is left out.

    Raises:
        DataError: If another line is not a JSON object.
    """
    return list(_records(Path(path)))


def _free_name(path: Path) -> Path:
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    free = (path.with_name(f"{path.stem}.old{number}{path.suffix}") for number in numbers)
    return next(candidate for candidate in free if not candidate.exists())


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    return
                raise DataError(
                    f"{path} line {number} is not JSON; it is not a metrics file or was damaged: remove that line, or "
                    "move the file away."
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{path} line {number} is not a JSON object; it is not a metrics file.")
            if type(record.get("step", -1)) is not int:
                raise DataError(
                    f"{path} line {number} has step={record['step']!r}; steps are whole numbers: remove that line, or "
                    "move the file away."
                )
            yield record


class Stopwatch:
    """Add up the seconds between `start` and `stop`."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self.elapsed = elapsed
        self._started = 0.0

    def start(self) -> Self:
        """Begin a lap."""
        self._started = time.perf_counter()
        return self

    def stop(self) -> float:
        """End the lap and return its seconds."""
        lap = time.perf_counter() - self._started
        self.elapsed += lap
        return lap
