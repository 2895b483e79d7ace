"""The loop: sums over micro-batches, refusal of the non-finite, schedules, hooks, output."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import Batch, BatchLoader, TextDocuments
from tinygpt.errors import ConfigError, DataError, NonFiniteError
from tinygpt.losses import LossSum, next_token_loss
from tinygpt.metrics import StepMetrics, read_metrics
from tinygpt.optim import MuonAdamW
from tinygpt.tokenizer import ByteTokenizer
from tinygpt.trainer import every


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT.from_config(GPTConfig.from_depth(2, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16))


def batches(rows: int, *, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (8, 17), generator=generator)
    return [Batch(part[:, :-1].clone(), part[:, 1:].clone()) for part in ids.split(rows)]


def make_trainer(data: Any, model: nn.Module | None = None, **config: Any) -> Trainer:
    model = model or make_model()
    return Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, TrainerConfig(**{"num_steps": 1, **config})
    )


def weights_after(trainer: Trainer) -> dict[str, torch.Tensor]:
    list(trainer)
    return trainer.model.state_dict()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_give_the_step_of_one_big_batch(rows: int) -> None:
    big = make_trainer(batches(8))
    small = make_trainer(batches(rows), batch_tokens=8 * 16)
    for (name, a), b in zip(weights_after(big).items(), weights_after(small).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_masked_targets_count_over_the_whole_step_and_an_empty_micro_batch_is_harmless() -> None:
    masked = batches(2)
    masked[0].targets[:] = -1  # a whole micro-batch
    masked[1].targets[0] = -1
    big = Batch(*(torch.cat(parts) for parts in zip(*masked, strict=True)))
    one, four = make_trainer([big]), make_trainer(masked, batch_tokens=8 * 16)
    losses = [next(iter(trainer)).loss for trainer in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_step_reports_loss_and_norm_of_the_mean_loss() -> None:
    model, batch = make_model(), batches(8)[0]
    total, count = next_token_loss(model, batch)
    (total / count).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    (step,) = make_trainer([batch])
    assert step.loss == pytest.approx(float(total.detach() / count), rel=1e-6)
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert (step.index, step.tokens, step.mfu) == (0, 128, None)
    assert step.tokens_per_second > 0


def test_gradients_beyond_the_clip_are_scaled_to_it() -> None:
    def moved(clip: float | None) -> float:
        before, trainer = make_model(), make_trainer(batches(8), grad_clip=clip)
        list(trainer)
        pairs = zip(before.parameters(), trainer.model.parameters(), strict=True)
        return float(sum((a - b).detach().square().sum() for a, b in pairs) ** 0.5)

    (step,) = make_trainer(batches(8))
    assert moved(None) == pytest.approx(0.1 * step.grad_norm, rel=1e-4)
    assert moved(0.01) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert moved(1e9) == pytest.approx(moved(None), rel=1e-6)


def test_one_batch_can_be_learned_by_heart() -> None:
    model = make_model()
    trainer = Trainer(
        model, MuonAdamW.for_model(model, adamw_lr=1e-2), itertools.repeat(batches(4)[0]), TrainerConfig(num_steps=120)
    )
    assert [step.loss for step in trainer][-1] < 0.1


def test_two_runs_with_one_seed_give_identical_losses() -> None:
    def losses() -> list[float]:
        model = make_model()
        loader = BatchLoader(TextDocuments(["some text " * 30, "other"]), ByteTokenizer(), rows=2, seq_len=16)
        return [s.loss for s in Trainer(model, MuonAdamW.for_model(model), loader, TrainerConfig(num_steps=6))]

    assert losses() == losses()


def poison(number: float) -> Callable[[nn.Module, Batch], LossSum]:
    """A loss that is not finite for rows beginning with token 7."""

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        total, count = next_token_loss(model, batch)
        return LossSum(total * number if (batch.inputs[:, 0] == 7).any() else total, count)

    return loss


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_weights_change_and_names_the_rows(tmp_path: Path, number: float) -> None:
    model = make_model()
    data = [*batches(2), *batches(2, seed=1)]
    for batch in data:
        batch.inputs[:, 0] = 1
    data[6].inputs[1, 0] = 7  # second step, micro-batch 2, row 1
    trainer = Trainer(
        model,
        MuonAdamW.for_model(model),
        data,
        TrainerConfig(num_steps=2, batch_tokens=128, out_dir=str(tmp_path), save_every=1),
        loss_fn=poison(number),
    )
    steps = iter(trainer)
    next(steps)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = trainer.optimizer.state_dict()["state"]["head.weight"]["exp_avg"].clone()
    with pytest.raises(NonFiniteError, match=r"step 1: .*micro-batch 2 rows 1.*not changed.*step-000001"):
        next(steps)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(trainer.optimizer.state_dict()["state"]["head.weight"]["exp_avg"], moments)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_non_finite_gradient_of_a_finite_loss_stops_too() -> None:
    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan")

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        total, count = next_token_loss(model, batch)
        return LossSum(Cliff.apply(total), count)

    model = make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters()), batches(8), TrainerConfig(num_steps=1), loss_fn=loss)
    with pytest.raises(NonFiniteError, match=r"losses are finite, the gradient norm is nan.*none was saved"):
        list(trainer)


def test_a_step_without_any_target_is_refused() -> None:
    batch = batches(8)[0]
    batch.targets[:] = -1
    with pytest.raises(DataError, match="step 0 has no target"):
        list(make_trainer([batch]))


def test_batches_that_do_not_make_up_the_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch of 8 x 16 = 128 tokens; choose 128 or a multiple of it"):
        list(make_trainer(batches(8), batch_tokens=100))


def test_schedules_multiply_rates_and_set_the_rest_for_the_kind_they_name() -> None:
    model = make_model()
    trainer = Trainer(
        model,
        MuonAdamW.for_model(model, lr=0.02, adamw_lr=0.001, weight_decay=0.1),
        itertools.cycle(batches(8)),
        TrainerConfig(num_steps=3),
        schedules={
            "lr": lambda s: 1 / (s + 1),
            "muon.momentum": lambda s: 0.8 + s / 100,
            "muon.weight_decay": lambda s: s,
        },
    )
    seen = [(step.lr, step.momentum, step.weight_decay) for step in trainer]
    expected = [(0.02, 0.8, 0.0), (0.01, 0.81, 0.1), (0.02 / 3, 0.82, 0.2)]
    assert [pytest.approx(rates) for rates in expected] == seen
    adamw = [g for g in trainer.optimizer.param_groups if g["kind"] == "adamw"]
    assert all(group["lr"] == pytest.approx(0.001 / 3) for group in adamw)


def test_a_schedule_that_fits_no_group_is_refused() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"'learning_rate' fits no optimizer group; groups have .*lr"):
        Trainer(
            model,
            torch.optim.SGD(model.parameters()),
            batches(8),
            TrainerConfig(num_steps=1),
            schedules={"learning_rate": lambda step: 1.0},
        )


def test_a_torch_scheduler_beside_the_loop_is_left_alone() -> None:
    model = make_model()
    optimizer = MuonAdamW.for_model(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    rates = []
    for step in Trainer(model, optimizer, itertools.cycle(batches(8)), TrainerConfig(num_steps=3)):
        rates.append(step.lr)
        scheduler.step()
    assert rates == [0.02, 0.01, 0.005]


def test_hooks_run_when_due_and_at_the_end(tmp_path: Path) -> None:
    called: list[int] = []

    def hook(trainer: Trainer, step: StepMetrics) -> None:
        called.append(step.index + 1)
        trainer.record("note", text="hello")

    trainer = make_trainer(itertools.cycle(batches(8)), num_steps=5, out_dir=str(tmp_path))
    last = trainer.fit([every(2, hook)], progress=False, report=False)
    assert last is not None
    assert (called, last.index) == ([2, 4, 5], 4)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "step"] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in records if r["event"] == "note"] == [1, 3, 4]
    assert trainer.fit(progress=False, report=False) is None
    with pytest.raises(ConfigError, match="positive number of steps, got 0"):
        every(0, hook)


def test_a_fit_that_trained_to_the_end_leaves_a_report_unless_told_not_to(tmp_path: Path) -> None:
    make_trainer(itertools.cycle(batches(8)), num_steps=3, out_dir=str(tmp_path / "quiet")).fit(report=False)
    assert not (tmp_path / "quiet" / "report").exists()
    make_trainer(itertools.cycle(batches(8)), num_steps=3, out_dir=str(tmp_path / "run")).fit()
    assert "3 steps, 384 tokens, complete" in (tmp_path / "run" / "report" / "report.md").read_text("utf-8")
    assert "<svg" in (tmp_path / "run" / "report" / "report.html").read_text("utf-8")


def test_a_report_that_cannot_be_written_is_a_warning_after_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report").write_text("a file where the folder would be")
    last = make_trainer(itertools.cycle(batches(8)), num_steps=3, out_dir=str(tmp_path)).fit()
    assert last is not None
    assert last.index == 2
    assert "no report was written" in caplog.text


def test_progress_tells_loss_rate_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(itertools.cycle(batches(8)), num_steps=3).fit()
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss 5." in shown
    assert "tok/s" in shown


def test_an_out_dir_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    list(make_trainer(batches(8), out_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"already holds a run, saved up to step-000001.*resume\(\)"):
        list(make_trainer(batches(8), out_dir=str(tmp_path)))


def test_saving_needs_somewhere_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_every needs an out_dir"):
        make_trainer(batches(8), save_every=2)
    with pytest.raises(ConfigError, match="save_state needs a folder"):
        make_trainer(batches(8)).save_state()


def test_old_checkpoints_go_and_each_new_one_is_announced(tmp_path: Path) -> None:
    model, saved = make_model(), []
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters()),
        itertools.cycle(batches(8)),
        TrainerConfig(num_steps=5, out_dir=str(tmp_path), save_every=1, keep_last=2),
        on_save=lambda folder: saved.append(folder.name),
    )
    list(trainer)
    assert saved == [f"step-00000{n}" for n in range(1, 6)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000004", "step-000005"]


def test_bfloat16_where_it_is_slow_is_done_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="bfloat16 products are slow on this cpu"):
        trainer = make_trainer(batches(8), precision="bfloat16")
    (step,) = trainer
    assert trainer.precision == torch.bfloat16
    assert abs(step.loss - next(iter(make_trainer(batches(8)))).loss) < 0.05
    with pytest.raises(ConfigError, match="needs a model with set_compute_dtype"):
        make_trainer(batches(8), nn.Linear(2, 2), precision="bfloat16")


@pytest.mark.parametrize("chosen", [torch.float32, None])
def test_tables_in_bfloat16_do_not_decide_in_what_the_model_is_computed(chosen: torch.dtype | None) -> None:
    model = make_model().set_compute_dtype(torch.bfloat16, embeddings=True).set_compute_dtype(chosen)
    trainer = make_trainer(batches(8), model)
    seen: list[torch.dtype] = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    list(trainer)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert set(seen) == {trainer.precision} == {torch.float32}


def test_a_model_in_float64_stays_in_float64() -> None:
    model = make_model().double()
    seen: list[torch.dtype] = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].dtype))
    list(make_trainer(batches(8), model))
    assert set(seen) == {torch.float64}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
def test_compiled_blocks_train_like_eager_ones() -> None:
    losses = [
        [s.loss for s in make_trainer(itertools.cycle(batches(8)), num_steps=3, compile=flag)] for flag in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"num_steps": 1, "precision": "fp16"}, "precision='fp16'"),
        ({"num_steps": 1, "grad_clip": -1.0}, "grad_clip=-1.0"),
        ({"num_steps": 1, "epochs": 3}, "no field 'epochs'"),
        ({}, "needs num_steps"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(**fields)
