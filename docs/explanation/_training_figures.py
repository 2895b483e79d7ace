"""Pictures of what happens around the layers: loss, optimizer, packing, schedules."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import torch
from _drawing import BLUE, GRAY, GREEN, ORANGE, PURPLE, figure, panels
from matplotlib.figure import Figure
from torch import Tensor

from tinygpt.data import Overflow, Packer
from tinygpt.optim import muon_update, orthogonalize
from tinygpt.schedules import Schedule, cosine_weight_decay, muon_momentum, warmup_stable_decay

ROOT = Path(__file__).resolve().parents[2]


@figure
def loss_memory() -> Figure:
    measured = json.loads((ROOT / "benchmarks" / "results" / "loss.json").read_text("utf-8"))
    page, axes = panels(2, height=2.2, sharey=True)
    names = [row["variant"].replace("plain", "all logits at once") for row in measured["rows"]]
    colors = [ORANGE] + [BLUE] * (len(names) - 1)
    for one, key, title in zip(axes, ("extra_mib", "median_seconds"), ("extra memory, MiB", "seconds"), strict=True):
        one.barh(names, [row[key] for row in measured["rows"]], color=colors)
        one.set(title=title)
    axes[0].invert_yaxis()
    return page


def spread_matrix(values: Tensor, rows: int, cols: int) -> Tensor:
    """Return a matrix with these singular values and random directions."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, len(values)))[0] for n in (rows, cols))
    return u * values @ v.T


@figure
def polar_express() -> Figure:
    page, axes = panels(2)
    gradient = spread_matrix(torch.logspace(0, -3, 64), 64, 128)
    axes[0].semilogy(torch.linalg.svdvals(gradient), color=GRAY, label="gradient")
    for steps, color in ((1, GREEN), (3, PURPLE), (5, BLUE)):
        axes[0].semilogy(
            torch.linalg.svdvals(orthogonalize(gradient, steps=steps)), color=color, label=f"{steps} steps"
        )
    axes[0].set(xlabel="singular value, largest first", title="a 64 × 128 matrix")
    axes[0].legend(frameon=False, fontsize=8)
    given = torch.logspace(-5, -0.3, 200)
    for steps, color in ((1, GREEN), (3, PURPLE), (5, BLUE)):
        # One small value beside one that makes the norm: diag(s, sqrt(1 - s²)).
        pairs = torch.stack([torch.diag(torch.stack([s, (1 - s * s).sqrt()])) for s in given])
        axes[1].semilogx(given, orthogonalize(pairs, steps=steps)[:, 0, 0], color=color)
    axes[1].axvline(1e-3, color=GRAY, lw=0.8, ls="--")
    axes[1].set(xlabel="singular value / norm, before", ylabel="after", title="what becomes of it")
    return page


@figure
def normuon() -> Figure:
    torch.manual_seed(0)
    rows, cols = 48, 32
    spread = torch.logspace(-1.5, 0.5, rows)[torch.randperm(rows), None]
    weight, plain = torch.zeros(rows, cols), torch.zeros(rows, cols)
    momentum, second = torch.zeros(1, rows, cols), torch.zeros(1, rows, 1)
    for _ in range(200):
        before = weight.clone()
        gradient = spread * torch.randn(rows, cols)
        muon_update([weight], [gradient], momentum, second, lr=1.0, momentum=0.95, beta2=0.9, weight_decay=0.0)
        plain = orthogonalize(gradient.lerp(momentum[0], 0.95)) * (rows / cols) ** 0.5
    page, axes = panels(1)
    axes[0].plot(plain.square().mean(1).sqrt(), "o-", ms=3, lw=0.6, color=ORANGE, label="orthogonalized only")
    size = (weight - before).square().mean(1).sqrt()
    axes[0].plot(size, "o-", ms=3, lw=0.6, color=BLUE, label="and evened out (NorMuon)")
    axes[0].set(xlabel="row of a 48 × 32 matrix", ylabel="size of its update (RMS)", ylim=(0, None))
    axes[0].legend(frameon=False)
    return page


@figure
def best_fit() -> Figure:
    torch.manual_seed(3)
    lengths = torch.randn(60).mul(0.8).add(2.5).exp().int().clamp_min(2).tolist()
    colors = [mpl.colormaps["Set2"](n % 7) for n in range(len(lengths))]
    page, axes = panels(3, height=2.4)
    ways: tuple[Overflow, ...] = ("crop", "carry", "concat")
    for one, overflow in zip(axes, ways, strict=True):
        packer = Packer(row_tokens=32, bos_token_id=-2, buffer_documents=6, overflow=overflow)
        documents = iter([[number] * length for number, length in enumerate(lengths)])
        for y in range(10):
            row = packer.next_row(documents)
            assert row is not None
            x = 0
            for token, run in groupby(row.tolist()):
                width = len(list(run))
                one.barh(y, width, left=x, height=0.8, align="edge", color="#3d444d" if token == -2 else colors[token])
                x += width
        lost = packer.utilization.cropped_fraction
        one.set(title=f"{overflow}: {lost:.0%} lost", xticks=[], yticks=[])
        one.invert_yaxis()
        one.spines[:].set_visible(False)
    return page


@figure
def the_jump() -> Figure:
    page = Figure(figsize=(8, 6), layout="constrained")
    axes = page.subplots(4, 1, sharex=True, height_ratios=[1, 1, 1, 1.4])
    builders: tuple[tuple[str, Callable[[int], Schedule], float], ...] = (
        ("learning rate\n(of its base)", documented_lr, 1.0),
        ("weight decay", cosine_weight_decay, 0.099),
        ("momentum", muon_momentum, 1.0),
    )
    for one, (label, build, factor) in zip(axes, builders, strict=False):
        first, second = build(10_000), build(87_000)
        steps = range(0, 87_001, 50)
        planned = [factor * second(step) for step in steps]
        one.plot(steps, planned, color=BLUE, lw=1.4, ls=":", label="planned for 87,000 steps from the start")
        ran = [factor * (first(step) if step <= 10_000 else second(step)) for step in steps]
        one.plot(steps, ran, color=ORANGE, lw=1.2, label="what ran")
        one.set_ylabel(label)
    page.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=2)
    steps_seen = [10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 70_000, 80_000, 87_000]
    bpb = [0.9349, 1.0155, 1.0019, 0.9780, 0.9533, 0.9299, 0.9022, 0.8799, 0.8658]
    axes[3].plot(steps_seen, bpb, "o-", color=ORANGE, ms=4)
    axes[3].axhline(bpb[0], color=GRAY, lw=0.8, ls="--")
    axes[3].set(xlabel="step", ylabel="bits per byte\n(validation)")
    for one in axes:
        one.axvline(10_000, color=GRAY, lw=0.8)
        one.spines[["top", "right"]].set_visible(False)
    return page


def documented_lr(horizon: int) -> Schedule:
    """Return the learning rate's factor in the documented run."""
    return warmup_stable_decay(horizon, warmup_steps=40, decay_fraction=0.65, final=0.05)
