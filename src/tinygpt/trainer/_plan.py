"""What a run is going to do, compared phase by phase and written out, before it does it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tinygpt.errors import ConfigError
from tinygpt.metrics import MetricsFile
from tinygpt.trainer._changes import (
    Change,
    as_rows,
    checked_accept,
    compare_rates,
    compare_values,
    format_changes,
    unaccepted,
)
from tinygpt.trainer._identity import dealing, loader_facts
from tinygpt.trainer._phases import Course
from tinygpt.trainer._rates import REWARMED, Rates
from tinygpt.trainer._state import describe_schedules

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

logger = logging.getLogger("tinygpt")

# A plan looks at no more steps of a phase than this; a peak between two of them is not a plateau.
_MOST_STEPS = 10_000


def boundary_changes(course: Course, rates: Rates, index: int) -> list[Change]:
    """Compare the first step of a phase with what the phase before it would have gone on with."""
    step = course.starts[index]
    return [
        *compare_rates(rates.at(step, phase=index - 1), rates.at(step, phase=index)),
        *declared_changes(course, index),
    ]


def declared_changes(course: Course, index: int) -> list[Change]:
    """Return how data, batch and schedules of a phase differ from the phase before: by its own words, so harmless."""
    before, now = ({"tokens of a step": course.step_tokens(i)} | _facts(course, i) for i in (index - 1, index))
    schedules = [describe_schedules(course.phases[i].schedules) for i in (index - 1, index)]
    changes = [*compare_values(before, now, missing=None), *compare_values(*schedules, missing=None)]
    if course.loaders[index] is not course.loaders[index - 1] and before == now:
        changes.append(Change("loader", "", "another one of the same data"))
    return [replace(change, topic="") for change in changes]


def check_boundaries(course: Course, rates: Rates) -> None:
    """Refuse phases between which rates jump, unless the later one accepts it.

    Raises:
        ConfigError: With the rates that jump.
    """
    for index in range(1, len(course.phases)):
        refused = unaccepted(boundary_changes(course, rates, index), checked_accept(course.phases[index].accept))
        if refused:
            raise ConfigError(
                f"where {course.title(index)} begins, at step {course.starts[index]:,}, rates jump:\n"
                + format_changes(refused)
                + "\nSchedules count the steps of the whole run: let both phases give the same at this step, with "
                "one schedule for both for example; or accept the jump knowingly: Phase(..., accept=['schedule'])."
            )


def enter_phase(trainer: "Trainer", output: MetricsFile | None) -> None:
    """Say which phase begins with the next step and what changes with it."""
    course, step = trainer.course, trainer.next_step
    index = course.index_at(step)
    changes = boundary_changes(course, trainer.rates, index)
    course.leave(index - 1)
    trainer.rows.choose_for(course.loaders[index])
    logger.warning("%s begins at step %d:\n%s", course.title(index), step, format_changes(changes))
    if output is not None:
        # Under the step that comes, so that a resume at the boundary does not write it a second time.
        output.write("phase", step, phase=index + 1, name=course.phases[index].name, changes=as_rows(changes))


def describe_plan(trainer: "Trainer") -> str:
    """Return the plan of a run as text."""
    course, config = trainer.course, trainer.config
    tokens = [course.step_tokens(index) for index in range(len(course.phases))]
    known = [each * phase.steps for each, phase in zip(tokens, course.phases, strict=True) if each is not None]
    total = f", {sum(known):,} tokens" if len(known) == len(tokens) else ""
    lines = [f"run of {config.num_steps:,} steps{total}"]
    for index, (phase, start, each) in enumerate(zip(course.phases, course.starts, tokens, strict=True)):
        if index:
            changes = format_changes(boundary_changes(course, trainer.rates, index))
            lines.append(f"at step {start:,}, from {course.title(index - 1)} to {course.title(index)}:")
            lines += [f"    {line}" for line in changes.splitlines()]
        size = "" if each is None else f" of {each:,} tokens"
        last = start + phase.steps - 1
        lines.append(f"{course.title(index)}: steps {start:,} to {last:,}, {phase.steps:,} steps{size}")
        lines += _rate_lines(trainer.rates, start, last)
    if (rewarm := trainer.rates.rewarm) is not None:
        lines.append(
            f"rates go over from those of the checkpoint from step {rewarm.start:,} to step {rewarm.end:,} "
            f"(rewarm_steps={rewarm.steps:,})"
        )
    return "\n".join(lines)


def _rate_lines(rates: Rates, start: int, last: int) -> Iterator[str]:
    """Yield a small table: learning rate, weight decay and momentum of the lead group at start, peak and end."""
    steps = [*range(start, last, max(1, (last - start) // _MOST_STEPS)), last]
    values = [rates.of_lead_at(step) for step in steps]
    yield f"    {'':14}{'start':>11}{'peak':>11}{'end':>11}"
    for option in REWARMED:
        if option in values[0]:
            course = [each[option] for each in values]
            numbers = "".join(f"{number:>11.4g}" for number in (course[0], max(course), course[-1]))
            yield f"    {option.replace('_', ' '):14}{numbers}"


def _facts(course: Course, index: int) -> dict[str, object]:
    loader = course.loaders[index]
    state = loader.state_dict() if hasattr(loader, "state_dict") else {}
    return loader_facts(state, dealing(loader))
