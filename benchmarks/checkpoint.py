"""What do saving and loading a run cost, in time that training stands still and in bytes, against torch.save?

The same weights and optimizer moments, written by `Trainer` and by `torch.save`, and loaded into the model and the
optimizer. Ours are hashed, forced to the disk and renamed; `torch.save` does none of that, and the row with fsync shows
what the disk alone takes. The files lie in the system's cache when they are read.
"""

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import MIB, Row, arguments, parse, report, seconds_text, timed_rows
from torch import nn

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import latest_checkpoint, list_checkpoints, load_state, load_tensors, verify
from tinygpt.data import Batch
from tinygpt.losses import LossSum
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW


def nearly_no_work(model: nn.Module, batch: Batch) -> LossSum:
    """Give one scalar a gradient, so that a step costs nothing and saving can be seen."""
    scale = next(parameter for parameter in model.parameters() if parameter.numel() == 1)
    return LossSum(scale.sum(), torch.tensor(batch.targets.numel()))


class Run:
    """A run with full moments, its checkpoint in both formats, and the work to be timed."""

    def __init__(self, config: GPTConfig, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = GPT.from_config(config)
        self.optimizer = MuonAdamW.for_model(self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ids = torch.zeros(1, 8, dtype=torch.long)
        self.torch_file, self.out = folder / "torch.pt", folder / "run"
        settings = TrainerConfig(num_steps=10**6, out_dir=str(self.out), save_every=2, keep_last=1)
        batches = itertools.repeat(Batch(ids, ids))
        self.trainer = Trainer(self.model, self.optimizer, batches, settings, loss_fn=nearly_no_work)
        self.steps = iter(self.trainer)
        next(self.steps)

    def torch_save(self, *, sync: bool = False) -> float:
        """Save with torch and return the seconds."""
        start = time.perf_counter()
        with self.torch_file.open("wb") as file:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        return time.perf_counter() - start

    def stall(self) -> float:
        """Train until a checkpoint was saved in the background, and return how long that held up training."""
        before = len(self._saves())
        while len(saves := self._saves()) == before:
            next(self.steps)
            while any(thread.name.startswith("tinygpt writes") for thread in threading.enumerate()):
                time.sleep(0.01)  # as if steps took long: otherwise the next save would wait for this one
        return float(saves[-1]["stall_seconds"])

    def _saves(self) -> list[dict[str, Any]]:
        return [r for r in read_metrics(self.out / "metrics.jsonl") if r["event"] == "save" and r["background"]]

    def save(self) -> float:
        """Save and wait until it is complete."""
        start = time.perf_counter()
        self.trainer.save_state(self.out.parent / "whole" / "step-000001")
        return time.perf_counter() - start

    def torch_load(self, *, mmap: bool) -> float:
        """Load what torch saved into model and optimizer."""
        start = time.perf_counter()
        self._take(**torch.load(self.torch_file, weights_only=True, mmap=mmap))
        return time.perf_counter() - start

    def load(self, *, hashes: bool) -> float:
        """Load a checkpoint into model and optimizer, with its files hashed or taken to be whole."""
        start = time.perf_counter()
        folder = self.out.parent / "whole" / "step-000001"
        verify(folder, hashes=hashes)
        self._take(load_tensors(folder / "model.safetensors"), load_state(folder, verified=True)["optimizer"])
        return time.perf_counter() - start

    def _take(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        self.model.load_state_dict(model, strict=True)
        self.optimizer.load_state_dict(optimizer)

    def check(self) -> None:
        """Refuse to compare unless both formats give the same tensors back."""
        theirs = torch.load(self.torch_file, weights_only=True)
        newest = self.out.parent / "whole" / "step-000001"
        for name, tensor in load_tensors(newest / "model.safetensors").items():
            assert torch.equal(tensor, theirs["model"][name]), name
        for name, entry in load_state(newest)["optimizer"]["state"].items():
            for key, value in entry.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["optimizer"]["state"][name][key]))


def size_of(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def measure(run: Run, rounds: int) -> list[Row]:
    """Run all variants in turns, each round beginning with another one."""
    variants: dict[str, dict[str, Callable[[], float]]] = {
        "save": {
            "save, torch.save": run.torch_save,
            "save, torch.save and fsync": lambda: run.torch_save(sync=True),
            "save, tinygpt, training stands still": run.stall,
            "save, tinygpt, until it is complete": run.save,
        },
        "load": {
            "load, torch.load": lambda: run.torch_load(mmap=False),
            "load, torch.load(mmap=True)": lambda: run.torch_load(mmap=True),
            "load, tinygpt, every file hashed": lambda: run.load(hashes=True),
            "load, tinygpt, hashed before": lambda: run.load(hashes=False),
        },
    }
    works = [(name, work) for group in variants.values() for name, work in group.items()]
    seconds: dict[str, list[float]] = {name: [] for name, _ in works}
    for number in range(rounds):
        shift = number % len(works)
        for name, work in works[shift:] + works[:shift]:
            seconds[name].append(work())
    result = []
    for kind, group in variants.items():
        rows = timed_rows({name: seconds[name] for name in group}, baseline=f"{kind}, torch.{kind}")
        for row in rows:
            ours = "tinygpt" in row["variant"]
            row["bytes"] = size_of(run.out.parent / "whole" / "step-000001" if ours else run.torch_file)
            row["share_of_torch"] = 1 / row["speed"]
        result += rows
    return result


def main() -> None:
    parser = arguments(__doc__ or "", rounds=5)
    parser.add_argument("--layers", type=int, default=12, help="(default 12, the 286 M model)")
    parser.add_argument("--dim", type=int, default=768, help="(default 768)")
    parser.add_argument("--vocab", type=int, default=32_768, help="(default 32768)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    args = parse(parser)
    layers, dim, vocab = (3, 128, 512) if args.quick else (args.layers, args.dim, args.vocab)
    config = GPTConfig(num_layers=layers, dim=dim, num_heads=max(1, dim // 128), vocab_size=vocab)
    with tempfile.TemporaryDirectory(dir=args.folder, ignore_cleanup_errors=True) as name:
        run = Run(config, Path(name))
        run.stall()  # makes the memory of the copy, once a run
        run.save()
        run.torch_save()
        run.check()
        rows = measure(run, args.rounds)
        parameters = run.model.num_parameters().total
        assert latest_checkpoint(run.out / "checkpoints") == list_checkpoints(run.out / "checkpoints")[-1]
        run.steps.close()  # type: ignore[attr-defined]
    report(
        "checkpoint",
        {"layers": layers, "dim": dim, "vocab": vocab, "parameters": f"{parameters:,}"},
        rows,
        {
            "time": seconds_text,
            "share of torch's": lambda row: f"{row['share_of_torch']:.2f}",
            "MiB": lambda row: f"{row['bytes'] / MIB:,.1f}",
        },
        args,
    )


if __name__ == "__main__":
    main()
