"""Measuring a model: bits per byte, as a whole, by domain and by position, and answers to questions."""

from tinygpt.evals._bpb import BpbReport as BpbReport
from tinygpt.evals._bpb import evaluate_bpb as evaluate_bpb
from tinygpt.evals._bpb import unigram_bpb as unigram_bpb
from tinygpt.evals._bundle import EvalBundle as EvalBundle
from tinygpt.evals._bundle import EvalItem as EvalItem
from tinygpt.evals._bundle import EvalTask as EvalTask
from tinygpt.evals._core import CoreReport as CoreReport
from tinygpt.evals._core import TaskScore as TaskScore
from tinygpt.evals._core import evaluate_core as evaluate_core
from tinygpt.evals._domains import DomainReport as DomainReport
from tinygpt.evals._domains import evaluate_domains as evaluate_domains
from tinygpt.evals._lm_eval import LMEvalAdapter as LMEvalAdapter
from tinygpt.evals._positions import PositionCurve as PositionCurve
from tinygpt.evals._positions import loss_by_position as loss_by_position

__all__ = [
    "BpbReport",
    "CoreReport",
    "DomainReport",
    "EvalBundle",
    "EvalItem",
    "EvalTask",
    "LMEvalAdapter",
    "PositionCurve",
    "TaskScore",
    "evaluate_bpb",
    "evaluate_core",
    "evaluate_domains",
    "loss_by_position",
    "unigram_bpb",
]
