"""The two update rules as functions of tensors: no groups, no names, no schedule."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinygpt.optim._polar import orthogonalize
from tinygpt.optim._rounding import round_stochastically

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
# What torch's kernel cannot do is worked on in slices of this many elements (4 MiB in float32), so that a step on a
# large table needs no large temporary: at 32,768 x 768 in bfloat16 at most 16 MiB were seen, and 64 with 2**22. Slices
# are of whole rows, so they change nothing but which noise a GPU draws.
_SLICE_ELEMENTS = 2**20


def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rounding_seeds: Sequence[int] | None = None,
) -> None:
    """Apply one AdamW step in place.

    The decay comes first, `p *= 1 - lr * weight_decay`, and `eps` stands outside the bias-corrected root:
    `p -= lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)`.

    torch's fused kernel does it where parameter, gradient and moments share a dtype. Otherwise (parameters stored
    in bfloat16) the arithmetic runs in the dtype of the second moment, float32: with beta2 = 0.995 that moves by at
    most 0.5 % a step, about the spacing of bfloat16 numbers, and would stand still if it were stored in it. The first
    moment moves by more and may be stored so.

    Args:
        params: Parameters, any shapes. Changed.
        grads: Their gradients.
        exp_avgs: Running means of the gradients, same shapes. Changed.
        exp_avg_sqs: Running means of the squared gradients, same shapes, or `(rows, 1)` for a parameter `(rows, cols)`:
            then those of the rows' mean squares, and all numbers of a row share one step size. Changed.
        steps: How many updates each parameter will have had after this one, from 1.
        lr: Learning rate.
        betas: Decay of the two running means.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, times `lr`.
        rounding_seeds: One a parameter, other ones at each step: parameters stored in bfloat16 are rounded up or down
            by chance, right on average, instead of to the nearest number. The same seed on the same device and number
            of elements gives the same choices. Without effect on other parameters.

    References:
        Loshchilov and Hutter, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101), 2017. One
        second moment a row is what row-wise Adagrad keeps in
        [DLRM](https://arxiv.org/abs/1906.00091), 2019, and [Adam-mini](https://arxiv.org/abs/2406.16793), 2024, for the
        rows of embeddings. Rounding: Gupta et al.,
        [Deep Learning with Limited Numerical Precision](https://arxiv.org/abs/1502.02551), 2015.
    """
    fused: list[int] = []
    for index, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if _fusable(param, grad, exp_avg, exp_avg_sq):
            fused.append(index)
        else:
            generator = None
            if rounding_seeds is not None and param.dtype == torch.bfloat16:
                generator = torch.Generator(param.device).manual_seed(rounding_seeds[index])
            _adamw_plain(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                steps[index],
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                generator=generator,
            )
    if fused:
        adamw(
            [params[index] for index in fused],
            [grads[index] for index in fused],
            [exp_avgs[index] for index in fused],
            [exp_avg_sqs[index] for index in fused],
            [],
            _step_tensors([steps[index] for index in fused], [params[index] for index in fused]),
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


def _fusable(param: Tensor, *others: Tensor) -> bool:
    """Say whether the fused kernel can take these: it reads memory in order and knows one dtype a call."""
    return (
        param.device.type in _FUSED_DEVICES
        and param.is_contiguous()
        and all(other.dtype == param.dtype and other.is_contiguous() and other.shape == param.shape for other in others)
    )


def _step_tensors(steps: list[int], params: list[Tensor]) -> list[Tensor]:
    """Build the counters the kernel wants: float32, on each parameter's device, before this step."""
    counters: list[Tensor] = []
    if len(set(steps)) == 1 and len({param.device for param in params}) == 1:
        # One fill and no copy from the host, which would make a GPU wait.
        shared = torch.full((len(steps),), steps[0] - 1, dtype=torch.float32, device=params[0].device)
        counters.extend(shared.unbind())
    else:
        counters.extend(
            torch.tensor(float(step - 1), dtype=torch.float32, device=param.device)
            for step, param in zip(steps, params, strict=True)
        )
    return counters


def _adamw_plain(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    generator: torch.Generator | None,
) -> None:
    beta1, beta2 = betas
    if param.ndim == 0:
        param, grad, exp_avg, exp_avg_sq = (tensor.view(1) for tensor in (param, grad, exp_avg, exp_avg_sq))
    row_wise = exp_avg_sq.shape != param.shape
    rows = max(1, _SLICE_ELEMENTS * len(param) // max(1, param.numel()))
    for p, g, m, v in zip(*(torch.split(tensor, rows) for tensor in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        wide = g.to(v.dtype)
        mean = m.to(v.dtype).lerp_(wide, 1 - beta1)  # m itself, if it has that dtype
        if mean is not m:
            m.copy_(mean)
        v.lerp_(wide.square().mean(-1, keepdim=True) if row_wise else wide.square(), 1 - beta2)
        del wide
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        result = p.to(v.dtype).mul_(1 - lr * weight_decay)  # p itself, if it has that dtype
        result.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
        del denominator, mean
        if result is not p:
            p.copy_(result if generator is None else round_stochastically(result, generator))


def muon_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float | Tensor,
    polar_steps: int = 5,
    row_equilibration: bool = False,
    norm_renormalization: bool = False,
    polar_dtype: torch.dtype | None = None,
) -> None:
    """Apply one Muon step in place to matrices of one shape.

    In order: Nesterov momentum; optional row equilibration; orthogonalization; optional norm renormalization;
    variance reduction, which divides each row (column, if the matrix is wide) by the root of its running mean square
    and keeps the norm of the whole; and cautious weight decay, which shrinks only those weights that the update moves
    towards zero as well. `lr` is multiplied by `sqrt(max(1, rows / cols))`.

    Args:
        params: Matrices `(rows, cols)`. Changed. Stored in bfloat16, they are updated in float32 and rounded, which
            loses changes under 0.4 % of a weight: store matrices in float32.
        grads: Their gradients.
        momentum_buffer: `(count, rows, cols)`, float32. Changed.
        second_moment: `(count, rows, 1)`, or `(count, 1, cols)` if `rows < cols`. Changed.
        lr: Learning rate; a number or, for a compiled call, a tensor without axes, as the next three.
        momentum: Decay of the momentum buffer.
        beta2: Decay of the second moment.
        weight_decay: Cautious weight decay, times `lr`.
        polar_steps: Iterations of `orthogonalize`.
        row_equilibration: Give all rows of the momentum one norm first.
        norm_renormalization: Scale the orthogonalized update to the Frobenius norm it should have.
        polar_dtype: The `dtype` of `orthogonalize`.

    References:
        Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024. Li et al.,
        [NorMuon](https://arxiv.org/abs/2510.05491), 2025; there the second moment is always one a row, here one a
        column if the matrix is wide, and there is no bias correction, which the rescaling makes unnecessary. Chen et
        al., [Cautious Weight Decay](https://arxiv.org/abs/2510.12402), 2025. The two options are
        [MuonEq](https://arxiv.org/abs/2603.28254) (rows only) and [Muon+](https://arxiv.org/abs/2602.21545), 2026.
    """
    rows, cols = momentum_buffer.shape[-2:]
    # One fresh stack, on which all that follows may work in place.
    update = torch.stack([grad.to(momentum_buffer.dtype) for grad in grads])
    momentum_buffer.lerp_(update, 1 - momentum)
    update.lerp_(momentum_buffer, momentum)

    if row_equilibration:
        row_norms = update.norm(dim=-1, keepdim=True)
        mean_norm = update.norm(dim=(-2, -1), keepdim=True) / math.sqrt(rows)
        update.mul_(mean_norm / row_norms.clamp_min(1e-6))
    update = orthogonalize(update, steps=polar_steps, dtype=polar_dtype)
    if norm_renormalization:
        norm = update.norm(dim=(-2, -1), keepdim=True)
        update.mul_(math.sqrt(min(rows, cols)) / norm.clamp_min(1e-6))

    update.mul_(_variance_scale(update, second_moment, beta2))

    step_size = lr * math.sqrt(max(1.0, rows / cols))
    for param, change in zip(params, update.unbind(), strict=True):
        _cautious_step(param, change, step_size, weight_decay)


def _variance_scale(update: Tensor, second_moment: Tensor, beta2: float | Tensor) -> Tensor:
    """Advance the second moment and return the factor per row (or column) that evens the update out."""
    rows, cols = update.shape[-2:]
    axis, length = (-1, cols) if rows >= cols else (-2, rows)
    mean_square = update.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt_()
    norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * length).sqrt()
    scaled_norm = (mean_square * length * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return scale * (norm / scaled_norm.clamp_min(1e-10))


def _cautious_step(param: Tensor, change: Tensor, lr: float | Tensor, weight_decay: float | Tensor) -> None:
    """Subtract `lr * change` and the decay where both pull the same way; overwrites `change`."""
    same_way = (param * change) >= 0
    change.add_(param.to(change.dtype) * same_way * weight_decay)
    # A bfloat16 parameter is widened, changed and rounded once by this line.
    param.sub_(change.mul_(lr))
