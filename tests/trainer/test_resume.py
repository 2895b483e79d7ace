"""Stopping and going on: bit for bit, in new processes, at any moment, and never with an unseen change."""

import contextlib
import json
import os
import re
import signal
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
from tinygpt.checkpoint import checkpoint_folder, latest_checkpoint, list_checkpoints, load_state
from tinygpt.data import BatchLoader, TextDocuments, TextFiles, TokenShards, tokenize_documents
from tinygpt.errors import CheckpointError, ConfigError, DataError
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer, load_tokenizer
from tinygpt.trainer import Interrupted, format_changes, stopped_runs_go_on_by

EXAMPLE = Path(__file__).parents[2] / "examples" / "reproduce_rtx4070_d12.py"
TEXTS = [f"document {number} " * (number % 7 + 1) for number in range(40)]


def make_trainer(
    out: Path, *, texts: list[str] = TEXTS, horizon: int = 12, model: dict[str, Any] | None = None, **config: Any
) -> Trainer:
    torch.manual_seed(0)
    settings = {"head_dim": 16, "width_per_layer": 16, "vocab_size": 257, "max_seq_len": 16, **(model or {})}
    gpt = GPT.from_config(GPTConfig.from_depth(2, **settings))
    loader = BatchLoader(TextDocuments(texts), ByteTokenizer(), rows=2, seq_len=16, buffer_documents=8)
    return Trainer(
        gpt,
        MuonAdamW.for_model(gpt),
        loader,
        TrainerConfig(**{"num_steps": 12, "batch_tokens": 64, "out_dir": str(out), "save_every": 4, **config}),
        schedules={"lr": warmup_stable_decay(horizon, warmup_steps=2, decay_fraction=0.5)},
    )


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, moments, loader and rates equal bit for bit; the clock, and randomness nobody seeded, may differ."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [load_state(folder) for folder in (a, b)]
    for state in states:
        del state["elapsed_seconds"], state["random"]["numpy"], state["random"]["python"], state["optimizer"]
        tensors = state["loader"].pop("tensors") | {"torch": state["random"].pop("torch")}
        state["tensors"] = {name: tensor.tolist() for name, tensor in tensors.items()}
    assert states[0] == states[1]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if record["event"] == "step"]


@pytest.mark.parametrize("optimizer", [MuonAdamW.for_model, torch.optim.AdamW])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, optimizer: Any) -> None:
    def trainer(out: Path) -> Trainer:
        built = make_trainer(out)
        if optimizer is not torch.optim.AdamW:
            return built
        torch_adamw = torch.optim.AdamW(built.model.parameters(), lr=0.01)
        return Trainer(built.model, torch_adamw, built.loader, built.config, schedules=built.phases[0].schedules)

    list(trainer(tmp_path / "whole"))
    for step in trainer(tmp_path / "parts"):
        torch.rand(3)  # a user's draw, such as sampling, is part of the state as well
        if step.index == 5:  # after the checkpoint of step 4: two steps are done again
            break
    resumed = trainer(tmp_path / "parts")
    assert resumed.resume() == []
    assert resumed.next_step == 4
    list(resumed)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (tmp_path / run / "checkpoints" / "step-000012" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_a_checkpoint_is_a_model_and_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_steps=2)
    list(trainer)
    folder = tmp_path / "checkpoints" / "step-000002"
    ids = torch.tensor([[256, *b"document"]])
    assert torch.equal(GPT.from_pretrained(folder)(ids), trainer.model(ids))
    assert load_tokenizer(folder).fingerprint() == ByteTokenizer().fingerprint()


def interrupted_at_four(out: Path) -> None:
    list(make_trainer(out, num_steps=4))


