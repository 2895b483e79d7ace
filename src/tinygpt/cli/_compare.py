"""`tinygpt compare`: runs side by side."""

import argparse

from tinygpt.cli._parser import typed_path
from tinygpt.cli._report import add_output_options, print_files


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "compare",
        help="set runs side by side",
        description="Write comparison.md, comparison.html and pictures: curves over each other, results, and the "
        "settings in which the runs differ.",
        epilog="example: tinygpt compare runs/first runs/second --out comparison",
    )
    parser.add_argument("folders", metavar="RUN", nargs="+", type=typed_path, help="folders of two or more runs")
    parser.add_argument(
        "--out", metavar="DIR", type=typed_path, default="comparison", help="folder to write to (default: comparison)"
    )
    add_output_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.report import compare_runs

    print_files(options, compare_runs(options.folders, options.out, pictures=not options.no_pictures))
