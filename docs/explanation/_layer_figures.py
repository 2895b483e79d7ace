"""Pictures of the layers."""

from collections.abc import Callable
from typing import Any

import torch
from _drawing import BLUE, GRAY, GREEN, ORANGE, PURPLE, figure, heatmap, panels
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt import GPT, GPTConfig
from tinygpt.layers import CausalSelfAttention, LMHead, RMSNorm, RotaryEmbedding, Smear, causal_attention


@figure
def rms_norm() -> Figure:
    torch.manual_seed(0)
    points = torch.randn(150, 2) * torch.tensor([1.5, 0.7]) + 0.3
    page, axes = panels(2, sharex=True, sharey=True)
    for one, shown, title in zip(axes, (points, RMSNorm(2)(points)), ("before", "after RMSNorm(2)"), strict=True):
        one.scatter(*shown.T, s=9, c=torch.atan2(points[:, 1], points[:, 0]), cmap="hsv")
        one.set(title=title, aspect="equal", xlabel="channel 0", ylabel="channel 1")
    return page


@figure
def smear() -> Figure:
    torch.manual_seed(0)
    mixed = Smear(32)
    with torch.no_grad():
        mixed.scale.fill_(1.0)
    page, axes = panels(2)
    for one, layer, title in zip(axes, (Smear(32), mixed), ("new: scale 0", "scale 1"), strict=True):
        x = torch.randn(1, 10, 32)
        reached = torch.autograd.functional.jacobian(layer, x)[0, :, :, 0].norm(dim=(1, 3))  # type: ignore[no-untyped-call]
        heatmap(one, reached / reached.max())
        one.set(title=title, xlabel="embedding of position", ylabel="reaches position")
    return page


@figure
def rotary() -> Figure:
    rope = RotaryEmbedding(128, 1024)
    page, axes = panels(3, width_ratios=[1, 1, 1.4])
    for pair, color in ((0, BLUE), (8, ORANGE), (16, GREEN)):
        unit = torch.zeros(1, 1, 9, 128)
        unit[..., pair] = 1.0
        turned = rope(unit)[0, 0]
        axes[0].plot(turned[:, pair], turned[:, pair + 64], "o-", color=color, ms=3, lw=0.7, label=f"pair {pair}")
    axes[0].set(title="positions 0 to 8", aspect="equal", xlabel="channel i", ylabel="channel i + 64")
    axes[0].legend(frameon=False, fontsize=7, loc="center")
    rope_cos: Tensor = rope.get_buffer("cos")
    axes[1].imshow(rope_cos.T.numpy(), aspect="auto", cmap="PuOr", extent=(0, 1024, 64, 0))
    axes[1].set(title="cosine of the angle", xlabel="position", ylabel="pair")
    ones = rope(torch.ones(1, 1, 1024, 128))[0, 0]
    axes[2].plot((ones @ ones[0]) / 128, color=BLUE, lw=1)
    axes[2].set(title="q · k of two equal vectors", xlabel="distance in tokens", ylabel="of the value at 0")
    axes[2].axhline(0, color=GRAY, lw=0.6)
    return page


@figure
def qk_norm() -> Figure:
    torch.manual_seed(0)
    page, axes = panels(2)
    x = torch.randn(1, 128, 128)
    grown = torch.logspace(0, 2, 15)
    for normed, color in ((False, ORANGE), (True, BLUE)):
        layer = CausalSelfAttention(128, 2, qk_norm=normed).requires_grad_(False)
        q, k = (project(x).view(1, 128, 2, 64).transpose(1, 2) for project in (layer.q_proj, layer.k_proj))
        effective = []
        for factor in grown:
            if normed:
                a, b = F.rms_norm(factor * q, (64,)), F.rms_norm(factor * k, (64,))
            else:
                a, b = factor * q, factor * k
            weights = (a[:, :, -1:] @ b.mT * layer.score_scale).softmax(-1)
            effective.append(float(torch.special.entr(weights).sum(-1).mean().exp()))
        axes[0].plot(grown, effective, color=color, label="with QK norm" if normed else "without")
    axes[0].set(xscale="log", ylim=(0, 128), xlabel="queries and keys grown by", ylabel="keys that are seen")
    axes[0].set_title("128 keys, random")
    counts = 2 ** torch.arange(3, 15)
    for factor, color in ((1.0, ORANGE), (1.2, BLUE)):
        axes[1].plot(counts, [match_weight(int(n), 64, factor) for n in counts], color=color, label=f"factor {factor}")
    axes[1].set(
        xscale="log",
        ylim=(0, 1.02),
        xlabel="keys to choose from",
        ylabel="weight on it",
        title="one key matches exactly",
    )
    for one in axes:
        one.legend(frameon=False)
    return page