def test_a_longer_run_on_the_planned_schedule_is_harmless_and_said(tmp_path: Path) -> None:
    interrupted_at_four(tmp_path)
    trainer = make_trainer(tmp_path)
    changes = trainer.resume()
    assert changes is not None
    assert [(c.name, c.was, c.will_be, c.topic) for c in changes] == [("num_steps", 4, 12, "")]
    assert format_changes(changes).splitlines() == ["           was  will be  factor", "num_steps  4    12       x 3"]
    recorded = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["event"] == "resume"]
    assert recorded[0]["changes"] == [["num_steps", 4, 12]]


def test_a_jump_in_learning_rate_is_refused_with_numbers_until_accepted(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, horizon=4, num_steps=4))  # decayed to zero
    trainer = make_trainer(tmp_path, horizon=12)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"(?s)lr \(muon.* 0 +0\.02.*keep the schedule.*accept=\['schedule'\]"):
        trainer.resume()
    assert trainer.next_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    changes = trainer.resume(accept=["schedule"])
    assert changes is not None
    assert any(c.name.startswith("lr (muon") and (c.was, c.will_be) == (0.0, 0.02) for c in changes)
    assert next(iter(trainer)).lr == 0.02


def test_a_small_change_of_rates_passes_and_is_said(tmp_path: Path) -> None:
    interrupted_at_four(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer = Trainer(
        trainer.model, MuonAdamW.for_model(trainer.model, lr=0.015), trainer.loader, trainer.config,
        schedules=trainer.phases[0].schedules,
    )  # fmt: skip
    changes = trainer.resume()
    assert changes is not None
    assert [(c.was, c.will_be) for c in changes if c.name.startswith("lr (muon")] == [(0.02, 0.015)]
    # The new rate is used though the optimizer state holds the old one.
    assert next(iter(trainer)).lr == pytest.approx(0.015)


def test_other_data_is_refused_until_accepted(tmp_path: Path) -> None:
    interrupted_at_four(tmp_path)
    other = [*TEXTS, "one more"]
    with pytest.raises(CheckpointError, match=r"(?s)source_fingerprint.*accept=\['data'\]"):
        make_trainer(tmp_path, texts=other).resume()
    trainer = make_trainer(tmp_path, texts=other)
    assert trainer.resume(accept=["data"]) is not None
    assert trainer.next_step == 4


def write_files(folder: Path) -> None:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text("\n\n".join(TEXTS[10 * number : 10 * number + 10]), "utf-8", newline="\n")


def delete_one(folder: Path) -> None:
    (folder / "0.txt").unlink()


def change_one(folder: Path) -> None:
    (folder / "0.txt").write_text("something else altogether", "utf-8")


@pytest.mark.parametrize("change", [delete_one, change_one])
def test_a_file_deleted_or_changed_since_the_checkpoint_is_refused_until_accepted(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    def trainer_on_files(num_steps: int) -> Trainer:
        trainer = make_trainer(tmp_path / "run", num_steps=num_steps)
        source = TextFiles(tmp_path / "text", separator="\n\n")
        loader = BatchLoader(source, ByteTokenizer(), rows=2, seq_len=16, buffer_documents=8, overflow="carry", seed=0)
        return Trainer(trainer.model, trainer.optimizer, loader, trainer.config, schedules=trainer.phases[0].schedules)

    write_files(tmp_path / "text")
    before = trainer_on_files(4)
    before.fit(progress=False, report=False)
    change(tmp_path / "text")
    with pytest.raises(CheckpointError, match=r"(?s)source_fingerprint.*accept=\['data'\]"):
        trainer_on_files(8).resume()
    trainer = trainer_on_files(8)
    assert trainer.resume(accept=["data"]) is not None
    assert trainer.next_step == 4
    # What waited in the packing buffer comes first, counters go on, and the new files are read from their beginning.
    assert trainer.loader.epoch == 0
    assert trainer.loader.utilization() == before.loader.utilization()
    trainer.fit(progress=False, report=False)
    assert trainer.next_step == 8


def test_token_shards_deleted_changed_or_made_again_since_the_checkpoint_are_not_read_unseen(tmp_path: Path) -> None:
    def trainer_on_shards(folder: Path, num_steps: int) -> Trainer:
        trainer = make_trainer(tmp_path / "run", num_steps=num_steps)
        loader = BatchLoader(TokenShards(folder), rows=2, seq_len=16, buffer_documents=8)
        return Trainer(trainer.model, trainer.optimizer, loader, trainer.config, schedules=trainer.phases[0].schedules)

    def tokenize(texts: list[str], folder: Path) -> None:
        tokenize_documents(TextDocuments(texts), ByteTokenizer(), folder, processes=1, shard_tokens=300)

    tokenize(TEXTS, tmp_path / "tokens")
    trainer_on_shards(tmp_path / "tokens", 4).fit(progress=False, report=False)

    other = tmp_path / "other"
    tokenize(TEXTS[::-1], other)
    with pytest.raises(CheckpointError, match=r"(?s)source_fingerprint.*accept=\['data'\]"):
        trainer_on_shards(other, 8).resume()
    assert trainer_on_shards(other, 8).resume(accept=["data"]) is not None

    last = sorted((tmp_path / "tokens").glob("tokens-*.bin"))[-1]
    content = last.read_bytes()
    last.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    changed = trainer_on_shards(tmp_path / "tokens", 40)
    changed.resume(accept=["schedule"])
    with pytest.raises(DataError, match=f"{last.name} was changed since it was written.*restore it, or tokenize again"):
        changed.fit(progress=False)

    last.unlink()
    with pytest.raises(DataError, match=f"{last.name} is missing.*restore it, or tokenize again"):
        trainer_on_shards(tmp_path / "tokens", 8)


def test_another_model_is_refused(tmp_path: Path) -> None:
    interrupted_at_four(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)model soft_cap +15 +30 .*accept=\['model'\]"):
        make_trainer(tmp_path, model={"soft_cap": 30.0}).resume()
    wider = make_trainer(tmp_path, model={"hidden_dim": 80})
    with pytest.raises(
        CheckpointError,
        match=r"mlp.down_proj.weight was \(32, 128\), is \(32, 80\)",
    ):
        wider.resume(accept=["model"])


def test_other_loader_settings_are_refused(tmp_path: Path) -> None:
    interrupted_at_four(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.loader = BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=2, seq_len=16, buffer_documents=9)
    with pytest.raises(CheckpointError, match="buffer_documents"):
        trainer.resume()


def test_other_micro_batches_go_on_with_the_same_rows(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.fit(report=False)
    interrupted_at_four(tmp_path / "resumed")
    trainer = make_trainer(tmp_path / "resumed")
    trainer.loader = BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=4, seq_len=16, buffer_documents=8)
    trainer.resume()
    trainer.fit(report=False)
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_an_unknown_topic_to_accept_is_refused(tmp_path: Path) -> None:
    interrupted_at_four(tmp_path)
    with pytest.raises(
        ConfigError, match=r"accept=\['everything'\] is not known; give a list of data, model, schedule"
    ):
        make_trainer(tmp_path).resume(accept=["everything"])


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=8))
    weights = tmp_path / "checkpoints" / "step-000008" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"passing over a damaged checkpoint.*step-000008"):
        trainer.resume()
    assert trainer.next_step == 4


