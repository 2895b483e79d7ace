"""The phases of a run: what each trains on, by which schedules, and whose turn it is at a step."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate
from typing import Any

from tinygpt.data import Batch, BatchLoader
from tinygpt.errors import ConfigError
from tinygpt.schedules import Schedule
from tinygpt.trainer._changes import checked_accept


@dataclass(frozen=True, eq=False)
class Phase:
    """A part of a run with schedules, and if need be data and batch, of its own.

    Schedules are functions of the step of the whole run, so two phases with the same schedules differ by nothing.

    Args:
        steps: Optimizer steps of this phase.
        schedules: As `Trainer(schedules=...)`; an option that only other phases schedule is as its group was made.
        name: What to call it in plans and logs.
        loader: What it reads; `None` for the loader of the `Trainer`. A loader of several phases goes on where it
            stands.
        batch_tokens: Tokens of one step; `None` for those of the `TrainerConfig`.
        accept: `"schedule"` if rates may jump where this phase begins.

    Raises:
        ConfigError: If a number is not positive, schedules are not by name, or a topic is not known.

    Example:
        ```python
        from tinygpt.schedules import linear_warmup, warmup_stable_decay
        from tinygpt.trainer import Phase

        stable = Phase(800, {"lr": linear_warmup(40)}, name="stable")
        decay = Phase(200, {"lr": warmup_stable_decay(1_000, warmup_steps=40, decay_steps=200)}, name="decay")
        ```
    """

    steps: int
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    _: KW_ONLY
    name: str = ""
    loader: Iterable[Batch] | None = None
    batch_tokens: int | None = None
    accept: Collection[str] | str = ()

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_tokens", self.batch_tokens)):
            if (value is not None or name == "steps") and (type(value) is not int or value < 1):
                raise ConfigError(f"a phase has {name}={value!r}; choose 1 or more.")
        if not isinstance(self.schedules, Mapping):
            raise ConfigError(
                f"a phase has schedules={self.schedules!r}; give a dict by option, such as {{'lr': constant()}}."
            )
        if self.loader is not None and (isinstance(self.loader, str) or not hasattr(self.loader, "__iter__")):
            raise ConfigError(f"a phase has a {type(self.loader).__name__} as loader; give a BatchLoader, for example.")
        checked_accept(self.accept)


class Course:
    """The phases of a run in order, and who reads what at which step.

    Args:
        phases: At least one.
        loader: What phases without a loader of their own read.
        batch_tokens: Tokens of a step in phases that do not say.
    """

    def __init__(self, phases: Sequence[Phase], loader: Iterable[Batch], batch_tokens: int | None) -> None:
        self.phases = tuple(phases)
        ends = list(accumulate(phase.steps for phase in phases))
        self.starts = [0, *ends[:-1]]
        self.num_steps = ends[-1]
        self.loaders: list[Any] = [loader if phase.loader is None else phase.loader for phase in phases]
        self.batch_tokens = [phase.batch_tokens or batch_tokens for phase in phases]
        self._iterators: dict[int, Iterator[Batch]] = {}

    @property
    def boundaries(self) -> frozenset[int]:
        """The first step of every phase but the first."""
        return frozenset(self.starts[1:])

    def index_at(self, step: int) -> int:
        """Return the number of the phase that a step lies in, from 0; the last one has everything after it too."""
        return bisect_right(self.starts, step) - 1

    def title(self, index: int) -> str:
        """Return how to call a phase: its number from 1, and its name if it has one."""
        return f"phase {index + 1}" + (f" ({self.phases[index].name})" if self.phases[index].name else "")

    def step_tokens(self, index: int) -> int | None:
        """Return the tokens of one step of a phase, as far as settings and loader tell."""
        rows, seq_len = (getattr(self.loaders[index], name, None) for name in ("rows", "seq_len"))
        return self.batch_tokens[index] or (rows * seq_len if rows and seq_len else None)

    def first_user(self, index: int) -> int:
        """Return the first phase that reads from the loader of this one."""
        return next(i for i, loader in enumerate(self.loaders) if loader is self.loaders[index])

    def batches_at(self, step: int) -> Iterator[Batch]:
        """Return the batches of the phase that a step lies in, where its loader stands."""
        loader = self.loaders[self.index_at(step)]
        if id(loader) not in self._iterators:
            self._iterators[id(loader)] = iter(loader)
        return self._iterators[id(loader)]

    def replace_loader(self, index: int, loader: Iterable[Batch]) -> None:
        """Let all phases that read from the loader of this one read from another."""
        old = self.loaders[index]
        self.loaders = [loader if each is old else each for each in self.loaders]

    def restart_loaders(self) -> None:
        """Ask every loader for an iterator again, after its position was changed."""
        self._iterators.clear()

    def leave(self, index: int) -> None:
        """Stop what the loader of a phase that is over does ahead, unless the next one goes on with it."""
        loader = self.loaders[index]
        if loader is not self.loaders[index + 1] and isinstance(loader, BatchLoader):  # it can be asked again later
            loader.close()
