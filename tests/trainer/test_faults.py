"""What goes wrong around a run, and must neither spoil it nor pass unseen."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import claim_run_folder, latest_checkpoint, list_checkpoints, load_state, remove_old_checkpoints
from tinygpt.data import Batch, BatchLoader, TextDocuments
from tinygpt.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from tinygpt.layers import GeluMLP
from tinygpt.losses import LossSum, next_token_loss
from tinygpt.metrics import StepMetrics, read_metrics
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import constant
from tinygpt.tokenizer import ByteTokenizer

TEXTS = [f"document {number} " * (number % 7 + 1) for number in range(40)]


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT.from_config(GPTConfig.from_depth(2, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16))


def make_loader() -> BatchLoader:
    return BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=2, seq_len=16, buffer_documents=8)


def make_trainer(out: Path | None = None, **settings: Any) -> Trainer:
    model = settings.pop("model") if "model" in settings else make_model()
    optimizer = settings.pop("optimizer", MuonAdamW.for_model)(model)
    loader = settings.pop("loader", None) or make_loader()
    options = {key: settings.pop(key) for key in ("schedules", "loss_fn") if key in settings}
    config = {"num_steps": 12, **({"out_dir": out, "save_every": 4} if out else {}), **settings}
    return Trainer(model, optimizer, loader, TrainerConfig(**config), **options)


def some_batch(seed: int = 0) -> Batch:
    ids = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1].clone(), ids[:, 1:].clone())


def test_gradients_left_by_a_failed_step_or_by_the_user_do_not_enter_the_next() -> None:
    def fails_once(calls: Iterator[int]) -> Callable[[nn.Module, Batch], LossSum]:
        def loss(model: nn.Module, batch: Batch) -> LossSum:
            if next(calls) == 1:
                raise MemoryError("a micro-batch that did not fit")
            return next_token_loss(model, batch)

        return loss

    batches = [some_batch(seed) for seed in range(4)]
    clean = next(iter(make_trainer(loader=batches[2:], batch_tokens=128)))
    trainer = make_trainer(loader=batches, batch_tokens=128, loss_fn=fails_once(itertools.count()))
    next_token_loss(trainer.model, batches[0]).total.backward()
    with pytest.raises(MemoryError):
        next(iter(trainer))
    step = next(iter(trainer))
    assert (step.loss, step.grad_norm) == (clean.loss, clean.grad_norm)


def test_a_masked_step_equals_the_mean_over_its_targets_computed_by_hand() -> None:
    batch = some_batch()
    batch.targets[1:, 3:] = -1
    model = make_model()
    total, count = next_token_loss(model, batch)
    (total / count).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    clip = norm / 3
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    def sgd(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    trainer = make_trainer(loader=[batch], optimizer=sgd, grad_clip=clip)
    step = next(iter(trainer))
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    for ours, reference in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_randomness_goes_on_where_it_was(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_steps=4)
    list(trainer)
    expected = torch.rand(3)
    torch.manual_seed(99)
    make_trainer(tmp_path).resume()
    assert torch.equal(torch.rand(3), expected)


def test_a_failing_evaluation_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    def fails(trainer: Trainer, step: StepMetrics) -> None:
        if step.index == 3:
            raise MemoryError("an evaluation that did not fit")

    with pytest.raises(MemoryError):
        make_trainer(tmp_path).fit([fails], progress=False)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000004"]


def test_leaving_the_loop_at_a_due_step_saves_it_and_the_loop_can_be_entered_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert [step.index for step in itertools.islice(trainer, 4)] == [0, 1, 2, 3]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000004"]
    assert next(iter(trainer)).index == 4


def test_a_loader_without_a_position_is_not_resumed_unseen(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return make_trainer(tmp_path, loader=itertools.cycle([some_batch(seed) for seed in range(5)]))

    next(itertools.islice(trainer(), 3, None))
    with pytest.raises(CheckpointError, match=r"(?s)loader position +not saved +starts over.*accept=\['data'\]"):
        trainer().resume()
    again = trainer()
    again.resume(accept=["data"])
    assert again.next_step == 4


def test_a_loader_that_ends_says_so() -> None:
    with pytest.raises(DataError, match=r"ended in step 1 with 1 micro-batches of the step to come; .*BatchLoader"):
        list(make_trainer(loader=[some_batch()] * 3, batch_tokens=128))


def test_micro_batches_of_different_shapes_are_refused() -> None:
    batch = some_batch()
    with pytest.raises(DataError, match=r"shapes \(4, 16\) and \(2, 16\)"):
        list(make_trainer(loader=[batch, Batch(*(part[:2] for part in batch))], batch_tokens=128))


def test_a_rate_that_is_not_a_number_stops_before_the_weights_change() -> None:
    trainer = make_trainer(schedules={"lr": lambda step: float("nan")})
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ConfigError, match="the schedule of lr gives nan at step 0"):
        next(iter(trainer))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True))
    with pytest.raises(ConfigError, match=r"the schedule of lr gives -.* at step 0; give 0 or more"):
        next(iter(make_trainer(schedules={"lr": lambda step: -1.0})))
    with pytest.raises(ConfigError, match=r"the schedule 'lr' is 0.5; give a function of the step"):
        make_trainer(schedules={"lr": 0.5})


def test_ruined_weights_are_never_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weights are not finite"):
        trainer.save_state()
    assert not (tmp_path / "checkpoints").exists()


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = make_model()
    with pytest.raises(ConfigError, match="holds parameters that are not this model's"):
        make_trainer(optimizer=lambda model: torch.optim.SGD(other.parameters()))


def test_a_second_trainer_multiplies_what_the_groups_were_made_with() -> None:
    model = make_model()
    optimizer = MuonAdamW.for_model(model, lr=0.02)
    rates = []
    for schedule in (lambda step: 1 - step / 4, constant(1.0)):
        config = TrainerConfig(num_steps=3)
        rates += [step.lr for step in Trainer(model, optimizer, make_loader(), config, schedules={"lr": schedule})]
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.02, 0.02, 0.02])


def test_a_schedule_for_one_kind_wins_over_one_for_all_in_either_order() -> None:
    for schedules in ({"muon.lr": constant(0.5), "lr": constant(1.0)}, {"lr": constant(1.0), "muon.lr": constant(0.5)}):
        assert next(iter(make_trainer(schedules=schedules))).lr == pytest.approx(0.01)


def test_rates_held_as_tensors_are_compared_too(tmp_path: Path) -> None:
    def adamw(lr: float) -> Callable[[nn.Module], torch.optim.AdamW]:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(lr))

    list(make_trainer(tmp_path, num_steps=4, optimizer=adamw(0.001)))
    with pytest.raises(CheckpointError, match=r"(?s)lr \(group 0\) +0\.001 +1 +x 1000"):
        make_trainer(tmp_path, optimizer=adamw(1.0)).resume()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 64}, r"tokens of a step +32 +64"),
        ({"optimizer": lambda m: MuonAdamW.for_model(m, betas=(0.99, 0.95))}, r"betas\[0\] \(adamw .*0\.9 +0\.99"),
        ({"optimizer": lambda m: MuonAdamW.for_model(m, momentum=0.8)}, r"momentum \(muon .*0\.95 +0\.8"),
    ],
)
def test_batch_and_moving_averages_count_as_schedule(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    list(make_trainer(tmp_path, num_steps=4))
    with pytest.raises(CheckpointError, match=rf"(?s){message}.*accept=\['schedule'\]"):
        make_trainer(tmp_path, **change).resume()


def test_differences_are_logged_even_if_nobody_looks_at_what_resume_returns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(make_trainer(tmp_path, num_steps=4, schedules={"lr": lambda step: 1.0}))
    make_trainer(tmp_path, schedules={"lr": lambda step: 1.0}).resume()
    assert "num_steps  4    12" in caplog.text
    assert "schedule" not in caplog.text  # two lambdas cannot be told apart by their addresses


def test_a_load_that_fails_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=4))

    def two_groups(model: nn.Module) -> torch.optim.AdamW:
        parameters = list(model.parameters())
        return torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])

    trainer = make_trainer(tmp_path, optimizer=two_groups)
    before = trainer.loader.state_dict()["cursor"], next(trainer.model.parameters()).clone()
    with pytest.raises(CheckpointError, match="was saved with MuonAdamW, and this run has AdamW"):
        trainer.resume(accept=["schedule"])
    assert trainer.next_step == 0
    assert trainer.loader.state_dict()["cursor"] == before[0]
    assert torch.equal(next(trainer.model.parameters()), before[1])


def test_going_back_to_an_earlier_step_needs_another_folder(tmp_path: Path) -> None:
    list(make_trainer(tmp_path / "a"))
    earlier = tmp_path / "a" / "checkpoints" / "step-000004"
    with pytest.raises(
        CheckpointError, match=r"goes on after step-000004, up to step-000012: to branch .*another out_dir"
    ):
        make_trainer(tmp_path / "a").load_state(earlier)
    branch = make_trainer(tmp_path / "b")
    branch.load_state(earlier)
    list(branch)
    assert [path.name for path in list_checkpoints(tmp_path / "b" / "checkpoints")] == ["step-000008", "step-000012"]
    assert len(list_checkpoints(tmp_path / "a" / "checkpoints")) == 3


def test_a_damaged_newest_checkpoint_is_set_aside_and_never_outlives_a_whole_one(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=8))
    (tmp_path / "checkpoints" / "step-000008" / "state.json").write_text("{}")
    trainer = make_trainer(tmp_path, num_steps=6, keep_last=1)
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint"):
        trainer.resume()
    list(trainer)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-step-000008", "latest", "step-000006"]


def test_checkpoints_of_which_none_is_whole_are_an_error(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=4))
    (tmp_path / "checkpoints" / "step-000004" / "model.safetensors").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="passing over"),
        pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"),
    ):
        make_trainer(tmp_path).resume()


def test_a_flipped_bit_in_a_checkpoint_is_found_by_from_pretrained(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=4))
    folder = tmp_path / "checkpoints" / "step-000004"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        GPT.from_pretrained(folder)


def test_metrics_of_a_run_that_left_no_checkpoint_are_kept(tmp_path: Path) -> None:
    next(iter(make_trainer(tmp_path)))
    next(iter(make_trainer(tmp_path)))
    for name in ("metrics.jsonl", "metrics.old.jsonl"):
        assert [line["event"] for line in read_metrics(tmp_path / name)] == ["run", "step"]


def test_what_an_interrupted_deletion_left_is_removed(tmp_path: Path) -> None:
    list(make_trainer(tmp_path))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".step-000004.deleted").mkdir()
    (checkpoints / ".step-000012.old").mkdir()
    assert latest_checkpoint(checkpoints) == checkpoints / "step-000012"
    remove_old_checkpoints(checkpoints, keep_last=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000012"]
    with pytest.raises(ConfigError, match="keep_last=0 must be at least 1"):
        remove_old_checkpoints(checkpoints, keep_last=0)


def test_an_out_dir_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file' cannot be written"):
        list(make_trainer(tmp_path / "file"))


@pytest.mark.parametrize("kind", ["gpt", "foreign"])
def test_tied_weights_can_be_saved_and_resumed(tmp_path: Path, kind: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(257, 8)
            self.out = nn.Linear(8, 257, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embedding(token_ids))

    def model() -> nn.Module:
        if kind == "foreign":
            return Tied()
        gpt = make_model()
        gpt.head.weight = gpt.embedding.weight
        return gpt

    def adamw(model: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    first = make_trainer(tmp_path, num_steps=4, model=model(), optimizer=adamw)
    list(first)
    again = make_trainer(tmp_path, model=model(), optimizer=adamw)
    again.resume()
    for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_wrapped_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = make_model()
    list(make_trainer(tmp_path, num_steps=4, model=torch.compile(model, backend="eager")))
    folder = tmp_path / "checkpoints" / "step-000004"
    ids = torch.tensor([[256, 1]])
    assert torch.equal(GPT.from_pretrained(folder)(ids), model(ids))
    plain = make_trainer(tmp_path)
    plain.resume()
    assert plain.next_step == 4


def test_a_folder_belongs_to_the_run_that_claimed_it(tmp_path: Path) -> None:
    claim_run_folder(tmp_path / "run", {"recipe": "a", "seed": 1})
    claim_run_folder(tmp_path / "run", {"recipe": "a", "seed": 1})
    with pytest.raises(CheckpointError, match=r"belongs to another run: seed was 1 and is 2\. Choose another folder"):
        claim_run_folder(tmp_path / "run", {"recipe": "a", "seed": 2})
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; a run needs a folder of its own"):
        claim_run_folder(tmp_path / "file", {})


unix = pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are Unix's")


@unix
def test_a_signal_finishes_the_step_saves_and_a_second_one_acts_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    done = []

    def train(out: Path, *signals: int) -> None:
        for step in make_trainer(out):
            done.append(step.index)
            if step.index == 1:
                for number in signals:
                    os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert done == [0, 1]
    assert handlers() == before
    assert load_state(tmp_path / "checkpoints" / "step-000002")["next_step"] == 2
    told = capfd.readouterr().err
    assert "stopping after this step; press Ctrl-C again to stop at once" in told
    assert "the state is saved in" in told
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "second", signal.SIGINT, signal.SIGINT)
    assert handlers() == before


@unix
def test_a_signal_in_a_loop_that_is_left_at_once_still_saves_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in make_trainer(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        break
    assert "the state is saved in" in capfd.readouterr().err
    assert load_state(tmp_path / "checkpoints" / "step-000001")["next_step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_in_a_thread_leaves_signals_alone() -> None:
    losses: list[float] = []
    thread = threading.Thread(target=lambda: losses.extend(step.loss for step in make_trainer(num_steps=2)))
    thread.start()
    thread.join()
    assert len(losses) == 2


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    small = GPT.from_config(GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, vocab_size=200, max_seq_len=16))
    with pytest.raises(ConfigError, match="the tokenizer has 257 ids, more than the model's vocab_size=200"):
        make_trainer(model=small)


def test_surgery_after_making_the_optimizer_is_refused_and_parts_left_out_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model()
    optimizer = MuonAdamW.for_model(model)
    model.blocks[0].mlp = nn.Linear(32, 32)
    with pytest.raises(ConfigError, match="after every part was put into place"):
        Trainer(model, optimizer, make_loader(), TrainerConfig(num_steps=1))
    make_trainer(optimizer=lambda model: torch.optim.SGD(model.head.parameters()))
    assert "are in no optimizer group and stay as they are: embedding.weight" in caplog.text


def test_arguments_in_the_wrong_place_are_named() -> None:
    model, loader, config = make_model(), make_loader(), TrainerConfig(num_steps=1)
    optimizer: Any = MuonAdamW.for_model(model)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((model, loader, optimizer, config), "optimizer is a BatchLoader, not a Optimizer"),
        ((model, optimizer, loader, {"num_steps": 1}), "config is a dict, not a TrainerConfig"),
        ((model, optimizer, 3, config), "loader is a int; give a BatchLoader"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ConfigError, match=message):
            Trainer(*arguments)
    with pytest.raises(ConfigError, match=r"rows have seq_len=32, more than the model's max_seq_len=16"):
        make_trainer(loader=BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=2, seq_len=32))
    with pytest.raises(DataError, match="the loader gave a list; it must give Batch"):
        next(iter(make_trainer(loader=[[1, 2]])))
    with pytest.raises(ConfigError, match=r"loss_fn returned a Tensor; return LossSum\(sum, count\)"):
        next(iter(make_trainer(loss_fn=lambda model, batch: next_token_loss(model, batch).total)))
    with pytest.raises(ConfigError, match=r"name the fields of TrainerConfig, for example num_steps=10"):
        TrainerConfig(10)
    with pytest.raises(ConfigError, match="has no field 'num_step'; did you mean num_steps"):
        TrainerConfig(num_step=10)


def test_resume_needs_an_out_dir_and_takes_one_topic_as_a_string(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        make_trainer().resume()
    list(make_trainer(tmp_path, num_steps=4))
    assert make_trainer(tmp_path).resume(accept="schedule") is not None
    with pytest.raises(CheckpointError, match="is a run; its checkpoints are the folders in"):
        make_trainer(tmp_path / "other").load_state(tmp_path)


def test_a_saved_model_is_no_checkpoint_and_the_error_says_how_its_weights_are_loaded(tmp_path: Path) -> None:
    trainer = make_trainer()
    assert isinstance(trainer.model, GPT)
    trainer.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a saved model, .*load the weights alone with GPT\.from_pretrained"):
        trainer.load_state(tmp_path)


def test_other_parts_of_equal_shape_are_not_resumed_or_loaded_unseen(tmp_path: Path) -> None:
    def model(**parts: Any) -> GPT:
        torch.manual_seed(0)
        return GPT.from_config(make_model().config, **parts)

    def gelu(config: GPTConfig, layer: int) -> nn.Module:
        return GeluMLP(config.dim, 4 * config.dim)

    list(make_trainer(tmp_path, num_steps=4, model=model(mlp=gelu)))
    with pytest.raises(CheckpointError, match=r"(?s)model block 0.*accept=\['model'\]"):
        make_trainer(tmp_path, model=model()).resume()
    folder = tmp_path / "checkpoints" / "step-000004"
    with pytest.raises(CheckpointError, match="needs the same parts to load"):
        GPT.from_pretrained(folder)
    assert isinstance(GPT.from_pretrained(folder, mlp=gelu).blocks[0].mlp, GeluMLP)


def test_one_micro_batch_or_several_of_the_same_step_are_the_same_batch(tmp_path: Path) -> None:
    list(make_trainer(tmp_path, num_steps=4, batch_tokens=64))
    whole = BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=4, seq_len=16, buffer_documents=8)
    changes = make_trainer(tmp_path, loader=whole).resume()
    assert changes is not None
    assert [(change.name, change.topic) for change in changes] == [("loader rows", ""), ("num_steps", "")]


def test_a_prompt_is_given_back_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    trainer = make_trainer(tmp_path)

    def train() -> None:
        for _ in trainer:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert next(iter(trainer)).index == 1
