"""`tinygpt plan`: what training would do and need."""

import argparse
import json
import re

from tinygpt.cli._recipe import FIELDS, add_recipe_options, recipe_of
from tinygpt.cli._words import fitted


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "plan",
        overrides=True,
        help="show what train would do, without doing it",
        description="Show parameters, tokens, memory, compute, phases and rates of a run; for a GPU that is named also "
        "the time, whether it fits, and which rows, chunk and checkpointing to take. Nothing is trained, no text is "
        "read. " + FIELDS,
        epilog="example: tinygpt plan examples/recipes/d12-rtx4070.toml --gpu 'RTX 4070' --mfu 0.85",
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--gpu", metavar="NAME", help="tell the time on this GPU, such as 'RTX 4070', and what to choose in its memory"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="choose for this much memory instead, such as 8GB or 6500MiB; without --gpu it is this machine's, in its "
        "precision: add --gpu NAME to plan for another",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of the GPU's peak that training is assumed to reach (default: 0.5; the documented run has 0.85)",
    )
    parser.add_argument("--show-recipe", action="store_true", help="print the whole recipe, as JSON, and no plan")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=_run)


def _bytes(text: str) -> int:
    """Return a size such as `8GB` or `6500MiB` in bytes; GB is 2**30, as on the box of a card."""
    from tinygpt.errors import ConfigError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG])i?B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--memory {text!r} is no size; write a number and a unit, such as 8GB or 6500MiB.")
    return int(float(found[1]) * (2**30 if found[2].upper() == "G" else 2**20))


def _run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    if options.show_recipe:
        print(recipe.to_json(), end="")
        return
    size = None if options.memory is None else _bytes(options.memory)
    plan = recipe.plan(device_name=options.gpu, mfu=options.mfu, memory_bytes=size)
    print(json.dumps(plan.to_dict(), indent=1) if options.json else fitted(str(plan)))
