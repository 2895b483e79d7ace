"""Schedules: pure functions of the step that say by how much to multiply a rate.

A `Schedule` is any `Callable[[int], float]`; the builders here return ones whose `repr` is the call that made them,
so that a run record can keep it. Steps count from 0, and a schedule that ends keeps its last value.
"""

import math
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from itertools import pairwise
from typing import Literal, ParamSpec

from tinygpt._numbers import check_real, given
from tinygpt.errors import ConfigError

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_weight_decay",
    "join",
    "linear_warmup",
    "muon_momentum",
    "warmup_stable_decay",
]

Schedule = Callable[[int], float]

_Params = ParamSpec("_Params")


class _DescribedSchedule:
    """A schedule that shows how it was built."""

    def __init__(self, description: str, function: Schedule) -> None:
        self._description = description
        self._function = function

    def __call__(self, step: int) -> float:
        check_real(step=step)
        if step < 0:
            raise ConfigError(f"step={step} is not possible; steps count from 0.")
        return self._function(step)

    def __repr__(self) -> str:
        return self._description


def _described(build: Callable[_Params, Schedule]) -> Callable[_Params, Schedule]:
    """Make a builder return a schedule whose `repr` is the call, defaults included."""

    @wraps(build)
    def wrapper(*args: _Params.args, **kwargs: _Params.kwargs) -> Schedule:
        bound = signature(build).bind(*args, **kwargs)
        bound.apply_defaults()
        shown: list[str] = []
        for name, value in bound.arguments.items():
            if signature(build).parameters[name].kind is Parameter.VAR_POSITIONAL:
                shown.extend(repr(item) for item in value)
            else:
                shown.append(f"{name}={value!r}")
        return _DescribedSchedule(f"{build.__name__}({', '.join(shown)})", build(*args, **kwargs))

    return wrapper


@_described
def constant(value: float = 1.0) -> Schedule:
    """Return `value` at every step."""
    check_real(value=value)
    return lambda step: value


@_described
def linear_warmup(warmup_steps: int, *, peak: float = 1.0) -> Schedule:
    """Rise linearly to `peak`, then stay there.

    Args:
        warmup_steps: Length of the rise. The first step already has `peak / warmup_steps` and not zero, and step
            `warmup_steps - 1` has `peak`.
        peak: The value reached.

    Raises:
        ConfigError: If `warmup_steps` is not positive.
    """
    check_real(warmup_steps=warmup_steps, peak=peak)
    _check_positive("warmup_steps", warmup_steps)
    return lambda step: peak * min(1.0, (step + 1) / warmup_steps)


@_described
def warmup_stable_decay(
    total_steps: int,
    *,
    warmup_steps: int = 0,
    decay_fraction: float | None = None,
    decay_steps: int | None = None,
    final: float = 0.0,
    shape: Literal["linear", "one_minus_sqrt"] = "linear",
) -> Schedule:
    """Rise to 1, stay there, and decay to `final` at the end.

    Step `s < warmup_steps` has `(s + 1) / warmup_steps`. The decay begins after step `total_steps - decay_steps`,
    the last with value 1, and reaches `final` at step `total_steps`. Where the two overlap the warm-up wins.

    Args:
        total_steps: Length of the run.
        warmup_steps: Length of the rise.
        decay_fraction: The decay's share of the run. Give this or `decay_steps`.
        decay_steps: Length of the decay.
        final: Last value.
        shape: `"linear"`, or `"one_minus_sqrt"`, which falls fast first and then ever slower.

    Raises:
        ConfigError: If lengths or fractions do not fit, both or neither decay is given, or the shape is unknown.

    References:
        Hu et al., [MiniCPM](https://arxiv.org/abs/2404.06395), 2024. Hägele et al., [Scaling Laws and
        Compute-Optimal Training Beyond Fixed Training Durations](https://arxiv.org/abs/2405.18392), 2024, for
        1 - sqrt.

    Example:
        ```python
        lr = warmup_stable_decay(87_000, warmup_steps=40, decay_fraction=0.65, final=0.05)
        ```
    """
    check_real(total_steps=total_steps, warmup_steps=warmup_steps, final=final)
    check_real(**given(decay_fraction=decay_fraction, decay_steps=decay_steps))
    _check_positive("total_steps", total_steps)
    _check_within("warmup_steps", warmup_steps, total_steps, total_steps)
    if (decay_fraction is None) == (decay_steps is None):
        raise ConfigError("warmup_stable_decay needs exactly one of decay_fraction and decay_steps.")
    if decay_fraction is not None:
        _check_fraction(decay_fraction)
        decay_steps = round(decay_fraction * total_steps)
    assert decay_steps is not None
    _check_within("decay_steps", decay_steps, total_steps, total_steps)
    if shape not in ("linear", "one_minus_sqrt"):
        raise ConfigError(f"shape={shape!r} is unknown; choose 'linear' or 'one_minus_sqrt'.")
    length = decay_steps

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        left = total_steps - min(step, total_steps)
        if left >= length:
            # Without a decay `final` has no step to stand at.
            return 1.0
        remaining = left / length
        if shape == "one_minus_sqrt":
            remaining = 1 - math.sqrt(1 - remaining)
        return remaining + (1 - remaining) * final

    return schedule


