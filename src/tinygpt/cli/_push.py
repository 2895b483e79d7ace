"""`tinygpt push`: a model to the Hugging Face Hub, or what a run could not push."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from tinygpt.cli._parser import typed_path
from tinygpt.cli._words import command

if TYPE_CHECKING:
    from tinygpt.publish import PendingPush


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "push",
        help="publish a model on the Hugging Face Hub, or finish what a run could not push",
        description="With REPO: push a model with its tokenizer, a card written from the run's record, and its "
        "learning curve. Without: make the pushes that a run has queued and could not make.",
        epilog="example: tinygpt push runs/first user/repo --dry-run",
    )
    parser.add_argument(
        "source", metavar="RUN_OR_FOLDER", type=typed_path, help="a run, a checkpoint, or a saved model"
    )
    parser.add_argument("repo", metavar="REPO", nargs="?", help="user/repo, made if it is missing")
    parser.add_argument("--step", metavar="N|best|latest", help="which checkpoint of a run (default: latest)")
    parser.add_argument("--private", action="store_true", help="make the repository private; a public one is refused")
    parser.add_argument("--branch", metavar="NAME", help="branch to commit to (default: main)")
    parser.add_argument("--tag", action="append", default=[], metavar="NAME", help="tag the commit; may be repeated")
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit")
    parser.add_argument("--license", metavar="ID", help="license for the card, such as mit (default: none is named)")
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME", help="data set for the card")
    parser.add_argument("--pending", action="store_true", help="only make the queued pushes; the same as no REPO")
    parser.add_argument("--dry-run", action="store_true", help="show what would be pushed, and send nothing")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    only_model = (options.step, options.branch, options.message, options.license, *options.tag, *options.dataset)
    if options.repo is None and (options.private or any(value is not None for value in only_model)):
        parser.error("these options describe a push to REPO; queued pushes keep what they were queued with.")
    if options.repo is not None and options.pending:
        parser.error("--pending makes the pushes a run has queued, which know their repository; leave REPO out.")
    step = options.step
    if step is not None and step not in ("best", "latest"):
        if not step.isdecimal():
            parser.error(f"--step {step} is not known; give a number of steps, best or latest.")
        step = int(step)
    if options.repo is None:
        _finish(options)
    else:
        _push(options, step)


def _push(options: argparse.Namespace, step: Any) -> None:
    from tinygpt.errors import HubError
    from tinygpt.hub import check_repo_id, check_tags
    from tinygpt.publish import choose_checkpoint, files_to_push, pending_pushes, push_model
    from tinygpt.publish._push import check_whole

    check_repo_id(options.repo)
    check_tags([*options.tag, *([] if options.branch is None else [options.branch])])
    model = choose_checkpoint(options.source, step)
    files = {path.name: path.stat().st_size for path in files_to_push(model)}
    total = sum(files.values())
    what = f"{model} to {options.repo}: {len(files)} files, {total / 1e6:,.1f} MB"
    if options.dry_run:
        check_whole(model)  # as `push_model` does
        result: dict[str, Any] = {"model": str(model), "repo": options.repo, "files": files, "bytes": total}
        lines = [f"{size:>15,}  {name}" for name, size in files.items()]
        written = [] if "README.md" in files else ["and a README.md with the record of the run"]
        _print(options, result, "\n".join([f"would push {what}", *lines, *written]))
        return
    same = [p for p in pending_pushes(options.source) if (p.repo_id, p.branch) == (options.repo, options.branch)]
    if same:
        raise HubError(
            f"{len(same)} older pushes to {options.repo} are queued and would come after this one: "
            f"run `{command('push', options.source)}` first."
        )
    print(f"pushing {what}", file=sys.stderr, flush=True)
    commit = push_model(
        model,
        options.repo,
        private=options.private,
        branch=options.branch,
        commit_message=options.message,
        tags=options.tag,
        license=options.license,
        datasets=options.dataset,
    )
    _print(options, {"model": str(model), "repo": options.repo, "commit": commit, "tags": options.tag}, commit)


def _finish(options: argparse.Namespace) -> None:
    from pathlib import Path

    from tinygpt.errors import HubError
    from tinygpt.publish import finish_pushes, pending_pushes

    if not Path(options.source).is_dir():
        raise HubError(f"there is no folder {options.source!r}; give the folder of a run.")
    pending = pending_pushes(options.source)
    if options.dry_run:
        result = {"pending": [push.model_dump() for push in pending]}
        _print(options, result, "\n".join(map(str, pending)) or "no push is pending")
        return

    def show(push: "PendingPush", commit: str | None) -> None:
        print(f"pushing {push}" if commit is None else f"pushed  {commit}", file=sys.stderr, flush=True)

    commits = finish_pushes(options.source, progress=show)
    if pending:
        text = f"{len(commits)} of {len(pending)} pushes made"
    else:
        text = "no push is pending; to push a checkpoint give its repository as well, as user/repo"
    _print(options, {"commits": commits, "pending": len(pending_pushes(options.source))}, text)


def _print(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    print(json.dumps(result) if options.json else text)
