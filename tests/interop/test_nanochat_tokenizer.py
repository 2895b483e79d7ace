"""The pickled tokenizer gives the same ids, and no pickle does anything."""

import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanochat_folder import PATTERN, encoding, write_tokenizer
from tinygpt.errors import DataError
from tinygpt.interop.nanochat import load_tokenizer_pickle
from tinygpt.tokenizer import BPETokenizer, load_tokenizer

PICKLED = pickle.dumps(encoding())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    return load_tokenizer_pickle(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@given(text=st.text("the w10 9\n\t.é鯨🐋'S", max_size=30))
def test_text_gets_the_ids_it_had(text: str, tokenizer: BPETokenizer) -> None:
    assert tokenizer.encode(text) == encoding().encode_ordinary(text)


def test_special_tokens_keep_their_ids(tokenizer: BPETokenizer) -> None:
    original = encoding()
    assert tokenizer.vocab_size == original.n_vocab
    for text, token_id in tokenizer.special_tokens.items():
        assert original.encode_single_token(text) == token_id


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_since_python_3_is_read(protocol: int, tokenizer: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    for content in (pickle.dumps(encoding(), protocol), pickletools.optimize(pickle.dumps(encoding(), protocol))):
        path.write_bytes(content)
        assert load_tokenizer_pickle(path).fingerprint() == tokenizer.fingerprint()


def test_it_is_saved_as_one_of_ours(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


class Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def with_state(**fields: Any) -> bytes:
    """A pickled encoding with other fields, which tiktoken itself need not accept."""
    marked = encoding()
    state = marked.__getstate__() | fields  # type: ignore[operator]
    marked.__class__ = type("Encoding", (), {"__module__": "tiktoken.core", "__getstate__": lambda self: state})
    real, tiktoken.core.Encoding = tiktoken.core.Encoding, marked.__class__  # type: ignore[misc]
    try:
        return pickle.dumps(marked)
    finally:
        tiktoken.core.Encoding = real  # type: ignore[misc]


def test_hostile_pickles_run_nothing(tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "tokenizer.pkl"
    hostile = [
        Calls(os.system, f"touch {touched}"),
        Calls(eval, f"open({str(touched)!r}, 'w')"),
        [encoding(), Calls(os.mkdir, str(touched))],
        Calls(tiktoken.Encoding, "x"),
        os.system,
    ]
    for value in hostile:
        for protocol in range(6):
            path.write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(DataError, match=r"the pickle (uses|asks for|is not)"):
                load_tokenizer_pickle(path)
    path.write_bytes(with_state(name=Calls(os.mkdir, str(touched))))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.mkdir; only tiktoken\.core\.Encoding is known"):
        load_tokenizer_pickle(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a pickle"),
        (b"hello", "not a pickle|uses"),
        (PICKLED[:-1], "not a pickle|does not end"),
        (PICKLED[:1000], "not a pickle"),
        (b"\x80\x04.", "not a pickle"),
        (b"\x80\x04}.", "is not that of a tiktoken.Encoding"),
        (b"\x80\x04}\x8c\x01ab.", "gives a state to something that is no encoding"),
        (b"\x80\x04})\x81.", "makes an object of arguments"),
        (b"\x80\x04})}s.", "fills something that is no dictionary of texts or bytes"),
        (b"\x80\x04}(\x8c\x01au.", "fills something that is no dictionary"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"cposix\nsystem\n.", "asks for posix.system"),
        (b"\x80\x04" + b"(" * 3_000_000 + b".", "more than 2,000,000 opcodes"),
        (b"\x80\x04" + b"}" + b"\x94" * 3_000_000 + b".", "more than 2,000,000 opcodes"),
        (b"\x80\x04" + b"]" * 10 + b".", "uses EMPTY_LIST"),
        (b"\x80\x04)" + b"2\x86" * 60 + b".", "uses DUP"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40), "not a pickle"),
        (b"\x80\x04B" + struct.pack("<I", 2**31), "not a pickle"),
        (b"\x80\x04}r\xff\xff\xff\x7f.", "is not that of a tiktoken.Encoding"),  # a memo of 2**31 places
    ],
)
def test_what_is_no_pickled_encoding_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer_pickle(path)


def test_dictionaries_that_hold_themselves_or_are_nested_deeply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(b"\x80\x04}\x94\x8c\x01ah\x00s" + b"}\x8c\x01b" * 100_000 + b"}" + b"s" * 100_000 + b".")
    with pytest.raises(DataError, match="is not that of"):
        load_tokenizer_pickle(path)


RANKS = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mergeable_ranks": {"a": 1}}, "must hold a pattern, ranks from bytes"),
        ({"mergeable_ranks": {b"a": "1"}}, "must hold a pattern, ranks from bytes"),
        ({"special_tokens": {b"a": 1}}, "special tokens from text to integers"),
        ({"pat_str": 3}, "must hold a pattern"),
        ({"extra": 3}, "not that of a tiktoken.Encoding, which holds name, pat_str"),
        ({"mergeable_ranks": {b"a": 0}}, "lack 255 of the 256 single bytes"),
        ({"special_tokens": {"<|bos|>": 300}}, "special tokens must take the ids after the 261 ranks"),
        ({"special_tokens": {"<|endoftext|>": 261}}, "special tokens must include"),
        ({"pat_str": "("}, "not a valid regular expression"),
        (
            {"mergeable_ranks": RANKS | {b"ab": 300}, "special_tokens": {"<|bos|>": 257}},
            "the 257 ranks must be 0 to 256",
        ),
    ],
)
def test_encodings_with_other_contents_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(with_state(**fields))
    with pytest.raises(DataError, match=message):
        load_tokenizer_pickle(path)


def test_an_encoding_by_name_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = RANKS
    named = tiktoken.Encoding("gpt9", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|bos|>": 256})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt9", named)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(named))
    with pytest.raises(DataError, match="names tiktoken's own encoding 'gpt9' and does not hold it"):
        load_tokenizer_pickle(path)


def test_missing_and_endless_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be read from"):
        load_tokenizer_pickle(tmp_path / "tokenizer.pkl")
    with (tmp_path / "tokenizer.pkl").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="larger than 33,554,432 bytes"):
        load_tokenizer_pickle(tmp_path / "tokenizer.pkl")
