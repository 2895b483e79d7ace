"""Checkpoints written while training goes on: the same ones, nothing lost, no failure unseen, the right ones kept."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import SnapshotMemory, checkpoint_step, list_checkpoints, load_state, verify
from tinygpt.data import BatchLoader, TextDocuments
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.metrics import StepMetrics, read_metrics
from tinygpt.optim import MuonAdamW
from tinygpt.tokenizer import ByteTokenizer
from tinygpt.trainer import _state

TEXTS = [f"document {number} " * (number % 7 + 1) for number in range(40)]


def make_trainer(out: Path | None, *, on_save: Callable[[Path], None] | None = None, **config: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig.from_depth(1, head_dim=32, width_per_layer=32, vocab_size=257, max_seq_len=16))
    loader = BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=2, seq_len=16, buffer_documents=8)
    fields = {"num_steps": 8, **({} if out is None else {"out_dir": str(out), "save_every": 2}), **config}
    return Trainer(model, MuonAdamW.for_model(model), loader, TrainerConfig(**fields), on_save=on_save)


def steps_in(out: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(out / "checkpoints")]


class Gate:
    """Holds writing back until it is opened, and fails it if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: BaseException | None = None
        write = _state.save_state

        def gated(*args: Any, **kwargs: Any) -> Path:
            self.reached.set()
            assert self.open.wait(30)
            if self.error is not None:
                raise self.error
            return write(*args, **kwargs)

        monkeypatch.setattr(_state, "save_state", gated)


def test_what_is_written_in_the_background_is_the_state_of_its_step_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(make_trainer(tmp_path / "waiting", save_in_background=False, keep_last=None))
    gate = Gate(monkeypatch)
    for step in make_trainer(tmp_path / "background", keep_last=None):
        if step.index == 1:
            gate.open.clear()
        if step.index == 3:  # two steps changed the weights while those of step 2 waited to be written
            gate.open.set()
    for number in (2, 4, 6, 8):
        one, other = (tmp_path / run / "checkpoints" / f"step-{number:06d}" for run in ("waiting", "background"))
        for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), (number, name)
        states = [load_state(folder) for folder in (one, other)]
        assert states[0]["loader"]["cursor"] == states[1]["loader"]["cursor"]
        assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])


def test_training_goes_on_while_a_checkpoint_is_written_and_it_is_announced_between_steps_by_this_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    announced: list[tuple[str, str, int]] = []

    def note(folder: Path) -> None:
        verify(folder)
        announced.append((folder.name, threading.current_thread().name, trainer.next_step))

    trainer = make_trainer(tmp_path, on_save=note, save_every=4)
    done = []
    for step in trainer:
        done.append(step.index)
        if step.index == 5:
            assert announced == []
            assert steps_in(tmp_path) == []
            assert gate.reached.is_set()
            gate.open.set()
            while any(thread.name == "tinygpt writes step-000004" for thread in threading.enumerate()):
                time.sleep(0.001)
    assert announced == [("step-000004", "MainThread", 6), ("step-000008", "MainThread", 8)]
    saves = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["event"] == "save"]
    assert [(r["step"], r["background"]) for r in saves] == [(3, True), (7, False)]
    for record, folder in zip(saves, list_checkpoints(tmp_path / "checkpoints"), strict=True):
        assert record["folder"] == str(folder)
        assert record["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert record["write_seconds"] > 0
    assert saves[0]["stall_seconds"] < saves[0]["write_seconds"]
    assert trainer.stall_seconds == pytest.approx(sum(r["stall_seconds"] for r in saves), abs=1e-3)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.3, gate.open.set).start()
    trainer = make_trainer(tmp_path, num_steps=5)
    list(trainer)
    assert steps_in(tmp_path) == [2, 4, 5]
    saves = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["event"] == "save"]
    assert saves[0]["stall_seconds"] > 0.1


