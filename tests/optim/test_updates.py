"""The update rules against torch and against loops written from the papers in float64."""

import math

import pytest
import torch
from torch import Tensor

from tinygpt.optim import MuonAdamW, adamw_update, muon_update, orthogonalize

HYPER = {"lr": 3e-3, "betas": (0.8, 0.995), "eps": 1e-10, "weight_decay": 0.1}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_adamw(
    start: Tensor, grads: list[Tensor], lr: float, beta1: float, beta2: float, eps: float, wd: float
) -> Tensor:
    p = start.double().flatten().tolist()
    m, v = [0.0] * len(p), [0.0] * len(p)
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(grad.double().flatten().tolist()):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            p[i] *= 1 - lr * wd
            p[i] -= lr * (m[i] / (1 - beta1**t)) / (math.sqrt(v[i] / (1 - beta2**t)) + eps)
    return torch.tensor(p, dtype=torch.float64).reshape(start.shape)


def run_adamw(param: Tensor, grads: list[Tensor], state_dtype: torch.dtype | None = None) -> Tensor:
    exp_avg = torch.zeros_like(param, dtype=state_dtype)
    exp_avg_sq = torch.zeros_like(param, dtype=state_dtype)
    for step, grad in enumerate(grads, start=1):
        adamw_update([param], [grad], [exp_avg], [exp_avg_sq], [step], **HYPER)
    return param


def test_adamw_equals_the_naive_loop() -> None:
    start, grads = randn(5, 7), [randn(5, 7, seed=seed) for seed in range(1, 8)]
    expected = naive_adamw(start, grads, 3e-3, 0.8, 0.995, 1e-10, 0.1)
    torch.testing.assert_close(run_adamw(start.clone(), grads).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_adamw_equals_torch(layout: str) -> None:
    """A transposed parameter takes the plain path, the other one the fused kernel."""
    start, grads = randn(6, 4), [randn(6, 4, seed=seed) for seed in range(1, 6)]
    if layout == "transposed":
        start, grads = start.mT, [grad.mT for grad in grads]
    reference = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([reference], foreach=False, **HYPER)
    for grad in grads:
        reference.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(run_adamw(start.clone(), grads), reference.detach())


def test_adamw_keeps_apart_parameters_of_different_age() -> None:
    young, old = randn(4), randn(3, seed=1)
    grads = {step: (randn(4, seed=10 + step), randn(3, seed=20 + step)) for step in (1, 2, 3)}
    alone = run_adamw(young.clone(), [grads[3][0]])
    moments = [[torch.zeros(4), torch.zeros(3)] for _ in range(2)]
    for step in (1, 2):
        adamw_update([old], [grads[step][1]], [moments[0][1]], [moments[1][1]], [step], **HYPER)
    adamw_update([young, old], list(grads[3]), moments[0], moments[1], [1, 3], **HYPER)
    torch.testing.assert_close(young, alone)
    expected = naive_adamw(randn(3, seed=1), [grads[step][1] for step in (1, 2, 3)], 3e-3, 0.8, 0.995, 1e-10, 0.1)
    torch.testing.assert_close(old.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (9, 5), (4, 3, 2)])
