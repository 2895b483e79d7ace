"""Draw every picture of the Explanation pages from the library's own code.

    python docs/explanation/figures.py                  all of them, into docs/assets/blocks
    python docs/explanation/figures.py rotary smear     these only

The pictures have no background and colours of middle brightness, so they read on a light page and on a dark one.
"""

import argparse
from pathlib import Path

import _layer_figures  # noqa: F401  # registers its pictures
import _training_figures  # noqa: F401
import matplotlib as mpl
import torch
from _drawing import FIGURES, STYLE

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(FIGURES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "blocks")
    args = parser.parse_args()
    if unknown := set(args.names) - set(FIGURES):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; choose of {', '.join(FIGURES)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE), torch.random.fork_rng():
        for name in args.names or FIGURES:
            path = args.out / f"{name}.svg"
            FIGURES[name]().savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
            print(path)


if __name__ == "__main__":
    main()