def test_an_error_of_the_thread_stops_the_run_and_the_loop_can_be_entered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.error = OSError(28, "No space left on device")
    gate.open.set()
    trainer = make_trainer(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-000002 could not be written: .*No space left on device"):
        list(trainer)
    assert trainer.next_step in (2, 3, 4)
    gate.error = None
    list(trainer)
    assert steps_in(tmp_path)[-1] == 8
    whole = make_trainer(tmp_path / "whole")
    list(whole)
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loop_left_early_waits_and_a_failure_then_is_logged_and_raised_at_the_next_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    trainer = make_trainer(tmp_path / "good")
    next(itertools.islice(trainer, 1, None))
    assert steps_in(tmp_path / "good") == [2]
    gate.error = OSError(28, "No space left on device")

    def fails(trainer: Trainer, step: StepMetrics) -> None:
        if step.index == 1:
            raise MemoryError("an evaluation that did not fit")

    trainer = make_trainer(tmp_path / "bad")
    with pytest.raises(MemoryError):
        trainer.fit([fails], progress=False)
    assert "step-000002 could not be written" in caplog.text
    with pytest.raises(CheckpointError, match="No space left on device"):
        next(iter(trainer))


def test_a_program_that_ends_with_its_loop_open_saves_what_is_due_and_ends(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_saving import make_trainer
steps = iter(make_trainer(Path({str(tmp_path)!r})))
for _ in range(4):
    next(steps)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps_in(tmp_path) == [2, 4]
    verify(tmp_path / "checkpoints" / "step-000004")


def test_a_failing_on_save_is_raised_by_the_loop(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise ValueError("not published")

    with pytest.raises(ValueError, match="not published"):
        list(make_trainer(tmp_path, on_save=fails))
    assert steps_in(tmp_path)[0] == 2


def test_without_memory_for_a_copy_it_is_written_while_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(self: SnapshotMemory, tensors: Any) -> Any:
        raise MemoryError("3,000 MiB are needed and 12 are free")

    monkeypatch.setattr(SnapshotMemory, "copy", none_left)
    with pytest.warns(UserWarning, match="want of memory for a copy: 3,000 MiB are needed") as warned:
        list(make_trainer(tmp_path))
    assert len(warned) == 1
    saves = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["event"] == "save"]
    assert [r["background"] for r in saves] == [False] * 4


def test_checkpoints_are_written_from_a_thread_too(tmp_path: Path) -> None:
    announced: list[str] = []
    trainer = make_trainer(tmp_path, on_save=lambda folder: announced.append(threading.current_thread().name))
    thread = threading.Thread(target=lambda: list(trainer), name="trains")
    thread.start()
    thread.join()
    assert steps_in(tmp_path) == [4, 6, 8]
    assert announced == ["trains"] * 4


def test_a_second_ctrl_c_while_it_is_written_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    gate.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path).save_state()


def test_a_save_asked_for_is_complete_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    next(itertools.islice(trainer, 2, None))
    verify(trainer.save_state())
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"
    verify(trainer.save_state(tmp_path / "elsewhere" / "mine"))
    assert not (tmp_path / "elsewhere" / "latest").exists()


SCORES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.2}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, [10]),
        ({"keep_last": 1, "keep_best": 1}, [4, 10]),
        ({"keep_last": 1, "keep_best": 2}, [4, 6, 10]),
        ({"keep_last": 1, "keep_best": 1, "keep_every": 6}, [4, 6, 10]),
        ({"keep_last": None}, [2, 4, 6, 8, 10]),
    ],
)
def test_the_last_the_best_and_every_nth_stay_through_a_resume(
    tmp_path: Path, settings: dict[str, Any], kept: list[int]
) -> None:
    def train(last: int) -> None:
        trainer = make_trainer(tmp_path, num_steps=last, **settings)
        trainer.resume()
        for step in trainer:
            if score := SCORES.get(step.index + 1):
                trainer.record("evaluation", bpb=score, data_hash="a")

    train(6)
    train(10)
    assert steps_in(tmp_path) == kept
    saved = load_state(tmp_path / "checkpoints" / "step-000010")["evaluations"]
    assert [(e["step"], e["bpb"]) for e in saved] == list(SCORES.items())


def test_scores_on_other_data_are_never_compared(tmp_path: Path) -> None:
    scores = {2: (0.1, "old"), 4: (2.0, "new"), 6: (3.0, "new"), 8: (float("nan"), "new")}
    for last in (2, 8):
        trainer = make_trainer(tmp_path, num_steps=last, keep_last=1, keep_best=1)
        trainer.resume(accept=["data"])
        for step in trainer:
            if score := scores.get(step.index + 1):
                trainer.record("evaluation", bpb=score[0], data_hash=score[1])
    # 0.1 on other data says nothing; it stayed only as long as nothing was measured on the new.
    assert steps_in(tmp_path) == [4, 8]
    with pytest.raises(ConfigError, match=r"an evaluation's bpb is '1.0'"):
        trainer.record("evaluation", bpb="1.0")


def test_protected_steps_stay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, keep_last=1)
    trainer.protected_steps.add(2)
    list(trainer)
    assert steps_in(tmp_path) == [2, 8]


def test_retention_that_keeps_everything_and_something_is_refused() -> None:
    for name in ("keep_every", "keep_best"):
        with pytest.raises(ConfigError, match=f"{name} has no effect with keep_last=None"):
            TrainerConfig(num_steps=1, keep_last=None, **{name: 1})


def test_a_second_trainer_on_the_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    steps = iter(trainer)
    next(steps)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    uses: list[Callable[[Trainer], Any]] = [
        list, lambda t: t.record("note"), lambda t: t.save_state(), lambda t: t.fit(progress=False)
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(CheckpointError, match="is in use by another Trainer of this process, whose loop"):
            use(make_trainer(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    list(steps)
    assert steps_in(tmp_path) == [4, 6, 8]
    assert not (tmp_path / ".lock-holder.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_in_the_way_stop_the_run_before_anything_is_written(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoints").symlink_to(outside)
    with pytest.raises(CheckpointError, match="checkpoints is a link, and a run does not write through one"):
        list(make_trainer(tmp_path / "a"))
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "step-000002").symlink_to(outside)
    with pytest.raises(CheckpointError, match="step-000002 is a link"):
        list(make_trainer(tmp_path / "b"))
    assert list(outside.iterdir()) == []
    # A run's folder that is a link itself was named by its owner: it is written to and resumed from.
    (tmp_path / "c").symlink_to(outside)
    list(make_trainer(tmp_path / "c", num_steps=4))
    again = make_trainer(tmp_path / "c")
    again.resume()
    assert again.next_step == 4


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even a superuser can write to")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out_dir='/proc/run' cannot be written"):
        list(make_trainer(Path("/proc/run")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file' cannot be written"):
        make_trainer(tmp_path / "file").save_state()


def test_damage_is_verified_once_when_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygpt import manifest

    list(make_trainer(tmp_path, num_steps=2))
    hashed: list[str] = []
    original = manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", lambda path: hashed.append(path[0].name) or original(path))
    make_trainer(tmp_path).resume()
    assert len(hashed) == len(set(hashed)) == 6
