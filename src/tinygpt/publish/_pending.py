"""Pushes on disk: what is still to be pushed is a folder each, and finishing them is the same work for everybody."""

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import Field

from tinygpt import hub
from tinygpt._disk import write_text
from tinygpt.checkpoint import checkpoint_step
from tinygpt.config import Config
from tinygpt.errors import CheckpointError, ConfigError, HubError
from tinygpt.manifest import read_json
from tinygpt.publish._push import check_whole, files_to_push, stage, write_card

QUEUE_FOLDER = "push-queue"
_ENTRY_FILE = "push.json"
_MODEL_FOLDER = "model"
_ENTRY = re.compile(r"(?:damaged-|\.gone-)?(?P<number>\d+)-(?P<checkpoint>.+)")
# Filling a new folder takes moments, or minutes where files are copied; one this old is of a process that died.
_STALE_SECONDS = 24 * 3600

logger = logging.getLogger("tinygpt")


class PendingPush(Config):
    """A push that is still to be made. No token is ever part of it.

    Args:
        name: Name of its folder in the queue.
        repo_id: `user/repo`.
        step: Steps done by the model; `None` if not known.
        run: Folder of the run, whose metrics go into the card; `None` if the model is not of a run.
        private: Whether the repository is created as private.
        branch: Branch to commit to; `None` is the main branch.
        commit_message: First line of the commit.
        tags: Tags for the commit.
        license: Identifier for the card.
        datasets: Names of data sets for the card.
        tries: How often it was tried.
        error: Why the last try failed.

    Raises:
        ConfigError: If a field is of the wrong type.
    """

    version: int = 1
    name: str
    repo_id: str
    step: int | None = None
    run: str | None = None
    private: bool = False
    branch: str | None = None
    commit_message: str
    tags: list[str] = Field(default_factory=list)
    license: str | None = None
    datasets: list[str] = Field(default_factory=list)
    tries: int = 0
    error: str | None = None

    def __str__(self) -> str:
        tried = f" (tried {self.tries} times: {self.error})" if self.tries else ""
        return f"{self.name} to {self.repo_id}{tried}"


def pending_pushes(folder: str | Path) -> list[PendingPush]:
    """Return the pushes that are still to be made, the oldest first.

    Args:
        folder: A run, or its `push-queue`.

    Raises:
        HubError: If the record of one cannot be read.
    """
    queue = queue_folder(folder)
    if not queue.is_dir():
        return []
    found = sorted(path for path in queue.iterdir() if path.is_dir() and path.name[:1].isdigit())
    pushes = []
    for path in found:
        try:
            pushes.append(_read(path))
        except HubError:
            if path.exists():
                raise
            # Made meanwhile, by another thread or process.
    return pushes


def finish_pushes(
    folder: str | Path,
    *,
    token: str | None = None,
    retries: int = 4,
    progress: Callable[[PendingPush, str | None], None] | None = None,
) -> list[str]:
    """Make the pushes that are still to be made, the oldest first, and return the addresses of their commits.

    A branch therefore never goes back to an older model. What was pushed already, by a process that died before it
    could note so, is recognized and not pushed twice.

    Args:
        folder: A run, or its `push-queue`.
        token: Access token with write permission. `None` is the one the client is logged in with.
        retries: How often each request is tried again after a failure that may pass.
        progress: Called as `progress(push, None)` before and `progress(push, address)` after each.

    Raises:
        HubError: If one fails: it and all after it stay pending. Also if another process is at work in this folder.

    Example:
        ```python
        from tinygpt.publish import finish_pushes

        finish_pushes("runs/d12")
        ```
    """
    queue = queue_folder(folder)
    commits: list[str] = []
    if not pending_pushes(queue):
        return commits
    with lock(queue) as free:
        if not free:
            raise HubError(f"another process is pushing from {queue}; wait for it to end, or end it.")
        while pending := pending_pushes(queue):
            first = pending[0]
            if progress is not None:
                progress(first, None)
            commit = make_push(queue, first, token=token, retries=retries)
            if commit is None:
                continue
            commits.append(commit)
            if progress is not None:
                progress(first, commit)
    return commits


