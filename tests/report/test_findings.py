"""What a report observes, on runs in which it is known."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_run import BATCH, START, documented_run, evaluation, noisy, step_line, write_lines
from tinygpt.report import summarize_run
from tinygpt.report._statistics import bin_series, fit_line, rolling_median, smooth

FLOATS = st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=60)


def found(run: Path, topic: str) -> list[dict[str, Any]]:
    return [o for o in summarize_run(run)["observations"] if o["topic"] == topic]


def only(run: Path, topic: str) -> dict[str, Any]:
    (observation,) = found(run, topic)
    return observation


@given(FLOATS)
def test_a_line_is_that_of_least_squares_and_its_error_that_of_numpy(values: list[float]) -> None:
    x, y = np.arange(len(values), dtype=float), np.array(values)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    line = fit_line(x, y)
    assert line.slope == pytest.approx(slope, rel=1e-6, abs=1e-8)
    # Student's t lies between 1.98 for many points and 2.45 for eight.
    assert 1.9 * covariance[0, 0] ** 0.5 - 1e-6 <= line.error <= 2.5 * covariance[0, 0] ** 0.5 + 1e-6


@given(FLOATS, st.sampled_from([3, 5, 7]))
def test_a_rolling_median_is_the_median_of_each_window(values: list[float], window: int) -> None:
    half = window // 2
    found = rolling_median(np.array(values), window)
    naive = [statistics.median(values[i - half : i + half + 1]) for i in range(half, len(values) - half)]
    assert found[half:-half].tolist() == naive
    assert found[:half].tolist() == [naive[0]] * half


@given(FLOATS, st.integers(1, 9))
def test_a_running_mean_is_that_of_the_last_values(values: list[float], window: int) -> None:
    naive = [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    assert smooth(np.array(values), window) == pytest.approx(naive, abs=1e-9)


@given(FLOATS, st.integers(1, 20))
def test_bins_lose_no_extreme_and_keep_the_mean(values: list[float], most: int) -> None:
    y = np.array(values)
    bins = bin_series(np.arange(len(y), dtype=float), y, most)
    assert len(bins.mean) <= most
    assert (bins.low.min(), bins.high.max()) == (y.min(), y.max())
    sizes = np.minimum(bins.size, len(y) - bins.size * np.arange(len(bins.mean)))
    assert float((bins.mean * sizes).sum()) == pytest.approx(float(y.sum()), abs=1e-6)


def test_a_jump_at_a_resume_is_named_with_what_changed_and_by_how_much(tmp_path: Path) -> None:
    run = documented_run(tmp_path / "run")
    jump = only(run, "jump")
    assert jump["level"] == "warning"
    assert jump["numbers"]["step"] == 300
    assert jump["numbers"]["rise"] == pytest.approx(0.3, abs=0.08)
    assert "lr (adamw head.weight and 6 more groups) 0.001 → 0.02 (× 20)" in jump["text"]
    assert "momentum (muon a) 0.9 → 0.97 (averages over 3.33 times as many steps)" in jump["text"]
    assert "num_steps 300 → 900 (× 3)" in jump["text"]
    assert "Validation went from 0.9" in jump["text"]


def test_where_training_alone_leaves_doubt_validation_decides(tmp_path: Path) -> None:
    for name, after, topic in (("up", 1.06, "jump"), ("on", 0.965, "resume")):
        losses = noisy(600, seed=3)
        losses[300:] += 0.04  # three to four standard errors
        lines: list[dict[str, Any]] = [step_line(step, loss) for step, loss in enumerate(losses.tolist())]
        lines += [evaluation(step - 1, 1.0 - step / 1e4) for step in range(50, 301, 50)]
        lines += [evaluation(step - 1, after - (step - 350) / 1e4) for step in range(350, 601, 50)]
        lines.append({"event": "resume", "step": 299, "changes": [["lr", 0.1, 0.2]]})
        (observation,) = [
            o
            for o in summarize_run(write_lines(tmp_path / name, lines))["observations"]
            if o["topic"] in ("jump", "resume")
        ]
        assert observation["topic"] == topic
        assert observation["numbers"]["step"] == 300


def test_a_resume_that_changes_nothing_is_told_to_have_left_no_jump(tmp_path: Path) -> None:
    run = documented_run(tmp_path / "run")
    resumed = only(run, "resume")
    assert resumed["level"] == "good"
    assert resumed["text"].startswith("The resume after step 600 left no jump")


@pytest.mark.parametrize("seed", range(6))
def test_noise_alone_is_no_jump_no_outlier_and_no_slow_stretch(tmp_path: Path, seed: int) -> None:
    speed = np.random.default_rng(100 + seed).normal(1000, 20, 600)
    lines = [
        step_line(step, loss, tokens_per_second=pace)
        for step, (loss, pace) in enumerate(zip(noisy(600, seed=seed).tolist(), speed.tolist(), strict=True))
    ]
    summary = summarize_run(write_lines(tmp_path / "run", lines))
    assert not [o for o in summary["observations"] if o["level"] == "warning"]
    assert "never rose and stayed up" in only(tmp_path / "run", "jump")["text"]


def test_a_jump_without_a_resume_is_found_and_its_rate_blamed(tmp_path: Path) -> None:
    losses = noisy(600)
    losses[400:] += 0.4
    blamed = [step_line(s, loss, lr=0.001 if s < 400 else 0.02) for s, loss in enumerate(losses.tolist())]
    jump = only(write_lines(tmp_path / "rate", blamed), "jump")
    assert jump["numbers"]["step"] == 400
    assert "lr 0.001 → 0.02 (× 20)" in jump["text"]
    unexplained = [step_line(step, loss) for step, loss in enumerate(losses.tolist())]
    jump = only(write_lines(tmp_path / "none", unexplained), "jump")
    assert jump["numbers"]["step"] == pytest.approx(400, abs=5)
    assert "Nothing that is recorded changed there" in jump["text"]
    turned = [step_line(s, loss, epoch=int(s >= 400)) for s, loss in enumerate(losses.tolist())]
    jump = only(write_lines(tmp_path / "epoch", turned), "jump")
    assert "a new pass over the data began at step 401" in jump["text"]


@pytest.mark.parametrize(
    ("course", "level", "says"),
    [
        (lambda step: 1.0 - 0.1 * step / 1000, "good", "still falling: -0.01 "),
        (lambda step: 0.9 + 0.0001 * (step // 50 % 2), "note", "Plateau:"),
        (lambda step: 0.9 + 0.05 * step / 1000, "warning", "is rising: +0.005 "),
        (lambda step: 0.9 + 0.05 * (step // 50 % 2), "note", "too noisy"),
    ],
)
def test_a_plateau_is_told_from_a_fall_by_slope_and_interval(
    tmp_path: Path, course: Any, level: str, says: str
) -> None:
    lines = [step_line(step, 3.0) for step in range(3000)]
    lines += [evaluation(step - 1, course(step)) for step in range(50, 3001, 50)]
    observation = only(write_lines(tmp_path / "run", lines), "plateau")
    assert observation["level"] == level
    assert says in observation["text"]
    assert observation["numbers"]["from_step"] == 2050  # the last third


def test_without_evaluations_the_training_loss_tells(tmp_path: Path) -> None:
    lines = [step_line(step, 5.0 - step / 1000) for step in range(900)]
    observation = only(write_lines(tmp_path / "run", lines), "plateau")
    assert observation["numbers"]["slope"] == pytest.approx(-0.1)
    assert observation["numbers"]["per_steps"] == 100
    assert "training loss is still falling" in observation["text"]


def test_overfitting_is_validation_that_rises_while_training_falls(tmp_path: Path) -> None:
    lines = [step_line(step, 4.0 - step / 500) for step in range(1000)]
    bowl = [evaluation(s - 1, (3.2 + ((s - 400) / 1000) ** 2) / 3, loss=3.2 + ((s - 400) / 1000) ** 2)
            for s in range(100, 1001, 100)]  # fmt: skip
    observation = only(write_lines(tmp_path / "over", [*lines, *bowl]), "overfitting")
    assert observation["level"] == "warning"
    assert observation["numbers"]["best_step"] == 400
    # 3.56 nats of validation; the mean training loss of steps 951 to 1,000 is 4 - 974.5 / 500.
    assert observation["numbers"]["gap_nats"] == pytest.approx(3.56 - (4.0 - 974.5 / 500))
    fine = [evaluation(s - 1, (4.1 - s / 500) / 3) for s in range(100, 1001, 100)]
    # A measurement of the loss alone, as of other text, is no bits per byte to compare with.
    fine.append({**evaluation(len(lines) - 1, 0.0, loss=9.0), "bpb": None})
    observation = only(write_lines(tmp_path / "fine", [*lines, *fine]), "overfitting")
    assert observation["level"] == "good"
    assert "cannot be told: log the loss of each BpbReport" in observation["text"]


def test_the_gap_follows_from_bits_a_byte_where_bytes_and_tokens_are_logged(tmp_path: Path) -> None:
    lines = [step_line(step, 2.0) for step in range(100)]
    lines += [evaluation(step, 1.0, num_tokens=1000, num_bytes=4000) for step in (49, 99)]
    gap = only(write_lines(tmp_path / "run", lines), "overfitting")["numbers"]["gap_nats"]
    assert gap == pytest.approx(4 * 0.6931471805599453 - 2.0)


def test_outliers_of_loss_and_gradient_are_found_where_they_are(tmp_path: Path) -> None:
    losses = noisy(500).tolist()
    losses[222] += 1.0
    norms = np.random.default_rng(1).normal(0.5, 0.02, 500).tolist()
    norms[222], norms[333] = 9.0, 2.0
    lines = [
        step_line(step, loss, grad_norm=norm)
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]  # fmt: skip
    run = write_lines(tmp_path / "run", lines)
    assert only(run, "loss")["numbers"] == {"count": 1, "steps": [223]}
    assert only(run, "gradient norm")["numbers"] == {"count": 2, "steps": [223, 334]}


def test_a_slow_stretch_is_found_and_its_cost_counted(tmp_path: Path) -> None:
    paces = [500.0 if 200 <= step < 300 else 1000.0 for step in range(600)]
    lines = []
    elapsed = 0.0
    for step, pace in enumerate(paces):
        elapsed += BATCH / pace
        lines.append(step_line(step, 3.0, tokens_per_second=pace, elapsed_seconds=elapsed))
    slow = only(write_lines(tmp_path / "run", lines), "slow stretch")
    assert slow["numbers"]["lost_seconds"] == pytest.approx(100 * BATCH / 1000, rel=0.02)
    assert "1 of them" not in slow["text"]
    assert "at 5" in slow["text"]


def test_time_is_split_into_training_evaluation_other_and_idle(tmp_path: Path) -> None:
    # Ten steps of a second; after the fifth 3 s of evaluation and 2 s of saving, after the seventh 60 s of nothing.
    lines: list[dict[str, Any]] = []
    clock = START
    for step in range(10):
        clock += 1.0
        lines.append(step_line(step, 3.0, time=clock))
        if step == 4:
            lines.append(evaluation(step, 1.0) | {"time": clock + 3})
            clock += 5
        if step == 6:
            lines.append({"event": "resume", "step": step, "time": clock + 59, "changes": []})
            clock += 60
    summary = summarize_run(write_lines(tmp_path / "run", lines))
    (observation,) = [o for o in summary["observations"] if o["topic"] == "time"]
    expected = {"training": 10.0, "evaluation": 3.0, "other": 2.0, "idle": 60.0}
    assert observation["numbers"] == pytest.approx(expected, abs=0.01)


def test_a_step_without_a_finite_loss_and_a_recorded_stop_are_told(tmp_path: Path) -> None:
    lines = [step_line(step, None if step == 40 else 3.0) for step in range(50)]
    lines.append({"event": "stop", "step": 49, "time": START + 60, "reason": "the loss is not finite in row 3"})
    run = write_lines(tmp_path / "run", lines)
    assert only(run, "non-finite")["text"] == "1 steps have no finite loss, the first is step 41."
    assert "the loss is not finite in row 3" in only(run, "stop")["text"]
    assert summarize_run(run)["status"] == "stopped"
