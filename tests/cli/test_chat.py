"""`tinygpt chat`, from a pipe and with the keys of a terminal."""

import copy
import io
import json
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chat_model import ANSWERS, chat_model, save_chat_model
from tinygpt import GPT
from tinygpt.cli import main
from tinygpt.cli._chat_commands import converse
from tinygpt.cli._chat_session import Session
from tinygpt.cli._chat_terminal import Terminal
from tinygpt.errors import DataError
from tinygpt.generate import GenerationConfig, stream_text
from tinygpt.tokenizer import Message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was not trained on conversations, nor on anything."""
    model, tokenizer = chat_model()
    path = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    GPT.from_config(model.config).save_pretrained(path)  # type: ignore[arg-type]
    tokenizer.save(path)
    return path


class Talk:
    """Runs the command on lines of standard input and gives what it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, typed: str = "") -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        status = main(["chat", *arguments])
        out, err = self._capsys.readouterr()
        return status, out, err


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    return Talk(monkeypatch, capsys)


def greedy(**options: Any) -> Session:
    return Session(*chat_model(), GenerationConfig(temperature=0, max_new_tokens=40), chat=True, **options)


def test_one_prompt_writes_its_answer_and_nothing_else(talk: Talk, folder: Path) -> None:
    assert talk(str(folder), "-p", "Who are you?", "--temperature", "0") == (0, f"{ANSWERS['Who are you?']}\n", "")
    assert talk(str(folder), "-p", "-", "--temperature", "0", typed="Count\n") == (0, f"{ANSWERS['Count']}\n", "")


def test_each_line_of_a_pipe_is_answered_with_what_was_said_before(talk: Talk, folder: Path) -> None:
    status, out, err = talk(str(folder), "--temperature", "0", typed="Hi\n\nWho are you?\n/quit\nCount\n")
    assert status == 0
    assert out == f"{ANSWERS['Hi']}\n{ANSWERS['Who are you?']}\n"
    assert "was trained on conversations" in err
    assert "\x1b" not in out + err


def test_a_model_of_plain_text_continues_what_is_typed(talk: Talk, plain: Path) -> None:
    options = ["--temperature", "0.9", "--top-k", "0", "--seed", "3", "-n", "8"]
    status, out, err = talk(str(plain), *options, typed="Once\n")
    assert "This model continues text" in err
    model, tokenizer = GPT.from_pretrained(plain), chat_model()[1]
    pieces = stream_text(model, tokenizer, "Once", max_new_tokens=8, temperature=0.9, seed=3)
    assert out == "".join(pieces) + "\n"
    assert talk(str(plain), *options, "-p", "Once")[:2] == (0, out)
    assert status == 0


def test_an_empty_line_lets_a_text_go_on_and_the_context_slides(talk: Talk, plain: Path) -> None:
    typed = "\nOnce\n" + "\n" * 4
    status, out, err = talk(str(plain), "-n", "40", "--seed", "1", typed=typed)
    assert status == 0
    assert "there is no text to go on with" in err
    assert len(out) > 60


def test_the_mode_can_be_forced(talk: Talk, folder: Path, plain: Path) -> None:
    assert "This model continues text" in talk(str(folder), "--completion")[2]
    assert "was trained on conversations" in talk(str(plain), "--chat")[2]


def test_commands_change_how_answers_are_drawn(talk: Talk, folder: Path) -> None:
    typed = "/temperature\n/temperature 0\n/top-k off\n/top-p 0.5\n/max-new-tokens 3\n/seed 7\n/seed\nCount\n"
    _, out, err = talk(str(folder), typed=typed)
    assert out == "One\n" or ANSWERS["Count"].startswith(out.rstrip("\n"))
    for line in ("temperature: 0.8", "temperature: 0.0", "top-k: off", "top-p: 0.5", "max-new-tokens: 3", "seed: 7"):
        assert line in err.splitlines()


