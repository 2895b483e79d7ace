"""Does attention with a window cost less than without one, and which backend is the fastest here?

Forward and backward of `causal_attention`, with gradients for queries, keys and values. Every backend that is available
computes the window, `sdpa` with a mask; full attention is what they are compared with. On a GPU in bfloat16 unless
`--dtype` says otherwise, and its memory is what torch allocates.
"""

from collections.abc import Callable

import torch
from _measure import MIB, Row, arguments, mib_text, parse, peak_memory, report, seconds_text, time_rounds, timed_rows
from torch import Tensor

from tinygpt.layers import attention_backends, causal_attention, use_attention_backend

Shape = tuple[int, ...]
Step = Callable[[], tuple[Tensor, ...]]

# batch, heads, seq, head_dim, window: a layer S of the documented model, one of a small model, and a long context
SHAPES = [(4, 6, 2048, 128, 512), (4, 2, 512, 128, 128), (1, 4, 8192, 64, 1024)]
QUICK_SHAPES = [(2, 2, 160, 16, 32)]


def attention(shape: Shape, backend: str | None, device: str, dtype: torch.dtype) -> Step:
    """Return a step with a window on a backend, or without a window for `None`; it returns result and gradients."""
    batch, heads, seq, head_dim, window = shape
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, batch, seq, heads, head_dim, generator=generator).to(device, dtype).transpose(2, 3)
    q, k, v = (made[i].detach().requires_grad_() for i in range(3))
    attention_backends(device, dtype, head_dim=head_dim)  # tries them, which is not to be measured

    def step() -> tuple[Tensor, ...]:
        with use_attention_backend(backend):
            y = causal_attention(q, k, v, window_tokens=None if backend is None else window)
            results = y, *torch.autograd.grad(y, (q, k, v), made[3])
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    return step


def extra_mib(shape: Shape, backend: str | None, device: str, dtype: torch.dtype) -> float | None:
    """Return the memory of a step beyond its inputs."""
    if device == "cpu":
        used = peak_memory(attention, shape, backend, device, dtype)
        return None if used is None else used.extra_mib
    step = attention(shape, backend, device, dtype)
    step()  # compiles what must be
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def name(shape: Shape, backend: str | None) -> str:
    *sizes, window = shape
    return " x ".join(map(str, sizes)) + (", full" if backend is None else f", window {window}, {backend}")


def main() -> None:
    parser = arguments(__doc__ or "", rounds=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: bfloat16 on a GPU)")
    args = parse(parser)
    device = args.device
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    rows: list[Row] = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        found = attention_backends(device, dtype, head_dim=shape[3])
        backends = [None, *(backend.name for backend in found if backend.available)]
        steps = {name(shape, backend): attention(shape, backend, device, dtype) for backend in backends}
        expected = steps[name(shape, "sdpa")]()
        tolerance = 1e-4 if dtype == torch.float32 and device == "cpu" else 0.03
        for backend in backends[1:]:  # what is compared must be the same thing
            for mine, right in zip(steps[name(shape, backend)](), expected, strict=True):
                error = ((mine - right).abs().max() / right.abs().max()).item()
                assert error <= tolerance, f"{name(shape, backend)} is off by {error:.1e}"
        timed = timed_rows(time_rounds(steps, args.rounds), baseline=name(shape, None))
        for row, backend in zip(timed, backends, strict=True):
            row["extra_mib"] = extra_mib(shape, backend, device, dtype)
        rows += timed
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    report(
        "attention" + ("-cuda" if device == "cuda" else ""),
        {"device": where, "dtype": str(dtype).removeprefix("torch.")},
        rows,
        {
            "forward + backward": seconds_text,
            "x speed of full": lambda row: f"{row['speed']:.2f}",
            "extra MiB": lambda row: mib_text(row["extra_mib"]),
        },
        args,
    )
    print(*attention_backends(device, dtype), sep="\n")


if __name__ == "__main__":
    main()
