"""What went wrong once is made up for: failed saves, killed announcements, torn weights; and two runs never mix."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small_runs import make_loader, make_model, make_trainer, steps_of
from tinygpt import Trainer
from tinygpt.checkpoint import _write, checkpoint_step, list_checkpoints, load_state
from tinygpt.data import Batch
from tinygpt.errors import CheckpointError, ConfigError, DataError
from tinygpt.losses import LossSum
from tinygpt.metrics import MetricsFile, read_metrics
from tinygpt.optim import MuonAdamW


def steps_in(out: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(out / "checkpoints")]


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(out / "metrics.jsonl") if record["event"] == kind]


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("background", [True, False])
def test_a_last_save_that_failed_is_made_up_for_when_the_loop_is_entered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    trainer = make_trainer(tmp_path, save_every=2, save_in_background=background)
    steps_of(trainer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(_write, "save_file", full_disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            list(trainer)
    assert (trainer.next_step, steps_in(tmp_path)) == (4, [2])
    assert list(trainer) == []
    assert steps_in(tmp_path) == [2, 4]
    assert [record["step"] for record in events(tmp_path, "save")] == [1, 3]


def test_a_save_that_waited_for_one_that_failed_is_made_up_for_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = 0

    def fails_once(folder: Path) -> None:
        nonlocal announced
        announced += 1
        if announced == 1:
            raise ValueError("not published")

    trainer = make_trainer(tmp_path, save_every=3, arguments={"on_save": fails_once})
    monkeypatch.setattr(trainer._saver, "poll", lambda: None)  # as if it were written until the last step is done
    with pytest.raises(ValueError, match="not published"):
        list(trainer)
    assert (trainer.next_step, steps_in(tmp_path)) == (4, [3])
    list(trainer)
    assert steps_in(tmp_path) == [3, 4]


def test_a_step_whose_metrics_could_not_be_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    steps_of(trainer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write_step", full_disk)
        with pytest.raises(OSError, match="No space"):
            list(trainer)
    assert [step.index for step in trainer] == [3]
    assert [record["step"] for record in events(tmp_path, "step")] == [0, 1, 2, 3]
    assert steps_in(tmp_path) == [4]


def without_line(out: Path, kind: str, step: int) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if (json.loads(line)["event"], json.loads(line)["step"]) != (kind, step)]
    (out / "metrics.jsonl").write_text("".join(kept))


def test_a_checkpoint_that_a_crash_left_unannounced_is_announced_by_the_resume(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=4, save_every=2))
    without_line(tmp_path, "save", 3)  # as after a kill between its last rename and on_save
    announced: list[str] = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, arguments={"on_save": lambda folder: announced.append(folder.name)})
        trainer.resume()
    assert announced == ["step-000004"]
    assert [record["step"] for record in events(tmp_path, "save")] == [1, 3]


def test_a_checkpoint_of_another_folder_is_not_announced(tmp_path: Path) -> None:
    list(make_trainer(tmp_path / "a"))
    announced: list[Path] = []
    branch = make_trainer(tmp_path / "b", num_steps=6, arguments={"on_save": announced.append})
    branch.load_state(tmp_path / "a" / "checkpoints" / "step-000004")
    assert announced == []


def test_another_run_is_never_mixed_into_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        list(make_trainer(tmp_path / name, save_every=2))
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    foreign = tmp_path / "b" / "checkpoints" / "step-000002"
    with pytest.raises(
        CheckpointError, match=r"holds a run already, up to step-000004, .*trainer\.resume\(\), or .*out_dir"
    ):
        make_trainer(tmp_path / "a").load_state(foreign)
    with pytest.raises(ConfigError, match="already holds a run, saved up to step-000004"):
        make_trainer(tmp_path / "a").save_state()
    (tmp_path / "a" / "checkpoints" / "best").symlink_to(tmp_path / "a" / "checkpoints" / "step-000002")
    with pytest.raises(CheckpointError, match="goes on after best, up to step-000004"):
        make_trainer(tmp_path / "a").load_state(tmp_path / "a" / "checkpoints" / "best")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    assert steps_in(tmp_path / "a") == [2, 4]


def test_a_run_that_another_process_went_on_with_is_not_gone_on_with_unseen(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, num_steps=8, save_every=2)
    steps_of(first, 3)
    second = make_trainer(tmp_path, num_steps=8, save_every=2)
    second.fit(resume="auto", progress=False, report=False)
    with pytest.raises(ConfigError, match=r"saved up to step-000008: continue it with trainer\.resume\(\)"):
        next(iter(first))
    first.resume()
    assert first.next_step == 8
    assert [record["step"] for record in events(tmp_path, "step")] == list(range(8))


def test_the_state_before_the_first_step_can_be_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=2)
    trainer.save_state()
    list(trainer)
    assert steps_in(tmp_path) == [0, 2, 4]


def test_retention_does_not_miss_a_due_step_that_was_saved_by_hand(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_steps=8, save_every=2, keep_last=1)

    def by_hand(trainer: Trainer, step: object) -> None:
        if trainer.next_step % 2 == 0:
            trainer.save_state()

    trainer.fit(by_hand, progress=False, report=False)
    assert steps_in(tmp_path) == [8]


class Stops(MuonAdamW):
    """Raises what it was given in the middle of a step."""

    error: BaseException | None = None

    def step(self, closure: Any = None) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(2)
            raise error
        return super().step(closure)


def test_weights_that_are_half_changed_are_neither_saved_nor_trained_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=2, optimizer=Stops.for_model)
    steps_of(trainer, 3)
    trainer.optimizer.error = KeyboardInterrupt()  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    for use in (lambda: list(trainer), trainer.save_state):
        with pytest.raises(CheckpointError, match=r"cut short while the optimizer changed the weights.*resume\(\)"):
            use()
    trainer.resume()
    list(trainer)
    whole = make_trainer(tmp_path / "whole", save_every=2)
    list(whole)
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def edit_state(folder: Path, edit: Callable[[Any], None]) -> None:
    """Edit a checkpoint's state and make the manifest fit, as only an attacker would."""
    document = json.loads((folder / "state.json").read_bytes())
    edit(document["state"])
    content = json.dumps(document).encode()
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
def test_a_random_state_that_cannot_be_restored_leaves_everything_as_it_was(tmp_path: Path, key: str) -> None:
    list(make_trainer(tmp_path))
    edit_state(tmp_path / "checkpoints" / "step-000004", lambda state: state["random"].update({key: "x"}))
    trainer = make_trainer(None)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    random, position = torch.get_rng_state(), trainer.loader.state_dict()["cursor"]
    with pytest.raises(CheckpointError, match="does not fit this run"):
        trainer.load_state(tmp_path / "checkpoints" / "step-000004")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not trainer.optimizer.state
    assert torch.equal(random, torch.get_rng_state())
    assert trainer.loader.state_dict()["cursor"] == position


