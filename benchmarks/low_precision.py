"""What do fewer bits cost in loss and save in time: products in fp8 or int8, tables in bfloat16, moments by rows?

Trains one model from the same first weights on the same tokens in the same order once for each variant and seed, in
turns, and measures it on the same validation set in the usual precision. What a variant changes is compared seed by
seed; how far apart the seeds of the plain model lie tells what such a change means. On a CPU it is the demo of
`examples/reproduce_rtx4070_d12.py`, where eight bits only cost time. On a GPU it is a larger model of the same family
with blocks compiled; its batch is small, as the embedded book has 400,000 tokens: `--device cuda --steps 200`.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from _measure import arguments, parse, report, seconds_text, timed_rows
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.reproduce_rtx4070_d12 import SCALES, WEIGHT_DECAY, Scale, read_tokenizer, schedules

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.data import BatchLoader, ValidationSet, embedded_corpus
from tinygpt.evals import evaluate_bpb
from tinygpt.layers import MatmulPrecision
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.tokenizer import Tokenizer

PLAIN = "plain"
_WARM_STEPS = 3  # the first compile, and allocate what later ones reuse


class Variant(NamedTuple):
    """What differs from the plain run."""

    products: MatmulPrecision | None = None
    bfloat16_tables: bool = False
    rules: Mapping[str, Any] = MappingProxyType({})


VARIANTS = {
    PLAIN: Variant(),
    "products in fp8": Variant("fp8"),
    "products in int8": Variant("int8"),
    "moments of tables by rows": Variant(rules={"table_second_moment": "row"}),
    "and their first moments in bfloat16": Variant(
        rules={"table_second_moment": "row", "table_first_moment": "bfloat16"}
    ),
    "tables in bfloat16, to nearest": Variant(bfloat16_tables=True),
    "tables in bfloat16, by chance": Variant(bfloat16_tables=True, rules={"stochastic_rounding": True}),
    "tables in bfloat16, by chance, by rows": Variant(
        bfloat16_tables=True, rules={"stochastic_rounding": True, "table_second_moment": "row"}
    ),
}


class Result(NamedTuple):
    """Bits per byte at the end, and the median time of a step."""

    bpb: float
    step_seconds: float


def train(scale: Scale, variant: Variant, seed: int, steps: int, device: str, tokenizer: Tokenizer) -> Result:
    """Train once."""
    if device == "cuda":
        torch.compiler.reset()  # after eight ways to compile one function it would run eagerly, unsaid
    torch.manual_seed(seed)
    model = GPT.from_config(scale.model).to(device)
    model.set_compute_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    if variant.bfloat16_tables:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.to(torch.bfloat16)
    factor = scale.lr_scale
    rules = nanochat_rules(
        model_dim=scale.model.dim, batch_lr_scale=factor, weight_decay=WEIGHT_DECAY * factor, **variant.rules
    )
    optimizer = MuonAdamW(param_groups(model, rules), compile="auto")
    seq_len = scale.model.max_seq_len
    source = embedded_corpus("train")
    loader = BatchLoader(source, tokenizer, rows=scale.rows, seq_len=seq_len, overflow=scale.overflow)
    config = TrainerConfig(num_steps=steps, batch_tokens=scale.batch_tokens, matmul_precision=variant.products)
    trainer = Trainer(model, optimizer, loader, config, schedules=schedules(scale, steps))
    elapsed = [step.elapsed_seconds for step in trainer]
    validation = ValidationSet.from_source(
        embedded_corpus("validation"), tokenizer, rows=scale.rows, seq_len=seq_len, max_tokens=scale.validation_tokens
    )
    return Result(evaluate_bpb(model, validation).bpb, float(np.median(np.diff(elapsed)[_WARM_STEPS - 1 :])))


def main() -> None:
    parser = arguments(__doc__ or "", rounds=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--scale", choices=("smoke", "demo"), default="demo", help="of the example, on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--depth", type=int, default=12, help="layers of the model on a GPU")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of a step on a GPU (default %(default)s)")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args = parse(parser)
    scale = SCALES["smoke" if args.quick else args.scale]
    if args.device == "cuda":
        model = GPTConfig.from_depth(args.depth, vocab_size=scale.model.vocab_size)
        scale = replace(scale, model=model, batch_tokens=args.batch_tokens)
    if args.quick:  # which a CPU multiplies one by one in fp8
        scale = replace(
            scale, model=scale.model.replace(max_seq_len=32), rows=1, batch_tokens=32, validation_tokens=512
        )
    steps = _WARM_STEPS + 2 if args.quick else args.steps
    names = [PLAIN, *(name for name in VARIANTS if name in args.variants and name != PLAIN)]
    results: dict[str, list[Result]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = read_tokenizer(Path(folder), embedded_corpus("train"), scale.model.vocab_size)
        for seed in range(args.rounds):
            for name in names:
                result = train(scale, VARIANTS[name], seed, steps, args.device, tokenizer)
                results[name].append(result)
                print(f"seed {seed}, {name}: {result.bpb:.4f} bpb, {result.step_seconds * 1e3:.0f} ms", flush=True)
    rows = timed_rows({name: [each.step_seconds for each in runs] for name, runs in results.items()}, baseline=PLAIN)
    for row in rows:
        runs, plain = results[row["variant"]], results[PLAIN]
        row["bpb"] = [run.bpb for run in runs]
        row["change_bpb"] = [run.bpb - other.bpb for run, other in zip(runs, plain, strict=True)]
    settings = {"layers": scale.model.num_layers, "dim": scale.model.dim, "batch": scale.batch_tokens, "steps": steps}
    report(
        "low_precision" + ("-cuda" if args.device == "cuda" else ""),
        {**settings, "device": args.device},
        rows,
        {
            "step": seconds_text,
            "x speed": lambda row: f"{row['speed']:.2f}",
            "bpb, each seed": lambda row: " ".join(f"{value:.4f}" for value in row["bpb"]),
            "change of bpb": lambda row: " ".join(f"{value:+.4f}" for value in row["change_bpb"]),
        },
        args,
    )


if __name__ == "__main__":
    main()
