"""Learning rate, weight decay and momentum of every optimizer group as functions of the step."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tinygpt._numbers import check_real
from tinygpt.errors import ConfigError
from tinygpt.schedules import Schedule

# These schedules give a factor on what the group was made with; any other gives the value itself.
_FACTORS = ("lr", "weight_decay")

REWARMED = ("lr", "weight_decay", "momentum")


@dataclass(frozen=True)
class Rewarm:
    """A window in which rates go linearly from those of a checkpoint to those of this run.

    Attributes:
        start: The first step of the window, which still has the rates of the checkpoint.
        steps: Its length; step `start + steps` has exactly this run's rates.
        was: The rates that the checkpoint would have gone on with, by group and option.
    """

    start: int
    steps: int
    was: Mapping[str, Mapping[str, float]]

    @property
    def end(self) -> int:
        """The first step after the window."""
        return self.start + self.steps


class Rates:
    """Applies schedules to the groups of an optimizer.

    Args:
        optimizer: Any torch optimizer; what its groups hold now is what factors multiply.
        phases: The schedules of each phase: by option, such as `"lr"`, for all groups that have it; or by kind and
            option, such as `"muon.weight_decay"`, for the groups of one kind.
        starts: The first step of each phase.

    Attributes:
        lead: Index of the first Muon group, or of the first group if there is none.
        rewarm: The window of a resume with `rewarm_steps`.

    Raises:
        ConfigError: If a schedule names an option that no group has.
    """

    def __init__(self, optimizer: Optimizer, phases: Sequence[Mapping[str, Schedule]], starts: Sequence[int]) -> None:
        self._optimizer = optimizer
        self._phases = [dict(schedules) for schedules in phases]
        self._starts = list(starts)
        self.rewarm: Rewarm | None = None
        # torch's own schedulers and MuonAdamW keep what a group was made with under initial_..., which stays true when
        # a second trainer takes over an optimizer whose rates have already decayed.
        self._settings = [
            {k: group.get(f"initial_{k}", v) for k, v in group.items() if k not in ("params", "param_names")}
            for group in self._groups
        ]
        self._scheduled = [self._by_group(schedules) for schedules in self._phases]
        # What some phase schedules is set in all of them: a phase that does not has it as the group was made.
        self._governed = [{option for phase in self._scheduled for option in phase[i]} for i in range(len(self.labels))]
        kinds = [group.get("kind") for group in self._groups]
        self.lead = kinds.index("muon") if "muon" in kinds else 0

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @property
    def labels(self) -> list[str]:
        """A name for each group: its kind and its first parameter, or its number where parameters have no names."""
        firsts = [(group.get("param_names") or [index])[0] for index, group in enumerate(self._groups)]
        return [f"{group.get('kind', 'group')} {first}" for group, first in zip(self._groups, firsts, strict=True)]

    def schedules_at(self, step: int) -> dict[str, Schedule]:
        """Return the schedules of the phase that a step lies in."""
        return self._phases[self._phase_at(step)]

    def apply(self, step: int) -> dict[str, Any]:
        """Set what is scheduled to its value at this step and return the lead group.

        Raises:
            ConfigError: If a schedule gives something that is not a finite number, or a negative rate.
        """
        phase = self._phase_at(step)
        for index, group in enumerate(self._groups):
            values = self._values(index, step, phase)
            for option, value in values.items():
                if not math.isfinite(value):
                    raise ConfigError(f"the schedule of {option} gives {value} at step {step}; it must be finite.")
                if value < 0 and option in REWARMED:
                    raise ConfigError(f"the schedule of {option} gives {value} at step {step}; give 0 or more.")
            group.update(values)
        return self._groups[self.lead]

    def restore_settings(self) -> None:
        """Give every group this run's settings again, after a loaded optimizer state brought its own."""
        for group, settings in zip(self._groups, self._settings, strict=True):
            group.update(settings)

    def at(self, step: int, *, phase: int | None = None) -> dict[str, dict[str, float]]:
        """Return every number that governs a step, by group: scheduled rates and fixed settings alike.

        Args:
            step: The step.
            phase: By the schedules of this phase, whichever the step lies in.
        """
        phase = self._phase_at(step) if phase is None else phase
        return {
            label: _numbers(group | self._values(index, step, phase))
            for index, (label, group) in enumerate(zip(self.labels, self._groups, strict=True))
        }

    def of_lead_at(self, step: int) -> dict[str, float]:
        """Return the numbers of the lead group at a step."""
        return _numbers(self._groups[self.lead] | self._values(self.lead, step, self._phase_at(step)))

    def _phase_at(self, step: int) -> int:
        return bisect_right(self._starts, step) - 1

    def _by_group(self, schedules: Mapping[str, Schedule]) -> list[dict[str, Schedule]]:
        scheduled: list[dict[str, Schedule]] = [{} for _ in self._groups]
        # Those for one kind come last, so that they win over those for all.
        for key, schedule in sorted(schedules.items(), key=lambda item: "." in item[0]):
            if not callable(schedule):
                raise ConfigError(
                    f"the schedule {key!r} is {schedule!r}; give a function of the step, or constant(...)."
                )
            kind, _, option = key.rpartition(".")
            matching = [
                entry
                for group, entry in zip(self._groups, scheduled, strict=True)
                if option in group and (not kind or group.get("kind") == kind)
            ]
            if not matching:
                options = sorted({name for settings in self._settings for name in settings})
                raise ConfigError(f"the schedule {key!r} fits no optimizer group; groups have {', '.join(options)}.")
            for entry in matching:
                entry[option] = schedule
        return scheduled

    def _values(self, index: int, step: int, phase: int) -> dict[str, Any]:
        """Return the options of a group that this class decides at a step."""
        settings = self._settings[index]
        values = {option: settings[option] for option in self._governed[index]}
        for option, schedule in self._scheduled[phase][index].items():
            value = schedule(step)
            if not isinstance(value, Tensor):
                check_real(**{f"schedules[{option!r}]({step})": value})
            values[option] = settings[option] * value if option in _FACTORS else value
        if self.rewarm is not None and step >= self.rewarm.start:
            share = min(1.0, (step - self.rewarm.start) / self.rewarm.steps)
            for option, was in self.rewarm.was.get(self.labels[index], {}).items():
                target = values.get(option, settings[option])
                values[option] = target if share == 1 else was + (target - was) * share
        return values


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the numeric settings, tuples spread, without the starting values that schedules multiply."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if key in ("params", "param_names") or key.startswith("initial_"):
            continue
        is_sequence = isinstance(value, tuple | list)
        for index, item in enumerate(value if is_sequence else (value,)):
            if isinstance(item, int | float) or (isinstance(item, Tensor) and item.numel() == 1):
                numbers[f"{key}[{index}]" if is_sequence else key] = float(item)
    return numbers
