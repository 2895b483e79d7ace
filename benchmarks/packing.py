"""What does best-fit packing cost, what does it crop, and how fast is the way from text to batches?

First table: `Packer`, which bisects sorted lengths, against a scan of the whole buffer for every choice; both give the
same rows. Second table: `BatchLoader` on documents of web-like, lognormal length, cropping or carrying what is cut.
"""

import numpy as np
import numpy.typing as npt
from _measure import Row, Work, arguments, parse, report, seconds_text, time_rounds, timed_rows

from tinygpt.data import BatchLoader, Overflow, TextDocuments, embedded_corpus, pack_rows
from tinygpt.tokenizer import Tokenizer, train_bpe

BOS = 0
ROWS = 4
OVERFLOWS: tuple[Overflow, ...] = ("crop", "carry")


def scan_rows(documents: list[list[int]], row_tokens: int, buffer_documents: int) -> list[list[int]]:
    """Pack as `pack_rows(..., overflow="crop")` does, by looking at every document of the buffer each time."""
    waiting, buffer, rows, row = iter(documents), list[list[int]](), list[list[int]](), list[int]()
    while True:
        while len(buffer) < buffer_documents and (document := next(waiting, None)) is not None:
            buffer.append(document)
        if not buffer:
            return rows
        space = row_tokens - len(row)
        best, shortest = -1, 0
        for index, document in enumerate(buffer):
            length = len(document) + 1
            if length <= space and (best < 0 or length > len(buffer[best]) + 1):
                best = index
            if length < len(buffer[shortest]) + 1:
                shortest = index
        chosen = buffer.pop(best if best >= 0 else shortest)
        row += [BOS, *chosen[: space - 1]]
        if len(row) == row_tokens:
            rows.append(row)
            row = []


def lengths(count: int, median: float, seed: int = 0) -> list[int]:
    """Return lognormal lengths with sigma 1.1: the mean is 1.8 times the median, one in a hundred 13 times."""
    draws = np.random.default_rng(seed).lognormal(np.log(median), 1.1, count)
    return [max(1, int(draw)) for draw in draws]


def web_like_documents(count: int, median_characters: float) -> list[str]:
    """Cut the embedded text into documents of lognormal length, starting over at its end."""
    text = "\n".join(text for text, _ in embedded_corpus().read())
    documents, start = [], 0
    for length in lengths(count, median_characters):
        length = min(length, len(text) // 2)
        start = 0 if start + length > len(text) else start
        documents.append(text[start : start + length])
        start += length
    return documents


def packing_rows(documents: int, row_tokens: int, buffer: int, rounds: int) -> list[Row]:
    """Measure packing alone, on token ids that are ready."""
    token_ids = [[1] * length for length in lengths(documents, 500)]
    arrays = [np.asarray(ids, dtype=np.int32) for ids in token_ids]

    def sorted_lengths() -> list[npt.NDArray[np.int32]]:
        return list(pack_rows(arrays, row_tokens=row_tokens, bos_token_id=BOS, buffer_documents=buffer))

    def scan() -> list[list[int]]:
        return scan_rows(token_ids, row_tokens, buffer)

    whole = [row.tolist() for row in sorted_lengths() if row[-1] >= 0]
    assert scan() == whole, "the scan and the Packer must pack alike"
    works = {"linear scan": scan, "Packer": sorted_lengths}
    rows = timed_rows(time_rounds(works, rounds, warm=True), baseline="linear scan")
    for row in rows:
        row["rows_per_second"] = len(whole) / row["median_seconds"]
    return rows


def take(loader: BatchLoader, batches: int) -> Work:
    """Return work that takes the next batches."""

    def work() -> None:
        for _ in range(batches):
            next(loader)

    return work


def loader_rows(texts: list[str], tokenizer: Tokenizer, contexts: list[int], tokens: int, rounds: int) -> list[Row]:
    """Measure the whole way from text for each context and overflow, and count what was cropped."""
    loaders: dict[str, BatchLoader] = {}
    steps: dict[str, int] = {}
    for context in contexts:
        for overflow in OVERFLOWS:
            name = f"{overflow}, context {context}"
            source = TextDocuments(texts)
            loaders[name] = BatchLoader(source, tokenizer, rows=ROWS, seq_len=context, overflow=overflow)
            steps[name] = max(1, tokens // (ROWS * context))
    works = {name: take(loader, steps[name]) for name, loader in loaders.items()}
    result = timed_rows(time_rounds(works, rounds), baseline=next(iter(works)))
    for row, context in zip(result, np.repeat(contexts, len(OVERFLOWS)).tolist(), strict=True):
        counts = loaders[row["variant"]].utilization()
        row["tokens_per_second"] = steps[row["variant"]] * ROWS * context / row["median_seconds"]
        row["cropped_fraction"] = counts.cropped_fraction
    return result


def main() -> None:
    args = parse(arguments(__doc__ or "", rounds=5))
    buffer, documents = (50, 200) if args.quick else (1000, 4000)
    packing = packing_rows(documents, 2049, buffer, args.rounds)
    report(
        "packing",
        {"documents": documents, "buffer": buffer, "row": 2049},
        packing,
        {
            "time": seconds_text,
            "rows/s": lambda row: f"{row['rows_per_second']:,.0f}",
            "x speed of the scan": lambda row: f"{row['speed']:.1f}",
        },
        args,
    )
    train_texts = [text for text, _ in embedded_corpus().read()]
    vocab, tokens, contexts = (512, 2**12, [128]) if args.quick else (8192, 2**19, [512, 2048])
    tokenizer = train_bpe(train_texts, vocab_size=vocab, max_characters=100_000 if args.quick else None)
    texts = web_like_documents(300 if args.quick else 20_000, 2_000)
    report(
        "loader",
        {"documents": len(texts), "median characters": 2_000, "vocab": vocab, "tokens a round": tokens, "buffer": 1000},
        loader_rows(texts, tokenizer, contexts, tokens, args.rounds),
        {
            "time": seconds_text,
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "cropped": lambda row: f"{row['cropped_fraction']:.1%}",
        },
        args,
    )


if __name__ == "__main__":
    main()
