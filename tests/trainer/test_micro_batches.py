"""Rows that are computed at a time: the same step, planned, halved when memory runs out, and repeated on resume."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_runs import everything, make_loader, make_model, make_trainer
from tinygpt import GPT, GPTConfig, Trainer
from tinygpt.checkpoint import load_state
from tinygpt.data import Batch
from tinygpt.errors import ConfigError
from tinygpt.losses import LossSum, next_token_loss
from tinygpt.memory import available_memory
from tinygpt.metrics import read_metrics
from tinygpt.trainer import Phase

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ...")


class Narrow(nn.Module):
    """A feed-forward layer that memory runs out in above so many rows, in the forward or the backward pass."""

    def __init__(self, most: int, error: Exception, *, backward: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)
        self.dropout = nn.Dropout(0.5)  # so that the random state matters
        self.most, self.error, self.backward = most, error, backward
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Apply, and note the rows."""
        if x.is_meta:  # the planner looks
            return self.linear(x)
        self.seen.append(len(x))
        y = self.dropout(self.linear(x))
        if len(x) > self.most:
            if not self.backward or not y.requires_grad:
                raise self.error
            y.register_hook(self._fail)
        return y

    def _fail(self, grad: Tensor) -> Tensor:
        raise self.error


def narrow_model(most: int, error: Exception = GPU, **options: Any) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16)
    return GPT.from_config(config, mlp=lambda config, layer: Narrow(most, error, **options))


def trainer_of(out: Path | None, most: int, rows: Any = "auto", **fields: Any) -> Trainer:
    options = fields.pop("options", {})
    config = {"batch_tokens": 16 * 16, "num_steps": 6, "save_every": 2 if out else None, **fields}
    model = narrow_model(most, **options)
    return make_trainer(out, model=model, loader=make_loader(rows=8), micro_batch_rows=rows, keep_last=None, **config)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)  # dropout draws from it


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 100])
def test_splitting_by_rows_gives_the_step_of_the_whole_batch(rows: int) -> None:
    whole, parts = (
        make_trainer(loader=make_loader(rows=8), micro_batch_rows=given, num_steps=3) for given in (None, rows)
    )
    for a, b in zip(whole, parts, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        assert b.tokens == a.tokens
    assert repr(parts.loader.state_dict()) == repr(whole.loader.state_dict())


def test_micro_batches_have_at_most_so_many_rows() -> None:
    trainer = trainer_of(None, 100, 3, num_steps=1)
    list(trainer)
    assert trainer.model.blocks[0].mlp.seen == [3, 3, 2, 3, 3, 2]


@pytest.mark.parametrize("options", [{"error": GPU}, {"error": CPU}, {"error": GPU, "backward": True}])
def test_when_memory_runs_out_rows_are_halved_and_nothing_is_lost(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    expected = trainer_of(None, 3, 2)  # what an all-knowing user would have set
    losses = [step.loss for step in expected]
    torch.manual_seed(7)
    trainer = trainer_of(tmp_path / "run", 3, options=options)
    with caplog.at_level(logging.WARNING):
        assert [step.loss for step in trainer] == losses
    assert trainer.micro_batch_rows == 2
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert told == [f"step 0: out of memory with {rows} rows at a time; going on with {rows // 2}" for rows in (8, 4)]
    events = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "micro_batch_rows"]
    assert [event["rows"] for event in events] == [8, 4, 2]
    assert "planned" in events[0]["why"]
    for (name, a), b in zip(expected.model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_memory_that_runs_out_later_repeats_the_whole_step() -> None:
    """Its first batch had gone through with more rows."""
    narrow = narrow_model(8)
    mlp: Any = narrow.blocks[0].mlp
    calls = 0

    def tightening(model: nn.Module, batch: Batch) -> LossSum:
        nonlocal calls
        calls += 1
        if calls == 5:  # the planner looked once, so the second batch of the second step
            mlp.most = 4
        return next_token_loss(model, batch)

    def run(rows: Any, loss_fn: Any) -> list[float]:
        model = narrow_model(8) if loss_fn is next_token_loss else narrow
        torch.manual_seed(7)
        trainer = make_trainer(
            model=model,
            loader=make_loader(rows=8),
            micro_batch_rows=rows,
            batch_tokens=16 * 16,
            num_steps=2,
            arguments={"loss_fn": loss_fn},
        )
        first, second = trainer
        return [first.loss, second.loss]

    found = run("auto", tightening)
    assert found[0] == run(8, next_token_loss)[0]
    assert math.isfinite(found[1])
    assert mlp.seen == [8, 8, 8, 8, 4, 4, 4, 4]


def test_memory_that_runs_out_in_a_smaller_last_part_halves_the_rows_and_not_the_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinygpt.trainer._rows._planned", lambda trainer, rows, seq_len: 7)
    failed = []

    def failing(model: nn.Module, batch: Batch) -> LossSum:
        if len(batch.inputs) == 1 and not failed:
            failed.append(True)
            raise GPU
        return next_token_loss(model, batch)

    trainer = make_trainer(
        loader=make_loader(rows=8), micro_batch_rows="auto", num_steps=1, arguments={"loss_fn": failing}
    )
    list(trainer)
    assert failed
    assert trainer.micro_batch_rows == 3


def test_one_row_that_does_not_fit_is_a_clear_error() -> None:
    trainer = trainer_of(None, 0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"step 0: memory runs out with a single row.*activation_checkpointing"):
        list(trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_number_is_kept_to_and_other_errors_pass() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(trainer_of(None, 3, 8))
    with pytest.raises(RuntimeError, match="something else"):
        list(trainer_of(None, 3, options={"error": RuntimeError("something else")}))


def test_a_run_that_stepped_down_resumes_bit_for_bit(tmp_path: Path) -> None:
    list(trainer_of(tmp_path / "whole", 2))
    torch.manual_seed(7)
    for step in trainer_of(tmp_path / "parts", 2):
        if step.index == 3:
            break
    assert load_state(tmp_path / "parts" / "checkpoints" / "step-000004")["settings"]["micro_batch_rows"] == 2
    torch.manual_seed(99)
    resumed = trainer_of(tmp_path / "parts", 8)  # there would be room for all eight now
    assert resumed.resume() == []
    list(resumed)
    assert resumed.micro_batch_rows == 2
    last = "checkpoints/step-000006"
    assert everything(tmp_path / "whole" / last) == everything(tmp_path / "parts" / last)


def test_saved_rows_that_no_longer_fit_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in trainer_of(tmp_path / "run", 8):
        if step.index == 1:
            break
    # 101 MiB of the 100 that libraries take: nothing fits, so the leanest is begun with.
    monkeypatch.setattr("tinygpt.trainer._rows.available_memory", lambda device: 1)
    resumed = trainer_of(tmp_path / "run", 8)
    resumed.resume()
    list(resumed)
    assert resumed.micro_batch_rows == 1


def test_changed_rows_are_told_and_harmless(tmp_path: Path) -> None:
    for step in make_trainer(tmp_path / "run", save_every=2):
        if step.index == 1:
            break
    resumed = make_trainer(tmp_path / "run", micro_batch_rows=1, activation_checkpointing="mlp")
    changes = {change.name: (change.was, change.will_be, change.topic) for change in resumed.resume() or []}
    assert changes == {
        "micro_batch_rows": (None, 1, ""),
        "activation_checkpointing": (None, "mlp", ""),
    }
    list(resumed)


def test_the_record_of_a_run_names_the_rows(tmp_path: Path) -> None:
    list(make_trainer(tmp_path / "run", micro_batch_rows="auto", num_steps=1))
    run = next(r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "run")
    assert run["batch"]["micro_batch_rows"] == 2
    assert run["settings"]["micro_batch_rows"] == "auto"


def test_checkpointing_is_set_on_the_model_or_refused() -> None:
    trainer = make_trainer(activation_checkpointing="block", num_steps=2)
    plain = make_trainer(num_steps=2)
    assert [step.loss for step in trainer] == [step.loss for step in plain]
    assert trainer.model.activation_checkpointing == "block"
    model = nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 257))
    with pytest.raises(ConfigError, match="needs a model with set_activation_checkpointing"):
        make_trainer(model=model, optimizer=lambda m: torch.optim.SGD(m.parameters()), activation_checkpointing="mlp")


def test_a_model_that_cannot_be_planned_begins_with_all_rows(caplog: pytest.LogCaptureFixture) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids)
            assert logits.sum().item() < 1e9
            return logits

    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            model=Reads(), optimizer=lambda m: torch.optim.SGD(m.parameters()), micro_batch_rows="auto", num_steps=1
        )
        list(trainer)
    assert trainer.micro_batch_rows == 2
    assert any("begins with all 2 rows" in record.getMessage() for record in caplog.records)


