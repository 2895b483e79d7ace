"""What a resume compares: every change of a run is reported, and judged by whether it matters."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tinygpt
from small_runs import TEXTS, make_loader, make_model, make_trainer, steps_of
from tinygpt import GPT, Trainer
from tinygpt.checkpoint import load_state, save_state
from tinygpt.data import BatchLoader, Mixture, TextDocuments, ValidationSet
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.losses import LossSum, next_token_loss
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import constant, cosine, cosine_weight_decay, linear_warmup, muon_momentum, warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer
from tinygpt.trainer import ResumeRefusedError


def validation(text: str = "some text to measure on") -> ValidationSet:
    return ValidationSet.from_source(TextDocuments([text]), ByteTokenizer(), rows=1, seq_len=8)


def half_loss(model: torch.nn.Module, batch: Any) -> LossSum:
    total, count = next_token_loss(model, batch)
    return LossSum(total / 2, count)


def mixed(prose: float) -> BatchLoader:
    parts = {"prose": (TextDocuments(TEXTS), 0.5), "code": (TextDocuments(["x = 1; " * 9] * 9), 0.5)}
    source: Any = Mixture(parts)
    if prose != 0.5:
        source = source.with_weights({"prose": prose, "code": 1 - prose})
    return BatchLoader(source, ByteTokenizer(), rows=2, seq_len=16, buffer_documents=4, prefetch=0, num_workers=0)


def upper(texts: list[str] = TEXTS, **settings: Any) -> BatchLoader:
    """A loader whose tokenizer is another one with the same ids."""

    class Upper(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.upper())

        def fingerprint(self) -> str:
            return "another"

    return BatchLoader(TextDocuments(texts), Upper(), rows=2, seq_len=16, buffer_documents=8, prefetch=0, num_workers=0)


def model_with(**fields: Any) -> GPT:
    torch.manual_seed(0)
    config = make_model().config
    assert config is not None
    return GPT.from_config(config.replace(**fields))


def muon(**options: Any) -> Callable[[torch.nn.Module], MuonAdamW]:
    return lambda model: MuonAdamW.for_model(model, **options)


# Before, after, the row that says so, and the topic it needs; "" passes with a note.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "lr x 3": ({}, {"optimizer": muon(lr=0.06)}, "lr (muon", "schedule"),
    "lr / 3": ({}, {"optimizer": muon(lr=0.006)}, "lr (muon", "schedule"),
    "lr x 1.5": ({}, {"optimizer": muon(lr=0.03)}, "lr (muon", ""),
    "lr to zero": ({}, {"schedules": {"lr": constant(0.0)}}, "lr (", "schedule"),
    "weight decay from zero": (
        {"optimizer": muon(weight_decay=0.0)},
        {"optimizer": muon(weight_decay=0.1)},
        "weight_decay (muon",
        "schedule",
    ),
    "momentum": ({}, {"optimizer": muon(momentum=0.8)}, "momentum (muon", "schedule"),
    "momentum a little": ({}, {"optimizer": muon(momentum=0.94)}, "momentum (muon", ""),
    "second beta": ({}, {"optimizer": muon(betas=(0.9, 0.999))}, "betas[1] (adamw", "schedule"),
    "tokens of a step": ({"batch_tokens": 32}, {"batch_tokens": 64}, "tokens of a step", "schedule"),
    "clipping on": ({}, {"grad_clip": 1.0}, "grad_clip", "schedule"),
    "clipping off": ({"grad_clip": 1.0}, {}, "grad_clip", "schedule"),
    "clipping lower": ({"grad_clip": 1.0}, {"grad_clip": 0.1}, "grad_clip", "schedule"),
    "clipping a little": ({"grad_clip": 1.0}, {"grad_clip": 0.8}, "grad_clip", ""),
    "loss": ({}, {"arguments": {"loss_fn": half_loss}}, "loss", "model"),
    "model": ({}, {"model": lambda: model_with(soft_cap=30.0)}, "model soft_cap", "model"),
    "precision": ({}, {"precision": "bfloat16"}, "precision", ""),
    "horizon": ({}, {"num_steps": 9}, "num_steps", ""),
    "later rates": (
        {"schedules": {"lr": constant()}},
        {"schedules": {"lr": warmup_stable_decay(9, decay_steps=4)}},
        "schedule lr",
        "",
    ),
    "a schedule dropped": ({"schedules": {"lr": constant()}}, {}, "schedule lr", ""),
    "text": ({}, {"loader": lambda: make_loader([*TEXTS, "one more"])}, "source_fingerprint", "data"),
    "tokenizer": ({}, {"loader": upper}, "tokenizer_fingerprint", "data"),
    "rows": ({"batch_tokens": 64}, {"batch_tokens": 64, "loader": lambda: make_loader(rows=4)}, "loader rows", ""),
    "ranks": (
        {"loader": lambda: make_loader(rows=4)},
        {"loader": lambda: make_loader(world_size=2)},
        "loader ranks",
        "",
    ),
    "row length": ({}, {"loader": lambda: make_loader(seq_len=8, rows=4)}, "loader seq_len", "data"),
    "packing": ({}, {"loader": lambda: make_loader(overflow="carry")}, "loader overflow", "data"),
    "buffer": ({}, {"loader": lambda: make_loader(buffer_documents=9)}, "loader buffer_documents", "data"),
    "shuffling on": ({}, {"loader": lambda: make_loader(seed=1)}, "loader seed", "data"),
    "shuffle seed": (
        {"loader": lambda: make_loader(seed=1)},
        {"loader": lambda: make_loader(seed=2)},
        "loader seed",
        "data",
    ),
    "shuffle window": (
        {"loader": lambda: make_loader(seed=1)},
        {"loader": lambda: make_loader(seed=1, shuffle_documents=9)},
        "loader shuffle_documents",
        "data",
    ),
    "shares of a mixture": (
        {"loader": lambda: mixed(0.5)},
        {"loader": lambda: mixed(0.9)},
        "loader weights",
        "data",
    ),
    "validation set": (
        {"arguments": {"validation": validation()}},
        {"arguments": {"validation": validation("another text to measure on")}},
        "validation set",
        "data",
    ),
}


def built(out: Path, settings: dict[str, Any]) -> Trainer:
    made = {key: value() if key in ("loader", "model") else value for key, value in settings.items()}
    return make_trainer(out, **{"num_steps": 4, **made})


@pytest.mark.filterwarnings("ignore:bfloat16 products are slow")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_reported_and_judged(tmp_path: Path, name: str) -> None:
    before, after, row, topic = CHANGES[name]
    first = built(tmp_path, before)
    steps_of(first, 1)
    first.save_state()
    if topic:
        refused = built(tmp_path, after)
        with pytest.raises(CheckpointError) as error:
            refused.resume()
        assert f"accept=['{topic}']" in str(error.value)
        assert any(line.startswith(row) for line in str(error.value).splitlines()), str(error.value)
        assert refused.next_step == 0
    changes = built(tmp_path, after).resume(accept=[topic] if topic else [])
    assert changes is not None
    assert [change.topic for change in changes if change.name.startswith(row)] == [topic]


@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if change[3] == "data"])
def test_other_data_that_was_accepted_can_be_trained_on(tmp_path: Path, name: str) -> None:
    before, after, *_ = CHANGES[name]
    first = built(tmp_path, before)
    steps_of(first, 1)
    first.save_state()
    trainer = built(tmp_path, after)
    changes = trainer.resume(accept=["data"])
    assert changes is not None
    over = {change.was for change in changes if change.name == "loader position"}
    gone_on = ("text", "shares of a mixture", "validation set")
    assert over == (set() if name in gone_on else {"saved"})
    assert len(steps_of(trainer, 2)) == 2


def test_nothing_changed_is_nothing_said(tmp_path: Path) -> None:
    arguments = {"arguments": {"validation": validation()}, "schedules": {"lr": cosine(9)}, "grad_clip": 1.0}
    first = make_trainer(tmp_path, **arguments)
    steps_of(first, 1)
    first.save_state()
    assert make_trainer(tmp_path, **arguments).resume() == []


def test_versions_and_device_are_noted(tmp_path: Path) -> None:
    steps_of(make_trainer(tmp_path, num_steps=1), 1)
    folder = tmp_path / "checkpoints" / "step-000001"
    state = load_state(folder)
    state["environment"] |= {"torch version": "2.9.0", "tinygpt version": "0.0.9", "device": "cuda"}
    rewrite(folder, state)
    changes = make_trainer(tmp_path, num_steps=1).resume()
    assert changes is not None
    noted = {change.name: (change.was, change.will_be, change.topic) for change in changes}
    assert noted["torch version"] == ("2.9.0", torch.__version__, "")
    assert noted["tinygpt version"] == ("0.0.9", tinygpt.__version__, "")
    assert noted["device"] == ("cuda", "cpu", "")


def rewrite(folder: Path, state: dict[str, Any]) -> None:
    """Save a state again, as another version of the library would have."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}

    def files(target: Path) -> None:
        for name in ("model.safetensors", "config.json"):
            (target / name).write_bytes(kept[name])

    save_state(folder, state, write_files=files)


