"""Vocabularies of tiktoken and tokenizers give the ids that those give, or are refused.

`data_files/tokenizer` was written by tokenizers 0.23.3: byte-level encodings of 330 entries trained on a few lines,
and the ids of some texts without special tokens.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public as published
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.errors import DataError
from tinygpt.tokenizer import (
    TIKTOKEN_PATTERNS,
    BPETokenizer,
    load_tiktoken,
    load_tokenizer,
    load_tokenizer_json,
    train_bpe,
)

SAVED = Path(__file__).parents[1] / "data_files" / "tokenizer"
NAMES = ["gpt2", "split"]
PARTS = "abst'’SſKß 12\n\r\t/鯨🐋é\u0301\u00a0"


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranks file of another vocabulary than ours, as tiktoken's are."""
    folder = tmp_path_factory.mktemp("tiktoken")
    train_bpe(["the whale, the ship; it's 1851, IT'S 12345"] * 3, vocab_size=285).save(folder)
    return folder / "tokenizer.tiktoken"


@pytest.mark.parametrize("name", TIKTOKEN_PATTERNS)
def test_the_patterns_are_those_that_tiktoken_publishes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *_, **__: {})
    assert getattr(published, name)()["pat_str"] == TIKTOKEN_PATTERNS[name]


@given(text=st.text(PARTS, max_size=40), name=st.sampled_from(sorted(TIKTOKEN_PATTERNS)))
def test_text_gets_the_ids_of_tiktoken(text: str, name: str, ranks_file: Path) -> None:
    tokenizer = load_tiktoken(ranks_file, pattern=name)
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.bos_token_id)}
    reference = tiktoken.Encoding(
        "x", pat_str=TIKTOKEN_PATTERNS[name], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    assert tokenizer.encode(text) == reference.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_pattern_is_known_by_the_name_of_the_file_or_given(ranks_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(ranks_file.read_bytes())
    by_name = load_tiktoken(path)
    assert by_name.fingerprint() == load_tiktoken(ranks_file, pattern="cl100k_base").fingerprint()
    assert by_name.fingerprint() != load_tiktoken(path, pattern=r"\s+|\S+").fingerprint()
    with pytest.raises(DataError, match=r"no pattern is known for a file named tokenizer\.tiktoken; give pattern, one"):
        load_tiktoken(ranks_file)


def test_it_is_saved_and_loaded_as_any_other(ranks_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tiktoken(ranks_file, pattern="o200k_base")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    assert list(tokenizer.special_tokens) == list(BPETokenizer({bytes([b]): b for b in range(256)}).special_tokens)


def test_what_is_no_ranks_file_is_refused(ranks_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.tiktoken: No such file"):
        load_tiktoken(tmp_path / "absent.tiktoken", pattern="cl100k_base")
    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(b"<html>not found</html>\n")
    with pytest.raises(DataError, match="line 1: expected 'base64 rank'"):
        load_tiktoken(path)
    lines = ranks_file.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:260] + lines[261:]))
    with pytest.raises(DataError, match="ranks must be 0 to"):
        load_tiktoken(path)


def _saved(name: str) -> tuple[dict[str, Any], list[tuple[str, list[int]]]]:
    content = json.loads((SAVED / f"{name}.json").read_text("utf-8"))
    return content["tokenizer"], content["encoded"]


def _load(fields: object, folder: Path) -> BPETokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    return load_tokenizer_json(folder)


@pytest.mark.parametrize("name", NAMES)
def test_text_gets_the_ids_of_tokenizers(name: str, tmp_path: Path) -> None:
    fields, encoded = _saved(name)
    tokenizer = _load(fields, tmp_path)
    for text, ids in encoded:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def test_special_tokens_keep_their_ids_and_ours_follow(tmp_path: Path) -> None:
    tokenizer = _load(_saved("gpt2")[0], tmp_path)
    assert tokenizer.special_tokens["<|endoftext|>"] == 330
    assert tokenizer.bos_token_id == 331
    assert 330 not in tokenizer.encode("<|endoftext|>")
    fields, _ = _saved("gpt2")
    fields["added_tokens"][0]["content"] = "<|bos|>"
    tokenizer = _load(fields, tmp_path)
    assert tokenizer.bos_token_id == 330


def test_merges_written_as_pairs_and_as_text_are_the_same(tmp_path: Path) -> None:
    fields, _ = _saved("split")
    before = _load(fields, tmp_path).fingerprint()
    assert all(isinstance(merge, list) for merge in fields["model"]["merges"])
    fields["model"]["merges"] = [" ".join(merge) for merge in fields["model"]["merges"]]
    assert _load(fields, tmp_path).fingerprint() == before


def _with(path: str, value: Any, name: str = "split") -> dict[str, Any]:
    """Return a saved tokenizer with one field changed."""
    fields = copy.deepcopy(_saved(name)[0])
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    place: Any = fields
    for key in parents:
        place = place[key]
    place[last] = value
    return fields


SPLIT = "pre_tokenizer/pretokenizers/0"
BYTES = "pre_tokenizer/pretokenizers/1"


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("normalizer", {"type": "NFC"}, "its normalizer NFC changes text"),
        ("pre_tokenizer", None, "it has no pre-tokenizer"),
        ("pre_tokenizer", {"type": "Metaspace"}, "its pre-tokenizer is Metaspace; ByteLevel, or Split then ByteLevel"),
        (f"{BYTES}/add_prefix_space", True, "adds a space before a text"),
        (f"{BYTES}/use_regex", True, "it cuts text twice"),
        (f"{SPLIT}/type", "Digits", "its pre-tokenizer is Digits then ByteLevel"),
        (f"{SPLIT}/behavior", "Removed", "its Split keeps pieces as 'Removed'"),
        (f"{SPLIT}/invert", True, "invert=True"),
        (f"{SPLIT}/pattern", {"String": " "}, "its Split is by a fixed text"),
        (f"{SPLIT}/pattern/Regex", r"\p{N}{1,3}+|\s+|\S+", r"its pattern has '\+\|"),
        (f"{SPLIT}/pattern/Regex", r"\s+$|\s+|\S+", r"its pattern has '\$\|"),
        (f"{SPLIT}/pattern/Regex", r"(?i:ss)|\s|\S", r"its pattern has '\(\?i:ss\)"),
        (f"{SPLIT}/pattern/Regex", r"\w+|\s|\S", r"its pattern has '\\\\w"),
        ("model/type", "WordPiece", "its model is WordPiece; only BPE maps"),
        ("model/dropout", 0.1, "its model has dropout=0.1"),
        ("model/byte_fallback", True, "its model has byte_fallback=True"),
        ("model/end_of_word_suffix", "</w>", "its model has end_of_word_suffix='</w>'"),
        ("added_tokens/0/special", False, r"its added tokens \['<\|endoftext\|>'\] are not special"),
        ("added_tokens/0/id", 400, "its ids must be 0 without gaps"),
    ],
)
def test_what_does_not_map_exactly_is_refused_with_the_reason(
    path: str, value: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"tokenizer.json cannot be mapped exactly: .*{reason}"):
        _load(_with(path, value), tmp_path)