WRONG = {
    "/temprature 1": "there is no /temprature; did you mean temperature?",
    "/temp 1": "there is no /temp; did you mean temperature?",
    "/save absent/talk.json": "absent/talk.json cannot be written: No such file or directory; choose another name.",
    "/temperature x": "/temperature takes a number or off, not 'x'",
    "/temperature -1": "GenerationConfig.temperature=-1.0",
    "/top-p 2": "GenerationConfig.top_p=2.0",
    "/max-new-tokens off": "GenerationConfig.max_new_tokens=None",
    "/retry": "there is nothing to answer again",
    "/save": "/save needs a file",
    "/load": "/load needs a file",
    "/load no-such-file": "no-such-file cannot be read",
    "/load wrong.json": "wrong.json is no conversation that /save wrote",
    "/load turns.json": "user and assistant must take turns",
    "far too long " * 60: "shorten it",
}


@pytest.mark.parametrize(("typed", "message"), WRONG.items(), ids=[text[:20] for text in WRONG])
def test_mistakes_are_told_and_the_chat_goes_on(
    talk: Talk, folder: Path, typed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text('{"messages": [1]}')
    Path("turns.json").write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    status, out, err = talk(str(folder), "--temperature", "0", typed=f"{typed}\nHi\n")
    assert status == 0
    assert f"error: {message}" in err or (message in err and "error: " in err)
    assert out == f"{ANSWERS['Hi']}\n"


def test_a_conversation_is_saved_and_gone_on_with(talk: Talk, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    typed = f"/system Be brief.\nHi\n/save {file}\n/save {file}\n"
    _, _, err = talk(str(folder), "--temperature", "0", typed=typed)
    assert f"{file} exists; choose another name" in err
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", ANSWERS["Hi"])]
    assert json.loads(file.read_text())["messages"] == [{"role": role, "content": text} for role, text in said]
    _, out, err = talk(str(folder), "--temperature", "0", typed=f"/load {file}\n/system\n/retry\n")
    assert "2 messages loaded" in err
    assert "system: Be brief." in err
    assert out == f"{ANSWERS['Hi']}\n"


def test_lines_between_quotation_marks_are_one_message_and_two_slashes_send_one() -> None:
    session = greedy()
    for text in session.answer("/one\ntwo"):
        assert text
    typed = io.StringIO('"""\n/one\ntwo\n"""\n//x\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", typed)
        again = greedy()
        converse(again, Terminal())
    assert [message.content for message in again.messages[::2]] == ["/one\ntwo", "/x"]
    assert again.messages[1] == session.messages[1]


def test_a_seed_repeats_the_conversation_and_each_answer_takes_the_next() -> None:
    def answers() -> list[str]:
        config = GenerationConfig(temperature=3.0, max_new_tokens=8, seed=5)
        session = Session(*chat_model(), config, chat=True)
        first = ["".join(session.answer("Hi"))]
        return [*first, "".join(session.retry()), "".join(session.retry())]

    first, second = answers(), answers()
    assert first == second
    assert len(set(first)) == 3


def test_the_oldest_messages_are_left_out_when_they_no_longer_fit(talk: Talk, folder: Path) -> None:
    _, out, err = talk(str(folder), "--temperature", "0", "-n", "40", typed="What is the sea?\n" * 6)
    assert out == f"{ANSWERS['What is the sea?']}\n" * 6
    assert err.count("the oldest messages no longer fit") == 1
    session = greedy(system="Be brief.")
    for _ in range(6):
        list(session.answer("What is the sea?"))
    assert len(session.messages) == 12
    assert session.num_forgotten > 0
    session.reset()
    assert (session.messages, session.num_forgotten) == ([], 0)


def test_a_system_message_needs_a_model_that_converses(talk: Talk, plain: Path) -> None:
    status, _, err = talk(str(plain), "--system", "x", "-p", "y")
    assert status == 2
    assert err == "error: a system message needs a model that was trained on conversations.\n"


def test_an_empty_prompt_is_refused(talk: Talk, folder: Path) -> None:
    assert talk(str(folder), "-p", "  ")[2].startswith("error: the prompt is empty")
    assert talk(str(folder), "-p", "-", typed="")[2].startswith("error: the prompt is empty")


def test_a_turn_reads_what_is_new_and_answers_as_if_all_were_read() -> None:
    model, tokenizer = chat_model()
    session, read = greedy(), []

    def first_read(answer: Iterator[str]) -> int:
        """Return how many tokens were read before the answer began."""
        read.clear()
        pieces = list(answer)
        assert "".join(pieces) == ANSWERS[session.messages[-2].content]
        return sum(read) - (len(read) - 1)

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    marks = 3  # around what the user says, and before the answer
    handle = model.embedding.register_forward_pre_hook(lambda _, ids: read.append(ids[0].shape[1]))
    try:
        assert first_read(session.answer("Count")) == 1 + tokens("Count") + marks
        # The mark at which the last answer ended is new: it was drawn and not read.
        assert first_read(session.answer("Who are you?")) == 1 + tokens("Who are you?") + marks
        session.config = session.config.replace(top_k=2)
        assert first_read(session.retry()) == 1
        assert first_read(session.answer("Hi")) == 1 + tokens("Hi") + marks
        next(stopped := session.answer("Count"))
        stopped.close()  # type: ignore[attr-defined]
        assert session.messages[-1] == Message("assistant", ANSWERS["Count"][: len(session.messages[-1].content)])
        session.reset()
        assert first_read(session.answer("Good bye")) == tokens("Good bye") + marks - 1  # all begin with two marks
    finally:
        handle.remove()


class Interrupted(torch.nn.Module):
    """Sends the signal of Ctrl-C when it is asked for the n-th time."""

    def __init__(self, part: torch.nn.Module, at: int) -> None:
        super().__init__()
        self.part = part
        self.left = at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.part(x)


@pytest.mark.parametrize("at", [1, 5])
def test_ctrl_c_stops_an_answer_and_not_the_chat(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = chat_model()
    model = copy.deepcopy(model)
    model.blocks[0].mlp = Interrupted(model.blocks[0].mlp, at)
    session = Session(model, tokenizer, GenerationConfig(temperature=0, max_new_tokens=40), chat=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("Count\nHi\n"))
    converse(session, Terminal())
    out, err = capsys.readouterr()
    cut, answer, _ = out.split("\n")
    assert ANSWERS["Count"].startswith(cut)
    assert bool(cut) == (at > 1)
    assert answer == ANSWERS["Hi"]
    assert "(stopped)" in err
    kept = [Message("user", "Count"), Message("assistant", cut)] if cut else []
    assert session.messages == [*kept, Message("user", "Hi"), Message("assistant", ANSWERS["Hi"])]


def test_keys_of_a_terminal_edit_recall_and_break_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from tinygpt.cli._chat_terminal import _reader

    history = tmp_path / "history"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = _reader(str(history))
        keys.send_text("Hello worlx\x7fd\r")
        assert read("> ") == "Hello world"
        keys.send_text("\x1b[A!\r")  # up
        assert read("> ") == "Hello world!"
        keys.send_text("one\x1b\rtwo\r")  # Esc Enter
        assert read("> ") == "one\ntwo"
        keys.send_text("\x1b[200~pasted\nlines\x1b[201~\r")
        assert read("> ") == "pasted\nlines"
        keys.send_text("dropped\x03")
        with pytest.raises(KeyboardInterrupt):
            read("> ")
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read("> ")
    assert "Hello world!" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) & 0o077 == 0


def test_without_prompt_toolkit_pythons_own_line_editing_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tinygpt.cli._chat_terminal import _reader

    monkeypatch.setitem(__import__("sys").modules, "prompt_toolkit", None)
    assert _reader(None) is input
    monkeypatch.setattr("builtins.input", lambda prompt: f"typed at {prompt}")
    read = _reader(str(tmp_path / "history"))
    assert read("> ") == "typed at > "
    assert (tmp_path / "history").exists()


def test_another_answer_that_is_stopped_before_its_first_word_leaves_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = chat_model()
    model = copy.deepcopy(model)
    session = Session(model, tokenizer, GenerationConfig(temperature=0, max_new_tokens=40), chat=True)
    said = ["".join(session.answer(text)) for text in ("Hi", "Count")]
    before = [Message("user", "Hi"), Message("assistant", said[0])]
    before += [Message("user", "Count"), Message("assistant", said[1])]
    model.blocks[0].mlp = Interrupted(model.blocks[0].mlp, 1)
    monkeypatch.setattr("sys.stdin", io.StringIO("/retry\n"))
    converse(session, Terminal())
    assert session.messages == before
    session.system = "word " * 400
    with pytest.raises(DataError, match="at most 88 fit beside the answer"):
        session.retry()
    assert session.messages == before
