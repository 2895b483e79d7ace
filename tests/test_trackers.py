"""Trackers take real runs: each adapter is driven by a Trainer and read back with the tracker's own reader."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig, trackers
from tinygpt.data import BatchLoader, embedded_corpus
from tinygpt.errors import ConfigError, MissingDependencyError
from tinygpt.metrics import StepMetrics
from tinygpt.optim import MuonAdamW
from tinygpt.tokenizer import ByteTokenizer
from tinygpt.trackers import Tracker, Tracking, check_tracker, open_tracker, track

NUM_STEPS = 3


def new_trainer() -> Trainer:
    torch.manual_seed(0)
    config = GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16)
    model = GPT.from_config(config)
    loader = BatchLoader(embedded_corpus(), ByteTokenizer(), rows=2, seq_len=16, overflow="carry")
    return Trainer(model, MuonAdamW.for_model(model), loader, TrainerConfig(num_steps=NUM_STEPS))


class Memory:
    """A tracker of the user's own: two methods and no base."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def test_every_step_is_sent_and_the_tracker_closed_at_the_end() -> None:
    memory, losses = Memory(), []
    trainer = new_trainer()
    trainer.fit([lambda _, step: losses.append(step.loss), track(memory)], progress=False)
    assert [step for step, _ in memory.lines] == [0, 1, 2]
    assert [values["train/loss"] for _, values in memory.lines] == losses
    names = {f"train/{name}" for name in StepMetrics.__dataclass_fields__} - {"train/index", "train/mfu"}
    assert set(memory.lines[0][1]) <= names  # MFU is not known here, and None is not sent
    assert memory.closed == 1


def test_some_steps_and_the_last_are_sent_with_every() -> None:
    memory = Memory()
    new_trainer().fit(track(memory, every=2, prefix=""), progress=False)
    assert [step for step, _ in memory.lines] == [1, 2]
    assert "loss" in memory.lines[0][1]


def test_a_with_block_closes_once_also_when_training_fails() -> None:
    memory = Memory()

    def fail(trainer: Trainer, step: StepMetrics) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError), track(memory) as hook:
        new_trainer().fit([hook, fail], progress=False)
    assert memory.closed == 1
    memory = Memory()
    with track(memory) as hook:
        new_trainer().fit([hook, lambda _, step: hook.log({"validation/bpb": 1.0}, step.index)], progress=False)
        assert memory.closed == 0
    assert memory.closed == 1
    assert memory.lines[-1] == (2, {"validation/bpb": 1.0})
    with pytest.raises(ConfigError, match="the tracker is closed; to log after the last step use `with track"):
        hook.log({"x": 1.0}, 3)


def test_a_tracker_that_fails_does_not_end_the_training(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Memory):
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise OSError("no network")

        def close(self) -> None:
            raise OSError("still none")

    with caplog.at_level(logging.WARNING, "tinygpt"):
        assert new_trainer().fit(track(Broken()), progress=False) is not None
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if "failed at step 0, training goes on" in message]) == 1
    assert any("did not take 3 of the logged steps" in message for message in messages)
    assert any("could not be closed" in message for message in messages)


def test_what_is_not_finite_is_left_out() -> None:
    memory = Memory()
    track(memory).log({"a": float("nan"), "b": None, "c": 1.0}, 0)
    assert memory.lines == [(0, {"c": 1.0})]