def test_a_checkpoint_from_before_a_thing_was_saved_says_unknown_and_goes_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"arguments": {"validation": validation()}, "num_steps": 1}
    steps_of(make_trainer(tmp_path, **arguments), 1)
    folder = tmp_path / "checkpoints" / "step-000001"
    state = load_state(folder)
    for key in ("identity", "phases", "other loaders", "rewarm", "rates", "settings", "environment"):
        del state[key]
    rewrite(folder, state)
    trainer = make_trainer(tmp_path, **arguments)
    changes = trainer.resume()
    assert changes is not None
    assert {change.was for change in changes} == {"unknown"}
    assert not any(change.topic for change in changes)
    assert {"rates of the next step", "validation set", "precision"} <= {change.name for change in changes}
    assert trainer.next_step == 1


def test_groups_that_hold_other_parameters_can_never_be_accepted(tmp_path: Path) -> None:
    def adamw(reverse: bool) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
        def build(model: torch.nn.Module) -> torch.optim.Optimizer:
            vectors = [p for p in model.parameters() if p.ndim < 2]
            matrices = [p for p in model.parameters() if p.ndim > 1]
            moved = [*matrices[:-1], vectors[0]] if reverse else matrices
            rest = [*vectors[1:], matrices[-1]] if reverse else vectors
            return torch.optim.AdamW([{"params": moved}, {"params": rest}], lr=0.01)

        return build

    steps_of(make_trainer(tmp_path, num_steps=1, optimizer=adamw(False)), 1)
    with pytest.raises(
        CheckpointError, match=r"(?s)parameters of group 0 .*\+.* -.*build the groups of the checkpoint"
    ):
        make_trainer(tmp_path, num_steps=2, optimizer=adamw(True)).resume(accept=["schedule", "model", "data"])


