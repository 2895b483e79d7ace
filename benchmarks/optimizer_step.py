"""What does a step of `MuonAdamW` cost against other implementations of Muon with AdamW?

The same parameters, gradients and rates, grouped alike: blocks to Muon, tables, head and scalars to AdamW. Nothing is
timed unless the first step makes the parameters of AdamW equal and changes the matrices nearly as torch's Muon does.
torch's Muon multiplies in bfloat16 whatever the device, which is slow on a processor without bfloat16 units, so it
runs as it is and once more with its orthogonalization in float32. The others do less than ours: no second moment
(NorMuon), no cautious decay.

pytorch-optimizer and heavyball are measured where they are installed (`pip install pytorch_optimizer==4.1.0
heavyball==3.2.1`, neither changes torch): their Muon for the matrices and, as heavyball has no such split of its own,
torch's fused AdamW for the rest. Both multiply in bfloat16; heavyball compiles, before it is timed.

Further rows have the tables in bfloat16 and what can be chosen for them; `--device cuda` adds our compiled update.
Extra memory is what a step takes at most beyond parameters, gradients and state, which all exist before.
"""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from _measure import MIB, Work, arguments, mib_text, parse, peak_memory, report, seconds_text, time_rounds, timed_rows
from torch import Tensor, nn
from torch.optim import _muon

from tinygpt import GPT, GPTConfig
from tinygpt.optim import MuonAdamW

Shape = tuple[int, int, int]  # layers, dim, vocabulary
Named = list[tuple[str, nn.Parameter]]

MUON: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.01}
BASELINE = "torch Muon in float32 + AdamW"


class Parts(NamedTuple):
    """A model's parameters by what they are trained with."""

    matrices: Named
    tables: Named
    rest: Named


