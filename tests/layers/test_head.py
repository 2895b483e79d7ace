import pytest
import torch
from torch.nn import functional as F

from tinygpt.errors import ConfigError
from tinygpt.layers import LMHead


def head_and_data(vocab: int = 37, **options: object) -> tuple[LMHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = LMHead(12, vocab, padded_vocab_size=vocab + 3, std=0.8, **options)  # type: ignore[arg-type]
    targets = torch.randint(vocab, (3, 7))
    targets[0, :3] = -1
    return head, torch.randn(3, 7, 12, requires_grad=True), targets


# Above a vocabulary of 4,096 exponentials are computed once: another order of operations, the same numbers.
@pytest.mark.parametrize("vocab", [37, 5000])
@pytest.mark.parametrize("soft_cap", [None, 2.0, 30.0, 300.0])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 21, 100])
def test_chunked_loss_and_gradients_equal_the_plain_formula(
    vocab: int, soft_cap: float | None, chunk_tokens: int | None
) -> None:
    head, x, targets = head_and_data(vocab, soft_cap=soft_cap, chunk_tokens=chunk_tokens)
    total, count = head.loss(x, targets)
    # Another factor than one on the way back, as when the trainer divides by the number of targets.
    grads = torch.autograd.grad(3 * total, (x, head.weight))
    logits = x @ head.weight[:vocab].T
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    expected = torch.autograd.grad(3 * plain, (x, head.weight))
    assert int(count) == 18
    torch.testing.assert_close(total, plain)
    for grad, reference in zip(grads, expected, strict=True):
        assert (grad - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("small", [4096, 0])
@pytest.mark.parametrize("soft_cap", [3.0, None])
def test_chunked_gradients_pass_a_float64_check(
    monkeypatch: pytest.MonkeyPatch, small: int, soft_cap: float | None
) -> None:
    monkeypatch.setattr("tinygpt.layers._head._SMALL_VOCABULARY", small)
    torch.manual_seed(0)
    head = LMHead(5, 11, padded_vocab_size=14, std=0.8, soft_cap=soft_cap, chunk_tokens=3)
    x, targets = torch.randn(2, 4, 5), torch.randint(11, (2, 4))
    targets[0, :2] = -1
    weight = head.double().weight.detach().clone().requires_grad_()
    del head.weight

    def summed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        head.weight = weight  # type: ignore[assignment]
        return head.loss(x, targets)[0]

    assert torch.autograd.gradcheck(summed, (x.detach().double().requires_grad_(), weight))


@pytest.mark.parametrize("vocab", [37, 5000])
def test_logits_far_beyond_what_exp_can_take_give_a_finite_loss(vocab: int) -> None:
    head, x, targets = head_and_data(vocab, soft_cap=None)
    with torch.no_grad():
        head.weight.mul_(300)  # logits of thousands; exp ends at 88
    total, _ = head.loss(x, targets)
    (gradient,) = torch.autograd.grad(total, x)
    logits = (x @ head.weight[:vocab].T).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, x)[0], rtol=1e-4, atol=1e-2)


def test_logits_leave_padding_out_and_stay_below_the_cap() -> None:
    head, x, _ = head_and_data(soft_cap=2.0)
    logits = head(x)
    assert logits.shape == (3, 7, 37)
    assert logits.dtype == torch.float32
    assert logits.abs().max() < 2.0
    torch.testing.assert_close(logits, 2 * torch.tanh(x @ head.weight[:37].T / 2))


def test_token_losses_sum_to_the_loss_and_are_zero_where_ignored() -> None:
    head, x, targets = head_and_data(chunk_tokens=4)
    losses = head.token_losses(x, targets)
    assert losses.shape == targets.shape
    assert (losses[0, :3] == 0).all()
    torch.testing.assert_close(losses.sum(), head.loss(x, targets)[0].detach())


def test_loss_without_gradients_equals_loss_with_them() -> None:
    head, x, targets = head_and_data()
    with torch.no_grad():
        total, count = head.loss(x, targets)
    assert not total.requires_grad
    torch.testing.assert_close(total, head.loss(x, targets)[0].detach())
    assert int(count) == 18


def test_a_fully_ignored_batch_is_zero_with_zero_gradients() -> None:
    head, x, targets = head_and_data()
    total, count = head.loss(x, torch.full_like(targets, -1))
    (gradient,) = torch.autograd.grad(total, x)
    assert (float(total.detach()), int(count)) == (0.0, 0)
    assert (gradient == 0).all()


@pytest.mark.parametrize("vocab", [37, 5000])
def test_bfloat16_input_gives_float32_loss_and_weight_gradient(vocab: int) -> None:
    head, x, targets = head_and_data(vocab, chunk_tokens=2)
    total, _ = head.loss(x.detach().bfloat16().requires_grad_(), targets)
    total.backward()
    assert total.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    rough, head.weight.grad = head.weight.grad, None
    exact, _ = head.loss(x, targets)
    exact.backward()
    assert float(total.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    # The sum over chunks is kept in float32: eleven roundings of it to bfloat16 would show here.
    assert torch.linalg.vector_norm(rough - head.weight.grad) < 0.01 * torch.linalg.vector_norm(head.weight.grad)


def test_peak_memory_of_the_loss_stays_far_below_the_full_logits() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    head = LMHead(8, 1000, chunk_tokens=16)
    x, targets = torch.randn(1, 512, 8, requires_grad=True), torch.randint(1000, (1, 512))
    with Watch():
        head.loss(x, targets)[0].backward()
    assert largest <= 16 * 1000 < 512 * 1000


def test_targets_outside_the_vocabulary_are_refused() -> None:
    head, x, targets = head_and_data()
    for wrong in (37, -2):
        targets[1, 1] = wrong
        with pytest.raises(ConfigError, match=f"target {wrong} lies outside the vocabulary of 37"):
            head.loss(x, targets)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 <= vocab_size <= padded_vocab_size, got 10 and 9"):
        LMHead(4, 10, padded_vocab_size=9)
    with pytest.raises(ConfigError, match="soft_cap=0 must be positive"):
        LMHead(4, 10, soft_cap=0)
    with pytest.raises(ConfigError, match="chunk_tokens=0 must be positive"):
        LMHead(4, 10, chunk_tokens=0)
    head, x, targets = head_and_data()
    with pytest.raises(ConfigError, match="do not fit targets"):
        head.loss(x, targets[:1])


def test_an_empty_batch_and_wrong_target_types_are_handled() -> None:
    head, x, targets = head_and_data()
    assert head.token_losses(x[:0], targets[:0]).shape == (0, 7)
    with pytest.raises(ConfigError, match=r"targets must be int64, got torch\.int32"):
        head.loss(x, targets.int())


def test_the_default_chunk_bounds_the_logits_of_a_large_vocabulary() -> None:
    head = LMHead(4, 32_768)
    assert head.chunk_size(torch.device("cpu")) * 32_768 <= 2**23
    assert head.chunk_size(torch.device("cuda")) == 1024
