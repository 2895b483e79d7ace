import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tinygpt.data import Batch, BatchLoader, JsonLines, TextDocuments, TextFiles, embedded_corpus, pack_rows
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import ByteTokenizer, train_bpe

TOKENIZER = ByteTokenizer()
TEXTS = ["the first", "", "second document", "3", "the fourth is a good deal longer than one row", "five", "six or so"]
corpora = st.lists(st.text("abc dé", max_size=40), min_size=1, max_size=15).map(lambda texts: [*texts, "end"])
overflows = st.sampled_from(["crop", "carry"])


def _loader(texts: list[str] = TEXTS, **changes: Any) -> BatchLoader:
    arguments = {"rows": 2, "seq_len": 8, "buffer_documents": 3, **changes}
    return BatchLoader(TextDocuments(texts), TOKENIZER, **arguments)


def _take(loader: BatchLoader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def _same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs)


def _through_files(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a state as a checkpoint would, JSON and safetensors, and read it back."""
    save_file(state["tensors"], folder / "loader.safetensors")
    (folder / "loader.json").write_text(json.dumps({key: state[key] for key in state if key != "tensors"}))
    rest = json.loads((folder / "loader.json").read_text())
    return {**rest, "tensors": load_file(folder / "loader.safetensors")}


@settings(max_examples=150)
@given(
    texts=corpora,
    seq_len=st.integers(1, 20),
    rows=st.integers(1, 3),
    buffer_documents=st.integers(1, 20),
    overflow=overflows,
    before=st.integers(0, 12),
    after=st.integers(1, 8),
)
def test_a_loader_restored_at_any_batch_goes_on_as_if_never_stopped(
    texts: list[str],
    seq_len: int,
    rows: int,
    buffer_documents: int,
    overflow: str,
    before: int,
    after: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    same = {"seq_len": seq_len, "rows": rows, "buffer_documents": buffer_documents, "overflow": overflow}
    straight = _loader(texts, **same)
    _take(straight, before)
    state = _through_files(straight.state_dict(), tmp_path_factory.mktemp("state"))
    resumed = _loader(texts, **same)
    resumed.load_state_dict(state)
    assert _same(_take(resumed, after), _take(straight, after))
    assert resumed.epoch == straight.epoch
    assert resumed.utilization() == straight.utilization()


@pytest.mark.parametrize("before", [0, 1, 7, 40])
def test_resuming_is_exact_on_files_with_a_trained_tokenizer(tmp_path: Path, before: int) -> None:
    texts = [text for text, _ in embedded_corpus("validation").read()]
    tokenizer = train_bpe(texts, vocab_size=400)
    (tmp_path / "book.txt").write_text("\n\n".join(texts), encoding="utf-8")

    def build() -> BatchLoader:
        source = TextFiles(tmp_path, separator="\n\n")
        return BatchLoader(source, tokenizer, rows=4, seq_len=64, buffer_documents=50)

    straight = build()
    _take(straight, before)
    resumed = build()
    resumed.load_state_dict(straight.state_dict())
    assert _same(_take(resumed, 30), _take(straight, 30))


def test_a_state_is_a_snapshot_and_can_be_loaded_into_a_running_loader() -> None:
    loader = _loader()
    _take(loader, 3)
    state = loader.state_dict()
    first = _take(loader, 10)
    loader.load_state_dict(state)
    assert _same(_take(loader, 10), first)
    loader.load_state_dict(state)
    assert _same(_take(loader, 10), first)


@settings(max_examples=50)
@given(texts=corpora, world_size=st.integers(1, 4), rows=st.integers(1, 3), overflow=overflows)
def test_the_ranks_rows_together_are_those_of_one_process(
    texts: list[str], world_size: int, rows: int, overflow: str
) -> None:
    alone = _loader(texts, rows=rows * world_size, overflow=overflow)
    ranks = [
        _loader(texts, rows=rows, overflow=overflow, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(4):
        whole = next(alone)
        parts = [next(loader) for loader in ranks]
        for rank, part in enumerate(parts):
            assert torch.equal(part.inputs, whole.inputs[rank::world_size])
            assert torch.equal(part.targets, whole.targets[rank::world_size])
    fingerprints = {json.dumps({k: v for k, v in r.state_dict().items() if k != "tensors"}) for r in ranks}
    assert len(fingerprints) == 1


@given(texts=corpora, overflow=overflows, buffer_documents=st.integers(1, 30))
def test_the_first_epoch_is_packed_as_pack_rows_packs_it(
    texts: list[str], overflow: str, buffer_documents: int
) -> None:
    expected = list(
        pack_rows(
            [TOKENIZER.encode(text) for text in texts],
            row_tokens=9,
            bos_token_id=TOKENIZER.bos_token_id,
            buffer_documents=buffer_documents,
            overflow=overflow,  # type: ignore[arg-type]
        )
    )
    full = [row for row in expected if (row >= 0).all()]
    loader = _loader(texts, rows=1, overflow=overflow, buffer_documents=buffer_documents)
    for row, batch in zip(full, loader, strict=False):
        assert batch.inputs[0].tolist() == row[:-1].tolist()
        assert batch.targets[0].tolist() == row[1:].tolist()


def test_batches_are_int64_rows_that_start_with_bos_and_targets_are_the_next_inputs() -> None:
    for batch in _take(_loader(), 20):
        assert batch.inputs.shape == batch.targets.shape == (2, 8)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert (batch.inputs[:, 0] == TOKENIZER.bos_token_id).all()
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert (batch.targets >= 0).all()


def test_carry_shows_every_document_once_an_epoch() -> None:
    texts = ["abcdefghijklmnop", "qrstuv", "wxyz"]
    loader = _loader(texts, rows=1, overflow="carry", buffer_documents=100)
    seen = ""
    while loader.epoch < 3:
        seen += TOKENIZER.decode([t for t in next(loader).targets[0].tolist() if t != TOKENIZER.bos_token_id])
    assert sorted(seen[: 26 * 3]) == sorted("abcdefghijklmnopqrstuvwxyz" * 3)


def test_a_corpus_shorter_than_a_row_is_repeated() -> None:
    loader = _loader(["ab"], rows=1, seq_len=7)
    bos = TOKENIZER.bos_token_id
    assert next(loader).inputs.tolist() == [[bos, 97, 98, bos, 97, 98, bos]]
    assert loader.epoch == 2
    assert loader.utilization().documents == 3


def test_utilization_counts_documents_and_tokens() -> None:
    loader = _loader(rows=1)
    while loader.epoch == 0:
        next(loader)
    counts = loader.utilization()
    buffered = len(loader.state_dict()["tensors"]["buffer_tokens"])
    assert counts.empty_documents >= 1
    assert counts.tokens_read == counts.tokens_used + counts.tokens_cropped + buffered
    assert counts.tokens_used + counts.bos_used == counts.rows * 9
    assert 0 < counts.cropped_fraction < 1


def test_equal_loaders_have_equal_fingerprints_and_any_change_shows() -> None:
    assert _loader().fingerprint() == _loader().fingerprint()
    changed = [
        _loader(),
        _loader(rows=3),
        _loader(seq_len=9),
        _loader(overflow="carry"),
        _loader(buffer_documents=4),
        _loader(TEXTS[1:]),
        BatchLoader(TextDocuments(TEXTS), train_bpe(TEXTS * 2, vocab_size=280), rows=2, seq_len=8, buffer_documents=3),
    ]
    assert len({loader.fingerprint() for loader in changed}) == len(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "saved with rows=2 and this loader has rows=3"),
        ({"seq_len": 9}, "saved with seq_len=8 and this loader has seq_len=9"),
        ({"overflow": "carry"}, "saved with overflow='crop' and this loader has overflow='carry'"),
        ({"buffer_documents": 4}, "saved with buffer_documents=3 and this loader has buffer_documents=4"),
        ({"world_size": 2}, "saved with world_size=1 and this loader has world_size=2"),
    ],
)
def test_a_state_with_other_settings_is_refused(changes: dict[str, Any], message: str) -> None:
    state = _loader().state_dict()
    with pytest.raises(DataError, match=message):
        _loader(**changes).load_state_dict(state)


def test_a_state_of_another_tokenizer_is_refused() -> None:
    other = BatchLoader(
        TextDocuments(TEXTS), train_bpe(TEXTS * 2, vocab_size=280), rows=2, seq_len=8, buffer_documents=3
    )
    with pytest.raises(DataError, match=r"saved with another tokenizer: fingerprint \w{12} then, \w{12} now"):
        other.load_state_dict(_loader().state_dict(), allow_source_change=True)


def test_a_file_changed_since_the_state_was_saved_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one document"}\n{"text": "another one"}\n')
    loader = BatchLoader(JsonLines(path), TOKENIZER, rows=1, seq_len=4)
    next(loader)
    path.write_text('{"text": "one document"}\n{"text": "another two"}\n')
    state = loader.state_dict()
    with pytest.raises(DataError, match=r"another source, or its files changed: fingerprint \w{12} then, \w{12} now"):
        BatchLoader(JsonLines(path), TOKENIZER, rows=1, seq_len=4).load_state_dict(state)


def test_an_allowed_source_change_starts_the_new_source_and_keeps_buffer_and_counts() -> None:
    old = _loader(rows=1, overflow="carry")
    while old.epoch == 0:
        next(old)
    state = old.state_dict()
    new = _loader(["zzzz"], rows=1, overflow="carry")
    new.load_state_dict(state, allow_source_change=True)
    assert new.epoch == 0
    assert new.utilization() == old.utilization()
    text = "".join(TOKENIZER.decode(batch.inputs[0].tolist()) for batch in _take(new, 20))
    assert text.endswith("z")
    assert text.replace("<|bos|>", "").strip("z") != ""


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_a_state_of_another_version_is_refused(version: Any) -> None:
    with pytest.raises(DataError, match=rf"has version {version!r}; this tinygpt reads version 1"):
        _loader().load_state_dict({**_loader().state_dict(), "version": version})


def test_a_damaged_state_is_refused() -> None:
    loader = _loader()
    next(loader)
    state = loader.state_dict()
    tensors = state["tensors"]
    for key in set(state) - {"version"}:
        with pytest.raises(DataError, match="the loader state is damaged: fields are missing or unknown"):
            loader.load_state_dict({name: value for name, value in state.items() if name != key})
    for part in ("settings", "counters"):
        for damaged in ({}, None, {**state[part], "more": 1}):
            with pytest.raises(DataError, match="fields are missing or unknown"):
                loader.load_state_dict({**state, part: damaged})
    for changes in (
        {"buffer_tokens": tensors["buffer_tokens"][:-1]},
        {"buffer_tokens": tensors["buffer_tokens"].long()},
        {"buffer_lengths": tensors["buffer_lengths"] * -1},
        {"buffer_lengths": None},
    ):
        with pytest.raises(DataError, match="the loader state is damaged: buffer_lengths"):
            loader.load_state_dict({**state, "tensors": {**tensors, **changes}})


def test_a_document_that_cannot_be_read_stops_the_loader_every_time_it_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut of')
    loader = BatchLoader(JsonLines(tmp_path), TOKENIZER, rows=1, seq_len=4)
    for _ in range(3):
        with pytest.raises(DataError, match="line 2 is not valid JSON"):
            next(loader)
    assert loader.epoch == 0


@pytest.mark.parametrize("texts", [[""], [""] * 200])
def test_a_source_of_empty_documents_is_an_error_and_not_an_endless_loop(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no document with a token in it"):
        next(_loader(texts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows=0 is not positive"),
        ({"seq_len": 0}, "seq_len=0 is not positive"),
        ({"world_size": 0}, "world_size=0 is not positive"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not one of 2 processes; choose 0 to 1"),
        ({"rank": -1}, "rank=-1 is not one of 1 processes"),
        ({"overflow": "drop"}, "overflow='drop' is not known"),
        ({"buffer_documents": 0}, "buffer_documents=0 is not positive"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _loader(**changes)
