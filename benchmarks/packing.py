"""What does each way of packing cost, and how many tokens does it lose?

`linear scan` looks at every document of the buffer for every choice; `Packer` bisects sorted lengths, and both give the
same rows when cropping. Token ids of lognormal lengths, median 500, are ready in memory.
"""

import numpy as np
from _measure import Row, Work, arguments, parse, report, seconds_text, time_rounds, timed_rows
from _scan import scan_rows
from _web_text import lengths

from tinygpt.data import Overflow, Packer, pack_rows

BOS = 0
OVERFLOWS: tuple[Overflow, ...] = ("crop", "carry", "concat")
CONTEXTS = (512, 2048)


def packing_rows(documents: int, context: int, buffer: int, rounds: int) -> list[Row]:
    """Time packing into rows of a context, and count what is lost there and at the other contexts."""
    token_ids = [[1] * length for length in lengths(documents, 500)]
    arrays = [np.asarray(ids, dtype=np.int32) for ids in token_ids]
    made: dict[str, int] = {}

    def scan() -> None:
        rows = scan_rows(token_ids, row_tokens=context + 1, bos=BOS, buffer_documents=buffer)
        made["linear scan, crop"] = sum(1 for _ in rows)

    def packer(overflow: Overflow) -> Work:
        def work() -> None:
            rows = pack_rows(
                arrays, row_tokens=context + 1, bos_token_id=BOS, buffer_documents=buffer, overflow=overflow
            )
            made[f"Packer, {overflow}"] = sum(1 for _ in rows)

        return work

    packed = pack_rows(arrays, row_tokens=context + 1, bos_token_id=BOS, buffer_documents=buffer)
    whole = [row.tolist() for row in packed if row[-1] >= 0]
    scanned = list(scan_rows(token_ids, row_tokens=context + 1, bos=BOS, buffer_documents=buffer))
    assert scanned == whole, "the scan and the Packer must pack alike"
    works = {"linear scan, crop": scan, **{f"Packer, {overflow}": packer(overflow) for overflow in OVERFLOWS}}
    rows = timed_rows(time_rounds(works, rounds), baseline="linear scan, crop")
    for row in rows:
        overflow = row["variant"].split(", ")[1]
        row["rows_per_second"] = made[row["variant"]] / row["median_seconds"]
        row["lost_fraction"] = {str(n): lost_fraction(arrays, n, buffer, overflow) for n in CONTEXTS}
    return rows


def lost_fraction(
    arrays: list[np.ndarray[tuple[int], np.dtype[np.int32]]], context: int, buffer: int, how: Overflow
) -> float:
    """Return the share of all tokens that is in no row."""
    packer = Packer(row_tokens=context + 1, bos_token_id=BOS, buffer_documents=buffer, overflow=how)
    documents = iter(arrays)
    while packer.next_row(documents) is not None:
        pass
    packer.finish_row()
    return packer.utilization.cropped_fraction


def main() -> None:
    args = parse(arguments(__doc__ or "", rounds=5))
    buffer, documents = (50, 200) if args.quick else (1000, 4000)
    report(
        "packing",
        {"documents": documents, "buffer": buffer, "context": 2048},
        packing_rows(documents, 2048, buffer, args.rounds),
        {
            "time": seconds_text,
            "rows/s": lambda row: f"{row['rows_per_second']:,.0f}",
            "x speed of the scan": lambda row: f"{row['speed']:.1f}",
            "lost at 512": lambda row: f"{row['lost_fraction']['512']:.1%}",
            "lost at 2048": lambda row: f"{row['lost_fraction']['2048']:.1%}",
        },
        args,
    )


if __name__ == "__main__":
    main()
