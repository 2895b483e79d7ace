"""Datasets of the Hub, read from a real HTTP server on this machine."""

import io
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from hub_server import HubServer, serve_hub
from tinygpt.data import HubFiles, open_source
from tinygpt.errors import ConfigError, DataError, HubError
from tinygpt.hub import _retry

REPO = "datasets/user/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(_retry, "_FIRST_WAIT_SECONDS", 0.01)
    disable_progress_bars()
    try:
        with serve_hub() as server:
            yield server
    finally:  # or every bar of this process, those of other tests too, would stay off
        enable_progress_bars()


def _lines(name: str, count: int = 5) -> bytes:
    return b"".join(json.dumps({"text": f"{name} {number} " + "x" * 200}).encode() + b"\n" for number in range(count))


def _parquet(texts: list[str]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), content, row_group_size=3)
    return content.getvalue()


SHARDS = {f"data/{number}.jsonl": _lines(f"shard{number}") for number in range(5)}
TEXTS = [json.loads(line)["text"] for data in SHARDS.values() for line in data.splitlines()]
SHARD_BYTES = len(SHARDS["data/0.jsonl"])


def _open(
    hub: HubServer, folder: Path, address: str = "hf://datasets/user/tiny/data/*.jsonl", **options: Any
) -> HubFiles:
    return HubFiles(address, endpoint=hub.url, cache_dir=folder, token="hf_test", **options)


def _texts(source: HubFiles) -> list[str]:
    return [text for text, _ in source.read()]


def _cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.jsonl") if ".cache" not in path.parts)


def _downloads(hub: HubServer) -> int:
    return hub.count("GET", "/resolve/")


def test_files_are_read_in_order_and_from_any_cursor(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {**SHARDS, "README.md": b"about"})
    source = _open(hub, tmp_path)
    everything = list(source.read())
    assert [text for text, _ in everything] == TEXTS
    for index in range(0, len(everything), 3):
        restored = json.loads(json.dumps(everything[index][1]))
        assert list(source.read(restored)) == everything[index + 1 :]
    assert _downloads(hub) == len(SHARDS)


def test_parquet_and_text_are_read_by_suffix(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {"a.parquet": _parquet(TEXTS[:7]), "b.parquet": _parquet(TEXTS[7:]), "c.txt": b"one||two"})
    assert _texts(_open(hub, tmp_path, "hf://datasets/user/tiny/*.parquet")) == TEXTS
    assert _texts(_open(hub, tmp_path, "hf://datasets/user/tiny/c.txt", separator="||")) == ["one", "two"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("x/*.txt", ["x/b.txt"]),
        ("**/*.txt", ["a.txt", "x/b.txt", "x/y/c.txt"]),
        ("x/**", ["x/b.txt", "x/y/c.txt"]),
        ("?.txt", ["a.txt"]),
        ("x/y/c.txt", ["x/y/c.txt"]),
    ],
)
def test_patterns_choose_files(hub: HubServer, tmp_path: Path, pattern: str, expected: list[str]) -> None:
    hub.add(REPO, {name: name.encode() for name in ("a.txt", "x/b.txt", "x/y/c.txt")})
    assert _texts(_open(hub, tmp_path, f"hf://datasets/user/tiny/{pattern}")) == expected