def test_this_machine_tells_its_memory() -> None:
    assert 2**20 < available_memory("cpu") < 2**50


def test_memory_that_runs_out_in_the_loader_is_no_reason_for_fewer_rows() -> None:
    class Greedy:
        def __init__(self) -> None:
            self.loader, self.read = make_loader(rows=8), 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Batch:
            self.read += 1
            if self.read == 2:
                raise MemoryError("a document is too long")
            return next(self.loader)

    trainer = make_trainer(loader=Greedy(), micro_batch_rows="auto", batch_tokens=16 * 16)
    with pytest.raises(MemoryError, match="a document is too long"):
        list(trainer)
    assert trainer.micro_batch_rows == 8


def phased(out: Path, most: int = 100) -> Trainer:
    """Two phases, of which the second has more rows, of half the length."""
    torch.manual_seed(7)
    phases = [Phase(2), Phase(2, loader=make_loader(rows=16, seq_len=8))]
    return make_trainer(
        out,
        model=narrow_model(most),
        loader=make_loader(rows=4),
        micro_batch_rows="auto",
        keep_last=None,
        arguments={"phases": phases},
    )


@pytest.mark.parametrize("most", [100, 3])
def test_a_phase_with_other_rows_is_planned_anew_also_if_resumed_where_it_begins(tmp_path: Path, most: int) -> None:
    trainer = phased(tmp_path / "whole", most)
    rows = [trainer.micro_batch_rows for _ in trainer]
    assert rows == ([4, 4, 16, 16] if most == 100 else [2, 2, 2, 2])
    events = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if r["event"] == "micro_batch_rows"]
    assert 16 in [event["rows"] for event in events]
    for step in phased(tmp_path / "parts", most):
        if step.index == 1:
            break
    resumed = phased(tmp_path / "parts", most)
    resumed.resume()
    assert resumed.next_step == 2
    list(resumed)
    assert resumed.micro_batch_rows == rows[-1]
    last = "checkpoints/step-000004"
    assert everything(tmp_path / "whole" / last) == everything(tmp_path / "parts" / last)


def test_what_would_help_is_said_where_rows_do_not_change() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(trainer_of(None, 3, 8))
    assert "micro_batch_rows='auto'" in caught.value.__notes__[0]

    class Large(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if not self.param_groups[0]["params"][0].is_meta:
                raise GPU

    GPU.__notes__ = []
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(make_trainer(optimizer=lambda m: Large(m.parameters()), micro_batch_rows="auto"))
    assert "ran out in the optimizer" in caught.value.__notes__[0]
