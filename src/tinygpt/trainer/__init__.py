"""The loop that trains any model on any loss, and its state."""

from tinygpt.trainer._changes import Change as Change
from tinygpt.trainer._changes import format_changes as format_changes
from tinygpt.trainer._config import TrainerConfig as TrainerConfig
from tinygpt.trainer._hooks import Hook as Hook
from tinygpt.trainer._hooks import every as every
from tinygpt.trainer._phases import Phase as Phase
from tinygpt.trainer._precision import resolve_precision as resolve_precision
from tinygpt.trainer._signals import Interrupted as Interrupted
from tinygpt.trainer._signals import stopped_runs_go_on_by as stopped_runs_go_on_by
from tinygpt.trainer._trainer import Trainer as Trainer
from tinygpt.trainer._ways import ResumeRefusedError as ResumeRefusedError

__all__ = [
    "Change",
    "Hook",
    "Interrupted",
    "Phase",
    "ResumeRefusedError",
    "Trainer",
    "TrainerConfig",
    "every",
    "format_changes",
    "resolve_precision",
    "stopped_runs_go_on_by",
]
