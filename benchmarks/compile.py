"""What does compiling cost at the start and bring per step: nothing, block by block, or loss and model as one?

The first step of each setting of `TrainerConfig(compile=...)` runs in a fresh process twice: with an empty cache (cold)
and with the cache that it left (warm), imports of torch included in neither. Then forward and backward are timed in
turns in one process, after their losses are compared. `--device cuda` measures a GPU, in bfloat16.
"""

import multiprocessing
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _measure import arguments, parse, report, seconds_text, time_rounds, timed_rows

from tinygpt import GPT, GPTConfig
from tinygpt.compiler import compiler_problem
from tinygpt.data import Batch
from tinygpt.losses import next_token_loss
from tinygpt.trainer._compile import Compile, compile_parts

SETTINGS: dict[str, Compile] = {"eager": False, "by block": "block", "as one": "model"}


class Shape(NamedTuple):
    """A model and a micro-batch."""

    layers: int
    dim: int
    vocab: int
    rows: int
    seq_len: int
    device: str


class Step:
    """Forward and backward of one micro-batch under a setting."""

    def __init__(self, setting: Compile, shape: Shape) -> None:
        device = torch.device(shape.device)
        torch.manual_seed(0)
        heads = max(1, shape.dim // 128)
        config = GPTConfig(
            num_layers=shape.layers,
            dim=shape.dim,
            num_heads=heads,
            vocab_size=shape.vocab,
            max_seq_len=shape.seq_len,
        )
        self.model = GPT.from_config(config).to(device)
        if device.type == "cuda":
            self.model.set_compute_dtype(torch.bfloat16, embeddings=True)
        ids = torch.randint(shape.vocab, (shape.rows, shape.seq_len + 1)).to(device)
        self.batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        self.loss_fn = compile_parts(self.model, next_token_loss, setting, device)

    def __call__(self) -> float:
        """Return the loss, once the device has finished."""
        self.model.zero_grad()
        total, count = self.loss_fn(self.model, self.batch)
        (total / count).backward()  # type: ignore[no-untyped-call]
        if self.batch.inputs.device.type == "cuda":
            torch.cuda.synchronize()
        return float(total.detach() / count)


def first_step(setting: Compile, shape: Shape, cache: str) -> tuple[float, int]:
    """Return how long the first step takes in this fresh process, and into how many graphs it was compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    warnings.simplefilter("ignore")  # the compiler warns about itself
    start = time.perf_counter()
    Step(setting, shape)()
    seconds = time.perf_counter() - start
    stats: Any = torch._dynamo.utils.counters["stats"] if setting else {}
    graphs = int(stats.get("unique_graphs", 0))
    if setting and not graphs:
        raise RuntimeError(compiler_problem(shape.device) or "nothing was compiled")
    return seconds, graphs


def in_fresh_process(*args: Any) -> tuple[float, int]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(first_step, *args).result()


def main() -> None:
    parser = arguments(__doc__ or "", rounds=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parse(parser)
    sizes = (12, 768, 32_768, 8, 2_048) if args.device == "cuda" else (4, 256, 32_768, 4, 512)
    shape = Shape(*sizes, args.device)
    settings = dict(SETTINGS)
    if args.quick:  # compiling as one is what takes long
        shape = Shape(1, 32, 64, 1, 16, args.device)
        del settings["as one"]
    starts: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setting in settings.items():
            cache = str(Path(folder, name.replace(" ", "-")))  # a space breaks the compiler's command line
            starts[name] = [in_fresh_process(setting, shape, cache) for _ in ("cold", "warm")]
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # the last is what this process begins with
        warnings.simplefilter("ignore")
        steps = {name: Step(setting, shape) for name, setting in settings.items()}
        losses = {name: step() for name, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > 1e-2:
            raise SystemExit(f"the losses differ: {losses}")
        rows = timed_rows(time_rounds(steps, args.rounds, warm=True), baseline="eager")
    for row in rows:
        (row["cold_seconds"], row["graphs"]), (row["warm_seconds"], _) = starts[row["variant"]]
    report(
        "compile" + ("-cuda" if args.device == "cuda" else ""),
        shape._asdict(),
        rows,
        {
            "forward + backward": seconds_text,
            "x speed": lambda row: f"{row['speed']:.2f}",
            "first step, cold": lambda row: f"{row['cold_seconds']:.1f} s",
            "first step, warm": lambda row: f"{row['warm_seconds']:.1f} s",
            "graphs": lambda row: str(row["graphs"]),
        },
        args,
    )


if __name__ == "__main__":
    main()
