"""Runs of several phases: compared before they start, switched exactly, and gone on with at any step."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import TEXTS, everything, make_loader, make_model, make_trainer, steps_of
from tinygpt import Trainer, TrainerConfig
from tinygpt.checkpoint import list_checkpoints
from tinygpt.data import Batch
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import Schedule, constant, linear_warmup, warmup_stable_decay
from tinygpt.trainer import Phase

OTHER = [f"another text of number {number}" for number in range(30)]


def line(step: int) -> float:
    """One schedule for a whole run."""
    return 1 - step / 50


def three(out: Path | None, **config: Any) -> Trainer:
    """Data A, then data B with twice the batch, then data A again where it was left."""
    phases = [
        Phase(3, {"lr": line}, name="first"),
        Phase(2, {"lr": line}, loader=make_loader(OTHER, overflow="carry"), batch_tokens=64, name="second"),
        Phase(3, {"lr": line, "muon.momentum": lambda step: 0.95}, name="third"),
    ]
    return make_trainer(out, arguments={"phases": phases}, **config)


def end(out: Path, step: int = 8) -> dict[str, Any]:
    return everything(out / "checkpoints" / f"step-{step:06d}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    list(three(out, save_every=1, keep_last=None))
    return out


@pytest.mark.parametrize("step", range(1, 9))
def test_resumed_at_every_step_it_ends_bit_for_bit_the_same(tmp_path: Path, whole: Path, step: int) -> None:
    folder = whole / "checkpoints" / f"step-{step:06d}"
    shutil.copytree(folder, tmp_path / "checkpoints" / folder.name)
    trainer = three(tmp_path)
    assert trainer.resume() == []
    assert trainer.next_step == step
    list(trainer)
    assert end(tmp_path) == end(whole)


@pytest.mark.parametrize("killed_after", range(1, 8))
def test_killed_at_any_step_it_goes_on_from_the_last_boundary(tmp_path: Path, whole: Path, killed_after: int) -> None:
    steps_of(three(tmp_path), killed_after)
    trainer = three(tmp_path)
    if killed_after < 3:  # nothing was saved
        assert trainer.resume() is None
        return
    assert trainer.resume() == []
    assert trainer.next_step == (3 if killed_after < 5 else 5)
    list(trainer)
    assert end(tmp_path) == end(whole)
    events = [(record["event"], record["step"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [step for event, step in events if event == "step"] == list(range(8))
    assert [step for event, step in events if event == "phase"] == [3, 5]


def test_phases_equal_two_trainers_by_hand(tmp_path: Path) -> None:
    """What a phase changes, done with a second Trainer on the same model, optimizer and loader."""
    lr: dict[str, Schedule] = {"lr": line}
    one = make_trainer(
        arguments={"phases": [Phase(3, lr), Phase(3, lr, loader=make_loader(OTHER), batch_tokens=64)]},
    )
    losses = [step.loss for step in one]
    model = make_model()
    optimizer = MuonAdamW.for_model(model)
    first = Trainer(model, optimizer, make_loader(), TrainerConfig(num_steps=3), schedules=lr)
    by_hand = [step.loss for step in first]
    second = Trainer(
        model,
        optimizer,
        make_loader(OTHER),
        TrainerConfig(num_steps=6, batch_tokens=64),
        schedules=lr,
    )
    second.set_progress(3, first.tokens, 0.0)
    by_hand += [step.loss for step in second]
    assert losses == by_hand
    for a, b in zip(one.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.tokens == second.tokens == 3 * 32 + 3 * 64


def test_each_phase_reads_its_own_data_and_the_first_goes_on_where_it_stood() -> None:
    read: list[str] = []

    def recording(name: str) -> Any:
        loader = make_loader([name * 8] * 9, overflow="carry")

        class Recorder:
            rows, seq_len = loader.rows, loader.seq_len

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> Batch:
                read.append(name)
                return next(loader)

        return Recorder()

    a, b = recording("a"), recording("b")
    phases = [Phase(2), Phase(1, loader=b, batch_tokens=64), Phase(2, batch_tokens=96)]
    tokens = [step.tokens for step in make_trainer(loader=a, arguments={"phases": phases})]
    assert read == ["a", "a", "b", "b", *["a"] * 6]
    assert tokens == [32, 64, 128, 224, 320]


def test_a_plain_iterable_of_two_phases_is_read_on_and_not_from_its_beginning() -> None:
    batches = list(itertools.islice(make_loader(), 4))
    plain = [step.loss for step in make_trainer(loader=batches, num_steps=4)]
    phased = make_trainer(loader=batches, arguments={"phases": [Phase(1), Phase(3)]})
    assert [step.loss for step in phased] == plain


def jumping(accept: list[str]) -> list[Phase]:
    return [
        Phase(4, {"lr": warmup_stable_decay(4, decay_steps=3, final=0.05)}),
        Phase(4, {"lr": warmup_stable_decay(20, decay_steps=3)}, accept=accept),
    ]


def test_a_jump_between_phases_is_refused_before_anything_is_trained_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)phase 2 begins, at step 4, .*lr \(muon.* 0\.001 +0\.02 +x 20.*accept="):
        make_trainer(tmp_path, arguments={"phases": jumping([])})
    assert list(tmp_path.iterdir()) == []


def test_a_jump_that_the_phase_accepts_is_made_and_resumed_at_the_boundary_without_more_words(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, arguments={"phases": jumping(["schedule"])})
    rates = [step.lr for step in steps_of(trainer, 5)]
    assert rates[4] == 0.02
    again = make_trainer(tmp_path, arguments={"phases": jumping(["schedule"])})
    assert again.resume() == []
    assert again.next_step == 4


def test_an_option_that_only_one_phase_schedules_is_put_back_after_it() -> None:
    phases = [Phase(1), Phase(1, {"muon.momentum": constant(0.93)}), Phase(1)]
    assert [step.momentum for step in make_trainer(arguments={"phases": phases})] == [0.95, 0.93, 0.95]


def test_a_boundary_is_logged_written_to_the_metrics_and_never_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(three(tmp_path, save_every=1, keep_last=1))
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-000003",
        "step-000005",
        "step-000008",
    ]
    events = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["event"] == "phase"]
    assert [(event["phase"], event["name"]) for event in events] == [(2, "second"), (3, "third")]
    changes = {name: (was, will_be) for name, was, will_be in events[0]["changes"]}
    assert changes["tokens of a step"] == (32, 64)
    assert changes["loader overflow"] == ("crop", "carry")
    assert "source_fingerprint" in changes
    assert "phase 2 (second) begins at step 3" in caplog.text
    assert three(None).course.boundaries == {3, 5}


def extended(out: Path, *, accept: list[str] | None = None, decay: Callable[[int], float] = line) -> Trainer:
    phases = [Phase(3, {"lr": line}), Phase(3, {"lr": line}, loader=make_loader(OTHER)), Phase(2, {"lr": decay})]
    phases[2] = Phase(2, {"lr": decay}, accept=accept or [])
    return make_trainer(out, arguments={"phases": phases}, keep_last=None)


def test_a_finished_run_is_extended_by_a_phase_with_a_note(tmp_path: Path) -> None:
    def short(out: Path) -> Trainer:
        phases = [Phase(3, {"lr": line}), Phase(3, {"lr": line}, loader=make_loader(OTHER))]
        return make_trainer(out, arguments={"phases": phases}, keep_last=None)

    list(short(tmp_path / "parts"))
    longer = extended(tmp_path / "parts")
    changes = longer.resume()
    assert changes is not None
    assert not any(change.topic for change in changes)
    assert ("phases", "3 + 3", "3 + 3 + 2") in [(change.name, change.was, change.will_be) for change in changes]
    list(longer)
    list(extended(tmp_path / "whole"))
    assert end(tmp_path / "parts") == end(tmp_path / "whole")

    list(short(tmp_path / "jump"))
    jump = extended(tmp_path / "jump", accept=["schedule"], decay=constant(0.1))
    assert any(change.topic == "schedule" for change in jump.resume() or [])  # its own phase accepts it


def test_a_run_of_one_schedule_is_gone_on_with_as_phases(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=3, schedules={"lr": line}))
    trainer = extended(tmp_path)
    changes = trainer.resume()
    assert changes is not None
    assert not any(change.topic for change in changes)
    assert len(list(trainer)) == 5


def test_before_the_decay_is_a_checkpoint_from_which_the_constant_rate_goes_on(tmp_path: Path) -> None:
    """Warm-up, stable, decay: the stable part is made longer afterwards, without a jump."""

    def wsd(out: Path, stable: int) -> Trainer:
        total = stable + 2
        decay: dict[str, Schedule] = {"lr": warmup_stable_decay(total, warmup_steps=2, decay_steps=2)}
        phases = [Phase(4, {"lr": linear_warmup(2)}), Phase(2, decay)]
        if stable > 4:
            phases.insert(1, Phase(stable - 4, {"lr": linear_warmup(2)}))
        return make_trainer(out, arguments={"phases": phases})

    list(wsd(tmp_path / "short", 4))
    longer = wsd(tmp_path / "long", 7)
    changes = longer.load_state(tmp_path / "short" / "checkpoints" / "step-000004")
    assert not any(change.topic for change in changes)
    assert [step.lr for step in longer] == pytest.approx([0.02] * 4 + [0.01])
    with pytest.raises(CheckpointError, match=r"load_state\('.*step-000004'\)"):
        wsd(tmp_path / "short", 7).resume()


def test_other_data_than_the_phase_had_is_refused(tmp_path: Path) -> None:
    def trainer(second: list[str], steps: int = 3) -> Trainer:
        phases = [Phase(2), Phase(steps, loader=make_loader(second))]
        return make_trainer(tmp_path, arguments={"phases": phases})

    steps_of(first := trainer(OTHER), 3)
    first.save_state()
    with pytest.raises(CheckpointError, match=r"(?s)source_fingerprint.*accept=\['data'\]"):
        trainer(TEXTS[::-1]).resume()
    assert trainer(OTHER).resume() == []


def test_data_of_a_phase_that_is_over_may_be_gone_and_data_still_to_be_read_may_not(tmp_path: Path) -> None:
    def trainer(first: list[str], *, again: bool) -> Trainer:
        a, b = make_loader(first), make_loader(OTHER)
        phases = [Phase(2, loader=a), Phase(2, loader=b), Phase(2, loader=a if again else b)]
        return make_trainer(tmp_path / str(again), arguments={"phases": phases})

    for again in (False, True):
        steps_of(saved := trainer(TEXTS, again=again), 3)
        saved.save_state()
    changes = trainer(["gone"] * 9, again=False).resume()
    assert [(change.name, change.topic) for change in changes or []] == [("phase 1 source_fingerprint", "")]
    with pytest.raises(CheckpointError, match=r"phase 1 source_fingerprint"):
        trainer(["gone"] * 9, again=True).resume()


def test_a_phase_added_with_data_of_its_own_needs_no_more_of_the_old(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=2))
    phases = [Phase(2, loader=make_loader(["gone"] * 9)), Phase(2, loader=make_loader(OTHER))]
    trainer = make_trainer(tmp_path, arguments={"phases": phases})
    assert not any(change.topic for change in trainer.resume() or [])
    assert len(list(trainer)) == 2


def test_a_loader_without_a_position_that_a_later_phase_goes_on_with_is_not_resumed_unseen(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        batches = itertools.cycle(list(itertools.islice(make_loader(), 4)))
        phases = [Phase(1), Phase(2, loader=make_loader(OTHER)), Phase(1)]
        return make_trainer(tmp_path, loader=batches, arguments={"phases": phases})

    steps_of(saved := trainer(), 2)
    saved.save_state()
    with pytest.raises(CheckpointError, match=r"phase 1 loader position +not saved +starts over"):
        trainer().resume()
    assert trainer().resume(accept=["data"]) is not None


def test_the_plan_tells_phases_tokens_rates_and_what_changes_between() -> None:
    text = three(None).plan()
    assert text.splitlines()[0] == "run of 8 steps, 320 tokens"
    for part in (
        "phase 1 (first): steps 0 to 2, 3 steps of 32 tokens",
        "phase 2 (second): steps 3 to 4, 2 steps of 64 tokens",
        "at step 3, from phase 1 (first) to phase 2 (second):",
        "tokens of a step",
    ):
        assert part in text
    rows = [row.split() for row in text.splitlines() if row.split()[:1] == ["lr"]]
    assert rows[0] == ["lr", "0.02", "0.02", "0.0192"]
    assert make_trainer(schedules={"lr": line}).plan().count("phase") == 1
    short = make_trainer(num_steps=9, schedules={"lr": warmup_stable_decay(9, warmup_steps=3, decay_steps=3)}).plan()
    assert [row.split() for row in short.splitlines() if "lr" in row] == [["lr", "0.006667", "0.02", "0.006667"]]
    own = make_trainer(loader=[Batch(*torch.zeros(2, 1, 4).long())]).plan()
    assert own.splitlines()[0] == "run of 4 steps"


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Phase(0), "a phase has steps=0; choose 1 or more"),
    (lambda: Phase(True), "steps=True"),
    (lambda: Phase(1.5), "steps=1.5"),  # type: ignore[arg-type]
    (lambda: Phase(1, batch_tokens=0), "batch_tokens=0"),
    (lambda: Phase(1, constant()), "give a dict by option"),  # type: ignore[arg-type]
    (lambda: Phase(1, loader=3), "a int as loader"),  # type: ignore[arg-type]
    (lambda: Phase(1, accept=["all"]), r"accept=\['all'\] is not known"),
    (lambda: make_trainer(arguments={"phases": []}, num_steps=1), "a list of at least one Phase"),
    (lambda: make_trainer(arguments={"phases": [3]}, num_steps=1), "a list of at least one Phase"),
    (lambda: make_trainer(arguments={"phases": [Phase(1)]}, schedules={}), "either phases or schedules"),
    (
        lambda: make_trainer(arguments={"phases": [Phase(4), Phase(5)]}, num_steps=10),
        r"the phases have 4 \+ 5 = 9 steps and the TrainerConfig num_steps=10",
    ),
    (
        lambda: make_trainer(arguments={"phases": [Phase(1), Phase(1, batch_tokens=40)]}),
        "phase 2: batch_tokens=40 is not a multiple of the loader's batch of 2 x 16 = 32 tokens; choose 32 or 64.",
    ),
    (lambda: make_trainer(arguments={"phases": [Phase(1, {"rate": constant()})]}), "'rate' fits no optimizer group"),
    (
        lambda: make_trainer(arguments={"phases": [Phase(1), Phase(1, loader=make_loader(seq_len=32))]}),
        "rows have seq_len=32, more than the model's max_seq_len=16",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_phases_that_make_no_run_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