def match_weight(num_keys: int, head_dim: int, factor: float) -> float:
    """Return the attention weight on the one key that equals the query; the others are random."""
    generator = torch.Generator().manual_seed(num_keys)
    k = F.rms_norm(torch.randn(1, 1, num_keys, head_dim, generator=generator), (head_dim,))
    chosen = torch.zeros(1, 1, num_keys, 1)
    chosen[..., -1, :] = 1.0
    scale = head_dim**-0.5 * factor**2
    return float(causal_attention(k[:, :, -1:], k, chosen, scale=scale))


@figure
def grouped_heads() -> Figure:
    page, axes = panels(1)
    contexts = [256, 512, 1024, 2048]
    for kv_heads, color in ((6, BLUE), (3, GREEN), (2, PURPLE), (1, ORANGE)):
        with torch.device("meta"):
            model = GPT.from_config(GPTConfig.from_depth(12, num_kv_heads=kv_heads))
            sizes = []
            for context in contexts:
                one = model.new_cache(1, max_seq_len=context).layers[0]
                k = torch.empty(1, kv_heads, context, 128)
                sizes.append(12 * sum(t.numel() * 2 for t in one.append(k, k)) / 2**20)
        axes[0].plot(contexts, sizes, "o-", color=color, ms=4, label=f"{kv_heads} key/value heads")
    axes[0].set(xlabel="tokens read", ylabel="MiB a row, bfloat16", xticks=contexts, ylim=(0, None))
    axes[0].legend(frameon=False)
    return page


@figure
def windows() -> Figure:
    torch.manual_seed(0)
    page, axes = panels(4)
    k = torch.randn(1, 1, 16, 8)
    for one, window in zip(axes[:2], (None, 4), strict=True):
        weights = causal_attention(k, k, torch.eye(16)[None, None], window_tokens=window)[0, 0]
        heatmap(one, (weights > 0).float())
        one.set(title="L: everything" if window is None else "S: window of 4", xlabel="key", ylabel="query")
    for one, depth in zip(axes[2:], (1, 3), strict=True):
        x = torch.randn(1, 24, 16, requires_grad=True)
        y = x
        for _ in range(depth):
            layer = CausalSelfAttention(16, 1, window_tokens=4)
            nn.init.eye_(layer.o_proj.weight)
            y = y + layer(y)
        reached = torch.autograd.grad(y[0, -1].sum(), x)[0][0].norm(dim=-1)
        one.bar(range(24), (reached > 0).int().tolist(), color=BLUE, width=0.8)
        one.set(title=f"reach of {depth} S layer" + "s" * (depth > 1), xlabel="position", yticks=[])
    return page


