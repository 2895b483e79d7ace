"""Going over from the rates of a checkpoint to others in a window, instead of in one step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import everything, make_loader, make_trainer, steps_of
from tinygpt import Trainer
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import warmup_stable_decay


def new_schedule(step: int) -> float:
    return 1.0 - step / 100


def before(out: Path) -> Path:
    """A run of four steps that decayed to a tenth of its rate; returns its folder."""
    schedules = {
        "lr": warmup_stable_decay(4, decay_steps=3, final=0.1),
        "muon.momentum": lambda step: 0.8,
        "muon.weight_decay": lambda step: 0.0,
    }
    steps_of(make_trainer(out, schedules=schedules, num_steps=4), 4)
    return out


def after(out: Path, num_steps: int = 12, **settings: Any) -> Trainer:
    schedules = {"lr": new_schedule, "muon.momentum": lambda step: 0.96, "muon.weight_decay": new_schedule}
    return make_trainer(out, schedules=schedules, num_steps=num_steps, **settings)


def test_rates_go_linearly_from_the_old_to_the_new_and_then_are_exactly_the_new(tmp_path: Path) -> None:
    trainer = after(before(tmp_path))
    trainer.resume(rewarm_steps=5)
    steps = steps_of(trainer, 8)
    for step in steps:
        share = min(1.0, (step.index - 4) / 5)
        target = new_schedule(step.index)
        assert step.lr == pytest.approx(0.02 * (0.1 + (target - 0.1) * share), rel=1e-12)
        assert step.weight_decay == pytest.approx(0.1 * target * share, rel=1e-12)
        assert step.momentum == pytest.approx(0.8 + 0.16 * share, rel=1e-12)
    assert steps[0].lr == 0.02 * 0.1
    assert [step.lr for step in steps[5:]] == [0.02 * new_schedule(step) for step in (9, 10, 11)]


def test_every_group_goes_over_also_those_without_a_schedule(tmp_path: Path) -> None:
    def sgd(lr: float) -> Any:
        return lambda model: torch.optim.SGD(
            [{"params": [parameter], "lr": lr * (1 + index)} for index, parameter in enumerate(model.parameters())],
            momentum=0.9,
        )

    steps_of(make_trainer(tmp_path, num_steps=1, optimizer=sgd(1e-4)), 1)
    trainer = make_trainer(tmp_path, num_steps=6, optimizer=sgd(1e-3))
    trainer.resume(rewarm_steps=2)
    seen = [[group["lr"] for group in trainer.optimizer.param_groups] for _ in trainer]
    for index, rates in enumerate(zip(*seen, strict=True)):
        assert rates == pytest.approx([(1 + index) * lr for lr in (1e-4, 5.5e-4, 1e-3, 1e-3, 1e-3)])


def test_the_window_is_shown_and_nothing_needs_accepting(tmp_path: Path) -> None:
    trainer = after(before(tmp_path))
    changes = trainer.resume(rewarm_steps=5)
    assert changes is not None
    assert not any(change.topic for change in changes)
    row = next(change for change in changes if change.name.startswith("lr (muon"))
    assert row.name.endswith("over 5 steps")
    assert (row.was, row.will_be) == (pytest.approx(0.002), pytest.approx(0.02 * new_schedule(9)))
    assert "from step 4 to step 9 (rewarm_steps=5)" in trainer.plan()
    resumed = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["event"] == "resume"]
    assert any(name.endswith("over 5 steps") for name, _, _ in resumed[0]["changes"])


@pytest.mark.parametrize("killed_after", range(1, 8))
def test_killed_within_the_window_and_run_again_it_ends_the_same(tmp_path: Path, killed_after: int) -> None:
    before(tmp_path / "whole")
    before(tmp_path / "killed")
    whole = after(tmp_path / "whole")
    whole.fit(progress=False, report=False, resume="auto", rewarm_steps=5)
    steps_of(resumed(tmp_path / "killed"), killed_after)
    again = after(tmp_path / "killed", save_every=1)
    # The same program with the same arguments; without them it would do the same.
    again.fit(progress=False, report=False, resume="auto", rewarm_steps=5 if killed_after % 2 else None)
    folders = [tmp_path / name / "checkpoints" / "step-000012" for name in ("whole", "killed")]
    assert everything(folders[0]) == everything(folders[1])


def resumed(out: Path) -> Trainer:
    trainer = after(out, save_every=1)
    trainer.resume(rewarm_steps=5)
    return trainer


def test_where_nothing_jumps_there_is_no_window(tmp_path: Path) -> None:
    list(after(tmp_path, num_steps=4))
    trainer = after(tmp_path)
    trainer.resume(rewarm_steps=5)
    assert trainer.rates.rewarm is None
    assert steps_of(trainer, 1)[0].lr == 0.02 * new_schedule(4)


def test_only_rates_go_over_other_data_is_still_refused(tmp_path: Path) -> None:
    before(tmp_path)
    other = after(tmp_path, loader=make_loader(["another text"] * 9))
    with pytest.raises(CheckpointError, match=r"(?s)source_fingerprint.*accept=\['data'\]"):
        other.resume(rewarm_steps=5)
    assert other.rates.rewarm is None
    trainer = after(tmp_path, optimizer=lambda model: MuonAdamW.for_model(model, betas=(0.9, 0.999)))
    with pytest.raises(CheckpointError, match=r"betas\[1\]"):
        trainer.resume(rewarm_steps=5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "rewarm_steps=0 is not a number of steps; choose 1 or more"),
        (-3, "rewarm_steps=-3 is not"),
        (2.5, "rewarm_steps=2.5 is not"),
        (True, "rewarm_steps=True is not"),
        (9, "rewarm_steps=9 is longer than what is left of the run, 8 steps"),
    ],
)
def test_a_window_that_cannot_be_is_refused(tmp_path: Path, steps: Any, message: str) -> None:
    trainer = after(before(tmp_path))
    with pytest.raises(ConfigError, match=message):
        trainer.resume(rewarm_steps=steps)
    assert trainer.next_step == 0


def test_a_schedule_without_a_number_is_still_found_in_the_window(tmp_path: Path) -> None:
    before(tmp_path)
    trainer = make_trainer(tmp_path, num_steps=12, schedules={"lr": lambda step: float("nan") if step > 6 else 1.0})
    trainer.resume(rewarm_steps=2, accept=["schedule"])
    with pytest.raises(ConfigError, match="the schedule of lr gives nan at step 7"):
        list(trainer)
