"""What tables of embeddings may have instead: smaller moments, and rounding to bfloat16 by chance."""

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tinygpt import GPT, GPTConfig
from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.memory import training_memory
from tinygpt.optim import MuonAdamW, adamw_update, nanochat_rules, param_groups
from tinygpt.optim._rounding import round_stochastically

HYPER = {"lr": 3e-3, "betas": (0.8, 0.995), "eps": 1e-10, "weight_decay": 0.1}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table_optimizer(table: nn.Parameter, **options: Any) -> MuonAdamW:
    return MuonAdamW([{"params": [("table", table)], "kind": "adamw", "lr": 0.01, **options}])


def train(table: nn.Parameter, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        table.grad = randn(*table.shape, seed=step).to(table.dtype)
        optimizer.step()


def naive_rows(start: Tensor, grads: list[Tensor]) -> Tensor:
    """AdamW in Python's floats, with one second moment for the mean square of each row."""
    beta1, beta2, lr, rows = 0.8, 0.995, 3e-3, start.double().tolist()
    means = [[0.0] * len(row) for row in rows]
    squares = [0.0] * len(rows)
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(grad.double().tolist()):
            squares[i] = beta2 * squares[i] + (1 - beta2) * sum(x * x for x in g) / len(g)
            size = math.sqrt(squares[i] / (1 - beta2**t)) + 1e-10
            for j, x in enumerate(g):
                means[i][j] = beta1 * means[i][j] + (1 - beta1) * x
                rows[i][j] = rows[i][j] * (1 - lr * 0.1) - lr * means[i][j] / (1 - beta1**t) / size
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_moment_a_row_equals_the_naive_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinygpt.optim._updates._SLICE_ELEMENTS", 12)  # two rows at a time
    sizes = torch.logspace(0, -3, 7).unsqueeze(1)
    start, grads = randn(7, 6).to(dtype), [(randn(7, 6, seed=step) * sizes).to(dtype) for step in range(1, 5)]
    table, exp_avg, exp_avg_sq = start.clone(), torch.zeros(7, 6), torch.zeros(7, 1)
    number = 4 if dtype == torch.float32 else 1  # a bfloat16 table is rounded after each step
    for step, grad in enumerate(grads[:number], start=1):
        adamw_update([table], [grad], [exp_avg], [exp_avg_sq], [step], **HYPER)
    expected = naive_rows(start, grads[:number])
    if dtype == torch.float32:
        torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(table, expected.to(dtype))


def test_rows_of_even_gradients_are_updated_as_without_rows() -> None:
    """Where all gradients of a row have one size, a second moment a row is that of each of its numbers."""
    grad = randn(5, 1).expand(5, 8) * randn(5, 8, seed=1).sign()
    ends = {}
    for second_moment in ("element", "row"):
        table = nn.Parameter(randn(5, 8, seed=2))
        optimizer = table_optimizer(table, second_moment=second_moment)
        for _ in range(3):
            table.grad = grad.clone()
            optimizer.step()
        ends[second_moment] = table.detach()
    torch.testing.assert_close(ends["row"], ends["element"])


def test_rows_nearly_halve_the_state_of_the_tables_and_the_estimate_says_so() -> None:
    config = GPTConfig.from_depth(2, head_dim=32, vocab_size=512, max_seq_len=32)
    sizes, estimates = {}, {}
    kinds: tuple[Literal["element", "row"], ...] = ("element", "row")
    for second_moment in kinds:
        torch.manual_seed(0)
        model = GPT.from_config(config)
        rules = nanochat_rules(model_dim=config.dim, table_second_moment=second_moment)
        optimizer = MuonAdamW(param_groups(model, rules))
        estimates[second_moment] = training_memory(model, optimizer, rows=1, seq_len=32).optimizer
        ids = torch.randint(512, (2, 32))
        model.loss(ids, ids)[0].backward()
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        sizes[second_moment] = sum(tensor.nbytes for tensor in tensors)
        tables = [p for name, p in model.named_parameters() if "embedding" in name]
    assert sizes["element"] - sizes["row"] == sum(4 * (p.numel() - len(p)) for p in tables)
    assert estimates["element"] - estimates["row"] == sizes["element"] - sizes["row"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_moment_in_bfloat16_is_rounded_once_a_step_and_computed_with_in_float32(dtype: torch.dtype) -> None:
    table, expected = randn(7, 6).to(dtype), randn(7, 6).to(dtype)
    exp_avg, rounded = torch.zeros(7, 6, dtype=torch.bfloat16), torch.zeros(7, 6)
    exp_avg_sq, squares = torch.zeros(7, 6), torch.zeros(7, 6)
    for step in range(1, 6):
        grad = randn(7, 6, seed=step).to(dtype)
        adamw_update([table], [grad], [exp_avg], [exp_avg_sq], [step], **HYPER)
        adamw_update([expected], [grad], [rounded], [squares], [step], **HYPER)
        rounded = rounded.bfloat16().float()
        torch.testing.assert_close(table, expected, rtol=1e-6 if dtype == torch.float32 else 0.0, atol=1e-7)
    torch.testing.assert_close(exp_avg.float(), rounded)


def test_small_moments_leave_a_quarter_of_a_tables_state() -> None:
    table = nn.Parameter(randn(512, 256).bfloat16())
    sizes = []
    for options in ({}, {"first_moment": "bfloat16", "second_moment": "row"}):
        optimizer = table_optimizer(table, **options)
        train(table, optimizer, range(1))
        sizes.append(sum(value.nbytes for value in optimizer.state[table].values() if isinstance(value, Tensor)))
    assert sizes == [8 * 512 * 256, 2 * 512 * 256 + 4 * 512]


@pytest.mark.parametrize(
    "options", [{"first_moment": "bfloat16"}, {"second_moment": "row"}, {"stochastic_rounding": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_table_goes_on_to_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    whole = nn.Parameter(randn(9, 6).to(dtype))
    train(whole, table_optimizer(whole, **options), range(6))

    first = nn.Parameter(randn(9, 6).to(dtype))
    optimizer = table_optimizer(first, **options)
    train(first, optimizer, range(3))
    torch.rand(5)  # neither draws from torch's own generator
    second = nn.Parameter(first.detach().clone())
    resumed = table_optimizer(second, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, range(3, 6))
    assert torch.equal(second, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moment": "row"}, "second_moment='row', the optimizer's has 'element': table"),
        ({"first_moment": "bfloat16"}, "first_moment='bfloat16', the optimizer's has 'float32': table"),
    ],
)
def test_a_state_of_other_moments_is_refused(options: dict[str, Any], message: str) -> None:
    table = nn.Parameter(randn(4, 4))
    small, plain = table_optimizer(table, **options), table_optimizer(table)
    train(table, small, range(1))
    with pytest.raises(CheckpointError, match=message):
        plain.load_state_dict(small.state_dict())


def test_a_state_from_before_there_were_these_options_loads() -> None:
    table = nn.Parameter(randn(4, 4))
    optimizer = table_optimizer(table)
    train(table, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["first_moment"], group["second_moment"], group["stochastic_rounding"]
    other = table_optimizer(table)
    other.load_state_dict(state)
    assert torch.equal(other.state[table]["exp_avg_sq"], optimizer.state[table]["exp_avg_sq"])


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    values = torch.cat((randn(50), randn(50, seed=1) * 1e-30, torch.tensor([1.0, -2.0, 0.0])))
    below = (values.view(torch.int32) & -(2**16)).view(torch.float32)  # towards zero
    above = ((below.view(torch.int32)) + 2**16).view(torch.float32)
    draws = 4_000
    generator = torch.Generator().manual_seed(0)
    results = round_stochastically(values.repeat(draws, 1), generator)
    assert bool(((results == below) | (results == above)).all())
    assert torch.equal(results.bfloat16().float(), results)
    exact = below == values
    assert torch.equal(results[:, exact], values[exact].repeat(draws, 1))
    share = ((values - below).double() / (above - below).double())[~exact]
    found = (results[:, ~exact] == above[~exact]).double().mean(dim=0)
    deviations = (found - share) / (share * (1 - share) / draws).sqrt().clamp_min(1e-3)
    assert deviations.abs().max() < 4.5
    assert abs(deviations.mean()) < 4 / len(deviations) ** 0.5


def test_rounding_leaves_what_is_not_finite_and_what_is_largest() -> None:
    nan_of_a_gpu = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    values = torch.cat((nan_of_a_gpu, torch.tensor([float("inf"), -float("inf"), float("nan"), largest, -largest])))
    for seed in range(20):
        result = round_stochastically(values, torch.Generator().manual_seed(seed))
        assert torch.equal(result.isnan(), values.isnan())
        assert torch.equal(result[~values.isnan()], values[~values.isnan()])


def test_small_changes_add_up_only_with_stochastic_rounding() -> None:
    """300 steps of a thousandth each way down from 1: nearest rounding loses all of them."""
    ends = {}
    for stochastic in (False, True):
        table = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = MuonAdamW(
            [{"params": [("t", table)], "kind": "adamw", "lr": 1e-3, "stochastic_rounding": stochastic}]
        )
        for _ in range(300):
            table.grad = torch.ones_like(table)
            optimizer.step()
        ends[stochastic] = table.detach().float().mean().item()
    assert ends[False] == 1.0
    assert ends[True] == pytest.approx(0.7, abs=0.003)


def test_noise_differs_between_steps_and_parameters_and_not_between_runs() -> None:
    def changes(name: str) -> list[Tensor]:
        table = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
        optimizer = MuonAdamW([{"params": [(name, table)], "kind": "adamw", "lr": 1e-3, "stochastic_rounding": True}])
        kept = []
        for _ in range(2):
            before = table.detach().clone()
            table.grad = torch.ones_like(table)
            optimizer.step()
            kept.append(table.detach() != before)
        return kept

    first, second = changes("a")
    assert not torch.equal(first, second)
    assert not torch.equal(first, changes("b")[0])
    assert torch.equal(first, changes("a")[0])


def test_stochastic_rounding_changes_nothing_that_is_stored_in_float32() -> None:
    ends = []
    for stochastic in (False, True):
        table = nn.Parameter(randn(8, 8))
        train(table, table_optimizer(table, stochastic_rounding=stochastic), range(3))
        ends.append(table.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("parameter", "options", "message"),
    [
        (torch.zeros(3), {"second_moment": "row"}, r"for tables, which have two axes, not for table \(3,\)"),
        (torch.zeros(3, 3), {"second_moment": "column"}, "second_moment='column' is not known; choose 'element' or"),
        (torch.zeros(3, 3), {"first_moment": "row"}, "first_moment='row' is not known; choose 'float32' or 'bfloat16'"),
        (torch.zeros(3, 3), {"stochastic_rounding": 1}, "stochastic_rounding=1 must be True or False"),
        (torch.zeros(3).half(), {"stochastic_rounding": True}, "is for bfloat16; table is stored in float16"),
    ],
)
def test_what_cannot_be_meant_is_refused(parameter: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table_optimizer(nn.Parameter(parameter), **options)
