"""Comparing a run with the checkpoint it continues, before a single weight moves."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tinygpt.errors import CheckpointError, ConfigError

# Beyond these a resume stops unless the user accepts it. The schedules of one run differ by nothing at all here; the
# jump that the documented run took unseen was a factor of 20 in learning rate and of 3 in what momentum forgets.
_MOST_FACTOR = 2.0


@dataclass(frozen=True)
class Change:
    """One thing that differs between a checkpoint and the run that continues it.

    Attributes:
        name: What differs.
        was: What the checkpoint's run would have gone on with.
        will_be: What this run goes on with.
        topic: What to put into `accept` to go on: `"schedule"`, `"model"` or `"data"`; empty for a harmless one.
    """

    name: str
    was: Any
    will_be: Any
    topic: str = ""

    @property
    def factor(self) -> float | None:
        """New over old, for numbers."""
        numbers = isinstance(self.was, int | float) and isinstance(self.will_be, int | float)
        return self.will_be / self.was if numbers and self.was else None


def compare_rates(was: Mapping[str, Mapping[str, float]], will_be: Mapping[str, Mapping[str, float]]) -> list[Change]:
    """Compare the rates of the next step, group by group; the same change of several groups makes one entry."""
    alike: dict[tuple[str, float | tuple[float, float]], list[tuple[str, Change]]] = {}
    changes = []
    for group in [*was, *(group for group in will_be if group not in was)]:
        old, new = was.get(group), will_be.get(group)
        if old is None or new is None:
            there = ("absent", "there") if old is None else ("there", "absent")
            changes.append(Change(f"optimizer group {group}", *there, topic="schedule"))
            continue
        for key in sorted(old.keys() | new.keys()):
            a, b = old.get(key, 0.0), new.get(key, 0.0)
            if a != b:
                change = Change(key, a, b, "schedule" if _is_jump(key, a, b) else "")
                kind = (a, b) if change.factor is None else round(change.factor, 6)
                alike.setdefault((key, kind), []).append((group, change))
    for groups in alike.values():
        label, first = groups[0]
        more = f" and {len(groups) - 1} more groups" if len(groups) > 1 else ""
        changes.append(replace(first, name=f"{first.name} ({label}{more})"))
    return changes


def compare_values(
    was: Mapping[str, Any], will_be: Mapping[str, Any], *, prefix: str = "", topics: Mapping[str, str] | str = ""
) -> list[Change]:
    """Compare two flat mappings entry by entry; `topics` names the topic of all, or of each that has one."""
    return [
        Change(prefix + key, was.get(key), will_be.get(key), topics if isinstance(topics, str) else topics.get(key, ""))
        for key in sorted(was.keys() | will_be.keys())
        if was.get(key) != will_be.get(key)
    ]


def checked_accept(accept: Collection[str] | str) -> set[str]:
    """Return the topics as a set; one may be given as a string.

    Raises:
        ConfigError: If one is not known.
    """
    topics = {accept} if isinstance(accept, str) else set(accept)
    known = ("data", "model", "schedule")
    if not topics <= set(known):
        raise ConfigError(f"accept={accept!r} is not known; give a list of {', '.join(known)}.")
    return topics


def refuse_unaccepted(changes: list[Change], accept: Collection[str]) -> None:
    """Raise `CheckpointError` with a table if something that matters differs and was not accepted."""
    refused = [change for change in changes if change.topic and change.topic not in accept]
    if not refused:
        return
    topics = sorted({change.topic for change in refused})
    ways = {
        "schedule": "keep the schedule, horizon and batch that the checkpoint was trained with",
        "model": "build the model with the config of the checkpoint",
        "data": "use the data, tokenizer and loader settings of the checkpoint",
    }
    raise CheckpointError(
        "this run would go on differently from the checkpoint:\n"
        + format_changes(refused)
        + "\nEither "
        + "; ".join(ways[topic] for topic in topics)
        + f"; or accept it knowingly: accept={topics}."
    )


def format_changes(changes: list[Change]) -> str:
    """Return the changes as a table: name, was, will be, factor."""
    if not changes:
        return "nothing changes"
    rows = [("", "was", "will be", "factor")]
    for change in changes:
        factor = change.factor
        rows.append(
            (change.name, _short(change.was), _short(change.will_be), "" if factor is None else f"x {factor:.4g}")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _is_jump(key: str, was: float, will_be: float) -> bool:
    if key == "momentum" or key.startswith("beta"):
        was, will_be = 1 - was, 1 - will_be  # what a moving average forgets in a step: 0.99 and 0.999 are far apart
    low, high = sorted((abs(was), abs(will_be)))
    return was * will_be < 0 or high > _MOST_FACTOR * low


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 44 else text[:43] + "…"
