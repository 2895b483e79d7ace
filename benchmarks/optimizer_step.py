"""What does a step of `MuonAdamW` cost against `torch.optim.Muon` plus fused `torch.optim.AdamW`?

The same parameters, grouped alike: blocks to Muon, tables, head and scalars to AdamW. torch's Muon multiplies in
bfloat16 whatever the device, which is slow on a processor without bfloat16 units, so it runs as it is and once more
with its orthogonalization in float32. It does less than ours: no second moment (NorMuon), no cautious decay.
Extra memory is what a step takes at most beyond parameters, gradients and state, which all exist before.
"""

from contextlib import nullcontext
from unittest.mock import patch

import torch
from _measure import Work, arguments, mib_text, parse, peak_memory, report, seconds_text, time_rounds, timed_rows
from torch import Tensor, nn
from torch.optim import _muon

from tinygpt import GPT, GPTConfig
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

Shape = tuple[int, int, int]  # layers, dim, vocabulary


def model_with_gradients(shape: Shape) -> GPT:
    """Return a GPT of this shape with a random gradient for every parameter."""
    layers, dim, vocab = shape
    torch.manual_seed(0)
    model = GPT.from_config(GPTConfig(num_layers=layers, dim=dim, num_heads=max(1, dim // 128), vocab_size=vocab))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def ours(shape: Shape) -> Work:
    """Return a step of MuonAdamW with the rules of the documented run; one is done, so its state exists."""
    optimizer = MuonAdamW(param_groups(model_with_gradients(shape), nanochat_rules(model_dim=shape[1])))
    optimizer.step()
    return optimizer.step


def in_float32(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Do what torch's orthogonalization does, in float32."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def torch_step(shape: Shape, float32: bool) -> Work:
    """Return a step of torch's two optimizers, the first of which is done."""
    model = model_with_gradients(shape)
    matrices: list[nn.Parameter] = [p for p in model.blocks.parameters() if p.ndim == 2 and p.shape[0] != shape[2]]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95)
    adamw = torch.optim.AdamW(rest, lr=3e-4, betas=(0.8, 0.95), fused=True)

    def step() -> None:
        with patch.object(_muon, "_zeropower_via_newtonschulz", in_float32) if float32 else nullcontext():
            muon.step()  # type: ignore[no-untyped-call]
        adamw.step()

    step()
    return step


def main() -> None:
    parser = arguments(__doc__ or "", rounds=7)
    parser.add_argument("--full", action="store_true", help="the documented 286 M model instead of a 4 x 512 one")
    args = parse(parser)
    shape = (2, 128, 512) if args.quick else (12, 768, 32_768) if args.full else (4, 512, 8_192)
    variants = {
        "torch Muon in float32 + AdamW": torch_step(shape, True),
        "torch Muon as it is + AdamW": torch_step(shape, False),
        "MuonAdamW": ours(shape),
    }
    rows = timed_rows(time_rounds(variants, args.rounds, warm=True), baseline="torch Muon in float32 + AdamW")
    variants.clear()
    memory = [peak_memory(torch_step, shape, True), peak_memory(torch_step, shape, False), peak_memory(ours, shape)]
    parameters = model_with_gradients(shape).num_parameters().total
    for row, used in zip(rows, memory, strict=True):
        row["extra_mib"] = None if used is None else used.extra_mib
        row["extra_fraction"] = None if used is None else (used.peak - used.start) / (4 * parameters)
    report(
        "optimizer_step-full" if args.full and not args.quick else "optimizer_step",
        {"layers": shape[0], "dim": shape[1], "vocab": shape[2], "parameters": parameters},
        rows,
        {
            "step": seconds_text,
            "x speed of torch in float32": lambda row: f"{row['speed']:.2f}",
            "extra MiB": lambda row: mib_text(row["extra_mib"]),
            "of the parameters": lambda row: "n/a" if row["extra_fraction"] is None else f"{row['extra_fraction']:.1%}",
        },
        args,
    )


if __name__ == "__main__":
    main()