def test_a_run_never_mixes_two_validation_sets_unseen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_trainer(tmp_path, num_steps=1)
    for _ in first:
        first.record("evaluation", bpb=3.0, data_hash="a" * 64)
    with pytest.raises(CheckpointError, match="validation set bbbbbbbbbbbb, and this run on aaaaaaaaaaaa so far"):
        first.record("evaluation", bpb=3.0, data_hash="b" * 64)
    first.record("other evaluation", bpb=3.0, data_hash="b" * 64)
    again = make_trainer(tmp_path, num_steps=3)
    again.resume()
    with pytest.raises(CheckpointError, match=r"resume with accept=\['data'\]"):
        again.record("evaluation", bpb=3.0, data_hash="b" * 64)
    accepted = make_trainer(tmp_path, num_steps=3)
    accepted.resume(accept=["data"])
    accepted.record("evaluation", bpb=3.0, data_hash="b" * 64)
    assert "evaluations are on the validation set bbbbbbbbbbbb from now on, not aaaaaaaaaaaa" in caplog.text
    with pytest.raises(CheckpointError, match="measured on the validation set aaaaaaaaaaaa"):
        accepted.record("evaluation", bpb=3.0, data_hash="a" * 64)


def test_evaluations_must_be_on_the_set_that_the_trainer_was_given(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_steps=1, arguments={"validation": validation()})
    trainer.record("evaluation", bpb=3.0, data_hash=validation().hash)
    with pytest.raises(CheckpointError, match="cannot be compared"):
        trainer.record("evaluation", bpb=3.0, data_hash=validation("another").hash)
    with pytest.raises(ConfigError, match="validation is a str, not a ValidationSet"):
        make_trainer(arguments={"validation": "val.safetensors"})


def documented(horizon: int, out: Path) -> Trainer:
    """The schedules of the documented run, which at step 10,000 went from a horizon of 10,000 to one of 87,000."""
    schedules = {
        "lr": warmup_stable_decay(horizon, warmup_steps=40, decay_fraction=0.65, final=0.05),
        "muon.momentum": muon_momentum(horizon),
        "muon.weight_decay": cosine_weight_decay(horizon),
    }
    return make_trainer(out, schedules=schedules, num_steps=horizon)


@pytest.fixture
def decayed(tmp_path: Path) -> Path:
    """The run's folder after 10,000 steps, without having made them all."""
    trainer = documented(10_000, tmp_path)
    for step in (3_000, 6_000, 9_000, 10_000):
        trainer.set_progress(step, 0, 0.0)
        trainer.save_state()
    return tmp_path


