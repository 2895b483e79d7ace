"""A run that nanochat began goes on here as it would have gone on there.

Of nanochat's state only weights are recorded, so the state is made here: in nanochat's layout, whose groups and order
the recording has, and with steps that give the recorded weights.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat_folder import random_weights, write_folder
from nanochat_names import FIXTURES, PARITY, Recording, read_recording
from tinygpt import GPT, Trainer, TrainerConfig
from tinygpt.data import Batch
from tinygpt.errors import CheckpointError
from tinygpt.interop.nanochat import load_checkpoint, load_optimizer_state
from tinygpt.interop.nanochat._names import rename
from tinygpt.optim import MuonAdamW, Rule, adamw_update, muon_update, nanochat_rules, param_groups


class Nanochat:
    """nanochat's optimizer: numbered parameters, the state of Muon stacked under the first of a group."""

    def __init__(self, weights: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.names = [name for group in groups for name in group["params"]]
        self.groups = [group | {"lr": group["initial_lr"]} for group in groups]
        self.state: dict[int, dict[str, Any]] = {}

    def step(self, grads: dict[str, Tensor], index: int) -> None:
        for group in self.groups:
            group["lr"] = group["initial_lr"] * (index + 1) / 5
            params, gradients = ([tensors[name] for name in group["params"]] for tensors in (self.weights, grads))
            places = [self.names.index(name) for name in group["params"]]
            if group["kind"] == "adamw":
                for place, param in zip(places, params, strict=True):
                    zeros = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                    self.state.setdefault(place, {"step": 0, **zeros})["step"] += 1
                states = [self.state[place] for place in places]
                adamw_update(
                    params,
                    gradients,
                    *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
                    [state["step"] for state in states],
                    **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
                )
                continue
            group["momentum"], group["weight_decay"] = 0.85 + 0.02 * index, 0.1 * (1 - 0.1 * index)
            rows, cols = params[0].shape
            state = self.state.setdefault(
                places[0],
                {
                    "momentum_buffer": torch.zeros(len(params), rows, cols),
                    "second_momentum_buffer": torch.zeros(len(params), *((rows, 1) if rows >= cols else (1, cols))),
                },
            )
            muon_update(
                params,
                gradients,
                state["momentum_buffer"],
                state["second_momentum_buffer"],
                **{key: group[key] for key in ("lr", "momentum", "beta2", "weight_decay")},
                polar_steps=group["ns_steps"],
                row_equilibration=True,
                norm_renormalization=True,
            )

    def state_dict(self) -> dict[str, Any]:
        numbered = [group | {"params": [self.names.index(name) for name in group["params"]]} for group in self.groups]
        return copy.deepcopy({"state": self.state, "param_groups": numbered})

    def shards(self, num_ranks: int) -> list[dict[str, Any]]:
        """What each of several processes would have saved: rows of AdamW's state, matrices of Muon's."""
        shards = [self.state_dict() for _ in range(num_ranks)]
        for place, entry in self.state.items():
            for key, whole in entry.items():
                if key == "step" or (key.startswith("exp") and whole.numel() < 1024):
                    continue
                filled = torch.cat((whole, whole.new_zeros(-len(whole) % num_ranks, *whole.shape[1:])))
                for shard, part in zip(shards, filled.chunk(num_ranks), strict=True):
                    shard["state"][place][key] = part.clone()
        return shards


@pytest.fixture(params=FIXTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recording(name: str) -> Recording:
    return read_recording(name)


@pytest.fixture
def nanochat(name: str, recording: Recording) -> Nanochat:
    """After the first of the five steps."""
    nanochat = Nanochat(load_file(PARITY / f"{name}.weights.safetensors"), recording.facts["param_groups"])
    nanochat.step({key.removeprefix("grad."): value for key, value in recording.expected.items() if "grad." in key}, 0)
    return nanochat


def write(folder: Path, nanochat: Nanochat, recording: Recording, num_ranks: int = 1) -> Path:
    return write_folder(
        folder, nanochat.weights, recording.facts["config"], step=1, optimizers=nanochat.shards(num_ranks)
    )


def new_optimizer(model: GPT, **options: Any) -> MuonAdamW:
    options = {"weight_decay": 0.1, "row_equilibration": True, "norm_renormalization": True} | options
    assert model.config is not None
    return MuonAdamW(param_groups(model, nanochat_rules(model_dim=model.config.dim, **options)))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_state_made_here_is_of_steps_that_nanochat_recorded(nanochat: Nanochat, recording: Recording) -> None:
    for key, weight in nanochat.weights.items():
        assert relative_error(weight, recording.expected[f"after_1.{key}"]) <= 1e-4, key


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_next_step_is_that_of_nanochat(
    nanochat: Nanochat, recording: Recording, num_ranks: int, tmp_path: Path
) -> None:
    model, _, metadata = load_checkpoint(write(tmp_path, nanochat, recording, num_ranks))
    optimizer = new_optimizer(model)
    assert load_optimizer_state(tmp_path, optimizer, metadata.step) == 1
    grads = {key: value * 0.5 + 0.01 for key, value in recording.expected.items() if key.startswith("grad.")}
    nanochat.step({key.removeprefix("grad."): value for key, value in grads.items()}, 1)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * 2 / 5
        if group["kind"] == "muon":
            assert group["momentum"] == 0.85
            assert group["initial_weight_decay"] == 0.1
            group["momentum"], group["weight_decay"] = 0.87, 0.09
    ours = rename({key.removeprefix("grad."): value for key, value in grads.items()})
    for key, parameter in model.named_parameters():
        parameter.grad = ours[key]
    optimizer.step()
    for key, expected in rename(nanochat.weights).items():
        assert relative_error(model.state_dict()[key], expected) <= 1e-6, key


@pytest.mark.parametrize("with_state", [True, False])
def test_the_run_ends_where_nanochat_ended(
    nanochat: Nanochat, recording: Recording, with_state: bool, tmp_path: Path
) -> None:
    model, _, metadata = load_checkpoint(write(tmp_path, nanochat, recording))
    rates = {"unembedding_lr": 0.004, "embedding_lr": 0.2}
    optimizer = new_optimizer(model, **({} if with_state else rates))  # the rates come with the state
    if with_state:
        load_optimizer_state(tmp_path, optimizer)
    batches = [Batch(x, y) for x, y in zip(recording.inputs[1:], recording.targets[1:], strict=True)]
    trainer = Trainer(
        model,
        optimizer,
        batches,
        TrainerConfig(num_steps=5, precision="float32"),
        schedules={
            "lr": lambda step: (step + 1) / 5,
            "muon.momentum": lambda step: 0.85 + 0.02 * step,
            "muon.weight_decay": lambda step: 1 - 0.1 * step,
        },
    )
    trainer.set_progress(metadata.step, metadata.tokens or 0, metadata.elapsed_seconds)
    losses = {step.index: step.loss for step in trainer}
    errors = {k: relative_error(model.state_dict()[k], v) for k, v in recording.named("after_5.").items()}
    if with_state:
        assert losses == pytest.approx(dict(enumerate(recording.facts["losses"][1:], start=1)), rel=1e-4)
        assert max(errors.values()) <= 1e-3, errors
    else:
        assert max(errors.values()) > 1e-2  # what it costs to start the optimizer anew


def test_rates_and_settings_come_from_the_file(nanochat: Nanochat, recording: Recording, tmp_path: Path) -> None:
    model = load_checkpoint(write(tmp_path, nanochat, recording))[0]
    optimizer = new_optimizer(model, matrix_lr=0.5, scalar_lr=7.0, embedding_lr=9.0)
    load_optimizer_state(tmp_path, optimizer)
    found = {group["param_names"][0]: group for group in optimizer.param_groups}
    saved = {group["params"][0]: group for group in nanochat.groups}
    for ours, theirs in (("head.weight", "lm_head.weight"), ("embedding.weight", "transformer.wte.weight")):
        assert found[ours]["initial_weight_decay"] == saved[theirs]["weight_decay"]
        for key in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
            assert found[ours][key] == (tuple(saved[theirs][key]) if key == "betas" else saved[theirs][key])
    assert found["blocks.0.x0_scale"]["initial_lr"] == saved["x0_lambdas"]["initial_lr"]
    muon = next(group for group in optimizer.param_groups if group["kind"] == "muon")
    assert (muon["lr"], muon["beta2"], muon["polar_steps"]) == (0.02 / 5, 0.9, 5)
    assert muon["row_equilibration"] is True


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_moments_in_bfloat16_are_taken_as_they_are(
    kept: str, nanochat: Nanochat, recording: Recording, tmp_path: Path
) -> None:
    place = nanochat.names.index("transformer.wte.weight")
    nanochat.state[place]["exp_avg"] = nanochat.state[place]["exp_avg"].bfloat16()
    model = load_checkpoint(write(tmp_path, nanochat, recording))[0]
    optimizer = new_optimizer(model, table_first_moment=kept)
    load_optimizer_state(tmp_path, optimizer)
    state = optimizer.state_dict()["state"]["embedding.weight"]
    assert state["exp_avg"].dtype == getattr(torch, kept)
    assert torch.equal(state["exp_avg"].float(), nanochat.state[place]["exp_avg"].float())
    assert state["step"] == 1


class Written:
    """A checkpoint of four ranks whose files a test can change."""

    def __init__(self, folder: Path) -> None:
        recording = read_recording("gqa")
        nanochat = Nanochat(load_file(PARITY / "gqa.weights.safetensors"), recording.facts["param_groups"])
        nanochat.step({k.removeprefix("grad."): v for k, v in recording.expected.items() if "grad." in k}, 0)
        self.folder = write(folder, nanochat, recording, num_ranks=4)
        self.model = load_checkpoint(folder)[0]
        self.optimizer = new_optimizer(self.model)
        self.place = nanochat.names.index

    def path(self, rank: int) -> Path:
        return self.folder / f"optim_000001_rank{rank}.pt"

    def edit(self, rank: int, change: Callable[[Any], Any]) -> None:
        state = torch.load(self.path(rank), weights_only=True)
        change(state)
        torch.save(state, self.path(rank))

    def assert_refused(self, message: str) -> None:
        before = copy.deepcopy(self.optimizer.state_dict())
        with pytest.raises(CheckpointError, match=message):
            load_optimizer_state(self.folder, self.optimizer)
        assert self.optimizer.state_dict() == before


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def test_the_files_of_all_ranks_are_needed(written: Written) -> None:
    written.path(3).unlink()
    written.assert_refused("of more processes than the 3 whose files are there")
    written.path(1).unlink()
    written.assert_refused("the state of rank 1 is missing")
    for rank in (0, 2):
        written.path(rank).unlink()
    written.assert_refused(r"holds no file named like optim_N_rankN\.pt")


def test_a_step_that_is_not_there_is_refused(written: Written) -> None:
    with pytest.raises(CheckpointError, match="has no step 2; it has 1"):
        load_optimizer_state(written.folder, written.optimizer, 2)


def test_files_of_different_runs_are_refused(written: Written) -> None:
    place = written.place("lm_head.weight")
    written.edit(1, lambda state: state["state"][place].update(step=9))
    written.assert_refused(r"of different runs: lm_head\.weight was updated \[1, 9\] times")
    written.edit(1, lambda state: state["state"][place].update(step=1))
    scalar = written.place("x0_lambdas")
    written.edit(2, lambda state: state["state"][scalar]["exp_avg"].add_(1))
    written.assert_refused("their exp_avg of x0_lambdas are not the same")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"].clear(), "an optimizer that has made a step"),
        (lambda s: s["param_groups"].pop(), "the saved groups are adamw of 1, .* and this model makes"),
        (lambda s: s["param_groups"][0].update(kind="muon"), "the saved groups are muon of 1"),
        (lambda s: s["param_groups"][0].pop("betas"), "the optimizer state is damaged"),
        (lambda s: s["param_groups"][0].update(betas=3), "betas=3 must be two numbers"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr=-1.0 must be a finite number"),
        (lambda s: s["param_groups"][0].update(params=["x"]), "the optimizer state is damaged"),
        (lambda s: s["state"].pop(0), "the optimizer state is damaged"),
        (lambda s: s["state"][0].update(exp_avg=3), "the optimizer state is damaged"),
        (lambda s: s["state"][0].update(step="x"), "the optimizer state is damaged"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(7, 64)), r"exp_avg of lm_head\.weight is \(7, 64\)"),
    ],
)
def test_states_that_do_not_fit_are_refused(change: Callable[[Any], Any], message: str, written: Written) -> None:
    written.edit(0, change)
    written.assert_refused(message)


