"""The output head: logits for sampling, and a loss that never holds the logits of all tokens at once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinygpt._numbers import check_real, check_whole, given
from tinygpt.errors import ConfigError
from tinygpt.layers._kept import graph_stays, others_choose_what_is_kept
from tinygpt.layers._linear import Linear

# Logits of a chunk, in elements; about four tensors of this size exist at once. On a GPU 2**25, which are 128 MiB of
# float32 or 1,024 tokens at a vocabulary of 32,768: smaller chunks would add up the weight's gradient too often. On a
# CPU smaller chunks are as fast and stay closer to the cache.
_CHUNK_ELEMENTS = {"cpu": 2**23}
_GPU_CHUNK_ELEMENTS = 2**25
# Up to this cap the sum of a vocabulary's exponentials stays far from float32's limit of about exp(88), so that no
# maximum need be taken off first. With a small vocabulary the loss costs little, and the usual order of operations,
# which agrees with other implementations to the last bits, is kept.
_EXPONENT_BOUND = 40.0
_SMALL_VOCABULARY = 4096


class LMHead(Linear):
    """Project the residual stream to logits over the vocabulary, with a soft cap.

    Logits are `soft_cap * tanh(x @ weight.T / soft_cap)`, in float32. For training, `loss` works through the tokens in
    chunks and computes the gradient of each chunk's logits at once, so that neither the logits nor
    their gradients of more than one chunk ever exist.

    Args:
        dim: Width of the residual stream.
        vocab_size: Number of token ids.
        padded_vocab_size: Rows of the weight, at least `vocab_size`; rows beyond it never become logits.
            `None` for no padding.
        soft_cap: Bound on the magnitude of a logit; `None` for none.
        chunk_tokens: Tokens whose logits exist at a time in `loss`; `None` takes 2**25 logits on a GPU, 2**23 on a CPU.
        ignore_index: Target that counts for nothing.
        std: Standard deviation of the first weights; 0.001 is nanochat's, so a new model predicts evenly.

    Raises:
        ConfigError: If a size is not positive, `padded_vocab_size` is below `vocab_size` or the cap is not positive.

    References:
        The cap is that of [Gemma 2](https://arxiv.org/abs/2408.00118), 2024; nanochat takes 15. Gradients in
        the forward pass follow the idea of [Liger Kernel](https://arxiv.org/abs/2410.10989), 2024, in plain PyTorch.
    """

    is_lm_head = True

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        padded_vocab_size: int | None = None,
        soft_cap: float | None = 15.0,
        chunk_tokens: int | None = None,
        ignore_index: int = -1,
        std: float = 0.001,
    ) -> None:
        check_whole(dim=dim, vocab_size=vocab_size)
        check_whole(**given(padded_vocab_size=padded_vocab_size, chunk_tokens=chunk_tokens))
        check_real(**given(soft_cap=soft_cap))
        rows = vocab_size if padded_vocab_size is None else padded_vocab_size
        if vocab_size < 1 or rows < vocab_size:
            raise ConfigError(f"LMHead needs 1 <= vocab_size <= padded_vocab_size, got {vocab_size} and {rows}.")
        if soft_cap is not None and not soft_cap > 0:
            raise ConfigError(f"soft_cap={soft_cap} must be positive, or None for no cap.")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={chunk_tokens} must be positive, or None to choose it by memory.")
        self.std = std  # before super().__init__, which draws the weight
        super().__init__(dim, rows)
        self.vocab_size = vocab_size
        self.soft_cap = soft_cap
        self.chunk_tokens = chunk_tokens
        self.ignore_index = ignore_index

    def reset_parameters(self) -> None:
        """Draw the weight from a narrow normal distribution."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits: `(..., dim)` -> `(..., vocab_size)` float32."""
        logits = _float(F.linear(x, self.weight[: self.vocab_size].to(x.dtype)))
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the number of targets it sums over.

        Args:
            x: `(batch, seq, dim)`.
            targets: `(batch, seq)` int64, `ignore_index` where not trained on.

        Returns:
            Loss in nats as a scalar of at least float32 that carries gradients, and an int64 scalar.

        Raises:
            ConfigError: If shapes do not fit or, on CPU, a target lies outside the vocabulary.
        """
        if not torch.is_grad_enabled():
            return self.token_losses(x, targets).sum(), (targets != self.ignore_index).sum()
        self._check(x, targets)
        hidden, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        options = (self.vocab_size, self.soft_cap, self.chunk_size(x.device), self.ignore_index)
        total = _ChunkedLoss.apply(hidden, self.weight, flat, *options)  # type: ignore[no-untyped-call]
        return total, (flat != self.ignore_index).sum()

    @torch.no_grad()
    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every target in nats, without gradients: `(batch, seq)` float32, 0 where ignored.

        Raises:
            ConfigError: If shapes do not fit or, on CPU, a target lies outside the vocabulary.
        """
        self._check(x, targets)
        weight = self.weight[: self.vocab_size].to(x.dtype)
        hidden, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        parts = [
            _chunk_loss(hidden[rows], weight, flat[rows], self.soft_cap, self.ignore_index)[0]
            for rows in _slices(len(flat), self.chunk_size(x.device))
        ]
        return torch.cat([*parts, hidden.new_empty(0, dtype=torch.float32)]).view(targets.shape)

    def chunk_size(self, device: torch.device) -> int:
        """Return how many tokens' logits exist at a time in `loss` on this device."""
        elements = _CHUNK_ELEMENTS.get(device.type, _GPU_CHUNK_ELEMENTS)
        return self.chunk_tokens or max(1, elements // self.vocab_size)

    def _check(self, x: Tensor, targets: Tensor) -> None:
        if not (isinstance(x, Tensor) and isinstance(targets, Tensor)):
            kinds = f"{type(x).__name__} and {type(targets).__name__}"
            raise ConfigError(f"a loss needs two tensors, (batch, seq, dim) and (batch, seq); got {kinds}.")
        if x.shape[:-1] != targets.shape:
            raise ConfigError(f"hidden states {tuple(x.shape)} do not fit targets {tuple(targets.shape)}.")
        if targets.dtype != torch.int64:
            raise ConfigError(f"targets must be int64, got {targets.dtype}.")
        # Reading the extremes would make a GPU wait, where a bad target stops in a device assertion anyway.
        if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
            highest = int(targets.max())
            lowest = int(torch.where(targets == self.ignore_index, 0, targets).min())
            if lowest < 0 or highest >= self.vocab_size:
                wrong = lowest if lowest < 0 else highest
                raise ConfigError(
                    f"target {wrong} lies outside the vocabulary of {self.vocab_size}; "
                    f"{self.ignore_index} marks targets to ignore."
                )


def _float(logits: Tensor) -> Tensor:
    """Raise half precision to float32 and leave float64 alone, for gradient checks."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _chunk_loss(
    x: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return losses `(tokens,)`, logits, their log-sum-exp and, with a cap, the tanh, all of one chunk."""
    logits = _float(F.linear(x, weight))
    tanh = None
    if soft_cap is not None:
        tanh = logits.div_(soft_cap).tanh_()
        logits = tanh * soft_cap
    log_sum = logits.logsumexp(dim=-1)
    ignored = targets == ignore_index
    picked = logits.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return (log_sum - picked).masked_fill(ignored, 0.0), logits, log_sum, tanh


def _uncapped_chunk(
    x: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return the losses of a chunk, and the gradient of their sum by the logits before the cap."""
    losses, logits, log_sum, tanh = _chunk_loss(x, weight, targets, soft_cap, ignore_index)
    ignored = targets == ignore_index
    # d loss / d logit = softmax - onehot; through the cap also times 1 - tanh**2.
    grad = logits.sub_(log_sum[:, None]).exp_()
    grad.scatter_add_(1, targets.masked_fill(ignored, 0)[:, None], grad.new_full((len(targets), 1), -1.0))
    if tanh is not None:
        grad.mul_(tanh.square_().neg_().add_(1.0))
    return losses, grad.masked_fill_(ignored[:, None], 0.0)


def _large_chunk(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_capped_chunk` does, without a cap: exponentials are computed once, less the largest of a row."""
    exponentials = _float(F.linear(x, weight))
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)[:, None]
    exponentials.sub_(exponentials.amax(dim=-1, keepdim=True))
    target_logits = exponentials.gather(1, index)
    sums = exponentials.exp_().sum(dim=-1, keepdim=True)
    losses = (sums.log() - target_logits)[:, 0].masked_fill(ignored, 0.0)
    exponentials.scatter_add_(1, index, -sums)
    return losses, exponentials, sums.reciprocal().masked_fill(ignored[:, None], 0.0)


def _capped_chunk(
    x: Tensor, weight: Tensor, targets: Tensor, soft_cap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, gradient by the logits before the cap, and a factor `(tokens, 1)` the gradient still needs.

    Capped logits are bounded, so their exponentials need no maximum taken off and are computed once, for the sum and
    for the gradient. The division by that sum is left to the much smaller tensors that the gradient is multiplied with.
    """
    if x.dtype in (torch.float32, torch.float64):
        tanh = F.linear(x / soft_cap, weight).tanh_()
    else:
        tanh = F.linear(x, weight).float().div_(soft_cap).tanh_()
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)[:, None]
    exponentials = (tanh * soft_cap).exp_()
    target_tanh = tanh.gather(1, index)
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = (sums.log() - soft_cap * target_tanh)[:, 0].masked_fill(ignored, 0.0)
    exponentials.addcmul_(exponentials, tanh.square_(), value=-1.0)  # times 1 - tanh**2
    exponentials.scatter_add_(1, index, (target_tanh.square() - 1.0) * sums)
    return losses, exponentials, sums.reciprocal().masked_fill(ignored[:, None], 0.0)


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of capped logits; the gradients are computed chunk by chunk in the forward pass.

    They are constants to autograd: a penalty on gradients, which differentiates twice, needs the plain formula.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        master: Tensor,
        targets: Tensor,
        vocab_size: int,
        soft_cap: float | None,
        chunk: int,
        ignore_index: int,
    ) -> Tensor:
        weight = master[:vocab_size].to(x.dtype)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        # In the dtype of the master weight: many chunks add up here, each product rounded to bfloat16 at most.
        # Padding included, so that autograd has no reason to copy it.
        padded_grad = torch.zeros_like(master) if needs_weight else None
        grad_weight = None if padded_grad is None else padded_grad[:vocab_size]
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        for rows in _slices(len(targets), chunk):
            part, target = x[rows], targets[rows]
            if soft_cap is None and len(weight) > _SMALL_VOCABULARY:
                losses, grad, row_scale = _large_chunk(part, weight, target, ignore_index)
            elif soft_cap is not None and soft_cap <= _EXPONENT_BOUND and len(weight) > _SMALL_VOCABULARY:
                losses, grad, row_scale = _capped_chunk(part, weight, target, soft_cap, ignore_index)
            else:
                losses, grad = _uncapped_chunk(part, weight, target, soft_cap, ignore_index)
                row_scale = None
            total += losses.sum()
            if row_scale is not None and grad.dtype != x.dtype:
                grad.mul_(row_scale)  # before it is rounded to half precision
                row_scale = None
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[rows])
                if row_scale is not None:
                    grad_x[rows] *= row_scale
            if grad_weight is not None:
                scaled = part if row_scale is None else part * row_scale
                if grad_weight.dtype == grad.dtype:
                    grad_weight.addmm_(grad.T, scaled)
                else:
                    grad_weight += grad.T @ scaled
        ctx.hands_over = not torch.compiler.is_compiling() and not others_choose_what_is_kept()
        if ctx.hands_over:
            ctx.save_for_backward(total.new_empty(0))  # with which torch refuses a second backward pass
            ctx.grads = grad_x, padded_grad
        else:
            ctx.save_for_backward(grad_x, padded_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = ctx.grads if ctx.hands_over else saved
        last = ctx.hands_over and not graph_stays()
        if last:
            # This is where memory is highest: all that the blocks kept is still there, and the weight's gradient is a
            # large one. So it is changed in place, and nothing else refers to it, else autograd would copy it.
            ctx.grads = None
        grad_x, grad_weight = (_times(grad, grad_total, in_place=last) for grad in grads)
        return grad_x, grad_weight, None, None, None, None, None


def _times(grad: Tensor | None, factor: Tensor, *, in_place: bool) -> Tensor | None:
    if grad is None:
        return None
    return grad.mul_(factor.to(grad.dtype)) if in_place else grad * factor.to(grad.dtype)
