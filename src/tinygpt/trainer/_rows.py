"""Rows at a time for the memory that is free."""

import logging
from typing import TYPE_CHECKING

from tinygpt.errors import ConfigError
from tinygpt.memory import available_memory, plan_memory
from tinygpt.trainer._micro_batches import MicroBatchRows

if TYPE_CHECKING:
    from tinygpt.trainer._trainer import Trainer

logger = logging.getLogger("tinygpt")


def rows_of(trainer: "Trainer") -> MicroBatchRows:
    """Return the rows that the settings of a trainer ask for."""
    return MicroBatchRows(
        trainer.config.micro_batch_rows,
        lambda rows, seq_len: _planned(trainer, rows, seq_len),
        lambda rows, why: trainer.record("micro_batch_rows", rows=rows, why=why),
    )


def _planned(trainer: "Trainer", rows: int, seq_len: int) -> int:
    """Return how many of so many rows fit into the memory that is free."""
    step_tokens = trainer.step_tokens or rows * seq_len
    try:
        budget = available_memory(trainer.device) + _there_already(trainer)
        plan = plan_memory(
            trainer.model,
            trainer.optimizer,
            budget_bytes=max(1, budget),
            rows=rows,
            seq_len=seq_len,
            accumulate=True if step_tokens > rows * seq_len else None,
            device_type=trainer.device.type,
            choose_settings=False,
            loss_fn=trainer.loss_fn,
        )
    except ConfigError as error:
        logger.warning("micro_batch_rows='auto' begins with all %d rows: %s", rows, error)
        return rows
    logger.log(logging.INFO if plan.fits else logging.WARNING, "%s", plan)
    return plan.rows


def _there_already(trainer: "Trainer") -> int:
    """Return the bytes of the plan that are in memory by now, less those of a copy that is still to come."""
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    moments = sum(getattr(value, "nbytes", 0) for value in states)
    # Checkpoints are written from a copy in the machine's memory.
    config = trainer.config
    copied = trainer.device.type == "cpu" and config.save_in_background and config.save_every is not None
    return moments + weights - (3 * weights if copied else 0)
