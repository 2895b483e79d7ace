"""What `train`, `plan` and `resume` have in common: a recipe from a file or a depth, with values laid over it."""

import argparse
import logging
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli._parser import suggestion, typed_path, unescaped
from tinygpt.cli._words import command, fitted, ways_on
from tinygpt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tinygpt.recipe import Recipe

FIELDS = (
    "Every field of a recipe is an option as well: --batch-tokens 4096, --model.num-layers 6, --data.train corpus.txt, "
    "--phases.0.steps 100. A value is read as TOML; none switches off. "
    "`tinygpt plan --depth 4 --show-recipe` prints them all."
)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the two ways to name a recipe."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", type=typed_path, help="recipe file (.toml, .json or .py), or a run"
    )
    parser.add_argument(
        "--depth", type=int, metavar="N", help="instead of a recipe: so many layers, the rest for this device"
    )
    parser.add_argument(
        "--tokens-per-parameter",
        type=float,
        default=12.0,
        metavar="X",
        help="with --depth on a GPU: length of the training (default: 12)",
    )


def recipe_of(options: argparse.Namespace) -> "Recipe":
    """Return the recipe that the options name.

    Raises:
        ConfigError: If they name none or two, or a field is wrong.
    """
    import torch

    from tinygpt.recipe import Recipe

    if (options.recipe is None) == (options.depth is None):
        hints = [suggestion(f"--{name}", ["--depth", "--out"]) for name in options.overrides]
        raise ConfigError(f"give either a recipe file or --depth N, such as --depth 4{''.join(hints)}")
    if not 0 < options.tokens_per_parameter < math.inf:
        raise ConfigError(f"--tokens-per-parameter {options.tokens_per_parameter} is not a positive number.")
    if options.recipe is not None:
        if options.recipe.endswith((".txt", ".jsonl", ".parquet")):
            raise ConfigError(
                f"{options.recipe} is text and no recipe; try --depth 4 --data.train {shlex.quote(options.recipe)}"
            )
        return Recipe.load(options.recipe, overrides=overrides_of(options))
    asked = {name.replace("-", "_"): value for name, value in options.overrides.items()}
    device = asked.get("device", "auto")
    there = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    small = not (there or getattr(options, "gpu", None))
    # What the others are scaled to.
    sizes = {name: int(asked[name]) for name in ("batch_tokens", "num_steps") if asked.get(name, "").isdecimal()}
    base = Recipe.from_depth(options.depth, small=small, tokens_per_parameter=options.tokens_per_parameter, **sizes)
    overrides = overrides_of(options)
    if not asked.keys().isdisjoint(("model.head_dim", "model.width_per_layer")):  # which say what a depth makes
        made = {"model.depth": options.depth, "model.head_dim": base.model.head_dim}
        overrides |= {name: str(value) for name, value in made.items() if name not in asked}
    return Recipe.from_fields(base.model_dump(exclude_unset=True), overrides=overrides)


def overrides_of(options: argparse.Namespace) -> dict[str, str]:
    """Return the values to lay over a recipe; shells have no newline, so a separator may be typed as an escape."""
    return {name: unescaped(value) if name == "data.separator" else value for name, value in options.overrides.items()}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add what `train` and `resume` have in common: how to go on from a checkpoint, and what is told on the way."""
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=["data", "model", "schedule"],
        help="go on although this differs from the checkpoint; may be repeated",
    )
    parser.add_argument(
        "--rewarm-steps", type=int, metavar="N", help="instead of a jump: take N steps from the old rates to the new"
    )
    parser.add_argument(
        "--tracker",
        action="append",
        choices=["mlflow", "tensorboard", "trackio", "wandb"],
        help="send the run's numbers there as well, under the name of its folder; may be repeated",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    parser.set_defaults(goes_on=True, trains=True)


def train(recipe: "Recipe", out: Path, options: argparse.Namespace) -> None:
    """Check what is read, print the plan, and train, from the newest checkpoint on if there is one."""
    from tinygpt.checkpoint import latest_checkpoint, load_state
    from tinygpt.trainer import ResumeRefusedError, stopped_runs_go_on_by

    if options.rewarm_steps is not None and options.rewarm_steps < 1:
        raise ConfigError(f"--rewarm-steps {options.rewarm_steps} is not a number of steps; choose 1 or more.")
    branch_from = getattr(options, "branch_from", None)
    if branch_from is not None:
        _check_branch(recipe, Path(branch_from), out, rewarm_steps=options.rewarm_steps)
    if options.tracker:
        recipe = recipe.replace(trackers=list(dict.fromkeys([*recipe.trackers, *options.tracker])))
    _check_length(recipe, out)
    recipe.check(out)
    print(fitted(str(recipe.plan())), flush=True)
    run = recipe.build(out, progress=not options.quiet)
    try:
        with stopped_runs_go_on_by(command("resume", str(out))):
            last = run.fit(
                accept=options.accept,
                rewarm_steps=options.rewarm_steps,
                branch_from=branch_from,
                progress=not options.quiet,
            )
    except ResumeRefusedError as error:
        left = recipe.total_steps - int(load_state(error.folder, verified=True)["next_step"])
        raise CheckpointError(ways_on(error, out, options, steps_left=left)) from None
    if last is None:
        print(f"{out}: all {recipe.total_steps:,} steps are done")
    else:
        print(f"{out}: {last.index + 1:,} steps, loss {last.loss:.4f}, {last.tokens:,} tokens")
    print(f"checkpoint {latest_checkpoint(out / 'checkpoints')}; next: {command('generate', str(out), '-p', 'The ')}")


def _check_length(recipe: "Recipe", out: Path) -> None:
    """Refuse to go on with a run that is past the steps asked for: nothing would be trained, and nothing taken back."""
    from tinygpt.checkpoint import checkpoint_step, latest_checkpoint, list_checkpoints

    total, found = recipe.total_steps, list_checkpoints(out / "checkpoints")
    if not found or checkpoint_step(found[-1]) <= total:
        return
    newest = latest_checkpoint(out / "checkpoints")  # of those that are whole
    if newest is not None and (done := checkpoint_step(newest)) > total:
        raise ConfigError(
            f"{out} stands at step {done:,}, past the {total:,} steps asked for, so nothing is left to train; give "
            f"more by --num-steps, go on as it was by {command('resume', str(out))}, or train a run of {total:,} steps "
            "with another --out."
        )


def _check_branch(recipe: "Recipe", branch_from: Path, out: Path, *, rewarm_steps: int | None) -> None:
    """Refuse a branch that could not begin, before its folder is made."""
    from tinygpt.checkpoint import list_checkpoints, load_state

    if branch_from.resolve().is_relative_to((out / "checkpoints").resolve()):
        raise ConfigError(
            f"{branch_from} is of the run {out} itself; give the branch a folder of its own by --out, or leave "
            "out --from to go on with the run."
        )
    if list_checkpoints(out / "checkpoints"):
        logging.getLogger("tinygpt").info("%s has checkpoints of its own and goes on from them, not by --from", out)
        return
    done = int(load_state(branch_from)["next_step"])
    left = recipe.total_steps - done
    if rewarm_steps is not None and rewarm_steps > left > 0:
        raise ConfigError(f"--rewarm-steps {rewarm_steps} is longer than what is left of the run, {left:,} steps.")
    if left <= 0:
        raise ConfigError(
            f"{branch_from} stands at step {done:,} and this run ends at {recipe.total_steps:,}, so nothing is left to "
            "train; give more by --num-steps, or an earlier checkpoint."
        )