def test_adamw_on_bfloat16_parameters_rounds_only_the_result(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt.optim._updates._SLICE_ELEMENTS", 10)
    start, grad = randn(*shape, dtype=torch.bfloat16), randn(*shape, seed=1, dtype=torch.bfloat16)
    expected = naive_adamw(start, [grad], 3e-3, 0.8, 0.995, 1e-10, 0.1).to(torch.bfloat16)
    torch.testing.assert_close(run_adamw(start.clone(), [grad], torch.float32), expected, rtol=0, atol=0)


def test_float32_moments_see_what_bfloat16_moments_lose() -> None:
    start, grads = torch.ones(1, dtype=torch.bfloat16), [torch.full((1,), 0.1, dtype=torch.bfloat16)] * 400
    exp_avg, exp_avg_sq = torch.zeros(1), torch.zeros(1)
    in_bfloat16 = torch.zeros(1, dtype=torch.bfloat16)
    for step, grad in enumerate(grads, start=1):
        adamw_update([start], [grad], [exp_avg], [exp_avg_sq], [step], **HYPER)
        in_bfloat16.lerp_(grad.square(), 1 - 0.995)
    exact = grads[0].double().item() ** 2 * (1 - 0.995**400)
    assert exp_avg_sq.item() == pytest.approx(exact, rel=1e-3)
    assert in_bfloat16.item() < 0.9 * exact


def naive_muon(
    p: Tensor,
    g: Tensor,
    momentum: Tensor,
    second: Tensor,
    *,
    lr: float,
    beta: float,
    beta2: float,
    wd: float,
    options: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix, rows and columns spelt out, all in float64."""
    rows, cols = p.shape
    momentum = beta * momentum + (1 - beta) * g
    update = (1 - beta) * g + beta * momentum
    if options:
        target = math.sqrt(sum(float(row @ row) for row in update) / rows)
        update = torch.stack([row * target / max(math.sqrt(float(row @ row)), 1e-6) for row in update])
    update = orthogonalize(update)
    if options:
        update = update * math.sqrt(min(rows, cols)) / update.norm()
    lines = list(update) if rows >= cols else list(update.mT)
    mean_squares = [float((line**2).mean()) for line in lines]
    second = beta2 * second + (1 - beta2) * torch.tensor(mean_squares, dtype=torch.float64)
    evened = torch.stack([line / math.sqrt(s) for line, s in zip(lines, second.tolist(), strict=True)])
    evened = evened * update.norm() / evened.norm()
    update = evened if rows >= cols else evened.mT
    rate = lr * math.sqrt(max(1, rows / cols))
    result = p.clone()
    for i in range(rows):
        for j in range(cols):
            decay = wd * p[i, j] if update[i, j] * p[i, j] >= 0 else 0.0
            result[i, j] = p[i, j] - rate * (update[i, j] + decay)
    return result, momentum, second


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(6, 6), (12, 4), (4, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_muon_equals_the_naive_loop_on_stacks(rows: int, cols: int, options: bool, dtype: torch.dtype) -> None:
    count, lines = 3, max(rows, cols)
    params = [randn(rows, cols, seed=index, dtype=dtype) for index in range(count)]
    expected = [
        (param.double().clone(), torch.zeros(rows, cols).double(), torch.zeros(lines).double()) for param in params
    ]
    momentum_buffer = torch.zeros(count, rows, cols, dtype=dtype)
    second_moment = torch.zeros(count, *((rows, 1) if rows >= cols else (1, cols)), dtype=dtype)
    for step in range(3):
        # Rows of very different size, as gradients have.
        sizes = torch.logspace(0, -3, rows).unsqueeze(1).to(dtype)
        grads = [randn(rows, cols, seed=100 * step + index, dtype=dtype) * sizes for index in range(count)]
        lr, beta, wd = 0.02 / (step + 1), 0.85 + 0.02 * step, 0.3
        muon_update(
            params, grads, momentum_buffer, second_moment,
            lr=lr, momentum=beta, beta2=0.9, weight_decay=wd, row_equilibration=options, norm_renormalization=options,
        )  # fmt: skip
        expected = [
            naive_muon(*state[:1], grad.double(), *state[1:], lr=lr, beta=beta, beta2=0.9, wd=wd, options=options)
            for state, grad in zip(expected, grads, strict=True)
        ]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for index, (param, momentum, second) in enumerate(expected):
        torch.testing.assert_close(params[index].double(), param, **tolerance)
        torch.testing.assert_close(momentum_buffer[index].double(), momentum, **tolerance)
        torch.testing.assert_close(second_moment[index].flatten().double(), second, **tolerance)


def one_muon_step(params: list[Tensor], grads: list[Tensor], **changes: object) -> list[Tensor]:
    momentum_buffer = torch.zeros(len(params), *params[0].shape)
    second_moment = torch.zeros(len(params), params[0].shape[0], 1)
    settings = {"lr": 0.02, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.1} | changes
    muon_update(params, grads, momentum_buffer, second_moment, **settings)
    return params


def test_muon_on_a_stack_equals_one_by_one() -> None:
    starts, grads = [randn(16, 8, seed=index) for index in range(4)], [randn(16, 8, seed=9 + i) for i in range(4)]
    together = one_muon_step([start.clone() for start in starts], grads)
    for start, grad, expected in zip(starts, grads, together, strict=True):
        (alone,) = one_muon_step([start.clone()], [grad])
        torch.testing.assert_close(alone, expected)


def test_muon_accepts_rates_as_tensors() -> None:
    grads = [randn(8, 8, seed=1)]
    rates = {"lr": 0.02, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.1}
    as_tensors = {name: torch.tensor(value) for name, value in rates.items()}
    (expected,) = one_muon_step([randn(8, 8)], grads)
    (given,) = one_muon_step([randn(8, 8)], grads, **as_tensors)
    torch.testing.assert_close(given, expected)


def test_muon_on_bfloat16_matrices_rounds_only_the_result() -> None:
    start, grad = randn(8, 8, dtype=torch.bfloat16), randn(8, 8, seed=1, dtype=torch.bfloat16)
    (expected,) = one_muon_step([start.float()], [grad.float()])
    (given,) = one_muon_step([start.clone()], [grad])
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given, expected.bfloat16(), rtol=0, atol=0)


def test_decay_is_cautious() -> None:
    """Weights the update moves away from zero are not shrunk."""
    start, grad = randn(8, 8), randn(8, 8, seed=1)
    (plain,) = one_muon_step([start.clone()], [grad], weight_decay=0.0)
    (decayed,) = one_muon_step([start.clone()], [grad], weight_decay=0.5)
    towards_zero = (start - plain) * start >= 0
    torch.testing.assert_close(plain[~towards_zero], decayed[~towards_zero], rtol=0, atol=0)
    torch.testing.assert_close((plain - decayed)[towards_zero], 0.02 * 0.5 * start[towards_zero])


def test_a_stack_keeps_the_momentum_of_members_that_had_no_gradient_for_a_step() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 4) for _ in range(3)]
    gradients = torch.randn(12, 3, 6, 4)

    def optimizer(members: list[int]) -> tuple[list[torch.nn.Parameter], MuonAdamW]:
        parameters = [torch.nn.Parameter(weights[index].clone()) for index in members]
        named = [(f"w{index}", parameter) for index, parameter in zip(members, parameters, strict=True)]
        return parameters, MuonAdamW([{"params": named, "kind": "muon", "lr": 0.1}])

    together, stacked = optimizer([0, 1, 2])
    alone = [optimizer([index]) for index in range(3)]
    for step in range(12):
        for index in range(3):
            gradient = None if (step + index) % 4 == 0 else gradients[step, index].clone()
            together[index].grad = gradient
            alone[index][0][0].grad = None if gradient is None else gradient.clone()
        stacked.step()
        for _, single in alone:
            single.step()
    for index in range(3):
        torch.testing.assert_close(together[index], alone[index][0][0], rtol=1e-5, atol=1e-6)


def test_a_zero_gradient_stays_a_zero_update_with_norm_renormalization() -> None:
    parameter = torch.nn.Parameter(torch.randn(6, 4))
    group = {"params": [("w", parameter)], "kind": "muon", "lr": 0.1, "norm_renormalization": True}
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    MuonAdamW([group]).step()
    assert torch.equal(parameter, before)
