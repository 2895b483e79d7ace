"""Pushing checkpoints while training goes on."""

import logging
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tinygpt import hub
from tinygpt.checkpoint import checkpoint_step, list_checkpoints
from tinygpt.errors import ConfigError, HubError, TinyGPTError
from tinygpt.publish._card import check_license
from tinygpt.publish._pending import (
    PendingPush,
    add_push,
    drop_push,
    lock,
    make_push,
    newest_step,
    pending_pushes,
    queue_folder,
    step_of,
)
from tinygpt.publish._record import run_of

_FIRST_WAIT_SECONDS = 5.0
_LONGEST_WAIT_SECONDS = 600.0

logger = logging.getLogger("tinygpt")


class PushQueue:
    """Pushes each checkpoint from a thread of its own: `Trainer(..., on_save=queue)`.

    Training waits only until the checkpoint's files are linked into the queue's folder, where the deletion of old
    checkpoints does not reach them. They are pushed in order, each with its tag and a card. A push that fails stays
    first in the queue, is tried again after 5, 10, 20, ... up to 600 seconds, a quarter more or less, and no failure
    ever reaches the training loop. One that no waiting can help, such as a missing token, is tried again with the
    next checkpoint. What is left at the end stays on disk, and `tinygpt push RUN` finishes it.
    A checkpoint whose process died before it was queued follows with the next one, if it is still there.

    Args:
        repo_id: `user/repo`, made if it is missing.
        folder: The run, or another folder, in which `push-queue` is made. `None` is the run of the first checkpoint.
        private: Create the repository as private. An existing public one is refused, not made private.
        branch: Branch to commit to. `None` is the main branch.
        tag: Tag of each commit, with `{step}` for the steps done; `None` for no tags.
        license: Identifier such as `"mit"` for the cards; `None` names none.
        datasets: Names of data sets on the Hub for the cards.
        token: Access token with write permission; it is kept in memory alone. `None` is the one the client is
            logged in with.
        wait_seconds: How long `close` waits for pushes under way.
        max_pending: How many pushes may wait. While the Hub is out of reach for long, the oldest but the first are
            given up, with a warning, since their files would fill the disk. `None` for any number.

    Raises:
        ConfigError: If a number is out of range, or the license is no identifier.
        HubError: If a name is none.

    Example:
        ```python
        with PushQueue("user/d12", private=True) as queue:
            Trainer(model, optimizer, loader, config, on_save=queue).fit()
        ```
    """

    def __init__(
        self,
        repo_id: str,
        *,
        folder: str | Path | None = None,
        private: bool = False,
        branch: str | None = None,
        tag: str | None = "step-{step}",
        license: str | None = None,
        datasets: Sequence[str] = (),
        token: str | None = None,
        wait_seconds: float = 300.0,
        max_pending: int | None = 16,
    ) -> None:
        hub.check_repo_id(repo_id)
        if branch is not None:
            hub.check_tags(branch)
        if tag is not None:
            hub.check_tags(tag.replace("{step}", "0"))
        check_license(license)
        if wait_seconds < 0:
            raise ConfigError(f"wait_seconds={wait_seconds} is negative; choose 0 to leave the rest to `tinygpt push`.")
        if max_pending is not None and max_pending < 2:
            raise ConfigError(f"max_pending={max_pending} is too few; choose 2 or more, or None for any number.")
        self.repo_id = repo_id
        self.folder = None if folder is None else queue_folder(folder)
        self._template = PendingPush(
            name="", repo_id=repo_id, private=private, branch=branch, commit_message="",
            license=license, datasets=list(datasets),
        )  # fmt: skip
        self._tag = tag
        self._token = token
        self._wait_seconds = wait_seconds
        self._max_pending = max_pending
        self._jitter = random.Random()  # of its own: the state of Python's generator belongs to the training run
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._arrivals = 0
        self._closing = False
        self._deadline = 0.0
        self._reported = ""

    def __call__(self, checkpoint: Path) -> None:
        """Take a checkpoint that was just written. Returns at once and never raises because of the Hub or the disk."""
        added = False
        for folder in [*self._missed(Path(checkpoint)), Path(checkpoint)]:
            try:
                logger.info("queued to be pushed: %s", self._add(folder))
                added = True
            except (TinyGPTError, OSError) as error:
                logger.warning("%s is not going to be pushed: %s", folder, error)
        if not added:
            return
        with self._changed:
            self._arrivals += 1
            self._closing = False
            self._changed.notify_all()
            self._start()

    @property
    def pending(self) -> list[PendingPush]:
        """What is still to be pushed, the oldest first."""
        return [] if self.folder is None else pending_pushes(self.folder)

    def close(self, wait_seconds: float | None = None) -> list[PendingPush]:
        """Go on with what is left, as long as it may help and there is time, and log what could not be pushed.

        Args:
            wait_seconds: How long to wait; `None` for what the queue was made with.

        Returns:
            What is still to be pushed.
        """
        wait_seconds = self._wait_seconds if wait_seconds is None else wait_seconds
        left = self._look()
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + wait_seconds
            self._changed.notify_all()
            if left:
                logger.info("waiting up to %.0f seconds for %d pushes; Ctrl-C leaves them.", wait_seconds, len(left))
                self._start()
            thread = self._thread
        if thread is not None:
            thread.join(wait_seconds)
        left = self._look()
        if left and self.folder is not None:
            what = "; ".join(map(str, left[:3])) + ("; ..." if len(left) > 3 else "")
            logger.warning(
                "%d checkpoints are not pushed yet: %s. `tinygpt push %s` finishes them.",
                len(left), what, self.folder.parent,
            )  # fmt: skip
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> list[PendingPush]:
        try:
            return self.pending
        except HubError as error:
            logger.warning("%s", error)
            return []

    def _start(self) -> None:
        """Start the thread if it does not run; to be called while holding the condition."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tinygpt-push", daemon=True)
            self._thread.start()

    def _missed(self, checkpoint: Path) -> list[Path]:
        """Return the checkpoints before this one that were written right before a crash, and so never queued."""
        step = step_of(checkpoint)
        if run_of(checkpoint) is None or step is None:
            return []
        try:
            known = newest_step(self._queue_of(checkpoint))
            there = list_checkpoints(checkpoint.parent)
        except OSError:  # which adding this one will run into and tell
            return []
        return [path for path in there if known is not None and known < checkpoint_step(path) < step]

    def _queue_of(self, checkpoint: Path) -> Path:
        if self.folder is None:
            self.folder = queue_folder(run_of(checkpoint) or checkpoint.parent)
        return self.folder

    def _add(self, checkpoint: Path) -> PendingPush:
        run, queue = run_of(checkpoint), self._queue_of(checkpoint)
        step = step_of(checkpoint)
        untagged = self._tag is None or (step is None and "{step}" in self._tag)
        push = self._template.replace(
            step=step,
            run=None if run is None else str(run),
            commit_message=f"Checkpoint after {step:,} steps" if step is not None else f"Checkpoint {checkpoint.name}",
            tags=[] if untagged else [str(self._tag).replace("{step}", str(step))],
        )
        pending = pending_pushes(queue)
        if self._max_pending is not None and len(pending) >= self._max_pending:
            # Never the first, which may be on its way.
            drop_push(queue, pending[1])
            logger.warning("given up, since %d pushes are waiting: %s", len(pending), pending[1])
        return add_push(queue, checkpoint, push)

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                seen = (self._arrivals, self._closing)
            passing = self._push_all()
            with self._changed:
                if seen != (self._arrivals, self._closing):
                    failures = 0
                    continue
                left = self._deadline - time.monotonic()
                if self._closing and not (passing and left > 0):
                    self._thread = None
                    return
                failures = 0 if passing is None else failures + 1
                pause = self._wait(failures) if passing else None
                self._changed.wait(min(pause, left) if pause and self._closing else pause)

    def _wait(self, failures: int) -> float:
        doubled = min(_FIRST_WAIT_SECONDS * 2 ** min(failures - 1, 30), _LONGEST_WAIT_SECONDS)
        return doubled * self._jitter.uniform(0.75, 1.25)

    def _push_all(self) -> bool | None:
        """Push until the queue is empty, which returns `None`, or one fails; return whether that may pass."""
        assert self.folder is not None
        try:
            with lock(self.folder) as free:
                if not free:
                    return True
                while pending := pending_pushes(self.folder):
                    started = time.monotonic()
                    commit = make_push(self.folder, pending[0], token=self._token, retries=0)
                    if commit is not None:
                        logger.info("pushed in %.0f seconds: %s", time.monotonic() - started, commit)
                    self._reported = ""
            return None
        except Exception as error:
            # Whatever it was, training goes on; the same reason is told once.
            if str(error) != self._reported:
                self._reported = str(error)
                logger.warning("a checkpoint is not pushed yet: %s", error)
            return isinstance(error, hub.PassingHubError | OSError)
