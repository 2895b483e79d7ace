"""Where do the three recipes of the d12 example end, and what does each do on its way?

Runs `examples/reproduce_rtx4070_d12.py` once for every recipe and seed: the same tokens, one frozen validation set.
Draws validation bits per byte with the spread of the seeds above learning rate and weight decay, all against steps,
and writes the numbers as JSON. A run that is there is not repeated and one that was cut goes on, so the same command
can be stopped and given again.

    python docs/reproduction/recipes.py                 nine runs: about half an hour on two idle CPU cores
    python docs/reproduction/recipes.py --seeds 1       one of each
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tinygpt
from tinygpt.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "reproduce_rtx4070_d12.py"
RECIPES = {"one-horizon": "#1b6ca8", "wsd": "#2a8a4a", "documented": "#c0392b"}

Curve = dict[int, float]


def train(recipe: str, seed: int, scale: str, out: Path) -> None:
    """Run the example, or go on with it; what it prints goes into `log.txt` of its folder."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(EXAMPLE), "--scale", scale, "--recipe", recipe, "--seed", str(seed)]
    command += ["--device", "cpu", "--out", str(out), *(["--accept", "schedule"] if recipe == "documented" else [])]
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        finished = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed; see {out / 'log.txt'}")


def read(out: Path) -> dict[str, Any]:
    """Return the curves of a run: loss, learning rate and weight decay by step, bits per byte where it was measured."""
    records = read_metrics(out / "metrics.jsonl")
    steps = [record for record in records if record.get("event") == "step"]
    evaluations = [record for record in records if record.get("event") == "evaluation"]
    return {
        "bpb": {record["step"] + 1: record["bpb"] for record in evaluations},
        "lr": {record["step"]: record["lr"] for record in steps},
        "weight_decay": {record["step"]: record["weight_decay"] for record in steps},
        "data_hash": {record["data_hash"] for record in evaluations},
        "tokens": steps[-1]["tokens"],
    }


def summarize(runs: dict[str, list[dict[str, Any]]], phase_ends: dict[str, int]) -> list[dict[str, Any]]:
    """Return for each recipe the ends of its seeds, what each differs from one-horizon by, and its worst step up."""
    rows = []
    baseline = [list(run["bpb"].values())[-1] for run in runs["one-horizon"]]
    for recipe, seeds in runs.items():
        curve = mean_curve(seeds)
        ends = [list(run["bpb"].values())[-1] for run in seeds]
        values = list(curve.values())
        rise = max([after - before for before, after in pairwise(values)], default=0.0)
        rows.append(
            {
                "variant": recipe,
                "phase_1_steps": phase_ends[recipe],
                "final_bpb": ends,
                "final_mean": statistics.fmean(ends),
                "final_spread": statistics.stdev(ends) if len(ends) > 1 else math.nan,
                "difference_same_seed": [end - base for end, base in zip(ends, baseline, strict=True)],
                "largest_rise": max(rise, 0.0),
                "bpb": curve,
            }
        )
    return rows


def mean_curve(seeds: list[dict[str, Any]]) -> Curve:
    """Return the mean over seeds at every step that all of them measured."""
    common = set.intersection(*(set(run["bpb"]) for run in seeds))
    return {step: statistics.fmean(run["bpb"][step] for run in seeds) for step in sorted(common)}


def draw(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw bits per byte, learning rate and weight decay against steps."""
    figure = Figure(figsize=(8, 8.5), layout="constrained", dpi=120)
    bpb, lr, decay = figure.subplots(3, 1, sharex=True, height_ratios=[4, 2, 2])
    for recipe, color in RECIPES.items():
        seeds = runs[recipe]
        curve = mean_curve(seeds)
        x = list(curve)
        low, high = ([pick(run["bpb"][step] for run in seeds) for step in x] for pick in (min, max))
        bpb.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        style: dict[str, Any] = {"color": color, "label": recipe, "linestyle": "--" if recipe == "documented" else "-"}
        bpb.plot(x, list(curve.values()), marker="o", markersize=3, **style)
        for axes, name in ((lr, "lr"), (decay, "weight_decay")):
            axes.plot(list(seeds[0][name]), list(seeds[0][name].values()), **style)
    late = [value for seeds in runs.values() for run in seeds for step, value in run["bpb"].items() if step >= x[1]]
    margin = 0.05 * (max(late) - min(late))
    bpb.set_ylim(min(late) - margin, max(late) + margin)
    bpb.set_ylabel("validation (bits per byte)")
    lr.set_ylabel("learning rate of Muon")
    decay.set_ylabel("weight decay of Muon")
    decay.set_xlabel("step")
    bpb.legend(frameon=False, title=f"mean and range of {len(runs['wsd'])} seeds")
    every: list[Axes] = [bpb, lr, decay]
    for axes in every:
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each recipe (default: 3)")
    parser.add_argument("--scale", choices=("demo", "smoke"), default="demo", help="of the example (default: demo)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "recipes", help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="of recipes.png and recipes.json")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give 1 or more.")
    scale = args.scale
    runs: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in RECIPES}
    phase_ends: dict[str, int] = {}
    for seed in range(args.seeds):
        for recipe in RECIPES:
            out = args.work / f"{scale}-{recipe}-{seed}"
            print(f"{recipe}, seed {seed} ...", end=" ", flush=True)
            if not (out / "curve.png").exists():  # the last thing a run writes
                train(recipe, seed, scale, out)
            run = read(out)
            runs[recipe].append(run)
            phases = [r["step"] for r in read_metrics(out / "metrics.jsonl") if r.get("event") == "phase"]
            phase_ends[recipe] = phases[0]
            print(f"{list(run['bpb'].values())[-1]:.4f} bits per byte", flush=True)
    hashes = {each for seeds in runs.values() for run in seeds for each in run["data_hash"]}
    tokens = {run["tokens"] for seeds in runs.values() for run in seeds}
    if len(hashes) != 1 or len(tokens) != 1:
        sys.exit(f"the runs in {args.work} differ in validation set or tokens; give another --work.")
    rows = summarize(runs, phase_ends)
    for row in rows:
        differences = ", ".join(f"{difference:+.4f}" for difference in row["difference_same_seed"])
        print(f"{row['variant']:12} {row['final_mean']:.4f} +- {row['final_spread']:.4f} bits per byte", end="; ")
        print(f"against one-horizon with the same seed {differences}", end="; ")
        print(f"largest rise between two measurements {row['largest_rise']:.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "recipes.png")
    facts = {
        "scale": scale,
        "tokens": tokens.pop(),
        "data_hash": hashes.pop(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tinygpt": tinygpt.__version__,
        "recipes": rows,
    }
    (args.out / "recipes.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out / 'recipes.png'}\n{args.out / 'recipes.json'}")


if __name__ == "__main__":
    main()
