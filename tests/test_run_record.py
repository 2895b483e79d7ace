"""The record of a run, made by real parts, through the trainer's file and into the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tinygpt
from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, embedded_corpus
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.report import write_report
from tinygpt.run_record import RECORD_VERSION, describe_run
from tinygpt.schedules import warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    model = GPT.from_config(GPTConfig.from_depth(2, head_dim=32, width_per_layer=32, vocab_size=257, max_seq_len=32))
    optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=64)))
    loader = BatchLoader(embedded_corpus(), ByteTokenizer(), rows=2, seq_len=32, overflow="carry")
    config = TrainerConfig(num_steps=4, batch_tokens=128, out_dir=tmp_path / "run")
    schedules = {"lr": warmup_stable_decay(4, warmup_steps=1, decay_fraction=0.5)}
    return Trainer(model, optimizer, loader, config, schedules=schedules)


def record_of(trainer: Trainer) -> dict[str, Any]:
    return describe_run(
        model=trainer.model,
        optimizer=trainer.optimizer,
        loader=trainer.loader,
        settings=trainer.config.model_dump(),
        schedules=trainer.phases[0].schedules,
        precision=trainer.precision,
        version=tinygpt.__version__,
        next_step=trainer.next_step,
        step_tokens=trainer.step_tokens,
    )


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8") if file.exists() else ""


def test_a_machine_that_does_not_name_its_processor_has_a_record(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> str:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.read_text", unreadable)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert record_of(trainer)["environment"]["device_name"] is None


def test_the_record_is_json_and_says_what_the_parts_say(trainer: Trainer) -> None:
    record = record_of(trainer)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    model = trainer.model
    assert isinstance(model, GPT)
    assert model.config is not None
    assert record["record_version"] == RECORD_VERSION
    assert record["model"]["config"] == model.config.model_dump()
    assert record["model"]["parameters"] == model.num_parameters()._asdict()
    assert record["model"]["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert record["model"]["flops_per_token"] == model.flops_per_token(32)
    assert record["model"]["blocks"][0]["layers"] == [0, 1]
    assert record["batch"] == {"tokens": 128, "rows": 2, "seq_len": 32, "micro_batches": 2, "micro_batch_rows": None}
    assert record["settings"]["num_steps"] == 4
    assert "out_dir" not in record["settings"]
    names = [line.partition(":")[2] for line in _cpuinfo().splitlines() if line.startswith("model name")]
    if names:
        assert record["environment"]["device_name"] == " ".join(names[0].split())
    assert record["schedules"]["lr"].startswith("warmup_stable_decay(total_steps=4,")
    assert record["precision"] == "float32"
    assert record["environment"]["torch"] == torch.__version__
    loader: Any = trainer.loader
    assert record["data"]["fingerprint"] == loader.fingerprint()
    assert record["data"]["tokenizer_fingerprint"] == ByteTokenizer().fingerprint()


def test_groups_are_told_as_they_were_made_whatever_a_schedule_did_to_them(trainer: Trainer) -> None:
    before = record_of(trainer)["optimizer"]["groups"]
    trainer.rates.apply(3)
    assert record_of(trainer)["optimizer"]["groups"] == before
    assert sum(group["num_parameters"] for group in before) == sum(p.numel() for p in trainer.model.parameters())
    lead = next(group for group in before if group["kind"] == "muon")
    assert lead["settings"]["lr"] == trainer.optimizer.param_groups[trainer.rates.lead]["initial_lr"]


def test_parts_that_tell_nothing_leave_none() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = describe_run(
        model=model,
        optimizer=optimizer,
        loader=iter([]),
        settings={"limit": float("inf")},
        schedules={"lr": lambda step: 1.0},
        precision=torch.float32,
        version="0",
    )
    json.dumps(record, allow_nan=False)
    assert record["model"]["parameters"] == {"all": 8}
    assert record["model"]["config"] is None
    assert record["optimizer"]["groups"][0]["name"] == "weight"
    assert record["batch"]["tokens"] is None
    assert record["schedules"] == {"lr": "a function"}  # no address, which would differ in every process
    assert record["data"]["fingerprint"] is None
    assert record["settings"] == {"limit": "inf"}


def test_a_run_is_reported_with_its_model_optimizer_and_schedules(trainer: Trainer) -> None:
    list(trainer)
    out_dir = trainer.config.out_dir
    assert out_dir is not None
    events = [line["event"] for line in read_metrics(Path(out_dir) / "metrics.jsonl")]
    assert events == ["run", *["step"] * 4, "save"]
    files = write_report(out_dir, pictures=False)
    assert files.summary["status"] == "complete"
    markdown = files.markdown.read_text("utf-8")
    total = sum(p.numel() for p in trainer.model.parameters())
    assert f"| all | {total:,} | 100.0% |" in markdown
    assert "2 layers, width 64, 2 heads of 32 (2 key/value heads), context 32, vocabulary 257." in markdown
    assert "| tokens of a step | 128 = 2 × 2 × 32 (micro-batches, rows, positions) |" in markdown
    assert "| muon blocks.0.attention.q_proj.weight |" in markdown
    assert "| lr | warmup_stable_decay(total_steps=4," in markdown
    assert "| checkpoints kept | 1, at steps 4 |" in markdown
