import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import Cursor, TextDocuments, TextFiles, TokenizeProgress, TokenShards, tokenize_documents
from tinygpt.data import _tokenize as module
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import ByteTokenizer, EncoderPool, encode_array, train_bpe

TOKENIZER = ByteTokenizer()
TEXTS = [f"document {number} " + "with some text " * (number % 7) for number in range(120)]

# Slow enough to be killed in the middle; `Slow` has the fingerprint of the documents themselves.
CHILD = """
import sys, time
from tinygpt.data import TextDocuments, tokenize_documents
from tinygpt.data import _tokenize
from tinygpt.tokenizer import ByteTokenizer

class Slow(TextDocuments):
    def read(self, cursor=None):
        for item in super().read(cursor):
            time.sleep(0.01)
            yield item

if __name__ == "__main__":
    _tokenize._CHUNK_DOCUMENTS = 5
    texts = [f"document {number} " + "with some text " * (number % 7) for number in range(120)]
    tokenize_documents(Slow(texts), ByteTokenizer(), sys.argv[1], processes=int(sys.argv[2]), shard_tokens=500)
"""


def _files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path, processes: int) -> None:
    whole = tmp_path / "whole"
    tokenize_documents(TextDocuments(TEXTS), TOKENIZER, whole, processes=1, shard_tokens=500)
    (tmp_path / "child.py").write_text(CHILD)
    out = tmp_path / "out"
    kept: dict[Path, int] = {}
    for shard in (0, 4):
        child = subprocess.Popen([sys.executable, tmp_path / "child.py", out, str(processes)])
        deadline = time.monotonic() + 60
        while not (out / f"tokens-{shard:05d}.bin").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not (out / "manifest.json").exists()
        assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
        plan = module._Plan.from_json((out / "unfinished.json").read_text())
        kept = {path: path.stat().st_mtime_ns for i in range(len(plan.shards)) for path in module.shard_files(out, i)}
        assert len(plan.shards) >= shard
        with pytest.raises(DataError, match="holds no finished token shards"):
            TokenShards(out)
    tokenize_documents(TextDocuments(TEXTS), TOKENIZER, out, processes=1, shard_tokens=500)
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    assert _files(out) == _files(whole)


def test_processes_of_a_killed_run_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    child = subprocess.Popen([sys.executable, tmp_path / "child.py", tmp_path / "out", "2"], start_new_session=True)
    while not (tmp_path / "out" / "tokens-00000.bin").exists():
        assert child.poll() is None, "it ended before it wrote a shard"
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)  # no signal: asks whether the group has a process left
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("processes were left behind")


class Interrupted(TextDocuments):
    """Documents that cannot be read from one on."""

    broken_at: int

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        for text, behind in super().read(cursor):
            if behind["document"] > self.broken_at:
                raise DataError("the disk is gone")
            yield text, behind


@settings(max_examples=60)
@given(
    texts=st.lists(st.text("abc dé\n", max_size=30), min_size=1, max_size=25).map(lambda texts: [*texts, "end"]),
    shard_tokens=st.integers(1, 60),
    chunk=st.integers(1, 8),
    breaks=st.lists(st.integers(0, 25), max_size=3),
)
def test_interruptions_chunks_and_shard_sizes_never_change_a_document(
    texts: list[str], shard_tokens: int, chunk: int, breaks: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    whole = tokenize_documents(TextDocuments(texts), TOKENIZER, folder / "a", processes=1, shard_tokens=shard_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_DOCUMENTS", chunk)
        for broken_at in sorted(breaks):
            source = Interrupted(texts)
            source.broken_at = broken_at
            if broken_at < len(texts):
                with pytest.raises(DataError, match="the disk is gone"):
                    tokenize_documents(source, TOKENIZER, folder / "b", processes=1, shard_tokens=shard_tokens)
        tokenize_documents(TextDocuments(texts), TOKENIZER, folder / "b", processes=1, shard_tokens=shard_tokens)
    assert _files(folder / "a") == _files(folder / "b")
    assert [bytes(tokens.tolist()).decode() for tokens, _ in whole.read()] == texts


def test_several_processes_write_the_bytes_of_one_with_a_trained_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, vocab_size=300)
    source = TextDocuments([*TEXTS, "a special <|bos|> spelled out", "中文 😀"])
    one = tokenize_documents(source, tokenizer, tmp_path / "one", processes=1, shard_tokens=300)
    tokenize_documents(source, tokenizer, tmp_path / "two", processes=2, shard_tokens=300)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert [tokens.tolist() for tokens, _ in one.read()] == [tokenizer.encode(text) for text, _ in source.read()]
    assert one.num_bytes == sum(len(text.encode()) for text, _ in source.read())


def test_a_finished_folder_is_opened_and_left_as_it_is(tmp_path: Path) -> None:
    first = tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path / "out", processes=1)
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "out" / "tokens-00009.bin.1.tmp").write_text("left by a killed run")
    again = tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path / "out", processes=1)
    assert again.fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}.keys() == changed.keys()
    assert all(path.stat().st_mtime_ns == time for path, time in changed.items() if path.is_file())


