"""What does each block of the recipe buy: bits per byte and speed with it switched off?

Trains the demo of `examples/reproduce_rtx4070_d12.py` once for each variant and seed: same tokenizer, same tokens in
the same order, same validation set, one block switched off or replaced. The seed draws the weights. Afterwards one
training step of every variant is timed in turns. Each finished run is a file under `--work`, so the command may be cut
at any time: run again, it repeats nothing that is finished.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from _measure import Row, Work, arguments, parse, report, seconds_text, time_rounds, timed_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.reproduce_rtx4070_d12 import SCALES, WEIGHT_DECAY, Scale, read_tokenizer, schedules

from tinygpt import GPT, Trainer, TrainerConfig
from tinygpt.checkpoint import claim_run_folder
from tinygpt.data import Batch, BatchLoader, ValidationSet, embedded_corpus
from tinygpt.errors import NonFiniteError, TinyGPTError
from tinygpt.evals import evaluate_bpb
from tinygpt.layers import GeluMLP, SwiGLU
from tinygpt.losses import next_token_loss
from tinygpt.metrics import StepMetrics
from tinygpt.model import GPTConfig, PartFactory
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.tokenizer import Tokenizer
from tinygpt.trainer import Interrupted

ROOT = Path(__file__).resolve().parents[1]
STANDARD = "standard"
ADAMW_LR = 0.001  # the best of 0.0003, 0.001 and 0.003 by one run each


class Variant(NamedTuple):
    """What differs from the standard model: fields of the config, the feed-forward layer, the optimizer."""

    fields: Mapping[str, Any] = MappingProxyType({})
    mlp: PartFactory | None = None
    adamw: bool = False  # for the matrices, in place of Muon


def variants(seq_len: int) -> dict[str, Variant]:
    """Return every variant by name, the standard model first."""
    return {
        STANDARD: Variant(),
        "no value embeddings": Variant({"value_embeddings": False}),
        "no smear": Variant({"smear": False}),
        "no backout": Variant({"backout": False}),
        "no residual lambdas": Variant({"residual_scales": False}),
        "no x0 lambdas": Variant({"x0_scales": False}),
        "no embedding norm": Variant({"embedding_norm": False}),
        "no rotary": Variant({"rotary": False}),
        "no QK norm": Variant({"qk_norm": False}),
        "QK factor 1.0, not 1.2": Variant({"qk_scale": 1.0}),
        "no soft cap": Variant({"soft_cap": None}),
        "windows SSSL": Variant({"window_pattern": "SSSL", "short_window_tokens": seq_len // 4}),
        "GELU, not ReLU squared": Variant(mlp=lambda config, layer: GeluMLP(config.dim, 4 * config.dim)),
        # Three matrices in place of two: 8/3 of the width gives the same number of weights.
        "SwiGLU, not ReLU squared": Variant(mlp=lambda config, layer: SwiGLU(config.dim, round(8 * config.dim / 3))),
        "AdamW, not Muon": Variant(adamw=True),
    }


def build(scale: Scale, variant: Variant, seed: int, adamw_lr: float) -> tuple[GPT, MuonAdamW]:
    """Make a new model and its optimizer, with the rates of the demo."""
    torch.manual_seed(seed)
    model = GPT.from_config(scale.model.replace(**variant.fields), mlp=variant.mlp)
    decay = WEIGHT_DECAY * scale.lr_scale
    rules = nanochat_rules(model_dim=scale.model.dim, batch_lr_scale=scale.lr_scale, weight_decay=decay)
    if variant.adamw:
        options = {"lr": adamw_lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
        rules = [replace(rule, kind="adamw", options=options) if rule.kind == "muon" else rule for rule in rules]
    return model, MuonAdamW(param_groups(model, rules))


class Study:
    """The data every run has in common, and the folder of finished runs."""

    def __init__(self, work: Path, scale: Scale, adamw_lr: float) -> None:
        self.work, self.scale, self.adamw_lr = work, scale, adamw_lr
        self.train = embedded_corpus("train")
        facts = {"scale": scale.model.model_dump(mode="json"), "steps": scale.total_steps, "adamw_lr": adamw_lr}
        claim_run_folder(work, {"benchmark": "ablation", **facts, "data": self.train.fingerprint()})
        self.tokenizer: Tokenizer = read_tokenizer(work / "tokenizer", self.train, scale.model.vocab_size)
        self.validation = ValidationSet.from_source(
            embedded_corpus("validation"),
            self.tokenizer,
            rows=scale.rows,
            seq_len=scale.model.max_seq_len,
            max_tokens=scale.validation_tokens,
        )

    def path(self, name: str, seed: int) -> Path:
        """Return the file of a finished run."""
        return self.work / "finished" / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}.json"

    def loader(self) -> BatchLoader:
        """Return the demo's batches, from the first."""
        scale = self.scale
        return BatchLoader(
            self.train, self.tokenizer, rows=scale.rows, seq_len=scale.model.max_seq_len, overflow=scale.overflow
        )

    def run(self, name: str, variant: Variant, seed: int, show: Callable[[StepMetrics], None]) -> None:
        """Train one variant and write its file, atomically; a loss that is not finite is a result too."""
        model, optimizer = build(self.scale, variant, seed, self.adamw_lr)
        planned = schedules(self.scale, self.scale.total_steps)
        if variant.adamw:
            planned = {"lr": planned["lr"]}
        config = TrainerConfig(num_steps=self.scale.total_steps, batch_tokens=self.scale.batch_tokens)
        trainer = Trainer(model, optimizer, self.loader(), config, schedules=planned)
        bpb: float | None = None
        try:
            trainer.fit(lambda _, step: show(step), progress=False)
            bpb = evaluate_bpb(model, self.validation).bpb
        except NonFiniteError as error:
            print(f"\n{name}, seed {seed}: {error}", file=sys.stderr)
        path = self.path(name, seed)
        path.parent.mkdir(exist_ok=True)
        content = {"variant": name, "seed": seed, "bpb": bpb, "parameters": model.num_parameters().total}
        path.with_suffix(".tmp").write_text(json.dumps(content) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)

    def finished(self, name: str, seed: int) -> dict[str, Any] | None:
        """Return what a finished run wrote; None if it is still to be done."""
        path = self.path(name, seed)
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def train_all(study: Study, chosen: dict[str, Variant], seeds: int) -> None:
    """Do every run that has no file yet: all variants with one seed, then with the next."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    runs = [(name, seed) for seed in range(seeds) for name in chosen]
    missing = [run for run in runs if study.finished(*run) is None]
    steps = study.scale.total_steps
    print(f"{len(runs)} runs of {steps:,} steps, {len(runs) - len(missing)} of them finished before", flush=True)
    terminal = sys.stderr.isatty()
    with tqdm(  # type: ignore[no-untyped-call]
        total=len(missing) * steps, unit="step", mininterval=0.2 if terminal else 20.0, disable=not missing
    ) as bar:

        def show(step: StepMetrics) -> None:
            bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
            bar.update()

        for number, (name, seed) in enumerate(missing, start=1):
            bar.set_description_str(f"{number}/{len(missing)} {name}, seed {seed}", refresh=False)
            study.run(name, chosen[name], seed, show)


def training_step(study: Study, variant: Variant, batch: Batch) -> Work:
    """Return one whole step on one batch: forward, backward, update."""
    model, optimizer = build(study.scale, variant, 0, study.adamw_lr)

    def step() -> None:
        total, count = next_token_loss(model, batch)
        (total / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw(rows: Sequence[Row], picture: Path, steps: int) -> None:
    """Draw bits per byte of every seed and the speed, the standard model as a line through both."""
    from matplotlib.figure import Figure

    gray = "#7d8590"
    measured = [row for row in rows if row["mean_bpb"] is not None]
    ordered = sorted(measured, key=lambda row: -row["mean_bpb"])
    standard = next((row["mean_bpb"] for row in measured if row["variant"] == STANDARD), None)
    figure = Figure(figsize=(9, 0.36 * len(ordered) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for height, row in enumerate(ordered):
        color = "#2f81c7" if row["variant"] == STANDARD else "#d9822b"
        left.plot(row["bpb"], [height] * len(row["bpb"]), "o", color=color, ms=4)
        left.plot([row["mean_bpb"]], [height], "|", color=color, ms=14, mew=2)
        right.barh(height, row["speed"], color=color, height=0.6)
    left.set_yticks(range(len(ordered)), [row["variant"] for row in ordered])
    left.set_xlabel(f"validation bits per byte after {steps:,} steps\n(dots: seeds, bar: mean; left is better)")
    right.set_xlabel("training speed, standard = 1\n(right is better)")
    for axes, line in ((left, standard), (right, 1.0)):
        if line is not None:
            axes.axvline(line, color=gray, linewidth=0.8, linestyle="--")
        axes.tick_params(colors=gray)
        axes.xaxis.label.set_color(gray)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(gray)
        axes.patch.set_alpha(0)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, transparent=True)


def measured_rows(study: Study, chosen: dict[str, Variant], args: argparse.Namespace) -> list[Row]:
    """Time every variant and put the bits per byte of its runs beside it."""
    batch = next(study.loader())
    steps = {name: training_step(study, variant, batch) for name, variant in chosen.items()}
    rows = timed_rows(time_rounds(steps, args.rounds), baseline=STANDARD)
    for row in rows:
        runs = [found for seed in range(args.seeds) if (found := study.finished(row["variant"], seed))]
        row["bpb"] = [run["bpb"] for run in runs]
        row["parameters"] = runs[0]["parameters"]
        whole = None not in row["bpb"]
        row["mean_bpb"] = sum(row["bpb"]) / len(runs) if whole else None
        row["spread_bpb"] = max(row["bpb"]) - min(row["bpb"]) if whole else None
    standard = rows[0]["mean_bpb"]
    for row in rows:
        known = standard is not None and row["mean_bpb"] is not None
        row["change_bpb"] = row["mean_bpb"] - standard if known else None
    return rows


def main() -> None:
    parser = arguments(__doc__ or "", rounds=20)
    every = list(variants(1))
    parser.add_argument("--variants", nargs="+", choices=every, metavar="NAME", help=f"of: {'; '.join(every)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--steps", type=int, help="steps of a run (default 250, as the demo)")
    parser.add_argument("--adamw-lr", type=float, default=ADAMW_LR, help="AdamW's rate for matrices (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder of finished runs (default runs/ablation)")
    parser.add_argument("--picture", type=Path, help="where to draw (default docs/assets/ablation.svg)")
    args = parse(parser)
    if args.seeds < 1 or (args.steps is not None and args.steps < 2):
        parser.error("--seeds must be at least 1 and --steps at least 2.")
    scale = SCALES["smoke" if args.quick else "demo"]
    if args.quick:
        args.seeds = 1
        scale = replace(scale, total_steps=2, validation_tokens=256)
    if args.steps is not None:
        scale = replace(scale, total_steps=args.steps, warmup_steps=min(scale.warmup_steps, args.steps))
    default = every[:4] if args.quick else every  # each run is a process of its own
    names = [STANDARD, *(name for name in args.variants or default if name != STANDARD)]
    known = variants(scale.model.max_seq_len)
    chosen = {name: known[name] for name in names}
    with tempfile.TemporaryDirectory() if args.quick and args.work is None else nullcontext() as temporary:
        work = Path(temporary) if temporary else args.work or ROOT / "runs" / "ablation"
        study = Study(work, scale, args.adamw_lr)
        train_all(study, chosen, args.seeds)
        rows = measured_rows(study, chosen, args)
        picture = args.picture or (work / "ablation.svg" if args.quick else ROOT / "docs" / "assets" / "ablation.svg")
        draw(rows, picture, scale.total_steps)
    config: GPTConfig = scale.model
    report(
        "ablation",
        {
            "layers": config.num_layers,
            "dim": config.dim,
            "vocabulary": config.vocab_size,
            "steps": scale.total_steps,
            "tokens a step": scale.batch_tokens,
            "seeds": args.seeds,
            "data": study.validation.hash[:8],
        },
        rows,
        {
            "bits per byte": lambda row: _number(row["mean_bpb"], "{:.4f}"),
            "spread": lambda row: _number(row["spread_bpb"], "{:.4f}"),
            "change": lambda row: _number(row["change_bpb"], "{:+.4f}"),
            "parameters": lambda row: f"{row['parameters']:,}",
            "x speed": lambda row: f"{row['speed']:.2f}",
            "step": seconds_text,
        },
        args,
    )
    print(f"drawn: {picture}")


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else form.format(value)


if __name__ == "__main__":
    try:
        main()
    except TinyGPTError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, Interrupted):
        print("finished runs are kept: run the same command again for the others.", file=sys.stderr)
        sys.exit(130)
