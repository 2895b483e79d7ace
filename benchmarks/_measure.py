"""What the benchmarks share: the machine's facts, interleaved timing, peak memory in a fresh process, the report."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

import tinygpt

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Row = dict[str, Any]
Work = Callable[[], object]
T = TypeVar("T")


_for_all: ProcessPoolExecutor | None = None  # the process that a quick run calls everything in


class Memory(NamedTuple):
    """Resident memory of a process in bytes, before the work and at its highest."""

    start: int
    peak: int

    @property
    def extra_mib(self) -> float:
        """What the work took on top, in MiB."""
        return max(0, self.peak - self.start) / MIB


def arguments(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes; the first line of `description` is its question."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=_positive, default=rounds, help=f"times each variant runs (default {rounds})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 rounds: does it run, not how fast")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON (default benchmarks/results)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; `--quick` means two rounds whatever `--rounds` says, and one process for all variants."""
    global _for_all
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
        _for_all = _one_process()  # starting others is what takes long
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def time_rounds(variants: Mapping[str, Work], rounds: int, *, warm: bool = False) -> dict[str, list[float]]:
    """Run every variant once unmeasured unless they are `warm`, then once a round; return the seconds of each.

    Within a round the variants follow each other, so load that comes and goes meets all of them; each round starts
    with another one, so none always runs behind the same neighbour.
    """
    if not warm:
        for work in variants.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def timed_rows(seconds: Mapping[str, Sequence[float]], baseline: str) -> list[Row]:
    """Return a row a variant: median and quartiles of the seconds, and how many times the baseline's speed.

    The speed is the median over rounds of baseline seconds / variant seconds, each pair taken in the same round.
    """
    rows: list[Row] = []
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(seconds[baseline], values, strict=True)]
        rows.append(
            {
                "variant": name,
                "median_seconds": float(np.median(values)),
                "quartile_seconds": [float(np.percentile(values, q)) for q in (25, 75)],
                "speed": float(np.median(ratios)),
                "speed_quartiles": [float(np.percentile(ratios, q)) for q in (25, 75)],
                "seconds": [float(value) for value in values],
            }
        )
    return rows


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Return `function(*args)` of a fresh process, or of the one that a quick run has for all calls.

    `function` must be importable by name from the script, as `multiprocessing` asks.
    """
    if _for_all is not None:
        return _for_all.submit(function, *args).result()
    with _one_process() as pool:
        return pool.submit(function, *args).result()


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def peak_memory(build: Callable[..., Work], *args: object) -> Memory | None:
    """Call `build(*args)` in a fresh process, then run what it returns, and measure that; None where it cannot be told.

    `build` must be importable by name from the script, as `multiprocessing` asks.
    """
    return in_fresh_process(_measure_memory, build, args)


def _measure_memory(build: Callable[..., Work], args: tuple[object, ...]) -> Memory | None:
    work = build(*args)
    gc.collect()
    start = resident()
    work()
    peak = resident(highest=True)
    return None if start is None or peak is None else Memory(start, peak)


def resident(*, highest: bool = False) -> int | None:
    """Return the bytes of this process in memory, mapped files included, now or at most; None where it is not told."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its maximum is inherited from the parent through fork and exec.
        key = "VmHWM:" if highest else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        # Only the maximum is told: before the work it is that of the imports and of building.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def seconds_text(row: Row) -> str:
    """Return a row's median and quartiles in the unit that suits them."""
    factor, unit = (1.0, "s") if row["median_seconds"] >= 10 else (1e3, "ms")
    low, high = (value * factor for value in row["quartile_seconds"])
    return f"{row['median_seconds'] * factor:.4g} {unit} ({low:.4g}-{high:.4g})"


def mib_text(value: float | None) -> str:
    """Return a memory cell."""
    return "n/a" if value is None else f"{value:,.0f}"


def report(
    name: str, settings: dict[str, Any], rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], args: Any
) -> None:
    """Print the table and write everything behind it to `<name>.json`; a quick run writes `<name>-quick.json`."""
    facts = machine()
    print(" | ".join(f"{key} {value}" for key, value in {**facts, **settings, "rounds": args.rounds}.items()))
    cells = [["variant", *columns], *([row["variant"], *(text(row) for text in columns.values())] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("| " + " | ".join([first, *rest]) + " |")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{name}{'-quick' if args.quick else ''}.json"
    content = {"benchmark": name, "machine": facts, "settings": settings, "rounds": args.rounds}
    path.write_text(json.dumps({**content, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}\n")


def machine() -> dict[str, Any]:
    """Return when it is, and what a timing depends on: processor, GPU, threads, versions and commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tinygpt": tinygpt.__version__,
        "commit": _commit(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the short commit, with `+` behind it when tracked files under `src` or here differ from it.

    A copy without its repository does not know it: there `TINYGPT_COMMIT` tells.
    """
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "src", "benchmarks/*.py"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TINYGPT_COMMIT") or "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout else "")
