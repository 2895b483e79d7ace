"""`tinygpt report`: a page about a run."""

import argparse
from typing import TYPE_CHECKING

from tinygpt.cli._parser import typed_path

if TYPE_CHECKING:
    from tinygpt.report import ReportFiles


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "report",
        help="write a page about a run",
        description="Write report.md, report.html and pictures from a run's own files. The run may be complete, "
        "running, dead or cut off. The page needs nothing outside itself.",
        epilog="example: tinygpt report runs/first --open yes",
    )
    parser.add_argument(
        "folder", metavar="RUN", type=typed_path, help="folder of the run: --out of train, out_dir of a TrainerConfig"
    )
    parser.add_argument("--out", metavar="DIR", type=typed_path, help="folder for the report (default: RUN/report)")
    add_output_options(parser)
    parser.set_defaults(run=_run)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what `report` and `compare` have in common."""
    parser.add_argument("--no-pictures", action="store_true", help="text and tables alone; matplotlib is not needed")
    parser.add_argument("--json", action="store_true", help="print figures and findings as JSON")
    parser.add_argument("--open", choices=["yes", "no"], default="no", help="open the page in a browser (default: no)")


def print_files(options: argparse.Namespace, files: "ReportFiles") -> None:
    """Say what was written and open the page if it was asked for."""
    if options.json:
        import json

        paths = {"markdown": files.markdown, "html": files.html}
        shown = {key: path.as_posix() for key, path in paths.items()}
        print(
            json.dumps({**shown, "pictures": [path.as_posix() for path in files.pictures], **files.summary}, indent=1)
        )
    else:
        print(f"{files.html}\n{files.markdown}")
    if options.open == "yes":
        import webbrowser

        webbrowser.open(files.html.resolve().as_uri())


def _run(options: argparse.Namespace) -> None:
    from tinygpt.report import write_report

    files = write_report(options.folder, options.out, pictures=not options.no_pictures)
    if not options.json:
        for observation in files.summary["observations"]:
            if observation["level"] == "warning":
                print(f"! {observation['text']}")
    print_files(options, files)
