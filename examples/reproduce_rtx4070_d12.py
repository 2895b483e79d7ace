"""Pretrain the 12-layer, 286 M parameter GPT of the documented RTX 4070 run, or a small one of the same kind.

Press Ctrl-C whenever you like and run the same command again: it goes on where it stopped.

    python examples/reproduce_rtx4070_d12.py --scale demo                    minutes on two CPU cores
    python examples/reproduce_rtx4070_d12.py --scale full --data shards/train --validation shards/val.jsonl

The author's run changed its horizon from 10,000 to 87,000 steps at a resume: in one step the learning rate rose
20-fold, weight decay went from 0 to 0.1, and the loss from 0.93 to 1.02 bits per byte. The recipes are lists of phases:

    one-horizon   all steps planned from the start, so nothing jumps (the default)
    wsd           warm-up, constant rate, one decay at the end: to train longer, branch before the decay
    documented    what really ran; the jump is refused unless you say --accept schedule
Each phase is trained by fresh objects that resume from the checkpoint of the one before, as after a reboot.
"""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import checkpoint_step, claim_run_folder, latest_checkpoint
from tinygpt.data import BatchLoader, DocumentSource, Overflow, ValidationSet, embedded_corpus, open_source
from tinygpt.errors import TinyGPTError
from tinygpt.evals import evaluate_bpb, unigram_bpb
from tinygpt.generate import stream_text
from tinygpt.memory import training_memory
from tinygpt.metrics import StepMetrics
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.publish import PushQueue
from tinygpt.report import plot_run
from tinygpt.scaling import lr_factor
from tinygpt.schedules import Schedule, cosine_weight_decay, muon_momentum, warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from tinygpt.trainer import Phase, every

# The documented run. Everything it did not choose itself is a default of GPTConfig and nanochat_rules.
DECAY_FRACTION, FINAL_LR = 0.65, 0.05  # the last 65 % of the horizon decay, down to 5 % of the rate
WSD_DECAY_FRACTION = 0.2
WEIGHT_DECAY = 0.28  # at the reference batch of 524,288 tokens; times sqrt(1/8) = 0.099 at 65,536
PROMPT = "The old captain looked at the sea and"


@dataclass(frozen=True)
class Scale:
    """The numbers that differ between the GPU run and its small sisters."""

    model: GPTConfig
    rows: int  # of one micro-batch
    batch_tokens: int
    phase_1_steps: int
    total_steps: int
    warmup_steps: int
    momentum_warmup_steps: int
    lr_scale: float  # factor on the reference rates
    overflow: Overflow
    interval: int  # steps between evaluations, and between checkpoints
    validation_tokens: int | None
    sample_tokens: int


SCALES = {
    "full": Scale(GPTConfig.from_depth(12), 8, 65_536, 10_000, 87_000, 40, 400, lr_factor(65_536), "crop",
                  interval=1_000, validation_tokens=524_288, sample_tokens=128),
    "demo": Scale(GPTConfig.from_depth(4, head_dim=64, vocab_size=2_048, max_seq_len=256), 8, 2_048, 25, 250, 10, 60,
                  0.5, "carry", interval=25, validation_tokens=None, sample_tokens=80),
    "smoke": Scale(GPTConfig.from_depth(2, head_dim=32, width_per_layer=32, vocab_size=512, max_seq_len=64), 4, 512,
                   4, 12, 2, 4, 0.5, "carry", interval=4, validation_tokens=4_096, sample_tokens=16),
}  # fmt: skip


def schedules(scale: Scale, horizon: int, decay: float = DECAY_FRACTION) -> dict[str, Schedule]:
    """Rates as functions of the step of the whole run, planned for this horizon."""
    warmup = scale.warmup_steps
    return {
        "lr": warmup_stable_decay(horizon, warmup_steps=warmup, decay_fraction=decay, final=FINAL_LR),
        "muon.momentum": muon_momentum(horizon, warmup_steps=scale.momentum_warmup_steps, decay_fraction=decay),
        "muon.weight_decay": cosine_weight_decay(horizon),
    }


def phases_of(recipe: str, scale: Scale, accept: list[str]) -> list[Phase]:
    """Return the run as a list of phases."""
    first, total, whole = scale.phase_1_steps, scale.total_steps, schedules(scale, scale.total_steps)
    if recipe == "documented":
        return [Phase(first, schedules(scale, first)), Phase(total - first, whole, accept=accept)]
    if recipe == "wsd":
        decay = round(WSD_DECAY_FRACTION * total)
        whole = schedules(scale, total, WSD_DECAY_FRACTION)
        # Constant as well, and down with the learning rate: the end of such a run is not known in advance.
        whole["muon.weight_decay"] = warmup_stable_decay(total, decay_steps=decay)
        return [Phase(total - decay, whole, name="stable"), Phase(decay, whole, name="decay")]
    return [Phase(first, whole), Phase(total - first, whole)]


def read_tokenizer(folder: Path, source: DocumentSource, vocab_size: int) -> Tokenizer:
    """Load the run's tokenizer, or train it on the data and save it."""
    if not (folder / "tokenizer_config.json").exists():
        print(f"training a tokenizer of {vocab_size:,} entries ...", flush=True)
        texts = (text for text, _ in source.read())
        train_bpe(texts, vocab_size=vocab_size, max_characters=500_000_000).save(folder)
    return load_tokenizer(folder)


def build(scale: Scale, device: str, seed: int, precision: torch.dtype) -> tuple[GPT, MuonAdamW]:
    """Make a new model and its optimizer; in bfloat16 the token tables are stored in it as well."""
    torch.manual_seed(seed)
    model = GPT.from_config(scale.model).to(device).set_compute_dtype(precision, embeddings=True)
    factor, decay = scale.lr_scale, WEIGHT_DECAY * scale.lr_scale
    rules = nanochat_rules(model_dim=scale.model.dim, batch_lr_scale=factor, weight_decay=decay)
    return model, MuonAdamW(param_groups(model, rules))


