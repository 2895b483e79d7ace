"""Stopping between two steps when the user or the system asks."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


_way_on: ContextVar[str] = ContextVar("way_on", default="run the same program with trainer.resume()")


@contextmanager
def stopped_runs_go_on_by(words: str) -> Iterator[None]:
    """Let the line that tells of a stop name another way to go on than `trainer.resume()`, inside a `with` block.

    Args:
        words: What the user is to do, such as a command to type.
    """
    token = _way_on.set(words)
    try:
        yield
    finally:
        _way_on.reset(token)


class Interrupted(SystemExit):
    """Ends the program after SIGINT or SIGTERM, when the running step is done and its state is saved.

    The exit status is 128 plus the signal's number, as shells report it.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def interruption(signal_number: int) -> BaseException:
    """Return what ends the loop: at a prompt Ctrl-C gives the prompt back; elsewhere the program ends."""
    if signal_number == signal.SIGINT and (hasattr(sys, "ps1") or sys.flags.interactive):
        return KeyboardInterrupt()
    return Interrupted(signal_number)


class StopRequest:
    """Which signal asked to stop, if any."""

    def __init__(self) -> None:
        self.signal_number: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying; a second one acts as it did before.

    Outside the main thread, where handlers cannot be set, signals keep their meaning.
    """
    request = StopRequest()
    if not _in_main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            # Only what is still ours; None was set by code that is not Python and cannot be set again from here.
            if _in_main_thread() and signal.getsignal(number) is note and handler is not None:
                signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        restore()
        if active:
            request.signal_number = number
            # Not print: a handler may run in the middle of another print.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
        else:
            signal.raise_signal(number)

    active = True
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        active = False
        restore()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def report_stop(trainer: "Trainer", last_saved: Path | None) -> None:
    """Say on standard error that the run was stopped, and how to go on."""
    if trainer.next_step == trainer.config.num_steps:
        text = "that was the last one, training is complete."
    elif trainer.config.out_dir is None:
        text = "nothing was saved, since the TrainerConfig has no out_dir."
    else:
        # No full stop, which would be copied with a command.
        text = f"the state is saved in {last_saved}; to go on: {_way_on.get()}"
    sys.stderr.write(f"\nstopped after step {trainer.next_step - 1}: {text}\n")
    sys.stderr.flush()
