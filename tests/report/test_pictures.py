"""What the pictures say is read back from SVG files, in which text stays text."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import pytest

from tinygpt.data import TextDocuments, TokenShards, tokenize_documents
from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.metrics import MetricsFile
from tinygpt.report import plot_documents, plot_packing, plot_run, plot_tokenizer
from tinygpt.tokenizer import ByteTokenizer, tokenizer_report, train_bpe

TEXTS = ["a" * 10] * 6 + ["b" * 40] * 3 + [""]
TOKENIZER = ByteTokenizer()


@pytest.fixture(autouse=True)
def text_stays_text() -> Iterator[None]:
    with mpl.rc_context({"svg.fonttype": "none"}):
        yield


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path / "tokens", processes=1)


def _draw_run(picture: Path) -> Path:
    metrics = picture.with_name("metrics.jsonl")
    steps = [
        {"event": "step", "step": n, "loss": 5.0 - n, "lr": 0.02, "weight_decay": 0.1, "time": 0.0} for n in range(3)
    ]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in steps), "utf-8")
    return plot_run(metrics, picture, title="a run")


def _draw_tokenizer(picture: Path) -> Path:
    return plot_tokenizer(tokenizer_report(TOKENIZER, TEXTS, ["held out"]), picture)


PICTURES: list[Callable[[Path], Path]] = [
    lambda picture: plot_documents(TextDocuments(TEXTS), picture, tokenizer=TOKENIZER, seq_len=16),
    lambda picture: plot_packing(TextDocuments(TEXTS), picture, tokenizer=TOKENIZER, seq_lens=[16, 32]),
    _draw_tokenizer,
    _draw_run,
]


@pytest.mark.parametrize("draw", PICTURES, ids=["documents", "packing", "tokenizer", "run"])
def test_a_picture_is_written_in_the_format_of_its_suffix(draw: Callable[[Path], Path], tmp_path: Path) -> None:
    assert draw(tmp_path / "picture.png") == tmp_path / "picture.png"
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5_000
    assert "<svg" in draw(tmp_path / "picture.svg").read_text("utf-8")


@pytest.mark.parametrize("draw", PICTURES, ids=["documents", "packing", "tokenizer", "run"])
def test_without_matplotlib_the_error_says_what_to_install(
    draw: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[plot\]"'):
        draw(tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_documents_longer_than_a_row_are_counted_and_weighed(tmp_path: Path, shards: TokenShards) -> None:
    # Nine documents with text and 180 tokens; three of the nine, with 120 of the 180, are longer than 16.
    from_text = plot_documents(TextDocuments(TEXTS), tmp_path / "a.svg", tokenizer=TOKENIZER, seq_len=16)
    from_shards = plot_documents(shards, tmp_path / "b.svg", seq_len=16)
    for picture in (from_text, from_shards):
        text = picture.read_text("utf-8")
        assert "9 documents, 180 tokens, median length 10" in text
        assert "33% of them are longer than a row and hold 67% of the tokens" in text
        assert "a row of 16" in text


def test_reading_stops_with_the_document_that_reaches_the_limit(tmp_path: Path, shards: TokenShards) -> None:
    assert "3 documents, 30 tokens" in plot_documents(shards, tmp_path / "a.svg", max_tokens=21).read_text("utf-8")
    assert "3 documents, 30 tokens" in plot_packing(shards, tmp_path / "b.svg", max_tokens=21).read_text("utf-8")


def test_the_share_that_packing_uses_is_told_for_each_way(tmp_path: Path, shards: TokenShards) -> None:
    # Rows of 11 tokens hold <|bos|> and 10: the short ones fit, and of the long ones 10 of 40 are used by cropping.
    text = plot_packing(shards, tmp_path / "a.svg", seq_lens=[10]).read_text("utf-8")
    assert [name in text for name in ("crop, 10", "carry, 10", "concat, 10")] == [True] * 3
    assert text.count("50.0 %") == 1
    assert text.count("100.0 %") == 2


def test_a_tokenizer_is_drawn_with_its_longest_tokens(tmp_path: Path) -> None:
    texts = ["the whale $$$$ the whale $$$$"] * 4
    report = tokenizer_report(train_bpe(texts, vocab_size=275), texts, ["the sea"])
    text = plot_tokenizer(report, tmp_path / "a.svg").read_text("utf-8")
    assert "275 token ids" in text
    assert f"{report.train.bytes_per_token:.2f}" in text
    assert f"{report.validation.bytes_per_token:.2f}" in text
    assert report.longest[0] == b" whale"
    assert "' whale'" in text
    assert "$$$$" in text  # and no formula


@pytest.mark.parametrize("draw", [plot_documents, plot_packing])
def test_what_cannot_be_drawn_is_refused(draw: Callable[..., Path], tmp_path: Path) -> None:
    source, picture = TextDocuments(TEXTS), tmp_path / "a.png"
    with pytest.raises(ConfigError, match="tokenizer=None: text needs a tokenizer"):
        draw(source, picture)
    with pytest.raises(ConfigError, match="max_tokens=0 is not positive"):
        draw(source, picture, tokenizer=TOKENIZER, max_tokens=0)
    with pytest.raises(DataError, match="no document with a token in it"):
        draw(TextDocuments(["", ""]), picture, tokenizer=TOKENIZER)


def test_rows_without_positions_are_refused(tmp_path: Path, shards: TokenShards) -> None:
    with pytest.raises(ConfigError, match="seq_len=0 is not positive"):
        plot_documents(shards, tmp_path / "a.png", seq_len=0)
    for seq_lens in ([], [512, 0]):
        with pytest.raises(ConfigError, match="must be one or more positive numbers"):
            plot_packing(shards, tmp_path / "a.png", seq_lens=seq_lens)


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no training step to draw"):
        plot_run(tmp_path / "metrics.jsonl", tmp_path / "a.png")


def test_a_step_without_a_finite_number_is_left_out_of_the_picture(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, loss in enumerate((3.0, float("nan"), 2.0)):
        metrics.write("step", step, loss=loss, lr=0.02, weight_decay=0.1)
    metrics.write("evaluation", 2, bpb=float("inf"))
    assert plot_run(tmp_path, tmp_path / "run.png").stat().st_size > 5_000
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 0, "loss": null}\n')
    with pytest.raises(DataError, match="holds no training step to draw"):
        plot_run(tmp_path, tmp_path / "run.png")
