"""The saved state: exact, by name, and refused when it does not fit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinygpt.errors import CheckpointError
from tinygpt.optim import MuonAdamW


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.down = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).float()
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.down(x)


def train(model: Model, optimizer: MuonAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(16, (12,), generator=generator)
        optimizer.zero_grad()
        (model(ids) - ids[:, None] / 16).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] / (step + 1)
        optimizer.step()


def through_files(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Tensors by safetensors, the rest by JSON, as a checkpoint does it."""
    tensors, rest = {}, copy.copy(state)
    rest["state"] = {name: {"step": entry["step"]} for name, entry in state["state"].items()}
    for name, entry in state["state"].items():
        tensors.update({f"{name}/{key}": value for key, value in entry.items() if key != "step"})
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(rest))

    loaded = json.loads((folder / "state.json").read_text())
    for full_name, tensor in load_file(folder / "optimizer.safetensors").items():
        name, _, key = full_name.rpartition("/")
        loaded["state"][name][key] = tensor
    return loaded


def cloned(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    return copy.deepcopy(state)


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for name, entry in one["state"].items():
        assert entry.keys() == other["state"][name].keys(), name
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][name][key])), (name, key)


@pytest.mark.parametrize("carry", [cloned, through_files])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(
    carry: Callable[[dict[str, Any], Path], dict[str, Any]], dtype: torch.dtype, steps: int, tmp_path: Path
) -> None:
    straight = Model(dtype)
    straight_optimizer = MuonAdamW.for_model(straight)
    train(straight, straight_optimizer, 0, steps + 4)

    first = Model(dtype)
    first_optimizer = MuonAdamW.for_model(first)
    train(first, first_optimizer, 0, steps)
    weights, state = copy.deepcopy(first.state_dict()), carry(first_optimizer.state_dict(), tmp_path)

    second = Model(dtype)
    second.load_state_dict(weights)
    second_optimizer = MuonAdamW.for_model(second, lr=0.5, betas=(0.1, 0.1))
    second_optimizer.load_state_dict(state)
    train(second, second_optimizer, steps, steps + 4)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    expected, given = straight_optimizer.state_dict(), second_optimizer.state_dict()
    assert given["param_groups"] == expected["param_groups"]
    assert_same_state(given, expected)


def trained_state(**options: Any) -> dict[str, Any]:
    model = Model()
    optimizer = MuonAdamW.for_model(model, **options)
    train(model, optimizer, 0, 2)
    return copy.deepcopy(optimizer.state_dict())


def test_state_is_named_and_independent_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = trained_state()
    assert stacked["version"] == 1
    assert stacked["state"].keys() == dict(Model().named_parameters()).keys()
    assert stacked["state"]["layers.1.weight"].keys() == {"step", "momentum", "second_moment"}
    assert stacked["state"]["embedding.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    monkeypatch.setattr("tinygpt.optim._muon_adamw._STACK_ELEMENTS_ON_CPU", 1)
    for name, entry in trained_state()["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(value, stacked["state"][name][key])


def test_the_order_of_groups_and_parameters_does_not_matter() -> None:
    state, model = trained_state(), Model()
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        | {"params": list(zip(group["param_names"], group["params"], strict=True))[::-1]}
        for group in MuonAdamW.for_model(model).param_groups[::-1]
    ]
    optimizer = MuonAdamW(groups)
    optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), state)
    assert [group["kind"] for group in optimizer.param_groups] == ["adamw", "muon"]


def test_a_loaded_state_is_a_copy() -> None:
    state, model = trained_state(), Model()
    before = copy.deepcopy(state)
    optimizer = MuonAdamW.for_model(model)
    optimizer.load_state_dict(state)
    train(model, optimizer, 2, 4)
    assert_same_state(state, before)


def test_a_state_can_be_loaded_in_the_middle_of_training() -> None:
    model = Model()
    optimizer = MuonAdamW.for_model(model)
    train(model, optimizer, 0, 2)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, 4)
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, 2, 4)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())


def _swap_kinds(state: dict[str, Any]) -> None:
    first, second = state["param_groups"]
    first["kind"], second["kind"] = second["kind"], first["kind"]


def _regroup(state: dict[str, Any]) -> None:
    first, second = state["param_groups"]
    second["params"].append(first["params"].pop())


def _set(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["state"][name].__setitem__(key, value)


DAMAGED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda state: state.update(version=2), "version 2, this tinygpt reads version 1: update tinygpt"),
    (lambda state: state.pop("version"), "version None, .* another optimizer"),
    (lambda state: state.pop("state"), "has no state; it is damaged"),
    (lambda state: state["state"].pop("down.weight"), r"missing from the state: down\.weight\."),
    (lambda state: state["state"].update(extra={"step": 0}), r"unknown to the optimizer: extra\."),
    (lambda state: state["param_groups"][1]["params"].append("extra"), r"unknown to the optimizer: extra\."),
    (_swap_kinds, r"kind 'adamw', the optimizer's of kind 'muon': down\.weight, layers\.0\.weight"),
    (_regroup, r"none holds exactly down\.weight, layers\.0\.weight"),
    (_set("down.weight", "momentum", torch.zeros(3, 3)), r"'momentum' of 'down\.weight' is .*\(3, 3\), .* \(4, 8\)"),
    (_set("down.bias", "exp_avg", torch.zeros(4).double()), "is torch.float64 .* must be torch.float32"),
    (_set("down.bias", "step", -1), r"'down\.bias' has step=-1"),
    (_set("down.bias", "step", 1.5), r"'down\.bias' has step=1\.5"),
    (_set("down.bias", "step", 0), r"'down\.bias' at step 0 holds \['exp_avg', 'exp_avg_sq'\], it must hold \[\]"),
    (lambda state: state["state"]["down.bias"].pop("exp_avg"), r"holds \['exp_avg_sq'\], it must hold \['exp_avg', "),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=[message[:30] for _, message in DAMAGED])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(
    damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    state = trained_state()
    model = Model()
    optimizer = MuonAdamW.for_model(model)
    train(model, optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict())
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert_same_state(after, before)


def test_a_state_of_torch_is_refused() -> None:
    model = Model()
    with pytest.raises(CheckpointError, match="the state of another optimizer"):
        MuonAdamW.for_model(model).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["param_groups"][0].pop("kind"),
        lambda state: state["param_groups"][0].update(lr="abc"),
        lambda state: state["param_groups"][0].update(lr=float("nan")),
        lambda state: state["param_groups"][0].update(foo=1),
        lambda state: state.update(param_groups=None),
        lambda state: state.update(state=[1]),
    ],
)
def test_a_damaged_state_is_refused_whatever_was_damaged(damage: Callable[[dict[str, Any]], Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = MuonAdamW([{"params": [("w", parameter)], "kind": "muon", "lr": 0.1}])
    state = optimizer.state_dict()
    damage(state)
    with pytest.raises(CheckpointError, match="optimizer state"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
