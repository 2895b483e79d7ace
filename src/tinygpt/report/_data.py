"""Pictures of text before it is trained on: lengths of documents, a tokenizer, what packing does with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from tinygpt.data import DocumentSource, Overflow, Packer, TokenShards
from tinygpt.data._documents import NO_TOKENS
from tinygpt.errors import ConfigError, DataError
from tinygpt.report._figure import new_figure, plain_axes, plain_text, save_figure
from tinygpt.tokenizer import Tokenizer, TokenizerReport, encode_array

_TRAIN, _VALIDATION, _LOST = "#08519c", "#a63603", "#d9d9d9"
_Documents = list[np.ndarray[tuple[int], np.dtype[np.int32]]]


def plot_documents(
    source: DocumentSource | TokenShards,
    picture: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    seq_len: int | None = None,
    max_tokens: int = 10_000_000,
) -> Path:
    """Draw how long documents are: how many there are of a length, and how many tokens are in them.

    Args:
        source: Text, or `TokenShards`.
        picture: Where to write; the suffix decides the format, `.png` or `.svg` for example.
        tokenizer: What turns text into tokens; shards need none.
        seq_len: Positions in a row, drawn as a line: documents to the right of it are cut.
        max_tokens: Read no further than the document in which this many are reached.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: If text comes without a tokenizer, or a number is not positive.
        DataError: If there is no document with a token in it.
        MissingDependencyError: If matplotlib is not installed.

    Example:
        ```python
        from tinygpt.data import embedded_corpus
        from tinygpt.report import plot_documents
        from tinygpt.tokenizer import ByteTokenizer

        plot_documents(embedded_corpus("train"), "documents.png", tokenizer=ByteTokenizer(), seq_len=2048)
        ```
    """
    figure = new_figure(8, 4.2)
    lengths = np.array([len(document) for document in _read(source, tokenizer, max_tokens)])
    if seq_len is not None and seq_len < 1:
        raise ConfigError(f"seq_len={seq_len} is not positive; choose 1 or more.")
    axes = figure.subplots()
    # Four bins to a doubling, and one more at each end.
    first, last = np.floor(4 * np.log2(lengths.min())) - 1, np.ceil(4 * np.log2(lengths.max() + 1)) + 1
    edges = 2 ** (np.arange(first, last + 1) / 4)
    shares = ((None, _TRAIN, "documents"), (lengths, _VALIDATION, "tokens"))
    for weights, color, name in shares:
        counts, _ = np.histogram(lengths, edges, weights=weights)
        axes.stairs(100 * counts / counts.sum(), edges, color=color, fill=name == "documents", alpha=0.5)
        axes.stairs(100 * counts / counts.sum(), edges, color=color, linewidth=1.6, label=f"share of {name}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.set_xlabel("length of a document (tokens)")
    axes.set_ylabel("percent")
    title = f"{len(lengths):,} documents, {lengths.sum():,} tokens, median length {np.median(lengths):,.0f}"
    if seq_len is not None:
        axes.axvline(seq_len, color="#31a354", linestyle="--", linewidth=1.4, label=f"a row of {seq_len:,}")
        longer = lengths[lengths > seq_len]
        title += f"\n{len(longer) / len(lengths):.0%} of them are longer than a row and hold "
        title += f"{longer.sum() / lengths.sum():.0%} of the tokens"
    axes.set_title(title, fontsize=10)
    plain_axes(axes)
    axes.legend(frameon=False)
    return save_figure(figure, picture)


def plot_tokenizer(report: TokenizerReport, picture: str | Path) -> Path:
    """Draw a tokenizer's bytes per token on training and held-out text, and its longest tokens.

    Args:
        report: What `tokenizer_report` found.
        picture: Where to write; the suffix decides the format.

    Returns:
        The path of the picture.

    Raises:
        MissingDependencyError: If matplotlib is not installed.

    Example:
        ```python
        from tinygpt.data import embedded_corpus
        from tinygpt.report import plot_tokenizer
        from tinygpt.tokenizer import ByteTokenizer, tokenizer_report

        report = tokenizer_report(ByteTokenizer(), embedded_corpus("train"), embedded_corpus("validation"))
        plot_tokenizer(report, "tokenizer.png")
        ```
    """
    figure = new_figure(8, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    values = [report.train.bytes_per_token, report.validation.bytes_per_token]
    bars = left.bar(["train", "validation"], values, color=[_TRAIN, _VALIDATION], width=0.6)
    left.bar_label(bars, fmt="%.2f", padding=2)
    left.set_ylim(0, 1.15 * max(values))
    left.set_ylabel("bytes per token")
    left.set_title(f"{report.vocab_size:,} token ids", fontsize=10)
    longest = report.longest[::-1]
    right.barh(range(len(longest)), [len(token) for token in longest], color="#9ecae1")
    right.set_yticks(range(len(longest)), [_label(token) for token in longest], fontsize=8, family="monospace")
    right.set_xlabel("bytes")
    right.set_title(f"the {len(longest)} longest tokens", fontsize=10)
    right.xaxis.get_major_locator().set_params(integer=True)
    plain_axes(left, grid="y")
    plain_axes(right, grid="x")
    return save_figure(figure, picture)


def plot_packing(
    source: DocumentSource | TokenShards,
    picture: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    seq_lens: Sequence[int] = (512, 2048),
    buffer_documents: int = 1000,
    max_tokens: int = 10_000_000,
) -> Path:
    """Draw how many tokens each way of packing uses and loses.

    Args:
        source: Text, or `TokenShards`.
        picture: Where to write; the suffix decides the format.
        tokenizer: What turns text into tokens; shards need none.
        seq_lens: Positions in a row; each is drawn.
        buffer_documents: How many documents packing chooses from; see `Packer`.
        max_tokens: Read no further than the document in which this many are reached.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: If text comes without a tokenizer, or a number is not positive.
        DataError: If there is no document with a token in it.
        MissingDependencyError: If matplotlib is not installed.

    Example:
        ```python
        from tinygpt.data import embedded_corpus
        from tinygpt.report import plot_packing
        from tinygpt.tokenizer import ByteTokenizer

        plot_packing(embedded_corpus("train"), "packing.png", tokenizer=ByteTokenizer(), seq_lens=[512])
        ```
    """
    figure = new_figure(8, 1.4 + 1.1 * len(seq_lens))
    if not seq_lens or min(seq_lens) < 1:
        raise ConfigError(f"seq_lens={list(seq_lens)} must be one or more positive numbers.")
    documents = _read(source, tokenizer, max_tokens)
    axes = figure.subplots()
    names: list[str] = []
    for seq_len in seq_lens:
        for overflow in get_args(Overflow):
            cropped = _cropped_fraction(documents, seq_len, buffer_documents, overflow)
            place, used = len(names), 100 * (1 - cropped)
            label = "used" if place == 0 else None
            axes.barh(place, used, color=_TRAIN, label=label)
            axes.barh(place, 100 - used, left=used, color=_LOST, label="cropped" if place == 0 else None)
            inside = used > 12
            color = "white" if inside else "black"
            axes.text(1.5 if inside else used + 1.5, place, f"{used:.1f} %", va="center", fontsize=9, color=color)
            names.append(f"{overflow}, {seq_len:,}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of the tokens")
    tokens = sum(map(len, documents))
    axes.set_title(f"{len(documents):,} documents, {tokens:,} tokens, buffer {buffer_documents:,}", fontsize=10)
    plain_axes(axes, grid="x")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return save_figure(figure, picture)


def _read(source: DocumentSource | TokenShards, tokenizer: Tokenizer | None, max_tokens: int) -> _Documents:
    """Return the token ids of the first documents that have any."""
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} is not positive; choose 1 or more.")
    if not isinstance(source, TokenShards) and tokenizer is None:
        raise ConfigError("tokenizer=None: text needs a tokenizer; only TokenShards bring their own.")
    documents: _Documents = []
    left = max_tokens
    for item, _ in source.read():
        tokens = encode_array(tokenizer, item).view(np.int32) if isinstance(item, str) and tokenizer else item
        if isinstance(tokens, np.ndarray) and len(tokens):
            documents.append(tokens)
            left -= len(tokens)
        if left <= 0:
            break
    if not documents:
        raise DataError(NO_TOKENS)
    return documents


def _cropped_fraction(documents: _Documents, seq_len: int, buffer_documents: int, overflow: Overflow) -> float:
    packer = Packer(row_tokens=seq_len + 1, bos_token_id=0, buffer_documents=buffer_documents, overflow=overflow)
    waiting = iter(documents)
    while packer.next_row(waiting) is not None:
        pass
    packer.finish_row()
    return packer.utilization.cropped_fraction


def _label(token: bytes) -> str:
    """Return a token in quotes on one line, its middle left out if it is long."""
    text = repr(token.decode("utf-8", errors="backslashreplace"))
    return plain_text(text if len(text) <= 28 else f"{text[:14]}...{text[-11:]}")