def test_mistakes_are_refused() -> None:
    for make in (track, Tracking):
        with pytest.raises(ConfigError, match="every=0 is not positive"):
            make(Memory(), every=0)
    with pytest.raises(ConfigError, match="tracker 'mlops' is not known; choose mlflow, tensorboard, trackio, wandb"):
        open_tracker("mlops", "project", "run")
    for project, run in (("", "run"), ("project", ""), ("project", "../run"), ("project", "a b"), ("project", "'--")):
        with pytest.raises(ConfigError, match=r"a project needs a name|the name of a run in a tracker"):
            open_tracker("tensorboard", project, run)


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "trackio", "wandb"])
def test_an_absent_package_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "tinygpt\[{name}\]"'):
        open_tracker(name, "project", "run", folder=None if name == "trackio" else tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "tinygpt\[{name}\]"'):
        check_tracker(name)


def test_a_tracker_that_cannot_be_opened_says_so_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> Tracker:
        raise RuntimeError("no login")

    monkeypatch.setitem(trackers._OPENERS, "tensorboard", offline)
    monkeypatch.setattr(trackers, "check_tracker", lambda *_: None)
    with pytest.raises(ConfigError, match="the tracker 'tensorboard' cannot be opened: RuntimeError: no login"):
        open_tracker("tensorboard", "project", "run")


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="No module named 'wandb'"):
        check_tracker("wandb")
    with pytest.raises(ConfigError, match="tracker 'abacus' is not known"):
        check_tracker("abacus")


# Each runs in a process of its own: these packages start threads, change the environment and warn of their own parts.
READERS = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(folder + "/project/first")
events.Reload()
found = [(event.step, event.value) for event in events.Scalars("train/loss")]
""",
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage
found = [(line["step"], line["train/loss"]) for line in SQLiteStorage.get_logs("project", "first")]
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
experiment = client.get_experiment_by_name("project").experiment_id
(run,) = client.search_runs([experiment], "attributes.run_name = 'first'")
assert run.info.status == "FINISHED"
assert run.data.params["dim"] == "16"
found = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]
""",
    # wandb has no reader of its offline files in Python: a log of LevelDB's format, behind a header of seven bytes, of
    # protocol buffers. Each piece has a checksum, a length and a kind, and none crosses a block of 32 KiB.
    "wandb": """
import glob, pathlib
from wandb.proto import wandb_internal_pb2
found = []
for file in sorted(glob.glob(folder + "/wandb/offline-run-*/*.wandb")):
    data, place, whole = pathlib.Path(file).read_bytes(), 7, b""
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
        whole += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # a whole record, or the end of one
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(whole)
        whole = b""
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "train/loss" in items:
            found.append((record.history.step.num, float(items["train/loss"])))
""",
}

WRITE = """
import sys
sys.path.insert(0, {tests!r})
from test_trackers import new_trainer
from tinygpt.errors import ConfigError
from tinygpt.trackers import open_tracker, track
import json

name, folder = {name!r}, {folder!r}
where = {{}} if name == "trackio" else {{"folder": folder}}
losses = []
with track(open_tracker(name, "project", "first", settings={{"dim": 16}}, **where)) as hook:
    new_trainer().fit([hook, lambda trainer, step: losses.append(step.loss)], progress=False)
try:
    open_tracker(name, "project", "first", **where)
    refused = ""
except ConfigError as error:
    refused = str(error)
again = open_tracker(name, "project", "first", resume=True, **where)
again.log({{"train/loss": 1.5}}, 3)
again.close()
losses.append(1.5)
{read}
print(json.dumps({{"losses": losses, "found": found, "refused": refused}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(READERS))
def test_a_tracker_holds_what_was_trained_and_a_name_is_not_taken_twice(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = WRITE.format(tests=str(Path(__file__).parent), name=name, folder=str(tmp_path), read=READERS[name])
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    found = sorted((int(step), float(value)) for step, value in result["found"])
    assert [step for step, _ in found] == [0, 1, 2, 3]
    assert [value for _, value in found] == pytest.approx(result["losses"], rel=1e-6)
    assert "there is a run 'first' already: choose another name, or resume=True" in result["refused"]


def test_trackio_takes_no_folder(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    script = (
        "from tinygpt.trackers import open_tracker\n"
        f"try: open_tracker('trackio', 'project', 'run', folder={str(tmp_path)!r})\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "trackio keeps its files where TRACKIO_DIR says" in done.stdout
