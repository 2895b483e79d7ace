"""The report at the end of `Trainer.fit`."""

import logging
from pathlib import Path

from tinygpt.errors import MissingDependencyError, TinyGPTError

logger = logging.getLogger("tinygpt")


def report_run(out_dir: str | Path | None) -> None:
    """Write a run's report, without pictures where matplotlib is not installed.

    The run is complete and saved by now, so what goes wrong here is a warning. A run without a folder has no report.
    """
    if out_dir is None:
        return
    from tinygpt.report import write_report

    try:
        try:
            files = write_report(out_dir)
        except MissingDependencyError:
            files = write_report(out_dir, pictures=False)
    except TinyGPTError as error:
        logger.warning("no report was written: %s", error)
    else:
        logger.info("report: %s", files.html)
