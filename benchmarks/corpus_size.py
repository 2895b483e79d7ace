"""What does a large corpus cost: time for a token, and memory?

One epoch of a corpus of each size, shuffled, in a fresh process, from text and from token shards; bytes as tokens, so
that reading, shuffling and packing are measured and not the vocabulary. The time is that of a million tokens. The full
run takes about ten minutes a round and 7 GB of disk.
"""

import tempfile
import time
from pathlib import Path

from _measure import MIB, arguments, in_fresh_process, mib_text, parse, report, resident, seconds_text, timed_rows
from _web_text import write_jsonl

from tinygpt.data import BatchLoader, JsonLines, TokenShards, tokenize_documents
from tinygpt.tokenizer import ByteTokenizer

MB = 1_000_000
ROWS, SEQ_LEN = 8, 2048


def epoch(kind: str, path: str) -> tuple[float, int | None]:
    """Read one epoch; return the seconds of a million tokens, and the peak memory of this process."""
    source = JsonLines(path) if kind == "text" else TokenShards(path)
    loader = BatchLoader(source, ByteTokenizer(), rows=ROWS, seq_len=SEQ_LEN, overflow="carry", seed=0)
    start = time.perf_counter()
    while loader.epoch == 0:
        next(loader)
    seconds = time.perf_counter() - start
    loader.close()
    return seconds / (loader.utilization().rows * SEQ_LEN) * MB, resident(highest=True)


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10, 128, 2000], help="MB of text (default 10 128 2000)"
    )
    args = parse(parser)
    sizes = [1] if args.quick else args.sizes
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory() as name:
        paths: dict[str, tuple[str, str]] = {}
        for size in sizes:
            text, tokens = Path(name) / f"{size}.jsonl", Path(name) / f"{size}"
            tokenize_documents(write_jsonl(text, size * MB), ByteTokenizer(), tokens)
            paths |= {f"text, {size:,} MB": ("text", str(text)), f"shards, {size:,} MB": ("shards", str(tokens))}
        for number in range(args.rounds):
            names = list(paths)
            for variant in names if number % 2 == 0 else reversed(names):
                took, peak = in_fresh_process(epoch, *paths[variant])
                seconds.setdefault(variant, []).append(took)
                peaks[variant] = None if peak is None else max(peak, peaks.get(variant) or 0)
    rows = timed_rows(seconds, baseline=f"text, {sizes[0]:,} MB")
    cost = {row["variant"]: row["median_seconds"] for row in rows}
    for row in rows:
        peak = peaks[row["variant"]]
        row["peak_mib"] = None if peak is None else peak / MIB
        row["cost_against_smallest"] = row["median_seconds"] / cost[f"{row['variant'].split(',')[0]}, {sizes[0]:,} MB"]
    report(
        "corpus_size",
        {"rows": ROWS, "context": SEQ_LEN, "tokens": "bytes"},
        rows,
        {
            "time for 1 M tokens": seconds_text,
            "x cost of the smallest": lambda row: f"{row['cost_against_smallest']:.2f}",
            "peak memory of the process, MiB": lambda row: mib_text(row["peak_mib"]),
        },
        args,
    )


if __name__ == "__main__":
    main()
