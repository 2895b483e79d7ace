"""Measuring a model."""

from tinygpt.evals._bpb import BpbReport as BpbReport
from tinygpt.evals._bpb import evaluate_bpb as evaluate_bpb
from tinygpt.evals._bpb import unigram_bpb as unigram_bpb

__all__ = ["BpbReport", "evaluate_bpb", "unigram_bpb"]
