"""Reports and pictures: of a run from its own files, of text, tokenizer and packing before it, of evaluations after."""

from tinygpt.report._compare import compare_runs as compare_runs
from tinygpt.report._data import plot_documents as plot_documents
from tinygpt.report._data import plot_packing as plot_packing
from tinygpt.report._data import plot_tokenizer as plot_tokenizer
from tinygpt.report._evals import plot_core as plot_core
from tinygpt.report._evals import plot_domains as plot_domains
from tinygpt.report._evals import plot_positions as plot_positions
from tinygpt.report._run import plot_run as plot_run
from tinygpt.report._write import ReportFiles as ReportFiles
from tinygpt.report._write import summarize_run as summarize_run
from tinygpt.report._write import write_report as write_report

__all__ = [
    "ReportFiles",
    "compare_runs",
    "plot_core",
    "plot_documents",
    "plot_domains",
    "plot_packing",
    "plot_positions",
    "plot_run",
    "plot_tokenizer",
    "summarize_run",
    "write_report",
]
