"""How fast do batches come from text and from token shards, and what does a large corpus cost?

First table, same rows from all: `scan` is nanochat's design in plain code, documents tokenized 128 at a time on 4
threads and a scan of the whole buffer for every choice; against `BatchLoader` from text and from token shards. The
speed is the median over rounds of seconds of the scan / seconds of the variant, in the same round. Second table:
packing alone. Third: what packing loses. Fourth: one epoch of a corpus of each size in a fresh process, bytes as
tokens, its cost a token and its peak memory; the full run takes a few minutes and 7 GB of disk.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinygpt.data import (
    BatchLoader,
    DocumentSource,
    JsonLines,
    TokenShards,
    embedded_corpus,
    pack_rows,
    tokenize_documents,
)
from tinygpt.tokenizer import ByteTokenizer, Tokenizer, train_bpe

SEQ_LEN, ROWS, BUFFER = 2048, 8, 1000


def scan_rows(documents: Iterator[list[int]], row_tokens: int, bos: int) -> Iterator[list[int]]:
    """Fill rows by looking at every document of the buffer for every choice; crop the shortest when none fits."""
    buffer: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < row_tokens:
            while len(buffer) < BUFFER:
                document = next(documents, None)
                if document is None:
                    break
                buffer.append([bos, *document])
            if not buffer:
                return
            space, best, best_length, shortest = row_tokens - len(row), -1, 0, 0
            for index, document in enumerate(buffer):
                length = len(document)
                if best_length < length <= space:
                    best, best_length = index, length
                if length < len(buffer[shortest]):
                    shortest = index
            row += buffer.pop(best if best >= 0 else shortest)[:space]
        yield row


def scan_documents(source: DocumentSource, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Tokenize 128 documents at a time on 4 threads, and wait for them."""
    texts: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        for text, _ in source.read():
            texts.append(text)
            if len(texts) == 128:
                yield from pool.map(tokenizer.encode, texts)
                texts = []
        yield from pool.map(tokenizer.encode, texts)


