"""What a user wants done along the way."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tinygpt._numbers import check_whole
from tinygpt.errors import ConfigError
from tinygpt.metrics import StepMetrics

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

Hook = Callable[["Trainer", StepMetrics], None]
"""Called by `Trainer.fit` after each step as `hook(trainer, step)`."""


def every(num_steps: int, function: Hook, *, at_end: bool = True) -> Hook:
    """Return a hook that calls `function` whenever the number of finished steps is a multiple of `num_steps`.

    Args:
        num_steps: The interval.
        function: Called as `function(trainer, step)`.
        at_end: Also call it after the last step of the run.

    Raises:
        ConfigError: If the interval is not positive.
    """
    check_whole(num_steps=num_steps)
    if not callable(function):
        raise ConfigError(f"every calls a function, not a {type(function).__name__}; give one of (trainer, step).")
    if num_steps < 1:
        raise ConfigError(f"every needs a positive number of steps, got {num_steps}.")

    def hook(trainer: "Trainer", step: StepMetrics) -> None:
        done = step.index + 1
        if done % num_steps == 0 or (at_end and done == trainer.config.num_steps):
            function(trainer, step)

    return hook


def checked_hooks(hooks: Sequence[Hook] | Hook) -> list[Hook]:
    """Return the hooks as a list.

    Raises:
        ConfigError: If one cannot be called.
    """
    if callable(hooks):
        return [hooks]
    if isinstance(hooks, str) or not isinstance(hooks, Iterable) or not all(callable(hook) for hook in [*hooks]):
        raise ConfigError(f"hooks is {hooks!r}; give a function of (trainer, step), a list of them, or () for none.")
    return [*hooks]
