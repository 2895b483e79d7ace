"""How fast does an engine write, against `generate` of transformers and litgpt on a model of the same size?

The model is that of the documented run, 286 M parameters with random weights; 110 M of them lie in matrices that are
read for every token. The peers get Llamas with as many there, and none of our value embeddings, windows or gates. All
read a prompt a row and then take the most likely token, with a cache, in float32 unless the name says otherwise.
A second table shows the time of a token against its position, a third what fewer bytes a weight cost in bits per byte,
measured on a small model trained here on the embedded book.

transformers and litgpt are not needed; without them their rows are left out. litgpt asks for older versions of what we
use: `pip install --no-deps litgpt lightning lightning-utilities torchmetrics litdata` is enough for this script.
"""

import argparse
import gc
import importlib
import time
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from _measure import Row, Work, arguments, parse, report, seconds_text, time_rounds, timed_rows
from _peers import litgpt_llama, transformers_llama
from torch import Tensor

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, ValidationSet, embedded_corpus
from tinygpt.evals import evaluate_bpb
from tinygpt.generate import Engine, GenerationConfig, generate_batch, reading_copy
from tinygpt.generate._weights import Weights
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer

OURS = "tinygpt"
COPIES: tuple[Weights, ...] = get_args(Weights)


class Writer:
    """Writes texts again and again, and notes the time to the first token and that of the others."""

    def __init__(self, write: Callable[[Callable[[], None]], object]) -> None:
        self._write = write
        self.first: list[float] = []
        self.rest: list[float] = []

    def __call__(self) -> None:
        """Write once; `write` calls what it is given whenever all rows have one token more."""
        ticks = [time.perf_counter()]
        self._write(lambda: ticks.append(time.perf_counter()))
        self.first.append(ticks[1] - ticks[0])
        self.rest.append(ticks[-1] - ticks[1])


def ours(model: GPT, prompts: Tensor, new: int, *, shared: bool = False) -> Writer:
    """Return a writer with an engine; `shared` takes the first prompt for all rows."""
    rows, length = prompts.shape
    engine = Engine(model, num_slots=rows, max_seq_len=length + new)
    config = GenerationConfig(max_new_tokens=new, temperature=0.0)

    def write(tick: Callable[[], None]) -> None:
        if shared:
            engine.add(prompts[0].tolist(), config, num_samples=rows)
        else:
            for prompt in prompts.tolist():
                engine.add(prompt, config)
        while engine.has_work:
            engine.step()
            tick()

    return Writer(write)


def transformers_writer(config: GPTConfig, prompts: Tensor, new: int) -> Writer | None:
    """Return a writer with `generate` of transformers, if that is installed."""
    torch.manual_seed(0)
    model: Any = transformers_llama(config)
    if model is None:
        return None
    model.eval()
    library: Any = importlib.import_module("transformers")

    class Clock(library.StoppingCriteria):  # type: ignore[misc]
        def __init__(self, tick: Callable[[], None]) -> None:
            self.tick = tick

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            self.tick()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def write(tick: Callable[[], None]) -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=library.StoppingCriteriaList([Clock(tick)]),
        )

    return Writer(write)


def litgpt_writer(config: GPTConfig, prompts: Tensor, new: int) -> Writer | None:
    """Return a writer with litgpt's model and cache, if that is installed, in the loop of its own `generate`."""
    torch.manual_seed(0)
    model = litgpt_llama(config)
    if model is None:
        return None
    rows, length = prompts.shape
    model.eval()
    model.max_seq_length = length + new
    model.set_kv_cache(batch_size=rows)

    @torch.inference_mode()
    def write(tick: Callable[[], None]) -> None:
        tokens, places = prompts, torch.arange(length)
        for step in range(new):
            tokens = model(tokens, places)[:, -1:].argmax(dim=-1)
            places = torch.tensor([length + step])
            tick()

    return Writer(write)


