"""Observations about learning: does the loss still fall, where did it jump and why, does the model overfit."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinygpt.report._log import Evaluation, Floats, Integers, Resume, RunLog
from tinygpt.report._page import Level
from tinygpt.report._statistics import fit_line, level_changes, smooth
from tinygpt.report._text import factor_text, number_text

# Where these come from: chosen on made-up runs whose jumps and plateaus are known (see the tests), so that noise alone
# raised none of them; they are conventions, not measurements.
_JUMP_SCORE = 8.0  # anywhere: a run has thousands of places to jump at
_KNOWN_JUMP_SCORE = 5.0  # where it is recorded that something changed, which is a few places
_LEAST_SCORE = 2.0  # there, if validation jumped as well
_VALIDATION_JUMP = 3.0  # times the usual change between two evaluations
_LEAST_JUMP = 0.003  # share of the loss
_RATE_CHANGE = 1.5  # factor between two steps that no schedule has outside of its warm-up
_PLATEAU_SHARE = 0.002
_OVERFIT_SHARE = 0.005
_MOST_JUMPS = 5
_MOST_CAUSES = 20  # the newest; a run that was resumed more often is told by its table of phases
_LONG = 40


@dataclass(frozen=True)
class Observation:
    """One computed remark.

    Attributes:
        topic: What it is about, such as `"plateau"` or `"jump"`.
        level: `"good"`, `"note"` or `"warning"`.
        text: The remark with its numbers.
        rule: By which rule it was made.
        numbers: The numbers alone, for programs.
    """

    topic: str
    level: Level
    text: str
    rule: str
    numbers: dict[str, Any] = field(default_factory=dict)


def plateau(log: RunLog) -> list[Observation]:
    """Fit a line to the last third of the validation results, or of the training loss where there are too few."""
    points = [(float(e.step), e.bpb) for e in log.validation]
    known = np.isfinite(log["loss"])
    if len(points) >= 4:
        unit, what, parts = "bpb", "validation", "evaluations"
        points = points[-max(4, -(-len(points) // 3)) :]
    elif int(known.sum()) >= 60:
        unit, what, parts = "nats", "training loss", "block means"
        steps, losses = (np.array_split(values[known], 30)[20:] for values in (log.step, log["loss"]))
        points = [(float(x.mean()), float(y.mean())) for x, y in zip(steps, losses, strict=True)]
    else:
        return [Observation("plateau", "note", "Too early to tell a plateau.", "Needs 4 evaluations or 60 steps.")]
    x, y = np.array(points).T
    unit_steps = 1_000 if x[-1] - x[0] >= 1_000 else 100
    slope, error = (unit_steps * value for value in fit_line(x, y))
    span = (x[-1] - x[0]) / unit_steps
    still = _PLATEAU_SHARE * y.mean()
    numbers = {
        "slope": slope,
        "error": error,
        "unit": unit,
        "per_steps": unit_steps,
        "from_step": x[0],
        "to_step": x[-1],
    }
    course = f"{slope:+.4g} ± {error:.2g} {unit} per {unit_steps:,} steps between steps {x[0]:,.0f} and {x[-1]:,.0f}"
    level: Level
    if slope - error > 0:
        level, verdict = "warning", f"The {what} is rising"
    elif slope + error < 0 and -slope * span > still:
        level, verdict = "good", f"No plateau: the {what} is still falling"
    elif (abs(slope) + error) * span <= 4 * still:
        level, verdict = "note", f"Plateau: the {what} no longer changes by much"
    else:
        level, verdict = "note", f"The {what} is too noisy to tell a plateau"
    rule = (
        f"A line through the last {len(points)} {parts} (a third) with its 95 % interval. Falling: the whole interval "
        f"is below zero, and the fall more than {_PLATEAU_SHARE:.1%} of the level. Plateau: the interval has no change "
        f"over {4 * _PLATEAU_SHARE:.1%} in it."
    )
    return [Observation("plateau", level, f"{verdict}: {course}.", rule, numbers)]


def jumps(log: RunLog) -> list[Observation]:
    """Find where the training loss rose and stayed up, and what was recorded to change there."""
    known = np.isfinite(log["loss"])
    loss, step = log["loss"][known], log.step[known]
    window = min(100, max(5, len(loss) // 20))
    rule = (
        f"The median of {window} steps after a place against that of {window} before; the standard error comes from "
        f"the differences of neighbouring steps. A jump is a rise of more than {_JUMP_SCORE:g} of them, or "
        f"{_KNOWN_JUMP_SCORE:g} where a resume or a change of rates is recorded ({_LEAST_SCORE:g} if validation "
        f"rose by {_VALIDATION_JUMP:g} times its usual change there), and of {_LEAST_JUMP:.1%} of the loss."
    )
    if len(loss) < 4 * window:
        unknown = [_resume_without_verdict(log, resume) for resume in log.resumes[-_MOST_CAUSES:] if resume.changes]
        return unknown or [Observation("jump", "note", "Too few steps to tell jumps from noise.", rule)]
    rise, score = level_changes(loss, window)
    places = step[window - 1 : window - 1 + len(rise)]  # finished steps before the place
    level = np.abs(loss[window - 1 : window - 1 + len(rise)])
    changed = rate_changes(log)
    causes = sorted({*log.boundaries, *changed})[-_MOST_CAUSES:]
    found: list[Observation] = []
    taken: list[int] = []
    for cause in causes:
        near = (places >= cause) & (places <= cause + 2 * window)
        if not near.any():
            continue
        best = int(np.flatnonzero(near)[np.argmax(rise[near])])
        clear = score[best] > _KNOWN_JUMP_SCORE or (score[best] > _LEAST_SCORE and _validation_jumped(log, cause))
        if clear and rise[best] > _LEAST_JUMP * level[best]:
            found.append(_jump(log, cause, rise[best], loss, step, window, rule))
            taken.append(cause)
        elif resume := next((resume for resume in reversed(log.resumes) if resume.step == cause), None):
            found.append(_calm_resume(resume, rise[best], score[best], rule))
    suspicious = (score > _JUMP_SCORE) & (rise > _LEAST_JUMP * level)
    for place in taken:
        suspicious &= np.abs(places - place) > 3 * window
    while suspicious.any() and len(taken) < _MOST_JUMPS:
        best = int(np.argmax(np.where(suspicious, rise, -np.inf)))
        place = _sharpest(loss, step, best + window, window)
        found.append(_jump(log, place, rise[best], loss, step, window, rule))
        taken.append(place)
        suspicious &= np.abs(places - places[best]) > 3 * window
    return found or [Observation("jump", "good", "No jump: the training loss never rose and stayed up.", rule)]


def _sharpest(loss: Floats, step: Integers, index: int, window: int) -> int:
    """Return after how many steps the rise near an index is sharpest: medians only tell within half a window."""
    sums = np.cumsum(np.insert(loss, 0, 0.0))
    near = np.arange(max(window, index - window), min(len(loss) - window, index + window) + 1)
    rise = sums[near + window] - 2 * sums[near] + sums[near - window]
    return int(step[near[np.argmax(rise)] - 1])


def _jump(log: RunLog, place: int, rise: float, loss: Floats, step: Integers, window: int, rule: str) -> Observation:
    before = float(np.median(loss[step <= place][-window:]))
    causes = _causes(log, place, window)
    text = f"After step {place:,} the training loss jumped by {rise:.3g} nats, from {before:.4g}"
    rising = smooth(loss, window)
    back = np.flatnonzero((step > place + 2 * window) & (rising <= before))
    recovered = int(step[back[0]]) if len(back) else None
    text += f", and was back at step {recovered:,}" if recovered else ", and did not come back in this run"
    pair = _evaluations_around(log, place)
    if pair and pair[1].bpb > pair[0].bpb:
        text += f". Validation went from {pair[0].bpb:.4f} to {pair[1].bpb:.4f} bpb"
        text += f" between steps {pair[0].step:,} and {pair[1].step:,}"
    if causes:
        text += f". What changed there: {'; '.join(causes)}."
    else:
        text += f". Nothing that is recorded changed there: look at the data around step {place:,}."
    numbers = {"step": place, "rise": float(rise), "before": before, "recovered_at": recovered, "changes": causes}
    return Observation("jump", "warning", text, rule, numbers)


def _calm_resume(resume: Resume, rise: float, score: float, rule: str) -> Observation:
    text = f"The resume after step {resume.step:,} left no jump: {rise:+.2g} nats, {score:+.1f} standard errors."
    changes = [change_text(*change) for change in resume.changes]
    if changes:
        text += f" Changed: {'; '.join(changes)}."
    numbers = {"step": resume.step, "rise": float(rise), "score": float(score), "changes": changes}
    return Observation("resume", "note" if changes else "good", text, rule, numbers)


def _resume_without_verdict(log: RunLog, resume: Resume) -> Observation:
    changes = [change_text(*change) for change in resume.changes]
    text = f"At the resume after step {resume.step:,} this changed: {'; '.join(changes)}."
    if pair := _evaluations_around(log, resume.step):
        text += f" Validation: {pair[0].bpb:.4f} bpb before, {pair[1].bpb:.4f} after."
    return Observation("resume", "note", text, "Too few steps to tell a jump from noise.", {"step": resume.step})


def _causes(log: RunLog, place: int, window: int) -> list[str]:
    """Say everything that is recorded to have changed between steps `place` and `place + 1`, give or take a window."""
    resumes = [resume for resume in log.resumes if abs(resume.step - place) <= window]
    causes = [change_text(*change) for resume in resumes for change in resume.changes]
    if not causes:
        for step, names in rate_changes(log).items():
            if abs(step - place) <= window:
                causes += names
    turned = log.step[1:][np.diff(log["epoch"]) > 0].tolist()
    causes += [f"a new pass over the data began at step {s:,}" for s in turned if abs(s - place) <= window]
    if resumes and not causes:
        causes.append("a resume, of which no change was recorded")
    return causes


def rate_changes(log: RunLog) -> dict[int, list[str]]:
    """Return what changed abruptly between two steps, by the finished steps before it."""
    found: dict[int, list[str]] = {}
    for name in ("lr", "weight_decay", "momentum"):
        values = log[name]
        was, now = values[:-1], values[1:]
        # What a moving average forgets in a step is what counts: momenta of 0.99 and 0.999 are far apart.
        a, b = (1 - was, 1 - now) if name == "momentum" else (was, now)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(b / a)
        # The beginning of a warm-up doubles the rate, and the last steps of a decay to zero halve it.
        abrupt = (np.arange(len(was)) > 3) & ((ratio > _RATE_CHANGE) | (ratio < 1 / _RATE_CHANGE))
        if name != "momentum":
            abrupt &= np.abs(now - was) > 0.2 * np.nanmax(np.abs(values), initial=0.0)
        for index in np.flatnonzero(abrupt)[:100]:
            change = change_text(name, float(was[index]), float(now[index]))
            found.setdefault(int(log.step[index]), []).append(change)
    return found


def change_text(name: str, was: Any, now: Any) -> str:
    """Return a change in words, with its factor where there is one; long values are in the table of phases."""
    if any(isinstance(value, str) and len(value) > _LONG for value in (was, now)):
        return f"another {name}"
    text = f"{name} {number_text(was)} → {number_text(now)}"
    factor = factor_text(name, was, now)
    return f"{text} ({factor})" if factor else text


def overfitting(log: RunLog) -> list[Observation]:
    """Compare training and validation loss in nats a token, and look for validation that rises while training falls."""
    window = mean_window(log)
    rule = (
        f"Gap: validation loss minus the mean training loss of the last {window} steps before it, both in nats a token "
        "(the validation leaves special tokens out). Overfitting: validation rose by more than "
        f"{_OVERFIT_SHARE:.1%} above its best while the training loss fell."
    )
    measured = log.validation or [e for e in log.evaluations if "loss" in e.numbers]
    known = np.isfinite(log["loss"])
    training = np.full(len(known), math.nan)
    training[known] = smooth(log["loss"][known], window)
    rows = []
    for evaluation in measured:
        index = int(np.searchsorted(log.step, evaluation.step, side="right")) - 1
        if index >= 0 and math.isfinite(training[index]):
            measure = evaluation.numbers.get("bpb", evaluation.nats)
            rows.append((evaluation.step, measure, float(training[index]), evaluation.nats))
    if len(rows) < 2:
        return []
    steps, measures, trained, nats_column = zip(*rows, strict=True)
    best = int(np.argmin(measures))
    numbers: dict[str, Any] = {"best_step": steps[best], "best": measures[best]}
    rose = measures[-1] / measures[best] - 1 if measures[best] > 0 else 0.0
    if math.isfinite(nats_column[-1]):
        gap = nats_column[-1] - trained[-1]
        earlier = nats_column[len(rows) // 2] - trained[len(rows) // 2]
        numbers |= {"gap_nats": gap, "gap_nats_at_half": earlier}
        gap_text = f"The gap between validation and training is {gap:+.3f} nats a token"
        gap_text += f", {earlier:+.3f} at step {steps[len(rows) // 2]:,}." if math.isfinite(earlier) else "."
    else:
        gap_text = "The gap in nats cannot be told: log the loss of each BpbReport with its bpb."
    if rose > _OVERFIT_SHARE and trained[-1] < trained[best]:
        text = f"Overfitting: validation was best at step {steps[best]:,} ({measures[best]:.4f}) and has risen by "
        text += f"{rose:.1%}, while the training loss went from {trained[best]:.4g} to {trained[-1]:.4g}. {gap_text}"
        return [Observation("overfitting", "warning", text, rule, numbers)]
    best_text = "at the end" if best == len(rows) - 1 else f"at step {steps[best]:,}"
    text = f"No overfitting: validation was best {best_text} ({measures[best]:.4f}). {gap_text}"
    return [Observation("overfitting", "good", text, rule, numbers)]


def mean_window(log: RunLog) -> int:
    """Return over how many steps a single figure of the training loss is the mean: a twentieth, at most 100."""
    return min(100, max(1, int(np.isfinite(log["loss"]).sum()) // 20))


def _evaluations_around(log: RunLog, place: int) -> tuple[Evaluation, Evaluation] | None:
    before = [e for e in log.validation if e.step <= place]
    after = [e for e in log.validation if e.step > place]
    return (before[-1], after[0]) if before and after else None


def _validation_jumped(log: RunLog, place: int) -> bool:
    """Return whether the first evaluation after a place is far above the last before it, by the changes around."""
    before = [e.bpb for e in log.validation if e.step <= place][-10:]
    after = [e.bpb for e in log.validation if e.step > place][:10]
    if min(len(before), len(after)) < 3:
        return False
    usual = float(np.median(np.abs(np.concatenate([np.diff(before), np.diff(after)]))))
    return after[0] - before[-1] > _VALIDATION_JUMP * usual
