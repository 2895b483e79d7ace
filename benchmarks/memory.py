"""How near does the planner come to what training really takes?

Each configuration trains a few steps in a process of its own. On a CPU the peak is the highest resident memory of that
process, once as a whole and once above what was there before the model; on a GPU it is what
`torch.cuda.max_memory_allocated` says. The prediction is `training_memory`'s, made on the meta device before.
"""

import time
from typing import Any, NamedTuple

import torch
from _measure import MIB, Row, arguments, in_fresh_process, mib_text, parse, report, resident, seconds_text, timed_rows

from tinygpt import GPT, GPTConfig
from tinygpt.data import Batch
from tinygpt.layers import LMHead
from tinygpt.losses import next_token_loss
from tinygpt.memory import training_memory
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups

MODEL = {"num_layers": 6, "dim": 384, "num_heads": 3, "vocab_size": 4096, "max_seq_len": 512}
# Fields of the model, and: rows, micro-batches of a step, tokens of a chunk, checkpointing.
CPU_CASES: dict[str, dict[str, Any]] = {
    "6 x 384, 4 x 512": {},
    "recompute mlp": {"checkpointing": "mlp"},
    "recompute block": {"checkpointing": "block"},
    "two micro-batches": {"micro_batches": 2},
    "8 rows": {"rows": 8},
    "1 row": {"rows": 1},
    "3 layers": {"num_layers": 3},
    "12 layers": {"num_layers": 12},
    "640 wide": {"dim": 640, "num_heads": 5},
    "vocabulary 32,768": {"vocab_size": 32_768},
    "chunks of 64": {"vocab_size": 32_768, "chunk_tokens": 64},
    "no value embeddings": {"vocab_size": 32_768, "value_embeddings": False},
    "windows": {"window_pattern": "S"},
    "1 x 2,048": {"max_seq_len": 2048, "rows": 1},
    "grouped heads": {"num_heads": 6, "num_kv_heads": 2},
}
GPU_CASES: dict[str, dict[str, Any]] = {
    f"12 x 768, {rows} x 2,048, {checkpointing}": {"rows": rows, "checkpointing": checkpointing}
    for rows, checkpointing in [(8, "none"), (8, "mlp"), (8, "block"), (4, "none"), (1, "none"), (1, "block")]
} | {
    "chunks of 512": {"rows": 8, "chunk_tokens": 512},
    "two micro-batches": {"rows": 8, "micro_batches": 2},
    "windows": {"window_pattern": "SSSL"},
    "no value embeddings": {"value_embeddings": False},
    "20 x 1,280": {"num_layers": 20, "dim": 1280, "num_heads": 10, "rows": 4},
}
GPU_MODEL = {"num_layers": 12, "dim": 768, "num_heads": 6, "vocab_size": 32_768, "max_seq_len": 2048}


class Case:
    """One way to train, and what is predicted for it."""

    def __init__(self, fields: dict[str, Any], device: str) -> None:
        fields = dict(fields)
        self.rows: int = fields.pop("rows", 4)
        self.micro_batches: int = fields.pop("micro_batches", 1)
        self.chunk_tokens: int | None = fields.pop("chunk_tokens", None)
        self.checkpointing: Any = fields.pop("checkpointing", "none")
        self.config = GPTConfig(**fields)
        self.device = device

    def build(self, device: str) -> tuple[GPT, MuonAdamW]:
        """Return model and optimizer."""
        with torch.device(device):
            model = GPT.from_config(self.config).set_activation_checkpointing(self.checkpointing)
        if self.device == "cuda":
            model.set_compute_dtype(torch.bfloat16, embeddings=True)
        assert isinstance(model.head, LMHead)
        model.head.chunk_tokens = self.chunk_tokens
        return model, MuonAdamW(param_groups(model, nanochat_rules(model_dim=self.config.dim)))

    def predicted(self) -> int:
        """Return the bytes that the planner expects."""
        model, optimizer = self.build("meta")
        memory = training_memory(
            model,
            optimizer,
            rows=self.rows,
            seq_len=self.config.max_seq_len,
            accumulate=self.micro_batches > 1,
            device_type=self.device,
        )
        return memory.total


class Trained(NamedTuple):
    """What a process took: bytes before the model and at the peak (`None` where nobody tells), seconds of each step."""

    start: int | None
    peak: int | None
    seconds: list[float]


def train(fields: dict[str, Any], device: str, steps: int) -> Trained:
    """Train so many steps and a first one that is not timed; for a process of its own."""
    case = Case(fields, device)
    start = 0 if device == "cuda" else resident()
    model, optimizer = case.build(device)
    ids = torch.randint(case.config.vocab_size, (case.rows, case.config.max_seq_len + 1), device=device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        for _ in range(case.micro_batches):
            total = next_token_loss(model, batch).total
            (total / batch.targets.numel()).backward()  # type: ignore[no-untyped-call]
            del total
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident(highest=True)
    return Trained(start, peak, seconds[1:])


def measured(name: str, fields: dict[str, Any], device: str, steps: int) -> Row:
    """Return prediction, measurement and errors of one case."""
    predicted = Case(fields, device).predicted()
    found = in_fresh_process(train, fields, device, steps)
    row: Row = {"variant": name, "predicted_mib": predicted / MIB, "seconds": found.seconds}
    if found.start is None or found.peak is None:
        return row | {"measured_mib": None, "error": None, "whole_error": None}
    taken = found.peak - found.start
    return row | {
        "measured_mib": taken / MIB,
        "error": predicted / taken - 1,
        "whole_error": (predicted + found.start) / found.peak - 1,
    }


def percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:+.1%}"


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)"
    )
    parser.add_argument("--cases", nargs="+", help="only these")
    args = parse(parser)
    base, cases = (GPU_MODEL, GPU_CASES) if args.device == "cuda" else (MODEL, CPU_CASES)
    if args.quick:
        base, names = (
            {"num_layers": 2, "dim": 64, "num_heads": 2, "vocab_size": 300, "max_seq_len": 64},
            list(cases)[:2],
        )
        cases = {name: cases[name] for name in names}
    if args.cases:
        cases = {name: cases[name] for name in args.cases}
    rows: list[Row] = []
    for name, fields in cases.items():
        print(f"{name} ...", flush=True)
        rows.append(measured(name, {**base, **fields}, args.device, args.rounds))
    times = timed_rows({row["variant"]: row["seconds"] for row in rows}, baseline=rows[0]["variant"])
    rows = [row | timed for row, timed in zip(rows, times, strict=True)]
    report(
        "memory" + ("-cuda" if args.device == "cuda" else ""),
        {"device": args.device, "model": " ".join(f"{key} {value}" for key, value in base.items())},
        rows,
        {
            "predicted MiB": lambda row: mib_text(row["predicted_mib"]),
            "measured MiB": lambda row: mib_text(row["measured_mib"]),
            "error": lambda row: percent(row["error"]),
            "error of the whole process": lambda row: percent(row["whole_error"]),
            "a step": seconds_text,
        },
        args,
    )
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    if errors:
        print(f"largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}\n")


if __name__ == "__main__":
    main()