def speed_rows(model: GPT, copies: dict[str, GPT], rows: int, args: argparse.Namespace) -> list[Row]:
    """Time all writers at one batch size, in turns."""
    assert model.config is not None
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(model.config.vocab_size, (rows, args.prompt), generator=generator)
    writers: dict[str, Writer | None] = {OURS: ours(model, prompts, args.new)}
    if rows > 1:
        writers[f"{OURS}, one prompt"] = ours(model, prompts, args.new, shared=True)
    for name, copy in copies.items():
        writers[f"{OURS}, {name} copy"] = ours(copy, prompts, args.new)
    writers["transformers"] = transformers_writer(model.config, prompts, args.new)
    writers["litgpt"] = litgpt_writer(model.config, prompts, args.new)
    found = {f"batch {rows}, {name}": writer for name, writer in writers.items() if writer is not None}
    gc.freeze()  # the libraries hold a million objects, which each collection between two runs would go through
    time_rounds(dict(found), args.rounds)
    # The unmeasured run came first.
    result = timed_rows({name: writer.rest[1:] for name, writer in found.items()}, baseline=f"batch {rows}, {OURS}")
    for row, writer in zip(result, found.values(), strict=True):
        row["tokens_per_second"] = rows * (args.new - 1) / row["median_seconds"]
        row["first_token_seconds"] = float(np.median(writer.first[1:]))
    return result


