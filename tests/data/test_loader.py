import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tinygpt.data import (
    Batch,
    BatchLoader,
    Cursor,
    JsonLines,
    Mixture,
    TextDocuments,
    TextFiles,
    TokenShards,
    document_ids,
    embedded_corpus,
    pack_rows,
    tokenize_documents,
)
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import ByteTokenizer, train_bpe

TOKENIZER = ByteTokenizer()
TEXTS = ["the first", "", "second document", "3", "the fourth is a good deal longer than one row", "five", "six or so"]
corpora = st.lists(st.text("abc dé", max_size=40), min_size=1, max_size=15).map(lambda texts: [*texts, "end"])
overflows = st.sampled_from(["crop", "carry", "concat"])


def _loader(texts: list[str] = TEXTS, **changes: Any) -> BatchLoader:
    arguments = {"rows": 2, "seq_len": 8, "buffer_documents": 3, **changes}
    return BatchLoader(TextDocuments(texts), TOKENIZER, **arguments)


def _shard_loader(shards: TokenShards, **changes: Any) -> BatchLoader:
    return BatchLoader(shards, **{"rows": 2, "seq_len": 8, "buffer_documents": 3, **changes})


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
    seed=st.none() | st.integers(0, 3),
    shuffle_documents=st.integers(1, 8),
    before=st.integers(0, 12),
    after=st.integers(1, 8),
    threads=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_a_loader_restored_at_any_batch_goes_on_as_if_never_stopped(
    texts: list[str],
    before: int,
    after: int,
    threads: tuple[int, int, int, int],
    tmp_path_factory: pytest.TempPathFactory,
    **same: Any,
) -> None:
    straight = _loader(texts, **same, num_workers=threads[0], prefetch=threads[1])
    _take(straight, before)
    state = _through_files(straight.state_dict(), tmp_path_factory.mktemp("state"))
    resumed = _loader(texts, **same, num_workers=threads[2], prefetch=threads[3])
    resumed.load_state_dict(state)
    assert _same(_take(resumed, after), _take(straight, after))
    assert resumed.epoch == straight.epoch
    assert resumed.utilization() == straight.utilization()
    for loader in (straight, resumed):
        loader.close()