def test_progress_counts_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 10)
    seen: list[TokenizeProgress] = []
    source = TextDocuments(TEXTS)
    shards = tokenize_documents(source, TOKENIZER, tmp_path / "a", processes=1, shard_tokens=900, progress=seen.append)
    assert [progress.documents for progress in seen] == list(range(10, 121, 10))
    assert seen[-1].tokens == seen[-1].utf8_bytes == seen[-1].new_bytes == shards.num_tokens
    assert seen[-1].shards == shards.num_shards - 1
    assert all(0 <= progress.shard_fraction < 1 for progress in seen)
    assert seen[-1].cursor == {"document": 120}


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_begun_with_something_else_is_refused(tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    source = Interrupted(TEXTS)
    source.broken_at = 1000 if finished else 50
    try:
        tokenize_documents(source, TOKENIZER, out, processes=1, shard_tokens=500)
    except DataError:
        assert not finished
    other = train_bpe(TEXTS, vocab_size=300)
    for arguments, message in [
        ((TextDocuments(TEXTS[1:]), TOKENIZER, 500), r"begun with source_fingerprint=\w{12} and this call has \w{12}"),
        ((TextDocuments(TEXTS), other, 500), r"begun with tokenizer_fingerprint=\w{12} and this call has \w{12}"),
        ((TextDocuments(TEXTS), TOKENIZER, 501), "begun with shard_tokens=500 and this call has 501; choose another"),
    ]:
        with pytest.raises(DataError, match=message):
            tokenize_documents(arguments[0], arguments[1], out, processes=1, shard_tokens=arguments[2])


def test_finished_shards_that_were_damaged_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 10)
    source = Interrupted(TEXTS)
    source.broken_at = 90
    with pytest.raises(DataError, match="the disk is gone"):
        tokenize_documents(source, TOKENIZER, tmp_path, processes=1, shard_tokens=500)
    (tmp_path / "tokens-00000.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"tokens-00000.bin was finished with [\d,]+ bytes and now has 2; remove"):
        tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path, processes=1, shard_tokens=500)
    (tmp_path / "unfinished.json").write_text("{")
    with pytest.raises(DataError, match=r"unfinished.json is damaged or from another version"):
        tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path, processes=1, shard_tokens=500)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds other files \(thesis.txt\); choose a new folder"):
        tokenize_documents(TextDocuments(TEXTS), TOKENIZER, tmp_path, processes=1)
    assert _files(tmp_path).keys() == {"thesis.txt"}


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three")

    def change(progress: TokenizeProgress) -> None:
        path.write_text("one two four!")

    with pytest.raises(DataError, match=r"the source changed while it was read; remove .*out and tokenize again"):
        tokenize_documents(TextFiles(path), TOKENIZER, tmp_path / "out", processes=1, progress=change)


def test_a_source_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document with a token in it"):
        tokenize_documents(TextDocuments(["", ""]), TOKENIZER, tmp_path / "out", processes=1)


@pytest.mark.parametrize("processes", [1, 2])
def test_text_without_a_utf8_form_is_refused(tmp_path: Path, processes: int) -> None:
    with pytest.raises(DataError, match=r"holds the surrogate U\+D800"):
        tokenize_documents(TextDocuments(["fine", "\ud800"]), TOKENIZER, tmp_path / "out", processes=processes)


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    source = TextDocuments(TEXTS)
    with pytest.raises(ConfigError, match="shard_tokens=0 is not positive"):
        tokenize_documents(source, TOKENIZER, tmp_path / "out", shard_tokens=0)
    with pytest.raises(ConfigError, match="processes='2' is a str, not a whole number"):
        tokenize_documents(source, TOKENIZER, tmp_path / "out", processes="2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="processes=0 is not positive; choose 1 or more, or None for one a core"):
        tokenize_documents(source, TOKENIZER, tmp_path / "out", processes=0)


def test_a_killed_process_of_the_pool_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    with EncoderPool(tmp_path, processes=2) as pool:
        assert len(list(pool.map([["one"], ["two"]]))) == 2
        assert pool._pool is not None
        for pid in pool._pool._processes:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(DataError, match="a process that tokenizes was killed, perhaps for lack of memory"):
            list(pool.map([["three"]] * 9))


@given(st.text())
def test_arrays_are_the_lists_of_ids(text: str) -> None:
    try:
        expected = TOKENIZER.encode(text)
    except DataError:
        with pytest.raises(DataError, match="holds the surrogate"):
            encode_array(TOKENIZER, text)
    else:
        assert encode_array(TOKENIZER, text).tolist() == expected