def model_parts(shape: Shape, device: str, *, bfloat16_tables: bool) -> tuple[GPT, Parts]:
    """Return a GPT of this shape with a random gradient for every parameter."""
    layers, dim, vocab = shape
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT.from_config(GPTConfig(num_layers=layers, dim=dim, num_heads=max(1, dim // 128), vocab_size=vocab))
    if bfloat16_tables:
        model.set_compute_dtype(torch.bfloat16, embeddings=True)
    parts = Parts([], [], [])
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, device=device).to(parameter.dtype)
        if "embedding" in name:
            parts.tables.append((name, parameter))
        elif parameter.ndim == 2 and name.startswith("blocks."):
            parts.matrices.append((name, parameter))
        else:
            parts.rest.append((name, parameter))
    return model, parts


def ours(parts: Parts, *, compile: bool = False, polar_dtype: str = "auto", **table_options: Any) -> Work:
    optimizer = MuonAdamW(
        [
            {"params": parts.matrices, "kind": "muon", "polar_dtype": polar_dtype, **MUON},
            {"params": parts.tables, "kind": "adamw", **ADAMW, **table_options},
            {"params": parts.rest, "kind": "adamw", **ADAMW},
        ],
        compile=compile,
    )
    return optimizer.step


def with_torch_adamw(parts: Parts, muon: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Work:
    """Return a step of a Muon for the matrices and of torch's fused AdamW for the rest."""
    matrices = muon([parameter for _, parameter in parts.matrices])
    others = torch.optim.AdamW([parameter for _, parameter in [*parts.tables, *parts.rest]], fused=True, **ADAMW)

    def step() -> None:
        matrices.step()
        others.step()

    return step


def torch_muon(parts: Parts, *, float32: bool) -> Work:
    step = with_torch_adamw(parts, lambda matrices: torch.optim.Muon(matrices, **MUON))

    def run() -> None:
        with patch.object(_muon, "_zeropower_via_newtonschulz", in_float32) if float32 else nullcontext():
            step()

    return run


def in_float32(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Do what torch's orthogonalization does, in float32."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def pytorch_optimizer_muon(parts: Parts) -> Work:
    from pytorch_optimizer import Muon

    return with_torch_adamw(parts, lambda matrices: Muon([{"params": matrices, "use_muon": True, **MUON}]))


def heavyball_muon(parts: Parts) -> Work:
    import heavyball

    rates = {"lr": MUON["lr"], "betas": (MUON["momentum"], 0.99), "weight_decay": MUON["weight_decay"]}
    return with_torch_adamw(parts, lambda matrices: heavyball.Muon(matrices, **rates))


def variants(device: str) -> dict[str, tuple[bool, Callable[[Parts], Work]]]:
    """Return by name whether tables are in bfloat16, and what makes a step."""
    found: dict[str, tuple[bool, Callable[[Parts], Work]]] = {
        BASELINE: (False, lambda parts: torch_muon(parts, float32=True)),
        "torch Muon as it is + AdamW": (False, lambda parts: torch_muon(parts, float32=False)),
    }
    if find_spec("pytorch_optimizer"):
        found["pytorch-optimizer Muon + AdamW"] = (False, pytorch_optimizer_muon)
    if find_spec("heavyball"):
        found["heavyball Muon + AdamW"] = (False, heavyball_muon)
    found["MuonAdamW"] = (False, ours)
    if device == "cuda":
        found["MuonAdamW, compiled"] = (False, lambda parts: ours(parts, compile=True))
    elif getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        found["MuonAdamW, products in bfloat16"] = (False, lambda parts: ours(parts, polar_dtype="bfloat16"))
    rows: dict[str, Any] = {"second_moment": "row"}
    found["MuonAdamW, moments of tables by rows"] = (False, lambda parts: ours(parts, **rows))
    found["MuonAdamW, tables in bfloat16"] = (True, ours)
    found["the same, rounded by chance"] = (True, lambda parts: ours(parts, stochastic_rounding=True))
    found["the same, and moments by rows"] = (True, lambda parts: ours(parts, stochastic_rounding=True, **rows))
    return found


class Step:
    """A step that can be repeated; the first is done, so that all state exists.

    Attributes:
        changes: What the first did to each matrix, if that is to be compared.
    """

    def __init__(self, name: str, shape: Shape, device: str, *, compared: bool = True) -> None:
        bfloat16_tables, make = variants(device)[name]
        model, parts = model_parts(shape, device, bfloat16_tables=bfloat16_tables)
        before = {key: value.detach().clone() for key, value in parts.matrices} if compared else {}
        self.others = dict([*parts.tables, *parts.rest])
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        self.step = make(parts)
        self.device = device
        self()
        self.changes = {key: value.detach() - before[key] for key, value in parts.matrices if compared}

    def __call__(self) -> None:
        """Do it, on gradients that the one before may have dropped."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()


class Reference(NamedTuple):
    """What the first step of the baseline made of the parameters of AdamW, and what it did to each matrix."""

    others: dict[str, Tensor]
    changes: dict[str, Tensor]


def check_alike(name: str, step: Step, reference: Reference) -> None:
    """Stop unless two first steps changed the parameters alike, as far as their methods do."""
    for key, parameter in step.others.items():
        wanted = reference.others[key]
        other_method = parameter.dtype != wanted.dtype or ("rows" in name and "embedding" in key)
        if not other_method and not torch.allclose(parameter, wanted, rtol=1e-4, atol=2e-5):
            raise SystemExit(f"{name}: {key} is not what AdamW of torch makes of it")
    for key, change in step.changes.items():
        expected = reference.changes[key]
        if min(change.shape) < 16:
            continue  # in a few dimensions the last digits of a polynomial make a direction
        cosine = float((change * expected).sum() / (change.norm() * expected.norm()))
        ratio = float(change.norm() / expected.norm())
        if cosine < 0.9 or not 0.8 < ratio < 1.25:
            raise SystemExit(f"{name}: the change of {key} has cosine {cosine:.3f} with torch's, {ratio:.2f} its size")


def make_step(name: str, shape: Shape) -> Work:
    """Build for `peak_memory`, in a process of its own."""
    step = Step(name, shape, "cpu", compared=False)
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # forget what building took: the peak starts from what is in memory now
    return step


def extra_bytes(name: str, step: Step, shape: Shape) -> int | None:
    """Return what a step takes beyond what was there."""
    if step.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    used = peak_memory(make_step, name, shape)
    return None if used is None else max(0, used.peak - used.start)


def main() -> None:
    parser = arguments(__doc__ or "", rounds=7)
    parser.add_argument("--full", action="store_true", help="the documented 286 M model instead of a 4 x 512 one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse(parser)
    shape = (2, 128, 512) if args.quick else (12, 768, 32_768) if args.full else (4, 512, 8_192)
    names = list(variants(args.device))
    # In turns, as the load of a CPU comes and goes; a GPU has no other, and less room than all of them together take.
    groups = [[name] for name in names] if args.device == "cuda" else [names]
    reference: Reference | None = None
    seconds: dict[str, list[float]] = {}
    memory: dict[str, tuple[int | None, int]] = {}
    parameters = 0
    for group in groups:
        steps: dict[str, Step] = {}
        for name in group:
            steps[name] = step = Step(name, shape, args.device)
            if reference is None:
                others = {key: parameter.detach().clone() for key, parameter in step.others.items()}
                reference = Reference(others, step.changes)
            check_alike(name, step, reference)
            step.changes = {}
            parameters = sum(parameter.numel() for parameter, _ in step.gradients)
        seconds |= time_rounds(steps, args.rounds, warm=True)
        for name, step in steps.items():
            # A process for each is what takes long.
            left_out = args.quick and name not in (BASELINE, "MuonAdamW")
            stored = sum(parameter.nbytes for parameter, _ in step.gradients)
            memory[name] = None if left_out else extra_bytes(name, step, shape), stored
        del steps, step  # before the next group takes their place
    rows = timed_rows(seconds, baseline=BASELINE)
    for row in rows:
        extra, stored = memory[row["variant"]]
        row["extra_mib"] = None if extra is None else extra / MIB
        row["extra_fraction"] = None if extra is None else extra / stored
    name = "optimizer_step" + ("-cuda" if args.device == "cuda" else "")
    report(
        name + ("-full" if args.full and not args.quick else ""),
        {"layers": shape[0], "dim": shape[1], "vocab": shape[2], "parameters": parameters, "device": args.device},
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