def print_plan(scale: Scale, model: GPT, optimizer: MuonAdamW, phases: list[Phase], device: str) -> None:
    """Say what is going to happen before it does; refuses rates that jump. The model may be one without weights."""
    rows, seq_len = scale.rows, scale.model.max_seq_len
    loader = BatchLoader(embedded_corpus("train"), ByteTokenizer(), rows=rows, seq_len=seq_len)  # reads nothing
    config = TrainerConfig(num_steps=scale.total_steps, batch_tokens=scale.batch_tokens)
    trainer = Trainer(model, optimizer, loader, config, phases=phases)
    counts = model.num_parameters()._asdict() | {"total": model.num_parameters().total}
    memory = training_memory(model, optimizer, rows=rows, seq_len=seq_len, device_type=torch.device(device).type)
    print("parameters: " + ", ".join(f"{role.replace('_', ' ')} {count:,}" for role, count in counts.items()))
    print(f"memory about {memory.total / 2**20:,.0f} MiB, an estimate\n{trainer.plan()}\n", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="demo", help="full: 12 GB GPU, 28 hours; demo: CPU, minutes; smoke: seconds")
    add("--recipe", choices=("one-horizon", "wsd", "documented"), default="one-horizon", help="see above")
    add("--accept", choices=("schedule",), nargs="+", default=[], help="let rates jump where a phase begins")
    add("--out", type=Path, help="folder of the run (default: runs/SCALE-RECIPE)")
    add("--data", type=Path, help="training text: .txt or .jsonl, a file or a folder (default: the embedded book)")
    add("--validation", type=Path, help="text to measure on; needed with --data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--seed", type=int, default=0, help="repeats a run exactly (default: 0)")
    add("--push-to-hub", metavar="USER/REPO", help="push each checkpoint's model, tokenizer and card there")
    args = parser.parse_args()
    if (args.data is None) != (args.validation is None) or (args.scale == "full" and args.data is None):
        parser.error("--data and --validation go together, and --scale full needs both.")
    args.out = args.out or Path("runs") / f"{args.scale}-{args.recipe}"
    return args


def main() -> None:
    args = parse_arguments()
    scale, out, seq_len = SCALES[args.scale], args.out, SCALES[args.scale].model.max_seq_len
    phases = phases_of(args.recipe, scale, args.accept)
    train = open_source(args.data) if args.data else embedded_corpus("train")
    held_out = open_source(args.validation) if args.data else embedded_corpus("validation")
    precision = torch.bfloat16 if args.device == "cuda" else torch.float32
    print_plan(scale, *build(scale, "meta", args.seed, precision), phases, args.device)  # before any work
    claim_run_folder(out, {"scale": args.scale, "recipe": args.recipe, "seed": args.seed, "data": train.fingerprint()})
    tokenizer = read_tokenizer(out / "tokenizer", train, scale.model.vocab_size)
    most = scale.validation_tokens
    validation = ValidationSet.from_source(held_out, tokenizer, rows=scale.rows, seq_len=seq_len, max_tokens=most)
    queue = PushQueue(args.push_to_hub, folder=out) if args.push_to_hub else None

    def evaluate(trainer: Trainer, step: StepMetrics) -> None:
        report = evaluate_bpb(trainer.model, validation)
        trainer.record("evaluation", bpb=report.bpb, loss=report.loss, data_hash=report.data_hash)
        print(f"\nstep {step.index + 1:,}: validation {report}", flush=True)

    def new_trainer(phases: list[Phase]) -> Trainer:
        model, optimizer = build(scale, args.device, args.seed, precision)
        loader = BatchLoader(train, tokenizer, rows=scale.rows, seq_len=seq_len, overflow=scale.overflow)
        config = TrainerConfig(num_steps=sum(phase.steps for phase in phases), batch_tokens=scale.batch_tokens,
                               out_dir=str(out), save_every=scale.interval)  # fmt: skip
        return Trainer(model, optimizer, loader, config, phases=phases, validation=validation, on_save=queue)

    with queue or nullcontext():
        for count in range(1, len(phases) + 1):
            saved = latest_checkpoint(out / "checkpoints")
            done = saved is not None and checkpoint_step(saved) >= sum(phase.steps for phase in phases[:count])
            if not done or (queue and count == len(phases)):  # its last checkpoint may not have got into the queue
                last = count == len(phases)  # whose report is that of the whole run
                new_trainer(phases[:count]).fit([every(scale.interval, evaluate)], resume="auto", report=last)
    newest = latest_checkpoint(out / "checkpoints") or out
    model = GPT.from_pretrained(newest, device=args.device)
    sample = islice(BatchLoader(train, tokenizer, rows=8, seq_len=seq_len, overflow="carry"), 200)
    baseline = unigram_bpb(sample, validation)
    print(f"\n{newest} loaded again: {evaluate_bpb(model, validation)}")
    print(f"token frequencies alone: {baseline:.4f} bits per byte\n\n{PROMPT}", end="")
    print(*stream_text(model, tokenizer, PROMPT, max_new_tokens=scale.sample_tokens, temperature=0.8, seed=0), sep="")
    picture = plot_run(out, out / "curve.png", title=out.name, unigram_bpb=baseline)
    print(f"\nthe run in a picture: {picture}\nthe model: GPT.from_pretrained({str(newest)!r})")


if __name__ == "__main__":
    try:
        main()
    except TinyGPTError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; run the same command again to go on from the last checkpoint.")
