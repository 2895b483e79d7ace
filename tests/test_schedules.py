"""Schedules against the formulas of the documented run, written out step by step."""

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import ConfigError
from tinygpt.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_weight_decay,
    join,
    linear_warmup,
    muon_momentum,
    warmup_stable_decay,
)


def run_lr(step: int, total: int) -> float:
    decay_steps = round(0.65 * total)
    if step < 40:
        return (step + 1) / 40
    if step <= total - decay_steps:
        return 1.0
    part = (total - step) / decay_steps
    return part * 1.0 + (1 - part) * 0.05


def run_momentum(step: int, total: int) -> float:
    decay_steps = round(0.65 * total)
    if step < 400:
        return (1 - step / 400) * 0.85 + step / 400 * 0.97
    if step >= total - decay_steps:
        progress = (step - (total - decay_steps)) / decay_steps
        return 0.97 * (1 - progress) + 0.90 * progress
    return 0.97


def shown_steps(total: int) -> list[int]:
    middle = total - round(0.65 * total)
    around = {0, 1, 38, 39, 40, 41, 399, 400, 401, middle - 1, middle, middle + 1, total - 1, total}
    return sorted(step for step in around | set(range(0, total, max(1, total // 97))) if 0 <= step <= total)


@pytest.mark.parametrize("total", [50, 300, 1000, 10_000, 87_000])
def test_the_run_is_reproduced(total: int) -> None:
    lr = warmup_stable_decay(total, warmup_steps=40, decay_fraction=0.65, final=0.05)
    momentum, weight_decay = muon_momentum(total), cosine_weight_decay(total)
    for step in shown_steps(total):
        assert lr(step) == pytest.approx(run_lr(step, total), abs=1e-12), step
        assert momentum(step) == pytest.approx(run_momentum(step, total), abs=1e-12), step
        assert weight_decay(step) == pytest.approx(0.5 * (1 + math.cos(math.pi * step / total)), abs=1e-12)


def test_the_jump_at_the_resume_of_the_run() -> None:
    """At step 10,000 the horizon went to 87,000: the rate from 5 % to all, the momentum from 0.90 to 0.97."""
    lr = join(
        *((start, warmup_stable_decay(total, warmup_steps=40, decay_fraction=0.65, final=0.05))
          for start, total in ((0, 10_000), (10_000, 87_000))),
        restart=False,
    )  # fmt: skip
    assert lr(9_999) == pytest.approx(0.05, abs=2e-4)
    assert lr(10_000) == 1.0
    assert lr(30_450) == 1.0
    assert lr(30_451) < 1.0
    assert lr(87_000) == pytest.approx(0.05)
    assert (muon_momentum(10_000)(10_000), muon_momentum(87_000)(10_000)) == pytest.approx((0.90, 0.97))


def test_momentum_of_a_short_run_only_rises() -> None:
    schedule = muon_momentum(300)
    values = [schedule(step) for step in range(301)]
    assert values == sorted(values)
    assert values[-1] < 0.97


ALL: list[tuple[Callable[[int], Schedule], float, float]] = [
    (lambda total: warmup_stable_decay(total, warmup_steps=3, decay_fraction=0.5, final=0.1), 0.1, 1.0),
    (lambda total: warmup_stable_decay(total, decay_steps=4, final=0.2, shape="one_minus_sqrt"), 0.2, 1.0),
    (lambda total: cosine(total, warmup_steps=2, final=0.1), 0.1, 1.0),
    (cosine_weight_decay, 0.0, 1.0),
    (lambda total: muon_momentum(total, warmup_steps=2), 0.85, 0.97),
]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(total=st.integers(4, 2000), which=st.integers(0, len(ALL) - 1), data=st.data())
def test_values_stay_in_range_and_clamp_after_the_end(total: int, which: int, data: st.DataObject) -> None:
    build, low, high = ALL[which]
    schedule = build(total)
    step = data.draw(st.integers(0, 3 * total))
    assert 0 <= schedule(step) <= high + 1e-12
    if step >= total:
        assert schedule(step) == schedule(total)
        assert schedule(total) == pytest.approx(0.90 if high == 0.97 else low)


def test_one_minus_sqrt_lies_under_linear_and_meets_it_at_the_ends() -> None:
    linear = warmup_stable_decay(100, decay_steps=64)
    curved = warmup_stable_decay(100, decay_steps=64, shape="one_minus_sqrt")
    assert curved(36) == linear(36) == 1.0
    assert curved(100) == linear(100) == 0.0
    assert curved(36 + 16) == pytest.approx(1 - math.sqrt(16 / 64))
    assert all(curved(step) < linear(step) for step in range(37, 100))


def test_without_decay_the_plateau_lasts() -> None:
    schedule = warmup_stable_decay(10, decay_steps=0, final=0.1)
    assert {schedule(step) for step in range(20)} == {1.0}


def test_cosine_is_halfway_in_the_middle() -> None:
    schedule = cosine(110, warmup_steps=10, final=0.2)
    assert [schedule(0), schedule(9), schedule(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert schedule(60) == pytest.approx(0.6)


def test_simple_schedules() -> None:
    assert {constant(0.3)(step) for step in range(5)} == {0.3}
    assert [linear_warmup(4, peak=2.0)(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_join_counts_from_each_beginning_or_from_zero() -> None:
    parts = ((0, linear_warmup(4)), (4, cosine(10)))
    restarted, whole = join(*parts), join(*parts, restart=False)
    assert [restarted(step) for step in (3, 4, 9)] == [1.0, 1.0, cosine(10)(5)]
    assert whole(9) == cosine(10)(9)


def test_repr_is_the_call_that_builds_the_schedule_again() -> None:
    schedule = join(
        (0, linear_warmup(4)),
        (4, warmup_stable_decay(100, warmup_steps=2, decay_fraction=0.65, final=0.05)),
        (90, muon_momentum(10)),
        (95, join((0, cosine(9)), (5, cosine_weight_decay(4)), (7, constant(0.5)))),
        restart=False,
    )
    text = repr(schedule)
    assert text.startswith("join((0, linear_warmup(warmup_steps=4, peak=1.0)), (4, warmup_stable_decay(total_steps=100")
    rebuilt = eval(text)
    assert repr(rebuilt) == text
    assert all(rebuilt(step) == schedule(step) for step in range(120))


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: warmup_stable_decay(0, decay_steps=0), "total_steps=0 must be at least 1"),
    (
        lambda: warmup_stable_decay(10, warmup_steps=11, decay_steps=1),
        "warmup_steps=11 does not fit a run of 10 steps; choose 0 to 10",
    ),
    (lambda: warmup_stable_decay(10, decay_steps=11), "decay_steps=11 does not fit a run of 10 steps; choose 0 to 10"),
    (lambda: warmup_stable_decay(10), "exactly one of decay_fraction and decay_steps"),
    (lambda: warmup_stable_decay(10, decay_fraction=0.5, decay_steps=5), "exactly one of"),
    (lambda: warmup_stable_decay(10, decay_fraction=1.5), "decay_fraction=1.5 must be within 0 to 1"),
    (lambda: warmup_stable_decay(10, decay_steps=5, shape="cubic"), "'cubic' is unknown; choose 'linear' or"),  # type: ignore[arg-type]
    (lambda: linear_warmup(0), "warmup_steps=0 must be at least 1"),
    (lambda: cosine(10, warmup_steps=10), "warmup_steps=10 does not fit a run of 10 steps; choose 0 to 9"),
    (lambda: cosine(0), "total_steps=0 must be"),
    (lambda: cosine_weight_decay(-1), "total_steps=-1 must be"),
    (lambda: muon_momentum(0), "total_steps=0 must be"),
    (lambda: muon_momentum(10, warmup_steps=-1), "warmup_steps=-1 must not be negative"),
    (lambda: muon_momentum(10, decay_fraction=-0.1), "decay_fraction=-0.1 must be within"),
    (join, r"begin at \[\]; they must begin at 0 and increase"),
    (lambda: join((1, constant(1.0))), r"begin at \[1\]"),
    (lambda: join(*itertools.repeat((0, constant(1.0)), 2)), r"begin at \[0, 0\]"),
    (lambda: constant(1.0)(-1), "step=-1 is not possible"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_nonsense_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