def test_a_revision_is_read_as_it_was_and_the_commit_stays_while_reading(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add(REPO, {"a.txt": b"old"})
    source = _open(hub, tmp_path, "hf://datasets/user/tiny/*.txt")
    hub.add(REPO, {"a.txt": b"new"})
    hub.repos[REPO].branches["refs/convert/parquet"] = first
    assert _texts(source) == ["old"]
    assert _texts(_open(hub, tmp_path, "hf://datasets/user/tiny/*.txt")) == ["new"]
    assert _texts(_open(hub, tmp_path, f"hf://datasets/user/tiny@{first}/*.txt")) == ["old"]


def test_the_fingerprint_follows_the_files_that_match_and_no_others(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {**SHARDS, "README.md": b"about"})
    before = _open(hub, tmp_path).fingerprint()
    hub.add(REPO, {**SHARDS, "README.md": b"more about"})
    assert _open(hub, tmp_path / "elsewhere").fingerprint() == before
    assert _open(hub, tmp_path, text_key="body").fingerprint() != before
    assert _open(hub, tmp_path, on_error="skip").fingerprint() != before
    hub.add(REPO, {**SHARDS, "data/4.jsonl": _lines("other")})
    assert _open(hub, tmp_path).fingerprint() != before
    assert _downloads(hub) == 0


def test_the_next_file_is_fetched_while_one_is_read(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    with closing(_open(hub, tmp_path, files_ahead=2).read()) as documents:
        next(documents)
        _wait_until(lambda: len(_cached(tmp_path)) == 3)
        time.sleep(0.2)
        assert _cached(tmp_path) == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_nothing_is_fetched_before_it_is_read(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path, files_ahead=0)
    assert _downloads(hub) == 0
    with closing(source.read()) as documents:
        next(documents)
        time.sleep(0.2)
        assert _cached(tmp_path) == ["0.jsonl"]


def _wait_until(done: Any) -> None:
    for _ in range(500):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("waited 5 s in vain")


@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_cache_stays_within_its_limit_over_epochs(hub: HubServer, tmp_path: Path, room: int) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path, cache_bytes=room * SHARD_BYTES, files_ahead=1)
    for _ in range(2):
        for text, _ in source.read():
            assert len(_cached(tmp_path)) <= room, text
    assert _texts(source) == TEXTS
    assert len(_cached(tmp_path)) <= room


def test_the_clients_notes_are_no_files_to_remove_however_deep_the_folders(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {f"a/b/c/d/e/{number}.jsonl": _lines(str(number)) for number in range(4)})
    address = "hf://datasets/user/tiny/**/*.jsonl"
    size = len(_lines("0"))
    assert len(_texts(_open(hub, tmp_path, address, cache_bytes=2 * size, files_ahead=0))) == 20
    notes = [path for path in tmp_path.rglob("*.metadata") if ".cache" in path.parts]
    assert len(notes) == 4
    assert len(_cached(tmp_path)) == 2


def test_a_cache_with_room_is_read_again_without_the_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path)
    assert _texts(source) == TEXTS
    hub.fail("GET", "/resolve/", status=503)
    hub.fail("HEAD", "/resolve/", status=503)
    assert _texts(source) == TEXTS
    assert _texts(_open(hub, tmp_path)) == TEXTS  # also in another run
    assert _downloads(hub) == len(SHARDS)


def test_files_of_another_commit_make_room_first(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    assert _texts(_open(hub, tmp_path)) == TEXTS
    hub.add(REPO, {"data/0.jsonl": _lines("newer")})
    _texts(_open(hub, tmp_path, cache_bytes=2 * SHARD_BYTES))
    assert len(_cached(tmp_path)) <= 2


def test_an_interrupted_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    large = {"data/0.jsonl": _lines("large", 100_000)}
    hub.add(REPO, large)
    hub.cut("0.jsonl", keep=0.6)
    assert len(_texts(_open(hub, tmp_path))) == 100_000
    (start,) = hub.ranges
    assert start > 0.3 * len(large["data/0.jsonl"])


def test_failures_that_pass_are_tried_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    hub.fail("GET", "/tree/", status=500, times=2)
    hub.fail("GET", "/resolve/", status=503, times=3)
    assert _texts(_open(hub, tmp_path)) == TEXTS
    assert hub.left_to_fail() == 0


def test_a_hub_that_keeps_failing_is_an_error_even_when_faults_are_skipped(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path, retries=1, on_error="skip", files_ahead=0)
    hub.fail("GET", "2.jsonl", status=500)
    with pytest.raises(HubError, match=r"Downloading 'data/2\.jsonl' from the Hub failed after 2 tries: .*HTTP 500"):
        _texts(source)
    assert source.skipped == ()


def test_reading_goes_on_from_the_cursor_after_the_hub_failed(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path, retries=0, files_ahead=0)
    hub.fail("GET", "2.jsonl", status=500, times=1)
    read: list[tuple[str, dict[str, Any]]] = []
    with pytest.raises(HubError, match="HTTP 500"):
        read.extend(source.read())  # keeps what came before the error
    read += list(source.read(read[-1][1]))
    assert [text for text, _ in read] == TEXTS


def test_a_download_that_arrives_damaged_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {**SHARDS, "plain.txt": b"text in git itself"})
    hub.corrupt("1.jsonl", times=1)
    hub.corrupt("plain.txt", times=1)
    assert _texts(_open(hub, tmp_path)) == TEXTS
    assert _texts(_open(hub, tmp_path, "hf://datasets/user/tiny/plain.txt")) == ["text in git itself"]