@settings(max_examples=60)
@given(
    texts=corpora,
    overflow=overflows,
    seed=st.none() | st.integers(0, 3),
    shuffle_documents=st.integers(1, 8),
    shard_tokens=st.integers(1, 100),
    at=st.integers(0, 6),
)
def test_token_shards_give_the_batches_of_their_text(
    texts: list[str], shard_tokens: int, at: int, tmp_path_factory: pytest.TempPathFactory, **same: Any
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    shards = tokenize_documents(TextDocuments(texts), TOKENIZER, folder, processes=1, shard_tokens=shard_tokens)
    from_text, from_shards = _loader(texts, **same, prefetch=0), _shard_loader(shards, **same)
    assert _same(_take(from_text, at), _take(from_shards, at))
    resumed = _shard_loader(TokenShards(folder), **same)
    resumed.load_state_dict(from_shards.state_dict())
    expected = _take(from_text, 8)
    assert _same(_take(from_shards, 8), expected)
    assert _same(_take(resumed, 8), expected)
    assert from_text.utilization() == from_shards.utilization() == resumed.utilization()


def test_the_batches_are_the_same_for_any_number_of_threads() -> None:
    texts = [text[:4000] for text, _ in embedded_corpus().read()] * 3
    for seed in (None, 5):
        expected = None
        for num_workers in (0, 1, 4):
            for prefetch in (0, 1, 3):
                loader = _loader(
                    texts,
                    rows=4,
                    seq_len=256,
                    seed=seed,
                    shuffle_documents=100,
                    num_workers=num_workers,
                    prefetch=prefetch,
                )
                batches = _take(loader, 40)
                expected = expected or batches
                assert _same(batches, expected)
                loader.close()


@settings(max_examples=50)
@given(
    texts=corpora,
    overflow=overflows,
    seed=st.none() | st.integers(0, 3),
    was=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    now=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    steps=st.integers(0, 6),
)
def test_a_state_goes_on_in_other_micro_batches_and_on_other_numbers_of_ranks(
    texts: list[str], was: tuple[int, int], now: tuple[int, int], steps: int, **same: Any
) -> None:
    first = _loader(texts, rows=was[0], world_size=was[1], **same, prefetch=0)
    _take(first, steps)
    stream = _loader(texts, rows=1, **same, prefetch=0)
    _take(stream, steps * was[0] * was[1])
    resumed = _loader(texts, rows=now[0], world_size=now[1], rank=now[1] - 1, **same, prefetch=0)
    resumed.load_state_dict(first.state_dict())
    for _ in range(3):
        rows = _take(stream, now[0] * now[1])[now[1] - 1 :: now[1]]
        assert next(resumed).inputs.tolist() == [row.inputs[0].tolist() for row in rows]


def test_seeds_shuffle_and_every_epoch_is_shuffled_anew() -> None:
    texts = [chr(97 + number) * 7 for number in range(26)]

    def epochs(**changes: Any) -> list[str]:
        loader = _loader(texts, rows=1, seq_len=7, buffer_documents=1, **changes)
        return ["".join(TOKENIZER.decode(next(loader).inputs[0, 1:2].tolist()) for _ in texts) for _ in range(3)]

    in_order, alphabet = epochs(), "abcdefghijklmnopqrstuvwxyz"
    assert in_order == [alphabet] * 3
    first, second, again = epochs(seed=1), epochs(seed=2), epochs(seed=1)
    assert first == again
    assert len({alphabet, *first, *second}) == 7
    assert all(sorted(epoch) == list(alphabet) for epoch in first)
    windows = epochs(seed=1, shuffle_documents=13)[0]
    assert (set(windows[:13]), set(windows[13:])) == (set(alphabet[:13]), set(alphabet[13:]))


def test_the_state_is_that_of_the_batches_handed_out_and_not_of_those_prepared() -> None:
    ahead, plain = _loader(prefetch=5), _loader(prefetch=0)
    for _ in range(12):
        assert torch.equal(next(ahead).inputs, next(plain).inputs)
        first, second = ahead.state_dict(), plain.state_dict()
        tensors = first.pop("tensors"), second.pop("tensors")
        assert first == second
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        assert (ahead.epoch, ahead.utilization()) == (plain.epoch, plain.utilization())


def test_a_closed_loader_goes_on_when_asked() -> None:
    straight, closed = _loader(), _loader()
    closed.close()
    for _ in range(6):
        assert torch.equal(next(closed).inputs, next(straight).inputs)
        closed.close()


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
        _loader(seq_len=9),
        _loader(seed=0),
        _loader(seed=1),
        _loader(seed=1, shuffle_documents=4),
        _loader(overflow="carry"),
        _loader(buffer_documents=4),
        _loader(TEXTS[1:]),
        BatchLoader(TextDocuments(TEXTS), train_bpe(TEXTS * 2, vocab_size=280), rows=2, seq_len=8, buffer_documents=3),
    ]
    assert len({loader.fingerprint() for loader in changed}) == len(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 9}, "saved with seq_len=8 and this loader has seq_len=9"),
        ({"overflow": "carry"}, "saved with overflow='crop' and this loader has overflow='carry'"),
        ({"buffer_documents": 4}, "saved with buffer_documents=3 and this loader has buffer_documents=4"),
        ({"seed": 1}, "saved with seed=None and this loader has seed=1"),
    ],
)
def test_a_state_with_other_settings_is_refused(changes: dict[str, Any], message: str) -> None:
    state = _loader().state_dict()
    with pytest.raises(DataError, match=message):
        _loader(**changes).load_state_dict(state)


