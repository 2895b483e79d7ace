"""How fast and how lean is a training step against the same architecture in plain PyTorch?

`PlainGPT` below is written straight from the formulas: masks for windows, full logits, `F.cross_entropy`. It starts
from our weights, and loss and gradients are compared before anything is timed. Both train in float32. Our model takes
`MuonAdamW`; the plain one takes the same Muon as a Python loop over parameters and `torch.optim.AdamW` as it comes.
Memory is that of a process that does nothing else: its peak, and the part of it above what was there before the model.

A second table compares forward and backward with other libraries' models of the same size, the mean loss over all
targets as each takes it. They lack our value embeddings, gates and soft cap; "tinygpt, as they are" is our blocks put
together as theirs.

transformers, litgpt and x-transformers are not needed; without them their rows are left out. litgpt asks for older
versions of what we use: `pip install transformers x-transformers` and
`pip install --no-deps litgpt lightning lightning-utilities torchmetrics litdata` are enough for this script.
"""

import argparse
import gc
import time

import torch
from _measure import (
    MIB,
    Row,
    Work,
    arguments,
    mib_text,
    parse,
    peak_memory,
    report,
    seconds_text,
    time_rounds,
    timed_rows,
)
from _peers import PEERS, library, tinygpt_llama
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt import GPT, GPTConfig
from tinygpt.data import Batch
from tinygpt.losses import next_token_loss
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

# Polar Express: (a, b, c) of each iteration, as in its paper with the safety factor.
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class PlainBlock(nn.Module):
    """One layer, with the parameter names of ours."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.num_heads
        self.attention = nn.ModuleDict({f"{n}_proj": nn.Linear(dim, dim, bias=False) for n in "qkvo"})
        if config.has_value_embedding(layer):
            self.attention["value_embedding"] = nn.Embedding(config.padded_vocab_size, dim)
            self.attention["value_gate"] = nn.Linear(12, config.num_heads, bias=False)
        hidden = 4 * dim
        up, down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.mlp = nn.ModuleDict({"up_proj": up, "down_proj": down})
        self.residual_scale = nn.Parameter(torch.ones(1))
        self.x0_scale = nn.Parameter(torch.ones(1))
        self.mask: Tensor | None = None
        window = config.window_tokens(layer)
        if window is not None:
            distance = torch.arange(config.max_seq_len)[:, None] - torch.arange(config.max_seq_len)
            self.mask = (distance >= 0) & (distance <= window)

    def forward(self, x: Tensor, x0: Tensor, token_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer: `(batch, seq, dim)` -> same shape."""
        x = self.residual_scale * x + self.x0_scale * x0
        batch, seq, dim = x.shape
        normed = norm(x)
        q, k, v = (self.attention[f"{n}_proj"](normed).view(batch, seq, self.heads, -1) for n in "qkv")
        if "value_embedding" in self.attention:
            gate = 3 * torch.sigmoid(self.attention["value_gate"](normed[..., :12]))
            v = v + gate[..., None] * self.attention["value_embedding"](token_ids).view_as(v)
        q, k = (1.2 * norm(rotate(t, cos, sin)).transpose(1, 2) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=self.mask, is_causal=self.mask is None)
        x = x + self.attention["o_proj"](y.transpose(1, 2).reshape(batch, seq, dim))
        return x + self.mlp["down_proj"](F.relu(self.mlp["up_proj"](norm(x))) ** 2)


class PlainSmear(nn.Module):
    """A share of each token's predecessor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(24, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix: `(batch, seq, dim)` -> same shape."""
        gate = torch.sigmoid(self.gate(x[:, 1:, :24]))
        return torch.cat((x[:, :1], x[:, 1:] + self.scale * gate * x[:, :-1]), dim=1)