def newest_step(queue: Path) -> int | None:
    """Return the largest step of all that was ever put into a queue; `None` for an empty one."""
    names = [match["checkpoint"] for path in _entries(queue) if (match := _ENTRY.fullmatch(path.name))]
    if (queue / "pushed.jsonl").exists():
        for line in (queue / "pushed.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a crash may have cut a line off
                names.append(str(json.loads(line)["push"]).partition("-")[2])
    return max((step for name in names if (step := step_of(name)) is not None), default=None)


def step_of(checkpoint: str | Path) -> int | None:
    """Return the steps done in a checkpoint, from its name; `None` if it is named otherwise."""
    try:
        return checkpoint_step(checkpoint)
    except CheckpointError:
        return None


def queue_folder(folder: str | Path) -> Path:
    """Return the queue of a run; a queue is its own."""
    path = Path(folder)
    return path if path.name == QUEUE_FOLDER else path / QUEUE_FOLDER


def add_push(queue: Path, model: Path, push: PendingPush) -> PendingPush:
    """Put a push at the end of a queue, with links to its files; it is there whole or not at all."""
    queue.mkdir(parents=True, exist_ok=True)
    temporary = queue / f".new-{os.getpid()}-{time.monotonic_ns()}"
    try:
        stage(model, temporary / _MODEL_FOLDER, Path.hardlink_to)
        while True:
            # Of all that is there, so that what is set aside or being deleted is never in the way.
            taken = [int(match["number"]) for path in _entries(queue) if (match := _ENTRY.fullmatch(path.name))]
            number = 1 + max(taken, default=0)
            push = push.replace(name=f"{number:06d}-{model.name}")
            (temporary / _ENTRY_FILE).write_text(push.to_json(), encoding="utf-8")
            try:
                temporary.rename(queue / push.name)
            except OSError:
                if not (queue / push.name).exists():
                    raise
            else:  # no other process took the number in between
                return push
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_push(queue: Path, push: PendingPush, *, token: str | None, retries: int) -> str | None:
    """Make one push and take it out of the queue; return its address, or `None` if its files turned out damaged.

    Raises:
        HubError: If it fails; the reason is noted with it.
    """
    entry = queue / push.name
    model = entry / _MODEL_FOLDER
    try:
        check_whole(model)
    except CheckpointError as error:
        # It can never succeed and must not hold up the others; the files are kept for whoever wants to look.
        entry.rename(queue / f"damaged-{push.name}")
        logger.warning("not pushed, and set aside in %s: %s", queue, error)
        return None
    try:
        run = None if push.run is None else Path(push.run)
        if run is not None and not run.is_dir():
            run = queue.parent  # a run that was moved takes its queue along
        write_card(model, run=run, repo_id=push.repo_id, tags=push.tags, license=push.license, datasets=push.datasets)
    except Exception as error:  # whatever a record or the drawing of it holds, the model is worth more than its card
        logger.warning("%s is pushed without a card: %s", push.name, error)
    try:
        commit = hub.upload_folder(
            model,
            push.repo_id,
            private=push.private,
            branch=push.branch,
            commit_message=push.commit_message,
            tags=push.tags,
            token=token,
            allow_patterns=[path.name for path in files_to_push(model)],
            retries=retries,
        )
    except HubError as error:
        with contextlib.suppress(OSError):  # a full disk must not hide why the push failed
            tried = push.replace(tries=push.tries + 1, error=str(error).replace(token or "\0", "<token>"))
            write_text(entry / _ENTRY_FILE, tried.to_json())
        raise
    with (queue / "pushed.jsonl").open("a", encoding="utf-8") as file:
        done = {"push": push.name, "repo_id": push.repo_id, "tags": push.tags, "commit": commit}
        file.write(json.dumps(done | {"time": round(time.time(), 3)}) + "\n")
    drop_push(queue, push)
    return commit


def drop_push(queue: Path, push: PendingPush) -> None:
    """Take a push out of the queue."""
    gone = queue / f".gone-{push.name}"
    (queue / push.name).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def lock(queue: Path) -> Iterator[bool]:
    """Yield whether this is the only one at work in a queue; the system frees the lock of a process that died."""
    try:
        held = FileLock(queue / ".lock").acquire(timeout=0)
    except Timeout:
        yield False
        return
    with held:
        for leftover in [*queue.glob(".gone-*"), *queue.glob(".new-*")]:
            with contextlib.suppress(OSError):  # another process may be done with it by now
                if leftover.name.startswith(".gone-") or time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)
        yield True


def _read(entry: Path) -> PendingPush:
    try:
        push = PendingPush(**read_json(entry / _ENTRY_FILE))
    except (ConfigError, CheckpointError) as error:
        raise HubError(f"{entry} is no push that can be finished: {error} Move it out of the queue.") from None
    if push.version != 1:
        raise HubError(f"{entry} is of version {push.version}; this tinygpt reads version 1.")
    return push.replace(name=entry.name)


def _entries(queue: Path) -> list[Path]:
    return list(queue.iterdir()) if queue.is_dir() else []