@figure
def value_embeddings() -> Figure:
    with torch.device("meta"):
        model = GPT.from_config(GPTConfig.from_depth(12))
    counts = model.num_parameters()
    head = 6 * counts.head
    inside = 6 * (sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) - counts.head)
    attending = model.flops_per_token() - head - inside
    shares = [
        ("value embeddings", counts.value_embeddings, 0, ORANGE),
        ("token embedding", counts.token_embedding, 0, PURPLE),
        ("head", counts.head, head, GREEN),
        ("matrices of the blocks", counts.matrices, inside, BLUE),
        ("attention scores", 0, attending, GRAY),
    ]
    page, axes = panels(1, height=2.2)
    left = [0.0, 0.0]
    for label, parameters, flops, color in shares:
        widths = [parameters / counts.total, flops / model.flops_per_token()]
        axes[0].barh([1, 0], widths, left=left, color=color, label=label, height=0.6)
        for height, start, width in zip((1, 0), left, widths, strict=True):
            if width > 0.04:
                axes[0].text(start + width / 2, height, f"{width:.0%}", ha="center", va="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes[0].set_yticks([1, 0], ["parameters", "FLOPs a token"])
    axes[0].set(xticks=[], xlim=(0, 1))
    axes[0].spines[["bottom", "left"]].set_visible(False)
    page.legend(frameon=False, loc="outside lower center", ncols=3)
    return page


@figure
def mlp() -> Figure:
    page, axes = panels(2)
    curves: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
        ("relu", F.relu, GRAY),
        ("relu²", lambda x: F.relu(x).square(), BLUE),
        ("gelu", F.gelu, ORANGE),
        ("silu", F.silu, GREEN),
    )
    for label, function, color in curves:
        x = torch.linspace(-3, 2, 400, requires_grad=True)
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        axes[0].plot(x.detach(), y.detach(), color=color, label=label)
        axes[1].plot(x.detach(), slope, color=color)
    axes[0].set(title="activation", xlabel="x", ylim=(-0.5, 3))
    axes[1].set(title="its slope", xlabel="x", ylim=(-0.5, 3))
    axes[0].legend(frameon=False)
    return page


class Writes(nn.Module):
    """A feed-forward layer that writes a fixed vector into the stream."""

    def __init__(self, dim: int, channel: int | None) -> None:
        super().__init__()
        self.register_buffer("vector", torch.zeros(dim) if channel is None else torch.eye(dim)[channel])

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("vector").expand_as(x)


@figure
def residual() -> Figure:
    page, axes = panels(1, height=3)
    kinds: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("plain residual stream", {"residual_scales": False, "x0_scales": False, "backout": False}, GRAY),
        ("with lambdas", {"backout": False}, ORANGE),
        ("with lambdas and backout", {}, BLUE),
    )
    for number, (label, fields, color) in enumerate(kinds):
        heights = [stream_share(layer, fields) for layer in range(-1, 12)]
        places = [layer + 0.27 * (number - 1) for layer in range(-1, 12)]
        axes[0].bar(places, heights, width=0.25, color=color, label=label)
    axes[0].set_xticks(range(-1, 12), ["x0", *map(str, range(12))])
    axes[0].set(xlabel="written by: the embedding, then blocks 0 to 11", ylabel="factor in the last stream")
    axes[0].legend(frameon=False)
    return page


def stream_share(layer: int, fields: dict[str, Any]) -> float:
    """Return the factor with which what this block wrote arrives at the end of a new 12-layer model; -1 is x0."""
    small = GPTConfig(vocab_size=64, max_seq_len=8, dim=64, num_heads=1, value_embeddings=False, **fields)
    model = GPT.from_config(small, mlp=lambda config, index: Writes(config.dim, 5 if index == layer else None))
    model.embedding_norm, model.smear, model.final_norm = None, None, None
    nn.init.constant_(model.get_parameter("embedding.weight"), float(layer == -1))
    return model.hidden_states(torch.tensor([[1]]))[0, 0, 5].item()


@figure
def soft_cap() -> Figure:
    page, axes = panels(2)
    logits = torch.linspace(-60, 60, 400, requires_grad=True)
    head = LMHead(1, 1)
    with torch.no_grad():
        head.weight.fill_(1.0)
    capped = head(logits[:, None])[:, 0]
    (slope,) = torch.autograd.grad(capped.sum(), logits)
    axes[0].plot(logits.detach(), logits.detach(), color=GRAY, lw=0.8, ls="--", label="no cap")
    axes[0].plot(logits.detach(), capped.detach(), color=BLUE, label="15 tanh(z / 15)")
    axes[0].set(ylim=(-25, 25), xlabel="logit z", ylabel="capped logit")
    axes[0].legend(frameon=False)
    axes[1].plot(logits.detach(), slope, color=BLUE)
    axes[1].set(xlabel="logit z", ylabel="share of the gradient that passes", ylim=(0, 1.05))
    return page
