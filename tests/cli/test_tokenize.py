import subprocess
import sys
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.data import TokenShards
from tinygpt.tokenizer import ByteTokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    ByteTokenizer().save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_tokenize_writes_shards_and_says_what_it_wrote(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwo")
    arguments = ["tokenize", str(tmp_path / "text.txt"), str(tmp_path / "out"), "--tokenizer", tokenizer]
    arguments += ["--separator", r"\n\n", "--processes", "1", "--shard-tokens", "3"]
    assert main(arguments) == 0
    shards = TokenShards(tmp_path / "out")
    assert [bytes(shards.document(index).tolist()) for index in range(2)] == [b"one", b"two"]
    printed = capsys.readouterr()
    assert printed.out.endswith("out: 2 documents, 6 tokens in 2 shards, 1.00 bytes a token\n")
    assert "MB/s" in printed.err


def test_quiet_shows_no_progress(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    arguments = ["tokenize", str(tmp_path / "notes.jsonl"), str(tmp_path / "out"), "--tokenizer", tokenizer]
    assert main([*arguments, "--text-key", "body", "--processes", "1", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(TokenShards(tmp_path / "out")) == 2


def test_what_was_skipped_is_reported(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "one"}\nnot json\n{"text": "two"}\n')
    arguments = ["tokenize", str(tmp_path / "notes.jsonl"), str(tmp_path / "out"), "--tokenizer", tokenizer]
    with pytest.warns(UserWarning, match="line 2"):
        assert main([*arguments, "--on-error", "skip", "--processes", "1"]) == 0
    assert "skipped 1 in notes.jsonl" in capsys.readouterr().out


def test_an_error_is_one_line_and_status_2(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", str(tmp_path / "absent"), str(tmp_path / "out"), "--tokenizer", tokenizer]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'absent'} does not exist")


@pytest.mark.parametrize(
    ("out", "option", "message"),
    [
        ("file", [], "file is a file; choose a new folder."),
        ("new", ["--processes", "0"], "leave it out for one a core"),
    ],
)
def test_a_wrong_option_is_refused_before_a_folder_is_made(
    tmp_path: Path, tokenizer: str, out: str, option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["tokenize", "embedded", str(tmp_path / out), "--tokenizer", tokenizer, "--quiet", *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_book_that_comes_along_is_a_source_like_any_other(tmp_path: Path, tokenizer: str) -> None:
    out = tmp_path / "out"
    assert main(["tokenize", "embedded", str(out), "--tokenizer", tokenizer, "--processes", "1", "--quiet"]) == 0
    assert len(TokenShards(out)) == 124


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys; from tinygpt.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", script + "print('torch' in sys.modules, 'numpy' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tokenize" in done.stdout
    assert done.stdout.endswith("False False\n")


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    import tinygpt

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"tinygpt {tinygpt.__version__}\n"