@pytest.mark.parametrize("overflow", ["crop", "carry"])
def test_a_state_of_version_1_goes_on(overflow: str) -> None:
    """The file was written by version 0.1.0 and holds the rows that came next there."""
    path = Path(__file__).parent.parent / "data_files" / "loader" / "state_v1.json"
    saved = json.loads(path.read_text())[overflow]
    dtypes = {"buffer_tokens": torch.int32, "buffer_lengths": torch.int64}
    tensors = {name: torch.tensor(saved["state"]["tensors"][name], dtype=dtype) for name, dtype in dtypes.items()}
    for rows in (2, 3):
        loader = _loader(rows=rows, overflow=overflow)
        loader.load_state_dict({**saved["state"], "tensors": tensors})
        assert [row for batch in _take(loader, 12 // rows) for row in batch.inputs.tolist()] == saved["next_rows"]
    with pytest.raises(DataError, match="saved with seed=None and this loader has seed=3"):
        _loader(overflow=overflow, seed=3).load_state_dict({**saved["state"], "tensors": tensors})


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


@pytest.mark.parametrize("version", [0, 3, None, "1"])
def test_a_state_of_another_version_is_refused(version: Any) -> None:
    with pytest.raises(DataError, match=rf"has version {version!r}; this tinygpt reads versions 1 and 2"):
        _loader().load_state_dict({**_loader().state_dict(), "version": version})


def test_a_damaged_state_is_refused() -> None:
    loader = _loader()
    next(loader)
    state = loader.state_dict()
    for key in set(state) - {"version"}:
        with pytest.raises(DataError, match="the loader state is damaged: fields are missing or unknown"):
            loader.load_state_dict({name: value for name, value in state.items() if name != key})


@pytest.mark.parametrize("part", ["settings", "counters"])
@pytest.mark.parametrize("damaged", [{}, None, [], 3, "seed", {"more": 1}])
def test_settings_and_counters_of_a_state_must_be_what_they_were(part: str, damaged: Any) -> None:
    state = _loader().state_dict()
    if damaged == {"more": 1}:
        damaged = {**state[part], **damaged}
    for version in (1, 2):
        with pytest.raises(DataError, match=f"the loader state is damaged: .*{part} must be a mapping of|missing"):
            _loader().load_state_dict({**state, "version": version, part: damaged})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": -1}, "epoch must be 0 or more"),
        ({"epoch": 1.0}, "epoch must be 0 or more"),
        ({"epoch": True}, "epoch must be 0 or more"),
        ({"window": None}, "window must be 0 or more"),
        ({"taken": "3"}, "taken must be 0 or more"),
        ({"cursor": 7}, "cursor must be a cursor"),
        ({"cursor": "document"}, "cursor must be a cursor"),
        ({"window_end": []}, "window_end must be a cursor"),
        ({"continued": 1}, "continued must be true or false"),
        ({"source_fingerprint": None}, "source_fingerprint must be a digest"),
        ({"tokenizer_fingerprint": 5}, "tokenizer_fingerprint must be a digest"),
        ({"epoch": -1, "cursor": 7}, "epoch must be 0 or more; cursor must be a cursor"),
        ({"tensors": None}, "tensors must be a mapping"),
        ({"tensors": [1]}, "tensors must be a mapping"),
    ],
)
def test_a_state_with_a_field_of_another_type_is_refused(changes: dict[str, Any], message: str) -> None:
    loader = _loader()
    next(loader)
    before = loader.state_dict()
    with pytest.raises(DataError, match=f"the loader state is damaged: {message}; use another checkpoint"):
        loader.load_state_dict({**before, **changes})
    assert _same(_take(loader, 3), _take(_restored(before), 3))


def _restored(state: dict[str, Any]) -> BatchLoader:
    loader = _loader()
    loader.load_state_dict(state)
    return loader


def test_a_negative_count_in_a_state_is_refused() -> None:
    state = _loader().state_dict()
    with pytest.raises(DataError, match="damaged: documents must be 0 or more"):
        _loader().load_state_dict({**state, "counters": {**state["counters"], "documents": -1}})


@pytest.mark.parametrize("state", [None, [], "state", 2])
def test_a_state_that_is_no_mapping_is_refused(state: Any) -> None:
    with pytest.raises(DataError, match=r"the loader state is damaged: it is .* and not a mapping"):
        _loader().load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("buffer_tokens", lambda tokens: tokens[:-1], "buffer_lengths must be positive and sum to"),
        ("buffer_lengths", lambda lengths: lengths * -1, "buffer_lengths must be positive and sum to"),
        ("buffer_tokens", lambda tokens: tokens.long(), "buffer_tokens must be one dimension of torch.int32"),
        ("buffer_tokens", lambda tokens: tokens[None], "buffer_tokens must be one dimension of torch.int32"),
        ("buffer_lengths", lambda lengths: lengths[None], "buffer_lengths must be one dimension of torch.int64"),
        ("buffer_lengths", lambda lengths: None, "buffer_lengths must be one dimension of torch.int64 and is None"),
        ("buffer_lengths", lambda lengths: lengths.tolist(), "buffer_lengths must be one dimension of torch.int64"),
        ("buffer_tokens", lambda tokens: tokens + 300, r"buffer_tokens has ids from 3\d\d to 4\d\d, .* has 0 to 256"),
        ("buffer_tokens", lambda tokens: tokens - 300, r"buffer_tokens has ids from -\d+ to -\d+"),
    ],
)
def test_a_damaged_packing_buffer_is_refused(name: str, change: Callable[[Any], Any], message: str) -> None:
    loader = _loader()
    next(loader)
    state = loader.state_dict()
    tensors = {**state["tensors"], name: change(state["tensors"][name])}
    with pytest.raises(DataError, match=f"the loader state is damaged: {message}"):
        loader.load_state_dict({**state, "tensors": tensors})


