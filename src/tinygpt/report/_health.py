"""Observations about the machine and the numbers: speed, lost time, outliers, stops."""

import math
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinygpt.report._findings import Observation
from tinygpt.report._log import Floats, RunLog
from tinygpt.report._statistics import robust_scores
from tinygpt.report._text import number_text, seconds_text

_SPIKE_SCORE = 8.0
_FEWEST_STEPS = 30
_WARM_UP_STEPS = 3  # of each process: compilation, caches, memory
_SLOW = 0.85
_STEADY = 0.10
_LOST_SHARE = 0.01
_MOST_LISTED = 5


class TimeUse(NamedTuple):
    """Where the hours of a run went, in seconds; NaN where the file does not tell."""

    training: float
    evaluation: float
    other: float
    idle: float


def time_use(log: RunLog) -> TimeUse:
    """Split the time between the first and the last line into training, evaluation, saving, and no process at all.

    A step's line carries the time it was written and the training time so far. What passes between two lines beyond
    training is evaluation up to the last line of an event, and saving or hooks that write no line after it.
    """
    elapsed, written = log["elapsed_seconds"], log["time"]
    if not len(written) or not np.isfinite(written).all() or not np.isfinite(elapsed).all():
        return TimeUse(float(elapsed[-1]) if len(elapsed) else math.nan, math.nan, math.nan, math.nan)
    evaluation = other = idle = 0.0
    for stretch in log.segments():
        clock, worked, step = written[stretch], elapsed[stretch], log.step[stretch]
        beyond = np.maximum(0.0, np.diff(clock) - np.diff(worked))
        total = float(beyond.sum())
        known = 0.0
        for index, finished in enumerate(step[:-1].tolist()):
            if finished in log.busy_until:
                known += min(float(beyond[index]), max(0.0, log.busy_until[finished] - float(clock[index])))
        evaluation += known
        other += total - known
    seconds = step_tokens(log) / log["tokens_per_second"]
    for before, after in pairwise(log.segments()):
        first = written[after][0] - seconds[after][0]
        idle += max(0.0, float(first - written[before][-1])) if math.isfinite(first) else 0.0
    return TimeUse(float(elapsed[-1]), evaluation, other, idle)


def step_tokens(log: RunLog) -> Floats:
    """Return the tokens of each step."""
    tokens = log["tokens"]
    if len(tokens) < 2:
        return tokens
    differences = np.diff(tokens)
    # A run whose beginning is missing has no difference for its first step; all steps are of one size anyway.
    return np.insert(differences, 0, differences[0] if log.step[0] > 1 else tokens[0])


def settled(log: RunLog) -> NDArray[np.bool_]:
    """Mark the steps whose speed counts: known, and not among the first of a process."""
    speed = log["tokens_per_second"]
    mask = np.isfinite(speed) & (speed > 0)
    for stretch in log.segments():
        if stretch.stop - stretch.start > 4 * _WARM_UP_STEPS:
            mask[stretch.start : stretch.start + _WARM_UP_STEPS] = False
    return mask


