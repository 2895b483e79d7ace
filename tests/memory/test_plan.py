"""What the planner chooses in which budget, and what it says when nothing fits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError
from tinygpt.losses import next_token_loss
from tinygpt.memory import available_memory, plan_memory, training_memory
from tinygpt.memory._available import _group_memory
from tinygpt.memory._estimate import MeasuredStep

MIB = 2**20


def small() -> tuple[GPT, torch.optim.Optimizer]:
    with torch.device("meta"):
        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=8192, max_seq_len=256))
    return model, torch.optim.SGD(model.parameters())


def choice(budget_bytes: int) -> tuple[int, int | None, str, bool]:
    model, optimizer = small()
    plan = plan_memory(model, optimizer, budget_bytes=budget_bytes, rows=4, seq_len=256)
    assert plan.fits == (plan.memory.total <= budget_bytes)
    return plan.rows, plan.chunk_tokens, plan.activation_checkpointing, plan.fits


def test_what_costs_least_speed_is_given_up_first() -> None:
    found = []
    budget = 4096 * MIB
    while True:
        rows, chunk, checkpointing, fits = choice(budget)
        if not fits:
            break
        found.append((("none", "mlp", "block").index(checkpointing), -rows, -(chunk or 0)))
        model, optimizer = small()
        model.set_activation_checkpointing(checkpointing)
        model.head.chunk_tokens = chunk
        memory = training_memory(model, optimizer, rows=rows, seq_len=256, accumulate=rows < 4)
        assert memory.total <= budget
        budget = memory.total - 1  # the next best
    assert found[0] == (0, -4, -4096)
    assert found == sorted(found)
    assert {mode for mode, _, _ in found} >= {0, 2}
    assert len(found) > 3


def test_settings_that_are_given_stay() -> None:
    model, optimizer = small()
    model.head.chunk_tokens = 100
    assert plan_memory(model, optimizer, budget_bytes=2**40, rows=3, seq_len=64).chunk_tokens == 100
    model.set_activation_checkpointing("mlp")
    plan = plan_memory(model, optimizer, budget_bytes=1, rows=3, seq_len=64, accumulate=True, choose_settings=False)
    assert (plan.rows, plan.activation_checkpointing, plan.fits) == (1, "mlp", False)
    assert model.head.chunk_tokens == 100


def test_the_reason_is_told_when_nothing_fits() -> None:
    model, optimizer = small()
    plan = plan_memory(model, optimizer, budget_bytes=10 * MIB, rows=4, seq_len=256)
    assert str(plan).startswith("nothing fits 10 MiB; the least is 1 row")
    assert "Weights, gradients and optimizer alone take" in plan.why
    fixed = sum(parameter.nbytes for parameter in model.parameters())
    plan = plan_memory(model, optimizer, budget_bytes=2 * fixed + MIB, rows=4, seq_len=256)
    assert not plan.fits
    assert "shorter rows" in plan.why


def test_a_plan_is_a_line_and_json() -> None:
    model, optimizer = small()
    plan = plan_memory(model, optimizer, budget_bytes=2**40, rows=2, seq_len=64)
    assert "2 rows a micro-batch, chunks of 4,096 tokens, nothing recomputed" in str(plan)
    assert plan.why == ""
    facts = json.loads(json.dumps(plan.to_dict()))
    assert facts["memory"]["total"] == plan.memory.total
    assert facts["fits"] is True


def test_any_model_can_be_planned_by_its_rows() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 50))
    optimizer = torch.optim.SGD(model.parameters())
    plan = plan_memory(model, optimizer, budget_bytes=120 * MIB, rows=4096, seq_len=64, loss_fn=next_token_loss)
    assert plan.chunk_tokens is None
    assert plan.activation_checkpointing == "none"
    assert plan.rows < 4096


@pytest.mark.parametrize("budget", [0, -5])
def test_no_budget_is_refused(budget: int) -> None:
    model, optimizer = small()
    with pytest.raises(ConfigError, match=f"budget_bytes={budget} is no memory"):
        plan_memory(model, optimizer, budget_bytes=budget, rows=1, seq_len=8)


def test_the_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    assert _group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 100\n")
    assert _group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _group_memory(tmp_path) == 800
    (tmp_path / "memory.current").write_text("2000\n")
    assert _group_memory(tmp_path) == 0


def test_the_limit_of_the_older_version_counts_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (folder / "memory.usage_in_bytes").write_text("300\n")
    (folder / "memory.stat").write_text("total_inactive_file 50\n")
    assert _group_memory(tmp_path) is None
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    assert _group_memory(tmp_path) == 750


def test_the_tightest_of_the_groups_that_a_process_is_in_counts(tmp_path: Path) -> None:
    def limit(folder: Path, left: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("memory.max", f"{left + 7}"), ("memory.current", "7"), ("memory.stat", "anon 7")):
            (folder / name).write_text(f"{text}\n")

    limit(tmp_path / "slurm" / "job_1" / "step_0", 900)
    limit(tmp_path / "slurm" / "job_1", 500)
    limit(tmp_path / "slurm" / "job_2", 100)  # somebody else's
    assert _group_memory(tmp_path, "0::/slurm/job_1/step_0\n") == 500
    assert _group_memory(tmp_path, "3:cpu,memory:/absent\n0::/\n") is None


def test_a_device_that_does_not_tell_is_refused() -> None:
    with pytest.raises(ConfigError, match="how much memory meta has is not told; give micro_batch_rows as a number"):
        available_memory("meta")


def test_that_nothing_fits_is_found_without_trying_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    memory = MeasuredStep.memory

    def counted(self: MeasuredStep, **options: Any) -> Any:
        measured.append(options["rows"])
        return memory(self, **options)

    monkeypatch.setattr(MeasuredStep, "memory", counted)
    model, optimizer = small()
    plan = plan_memory(model, optimizer, budget_bytes=MIB, rows=64, seq_len=64)
    assert (plan.rows, plan.activation_checkpointing, plan.fits) == (1, "block", False)
    assert measured == 3 * [64, 64, 64, 1]