def test_there_may_be_nothing_to_resume(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).resume() is None


def run_example(out: Path, *options: str, **popen: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLE), "--scale", "smoke", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    output = finish(run_example(out))
    for part in (
        "from phase 1 to phase 2:\n    nothing changes",
        "at step 4, with changes",
        "loaded again",
        "curve.png",
    ):
        assert part in output
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    return out


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if any(r.get("step", -1) >= step for r in read_metrics(out / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get that far")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are Unix's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_example_killed_and_run_again_ends_bit_identical(tmp_path: Path, whole_run: Path, number: int) -> None:
    process = run_example(tmp_path)
    wait_for_step(tmp_path, 5)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, output
        assert "the state is saved in" in output
        assert "to go on: run the same program with trainer.resume()" in output
    finish(run_example(tmp_path))
    assert losses(tmp_path) == losses(whole_run)
    assert_same_checkpoint(*(out / "checkpoints" / "step-000012" for out in (tmp_path, whole_run)))


def test_the_documented_recipe_stops_at_its_jump_until_it_is_accepted(tmp_path: Path) -> None:
    refused = run_example(tmp_path, "--recipe", "documented")
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert re.search(
        r"error: where phase 2 begins, at step 4, rates jump:.*x 20\n.*weight_decay .* 0 +0\.105", output, re.S
    )
    assert "training a tokenizer" not in output
    assert list(tmp_path.iterdir()) == []
    output = finish(run_example(tmp_path, "--recipe", "documented", "--accept", "schedule"))
    jumps = {r["step"]: r["changes"] for r in read_metrics(tmp_path / "metrics.jsonl") if r.get("event") == "phase"}
    assert [name.split()[0] for name, _, _ in jumps[4][:3]] == ["lr", "momentum", "weight_decay"]


def test_the_wsd_recipe_is_saved_before_its_decay_and_nothing_jumps(tmp_path: Path) -> None:
    assert "to phase 2 (decay):\n    nothing changes" in finish(run_example(tmp_path, "--recipe", "wsd"))
    lr = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl") if r.get("event") == "step"]
    assert lr[2:11] == [lr[2]] * 9
    assert lr[11] < lr[10]
    assert checkpoint_folder(tmp_path / "checkpoints", 10).is_dir()


def test_running_a_finished_example_again_changes_nothing(whole_run: Path) -> None:
    before = (whole_run / "checkpoints" / "step-000012" / "manifest.json").read_bytes()
    assert "loaded again" in finish(run_example(whole_run))
    assert (whole_run / "checkpoints" / "step-000012" / "manifest.json").read_bytes() == before


def test_a_signal_that_comes_while_a_step_is_saved_stops_after_the_next_one_saved_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")

    class Late(Trainer):
        def _save_if_due(self, **when: bool) -> None:
            super()._save_if_due(**when)
            if self.next_step == 2:
                signal.raise_signal(signal.SIGINT)

    trainer = make_trainer(tmp_path, save_every=None)
    trainer.__class__ = Late
    with pytest.raises(Interrupted):
        trainer.fit(progress=False)
    saved = checkpoint_folder(tmp_path / "checkpoints", 3)
    assert latest_checkpoint(tmp_path / "checkpoints") == saved
    assert f"stopped after step 2: the state is saved in {saved}; to go on: " in capsys.readouterr().err


def test_the_line_of_a_stop_can_name_another_way_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    for folder, words in (("a", "press the green button"), ("b", None)):
        with pytest.raises(Interrupted), stopped_runs_go_on_by(words) if words else contextlib.nullcontext():
            make_trainer(tmp_path / folder).fit(lambda *_: signal.raise_signal(signal.SIGINT), progress=False)
        way = words or "run the same program with trainer.resume()"
        assert capsys.readouterr().err.endswith(f"; to go on: {way}\n")


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path: Path) -> None:
    process = run_example(tmp_path, "--data", "no/such/place", "--validation", "nothing.txt")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "no/such/place" in output
    assert "Traceback" not in output
    assert os.listdir(tmp_path) == []


def test_manifest_lists_every_file(whole_run: Path) -> None:
    folder = latest_checkpoint(whole_run / "checkpoints")
    assert folder is not None
    listed = json.loads((folder / "manifest.json").read_text())["files"].keys()
    assert {path.name for path in folder.iterdir()} == {*listed, "manifest.json"}
    assert len(list_checkpoints(whole_run / "checkpoints")) == 3