def test_weights_that_are_going_to_be_rounded_are_noted(tmp_path: Path) -> None:
    list(make_trainer(tmp_path))
    trainer = make_trainer(tmp_path, model=make_model().bfloat16())
    changes = trainer.resume()
    assert [(change.was, change.will_be) for change in changes or () if change.name.startswith("dtype of")] == [
        ("torch.float32", "torch.bfloat16")
    ]


class Odd(nn.Module):
    """A model with parameters that are no floats, and a state that is no tensor if wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(257, 257)
        self.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.table(inputs)


class Told(Odd):
    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def odd_loss(model: nn.Module, batch: Batch) -> LossSum:
    total = nn.functional.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    return LossSum(total, torch.tensor(batch.targets.numel()))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("background", [True, False])
def test_a_model_with_parameters_that_are_no_floats_can_be_saved(tmp_path: Path, background: bool) -> None:
    options = {"optimizer": adamw, "arguments": {"loss_fn": odd_loss}, "save_in_background": background}
    list(make_trainer(tmp_path, model=Odd(), save_every=2, **options))
    trainer = make_trainer(tmp_path, model=Odd(), num_steps=6, **options)
    trainer.fit(resume="auto", progress=False, report=False)
    assert trainer.next_step == 6


class Counting:
    """A loader whose position holds what no checkpoint can."""

    def __iter__(self) -> Any:
        return itertools.cycle(itertools.islice(make_loader(), 3))

    def state_dict(self) -> dict[str, Any]:
        return {"place": {"seen": {1, 2}}}


def test_what_no_checkpoint_can_hold_is_said_before_training_and_not_at_the_first_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"state_dict has _extra_state, a dict; checkpoints hold tensors"):
        make_trainer(tmp_path, model=Told(), optimizer=adamw)
    with pytest.raises(ConfigError, match=r"Counting cannot be saved: .* set is none of them, .* loader/place/seen"):
        make_trainer(tmp_path, loader=Counting())
    make_trainer(None, loader=Counting())  # it writes none


def test_metrics_of_every_run_that_left_no_checkpoint_are_kept(tmp_path: Path) -> None:
    for _ in range(3):
        steps_of(make_trainer(tmp_path), 1)
    names = sorted(path.name for path in tmp_path.glob("metrics*"))
    assert names == ["metrics.jsonl", "metrics.old-2.jsonl", "metrics.old.jsonl"]


def test_bytes_that_are_no_text_in_the_metrics_are_said_with_the_line(tmp_path: Path) -> None:
    list(make_trainer(tmp_path))
    content = (tmp_path / "metrics.jsonl").read_bytes().replace(b'"event"', b'"ev\xff\xfe"', 1)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    trainer = make_trainer(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl line 1 is not JSON.*move the file away"):
        trainer.resume()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "damaged.jsonl")
    assert trainer.resume() == []


def test_a_file_in_place_of_the_checkpoints_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="checkpoints is not a folder; move it away"):
        next(iter(make_trainer(tmp_path)))


def test_an_evaluation_at_a_step_saved_by_hand_is_in_the_next_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=2)
    for step in trainer:
        if step.index == 1:
            trainer.save_state()
            trainer.record("evaluation", bpb=2.0)
    assert [e["step"] for e in load_state(tmp_path / "checkpoints" / "step-000004")["evaluations"]] == [2]
