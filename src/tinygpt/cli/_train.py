"""`tinygpt train`: a run from a recipe."""

import argparse
from pathlib import Path

from tinygpt.cli._parser import typed_path
from tinygpt.cli._recipe import FIELDS, add_recipe_options, add_training_options, recipe_of, train


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "train",
        overrides=True,
        help="train a model from a recipe or a depth",
        description="Train what a recipe names, or a model of so many layers on the book that comes with tinygpt. The "
        "plan is printed first. Stopped at any moment, by Ctrl-C or a crash, the same command goes on where it was. "
        + FIELDS,
        epilog="example: tinygpt train --depth 4 --data.train corpus.txt --data.separator '\\n\\n' --out runs/first",
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--out", metavar="RUN", type=typed_path, help="folder of the run (default: runs/ and the recipe's name)"
    )
    parser.add_argument(
        "--from",
        dest="branch_from",
        metavar="CHECKPOINT",
        type=typed_path,
        help="branch: begin with the whole state of this checkpoint of another run, compared as by resume",
    )
    add_training_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    name = f"d{options.depth}" if options.recipe is None else Path(options.recipe).stem
    train(recipe, Path(options.out or Path("runs") / name), options)
