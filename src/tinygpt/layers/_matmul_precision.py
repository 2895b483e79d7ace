"""Which layers multiply in eight bits while training, and whether a device can."""

from typing import Literal, get_args

import torch
from torch import nn

from tinygpt.errors import ConfigError
from tinygpt.layers._linear import Linear
from tinygpt.layers._low_precision import low_precision_linear

MatmulPrecision = Literal["fp8", "int8"]
"""What `set_matmul_precision` takes."""

_MULTIPLE = 16  # of both widths, for the kernels
_SMALLEST_WIDTH = 32  # gates are narrower: they cost nothing, and scale what they gate
_NEEDED_CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}  # NVIDIA: Ada and Hopper, Ampere
_MOST_ERROR = {"fp8": 0.1, "int8": 0.03}  # of a product of normal numbers, relative; twice what is found


def set_matmul_precision(model: nn.Module, precision: MatmulPrecision | None) -> list[str]:
    """Let the linear layers of a model multiply in eight bits while it trains, or set them back.

    Weights, their gradients and everything that is saved stay as they are. In evaluation mode layers multiply
    as ever, so what is measured and sampled is the model that others load. Token tables, norms, gates (layers with less
    than 32 inputs or outputs) and the head are left alone, and so is any layer that is no `Linear` of this library.

    `"fp8"` multiplies inputs and weights in e4m3 and gradients in e5m2, with one factor a tensor, in all three products
    of a layer. `"int8"` has a factor for each token and channel, and computes output and the gradient of
    the input; the gradient of the weight is summed in the dtype of the activations. Both are worth it for wide layers
    on a GPU, compiled; a CPU computes the same, slowly. MFU stays a share of the peak in the dtype of the activations,
    so it may come out above what that could reach.

    Args:
        model: On the device to train on.
        precision: `"fp8"` for NVIDIA GPUs from Ada and Hopper on, `"int8"` from Ampere on; `None` to set back.

    Returns:
        The names of the layers that were set.

    Raises:
        ConfigError: If the device cannot, a width is no multiple of 16, no layer is wide enough, or `precision` is
            something else.

    References:
        Micikevicius et al., [FP8 Formats for Deep Learning](https://arxiv.org/abs/2209.05433), 2022; factors are powers
        of two here, so that a number is rounded once. Wortsman et al., [Stable and low-precision training for
        large-scale vision-language models](https://arxiv.org/abs/2304.13013), 2023, whose SwitchBack is the int8 form.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.layers import set_matmul_precision

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        print(set_matmul_precision(model, "int8"))
        ```
    """
    if precision is not None and precision not in get_args(MatmulPrecision):
        raise ConfigError(f"matmul precision {precision!r} is unknown; choose 'fp8', 'int8' or None.")
    layers = {
        name: module
        for name, module in model.named_modules()
        # A subclass with a forward of its own, as LMHead, would not look at what is set here.
        if isinstance(module, Linear)
        and type(module).forward is Linear.forward
        and min(module.weight.shape) >= _SMALLEST_WIDTH
    }
    if precision is not None:
        if not layers:
            raise ConfigError(
                f"{type(model).__name__} has no Linear of tinygpt.layers that is at least {_SMALLEST_WIDTH} wide, as "
                f"{precision} products need; take a wider model, or leave matmul_precision out."
            )
        if odd := [f"{name} {tuple(m.weight.shape)}" for name, m in layers.items() if any(_remainders(m))]:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ConfigError(
                f"{precision} products need widths that are multiples of {_MULTIPLE}, unlike {', '.join(odd[:3])}{more}"
                "; take another width, or leave matmul_precision out."
            )
        for device in {module.weight.device for module in layers.values()}:
            if (problem := _problem(precision, device)) is not None:
                raise ConfigError(f"{precision} products do not work on {device}: {problem}")
    for module in layers.values():
        module.matmul_precision = precision
    return list(layers)


def _remainders(layer: Linear) -> list[int]:
    return [width % _MULTIPLE for width in layer.weight.shape]


def _problem(precision: str, device: torch.device) -> str | None:
    """Say why a device cannot compute such products; a small one is tried, as drivers and builds of torch differ."""
    if device.type == "meta":
        return None
    if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return "only NVIDIA GPUs and, slowly, CPUs are supported. Leave matmul_precision out."
    if device.type == "cuda":
        found, needed = torch.cuda.get_device_capability(device), _NEEDED_CAPABILITY[precision]
        if found < needed:
            other = " Try 'int8'." if precision == "fp8" and found >= _NEEDED_CAPABILITY["int8"] else ""
            name = torch.cuda.get_device_name(device)
            has = ".".join(map(str, found))
            return f"{name} has compute capability {has}, they need {'.'.join(map(str, needed))} or newer.{other}"
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(64, 64, generator=generator).to(device) for _ in range(3))
    x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        exact = [x.float() @ weight.t(), grad @ weight, grad.t() @ x.float()]
    try:
        with torch.enable_grad():
            y = low_precision_linear(x, weight, precision)
        computed = [y.detach(), *torch.autograd.grad(y, (x, weight), grad.bfloat16())]
    except Exception as error:  # private functions of torch: another version may refuse them in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch says: {lines[0][:200]}"
    worst = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(computed, exact, strict=True))
    return None if worst <= _MOST_ERROR[precision] else f"a product came out wrong by {worst:.0%}."
