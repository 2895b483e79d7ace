import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiktoken.load import load_tiktoken_bpe

from tinygpt.errors import DataError
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer


@pytest.fixture
def saved(bpe: BPETokenizer, tmp_path: Path) -> Path:
    bpe.save(tmp_path)
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _write_ranks(folder: Path, content: bytes) -> None:
    """Replace the ranks and their hash, as someone would who makes a file by hand."""
    (folder / "tokenizer.tiktoken").write_bytes(content)
    _edit(folder, ranks_sha256=hashlib.sha256(content).hexdigest())


def test_tiktoken_reads_the_ranks_file(saved: Path, bpe: BPETokenizer) -> None:
    ranks = load_tiktoken_bpe(str(saved / "tokenizer.tiktoken"))
    assert ranks == {bpe.decode_bytes([i]): i for i in range(bpe.bos_token_id)}


def test_saving_leaves_other_files_alone_and_no_temporary_ones(bpe: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    ByteTokenizer().save(tmp_path)
    bpe.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors",
        "tokenizer.tiktoken",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert load_tokenizer(tmp_path).fingerprint() == bpe.fingerprint()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.tiktoken"])
def test_an_absent_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DataError, match=rf"no tokenizer can be read from .*{name}: No such file"):
        load_tokenizer(saved)


@pytest.mark.parametrize(("name", "size"), [("tokenizer_config.json", 2 << 20), ("tokenizer.tiktoken", 65 << 20)])
def test_an_oversized_file_is_refused(saved: Path, name: str, size: int) -> None:
    with (saved / name).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(DataError, match=r"is larger than .* bytes and cannot be a tokenizer file"):
        load_tokenizer(saved)


def test_every_kind_of_damage_to_the_ranks_is_found_by_their_hash(saved: Path) -> None:
    path = saved / "tokenizer.tiktoken"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", content.replace(b"\n", b"\r\n"), content + b"IQ== 999\n"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"does not belong to tokenizer_config\.json or is damaged"):
            load_tokenizer(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", '{"kind": "bpe"}', "[" * 100_000])
def test_a_damaged_config_is_refused(saved: Path, text: str) -> None:
    (saved / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="damaged or from another version"):
        load_tokenizer(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "damaged or from another version"),
        ({"kind": "pickle"}, "damaged or from another version"),
        ({"surprise": 1}, "has no field 'surprise'"),
        ({"pattern": None}, "a bpe tokenizer needs pattern and ranks_sha256"),
        ({"pattern": "("}, "not a valid regular expression"),
        ({"special_tokens": {"<|bos|>": 5}}, "special tokens must take the ids after the"),
        ({"special_tokens": {}}, "special tokens must include"),
        ({"kind": "byte"}, "a byte tokenizer has"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    _edit(saved, **changes)
    with pytest.raises(DataError, match=message):
        load_tokenizer(saved)


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"IQ==\n", "line 1: expected 'base64 rank'"), (b"IQ== x\n", "line 1"), (b"?? 0\n", "line 1")],
)
def test_a_ranks_line_that_is_not_base64_and_a_number_is_refused(saved: Path, line: bytes, message: str) -> None:
    _write_ranks(saved, line)
    with pytest.raises(DataError, match=message):
        load_tokenizer(saved)


def test_a_token_that_comes_twice_is_refused(saved: Path) -> None:
    _write_ranks(saved, base64.b64encode(b"a") + b" 0\n" + base64.b64encode(b"a") + b" 1\n")
    with pytest.raises(DataError, match=r"line 2: .*the token comes twice"):
        load_tokenizer(saved)