def position_rows(config: GPTConfig, args: argparse.Namespace) -> tuple[list[Row], int]:
    """Time steps at several positions of two models, one with windows in three of four layers."""
    window, steps = config.max_seq_len // 8, 8
    positions = [config.max_seq_len * part // 8 for part in (1, 2, 4, 7)]
    variants: dict[str, Work] = {}
    for name, pattern in (("full attention", "L"), ("windows", "SSSL")):
        torch.manual_seed(0)
        model = GPT.from_config(config.replace(window_pattern=pattern, short_window_tokens=window)).eval()
        for position in positions:
            engine = Engine(model, num_slots=1, max_seq_len=config.max_seq_len)
            prompt = [1] * (position - steps // 2)
            engine.add(prompt, GenerationConfig(max_new_tokens=config.max_seq_len - len(prompt), temperature=0.0))
            engine.step()
            variants[f"{name}, position {position}"] = _steps(engine, steps)
    # Each round goes on where the one before ended: a few positions more, of a prompt many times as long.
    rows = timed_rows(time_rounds(variants, args.rounds), baseline=f"full attention, position {positions[0]}")
    for row in rows:
        row["milliseconds_per_token"] = 1e3 * row["median_seconds"] / steps
    return rows, window


def _steps(engine: Engine, steps: int) -> Work:
    def work() -> None:
        for _ in range(steps):
            engine.step()

    return work


def weight_rows(args: argparse.Namespace) -> tuple[list[Row], GPTConfig]:
    """Train a small model and measure bits per byte of its copies."""
    tokenizer = ByteTokenizer()
    depth, seq_len, steps = (2, 64, 4) if args.quick else (4, 256, args.steps)
    config = GPTConfig.from_depth(depth, head_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=seq_len)
    torch.manual_seed(0)
    model = GPT.from_config(config)
    loader = BatchLoader(embedded_corpus(), tokenizer, rows=8, seq_len=seq_len, overflow="carry")
    schedule = warmup_stable_decay(steps, warmup_steps=min(20, steps // 4), decay_fraction=0.5)
    optimizer = MuonAdamW.for_model(model, adamw_lr=0.003)
    Trainer(model, optimizer, loader, TrainerConfig(num_steps=steps), schedules={"lr": schedule}).fit()
    corpus = embedded_corpus("validation")
    tokens = 2_000 if args.quick else 60_000
    validation = ValidationSet.from_source(corpus, tokenizer, rows=8, seq_len=seq_len, max_tokens=tokens)
    models = {OURS: model, **{f"{OURS}, {name} copy": reading_copy(model, name) for name in COPIES}}
    rows = timed_rows(
        time_rounds({name: _evaluation(copy, validation) for name, copy in models.items()}, args.rounds), baseline=OURS
    )
    for row, copy in zip(rows, models.values(), strict=True):
        row["bpb"] = evaluate_bpb(copy, validation).bpb
        row["bpb_cost"] = row["bpb"] - rows[0]["bpb"]
    return rows, config


def _evaluation(model: GPT, validation: ValidationSet) -> Work:
    return lambda: evaluate_bpb(model, validation)


def check(model: GPT, copies: dict[str, GPT], prompt: int) -> None:
    """Refuse to compare unless the float32 copy writes what the model writes."""
    config = GenerationConfig(max_new_tokens=8, temperature=0.0, logprobs=0)
    texts = [
        generate_batch(Engine(m, num_slots=1, max_seq_len=prompt + 8), [[1] * prompt], config)[0][0]
        for m in (model, copies["float32"])
    ]
    for mine, other in zip(texts[0].logprobs or [], texts[1].logprobs or [], strict=True):
        error = abs(mine.logprob - other.logprob)
        assert error < 1e-3, f"a log-probability of the float32 copy differs by {error:.1e}"


def summary(rows: list[Row]) -> None:
    """Print the comparisons that were asked for."""
    speeds = {row["variant"]: row["tokens_per_second"] for row in rows}
    for batch in sorted({name.partition(",")[0] for name in speeds}, key=lambda name: int(name.split()[1])):
        peers = {name: speeds[key] for name in ("transformers", "litgpt") if (key := f"{batch}, {name}") in speeds}
        if not peers:
            print(f"{batch}: no peer is installed")
            continue
        best = max(peers, key=lambda name: peers[name])
        mine = {name: speed for name, speed in speeds.items() if name.startswith(f"{batch}, {OURS}")}
        ratios = ", ".join(f"{name.partition(', ')[2]} {speed / peers[best]:.2f}" for name, speed in mine.items())
        print(f"{batch}, tokens/s over {best}'s: {ratios}")
    print()


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16], help="rows at a time (default 1 8 16)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (default 512)")
    parser.add_argument("--new", type=int, default=128, help="tokens to write (default 128)")
    parser.add_argument("--depth", type=int, default=12, help="layers; 64 wide each (default 12, the 286 M model)")
    parser.add_argument("--steps", type=int, default=300, help="to train the small model for (default 300)")
    args = parse(parser)
    config = GPTConfig.from_depth(args.depth)
    if args.quick:
        args.batches, args.prompt, args.new = [1, 2], 24, 4
        config = GPTConfig(num_layers=2, dim=96, num_heads=2, vocab_size=512, max_seq_len=128)
    torch.manual_seed(0)
    model = GPT.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a new model's zero projections would hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    copies: dict[str, GPT] = {name: reading_copy(model, name) for name in COPIES}
    check(model, copies, args.prompt)
    rows = [row for batch in args.batches for row in speed_rows(model, copies, batch, args)]
    report(
        "decode",
        {"parameters": model.num_parameters().total, "prompt": args.prompt, "new tokens": args.new},
        rows,
        {
            "first token": lambda row: f"{row['first_token_seconds']:.3f} s",
            "the others": seconds_text,
            "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
            "x speed of own weights": lambda row: f"{row['speed']:.2f}",
        },
        args,
    )
    summary(rows)
    del model, copies
    rows, window = position_rows(config, args)
    report(
        "decode_position",
        {"windows": f"{window} tokens in three of four layers", "context": config.max_seq_len},
        rows,
        {
            "ms a token": lambda row: f"{row['milliseconds_per_token']:.1f}",
            "x speed of the first": lambda row: f"{row['speed']:.2f}",
        },
        args,
    )
    rows, small = weight_rows(args)
    report(
        "decode_weights",
        {"layers": small.num_layers, "dim": small.dim, "trained steps": 4 if args.quick else args.steps},
        rows,
        {
            "bits per byte": lambda row: f"{row['bpb']:.4f}",
            "cost": lambda row: f"{row['bpb_cost']:+.4f}",
            "time to evaluate": seconds_text,
        },
        args,
    )


if __name__ == "__main__":
    main()