def test_a_file_that_keeps_arriving_damaged_is_refused_or_skipped(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    hub.corrupt("1.jsonl")
    with pytest.raises(DataError, match=r"data/1\.jsonl arrived damaged 2 times: size or hash"):
        _texts(_open(hub, tmp_path / "a", retries=1))
    source = _open(hub, tmp_path / "b", retries=1, on_error="skip")
    with pytest.warns(UserWarning, match="arrived damaged"):
        assert _texts(source) == TEXTS[:5] + TEXTS[10:]
    assert [(skipped.file, skipped.reason) for skipped in source.skipped] == [("data/1.jsonl", "damaged on arrival")]


def test_a_cached_file_that_was_changed_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    _texts(_open(hub, tmp_path))
    path = next(tmp_path.rglob("3.jsonl"))
    path.write_bytes(path.read_bytes().replace(b"shard3", b"shardX"))
    assert _texts(_open(hub, tmp_path)) == TEXTS


def test_a_file_removed_from_the_cache_while_reading_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path)
    for number, (text, _) in enumerate(source.read()):
        assert text == TEXTS[number]
        for path in tmp_path.rglob("*.jsonl"):
            if number % 5 == 1:
                path.unlink(missing_ok=True)


def test_two_readers_share_one_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path, cache_bytes=2 * SHARD_BYTES)
    fast, slow = source.read(), source.read()
    ahead = [next(fast)[0] for _ in range(12)]
    behind = [next(slow)[0] for _ in range(3)]
    assert [*ahead, *(text for text, _ in fast)] == [*behind, *(text for text, _ in slow)] == TEXTS


def test_a_broken_line_is_skipped_with_the_name_of_its_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {**SHARDS, "data/2.jsonl": b"{broken\n" + SHARDS["data/2.jsonl"], "data/9.jsonl": b""})
    with pytest.warns(UserWarning, match="is empty"):
        source = _open(hub, tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="not valid JSON"):
        assert _texts(source) == TEXTS
    assert [skipped.file for skipped in source.skipped] == ["data/2.jsonl", "data/9.jsonl"]
    with pytest.raises(DataError, match=r"data/9\.jsonl in 'user/tiny' is empty; leave it out"):
        _open(hub, tmp_path)


def test_a_source_can_go_to_another_process(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    source = _open(hub, tmp_path)
    _texts(source)
    assert _texts(pickle.loads(pickle.dumps(source))) == TEXTS


def test_the_position_of_a_file_that_changed_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    *_, (_, cursor) = _open(hub, tmp_path).read()
    hub.add(REPO, {**SHARDS, "data/4.jsonl": _lines("other", 3)})
    with pytest.raises(DataError, match=r"data/4\.jsonl had .* bytes when the position was saved and has .* now"):
        list(_open(hub, tmp_path).read(cursor))


@pytest.mark.parametrize(
    "address", ["hf://datasets/user", "hf://datasets/user/tiny", "hf://models/user/tiny/*.txt", "hf://user/tiny/a.txt"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(DataError, match=r"is not an address; it reads hf://datasets/USER/NAME\[@REVISION\]/PATTERN"):
        open_source(address)


def test_repositories_revisions_and_patterns_that_are_not_there_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    with pytest.raises(HubError, match="Listing the dataset 'user/absent' failed: no such repository"):
        _open(hub, tmp_path, "hf://datasets/user/absent/*.txt")
    with pytest.raises(HubError, match="at revision 'v9' failed: the repository has no such revision"):
        _open(hub, tmp_path, "hf://datasets/user/tiny@v9/*.txt")
    with pytest.raises(
        DataError, match=r"no file of the dataset 'user/tiny' matches '\*\.txt'; it has 5 files: data/0"
    ):
        _open(hub, tmp_path, "hf://datasets/user/tiny/*.txt")
    hub.add(REPO, {**SHARDS, "data/a.parquet": b"x"})
    with pytest.raises(DataError, match="must match files of one kind"):
        _open(hub, tmp_path, "hf://datasets/user/tiny/data/*")


def test_numbers_out_of_range_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, SHARDS)
    with pytest.raises(ConfigError, match=r"cache_bytes=100 has no room for data/0\.jsonl of"):
        _open(hub, tmp_path, cache_bytes=100)
    with pytest.raises(ConfigError, match="files_ahead=-1 is negative"):
        _open(hub, tmp_path, files_ahead=-1)
    with pytest.raises(ConfigError, match="retries=-1 is negative"):
        _open(hub, tmp_path, retries=-1)
