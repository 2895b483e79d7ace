"""Comparing a run with the checkpoint it continues, or one phase with the next, before a single weight moves."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from tinygpt.errors import ConfigError

TOPICS = ("data", "model", "schedule")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Change:
    """One thing that differs between a checkpoint and the run that continues it, or between two phases.

    Attributes:
        name: What differs.
        was: What the checkpoint's run would have gone on with.
        will_be: What this run goes on with.
        topic: What to put into `accept` to go on: `"schedule"`, `"model"` or `"data"`; empty for a harmless one;
            `"optimizer"` for one that nobody can accept.
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


@dataclass(frozen=True)
class _Judgement:
    """What is done about a difference: `topic` must be accepted, if a number changes by more than `most_factor`.

    Without a topic it passes with a note, without a factor any change counts. With `forgets` the factor is that of
    what a moving average forgets in a step: 0.99 and 0.999 are far apart.
    """

    what: str
    topic: str = ""
    most_factor: float | None = None
    forgets: bool = False


# The whole policy; the first line that fits decides. The schedules of one run differ by nothing at all at its next
# step. The documented run took unseen a factor of 20 in learning rate and of 3 in what its momentum forgets.
_POLICY = (
    _Judgement("rate momentum", "schedule", 2.0, forgets=True),
    _Judgement("rate beta*", "schedule", 2.0, forgets=True),
    _Judgement("rate *", "schedule", 2.0),  # learning rate, weight decay, and every other number of a group
    _Judgement("optimizer group *", "schedule"),
    _Judgement("parameters of *", "optimizer"),  # moments would be given to parameters that they do not belong to
    _Judgement("tokens of a step", "schedule"),
    _Judgement("grad_clip", "schedule", 2.0),
    _Judgement("model *", "model"),
    _Judgement("loss", "model"),
    _Judgement("source_fingerprint", "data"),
    _Judgement("tokenizer_fingerprint", "data"),
    _Judgement("loader rows"),  # the same rows in other portions
    _Judgement("loader ranks"),
    _Judgement("loader *", "data"),  # row length, packing, order, shares of a mixture, a position that is lost
    _Judgement("validation set", "data"),
    _Judgement("*"),  # horizon, later rates, phases, precision, device, threads, versions
)


def judged(name: str, was: Any, will_be: Any, *, what: str | None = None) -> Change:
    """Return the change with its topic by the policy; `what` is what to look up if the name says more."""
    rule = next(rule for rule in _POLICY if fnmatchcase(what or name, rule.what))
    harmless = UNKNOWN in (was, will_be) or (
        rule.most_factor is not None and not _is_jump(was, will_be, rule.most_factor, forgets=rule.forgets)
    )
    return Change(name, was, will_be, "" if harmless else rule.topic)


def compare_rates(was: Mapping[str, Mapping[str, float]], will_be: Mapping[str, Mapping[str, float]]) -> list[Change]:
    """Compare the rates of a step, group by group; the same change of several groups makes one entry."""
    alike: dict[tuple[str, float | tuple[float, float]], list[tuple[str, Change]]] = {}
    changes = []
    for group in [*was, *(group for group in will_be if group not in was)]:
        old, new = was.get(group), will_be.get(group)
        if old is None or new is None:
            there = ("absent", "there") if old is None else ("there", "absent")
            changes.append(judged(f"optimizer group {group}", *there))
            continue
        for key in sorted(old.keys() | new.keys()):
            a, b = old.get(key, 0.0), new.get(key, 0.0)
            if a != b:
                change = judged(key, a, b, what=f"rate {key}")
                kind = (a, b) if change.factor is None else round(change.factor, 6)
                alike.setdefault((key, kind), []).append((group, change))
    for groups in alike.values():
        label, first = groups[0]
        more = f" and {len(groups) - 1} more groups" if len(groups) > 1 else ""
        changes.append(replace(first, name=f"{first.name} ({label}{more})"))
    return changes


def compare_values(
    was: Mapping[str, Any], will_be: Mapping[str, Any], *, prefix: str = "", missing: Any = UNKNOWN
) -> list[Change]:
    """Compare two flat mappings entry by entry; an entry that the older one lacks was `missing`."""
    pairs = {key: (was.get(key, missing), will_be.get(key)) for key in sorted(was.keys() | will_be.keys())}
    return [
        judged(prefix + key, old, new)
        for key, (old, new) in pairs.items()
        if old != new and (old, new) != (UNKNOWN, None)  # a checkpoint from before there was such a thing
    ]


def checked_accept(accept: Collection[str] | str) -> set[str]:
    """Return the topics as a set; one may be given as a string.

    Raises:
        ConfigError: If one is not known.
    """
    topics = {accept} if isinstance(accept, str) else set(accept)
    if not topics <= set(TOPICS):
        raise ConfigError(f"accept={accept!r} is not known; give a list of {', '.join(TOPICS)}.")
    return topics


def unaccepted(changes: Collection[Change], accept: Collection[str]) -> list[Change]:
    """Return those that matter and were not accepted."""
    return [change for change in changes if change.topic and change.topic not in accept]


def as_rows(changes: Collection[Change]) -> list[list[Any]]:
    """Return the changes as JSON values: name, was, will be."""
    return [[change.name, change.was, change.will_be] for change in changes]


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


def _is_jump(was: Any, will_be: Any, most_factor: float, *, forgets: bool) -> bool:
    if not (isinstance(was, int | float) and isinstance(will_be, int | float)):
        return True  # switched on or off
    if forgets:
        was, will_be = 1 - was, 1 - will_be
    low, high = sorted((abs(was), abs(will_be)))
    return was * will_be < 0 or high > most_factor * low


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 44 else text[:43] + "…"
