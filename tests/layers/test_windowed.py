"""Windows on a CPU: the formula, its gradients, and nothing paid for what is outside the window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinygpt.layers import _windowed, causal_attention, use_attention_backend


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Every score of every pair, then those that may not be seen struck out."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    ages = torch.arange(k.shape[2] - q.shape[2], k.shape[2]).unsqueeze(1) - torch.arange(k.shape[2])
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    weights = scores.masked_fill((ages < 0) | (ages > window), -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def parts(q_seq: int, seq: int, kv_heads: int = 4, dtype: torch.dtype = torch.float64, dim: int = 8) -> list[Tensor]:
    """Queries, keys and values as the projections of a layer leave them: heads of a position side by side."""
    generator = torch.Generator().manual_seed(q_seq * 1000 + seq)
    shapes = [(2, q_seq, 4, dim), (2, seq, kv_heads, dim), (2, seq, kv_heads, dim)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.transpose(1, 2).requires_grad_() for x in made]


@settings(max_examples=50)
@given(
    q_seq=st.integers(2, 300),
    earlier=st.integers(0, 90),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.integers(0, 400),
)
def test_blocks_equal_the_definition_forward_and_backward(q_seq: int, earlier: int, kv_heads: int, window: int) -> None:
    q, k, v = parts(q_seq, q_seq + earlier, kv_heads)
    with use_attention_backend("blocks"):
        y = causal_attention(q, k, v, window_tokens=window, scale=0.3)
    expected = by_definition(q, k, v, window, 0.3)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    monkeypatch.setattr(_windowed, "BLOCK_QUERIES", 3)
    q, k, v = (x.detach()[:1].contiguous() if contiguous else x.detach()[:1] for x in parts(8, 10, kv_heads=2, dim=2))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: _windowed.blocks_attention(*qkv, 4, 0.7), inputs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)]
)
def test_other_precisions_stay_within_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = parts(200, 200, kv_heads=2, dtype=dtype)
    y = causal_attention(q, k, v, window_tokens=70)
    expected = by_definition(q.double(), k.double(), v.double(), 70, 8**-0.5)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    mine, theirs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (y, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_gradients_of_keys_in_half_precision_are_not_rounded_at_each_block() -> None:
    parts_of = [x.detach() for x in parts(1200, 1200, dtype=torch.bfloat16)]
    errors = []
    for backend in ("blocks", "sdpa"):
        q, k, v = (x.clone().requires_grad_() for x in parts_of)
        exact = [x.detach().double().requires_grad_() for x in parts_of]
        with use_attention_backend(backend):
            gradients = torch.autograd.grad(causal_attention(q, k, v, window_tokens=1000).sum(), (k, v))
        right = torch.autograd.grad(by_definition(*exact, 1000, 8**-0.5).sum(), exact[1:])
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(gradients, right, strict=True)])
    assert all(mine <= masked for mine, masked in zip(*errors, strict=True)), errors


def test_a_window_is_computed_by_blocks_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: windows.append("masked"))
    q, k, v = parts(200, 200)
    assert causal_attention(q, k, v, window_tokens=50).shape == q.shape
    assert windows == []
    causal_attention(q, k, v)  # without a window torch's own function is the fastest
    assert windows == ["masked"]


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_has_a_side_for_queries_and_one_for_keys() -> None:
    seq, window, dim = 2048, 100, 8
    q, k, v = (x.detach() for x in parts(seq, seq, dim=dim, dtype=torch.float32))
    with Largest() as largest:
        y, log_sums = _windowed._forward(q, k, v, window, 0.3)
        _windowed._backward(y, q, k, v, y, log_sums, window, 0.3)
    assert largest.elements == q.numel() < seq * seq / 16


def test_training_keeps_five_tensors_as_the_fused_kernel_does() -> None:
    q, k, v = parts(512, 512, kv_heads=2, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = causal_attention(q, k, v, window_tokens=100)
    elements = sum(x.numel() for x in kept)
    assert elements == 2 * q.numel() + 2 * k.numel() + y.numel() // q.shape[3]


def test_the_result_lies_in_memory_as_the_output_projection_reads_it() -> None:
    q, k, v = parts(200, 200)
    y = causal_attention(q, k, v, window_tokens=50)
    assert y.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(y.sum(), k)
    assert gradient.transpose(1, 2).is_contiguous()


def test_blocks_repeat_bit_for_bit() -> None:
    q, k, v = parts(300, 300, dtype=torch.float32)
    runs = []
    for _ in range(2):
        y = causal_attention(q, k, v, window_tokens=90)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_reaches_blocks() -> None:
    q, k, v = parts(200, 200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = causal_attention(q, k, v.bfloat16(), window_tokens=50)
        with use_attention_backend("sdpa"):
            masked = causal_attention(q, k, v.bfloat16(), window_tokens=50)
    assert y.dtype == masked.dtype == torch.bfloat16
    torch.testing.assert_close(y, masked, rtol=0, atol=0.02)


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = parts(200, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = causal_attention(q, k, v, window_tokens=50)
    torch.testing.assert_close(y, by_definition(q, k, v, 50, 8**-0.5))


def test_a_second_derivative_is_refused_and_not_zero() -> None:
    q, k, v = parts(100, 100)
    y = causal_attention(q, k, v, window_tokens=20)
    (gradient,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(gradient.sum(), q)
