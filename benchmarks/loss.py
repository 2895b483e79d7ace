"""What does the chunked loss of `LMHead` cost in time and save in memory, and which chunk is best here?

Forward and backward of the soft-capped cross-entropy, with gradients for the hidden states and the head. The plain
formula is `F.cross_entropy(cap * tanh(x @ w.T / cap), targets)` with all logits at once.
"""

from collections.abc import Callable

import torch
from _measure import arguments, mib_text, parse, peak_memory, report, seconds_text, time_rounds, timed_rows
from torch import Tensor
from torch.nn import functional as F

from tinygpt.layers import LMHead

CAP = 15.0
Step = Callable[[], tuple[Tensor, ...]]


def inputs(tokens: int, dim: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states as a norm leaves them, a head with logits of spread about 3, and targets."""
    generator = torch.Generator().manual_seed(0)
    x = F.rms_norm(torch.randn(1, tokens, dim, generator=generator), (dim,)).requires_grad_()
    weight = 3 * dim**-0.5 * torch.randn(vocab, dim, generator=generator)
    return x, weight, torch.randint(vocab, (1, tokens), generator=generator)


def plain(tokens: int, dim: int, vocab: int) -> Step:
    """Return a step of the plain formula; it returns the loss and the two gradients."""
    x, weight, targets = inputs(tokens, dim, vocab)
    weight.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        logits = CAP * torch.tanh(F.linear(x, weight) / CAP)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))

    return step


def chunked(tokens: int, dim: int, vocab: int, chunk: int) -> Step:
    """Return the same step through `LMHead.loss` in chunks of so many tokens."""
    x, weight, targets = inputs(tokens, dim, vocab)
    head = LMHead(dim, vocab, soft_cap=CAP, chunk_tokens=chunk)
    with torch.no_grad():
        head.weight.copy_(weight)

    def step() -> tuple[Tensor, ...]:
        loss, _ = head.loss(x, targets)
        return loss.detach(), *torch.autograd.grad(loss, (x, head.weight))

    return step


def main() -> None:
    parser = arguments(__doc__ or "", rounds=5)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in the batch (default 2048)")
    parser.add_argument("--dim", type=int, default=256, help="width of the hidden states (default 256)")
    parser.add_argument("--vocab", type=int, default=32_768, help="size of the vocabulary (default 32768)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="tokens a chunk")
    args = parse(parser)
    tokens, dim, vocab = (64, 16, 512) if args.quick else (args.tokens, args.dim, args.vocab)
    chunks = [16] if args.quick else args.chunks
    variants = {"plain": plain(tokens, dim, vocab)}
    variants |= {f"LMHead, chunk {chunk}": chunked(tokens, dim, vocab, chunk) for chunk in chunks}
    expected = variants["plain"]()
    for step in variants.values():  # what is compared must be the same thing
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)
    rows = timed_rows(time_rounds(variants, args.rounds, warm=True), baseline="plain")
    memory = [peak_memory(plain, tokens, dim, vocab)]
    memory += [peak_memory(chunked, tokens, dim, vocab, chunk) for chunk in chunks]
    for row, used in zip(rows, memory, strict=True):
        row["extra_mib"] = None if used is None else used.extra_mib
    report(
        "loss",
        {"tokens": tokens, "dim": dim, "vocab": vocab},
        rows,
        {
            "forward + backward": seconds_text,
            "x speed of plain": lambda row: f"{row['speed']:.2f}",
            "extra MiB": lambda row: mib_text(row["extra_mib"]),
        },
        args,
    )
    best = max(rows[1:], key=lambda row: row["speed"])
    print(f"fastest: {best['variant']}, {best['speed']:.2f} times the speed of the plain formula\n")


if __name__ == "__main__":
    main()
