"""Learning rate, weight decay and momentum of every optimizer group as functions of the step."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from tinygpt.errors import ConfigError
from tinygpt.schedules import Schedule

# These schedules give a factor on what the group was made with; any other gives the value itself.
_FACTORS = ("lr", "weight_decay")


class Rates:
    """Applies schedules to the groups of an optimizer.

    Args:
        optimizer: Any torch optimizer; what its groups hold now is what factors multiply.
        schedules: By option, such as `"lr"`, for all groups that have it; or by kind and option, such as
            `"muon.weight_decay"`, for the groups of one kind.

    Raises:
        ConfigError: If a schedule names an option that no group has.
    """

    def __init__(self, optimizer: Optimizer, schedules: Mapping[str, Schedule]) -> None:
        self._optimizer = optimizer
        self.schedules = dict(schedules)
        # torch's own schedulers and MuonAdamW keep what a group was made with under initial_..., which stays true when
        # a second trainer takes over an optimizer whose rates have already decayed.
        self._settings = [
            {k: group.get(f"initial_{k}", v) for k, v in group.items() if k not in ("params", "param_names")}
            for group in self._groups
        ]
        self._scheduled: list[dict[str, Schedule]] = [{} for _ in self._groups]
        # Those for one kind come last, so that they win over those for all.
        for key, schedule in sorted(self.schedules.items(), key=lambda item: "." in item[0]):
            if not callable(schedule):
                raise ConfigError(
                    f"the schedule {key!r} is {schedule!r}; give a function of the step, or constant(...)."
                )
            kind, _, option = key.rpartition(".")
            matching = [
                scheduled
                for group, scheduled in zip(self._groups, self._scheduled, strict=True)
                if option in group and (not kind or group.get("kind") == kind)
            ]
            if not matching:
                options = sorted({name for settings in self._settings for name in settings})
                raise ConfigError(f"the schedule {key!r} fits no optimizer group; groups have {', '.join(options)}.")
            for scheduled in matching:
                scheduled[option] = schedule
        kinds = [group.get("kind") for group in self._groups]
        self.lead = kinds.index("muon") if "muon" in kinds else 0

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def apply(self, step: int) -> dict[str, Any]:
        """Set what is scheduled to its value at this step and return the lead group.

        Raises:
            ConfigError: If a schedule gives something that is not a finite number.
        """
        for index, group in enumerate(self._groups):
            values = self._scheduled_values(index, step)
            for option, value in values.items():
                if not math.isfinite(value):
                    raise ConfigError(f"the schedule of {option} gives {value} at step {step}; it must be finite.")
            group.update(values)
        return self._groups[self.lead]

    def restore_settings(self) -> None:
        """Give every group this run's settings again, after a loaded optimizer state brought its own."""
        for group, settings in zip(self._groups, self._settings, strict=True):
            group.update(settings)

    def at(self, step: int) -> dict[str, dict[str, float]]:
        """Return every number that governs a step, by group: scheduled rates and fixed settings alike."""
        result = {}
        for index, group in enumerate(self._groups):
            names = group.get("param_names")
            label = f"{group.get('kind', 'group')} {names[0] if names else index}"
            result[label] = _numbers(group | self._scheduled_values(index, step))
        return result

    def _scheduled_values(self, index: int, step: int) -> dict[str, float]:
        settings = self._settings[index]
        return {
            option: settings[option] * schedule(step) if option in _FACTORS else schedule(step)
            for option, schedule in self._scheduled[index].items()
        }


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
