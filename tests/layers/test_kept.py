"""What layers keep for the backward pass: less than their formulas, and the same numbers."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tinygpt.layers import (
    Block,
    CausalSelfAttention,
    Linear,
    LMHead,
    ReluSquaredMLP,
    RMSNorm,
    RotaryEmbedding,
    ValueEmbedding,
)
from tinygpt.memory._kernels import KernelsOf
from tinygpt.memory._ledger import Ledger


def plain_mlp(mlp: ReluSquaredMLP, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, mlp.up_proj.weight)) ** 2, mlp.down_proj.weight)


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def gradients(call: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = call(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *parameters])]


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_torchs_to_the_bit_and_its_gradient_as_exact(dtype: torch.dtype, eps: float | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64)
    ours = gradients(RMSNorm(64, eps=eps), x.to(dtype))
    theirs = gradients(lambda x: F.rms_norm(x, (64,), eps=eps), x.to(dtype))
    exact = gradients(lambda x: F.rms_norm(x, (64,), eps=eps or torch.finfo(dtype).eps), x.to(dtype).double())
    assert torch.equal(ours[0], theirs[0])
    errors = [torch.linalg.vector_norm(found[1] - exact[1]).item() for found in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


def test_the_norm_of_zeros_has_a_finite_gradient() -> None:
    _, grad = gradients(RMSNorm(8), torch.zeros(1, 8))
    _, expected = gradients(lambda x: F.rms_norm(x, (8,)), torch.zeros(1, 8))
    torch.testing.assert_close(grad, expected)


def test_first_and_second_derivatives_are_right() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    for module in (RMSNorm(6, eps=1e-3), drawn(ReluSquaredMLP(6, 10).double())):
        assert torch.autograd.gradcheck(module, (x,))
        assert torch.autograd.gradgradcheck(module, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_feed_forward_layer_is_its_formula_to_the_bit(dtype: torch.dtype) -> None:
    mlp = drawn(ReluSquaredMLP(8, 32)).to(dtype)
    x = torch.randn(2, 5, 8, dtype=dtype)
    ours = gradients(mlp, x, *mlp.parameters())
    theirs = gradients(lambda x: plain_mlp(mlp, x), x, *mlp.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("surroundings", ["checkpoint", "offloaded", "compiled", "no bias", "frozen input", "func"])
def test_the_feed_forward_layer_holds_in_every_surrounding(surroundings: str) -> None:
    mlp = drawn(ReluSquaredMLP(8, 32))
    x = torch.randn(2, 5, 8)
    expected = gradients(lambda x: plain_mlp(mlp, x), x, *mlp.parameters())
    if surroundings == "checkpoint":
        found = gradients(lambda x: checkpoint(mlp, x, use_reentrant=False), x, *mlp.parameters())
    elif surroundings == "offloaded":
        with save_on_cpu():
            found = gradients(mlp, x, *mlp.parameters())
    elif surroundings == "compiled":
        found = gradients(torch.compile(mlp, backend="aot_eager", fullgraph=True), x, *mlp.parameters())
    elif surroundings == "frozen input":
        out = mlp(x)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        found = [out, expected[1], *torch.autograd.grad((out * weights).sum(), list(mlp.parameters()))]
    elif surroundings == "func":
        weights = torch.linspace(-1, 1, x.numel()).view_as(x)
        found = [*expected]
        found[1] = torch.func.grad(lambda x: (mlp(x) * weights).sum())(x)
    else:
        mlp.down_proj = nn.Linear(32, 8)  # another layer in its place, which keeps its input as it likes
        down = mlp.down_proj
        expected = gradients(
            lambda x: down(F.relu(F.linear(x, mlp.up_proj.weight)) ** 2), x, mlp.up_proj.weight, down.weight
        )
        found = gradients(mlp, x, mlp.up_proj.weight, down.weight)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def kept_bytes(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float32, **more: Tensor) -> int:
    """Return how much a call keeps for the backward pass, what it returns included."""
    module = module.to("meta")
    x = torch.empty(*shape, device="meta", dtype=dtype, requires_grad=True)
    ledger = Ledger([x, *module.parameters(), *module.buffers(), *more.values()], block=1)
    with ledger, KernelsOf("cuda"):
        out = module(x, **more)
        kept = sum(ledger.alive().values())
    assert out.requires_grad
    return kept


def kept_numbers(module: nn.Module, *shape: int) -> int:
    return kept_bytes(module, *shape) // 4


def test_norm_and_feed_forward_layer_keep_what_they_say() -> None:
    assert kept_numbers(RMSNorm(64), 10, 64) == 10 * 64 + 10  # the result and a number a row
    assert kept_numbers(ReluSquaredMLP(64, 256), 10, 64) == 10 * 256 + 10 * 64  # relu, and the result
    mlp = ReluSquaredMLP(64, 256)
    mlp.down_proj = nn.Linear(256, 64)
    assert kept_numbers(mlp, 10, 64) == 10 * 256 + 10 * 64


def test_without_gradients_one_hidden_layer_less_exists() -> None:
    mlp, x = ReluSquaredMLP(64, 256).to("meta"), torch.empty(10, 64, device="meta")
    ledger = Ledger([x, *mlp.parameters()], block=1)
    with ledger, torch.no_grad():
        mlp(x)
    peak, _ = ledger.highest(0, ledger.mark())
    assert peak == 4 * 2 * 10 * 256


def test_the_loss_can_be_differentiated_twice_over_a_kept_graph() -> None:
    torch.manual_seed(0)
    head = LMHead(8, 20)
    x, targets = torch.randn(1, 6, 8, requires_grad=True), torch.randint(20, (1, 6))
    total, _ = head.loss(x, targets)
    first = torch.autograd.grad(total, (x, head.weight), retain_graph=True)
    second = torch.autograd.grad(3 * total, (x, head.weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_linear_keeps_its_dtype_rules_inside() -> None:
    mlp = drawn(ReluSquaredMLP(8, 32))
    out = mlp(torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert isinstance(mlp.up_proj, Linear)
    assert mlp.up_proj.weight.grad is not None
    assert mlp.up_proj.weight.grad.dtype == torch.float32


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mul_(0.5))


def test_a_square_that_a_layer_changes_in_place_is_kept_as_it_is_then() -> None:
    torch.manual_seed(0)
    mlp, x = ReluSquaredMLP(8, 32), torch.randn(3, 8)
    mlp.down_proj = down = Halved()
    weights = mlp.up_proj.weight, down.linear.weight
    expected = gradients(lambda x: down.linear(F.relu(F.linear(x, weights[0])) ** 2 * 0.5), x, *weights)
    for a, b in zip(gradients(mlp, x, *weights), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_that_change_before_the_backward_pass_are_noticed() -> None:
    mlp = drawn(ReluSquaredMLP(8, 32))
    out = mlp(torch.randn(3, 8))
    with torch.no_grad():
        mlp.down_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before that pass"):
        out.sum().backward()


def test_layers_that_keep_what_has_no_strides_do() -> None:
    class Sparse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(torch.eye(8, 32).to_sparse(), x.T).T

    mlp = ReluSquaredMLP(8, 32)
    mlp.down_proj = Sparse()
    mlp(torch.randn(3, 8)).sum().backward()
    assert mlp.up_proj.weight.grad is not None


def test_forward_differentiation_and_forbidden_hooks_work() -> None:
    both, x = drawn(nn.Sequential(RMSNorm(8), ReluSquaredMLP(8, 32))), torch.randn(3, 8, requires_grad=True)
    tangent = torch.randn(3, 8)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(both(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, torch.func.jvp(both, (x,), (tangent,))[1])
    expected = both(x)
    with torch.autograd.graph.disable_saved_tensors_hooks("not now"):
        assert torch.equal(both(x), expected)


@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (16,), (0, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_a_product_in_another_dtype_is_that_of_a_cast_weight_to_the_bit(shape: tuple[int, ...], frozen: str) -> None:
    torch.manual_seed(0)
    linear, x = Linear(16, 24), torch.randn(shape, dtype=torch.bfloat16)
    linear.weight.requires_grad_(frozen != "weight")
    results = []
    for call in (linear, lambda x: F.linear(x, linear.weight.to(x.dtype))):
        given = x.clone().requires_grad_(frozen != "input")
        out = call(given)
        trained = [each for each in (given, linear.weight) if each.requires_grad]
        results.append([out, *torch.autograd.grad((out * out.detach()).sum(), trained)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


def test_a_product_in_another_dtype_keeps_no_copy_of_the_weight() -> None:
    assert kept_bytes(Linear(16, 24), 10, 16, dtype=torch.bfloat16) == 2 * 10 * 24  # the result alone


def test_a_product_in_another_dtype_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    linear, x = Linear(4, 3), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    found, expected = [], []
    for results, call in ((found, linear), (expected, lambda x: F.linear(x, linear.weight.double()))):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        results.extend(torch.autograd.grad(first.square().sum(), (x, linear.weight)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_decides_over_the_dtype_of_the_input() -> None:
    linear = Linear(16, 24)
    with torch.autocast("cpu", torch.float16):
        out = linear(torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True))
    out.float().sum().backward()
    assert out.dtype == torch.float16
    assert linear.weight.grad is not None


def test_a_weight_that_changes_before_the_backward_pass_is_noticed_in_every_dtype() -> None:
    linear = Linear(16, 24)
    out = linear(torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True))
    with torch.no_grad():
        linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def value_attention(table: nn.Embedding | None = None) -> CausalSelfAttention:
    torch.manual_seed(0)
    table = ValueEmbedding(11, 32) if table is None else table
    attention = CausalSelfAttention(64, 4, num_kv_heads=2, rope=RotaryEmbedding(16, 8), value_embedding=table)
    nn.init.normal_(attention.o_proj.weight, std=0.3)
    return attention


def test_attention_in_bfloat16_keeps_what_its_kernel_keeps_and_the_input() -> None:
    rows, dim, kv_dim, heads, kv_heads = 2 * 8, 64, 32, 4, 2
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    kept = kept_bytes(value_attention(), 2, 8, dim, dtype=torch.bfloat16, token_ids=ids)
    numbers = 2 * dim + 2 * kv_dim + dim + kv_heads + kv_heads  # q, kernel's result, k, v, result, gate and its sigmoid
    in_float32 = heads + heads + kv_heads  # sums of the softmax; the factors of the norms of q and k
    tables = 2 * 8 * 8 * 2 * 2  # cosines and sines of q and of k
    assert kept == rows * (2 * numbers + 4 * in_float32) + tables


def test_a_block_that_recomputes_does_not_keep_its_hidden_layer() -> None:
    kept = []
    for recompute in (False, True):
        block = Block(64, value_attention(), ReluSquaredMLP(64, 256), residual_scale=1.0, x0_scale=0.1)
        block.recompute_mlp = recompute
        x0 = torch.empty(2, 8, 64, dtype=torch.bfloat16, device="meta")
        ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
        kept.append(kept_bytes(block, 2, 8, 64, dtype=torch.bfloat16, x0=x0, token_ids=ids))
    assert kept[0] - kept[1] == 2 * 8 * 2 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "hooked", "largest norm", "checkpoint", "compiled"])
def test_rows_of_the_value_table_give_the_same_gradients_however_they_are_kept(kind: str, dtype: torch.dtype) -> None:
    table = ValueEmbedding(11, 32)
    if kind == "largest norm":
        table.max_norm = 0.5
    if kind == "hooked":
        table.register_forward_hook(lambda module, args, rows: 2 * rows)
    attention = value_attention(table)
    ids = torch.randint(11, (2, 8))
    x = torch.randn(2, 8, 64).to(dtype)
    parameters = [*attention.parameters()]

    def call(x: Tensor) -> Tensor:
        if kind == "checkpoint":
            return checkpoint(lambda x: attention(x, token_ids=ids), x, use_reentrant=False)
        if kind == "compiled":
            return torch.compile(attention, backend="aot_eager")(x, token_ids=ids)
        return attention(x, token_ids=ids)

    def kept(x: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("so that everything is kept"):
            return attention(x, token_ids=ids)

    for a, b in zip(gradients(call, x, *parameters), gradients(kept, x, *parameters), strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * b.norm()


def test_a_value_table_that_changes_before_the_backward_pass_is_noticed() -> None:
    attention = value_attention()
    out = attention(torch.randn(2, 8, 64), token_ids=torch.randint(11, (2, 8)))
    assert attention.value_embedding is not None
    with torch.no_grad():
        attention.value_embedding.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before that pass"):
        out.sum().backward()


def test_rows_of_the_value_table_are_those_of_the_call_also_where_parameters_are_given_to_it() -> None:
    attention = value_attention()
    ids, x = torch.randint(11, (2, 8)), torch.randn(2, 8, 64)
    others = [torch.randn_like(parameter) for parameter in attention.parameters()]
    given = dict(zip(dict(attention.named_parameters()), others, strict=True))

    def called(x: Tensor) -> Tensor:
        return torch.func.functional_call(attention, given, (x,), {"token_ids": ids})

    for each in others:
        each.requires_grad_()
    found = gradients(called, x, *others)
    with torch.no_grad():
        for parameter, other in zip(attention.parameters(), others, strict=True):
            parameter.copy_(other)
    expected = gradients(lambda x: attention(x, token_ids=ids), x, *attention.parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_token_ids_that_change_before_the_backward_pass_are_noticed_also_over_a_frozen_table() -> None:
    attention, ids = value_attention(), torch.randint(11, (2, 8))
    assert attention.value_embedding is not None
    attention.value_embedding.requires_grad_(False)
    out = attention(torch.randn(2, 8, 64), token_ids=ids)
    ids.zero_()
    with pytest.raises(RuntimeError, match="changed in place before that pass"):
        out.sum().backward()


def test_token_ids_of_inference_mode_train_what_lies_over_a_frozen_table() -> None:
    attention = value_attention()
    assert attention.value_embedding is not None
    assert attention.value_gate is not None
    attention.value_embedding.requires_grad_(False)
    with torch.inference_mode():
        ids = torch.randint(11, (2, 8))
    attention(torch.randn(2, 8, 64), token_ids=ids).square().sum().backward()
    assert attention.value_gate.weight.grad is not None


def test_hooks_of_others_may_be_any_callable() -> None:
    attention, ids, x = value_attention(), torch.randint(11, (2, 8)), torch.randn(2, 8, 64)
    expected = gradients(lambda x: attention(x, token_ids=ids), x, *attention.parameters())
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        found = gradients(lambda x: attention(x, token_ids=ids), x, *attention.parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_product_with_a_frozen_weight_does_not_keep_its_input() -> None:
    linear = Linear(16, 24)
    linear.weight.requires_grad_(False)
    x = torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
    between = x * 1
    out = linear(between)
    between.zero_()  # nobody needs it any more
    out.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.bfloat16().sum(0).expand(10, 16), rtol=2e-2, atol=2e-2)


def large_block(norm_weight: bool = False) -> Block:
    """Return a block for inputs of which one is as large as what is made again; (4, 1024, 64) in float32 are 1 MiB."""
    attention = CausalSelfAttention(64, 4, rope=RotaryEmbedding(16, 1024))
    block = Block(64, attention, ReluSquaredMLP(64, 128), residual_scale=0.7, x0_scale=0.3, norm_weight=norm_weight)
    drawn(block)
    return block


LARGE = 4, 1024, 64


def test_a_large_block_keeps_one_tensor_for_each_product_but_the_norm_before_the_attention() -> None:
    numbers = 4 * 64 + 64 + 128 + 64  # q, k, v, kernel's result; second norm; relu; result
    sums = 4 + 4 + 4 + 1 + 1  # of the softmax, and of each norm
    kept = kept_bytes(large_block(), *LARGE, x0=torch.empty(LARGE, device="meta"))
    assert kept == 4 * 4 * 1024 * (numbers + sums)
    small = kept_bytes(large_block(), 1, 1024, 64, x0=torch.empty(1, 1024, 64, device="meta"))
    assert small - kept / 4 == 4 * 1024 * 64  # the norm before the attention


@pytest.mark.parametrize("norm_weight", [False, True])
@pytest.mark.parametrize("kind", ["plain", "checkpoint", "recomputed", "given parameters", "hooked norm"])
def test_a_large_block_gives_the_same_gradients_to_the_bit_however_it_keeps_its_norms(
    kind: str, norm_weight: bool
) -> None:
    block, x, x0 = large_block(norm_weight), torch.randn(LARGE), torch.randn(LARGE)
    parameters = [*block.parameters()]
    if kind == "hooked norm":
        block.mlp_norm.register_forward_hook(lambda module, args, normed: 2 * normed)
    block.recompute_mlp = kind == "recomputed"

    def call(x: Tensor) -> Tensor:
        if kind == "checkpoint":
            return checkpoint(lambda x: block(x, x0=x0), x, use_reentrant=False)
        if kind == "given parameters":
            return torch.func.functional_call(block, given, (x,), {"x0": x0})
        return block(x, x0=x0)

    given = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    found = gradients(call, x, *(given.values() if kind == "given parameters" else parameters))
    block.recompute_mlp = False
    with torch.autograd.graph.disable_saved_tensors_hooks("so that everything is kept"):
        expected = gradients(lambda x: block(x, x0=x0), x, *parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_large_block_can_be_differentiated_twice() -> None:
    block, x0 = large_block(), torch.randn(LARGE)
    block.attention = Doubled()  # attention itself has no second derivative
    results = []
    for kept in (False, True):
        x = torch.linspace(-1, 1, x0.numel()).view(LARGE).requires_grad_()
        if kept:
            with torch.autograd.graph.disable_saved_tensors_hooks("so that everything is kept"):
                out = block(x, x0=x0)
        else:
            out = block(x, x0=x0)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, block.mlp.up_proj.weight]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


class Doubled(nn.Module):
    def forward(self, x: Tensor, **_: object) -> Tensor:
        return 2 * x * x


@pytest.mark.parametrize("which", ["stream", "embedding", "scale"])
def test_what_a_large_block_is_made_of_may_not_change_before_the_backward_pass(which: str) -> None:
    block, x, x0 = large_block(), torch.randn(LARGE), torch.randn(LARGE)
    between = x.requires_grad_() * 1.0
    out = block(between, x0=x0)
    assert block.residual_scale is not None
    with torch.no_grad():
        {"stream": between, "embedding": x0, "scale": block.residual_scale}[which].mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place before that pass|modified by an inplace operation"):
        out.sum().backward()


def test_a_hidden_layer_that_somebody_else_sees_is_not_changed() -> None:
    mlp, x, seen = drawn(ReluSquaredMLP(8, 32)), torch.randn(3, 8), []
    mlp.up_proj.register_forward_hook(lambda module, args, hidden: seen.append(hidden))
    mlp(x).sum().backward()
    assert torch.equal(seen[0], F.linear(x, mlp.up_proj.weight))

    class Squashed(nn.Linear):  # tanh keeps its result, as the layer's own relu keeps its
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    mlp.up_proj = up = Squashed(8, 32, bias=False)  # type: ignore[assignment]
    weights = up.weight, mlp.down_proj.weight
    expected = gradients(lambda x: F.linear(F.relu(F.linear(x, weights[0]).tanh()) ** 2, weights[1]), x, *weights)
    for a, b in zip(gradients(mlp, x, *weights), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rotation_is_its_formula_to_the_bit_and_can_be_differentiated_twice(dtype: torch.dtype) -> None:
    rope = RotaryEmbedding(16, 9)
    x = torch.randn(2, 9, 3, 16).transpose(1, 2).to(dtype)
    cos, sin = rope.tables(0, 9)

    def formula(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((first * c - second * s, first * s + second * c), dim=-1)

    for a, b in zip(gradients(rope, x), gradients(formula, x), strict=True):
        assert torch.equal(a, b)
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(rope, (x.clone().requires_grad_(),))


def alive() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("way", ["forward alone", "some gradients", "a graph that stays"])
def test_what_a_large_block_keeps_goes_with_its_graph_without_a_collector(way: str) -> None:
    block, x, x0 = large_block(), torch.randn(LARGE).requires_grad_(), torch.randn(LARGE)

    def once() -> None:
        out = block(x, x0=x0)
        if way == "some gradients":
            torch.autograd.grad(out.sum(), [block.mlp.down_proj.weight])
        if way == "a graph that stays":
            torch.autograd.grad(out.sum(), [x], retain_graph=True)

    once()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(5):
            once()
        assert alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["attention_norm", "mlp_norm", "up_proj"])
@pytest.mark.parametrize("how", ["forward of its own", "hook for all modules"])
def test_a_module_that_was_patched_gives_the_gradients_of_what_it_computed(how: str, what: str) -> None:
    block, x, x0 = large_block(), torch.randn(LARGE), torch.randn(LARGE)
    module = block.mlp.up_proj if what == "up_proj" else getattr(block, what)
    own, handle = module.forward, None
    if how == "forward of its own":
        module.forward = lambda x: torch.tanh(3 * own(x))
    else:
        handle = register_module_forward_hook(lambda each, args, out: torch.tanh(3 * out) if each is module else None)
    try:
        found = gradients(lambda x: block(x, x0=x0), x, *block.parameters())
        with torch.autograd.graph.disable_saved_tensors_hooks("so that everything is kept"):
            expected = gradients(lambda x: block(x, x0=x0), x, *block.parameters())
    finally:
        if handle is not None:
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_rotation_gives_gradients_in_batches_and_to_tables_and_rows_to_positions() -> None:
    rope, x = RotaryEmbedding(4, 9), torch.randn(1, 1, 9, 4, requires_grad=True)
    turned = rope(x)
    several = torch.randn(3, *turned.shape)
    found = torch.autograd.grad(turned, x, several, is_grads_batched=True, retain_graph=True)[0]
    for each, grad in zip(found, several, strict=True):
        assert torch.equal(each, torch.autograd.grad(turned, x, grad, retain_graph=True)[0])
    cos, sin = (table.clone().requires_grad_() for table in rope.tables(0, 9))
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(rope.turn(x, cos, sin).sum(), (cos, sin)))
    positions = torch.tensor([0, 3, 5])
    assert torch.equal(rope(x[:, :, :2], position=positions), rope(x[:, :, :2].detach(), position=positions))
    assert rope(x[:, :, :2], position=positions).shape == (3, 1, 2, 4)


def test_a_loss_may_be_scaled_in_place_and_is_differentiated_once() -> None:
    torch.manual_seed(0)
    head = LMHead(8, 20)
    x, targets = torch.randn(1, 6, 8, requires_grad=True), torch.randint(20, (1, 6))
    expected = [grad / 6 for grad in torch.autograd.grad(head.loss(x, targets)[0], (x, head.weight))]
    total, _ = head.loss(x, targets)
    total /= 6
    for found, wanted in zip(torch.autograd.grad(total, (x, head.weight)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_the_gradient_of_a_padded_head_is_handed_over_and_not_copied() -> None:
    head = LMHead(8, 20, padded_vocab_size=32)
    made = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend([out.untyped_storage().data_ptr()] if isinstance(out, Tensor) and out.shape == (32, 8) else [])
            return out

    with Seen():
        head.loss(torch.randn(1, 6, 8), torch.randint(20, (1, 6)))[0].backward()
    assert head.weight.grad is not None
    assert set(made) == {head.weight.grad.untyped_storage().data_ptr()}
    assert head.weight.grad[20:].count_nonzero() == 0


@pytest.mark.parametrize("name", ["attention_norm", "mlp_norm"])
def test_backward_hooks_on_a_norm_are_called(name: str) -> None:
    block, calls = large_block(), []
    norm = getattr(block, name)
    norm.register_full_backward_hook(lambda module, grads, outs: calls.append("after"))
    norm.register_full_backward_pre_hook(lambda module, outs: calls.append("before"))
    block(torch.randn(1, 4, 64, requires_grad=True), x0=torch.randn(1, 4, 64)).sum().backward()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("shape", [(), (1, 1, 1), (64,)])
def test_factors_of_a_block_may_have_any_shape(shape: tuple[int, ...]) -> None:
    block, x, x0 = large_block(), torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    block.residual_scale, block.x0_scale = (nn.Parameter(torch.full(shape, value)) for value in (0.7, 0.3))
    scales = [block.residual_scale, block.x0_scale]
    found = gradients(lambda x: block(x, x0=x0), x, *scales)

    def formula(x: Tensor) -> Tensor:
        x = scales[0] * x + scales[1] * x0
        x = x + block.attention(F.rms_norm(x, (64,)))
        return x + block.mlp(F.rms_norm(x, (64,)))

    for a, b in zip(found, gradients(formula, x, *scales), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("batched", ["grad of the stream", "grad of the norm"])
def test_gradients_of_a_block_come_in_batches_from_either_of_its_parts(batched: str) -> None:
    block, x, x0 = large_block(), torch.randn(1, 4, 64, requires_grad=True), torch.randn(1, 4, 64)
    seen: list[Tensor] = []
    block.attention = Doubled()
    block.attention.register_forward_hook(lambda module, args, out: seen.append(out))
    out = block(x, x0=x0)
    of = out if batched == "grad of the stream" else seen[0]
    several = torch.randn(3, *of.shape)
    found = torch.autograd.grad(of, x, several, is_grads_batched=True, retain_graph=True)[0]
    for each, grad in zip(found, several, strict=True):
        torch.testing.assert_close(each, torch.autograd.grad(of, x, grad, retain_graph=True)[0])


def test_what_others_keep_for_the_backward_pass_is_not_overwritten() -> None:
    block, x, x0, kept = large_block(), torch.randn(1, 4, 64, requires_grad=True), torch.randn(1, 4, 64), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, x0=x0)
    out.sum().backward()
    assert kept
    assert all(torch.equal(tensor, then) for tensor, then in kept)


def test_streams_of_other_shapes_and_dtypes_train_as_they_are_evaluated() -> None:
    block = large_block()
    block.attention.forward = lambda x, **_: x.expand(3, -1, -1).double()  # type: ignore[method-assign]
    block.mlp.forward = lambda x: torch.zeros(())  # type: ignore[method-assign]
    x, x0 = torch.randn(1, 4, 64), torch.randn(2, 1, 4, 64)[0]
    trained = block(x.requires_grad_(), x0=x0)
    with torch.no_grad():
        evaluated = block(x, x0=x0)
    assert trained.shape == evaluated.shape == (3, 4, 64)
    assert trained.dtype == evaluated.dtype == torch.float64
    torch.testing.assert_close(trained, evaluated)


def test_what_a_rotation_of_somebody_else_returns_is_left_alone() -> None:
    attention = CausalSelfAttention(64, 4, rope=RotaryEmbedding(16, 8))
    drawn(attention)
    assert attention.rope is not None
    attention.rope.turn = lambda x, cos, sin: x  # type: ignore[method-assign]
    x = torch.randn(1, 8, 64, requires_grad=True)
    attention(x).sum().backward()
    assert x.grad is not None
    without = CausalSelfAttention(64, 4)
    without.load_state_dict(attention.state_dict())
    (expected,) = torch.autograd.grad(without(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)
