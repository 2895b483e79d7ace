"""Comparing a checkpoint with the run that goes on from it, everything that shapes training."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tinygpt.data import BatchLoader
from tinygpt.errors import ConfigError
from tinygpt.trainer._changes import UNKNOWN, Change, compare_rates, compare_values, judged
from tinygpt.trainer._identity import compare_groups, dealing, group_members, loader_facts
from tinygpt.trainer._plan import declared_changes
from tinygpt.trainer._rates import REWARMED, Rewarm
from tinygpt.trainer._state import environment, model_config, plain_module, settings

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


class Resumption:
    """The step at which a run goes on, seen from the checkpoint and from the run.

    Attributes:
        step: The next step.
        phase: The run's phase that it lies in.
        begins_phase: Whether a phase begins there that the run of the checkpoint did not have: what it changes was
            declared.
    """

    def __init__(self, trainer: "Trainer", state: Mapping[str, Any]) -> None:
        self._trainer, self._state = trainer, state
        self._course = trainer.course
        self.step = int(state["next_step"])
        self.phase = self._course.index_at(self.step)
        ends = list(accumulate(each["steps"] for each in state.get("phases", [])))
        self.begins_phase = self.step in self._course.boundaries and bisect_right(ends[:-1], self.step) != self.phase
        # The checkpoint's loader is that of the phase that its run was in; those of earlier phases are by number.
        self._present = self.phase - (1 if self.begins_phase else 0)
        loaders = self._course.loaders
        self._positions = {self._present: state.get("loader")}
        self._dealing = {self._present: state.get("identity", {}).get("loader", {})}
        for index, saved in ((int(key), saved) for key, saved in state.get("other loaders", {}).items()):
            if index < len(loaders) and loaders[index] is not loaders[self._present]:
                self._positions[index], self._dealing[index] = saved["position"], saved["dealing"]

    def compare_rates(self, rewarm_steps: int | None) -> list[Change]:
        """Compare the rates of the next step, with the window of an earlier resume, or with a new one if asked for."""
        rates, saved = self._trainer.rates, self._state.get("rates")
        if rewarm_steps is not None and (type(rewarm_steps) is not int or rewarm_steps < 1):
            raise ConfigError(f"rewarm_steps={rewarm_steps!r} is not a number of steps; choose 1 or more.")
        window = self._state.get("rewarm")
        rates.rewarm = None if window is None else Rewarm(**window)
        if saved is None:
            return compare_values({}, {"rates of the next step": "as planned"})
        now = rates.at(self.step)
        was = {
            group: {key: saved[group][key] for key in REWARMED if key in rates_now and key in saved[group]}
            for group, rates_now in now.items()
            if group in saved
        }
        if rewarm_steps is None or all(now[group][key] == was[group][key] for group in was for key in was[group]):
            # Also inside the window of an earlier resume: run again with the same arguments, a run goes on the same.
            return compare_rates(saved, now)
        left = self._trainer.config.num_steps - self.step
        if rewarm_steps > left:
            raise ConfigError(f"rewarm_steps={rewarm_steps} is longer than what is left of the run, {left:,} steps.")
        rates.rewarm = Rewarm(self.step, rewarm_steps, was)
        at_end = rates.at(rates.rewarm.end)
        over = compare_rates(was, {group: {key: at_end[group][key] for key in was[group]} for group in was})
        named = [replace(each, name=f"{each.name} over {rewarm_steps:,} steps", topic="") for each in over]
        return [*named, *compare_rates(saved, rates.at(self.step))]

    def compare_rest(self) -> list[Change]:
        """Compare everything but the rates."""
        trainer, state = self._trainer, self._state
        identity, validation = state.get("identity", {}), trainer.measured_on.own
        changes = compare_groups(identity.get("groups"), group_members(trainer))
        model = model_config(plain_module(trainer.model))
        changes += compare_values(state.get("model_config", {}), model, prefix="model ")
        for index in self._positions:
            changes += self._compare_loader(index)
        if validation is not None and (known := identity.get("validation set", UNKNOWN)) is not None:
            changes += compare_values({"validation set": known}, {"validation set": validation})
        changes += self._compare_phases()
        changes += self._compare_settings()
        return [*changes, *compare_values(state.get("environment", {}), environment(trainer))]

    def load_loaders(self, accept: set[str]) -> None:
        """Put every loader to its position, except those that start over."""
        for index, position in self._positions.items():
            loader = self._course.loaders[index]
            over = not self._is_needed(index) and self._facts_that_differ(index)
            if position is None or not hasattr(loader, "load_state_dict") or over or self._starts_over(index):
                continue
            if isinstance(loader, BatchLoader):
                loader.load_state_dict(position, allow_source_change="data" in accept)
            else:
                loader.load_state_dict(position)

    def _compare_loader(self, index: int) -> list[Change]:
        position = self._positions[index]
        if position is None or not hasattr(self._course.loaders[index], "load_state_dict"):
            # Without a position the data starts over, which nobody would see in the loss for a while.
            changes = [judged("loader position", "saved" if position else "not saved", "starts over")]
        else:
            changes = self._facts_that_differ(index)
            if self._starts_over(index):
                changes.append(judged("loader position", "saved", "starts over"))
        if index != self._present:
            changes = [replace(change, name=f"phase {index + 1} {change.name}") for change in changes]
        return changes if self._is_needed(index) else [replace(change, topic="") for change in changes]

    def _is_needed(self, index: int) -> bool:
        """Return whether a loader is still to be read from."""
        return any(loader is self._course.loaders[index] for loader in self._course.loaders[self.phase :])

    def _facts_that_differ(self, index: int) -> list[Change]:
        loader, position = self._course.loaders[index], self._positions[index]
        if position is None or not hasattr(loader, "state_dict"):
            return []
        was = loader_facts(position, self._dealing[index])
        return compare_values(was, loader_facts(loader.state_dict(), dealing(loader)))

    def _starts_over(self, index: int) -> bool:
        """Return whether a position cannot be gone on from: its rows are of another length, packing, order or text."""
        kept = ("source_fingerprint", "loader weights")
        return any(change.topic and change.name not in kept for change in self._facts_that_differ(index))

    def _compare_phases(self) -> list[Change]:
        saved = self._state.get("phases", [])
        own = [{"name": phase.name, "steps": phase.steps} for phase in self._course.phases]
        if saved == own or max(len(saved), len(own)) == 1:
            return []  # the horizon of a run of one phase is compared as num_steps
        texts = [" + ".join(f"{each['name']} {each['steps']:,}".strip() for each in phases) for phases in (saved, own)]
        return [judged("phases", texts[0] or UNKNOWN, texts[1])]

    def _compare_settings(self) -> list[Change]:
        saved, now = self._state.get("settings", {}), settings(self._trainer, self.step)
        # A run without a schedule is not one of which nothing is known.
        saved = {**{key: None for key in now if key.startswith("schedule ")}, **saved}
        if saved.get("tokens of a step") is None or now["tokens of a step"] is None:  # a loader need not tell
            saved, now = ({k: v for k, v in each.items() if k != "tokens of a step"} for each in (saved, now))
        changes = compare_values(saved, now)
        if not self.begins_phase:
            return changes
        names = {change.name for change in changes}
        declared = [change for change in declared_changes(self._course, self.phase) if change.name not in names]
        return [replace(each, topic="") if each.name == "tokens of a step" else each for each in changes] + declared