@_described
def cosine(total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Rise to 1 linearly, then fall to `final` along half a cosine.

    Args:
        total_steps: Length of the run; `final` is reached at this step.
        warmup_steps: Length of the rise; step `warmup_steps` has 1.
        final: Last value.

    Raises:
        ConfigError: If `total_steps` is not positive or `warmup_steps` not below it.

    References:
        Loshchilov and Hutter, [SGDR](https://arxiv.org/abs/1608.03983), 2016, without restarts.
    """
    check_real(total_steps=total_steps, warmup_steps=warmup_steps, final=final)
    _check_positive("total_steps", total_steps)
    _check_within("warmup_steps", warmup_steps, total_steps - 1, total_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (min(step, total_steps) - warmup_steps) / (total_steps - warmup_steps)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return schedule


@_described
def join(*parts: tuple[int, Schedule], restart: bool = True) -> Schedule:
    """Follow one schedule after the other.

    Args:
        parts: Pairs of the first step and the schedule that holds from there; the first pair has step 0.
        restart: Count each part's steps from its own beginning. With False every part sees the step of the whole
            run, which is what happens when a run is resumed with a longer horizon.

    Raises:
        ConfigError: If there is no part, the first does not begin at 0, or the beginnings do not increase.

    Example:
        ```python
        lr = join((0, linear_warmup(100)), (100, cosine(900)))
        ```
    """
    for part in parts:
        if not (isinstance(part, tuple) and len(part) == 2 and callable(part[1])):
            raise ConfigError(f"join got {part!r}; a part is a pair of its first step and a schedule.")
        check_real(start=part[0])
    starts = [start for start, _ in parts]
    if not starts or starts[0] != 0 or any(after <= before for before, after in pairwise(starts)):
        raise ConfigError(f"join got parts that begin at {starts}; they must begin at 0 and increase.")

    def schedule(step: int) -> float:
        start, part = next((start, part) for start, part in reversed(parts) if start <= step)
        return part(step - start if restart else step)

    return schedule


@_described
def muon_momentum(
    total_steps: int,
    *,
    decay_fraction: float = 0.65,
    warmup_steps: int = 400,
    start: float = 0.85,
    peak: float = 0.97,
    final: float = 0.90,
) -> Schedule:
    """Muon's momentum in the documented run: a rise, a plateau, and a fall while the learning rate decays.

    The values are momenta and not factors. In a run too short for all three the rise comes first: in the first
    `warmup_steps` nothing decays, and in a run of fewer steps the fall is never seen.

    Args:
        total_steps: Length of the run.
        decay_fraction: The fall's share of the run, as that of the learning rate.
        warmup_steps: Length of the rise.
        start: Momentum at step 0.
        peak: Momentum from step `warmup_steps`.
        final: Momentum at step `total_steps`.

    Raises:
        ConfigError: If `total_steps` is not positive, `warmup_steps` negative or `decay_fraction` not within 0 to 1.
    """
    check_real(total_steps=total_steps, decay_fraction=decay_fraction, warmup_steps=warmup_steps)
    check_real(start=start, peak=peak, final=final)
    _check_positive("total_steps", total_steps)
    if warmup_steps < 0:
        raise ConfigError(f"warmup_steps={warmup_steps} must not be negative.")
    _check_fraction(decay_fraction)
    decay_steps = round(decay_fraction * total_steps)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            rise = step / warmup_steps
            return (1 - rise) * start + rise * peak
        left = total_steps - min(step, total_steps)
        if left >= decay_steps:
            return peak
        fall = 1 - left / decay_steps
        return (1 - fall) * peak + fall * final

    return schedule


@_described
def cosine_weight_decay(total_steps: int) -> Schedule:
    """Fall from 1 to 0 along half a cosine: the factor on Muon's weight decay in the documented run.

    Args:
        total_steps: Length of the run; 0 is reached at this step.

    Raises:
        ConfigError: If `total_steps` is not positive.
    """
    check_real(total_steps=total_steps)
    _check_positive("total_steps", total_steps)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))


def _check_positive(name: str, value: int) -> None:
    if not 1 <= value < math.inf:
        raise ConfigError(f"{name}={value} must be at least 1.")


def _check_within(name: str, value: int, limit: int, total_steps: int) -> None:
    if not 0 <= value <= limit:
        raise ConfigError(f"{name}={value} does not fit a run of {total_steps} steps; choose 0 to {limit}.")


def _check_fraction(value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"decay_fraction={value} must be within 0 to 1.")