def scan_batches(source: DocumentSource, tokenizer: Tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets of rows packed by scanning."""
    rows = scan_rows(scan_documents(source, tokenizer), SEQ_LEN + 1, tokenizer.bos_token_id)
    while True:
        batch = torch.tensor([next(rows) for _ in range(ROWS)], dtype=torch.int64)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def web_like_texts(num_bytes: int, seed: int = 0) -> Iterator[str]:
    """Cut the embedded book into documents of lognormal length, median 2,000 characters and sigma 1.1."""
    book = "\n".join(text for text, _ in embedded_corpus().read())
    random = np.random.default_rng(seed)
    made = 0
    while made < num_bytes:
        lengths = np.minimum(random.lognormal(np.log(2000), 1.1, 4096), len(book) // 2).astype(int)
        starts = (random.random(4096) * (len(book) - lengths)).astype(int)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            text = book[start : start + length + 1]
            yield text
            made += len(text)
            if made >= num_bytes:
                return


def write_jsonl(path: Path, num_bytes: int) -> JsonLines:
    """Write such documents as JSON lines; a large corpus repeats 64 MB of them."""
    block = "".join(json.dumps({"text": text}) + "\n" for text in web_like_texts(min(num_bytes, 64_000_000)))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(1, round(num_bytes / 64_000_000))):
            file.write(block)
    return JsonLines(path)


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run all variants once a round, beginning with another one each time; return the seconds of each."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            variants[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_table(title: str, seconds: Mapping[str, list[float]], tokens: Mapping[str, int], baseline: str) -> None:
    print(f"\n{title}\n| variant | M tok/s, median (quartiles) | times `{baseline}` (quartiles) |\n|---|---|---|")
    for name, values in seconds.items():
        speeds = np.percentile([tokens[name] / value / 1e6 for value in values], [50, 25, 75])
        base = [tokens[baseline] / value for value in seconds[baseline]]
        own = [tokens[name] / value for value in values]
        ratios = np.percentile(np.divide(own, base), [50, 25, 75])
        print(f"| {name} | {speeds[0]:.3g} ({speeds[1]:.3g}-{speeds[2]:.3g}) | ", end="")
        print(f"{ratios[0]:.3g} ({ratios[1]:.3g}-{ratios[2]:.3g}) |")


def measure_speed(folder: Path, rounds: int, text_bytes: int) -> None:
    tokenizer = train_bpe((text for text, _ in embedded_corpus().read()), vocab_size=16384)
    source = write_jsonl(folder / "speed.jsonl", text_bytes)
    shards = tokenize_documents(source, tokenizer, folder / "speed", processes=1)
    batches = int(shards.num_tokens * 0.6) // (ROWS * SEQ_LEN)  # about a third is cropped

    def loader(source: DocumentSource | TokenShards, **settings: Any) -> Callable[[], object]:
        def work() -> None:
            made = BatchLoader(source, tokenizer, rows=ROWS, seq_len=SEQ_LEN, buffer_documents=BUFFER, **settings)
            for _ in range(batches):
                next(made)
            assert made.epoch == 0
            made.close()

        return work

    def scan() -> None:
        made = scan_batches(source, tokenizer)
        for _ in range(batches):
            next(made)

    check = BatchLoader(shards, rows=ROWS, seq_len=SEQ_LEN, buffer_documents=BUFFER)
    for expected, _ in zip(scan_batches(source, tokenizer), range(5), strict=False):
        assert torch.equal(expected[0], next(check).inputs), "the scan and the loader must pack alike"
    variants = {
        "scan, from text": scan,
        "BatchLoader, text": loader(source),
        "BatchLoader, text, shuffled": loader(source, seed=1),
        "BatchLoader, shards": loader(shards),
        "BatchLoader, shards, shuffled": loader(shards, seed=1),
        "BatchLoader, shards, carry": loader(shards, overflow="carry"),
        "BatchLoader, shards, concat": loader(shards, overflow="concat"),
    }
    tokens = dict.fromkeys(variants, batches * ROWS * SEQ_LEN)
    title = f"From text to batches of {ROWS} x {SEQ_LEN}, buffer {BUFFER}, {shards.num_tokens / 1e6:.1f} M tokens"
    speed_table(title, interleaved(variants, rounds), tokens, "scan, from text")

    arrays = [tokens for tokens, _ in shards.read()]
    lists = [array.tolist() for array in arrays]
    row_counts: dict[str, int] = {}

    def packed(overflow: Any) -> Callable[[], object]:
        def work() -> None:
            rows = pack_rows(arrays, row_tokens=SEQ_LEN + 1, bos_token_id=0, buffer_documents=BUFFER, overflow=overflow)
            row_counts[overflow] = sum(1 for _ in rows)

        return work

    def scanned() -> None:
        row_counts["scan"] = sum(1 for _ in scan_rows(iter(lists), SEQ_LEN + 1, 0))

    packing = {"scan": scanned, **{kind: packed(kind) for kind in ("crop", "carry", "concat")}}
    seconds = interleaved(packing, rounds)
    counts = {name: row_counts[name] * SEQ_LEN for name in packing}
    speed_table(f"Packing alone, {len(arrays):,} documents", seconds, counts, "scan")

    print("\nTokens lost in one epoch\n| context | crop | carry | concat |\n|---|---|---|---|")
    for seq_len in (512, 2048):
        lost = []
        for overflow in ("crop", "carry", "concat"):
            made = BatchLoader(shards, rows=1, seq_len=seq_len, overflow=overflow)
            while made.epoch == 0:
                next(made)
            lost.append(f"{made.utilization().cropped_fraction:.1%}")
            made.close()
        print(f"| {seq_len} | {' | '.join(lost)} |")


def epoch_cost(kind: str, path: str) -> tuple[int, float, int]:
    """Read one epoch in this process; return tokens in rows, seconds and the peak of resident memory."""
    source = JsonLines(path) if kind == "text" else TokenShards(path)
    made = BatchLoader(source, ByteTokenizer(), rows=ROWS, seq_len=SEQ_LEN, overflow="carry", seed=0)
    start = time.perf_counter()
    while made.epoch == 0:
        next(made)
    seconds = time.perf_counter() - start
    tokens = made.utilization().rows * SEQ_LEN
    made.close()
    return tokens, seconds, peak_resident()


def peak_resident() -> int:
    """Return the highest resident memory of this process in bytes, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's maximum is inherited from the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_size(folder: Path, sizes: list[int]) -> None:
    print("\nOne shuffled epoch, bytes as tokens, `carry`, each in a fresh process")
    print("| corpus | from | M tok/s | cost a token, times the smallest's | peak memory, MB |\n|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    smallest: dict[str, str] = {}
    for size in sizes:
        jsonl, tokens = folder / f"{size}.jsonl", folder / f"{size}"
        write_jsonl(jsonl, size)
        tokenize_documents(JsonLines(jsonl), ByteTokenizer(), tokens)
        for kind, path in (("text", str(jsonl)), ("shards", str(tokens))):
            smallest.setdefault(kind, path)
            costs = {}
            # The smallest once more beside each, since other work on the machine comes and goes.
            for name in ("small", "this", "again"):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    used = path if name == "this" else smallest[kind]
                    costs[name] = pool.submit(epoch_cost, kind, used).result()
            count, seconds, peak = costs["this"]
            small = np.mean([costs[name][1] / costs[name][0] for name in ("small", "again")])
            print(f"| {size / 1e6:,.0f} MB | {kind} | {count / seconds / 1e6:.1f} | ", end="")
            print(f"{seconds / count / small:.2f} | {peak / 1e6:,.0f} |", flush=True)
        if size != sizes[0]:
            jsonl.unlink()
            shutil.rmtree(tokens)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return f"{cpu}, {os.cpu_count()} cores | Python {sys.version.split()[0]} | torch {torch.__version__} | {commit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times each variant runs (default 7)")
    parser.add_argument("--quick", action="store_true", help="small sizes and 2 rounds: does it run, not how fast")
    parser.add_argument("--part", choices=["speed", "size"], help="one part only")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        if options.part != "size":
            measure_speed(
                Path(folder), 2 if options.quick else options.rounds, 6_000_000 if options.quick else 20_000_000
            )
        if options.part != "speed":
            measure_size(
                Path(folder), [2_000_000, 10_000_000] if options.quick else [10_000_000, 128_000_000, 2_000_000_000]
            )


if __name__ == "__main__":
    main()
