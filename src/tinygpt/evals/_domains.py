"""Bits per byte of several kinds of text in one report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tinygpt.data import ValidationSet
from tinygpt.errors import ConfigError
from tinygpt.evals._bpb import BpbReport, evaluate_bpb
from tinygpt.evals._progress import progress_bar


@dataclass(frozen=True)
class DomainReport:
    """Bits per byte of each domain; `print` shows a table.

    Attributes:
        domains: The report of each, by name, in the order given.
    """

    domains: dict[str, BpbReport]

    @property
    def bpb(self) -> float:
        """Bits per byte of all texts together: each domain counts by its bytes."""
        bits = math.fsum(report.bpb * report.num_bytes for report in self.domains.values())
        return bits / sum(report.num_bytes for report in self.domains.values())

    @property
    def mean_bpb(self) -> float:
        """Mean of the domains' bits per byte: each counts the same, however large."""
        return math.fsum(report.bpb for report in self.domains.values()) / len(self.domains)

    def __getitem__(self, name: str) -> BpbReport:
        """Return the report of a domain by its name."""
        return self.domains[name]

    def __str__(self) -> str:
        rows = {name: (report.bpb, report.num_bytes, report.data_hash[:8]) for name, report in self.domains.items()}
        width = max(len("all, by bytes"), *map(len, rows))
        lines = [f"{'domain':{width}}  bits per byte         bytes  data"]
        lines += [f"{name:{width}}  {bpb:13.4f}  {size:12,}  {data}" for name, (bpb, size, data) in rows.items()]
        total = sum(report.num_bytes for report in self.domains.values())
        lines.append(f"{'all, by bytes':{width}}  {self.bpb:13.4f}  {total:12,}")
        lines.append(f"{'mean':{width}}  {self.mean_bpb:13.4f}")
        return "\n".join(lines)


def evaluate_domains(model: nn.Module, domains: Mapping[str, ValidationSet], *, progress: bool = True) -> DomainReport:
    """Measure bits per byte on several validation sets.

    Args:
        model: As for `evaluate_bpb`.
        domains: A validation set for each name.
        progress: Whether to show a bar on standard error.

    Raises:
        ConfigError: If there is no domain.
        DataError: If a set has no text.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.data import TextDocuments, ValidationSet
        from tinygpt.evals import evaluate_domains
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(1, vocab_size=257, max_seq_len=64))
        texts = {"prose": ["Call me Ishmael."], "code": ["def f(x): return x"]}
        sets = {
            name: ValidationSet.from_source(TextDocuments(documents), ByteTokenizer(), rows=1, seq_len=64)
            for name, documents in texts.items()
        }
        print(evaluate_domains(model, sets))
        ```
    """
    if not domains:
        raise ConfigError("domains is empty; give a validation set for at least one name.")
    reports = {}
    with progress_bar("domains", total=len(domains), enabled=progress) as advance:
        for name, validation in domains.items():
            reports[name] = evaluate_bpb(model, validation)
            advance(1)
    return DomainReport(reports)
