"""`tinygpt plan`: what training would do and need."""

import argparse
import json

from tinygpt.cli._recipe import FIELDS, add_recipe_options, recipe_of


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "plan",
        overrides=True,
        help="show what train would do, without doing it",
        description="Show parameters, tokens, memory, compute, phases and rates of a run, and on a GPU that is named "
        "the time. Nothing is trained, and no text is read. " + FIELDS,
        epilog="example: tinygpt plan examples/recipes/d12-rtx4070.toml --gpu 'RTX 4070' --mfu 0.85",
    )
    add_recipe_options(parser)
    parser.add_argument("--gpu", metavar="NAME", help="estimate the time on this GPU, such as 'RTX 4070'")
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


def _run(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    if options.show_recipe:
        print(recipe.to_json(), end="")
        return
    plan = recipe.plan(device_name=options.gpu, mfu=options.mfu)
    print(json.dumps(plan.to_dict(), indent=1) if options.json else plan)