def test_a_byte_level_without_any_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not cut text, so merges cross words"):
        _load(_with("pre_tokenizer/use_regex", False, "gpt2"), tmp_path)


def test_a_pattern_that_loses_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not match every character"):
        _load(_with(f"{SPLIT}/pattern/Regex", r"\p{L}+"), tmp_path)


def test_merges_that_ranks_cannot_stand_for_are_refused(tmp_path: Path) -> None:
    fields = _saved("gpt2")[0]
    merges, vocab = fields["model"]["merges"], fields["model"]["vocab"]

    def load(new_merges: list[list[str]], new_vocab: dict[str, int]) -> None:
        model = {**fields["model"], "merges": new_merges, "vocab": new_vocab}
        _load({**fields, "model": model, "added_tokens": []}, tmp_path)

    load(merges, vocab)
    with pytest.raises(DataError, match="the ids of its merges are not in the order of the merges"):
        load([merges[1], merges[0], *merges[2:]], vocab)
    with pytest.raises(DataError, match="which no merge makes"):
        load(merges[:-1], vocab)
    with pytest.raises(DataError, match=r"the result b'.*' of a merge is not in its vocabulary"):
        load([*merges, ["q", "q"]], vocab)
    with pytest.raises(DataError, match="holds '中', which stands for no byte"):
        load(merges, {**vocab, "中": len(vocab)})
    # "abc" is made of "ab" and "c", but "bc" comes first, so that those two are never neighbours.
    chain = [["b", "c"], ["a", "b"], ["ab", "c"]]
    letters = {token: rank for token, rank in vocab.items() if rank < 256}
    with pytest.raises(DataError, match="merging b'abc' by ranks does not end with b'ab' and b'c'"):
        load(chain, {**letters, "bc": 256, "ab": 257, "abc": 258})


def test_special_tokens_before_the_text_tokens_are_refused(tmp_path: Path) -> None:
    fields = _saved("gpt2")[0]
    vocab = {token: rank + 1 for token, rank in fields["model"]["vocab"].items()}
    fields["model"]["vocab"] = {"<|endoftext|>": 0, **vocab}
    fields["added_tokens"][0]["id"] = 0
    with pytest.raises(DataError, match="first those of text and then those of special tokens"):
        _load(fields, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', '{"model": 3}', "[" * 100_000])
def test_what_is_no_tokenizer_json_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json (is not|cannot be mapped)"):
        load_tokenizer_json(tmp_path / "tokenizer.json")


def test_an_absent_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file or directory; give a tokenizer\.json"):
        load_tokenizer_json(tmp_path)
