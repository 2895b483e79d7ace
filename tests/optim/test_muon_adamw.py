"""MuonAdamW as a torch optimizer: it trains, and it behaves as torch's own optimizers do."""

import copy
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinygpt.compiler import compiler_problem
from tinygpt.errors import ConfigError
from tinygpt.optim import MuonAdamW


def small_model(seed: int = 0) -> nn.Sequential:
    """Two equal matrices and one other, so that there is a stack of two and a stack of one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return x, torch.sin(x @ torch.randn(8, 3, generator=generator))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    x, y = problem()
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def one_kind(model: nn.Module, kind: str, lr: float) -> MuonAdamW:
    """Matrices in a group of this kind, biases with AdamW."""
    pairs = list(model.named_parameters())
    matrices = [pair for pair in pairs if pair[1].ndim == 2]
    biases = [pair for pair in pairs if pair[1].ndim != 2]
    return MuonAdamW([{"params": matrices, "kind": kind, "lr": lr}, {"params": biases, "kind": "adamw", "lr": 1e-2}])


@pytest.mark.parametrize(("kind", "lr"), [("muon", 0.02), ("adamw", 1e-2)])
def test_an_mlp_is_trained_by_both_kinds(kind: str, lr: float) -> None:
    model = small_model()
    start = train(model, one_kind(model, kind, lr), 1)
    assert train(model, one_kind(model, kind, lr), 80) < 0.4 * start


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_least_squares_is_solved_when_the_rate_decays(kind: str) -> None:
    target = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(6, 6))
    optimizer = MuonAdamW([{"params": [("weight", weight)], "kind": kind, "lr": 0.1}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 200))
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert (weight - target).norm() < 0.02 * target.norm()


def test_torch_schedulers_multiply_the_initial_rates() -> None:
    model = small_model()
    optimizer = one_kind(model, "muon", 0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.02 / (step + 1), 1e-2 / (step + 1)]
        )
        train(model, optimizer, 1)
        scheduler.step()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.02, 1e-2]


def test_groups_remember_their_initial_weight_decay() -> None:
    optimizer = MuonAdamW.for_model(small_model(), weight_decay=0.25)
    assert [group["initial_weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]


def test_one_stack_at_a_time_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked, single = small_model(), small_model()
    train(stacked, one_kind(stacked, "muon", 0.02), 3)
    monkeypatch.setattr("tinygpt.optim._muon_adamw._STACK_ELEMENTS_ON_CPU", 1)
    train(single, one_kind(single, "muon", 0.02), 3)
    for one, other in zip(stacked.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_parameter_without_gradient_is_left_alone(kind: str) -> None:
    """Its neighbours in the stack step as if it were not there."""
    model, reference = small_model(), small_model()
    optimizer = one_kind(model, kind, 0.02)
    train(model, optimizer, 2)
    train(reference, one_kind(reference, kind, 0.02), 2)
    x, y = problem()
    nn.functional.mse_loss(model(x), y).backward()
    frozen = model[0].weight
    frozen.grad = None
    before, state = frozen.detach().clone(), copy.deepcopy(optimizer.state[frozen])
    moved = model[2].weight.detach().clone()
    optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(model[2].weight, moved)
    after = optimizer.state[frozen]
    assert after.keys() == state.keys()
    assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)) for key, value in state.items())
    assert optimizer.state[model[2].weight]["step"] == 3
    assert optimizer.state[frozen]["step"] == 2

    neighbour = dict(reference.named_parameters())["2.weight"]
    neighbour.grad = model[2].weight.grad
    lonely = MuonAdamW([{"params": [("2.weight", neighbour)], "kind": kind, "lr": 0.02}])
    lonely.load_state_dict(
        {
            "version": 1,
            "state": {"2.weight": _state_after_two_steps(kind)},
            "param_groups": [{"params": ["2.weight"], "kind": kind, "lr": 0.02}],
        }
    )
    lonely.step()
    torch.testing.assert_close(neighbour, model[2].weight)


def _state_after_two_steps(kind: str) -> dict[str, Any]:
    model = small_model()
    optimizer = one_kind(model, kind, 0.02)
    train(model, optimizer, 2)
    return optimizer.state_dict()["state"]["2.weight"]


def test_a_step_without_any_gradient_changes_nothing() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    MuonAdamW.for_model(model).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_closure_computes_the_loss() -> None:
    model = small_model()
    optimizer = MuonAdamW.for_model(model)
    x, y = problem()

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > optimizer.step(closure)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_deep_copy_trains_on_alike_and_apart(steps: int) -> None:
    model = small_model()
    optimizer = one_kind(model, "muon", 0.02)
    train(model, optimizer, steps)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(model_copy, optimizer_copy, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), model_copy.parameters(), strict=True))
    frozen = [parameter.detach().clone() for parameter in model_copy.parameters()]
    train(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(frozen, model_copy.parameters(), strict=True))


def test_a_group_added_later_is_trained() -> None:
    model = small_model()
    pairs = list(model.named_parameters())
    optimizer = MuonAdamW([{"params": pairs[:1], "kind": "muon", "lr": 0.02}])
    train(model, optimizer, 1)
    last = model[4].weight.detach().clone()
    optimizer.add_param_group({"params": pairs[4:5], "kind": "muon", "lr": 0.02})
    train(model, optimizer, 1)
    assert not torch.equal(model[4].weight, last)
    assert optimizer.param_groups[1]["initial_lr"] == 0.02


def test_bfloat16_models_train_with_float32_state() -> None:
    model = small_model().bfloat16()
    optimizer = one_kind(model, "muon", 0.02)
    x, y = (tensor.bfloat16() for tensor in problem())
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    states = list(optimizer.state.values())
    dtypes = {value.dtype for state in states for value in state.values() if isinstance(value, Tensor)}
    assert dtypes == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or shutil.which("g++") is None, reason="torch.compile needs a compiler")
# torch.compile itself uses deprecated parts of torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_gives_the_same_weights_and_compiles_once() -> None:
    assert compiler_problem("cpu") is None  # asked here, since it compiles something itself
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = small_model(), small_model()
    optimizers = one_kind(eager, "muon", 0.02), one_kind(compiled, "muon", 0.02)
    optimizers[1].compile = True
    for step in range(4):
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] / (step + 1)
            train(model, optimizer, 1)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    # Two shapes of stacks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def pairs_of(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def group_of(kind: str = "muon", **changes: Any) -> dict[str, Any]:
    return {"params": pairs_of(weight=(2, 2)), "kind": kind, "lr": 0.1} | changes


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: MuonAdamW([]), "needs a list of groups"),
    (lambda: MuonAdamW(small_model().named_parameters()), r"MuonAdamW\.for_model\(model\)"),
    (lambda: MuonAdamW([group_of(kind="sgd")]), "kind='sgd'; choose 'muon' or 'adamw'"),
    (lambda: MuonAdamW([group_of(params=small_model().parameters())]), "model.named_parameters"),
    (lambda: MuonAdamW([group_of(params=[])]), "has no parameters"),
    (lambda: MuonAdamW([{"params": pairs_of(a=(2, 2)), "kind": "muon"}]), "starts with 'a' needs lr"),
    (lambda: MuonAdamW([group_of(betas=(0.9, 0.9))]), "kind 'muon' has no option betas; it has lr, momentum"),
    (lambda: MuonAdamW([group_of(lr=-1.0)]), "lr=-1.0 must be a finite number that is not negative"),
    (lambda: MuonAdamW([group_of(lr=float("nan"))]), "lr=nan must be"),
    (lambda: MuonAdamW([group_of(weight_decay=True)]), "weight_decay=True must be"),
    (lambda: MuonAdamW([group_of(momentum=1.0)]), "momentum=1.0 must be at least 0 and below 1"),
    (lambda: MuonAdamW([group_of(polar_steps=9)]), "polar_steps=9 is not possible; choose 1 to 5"),
    (lambda: MuonAdamW([group_of(polar_dtype="fp8")]), "polar_dtype='fp8' is not known; choose 'auto', 'float32'"),
    (lambda: MuonAdamW([group_of("adamw", betas=(0.9, 1.5))]), r"betas=\(0\.9, 1\.5\) must be at least 0"),
    (lambda: MuonAdamW([group_of("adamw", betas=0.9)]), "betas=0.9 must be two numbers"),
    (lambda: MuonAdamW([group_of(params=pairs_of(bias=(3,), conv=(2, 2, 1)))]), r"bias \(3,\), conv \(2, 2, 1\)"),
    (lambda: MuonAdamW([group_of(), group_of()]), "the name 'weight' is given twice"),
    (
        lambda: MuonAdamW([group_of(params=[("a", p := nn.Parameter(torch.zeros(2, 2))), ("b", p)])]),
        "'b' is the same parameter as 'a'",
    ),
    (
        lambda: MuonAdamW([group_of(params=[("z", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))])]),
        "floating-point parameters can be trained, not z",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_an_unusable_group_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = MuonAdamW.for_model(embedding)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match=r"sparse gradients: weight\. Build with sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("name", ["lm_head", "decoder", "to_logits", "generator", "fc_out", "proj"])
def test_the_only_layer_with_an_output_for_each_entry_is_a_head_whatever_its_name(name: str) -> None:
    model = nn.Module()
    model.table = nn.Embedding(100, 16)
    model.inner = nn.Linear(16, 16, bias=False)
    model.pos = nn.Parameter(torch.zeros(12, 16))
    setattr(model, name, nn.Linear(16, 100, bias=False))
    groups = {group["kind"]: group["param_names"] for group in MuonAdamW.for_model(model).param_groups}
    assert groups["muon"] == ["inner.weight"]
    assert set(groups["adamw"]) == {"table.weight", "pos", f"{name}.weight"}


def test_layers_as_wide_as_the_vocabulary_by_chance_are_matrices() -> None:
    model = nn.Module()
    model.table = nn.Embedding(64, 16)
    model.up = nn.ModuleList(nn.Linear(16, 64, bias=False) for _ in range(2))
    groups = {group["kind"]: group["param_names"] for group in MuonAdamW.for_model(model).param_groups}
    assert groups["muon"] == ["up.0.weight", "up.1.weight"]


def test_a_compiled_model_has_the_names_of_the_plain_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    names = [g["param_names"] for g in MuonAdamW.for_model(torch.compile(model, backend="eager")).param_groups]
    assert names == [g["param_names"] for g in MuonAdamW.for_model(model).param_groups]


def test_polar_dtype_sets_the_precision_of_the_products() -> None:
    ends = {}
    for dtype in ("auto", "float32", "bfloat16"):
        weight = torch.nn.Parameter(torch.eye(24, 40))
        weight.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
        MuonAdamW([{"params": [("w", weight)], "kind": "muon", "lr": 0.1, "polar_dtype": dtype}]).step()
        ends[dtype] = weight.detach()
    assert torch.equal(ends["auto"], ends["float32"])  # on a CPU, where bfloat16 is slow on most
    assert not torch.equal(ends["bfloat16"], ends["float32"])
    torch.testing.assert_close(ends["bfloat16"], ends["float32"], rtol=0, atol=3e-3)
