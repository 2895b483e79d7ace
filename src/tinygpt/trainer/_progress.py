"""The progress bar of `Trainer.fit`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tinygpt.metrics import StepMetrics

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer


@contextmanager
def progress_bar(trainer: "Trainer", *, enabled: bool) -> Iterator[Callable[[StepMetrics], None]]:
    """Yield a function that shows a finished step: a moving bar on a terminal, a line now and then elsewhere."""
    if not enabled:
        yield lambda step: None
        return
    # A declared dependency with a tqdm of its own; imported here because it is slow.
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    terminal = sys.stderr.isatty()
    with tqdm(  # type: ignore[no-untyped-call]
        total=trainer.config.num_steps,
        initial=trainer.next_step,
        unit="step",
        dynamic_ncols=terminal,
        ncols=None if terminal else 120,
        mininterval=0.2 if terminal else 20.0,
        smoothing=0.05,
    ) as bar:

        def show(step: StepMetrics) -> None:
            parts = [f"loss {step.loss:.3f}", f"lr {step.lr:.2e}", f"{step.tokens_per_second:,.0f} tok/s"]
            if step.mfu is not None:
                parts.append(f"mfu {step.mfu:.0%}")
            if trainer.stall_seconds:
                parts.append(f"saving {trainer.stall_seconds:.1f} s")
            bar.set_postfix_str(", ".join(parts), refresh=False)
            bar.update()

        yield show
