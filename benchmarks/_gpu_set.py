"""Run the tests and benchmarks that need a CUDA device, one after the other, the most telling first.

Each is a process of its own with a time limit; one that fails or runs out of time stops none of the others, and the
exit status says in the end whether all went well. Names of steps choose some of them; `--seconds` is for all together,
and what finds too little of it left is not begun. Nothing but torch and what tinygpt imports has to be installed:

    PYTHONPATH=src:site python3 benchmarks/_gpu_set.py --seconds 500 tests training fp8

runs with a torch that is there already and a folder `site` of what else is missing; the page on benchmarks says how to
carry it. Where the repository is left behind, `TINYGPT_COMMIT` tells the commit.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = "-m pytest -q -m gpu -n 4 --dist worksteal --durations 8 -p no:cacheprovider -p no:benchmark"
FEWER_BITS = ["products in fp8", "products in int8", "tables in bfloat16, by chance, by rows"]


class Step(NamedTuple):
    """A process, and the seconds after which it is stopped: about twice what it should take on a large GPU."""

    arguments: list[str]
    limit: int


def steps() -> dict[str, Step]:
    """Return the steps by name in their order."""

    def script(name: str, options: str, *more: str, limit: int) -> Step:
        return Step([f"benchmarks/{name}.py", *options.split(), *more], limit)

    # Only files that hold such tests: others may import what is not installed.
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    return {
        "tests": Step([*TESTS.split(), *(str(path.relative_to(ROOT)) for path in files)], 300),
        "training": script("gpu_training", "--parts variants --seconds 240", limit=320),
        "fp8": script("gpu_training", "--parts fp8 --seconds 90", limit=150),
        "memory": script("memory", "--device cuda --rounds 2", limit=180),
        "attention": script("attention", "--device cuda", limit=180),
        "optimizer": script("optimizer_step", "--full --device cuda --rounds 5", limit=180),
        "low_precision": script("low_precision", "--device cuda --steps 200 --variants", *FEWER_BITS, limit=300),
        "curves": script("gpu_training", "--parts context batch depth --seconds 80 --rounds 5", limit=300),
        "compile": script("compile", "--device cuda --rounds 5", limit=300),
    }


def run(step: Step, seconds: float) -> tuple[str, float]:
    """Run a step for at most so many seconds; return how it ended, empty if well, and how long it took."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *step.arguments], cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds)
        ended = "" if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        ended = "ran out of time"
    finally:
        _stop(process)
    return ended, time.monotonic() - start


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process with all it has started, which would keep the GPU busy under the next step."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, 9)
        process.kill()
        process.wait()


def main() -> None:
    known = steps()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="STEP", help=f"only these, in this order: {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all together (default: no limit)")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"there is no step {', '.join(unknown)}; choose from {', '.join(known)}.")
    if not torch.cuda.is_available():
        parser.error("these steps need a CUDA device, and torch sees none.")
    begin, ends = time.monotonic(), dict[str, str]()
    for name in args.names or known:
        left = args.seconds - (time.monotonic() - begin)
        if left < 20:
            ends[name] = "not begun: no time left"
            continue
        print(f"== {name}: {' '.join(known[name].arguments)}", flush=True)
        ended, seconds = run(known[name], min(left, known[name].limit))
        ends[name] = ended
        print(f"== {name}: {ended or 'done'} after {seconds:.0f} s", flush=True)
    print("\n".join(f"{name}: {ended or 'done'}" for name, ended in ends.items()))
    sys.exit(1 if any(ends.values()) else 0)


if __name__ == "__main__":
    main()
