"""The torture script in small; in full, at random moments, it is `python tests/torture.py`."""

import logging
import random
import sys
from pathlib import Path

import pytest

import torture


@pytest.mark.skipif(sys.platform == "win32", reason="a process of this kind is Unix's")
def test_runs_killed_at_random_moments_end_bit_identical(tmp_path: Path) -> None:
    seen = torture.kill(tmp_path, 5, random.Random(1), lambda text: None)
    assert sum(count for what, count in seen.items() if what.startswith("killed")) == 5
    assert seen["runs finished, bit-identical"] >= 1


def test_damaged_checkpoints_are_refused_and_never_loaded(tmp_path: Path) -> None:
    before = logging.getLogger("tinygpt").level
    try:
        seen = torture.corrupt(tmp_path, 60, random.Random(1), lambda text: None)
    finally:
        logging.getLogger("tinygpt").setLevel(before)
    assert sum(seen.values()) == 60
    by_outcome = {what.rpartition(": ")[2] for what in seen}
    assert "refused, and resumed from the one before" in by_outcome