def test_the_jump_of_the_documented_run_is_refused_with_every_number_and_every_way_on(decayed: Path) -> None:
    with pytest.raises(ResumeRefusedError) as error:
        documented(87_000, decayed).resume()
    text = str(error.value)
    assert error.value.folder == decayed / "checkpoints" / "step-010000"
    assert {change.topic for change in error.value.changes} == {"schedule"}
    assert set(error.value.rates) <= set(error.value.changes)
    assert error.value.branch_from == decayed / "checkpoints" / "step-003000"

    def row(name: str) -> str:
        return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(name))

    assert row("lr (muon").endswith("0.001 0.02 x 20")
    assert row("weight_decay (muon").endswith(f" 0 {0.1 * math.cos(math.pi / 2 * 10 / 87) ** 2:.6g}")
    assert row("momentum (muon").endswith("0.9 0.97 x 1.078")
    assert "keep the schedule, horizon and batch of the checkpoint: num_steps=10000, schedules {lr: warmup" in text
    assert "rewarm_steps=N" in text
    assert "accept=['schedule']" in text
    # The rate falls from step 3,500 on; at 6,000 the weight decay is a third of what it would be.
    assert f"trainer.load_state({str(decayed / 'checkpoints' / 'step-003000')!r})" in text


def test_each_way_on_works(decayed: Path, tmp_path: Path) -> None:
    assert documented(10_000, decayed).resume() == []

    accepted = documented(87_000, decayed)
    accepted.resume(accept=["schedule"])
    assert steps_of(accepted, 1)[0].lr == 0.02

    rewarmed = documented(87_000, decayed)
    changes = rewarmed.resume(rewarm_steps=100)
    assert not any(change.topic for change in changes or [])
    assert steps_of(rewarmed, 1)[0].lr == 0.001

    branch = documented(87_000, tmp_path / "branch")
    changes = branch.load_state(decayed / "checkpoints" / "step-003000")
    assert not any(change.topic for change in changes)
    assert steps_of(branch, 1)[0].index == 3_000


def test_where_no_checkpoint_lies_before_the_jump_the_error_says_so(decayed: Path) -> None:
    shutil.rmtree(decayed / "checkpoints" / "step-003000")
    with pytest.raises(CheckpointError, match="no checkpoint that is kept beside this one would do"):
        documented(87_000, decayed).resume()


def test_a_damaged_checkpoint_is_not_named_as_a_way_on(decayed: Path) -> None:
    (decayed / "checkpoints" / "step-003000" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint that is kept beside this one would do"):
        documented(87_000, decayed).resume()


def test_fit_resumes_in_one_call(tmp_path: Path) -> None:
    def trainer(num_steps: int, out: Path = tmp_path) -> Trainer:
        return make_trainer(out, num_steps=num_steps, schedules={"lr": linear_warmup(2)})

    assert trainer(2).fit(progress=False, report=False, resume="auto") is not None  # nothing there yet
    again = trainer(3)
    last = again.fit(progress=False, report=False, resume="auto")
    assert last is not None
    assert last.index == 2
    branch = trainer(4, tmp_path / "b")
    seen: list[int] = []
    folder = tmp_path / "checkpoints" / "step-000002"
    branch.fit([lambda trainer, step: seen.append(step.index)], progress=False, report=False, resume=folder)
    assert seen == [2, 3]
    assert (
        branch.fit(progress=False, report=False, resume="auto") is None
    )  # it goes on where it stands, and that is the end
    with pytest.raises(ConfigError, match="give resume='auto' as well"):
        trainer(4).fit(accept=["data"])
    with pytest.raises(ConfigError, match="give resume='auto' as well"):
        trainer(4).fit(rewarm_steps=3)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        trainer(4, tmp_path / "c").fit(progress=False, resume=tmp_path / "nowhere")


def test_what_was_compared_is_json_that_a_reader_can_look_up(tmp_path: Path) -> None:
    steps_of(make_trainer(tmp_path, num_steps=1, arguments={"validation": validation()}), 1)
    state = json.loads((tmp_path / "checkpoints" / "step-000001" / "state.json").read_text())["state"]
    assert state["identity"]["validation set"] == validation().hash
    assert state["identity"]["loader"] == {"rows": 2, "ranks": 1, "weights": None}
    assert any(names == ["embedding.weight"] or len(names) > 1 for names in state["identity"]["groups"].values())
