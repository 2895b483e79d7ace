"""How fast do batches come from text and from token shards, against a loader that scans its buffer?

`scan` is nanochat's design in plain code: documents tokenized 128 at a time on 4 threads, and a look at every document
of the buffer for every choice. It and `BatchLoader` with `overflow="crop"` and no seed give the same rows. Text is read
from JSON lines; the book's own vocabulary makes 3.5 bytes a token of it.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _measure import Work, arguments, parse, report, seconds_text, time_rounds, timed_rows
from _scan import scan_rows
from _web_text import write_jsonl

from tinygpt.data import BatchLoader, DocumentSource, TokenShards, embedded_corpus, tokenize_documents
from tinygpt.tokenizer import Tokenizer, train_bpe

ROWS, BUFFER = 8, 1000


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


def scan_batches(
    source: DocumentSource, tokenizer: Tokenizer, seq_len: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets of rows packed by scanning."""
    documents = scan_documents(source, tokenizer)
    rows = scan_rows(documents, row_tokens=seq_len + 1, bos=tokenizer.bos_token_id, buffer_documents=BUFFER)
    while True:
        batch = torch.tensor([next(rows) for _ in range(ROWS)], dtype=torch.int64)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def take(source: DocumentSource | TokenShards, tokenizer: Tokenizer, seq_len: int, batches: int, **how: Any) -> Work:
    """Return work that makes a loader and takes its first batches, less than an epoch."""

    def work() -> None:
        loader = BatchLoader(source, tokenizer, rows=ROWS, seq_len=seq_len, buffer_documents=BUFFER, **how)
        for _ in range(batches):
            next(loader)
        assert loader.epoch == 0
        loader.close()

    return work


def main() -> None:
    args = parse(arguments(__doc__ or "", rounds=5))
    seq_len, text_bytes, vocab = (128, 400_000, 512) if args.quick else (2048, 20_000_000, 16_384)
    tokenizer = train_bpe(embedded_corpus(), vocab_size=vocab, max_characters=100_000 if args.quick else None)
    with tempfile.TemporaryDirectory() as name:
        source = write_jsonl(Path(name) / "text.jsonl", text_bytes)
        shards = tokenize_documents(source, tokenizer, Path(name) / "tokens", processes=1)
        counting = BatchLoader(shards, rows=ROWS, seq_len=seq_len, buffer_documents=BUFFER)
        while counting.epoch == 0:  # crop gives the fewest rows, and the last batch may reach into the next epoch
            next(counting)
        counting.close()
        batches = counting.utilization().rows // ROWS - 2
        loader = BatchLoader(shards, rows=ROWS, seq_len=seq_len, buffer_documents=BUFFER)
        for (inputs, targets), batch, _ in zip(
            scan_batches(source, tokenizer, seq_len), loader, range(5), strict=False
        ):
            assert torch.equal(inputs, batch.inputs), "the scan and the loader must pack alike"
            assert torch.equal(targets, batch.targets), "the scan and the loader must pack alike"
        loader.close()

        def scan() -> None:
            made = scan_batches(source, tokenizer, seq_len)
            for _ in range(batches):
                next(made)

        variants: dict[str, Work] = {"scan, from text": scan}
        for kind, texts in (("text", source), ("shards", shards)):
            variants[f"BatchLoader, {kind}"] = take(texts, tokenizer, seq_len, batches)
            variants[f"BatchLoader, {kind}, shuffled"] = take(texts, tokenizer, seq_len, batches, seed=1)
            variants[f"BatchLoader, {kind}, carry"] = take(texts, tokenizer, seq_len, batches, overflow="carry")
        rows = timed_rows(time_rounds(variants, args.rounds), baseline="scan, from text")
    for row in rows:
        row["tokens_per_second"] = batches * ROWS * seq_len / row["median_seconds"]
    report(
        "loader",
        {"text bytes": text_bytes, "vocab": vocab, "context": seq_len, "rows": ROWS, "batches": batches},
        rows,
        {
            "time": seconds_text,
            "M tokens/s": lambda row: f"{row['tokens_per_second'] / 1e6:.3g}",
            "x speed of the scan": lambda row: f"{row['speed']:.3g}",
        },
        args,
    )


if __name__ == "__main__":
    main()