@pytest.mark.parametrize("cursor", [{}, {"document": "3"}, {"document": -1}, {"document": 99}, {"file": 0}])
def test_a_cursor_of_another_source_in_a_state_is_an_error_when_read_from(cursor: dict[str, Any]) -> None:
    state = {**_loader().state_dict(), "cursor": cursor}
    loader = _loader()
    loader.load_state_dict(state)
    with pytest.raises(DataError, match=r"cursor .* does not belong to this source"):
        next(loader)


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
        ({"shuffle_documents": 0}, "shuffle_documents=0 is not positive"),
        ({"num_workers": -1}, "num_workers=-1 is negative; choose 0 or more"),
        ({"prefetch": -1}, "prefetch=-1 is negative"),
        ({"seed": -1}, r"seed=-1 is out of range; choose 0 to 2\*\*64 - 1"),
        ({"seed": 1 << 64}, "is out of range"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _loader(**changes)


def test_text_needs_a_tokenizer_and_shards_only_take_their_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer=None: text needs a tokenizer; only TokenShards bring their own"):
        BatchLoader(TextDocuments(TEXTS), rows=1, seq_len=8)
    shards = tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path / "tokens", processes=1)
    assert BatchLoader(shards, rows=1, seq_len=8).tokenizer.fingerprint() == TOKENIZER.fingerprint()
    BatchLoader(shards, TOKENIZER, rows=1, seq_len=8)
    with pytest.raises(DataError, match=r"made with another tokenizer: fingerprint \w{12} then, \w{12} now; leave"):
        BatchLoader(shards, train_bpe(TEXTS * 2, vocab_size=280), rows=1, seq_len=8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_memory_cannot_be_pinned_without_cuda() -> None:
    with pytest.raises(ConfigError, match="pin_memory=True needs CUDA, which is not there; leave it at None"):
        _loader(pin_memory=True)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_pinned_where_cuda_is(prefetch: int) -> None:
    pinned, plain = _loader(prefetch=prefetch), _loader(pin_memory=False)
    for _ in range(20):
        batch = next(pinned)
        assert batch.inputs.is_pinned()
        assert batch.targets.is_pinned()
        moved = batch.to("cuda", non_blocking=True)
        assert torch.equal(moved.inputs.cpu(), next(plain).inputs)


def test_a_shard_changed_since_the_state_was_saved_is_found(tmp_path: Path) -> None:
    shards = tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path / "a", processes=1, shard_tokens=20)
    loader = _shard_loader(shards)
    next(loader)
    state = loader.state_dict()
    other = tokenize_documents(TextDocuments(TEXTS[::-1]), TOKENIZER, tmp_path / "b", processes=1, shard_tokens=20)
    with pytest.raises(DataError, match="saved with another source, or its files changed"):
        _shard_loader(other).load_state_dict(state)
    content = bytearray((tmp_path / "a" / "tokens-00001.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "a" / "tokens-00001.bin").write_bytes(content)
    resumed = _shard_loader(TokenShards(tmp_path / "a"))
    resumed.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(DataError, match=r"tokens-00001.bin was changed since it was written"):
            _take(resumed, 10)


def test_a_shuffled_mixture_goes_on_with_other_weights() -> None:
    letters = {name: TextDocuments([f"{name}{number:03d}" for number in range(200)]) for name in "ab"}

    def build(mixture: Mixture) -> BatchLoader:
        settings: dict[str, Any] = {"rows": 1, "seq_len": 4, "buffer_documents": 1, "seed": 1, "shuffle_documents": 20}
        return BatchLoader(mixture, TOKENIZER, **settings)

    def names(loader: BatchLoader, count: int) -> list[str]:
        return [TOKENIZER.decode(batch.targets[0].tolist()) for batch in _take(loader, count)]

    even = Mixture({"a": (letters["a"], 0.5), "b": (letters["b"], 0.5)})
    first = build(even)
    before = names(first, 50)
    later = build(even.with_weights({"a": 0.0, "b": 1.0}))
    later.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="what was left of 20 shuffled together is passed over"):
        after = names(later, 60)
    assert {name[0] for name in before} == {"a", "b"}
    assert {name[0] for name in after} == {"b"}
    assert len({*before, *after}) == 110


class Breaking(TextDocuments):
    """Documents of which one cannot be read for a while."""

    broken = False

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        for text, behind in super().read(cursor):
            if self.broken and behind["document"] == 120:
                raise DataError("the disk is gone")
            yield text, behind


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_leaves_the_loader_behind_the_last_batch(seed: int | None, prefetch: int) -> None:
    """Once the cause is gone, it goes on as if nothing had happened."""
    source = Breaking([f"document number {number}" for number in range(200)])

    def build(prefetch: int) -> BatchLoader:
        settings: dict[str, Any] = {"rows": 2, "seq_len": 16, "seed": seed, "shuffle_documents": 10}
        return BatchLoader(source, TOKENIZER, **settings, buffer_documents=5, prefetch=prefetch)

    expected = _take(build(0), 60)
    loader = build(prefetch)
    source.broken = True
    got: list[Batch] = []
    with pytest.raises(DataError, match="the disk is gone"):
        got.extend(loader)
    assert 0 < len(got) < 60
    state = loader.state_dict()
    with pytest.raises(DataError, match="the disk is gone"):
        next(loader)
    source.broken = False
    resumed = build(0)
    resumed.load_state_dict(state)
    rest = expected[len(got) :]
    assert _same(got, expected[: len(got)])
    assert _same(_take(loader, len(rest)), rest)
    assert _same(_take(resumed, len(rest)), rest)


@pytest.mark.parametrize("overflow", ["crop", "carry", "concat"])
def test_document_ids_number_the_documents_of_a_row(overflow: str) -> None:
    texts = ["abc", "de", "fghijklmnopqrstuvw", "x"]
    loader = _loader(texts, rows=3, seq_len=10, overflow=overflow)
    for batch in _take(loader, 10):
        ids = document_ids(batch.inputs, TOKENIZER.bos_token_id)
        for row, numbers in zip(batch.inputs.tolist(), ids.tolist(), strict=True):
            pieces: dict[int, list[int]] = {}
            for token, number in zip(row, numbers, strict=True):
                pieces.setdefault(number, []).append(token)
            assert list(pieces) == list(range(numbers[0], numbers[0] + len(pieces)))
            assert numbers[0] == (row[0] == TOKENIZER.bos_token_id)
            for tokens in pieces.values():
                text = TOKENIZER.decode([token for token in tokens if token != TOKENIZER.bos_token_id])
                assert any(text in document for document in texts)


def test_a_huge_document_is_carried_whole(tmp_path: Path) -> None:
    """20 MB here, for the suite's sake."""
    (tmp_path / "huge.txt").write_text("0123456789abcdef" * (20 << 16))
    loader = BatchLoader(
        TextFiles(tmp_path / "huge.txt"), TOKENIZER, rows=64, seq_len=4095, overflow="carry", seed=0, prefetch=1
    )
    while loader.epoch == 0:
        next(loader)
    counts = loader.utilization()
    assert counts.tokens_used >= 20 << 20
    assert counts.tokens_cropped == 0
    loader.close()


KILLED = """
import hashlib, json, sys
from pathlib import Path
from safetensors.torch import save_file
from tinygpt.data import BatchLoader, embedded_corpus
from tinygpt.tokenizer import ByteTokenizer

folder = Path(sys.argv[1])
loader = BatchLoader(
    embedded_corpus("validation"), ByteTokenizer(), rows=4, seq_len=64, overflow="carry", seed=3, shuffle_documents=4,
    prefetch=4, num_workers=2,
)
with (folder / "log").open("w") as log:
    for number, batch in enumerate(loader, start=1):
        log.write(hashlib.sha256(batch.inputs.numpy().tobytes()).hexdigest() + "\\n")
        log.flush()
        if number % 10 == 0:
            state = loader.state_dict()
            save_file(state.pop("tensors"), folder / f"{number}.safetensors")
            (folder / f"{number}.json").write_text(json.dumps(state))
            (folder / f"{number}.done").touch()
"""


def test_a_prefetching_loader_that_was_killed_goes_on_exactly(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path])
    while not (tmp_path / "60.done").exists():
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    child.wait()
    last = max(int(path.stem) for path in tmp_path.glob("*.done"))
    state = json.loads((tmp_path / f"{last}.json").read_text())
    state["tensors"] = load_file(tmp_path / f"{last}.safetensors")

    def build(**changes: Any) -> BatchLoader:
        settings: dict[str, Any] = {"rows": 4, "seq_len": 64, "overflow": "carry", "seed": 3, "shuffle_documents": 4}
        return BatchLoader(embedded_corpus("validation"), TOKENIZER, **settings, **changes)

    whole = _take(build(prefetch=0), last + 30)
    logged = (tmp_path / "log").read_text().split("\n")[:last]
    assert [hashlib.sha256(batch.inputs.numpy().tobytes()).hexdigest() for batch in whole[:last]] == logged
    resumed = build()
    resumed.load_state_dict(state)
    assert _same(_take(resumed, 30), whole[last:])