class PlainGPT(nn.Module):
    """The architecture of the documented run."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.cap = config.soft_cap or 0.0
        self.embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.smear = PlainSmear()
        self.blocks = nn.ModuleList(PlainBlock(config, layer) for layer in range(config.num_layers))
        self.backout = nn.ParameterDict({"scale": nn.Parameter(torch.ones(1))})
        self.head = nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        turns = config.rope_base ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_seq_len), turns)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", -angles.sin()[:, None], persistent=False)

    def forward(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of the targets, both `(batch, seq)`."""
        x = norm(self.embedding(token_ids))
        x0 = middle = x = self.smear(x)
        for index, block in enumerate(self.blocks):
            x = block(x, x0, token_ids, self.cos, self.sin)
            middle = x if index == len(self.blocks) // 2 else middle
        logits = self.head(norm(x - self.backout["scale"] * middle))
        logits = self.cap * torch.tanh(logits / self.cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class PlainMuon:
    """Muon with variance reduction and cautious decay, one matrix after the other."""

    def __init__(self, params: list[Tensor], *, lr: float, momentum: float, beta2: float, weight_decay: float) -> None:
        self.params, self.lr, self.momentum, self.beta2, self.decay = params, lr, momentum, beta2, weight_decay
        self.buffers = [torch.zeros_like(p) for p in params]
        self.moments = [
            torch.zeros(p.shape[0], 1) if len(p) >= p.shape[1] else torch.zeros(1, p.shape[1]) for p in params
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix."""
        for param, buffer, moment in zip(self.params, self.buffers, self.moments, strict=True):
            assert param.grad is not None
            buffer.lerp_(param.grad, 1 - self.momentum)
            x = param.grad.lerp(buffer, self.momentum)
            x = x / (1.01 * x.norm() + 1e-6)
            tall = x.shape[0] > x.shape[1]
            for a, b, c in POLAR:
                gram = x.T @ x if tall else x @ x.T
                poly = b * gram + c * gram @ gram
                x = a * x + (x @ poly if tall else poly @ x)
            axis = 1 if moment.shape[1] == 1 else 0
            moment.lerp_(x.square().mean(axis, keepdim=True), 1 - self.beta2)
            scaled = x / moment.clamp_min(1e-10).sqrt()
            x = scaled * (x.norm() / scaled.norm().clamp_min(1e-10))
            decay = self.decay * param * ((param * x) >= 0)
            param -= self.lr * max(1, param.shape[0] / param.shape[1]) ** 0.5 * (x + decay)


class Run:
    """A model, its optimizer and one batch; `step` takes a training step and notes the time of its two halves."""

    def __init__(self, kind: str, config: GPTConfig, rows: int) -> None:
        torch.manual_seed(0)
        model = GPT.from_config(config)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(config.vocab_size, (rows, config.max_seq_len + 1), generator=generator)
        with torch.no_grad():
            for parameter in model.parameters():  # a new model's zero projections would hide mistakes
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        self.batch = Batch.from_rows(tokens, bos_token_id=0)
        self.halves: list[tuple[float, float]] = []
        groups = param_groups(model, nanochat_rules(model_dim=config.dim))
        if kind == "tinygpt":
            self.model: nn.Module = model
            self.optimizers: list[MuonAdamW | PlainMuon | torch.optim.Optimizer] = [MuonAdamW(groups)]
            return
        self.model = PlainGPT(config)
        self.model.load_state_dict(model.state_dict())
        named = dict(self.model.named_parameters())
        self.optimizers = []
        adamw = []
        for group in groups:
            params = [named[name] for name, _ in group["params"]]
            if group["kind"] == "muon":
                options = {key: group[key] for key in ("lr", "momentum", "beta2", "weight_decay")}
                self.optimizers.append(PlainMuon(list(params), **options))
            else:
                adamw.append({"params": params} | {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})
        self.optimizers.append(torch.optim.AdamW(adamw))

    def loss(self) -> Tensor:
        """Return the mean loss of the batch."""
        if isinstance(self.model, PlainGPT):
            return self.model(self.batch.inputs, self.batch.targets)
        return next_token_loss(self.model, self.batch).total / self.batch.targets.numel()

    def step(self) -> None:
        """Take one training step."""
        start = time.perf_counter()
        self.model.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        middle = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        self.halves.append((middle - start, time.perf_counter() - middle))


def check(ours: Run, plain: Run) -> None:
    """Refuse to compare unless loss, gradients and the first update agree to rounding."""
    losses = [run.loss() for run in (ours, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    for run in (ours, plain):
        run.step()
    for (name, mine), (twin, other) in zip(_by_name(ours), _by_name(plain), strict=True):
        assert name == twin
        assert mine.grad is not None
        assert other.grad is not None
        for kind, a, b in (("gradient", mine.grad, other.grad), ("update", mine - before[name], other - before[name])):
            error = ((a - b).norm() / b.norm()).item()
            assert error < 1e-2, f"the {kind} of {name} differs by {error:.1e}: the plain model is not the same model"


def _by_name(run: Run) -> list[tuple[str, nn.Parameter]]:
    return sorted(run.model.named_parameters(), key=lambda pair: pair[0])


def two_steps(kind: str, config: GPTConfig, rows: int, with_optimizer: bool) -> Work:
    """Return work that builds a run and takes two steps, so that all memory of training counts as extra."""

    def work() -> None:
        run = Run(kind, config, rows)
        if not with_optimizer:
            run.optimizers.clear()
        run.step()
        run.step()

    return work


def peer_step(name: str, config: GPTConfig, rows: int) -> Work | None:
    """Return forward and backward of one batch through a model by name; `None` if its library is not installed."""
    torch.manual_seed(0)
    if name in PEERS:
        model = PEERS[name](config)
    else:
        model = GPT.from_config(config) if name == "tinygpt" else tinygpt_llama(config)
    if model is None:
        return None
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (rows, config.max_seq_len + 1), generator=generator)
    batch = Batch.from_rows(tokens, bos_token_id=0)

    def step() -> None:
        model.zero_grad()
        if isinstance(model, GPT):
            loss = next_token_loss(model, batch).total / batch.targets.numel()
        else:
            output = model(batch.inputs)
            logits = getattr(output, "logits", output)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]

    return step


def two_peer_steps(name: str, config: GPTConfig, rows: int) -> Work:
    """Return work that builds a model and takes two steps without an optimizer; its library is imported before."""
    library(name.replace("-", "_"))

    def work() -> None:
        step = peer_step(name, config, rows)
        assert step is not None
        step()
        step()

    return work


def compare_peers(config: GPTConfig, rows: int, args: argparse.Namespace) -> None:
    """Time forward and backward against other libraries and print the second table."""
    names = ["tinygpt", "tinygpt, as they are", *PEERS]
    steps = {name: step for name in names if (step := peer_step(name, config, rows)) is not None}
    gc.freeze()  # the libraries hold a million objects, which each collection between two runs would go through
    table = timed_rows(time_rounds(steps, args.rounds), baseline="tinygpt")
    steps.clear()
    for row in table:
        used = peak_memory(two_peer_steps, row["variant"], config, rows)
        row["tokens_per_second"] = rows * config.max_seq_len / row["median_seconds"]
        row["peak_mib"] = None if used is None else used.peak / MIB
        row["extra_mib"] = None if used is None else used.extra_mib
    report(
        "training_step_peers",
        {"layers": config.num_layers, "dim": config.dim, "batch": f"{rows} x {config.max_seq_len}"},
        table,
        {
            "forward + backward": seconds_text,
            "x speed of tinygpt": lambda row: f"{row['speed']:.2f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "peak MiB": lambda row: mib_text(row["peak_mib"]),
            "above start": lambda row: mib_text(row["extra_mib"]),
        },
        args,
    )


def main() -> None:
    parser = arguments(__doc__ or "", rounds=9)
    parser.add_argument("--window-pattern", default="L", help="L for full attention, S for a window (default L)")
    parser.add_argument("--layers", type=int, default=4, help="(default 4)")
    parser.add_argument("--dim", type=int, default=256, help="(default 256)")
    parser.add_argument("--vocab", type=int, default=32_768, help="(default 32768)")
    parser.add_argument("--rows", type=int, default=4, help="sequences in the batch (default 4)")
    parser.add_argument("--seq", type=int, default=512, help="tokens in a sequence (default 512)")
    args = parse(parser)
    layers, dim, vocab, rows, seq = args.layers, args.dim, args.vocab, args.rows, args.seq
    if args.quick:
        layers, dim, vocab, rows, seq = 3, 64, 512, 2, 32  # three: norm hides the backout of two
    config = GPTConfig(
        num_layers=layers,
        dim=dim,
        num_heads=max(1, dim // 128),
        vocab_size=vocab,
        max_seq_len=seq,
        window_pattern=args.window_pattern,
    )
    runs = {kind: Run(kind, config, rows) for kind in ("plain PyTorch", "tinygpt")}
    check(runs["tinygpt"], runs["plain PyTorch"])
    for run in runs.values():
        run.halves.clear()
    time_rounds({kind: run.step for kind, run in runs.items()}, args.rounds, warm=True)
    result: list[Row] = []
    for part, name in enumerate(("forward + backward", "optimizer", "whole step")):
        seconds = {
            f"{name}, {kind}": [sum(halves) if part == 2 else halves[part] for halves in run.halves]
            for kind, run in runs.items()
        }
        result += timed_rows(seconds, baseline=f"{name}, plain PyTorch")
    runs.clear()
    memory = [
        peak_memory(two_steps, kind, config, rows, with_optimizer)
        for with_optimizer in (False, True)
        for kind in ("plain PyTorch", "tinygpt")
    ]
    for row, used in zip(result[:2] + result[-2:], memory, strict=True):
        row["tokens_per_second"] = rows * seq / row["median_seconds"]
        row["peak_mib"] = None if used is None else used.peak / MIB
        row["extra_mib"] = None if used is None else used.extra_mib
    report(
        "training_step",
        {"layers": layers, "dim": dim, "vocab": vocab, "batch": f"{rows} x {seq}", "windows": args.window_pattern},
        result,
        {
            "time": seconds_text,
            "x speed of plain": lambda row: f"{row['speed']:.2f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
            "peak MiB": lambda row: mib_text(row["peak_mib"]) if "peak_mib" in row else "",
            "above start": lambda row: mib_text(row["extra_mib"]) if "extra_mib" in row else "",
        },
        args,
    )
    for what, plain, ours in (("forward and backward", *memory[:2]), ("whole step", *memory[2:])):
        if plain and ours:
            ratios = [getattr(ours, name) / getattr(plain, name) for name in ("peak", "extra_mib")]
            print(
                f"memory of tinygpt / plain, {what}: {ratios[0]:.2f} at the peak, {ratios[1]:.2f} on top of the start"
            )
    compare_peers(config, rows, args)


if __name__ == "__main__":
    main()
