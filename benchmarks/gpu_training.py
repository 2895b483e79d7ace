"""How fast and how lean is training on a GPU, against plain PyTorch, and over batch, context and depth?

Every case runs in a process of its own, which trains real steps on random tokens and reports time, tokens/s, share of
the GPU's peak (MFU) and `torch.cuda.max_memory_allocated`. The plain case is `PlainGPT` of `training_step.py`, the same
architecture through SDPA, all logits at once, `torch.autocast` in bfloat16, whole-model `torch.compile`,
`torch.optim.Muon` and fused AdamW. `--parts` chooses tables:

- variants: the documented model, plain and with our options, at `--rows` x `--seq`;
- fp8: products in eight and in sixteen bits at depth 20, where they are large enough to gain;
- batch, context, depth: the curves of our standard settings.

A case that fails, or for which `--seconds` leave no time, is no row but named in the settings with the reason; the
exit status is 1 if one failed by anything but lack of memory. Where the GPU has room for several cases, they run at the
same time first, unmeasured, so that they find their compiled code in torch's cache: the first step tells what
compiling costs only with `--ahead 1`. Without a GPU only `--quick` runs, which shows that the script works.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch
from _measure import MIB, Row, arguments, in_fresh_process, parse, report, seconds_text, timed_rows
from torch import nn
from training_step import PlainGPT

from tinygpt import GPT, GPTConfig
from tinygpt.data import Batch
from tinygpt.layers import MatmulPrecision, set_matmul_precision
from tinygpt.losses import next_token_loss
from tinygpt.metrics import peak_flops
from tinygpt.model import ActivationCheckpointing
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.trainer._compile import Compile, compile_parts

PARTS = ("variants", "fp8", "batch", "context", "depth")
OUT_OF_MEMORY = "out of memory"
_ROOM = 24 * 2**30  # more than any case takes at the sizes of the defaults, all logits of plain PyTorch included


class Case(NamedTuple):
    """One process: a model, a batch and how it is trained."""

    name: str
    config: GPTConfig
    rows: int
    kind: str = "tinygpt"
    compile: Compile = "block"
    checkpointing: ActivationCheckpointing = "none"
    products: MatmulPrecision | None = None
    rows_of_tables: bool = False  # whether token tables keep a second moment a row
    micro_batches: int = 1


class Result(NamedTuple):
    """What a process measured."""

    seconds: list[float]
    first_seconds: float
    peak_bytes: int | None
    flops_per_token: int
    peak_flops: float | None
    error: str | None


Step = Callable[[], None]


def plain_step(case: Case, device: torch.device) -> Step:
    """Return a whole training step of the plain model."""
    torch.manual_seed(0)
    model: nn.Module = PlainGPT(case.config).to(device)
    if case.compile == "model":
        model.compile(dynamic=False)
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    muon_params = [p for p in matrices if id(p) not in tables]
    chosen = {id(p) for p in muon_params}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(muon_params, lr=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=3e-4, fused=True),
    ]
    batches = [batch(case, device, number) for number in range(case.micro_batches)]

    def step() -> None:
        for part in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(part.inputs, part.targets)
            (loss / len(batches)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def tinygpt_step(case: Case, device: torch.device) -> Step:
    """Return a whole training step of ours, with the settings of the documented run."""
    torch.manual_seed(0)
    model = GPT.from_config(case.config).to(device)
    model.set_compute_dtype(torch.bfloat16, embeddings=True)
    model.set_activation_checkpointing(case.checkpointing)
    set_matmul_precision(model, case.products)
    rules = nanochat_rules(model_dim=case.config.dim, table_second_moment="row" if case.rows_of_tables else "element")
    optimizer = MuonAdamW(param_groups(model, rules), compile="auto" if case.compile else False)
    loss_fn = compile_parts(model, next_token_loss, case.compile, device)
    batches = [batch(case, device, number) for number in range(case.micro_batches)]
    targets = sum(part.targets.numel() for part in batches)

    def step() -> None:
        for part in batches:
            (loss_fn(model, part).total / targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch(case: Case, device: torch.device, seed: int) -> Batch:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(case.config.vocab_size, (case.rows, case.config.max_seq_len + 1), generator=generator)
    return Batch.from_rows(tokens.to(device), bos_token_id=0)


def measure(case: Case, steps: int, device_name: str) -> Result:
    """Train a few steps in this process and measure them; the first ones compile and are left out."""
    device = torch.device(device_name)
    cuda = device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    flops = GPT.flops_per_token(_on_meta(case.config))
    peak = peak_flops(device, torch.bfloat16)
    try:
        step = (plain_step if case.kind == "plain" else tinygpt_step)(case, device)
        start = now()
        step()
        first = now() - start
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # the compiler may have tried out kernels on copies
        seconds = []
        for _ in range(steps):
            start = now()
            step()
            seconds.append(now() - start)
    except torch.OutOfMemoryError:
        return Result([], 0.0, None, flops, peak, OUT_OF_MEMORY)
    except Exception as error:  # what one case cannot do says nothing of the others
        traceback.print_exc()
        return Result([], 0.0, None, flops, peak, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    used = torch.cuda.max_memory_allocated() if cuda else None
    return Result(seconds, first, used, flops, peak, None)


def _on_meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT.from_config(config)


def compile_ahead(cases: list[Case], args: argparse.Namespace) -> None:
    """Run the cases that compile several at a time, so that each finds its code in the cache when it is measured."""
    context = multiprocessing.get_context("spawn")
    compiled = [case for case in cases if case.compile]
    with ProcessPoolExecutor(args.ahead, mp_context=context, max_tasks_per_child=1) as pool:
        for case, done in [(case, pool.submit(measure, case, 0, args.device)) for case in compiled]:
            done.exception()
            print(f"  {case.name}: compiled", flush=True)


def measured(cases: list[Case], args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Run every case in a fresh process; return a table's rows, the first of them the baseline, and what has none."""
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    end = time.monotonic() + args.seconds
    if args.ahead > 1:
        compile_ahead(cases, args)
    for case in cases:
        if time.monotonic() > end:
            left_out[case.name] = "no time left"
            continue
        try:
            found = in_fresh_process(measure, case, args.rounds, args.device)
        except BrokenProcessPool:  # killed, as by the system when memory ran out
            left_out[case.name] = "its process died"
            continue
        print(f"  {case.name}: {found.error or f'{min(found.seconds):.3f} s a step'}", flush=True)
        if found.error is None:
            results[case.name] = found
        else:
            left_out[case.name] = found.error
    fitting = {name: result.seconds for name, result in results.items()}
    if not fitting:
        return [], left_out
    rows = timed_rows(fitting, baseline=next(iter(fitting)))
    by_name = {case.name: case for case in cases}
    for row in rows:
        case, result = by_name[row["variant"]], results[row["variant"]]
        tokens = case.rows * case.config.max_seq_len * case.micro_batches
        row["tokens_per_second"] = tokens / row["median_seconds"]
        row["peak_mib"] = None if result.peak_bytes is None else result.peak_bytes / MIB
        row["first_seconds"] = result.first_seconds
        known = result.peak_flops is not None
        row["mfu"] = row["tokens_per_second"] * result.flops_per_token / result.peak_flops if known else None
    return rows, left_out


