r"""Train a small GPT on your own text: text, tokenizer, token shards, loader, trainer, and text again.

    python examples/train_on_your_text.py books/ --separator '\n\n'
    python examples/train_on_your_text.py notes.jsonl --text-key body --steps 2000
    python examples/train_on_your_text.py                                      the book that comes with tinygpt

The text is a file or folder of .txt, .jsonl or .parquet, or hf://datasets/USER/NAME/*.parquet. A share of it is
held out and never trained on. Stop with Ctrl-C, or kill it, at any moment; the same command goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import claim_run_folder
from tinygpt.data import (
    BatchLoader,
    TokenizeProgress,
    ValidationSet,
    embedded_corpus,
    hash_split,
    open_source,
    tokenize_documents,
)
from tinygpt.errors import TinyGPTError
from tinygpt.evals import evaluate_bpb
from tinygpt.generate import stream_text
from tinygpt.metrics import StepMetrics
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import warmup_stable_decay
from tinygpt.tokenizer import load_tokenizer, tokenizer_report, train_bpe
from tinygpt.trainer import every


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", nargs="?", help="what tinygpt.data.open_source opens (default: the embedded book)")
    add("--separator", help=r"what separates documents in .txt files, such as '\n\n' (default: a file is one)")
    add("--text-key", default="text", help="key or column of the text (default: %(default)s)")
    add("--held-out", type=float, default=0.05, help="share of the documents to measure on (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/text"), help="folder of the run (default: %(default)s)")
    add("--vocab-size", type=int, default=4096, help="token ids to train (default: %(default)s)")
    add("--depth", type=int, default=4, help="layers of the model (default: %(default)s)")
    add("--seq-len", type=int, default=256, help="positions in a row (default: %(default)s)")
    add("--rows", type=int, default=8, help="rows in a batch (default: %(default)s)")
    add("--steps", type=int, default=300, help="steps in all (default: %(default)s)")
    add("--overflow", default="carry", choices=["crop", "carry", "concat"], help="see BatchLoader (default: carry)")
    add("--seed", type=int, default=0, help="of weights and shuffling (default: 0)")
    add("--pictures", action="store_true", help='draw documents, tokenizer and packing (needs "tinygpt[plot]")')
    add("--prompt", default="The ", help="what the text at the end begins with (default: %(default)r)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    return parser.parse_args()


def show(progress: TokenizeProgress) -> None:
    print(f"\rtokenizing: {progress.documents:,} documents, {progress.tokens:,} tokens", end="", flush=True)


def main() -> None:
    args = parse_arguments()
    out: Path = args.out
    separator = args.separator and args.separator.replace(r"\n", "\n").replace(r"\r", "\r")
    text = open_source(args.text, text_key=args.text_key, separator=separator) if args.text else embedded_corpus()
    train, held_out = hash_split(text, validation_fraction=args.held_out)
    claim_run_folder(out, {"data": train.fingerprint(), "vocab_size": args.vocab_size, "seed": args.seed})

    if not (out / "tokenizer" / "tokenizer_config.json").exists():
        train_bpe(train, vocab_size=args.vocab_size, max_characters=200_000_000, progress=True).save(out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    shards = tokenize_documents(train, tokenizer, out / "tokens", progress=show)
    print(f"\n{len(shards):,} documents, {shards.num_tokens:,} tokens in {out / 'tokens'}")
    if not (out / "validation.safetensors").exists():
        found = ValidationSet.from_source(held_out, tokenizer, rows=args.rows, seq_len=args.seq_len, max_tokens=500_000)
        found.save(out / "validation.safetensors")
    validation = ValidationSet.load(out / "validation.safetensors", rows=args.rows)
    if args.pictures:
        from tinygpt.report import plot_documents, plot_packing, plot_tokenizer

        plot_documents(shards, out / "documents.png", seq_len=args.seq_len)
        plot_tokenizer(tokenizer_report(tokenizer, train, held_out), out / "tokenizer.png")
        print(f"drawn: {plot_packing(shards, out / 'packing.png', seq_lens=[args.seq_len, 8 * args.seq_len]).parent}")

    torch.manual_seed(args.seed)
    config = GPTConfig.from_depth(args.depth, head_dim=64, vocab_size=args.vocab_size, max_seq_len=args.seq_len)
    model = GPT.from_config(config).to(args.device)
    loader = BatchLoader(shards, rows=args.rows, seq_len=args.seq_len, overflow=args.overflow, seed=args.seed)
    run = TrainerConfig(num_steps=args.steps, batch_tokens=args.rows * args.seq_len, out_dir=str(out), save_every=50)
    schedule = warmup_stable_decay(args.steps, warmup_steps=min(20, args.steps // 4), decay_fraction=0.5)
    optimizer = MuonAdamW.for_model(model, adamw_lr=0.003)
    trainer = Trainer(model, optimizer, loader, run, schedules={"lr": schedule})
    trainer.resume()

    def evaluate(trainer: Trainer, step: StepMetrics) -> None:
        report = evaluate_bpb(trainer.model, validation)
        trainer.record("evaluation", bpb=report.bpb, data_hash=report.data_hash)
        print(f"\nstep {step.index + 1:,}: {report}", flush=True)

    trainer.fit([every(100, evaluate)])
    print(f"\n{evaluate_bpb(model, validation)}; {loader.utilization()}\n\n{args.prompt}", end="")
    room = max(1, min(100, args.seq_len - len(tokenizer.encode(args.prompt)) - 1))  # the prompt stands behind <|bos|>
    for piece in stream_text(model, tokenizer, args.prompt, max_new_tokens=room, temperature=0.8, seed=args.seed):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except TinyGPTError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; run the same command again to go on.")
