"""`tinygpt resume`: go on with a run from what it saved."""

import argparse
from pathlib import Path

from tinygpt.cli._parser import typed_path
from tinygpt.cli._recipe import FIELDS, add_training_options, overrides_of, train


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "resume",
        overrides=True,
        help="go on with a run from its newest checkpoint",
        description="Go on with a run from the recipe that was saved with it and its newest whole checkpoint. With "
        "another setting the differences are compared first; those that change training need --accept or "
        "--rewarm-steps. " + FIELDS,
        epilog="example: tinygpt resume runs/first --num-steps 1000 --rewarm-steps 50",
    )
    parser.add_argument("run_folder", metavar="RUN", type=typed_path, help="folder of the run")
    add_training_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.errors import ConfigError
    from tinygpt.recipe import Recipe

    folder = Path(options.run_folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no run {folder}; tinygpt train begins one.")
    train(Recipe.load(folder, overrides=overrides_of(options)), folder, options)