def test_files_of_something_else_are_refused(written: Written) -> None:
    torch.save([{"state": {}}, {"state": {}}], written.path(0))
    written.assert_refused("holds two optimizers, as nanochat had before February 2026")
    torch.save({"lm_head.weight": torch.ones(3)}, written.path(0))
    written.assert_refused("does not hold the state of an optimizer")
    written.path(0).write_bytes(b"\x80\x04cposix\nsystem\n.")
    written.assert_refused("is damaged")


def test_the_state_of_another_model_is_refused(written: Written) -> None:
    config = {"sequence_len": 64, "vocab_size": 192, "n_layer": 3, "n_head": 4, "n_kv_head": 4, "n_embd": 64}
    other = load_checkpoint(write_folder(written.folder / "other", random_weights(config, era=3), config))[0]
    written.optimizer = new_optimizer(other)
    written.assert_refused("groups are|must make up")


def test_parameters_that_nanochat_does_not_know_are_refused(written: Written) -> None:
    written.model.blocks[0].register_parameter("bias", torch.nn.Parameter(torch.ones(1)))
    rule = Rule("*.bias", kind="adamw", options={"lr": 0.1})
    written.optimizer = MuonAdamW(param_groups(written.model, [rule, *nanochat_rules(model_dim=64)]))
    written.assert_refused(r"the optimizer trains blocks\.0\.bias")


def test_an_optimizer_grouped_otherwise_is_refused(written: Written) -> None:
    written.optimizer = MuonAdamW.for_model(written.model)
    written.assert_refused("which nanochat trains with other settings; group the parameters by nanochat_rules")
    every = Rule("*", kind="adamw", options={"lr": 0.1})
    written.optimizer = MuonAdamW(param_groups(written.model, [every]))
    written.assert_refused("group the parameters by nanochat_rules")
