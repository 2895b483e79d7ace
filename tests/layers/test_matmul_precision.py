"""Products in eight bits: computed for real here, as a CPU computes what a GPU does, slowly."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_runs import TEXTS, everything, make_trainer, steps_of
from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, TextDocuments
from tinygpt.errors import ConfigError
from tinygpt.layers import Linear, set_matmul_precision
from tinygpt.layers._low_precision import low_precision_linear
from tinygpt.layers._matmul_precision import _problem
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.tokenizer import ByteTokenizer

PRECISIONS = ["fp8", "int8"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_model(**config: Any) -> GPT:
    torch.manual_seed(0)
    fields = {"head_dim": 32, "width_per_layer": 32, "vocab_size": 257, "max_seq_len": 64, **config}
    return GPT.from_config(GPTConfig.from_depth(2, **fields))


def products(x: Tensor, weight: Tensor, grad: Tensor, precision: str) -> list[Tensor]:
    """Return output, gradient of the input and gradient of the weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = low_precision_linear(x, weight, precision)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(64,), (3, 7), (1,)])
def test_products_are_as_close_to_float64_as_their_bits_allow(
    precision: str, dtype: torch.dtype, tokens: tuple[int, ...]
) -> None:
    """Each element: the sum of products of magnitudes, times what rounding the two factors can do to one product."""
    x, weight, grad = randn(*tokens, 96), randn(160, 96, seed=1) * 0.05, randn(*tokens, 160, seed=2) * 1e-5
    x, grad = x.to(dtype), grad.to(dtype)
    flat, w, g = x.double().reshape(-1, 96), weight.double(), grad.double().reshape(-1, 160)
    exact = [flat @ w.T, g @ w, g.T @ flat]
    sizes = [flat.abs() @ w.T.abs(), g.abs() @ w.abs(), g.T.abs() @ flat.abs()]
    found = products(x, weight, grad, precision)
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32]
    assert found[0].shape == (*tokens, 160)
    assert found[1].shape == x.shape
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5  # of the result
    if precision == "fp8":
        # Half a unit of three or two bits behind the leading one; subnormals add a share of the largest number.
        factors = [2**-4 + 2**-4, 2**-3 + 2**-4, 2**-3 + 2**-4]
        for computed, wanted, size, factor in zip(found, exact, sizes, factors, strict=True):
            error = (computed.double().reshape(wanted.shape) - wanted).abs()
            assert bool((error <= 1.1 * factor * size + rounding * wanted.abs()).all())
    else:
        half = 0.5 / 127  # of the largest number of a row
        largest = [flat.abs().amax(1, keepdim=True), w.abs().amax(1, keepdim=True), g.abs().amax(1, keepdim=True)]
        columns = w.abs().amax(0, keepdim=True)
        bounds = [
            half * (largest[0] * w.T.abs().sum(0) + flat.abs().sum(1, keepdim=True) * largest[1].T),
            half * (largest[2] * w.abs().sum(0) + g.abs().sum(1, keepdim=True) * columns),
            torch.zeros_like(sizes[2]),
        ]
        for computed, wanted, size, bound in zip(found, exact, sizes, bounds, strict=True):
            error = (computed.double().reshape(wanted.shape) - wanted).abs()
            assert bool((error <= 1.02 * bound + rounding * size).all())
    for computed, wanted in zip(found, exact, strict=True):
        relative = (computed.double().reshape(wanted.shape) - wanted).norm() / wanted.norm()
        assert relative < (0.08 if precision == "fp8" else 0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_eight_bits_hold_exactly_is_multiplied_exactly(precision: str) -> None:
    """Small integers, with rows whose largest number is one that int8 divides by."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randint(-1, 2, (32, 32), generator=generator).float() for _ in range(3))
    for computed, exact in zip(
        products(x, weight, grad, precision), (x @ weight.T, grad @ weight, grad.T @ x), strict=True
    ):
        torch.testing.assert_close(computed, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_order_in_memory_does_not_matter(precision: str) -> None:
    x, weight, grad = randn(32, 64), randn(96, 64, seed=1), randn(32, 96, seed=2)
    usual = products(x, weight, grad, precision)
    by_columns = [t.t().contiguous().t() for t in (x, weight, grad)]
    for one, other in zip(usual, products(*by_columns, precision), strict=True):
        assert torch.equal(one, other)
    part = torch.cat((x, x), dim=1)[:, :64]
    assert torch.equal(usual[0], products(part, weight, grad, precision)[0])
    even = torch.ones(1, 1).expand(32, 96)  # the gradient of a sum
    torch.testing.assert_close(
        products(x, weight, even, precision)[1], products(x, weight, torch.ones(32, 96), precision)[1]
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e4, 1e25])
def test_size_does_not_matter(precision: str, scale: float) -> None:
    x, weight, grad = randn(32, 64), randn(32, 64, seed=1), randn(32, 32, seed=2)
    usual = products(x, weight, grad, precision)
    scaled = products(x * scale, weight, grad / scale, precision)
    for one, other, factor in zip(usual, scaled, (scale, 1 / scale, 1.0), strict=True):
        # fp8 rounds alike only for powers of two; a scale of 1e4 moves numbers to other places between them.
        assert (other / factor - one).norm() < 0.15 * one.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_so(precision: str) -> None:
    x = randn(32, 32)
    x[3, 4] = float("nan")
    y = low_precision_linear(x, randn(32, 32, seed=1), precision)
    assert bool(y[3].isnan().any())
    zeros = low_precision_linear(torch.zeros(32, 32), torch.zeros(32, 32), precision)
    assert torch.equal(zeros, torch.zeros(32, 32))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
def test_no_tokens_make_an_empty_output_and_no_gradient(precision: str, tokens: tuple[int, ...]) -> None:
    y, grad_x, grad_weight = products(randn(*tokens, 64), randn(32, 64), randn(*tokens, 32), precision)
    assert (y.shape, grad_x.shape) == ((*tokens, 32), (*tokens, 64))
    assert torch.equal(grad_weight, torch.zeros(32, 64))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_under_autocast_the_output_has_its_dtype(precision: Any) -> None:
    layer, x = Linear(64, 32, bias=True), randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        set_matmul_precision(layer, precision)
        y = layer(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # the compiler looks at attributes that warn when looked at
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trace_of_the_compiler_takes_a_layer_whole(precision: Any) -> None:
    layer = Linear(64, 32)
    set_matmul_precision(layer, precision)
    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)):
        layer.zero_grad()
        x = randn(5, 64).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        found.append([y, x.grad, layer.weight.grad])
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.filterwarnings("ignore")  # torchao warns at import of what it cannot load
def test_products_are_those_of_torchao() -> None:
    """With the option that torchao has for factors that are powers of two: to the last bit, as recorded at 0.18."""
    pytest.importorskip("torchao")
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    layer = nn.Linear(64, 96, bias=False)
    theirs = Float8Linear.from_float(
        copy.deepcopy(layer), config=Float8LinearConfig(emulate=True, round_scales_to_power_of_2=True)
    )
    x, grad = randn(64, 64).requires_grad_(), randn(64, 96, seed=1) * 1e-4
    y = theirs(x)
    y.backward(grad)
    ours = products(x.detach(), layer.weight.detach(), grad, "fp8")
    for one, other in zip(ours, (y, x.grad, theirs.weight.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_matrices_of_the_blocks_are_set_and_nothing_else() -> None:
    model = small_model()
    names = set_matmul_precision(model, "fp8")
    per_block = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.up_proj"]
    assert sorted(names) == sorted(
        f"blocks.{index}.{name}" for index in range(2) for name in [*per_block, "mlp.down_proj"]
    )
    untouched = [m for name, m in model.named_modules() if isinstance(m, Linear) and name not in names]
    assert untouched
    assert all(module.matmul_precision is None for module in untouched)
    assert set_matmul_precision(model, None) == names
    assert all(m.matmul_precision is None for m in model.modules() if isinstance(m, Linear))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_and_evaluation_are_those_of_the_plain_model(precision: Any) -> None:
    model, plain = small_model(), small_model()
    for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
        nn.init.normal_(parameter, std=0.05)
        twin.data.copy_(parameter)
    set_matmul_precision(model, precision)
    assert {n: (t.dtype, t.shape) for n, t in model.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in plain.state_dict().items()
    }
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(ids), plain.eval()(ids))
    trained, exact = model.train()(ids), plain.train()(ids)
    assert not torch.equal(trained, exact)
    assert (trained - exact).norm() < 0.15 * exact.norm()


def losses(seed: int, width: int, seq_len: int, **config: Any) -> Tensor:
    """The mean loss of each ten steps."""
    torch.manual_seed(seed)
    settings = {"head_dim": 32, "width_per_layer": width, "vocab_size": 257, "max_seq_len": 64}
    model = GPT.from_config(GPTConfig.from_depth(2, **settings))
    optimizer = MuonAdamW(param_groups(model, nanochat_rules(model_dim=2 * width, batch_lr_scale=0.5)))
    loader = BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=4, seq_len=seq_len, prefetch=0, num_workers=0)
    steps = Trainer(model, optimizer, loader, TrainerConfig(num_steps=60, **config))
    return torch.tensor([s.loss for s in steps]).view(6, 10).mean(1)


# A CPU multiplies fp8 one by one, so the model is as narrow as such a product may be.
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "width", "seq_len"), [("int8", 32, 64), ("fp8", 16, 32)], ids=["int8", "fp8"])
def test_training_follows_the_curve_of_full_precision_within_the_spread_of_seeds(
    precision: str, width: int, seq_len: int
) -> None:
    """Further apart between seeds than between precisions."""
    plain = [losses(seed, width, seq_len) for seed in range(3)]
    spread = torch.stack(plain).std(0)
    low = losses(0, width, seq_len, matmul_precision=precision)
    assert not torch.equal(low, plain[0])
    assert bool(((low - plain[0]).abs() < 2 * spread + 0.005).all()), (low - plain[0], spread)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_in_eight_bits_is_resumed_to_the_same_bits_and_can_be_left(tmp_path: Path, precision: str) -> None:
    def trainer(out: str, **config: Any) -> Trainer:
        model = small_model(width_per_layer=16)
        return make_trainer(tmp_path / out, model=model, num_steps=6, save_every=3, **config)

    list(trainer("whole", matmul_precision=precision))
    steps_of(trainer("parts", matmul_precision=precision), 3)
    resumed = trainer("parts", matmul_precision=precision)
    assert not resumed.resume()
    list(resumed)
    last = [everything(tmp_path / run / "checkpoints" / "step-000006") for run in ("whole", "parts")]
    assert last[0] == last[1]

    plain = trainer("plain")
    changes = plain.load_state(tmp_path / "whole" / "checkpoints" / "step-000003")
    assert [(c.name, c.was, c.will_be) for c in changes] == [("matmul_precision", precision, None)]
    list(plain)
    found = [r["loss"] for r in read_metrics(tmp_path / "plain" / "metrics.jsonl") if r["event"] == "step"]
    assert len(found) == 3


def test_a_trainer_without_it_sets_back_what_another_set() -> None:
    model = small_model()
    layer = model.get_submodule("blocks.0.attention.q_proj")
    for precision in ("int8", None):
        make_trainer(model=model, matmul_precision=precision)
        assert layer.matmul_precision == precision


class _Narrow(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layer = Linear(*widths)


@pytest.mark.parametrize(
    ("model", "precision", "message"),
    [
        (_Narrow(32, 32), "fp4", "matmul precision 'fp4' is unknown; choose 'fp8', 'int8' or None"),
        (_Narrow(12, 64), "fp8", "_Narrow has no Linear of tinygpt.layers that is at least 32 wide"),
        (nn.Linear(64, 64), "fp8", "Linear has no Linear of tinygpt.layers"),
        (_Narrow(64, 100), "int8", r"multiples of 16, unlike layer \(100, 64\)"),
    ],
)
def test_what_cannot_be_is_refused(model: nn.Module, precision: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_matmul_precision(model, precision)


def test_a_kernel_that_fails_or_is_wrong_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Narrow(32, 32)

    def missing(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(torch, "_int_mm", missing)
    with pytest.raises(ConfigError, match=r"int8 products do not work on cpu: torch says: no kernel image$"):
        set_matmul_precision(model, "int8")
    monkeypatch.setattr(torch, "_int_mm", lambda a: a)
    with pytest.raises(ConfigError, match=r"torch says: .*takes 1 positional argument"):
        set_matmul_precision(model, "int8")
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
    with pytest.raises(ConfigError, match="a product came out wrong by 100%"):
        set_matmul_precision(model, "int8")
    assert model.layer.matmul_precision is None


@pytest.mark.parametrize(("capability", "hint"), [((8, 6), "Try 'int8'"), ((7, 5), r"8\.9 or newer\.$")])
def test_an_older_gpu_is_named_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hint: str
) -> None:
    """The question is asked before anything runs there, so no GPU is needed to see the answer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    problem = _problem("fp8", torch.device("cuda"))
    assert problem is not None
    assert problem.startswith("Some Card has compute capability")
    assert re.search(hint, problem)
