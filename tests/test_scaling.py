"""Scaling rules against the numbers of the documented run and their own laws."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import ConfigError
from tinygpt.scaling import from_depth, lr_factor, optimal_batch_tokens, scaled_weight_decay, scaling_parameters

REFERENCE_HORIZON = 12 * (84_935_088 + 25_165_824)


def test_the_reference_is_its_own_fixed_point() -> None:
    plan = from_depth(12)
    assert plan.dim == 768
    assert plan.scaling_parameters == 84_935_088 + 25_165_824
    assert plan.horizon_tokens == REFERENCE_HORIZON
    assert plan.batch_tokens == 524_288
    assert plan.num_steps == REFERENCE_HORIZON // 524_288 == 2520
    assert (plan.lr_factor, plan.weight_decay) == pytest.approx((1.0, 0.28))


def test_the_documented_run() -> None:
    plan = from_depth(12, batch_tokens=65_536)
    assert plan.lr_factor == pytest.approx(0.354, abs=5e-4)
    assert plan.weight_decay == pytest.approx(0.099, abs=5e-4)
    assert plan.horizon_tokens == REFERENCE_HORIZON


def count_by_hand(depth: int, vocab_size: int) -> int:
    dim = -(-64 * depth // 128) * 128
    total = vocab_size * dim
    for layer in range(depth):
        total += 4 * dim * dim + 2 * dim * 4 * dim
        if layer % 2 == (depth - 1) % 2:
            total += 12 * (dim // 128)
    return total


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 12, 13, 26])
def test_parameters_are_counted(depth: int) -> None:
    assert scaling_parameters(depth, vocab_size=1000) == count_by_hand(depth, 1000)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(depth=st.integers(2, 40), ratio=st.floats(1, 100))
def test_laws_hold_at_every_size(depth: int, ratio: float) -> None:
    plan = from_depth(depth, tokens_per_parameter=ratio)
    reference = from_depth(12, tokens_per_parameter=ratio)
    assert plan.dim % 128 == 0
    assert 64 * depth <= plan.dim < 64 * depth + 128
    assert math.log2(plan.batch_tokens).is_integer()
    growth = plan.horizon_tokens / reference.horizon_tokens
    assert 2**-0.5 <= plan.batch_tokens / (524_288 * growth**0.383) <= 2**0.5
    # What the weight decay holds: batch / (lr * weight_decay * horizon).
    timescale = plan.batch_tokens / (plan.lr_factor * plan.weight_decay * plan.horizon_tokens)
    assert timescale == pytest.approx(524_288 / (0.28 * reference.horizon_tokens), rel=1e-6)


def test_batch_grows_with_the_horizon() -> None:
    assert optimal_batch_tokens(2 ** (1 / 0.383), 1) == 2 * 524_288
    assert optimal_batch_tokens(1, 1) == 524_288


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: from_depth(0), "depth=0 and vocab_size=32768 must be at least 1"),
    (lambda: from_depth(4, vocab_size=0), "vocab_size=0 must be"),
    (lambda: from_depth(4, tokens_per_parameter=0), "tokens_per_parameter=0 must be positive"),
    (lambda: from_depth(4, batch_tokens=0), "batch_tokens=0 must be at least 1"),
    (lambda: from_depth(1, vocab_size=1, batch_tokens=10**9), "batch_tokens=1000000000 is more than the horizon"),
    (lambda: lr_factor(0), "batch_tokens=0 must be positive"),
    (lambda: optimal_batch_tokens(0, 1), "horizon_tokens=0 and reference_horizon_tokens=1 must be positive"),
    (lambda: scaled_weight_decay(1, 1, -1), "reference_horizon_tokens=-1 must be positive"),
    (lambda: scaled_weight_decay(-1, 1, 1), "batch_tokens=-1 must be positive"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_nonsense_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