def throughput(log: RunLog) -> list[Observation]:
    """Say how steady the speed was, and which stretches were slow."""
    mask = settled(log)
    speed, step = log["tokens_per_second"][mask], log.step[mask]
    if len(speed) < 10:
        return []
    middle = float(np.median(speed))
    low, high = (float(value) for value in np.percentile(speed, [5, 95]))
    rule = (
        f"Without the first {_WARM_UP_STEPS} steps of each process. Steady: 90 % of the steps lie within "
        f"{_STEADY:.0%} of the median. Slow stretch: blocks whose speed is under {_SLOW:.0%} of it, "
        f"told if all of them cost more than {_LOST_SHARE:.0%} of the training time."
    )
    steady = low > (1 - _STEADY) * middle and high < (1 + _STEADY) * middle
    text = f"{'Steady' if steady else 'Uneven'} speed: median {middle:,.0f} tok/s, 5th to 95th percentile "
    text += f"{low:,.0f} to {high:,.0f}."
    numbers = {"median": middle, "p5": low, "p95": high}
    found = [Observation("throughput", "good" if steady else "note", text, rule, numbers)]
    block = max(10, len(speed) // 200)
    starts = np.arange(0, len(speed) - block + 1, block)
    if len(starts) < 3:
        return found
    seconds = np.add.reduceat(1 / speed[: starts[-1] + block], starts)  # of one token in each step
    slow = block / seconds < _SLOW * middle
    stretches = []
    for is_slow, group in groupby(enumerate(slow), key=lambda item: bool(item[1])):
        places = [index for index, _ in group]
        if is_slow:
            first, end = int(starts[places[0]]), int(starts[places[-1]]) + block
            size = float(np.nanmedian(step_tokens(log)))
            lost = size * float((1 / speed[first:end]).sum() - (end - first) / middle)
            stretches.append((lost, int(step[first]), int(step[end - 1]), (end - first) / (1 / speed[first:end]).sum()))
    total = sum(lost for lost, *_ in stretches)
    if total > _LOST_SHARE * log["elapsed_seconds"][-1]:
        listed = [
            f"steps {first:,} to {last:,} at {pace:,.0f} tok/s ({seconds_text(lost)} lost)"
            for lost, first, last, pace in sorted(stretches, reverse=True)[:_MOST_LISTED]
        ]
        more = "" if len(stretches) <= _MOST_LISTED else f" and {len(stretches) - _MOST_LISTED} more"
        text = f"Slow stretches cost {seconds_text(total)} against the median speed: {'; '.join(listed)}{more}."
        numbers = {"count": len(stretches), "lost_seconds": total}
        found.append(Observation("slow stretch", "warning", text, rule, numbers))
    return found


def anomalies(log: RunLog) -> list[Observation]:
    """Find single steps whose loss or gradient norm stands out of their surroundings."""
    found = []
    rule = (
        "Distance from the rolling median of 51 steps in robust standard deviations (1.4826 times the median absolute "
        f"deviation) of the surrounding 103; more than {_SPIKE_SCORE:g} is an outlier. Gradient norms as logarithms. "
        "The first 25 steps are not judged."
    )
    series = (("loss", "Training loss", log["loss"]), ("gradient norm", "Gradient norm", log["grad_norm"]))
    for topic, name, values in series:
        known = np.isfinite(values) & ((values > 0) | (topic == "loss"))
        if int(known.sum()) < _FEWEST_STEPS:
            continue
        shown, step = values[known], log.step[known]
        scores = robust_scores(np.log(shown) if topic == "gradient norm" else shown)
        peaks = _peaks(np.flatnonzero(scores > _SPIKE_SCORE), scores)
        numbers = {"count": len(peaks), "steps": [int(step[peak]) for peak in peaks[:_MOST_LISTED]]}
        if not peaks:
            found.append(Observation(topic, "good", f"{name}: no outlier in {len(shown):,} steps.", rule, numbers))
            continue
        listed = [f"{number_text(float(shown[p]))} at step {step[p]:,}" for p in peaks[:_MOST_LISTED]]
        more = "" if len(peaks) <= _MOST_LISTED else f", and {len(peaks) - _MOST_LISTED} more"
        text = f"{name}: {len(peaks):,} outlier{'s' if len(peaks) > 1 else ''}, the largest {'; '.join(listed)}{more}."
        found.append(Observation(topic, "warning", text, rule, numbers))
    return found


def _peaks(places: NDArray[np.intp], scores: Floats) -> list[int]:
    """Return the highest place of each group of neighbours, the highest of all first."""
    groups = np.split(places, np.flatnonzero(np.diff(places) > 5) + 1) if len(places) else []
    best = [int(group[np.argmax(scores[group])]) for group in groups]
    return sorted(best, key=lambda place: -scores[place])


def stops(log: RunLog) -> list[Observation]:
    """Report recorded stops and steps without a finite loss."""
    found = [
        Observation("stop", "warning", f"Stopped after step {step:,}: {text or 'no reason was recorded'}", "Recorded.")
        for step, text in log.stops[-3:]
        if step >= log.last_step
    ]
    missing = log.step[~np.isfinite(log["loss"])]
    if len(missing):
        text = f"{len(missing):,} steps have no finite loss, the first is step {missing[0]:,}."
        found.append(Observation("non-finite", "warning", text, "The loss of the line is null or no number."))
    return found


def lost_time(log: RunLog) -> list[Observation]:
    """Say how much of the time was not spent on training."""
    training, evaluation, other, idle = time_use(log)
    if not math.isfinite(other) or training <= 0:
        return []
    share = (evaluation + other) / (training + evaluation + other)
    text = f"{share:.1%} of the working time was not training: evaluation and sampling {seconds_text(evaluation)}, "
    text += f"saving and other hooks {seconds_text(other)}."
    if idle > 1:
        text += f" Between processes {seconds_text(idle)} passed."
    rule = (
        "Time between two lines beyond the training time they tell; up to the last line of an event it is evaluation."
    )
    numbers = {"training": training, "evaluation": evaluation, "other": other, "idle": idle}
    return [Observation("time", "warning" if share > 0.2 else "good", text, rule, numbers)]


def reading(log: RunLog) -> list[Observation]:
    """Say what could not be read, so that nothing is missing in silence."""
    found = []
    lines = log.unread_lines[:-1] if log.cut_off else log.unread_lines
    if log.cut_off:
        text = "The last line is cut off, as of a process that died while writing; it was left out."
        found.append(Observation("file", "note", text, "The line has no end."))
    if lines:
        text = f"{len(lines):,} lines could not be read and were left out, the first is line {lines[0]:,}."
        found.append(Observation("file", "warning", text, "A line is a JSON object with a whole number as step."))
    if log.repeated_steps:
        text = f"{log.repeated_steps:,} steps are there more than once; the last line of each counts."
        found.append(Observation("file", "note", text, "Two lines have the same step."))
    return found
