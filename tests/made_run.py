"""Runs whose jumps, outliers and slow stretches are known, written as a trainer writes them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.metrics import StepMetrics

BATCH = 1_024
START = 1_790_000_000.0


def write_lines(folder: Path, lines: Iterable[dict[str, Any]], *, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "metrics.jsonl").write_text(text, "utf-8")
    return folder


def step_line(step: int, loss: float | None, **fields: Any) -> dict[str, Any]:
    """A line with the fields of StepMetrics, one second a step unless told otherwise."""
    metrics = StepMetrics(
        index=step,
        loss=0.0,
        grad_norm=0.5,
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        tokens=BATCH * (step + 1),
        epoch=0,
        tokens_per_second=float(BATCH),
        mfu=0.4,
        peak_memory_bytes=3 << 30,
        elapsed_seconds=step + 1.0,
    )
    values = vars(metrics) | {"loss": loss} | fields
    values.pop("index")
    return {"event": "step", "step": step, "time": START + step + 1.0, **values}


def evaluation(step: int, bpb: float, **fields: Any) -> dict[str, Any]:
    return {"event": "evaluation", "step": step, "time": START + step + 1.0, "bpb": bpb, "data_hash": "a1b2", **fields}


def noisy(num_steps: int, *, level: float = 3.0, noise: float = 0.05, seed: int = 0) -> np.ndarray[Any, Any]:
    """A loss that falls towards a level, with noise."""
    steps = np.arange(num_steps)
    return level + 2 * np.exp(-steps / 40) + np.random.default_rng(seed).normal(0, noise, num_steps)


def documented_run(folder: Path, *, num_steps: int = 900, resume: int = 300, rise: float = 0.3) -> Path:
    """Three phases in small: rates that decay, a resume that throws them up, a second one that changes nothing."""
    losses = noisy(num_steps)
    losses[resume:] += rise * np.exp(-np.arange(num_steps - resume) / 200)
    lines: list[dict[str, Any]] = []
    for step, loss in enumerate(losses.tolist()):
        late = step >= resume
        lr = 0.02 * (1 - (step - resume) / num_steps) if late else 0.02 * (1 - 0.95 * step / resume)
        lines.append(step_line(step, loss, lr=lr, momentum=0.97 if late else 0.9))
        if (step + 1) % 50 == 0:
            bpb = (3.0 + (rise * math.exp(-(step - resume) / 200) if late else 0) - step / 3000) / 3
            lines.append(evaluation(step, bpb, loss=3 * bpb))
        if step == resume - 1:
            changes = [["lr (adamw head.weight and 6 more groups)", 0.001, 0.02], ["momentum (muon a)", 0.9, 0.97]]
            changes.append(["num_steps", resume, num_steps])
            lines.append({"event": "resume", "step": step, "time": START + step + 2, "changes": changes})
        if step == 599:
            lines.append({"event": "resume", "step": step, "time": START + step + 2, "changes": []})
    return write_lines(folder, lines)
