"""Pictures: of a run from its metrics.jsonl, and of text, tokenizer and packing before one."""

from tinygpt.report._data import plot_documents as plot_documents
from tinygpt.report._data import plot_packing as plot_packing
from tinygpt.report._data import plot_tokenizer as plot_tokenizer
from tinygpt.report._run import plot_run as plot_run

__all__ = ["plot_documents", "plot_packing", "plot_run", "plot_tokenizer"]