def variants(config: GPTConfig, args: argparse.Namespace) -> list[Case]:
    """Return the documented model, plain and with our options."""
    ours = Case("tinygpt", config, args.rows, micro_batches=args.micro_batches)
    return [
        ours._replace(name="plain PyTorch, compiled whole", kind="plain", compile="model"),
        ours._replace(name="plain PyTorch, eager", kind="plain", compile=False),
        ours._replace(name="tinygpt, eager", compile=False),
        ours._replace(name="tinygpt, compiled by block"),
        ours._replace(name="tinygpt, compiled whole", compile="model"),
        ours._replace(name="tinygpt, moments of tables by rows", rows_of_tables=True),
        ours._replace(name="tinygpt, feed-forward recomputed", checkpointing="mlp"),
        ours._replace(name="tinygpt, blocks recomputed", checkpointing="block"),
        ours._replace(name="tinygpt, products in fp8", products="fp8"),
        ours._replace(name="tinygpt, products in int8", products="int8"),
    ]


def curves(part: str, config: GPTConfig, args: argparse.Namespace) -> list[Case]:
    """Return the cases of a curve: the tokens of a micro-batch stay the same over context and depth."""
    tokens = args.rows * config.max_seq_len
    if part == "fp8":
        deep = Case("bfloat16", GPTConfig.from_depth(20, max_seq_len=config.max_seq_len), args.rows)
        return [deep, deep._replace(name="fp8", products="fp8"), deep._replace(name="int8", products="int8")]
    if part == "batch":
        return [Case(f"{rows} rows", config, rows) for rows in (1, 2, 4, 8, 16, 32)]
    if part == "context":
        lengths = [length for length in (512, 1024, 2048, 4096, 8192, 16384) if length <= tokens]
        return [Case(f"context {n:,}", config.replace(max_seq_len=n), tokens // n) for n in lengths]
    depths = (6, 8, 12, 16, 20, 24)
    return [Case(f"depth {d}", GPTConfig.from_depth(d, max_seq_len=config.max_seq_len), args.rows) for d in depths]


def main() -> None:
    parser = arguments(__doc__ or "", rounds=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which tables (default all)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a micro-batch (default 8)")
    parser.add_argument("--seq", type=int, default=2_048, help="tokens of a row (default 2048)")
    parser.add_argument("--depth", type=int, default=12, help="layers; 64 wide each (default 12, the 286 M model)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step in the first table (default 4)")
    parser.add_argument("--window-pattern", default="L", help="L for full attention, S for a window (default L)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which a table begins no other case")
    parser.add_argument(
        "--ahead", type=int, help="cases that compile at a time first (default: what the GPU has room for)"
    )
    args = parse(parser)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPTConfig.from_depth(args.depth, max_seq_len=args.seq, window_pattern=args.window_pattern)
    if args.quick:
        args.rows, args.micro_batches, args.parts = 2, 1, ["variants"]
        config = GPTConfig(num_layers=3, dim=64, num_heads=2, vocab_size=512, max_seq_len=32)
    elif args.device == "cpu":
        parser.error("this benchmark needs a CUDA device; --quick runs without one, training_step.py is for the CPU.")
    if args.ahead is None:
        total = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else 0
        args.ahead = max(1, min(5, total // _ROOM))
    failed = False
    for part in args.parts:
        print(part, flush=True)
        cases = variants(config, args) if part == "variants" else curves(part, config, args)
        if args.quick:  # nothing that needs a compiler
            cases = [case for case in cases if case.compile is False]
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        rows, left_out = measured(cases, args)
        failed = failed or any(reason != OUT_OF_MEMORY for reason in left_out.values())
        shape = {"depth": config.num_layers, "dim": config.dim, "batch": f"{args.rows} x {args.seq}"}
        report(
            f"gpu_training_{part}",
            {"device": device, **shape, "compiled_ahead": args.ahead > 1, "left_out": left_out},
            rows,
            {
                "step": seconds_text,
                "x speed of the first": lambda row: f"{row['speed']:.2f}",
                "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
                "MFU": lambda row: "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
                "peak MiB": lambda row: "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
                "first step": lambda row: f"{row['first_seconds']:.1f} s",
            },
            args,
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
