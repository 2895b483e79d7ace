"""The page in a headless Chromium: what a user sees and does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from chat_model import ANSWERS, chat_model
from chat_server import serving, slowed
from tinygpt import GPT

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")

IDLE = "!running && entry.value === ''"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def browser(profile: Path) -> Iterator[Browser]:
    with Browser(profile) as made:
        yield made


def say(browser: Browser, text: str) -> None:
    browser.run("entry.focus()")
    browser.type(text)
    browser.press("Enter", 13, "\r")


def careful(browser: Browser, url: str) -> None:
    """Open the page, and let it take the likeliest tokens."""
    browser.complaints.clear()
    browser.requested.clear()
    browser.open(url)
    browser.wait("model")
    browser.run("at('temperature').value = 0")


def texts(browser: Browser) -> list[str]:
    return list(browser.run("[...log.children].map(part => part.lastElementChild?.textContent ?? part.textContent)"))


def test_a_conversation(browser: Browser, url: str) -> None:
    careful(browser, url)
    assert browser.run("at('headline').textContent") == "Ask something"
    assert browser.run("at('send').disabled")
    said = []
    for question in ("What is the sea?", "Who are you?"):
        say(browser, question)
        browser.wait(IDLE)
        said += [question, ANSWERS[question]]
        assert texts(browser) == said
    assert browser.run("document.activeElement.id") == "entry"
    assert browser.complaints == []
    assert all(asked.startswith((url, "data:")) for asked in browser.requested)


def test_html_is_shown_and_not_obeyed(browser: Browser, url: str) -> None:
    careful(browser, url)
    say(browser, "<img src=x onerror='hurt=1'><script>hurt=1</script>")
    browser.wait(IDLE)
    assert texts(browser)[0].startswith("<img src=x")
    assert browser.run("log.querySelectorAll('img, script').length") == 0
    assert browser.run("window.hurt") is None
    assert browser.complaints == []


def test_too_long_a_conversation_loses_its_oldest_messages_and_says_so(browser: Browser, url: str) -> None:
    careful(browser, url)
    browser.run("at('max_tokens').value = 30")
    for _ in range(6):
        say(browser, "What is the sea?")
        browser.wait(IDLE)
    assert sum("oldest messages no longer fit" in text for text in texts(browser)) == 1
    assert texts(browser)[-1] == ANSWERS["What is the sea?"]
    assert browser.run("messages.length") < 12


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 568), (1280, 800)])
def test_nothing_sticks_out_at_any_width(browser: Browser, url: str, width: int, height: int, tmp_path: Path) -> None:
    careful(browser, url)
    browser.resize(width, height)
    say(browser, "x" * 80)
    browser.wait(IDLE)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.documentElement.scrollHeight") <= height
    assert browser.run("at('entry').getBoundingClientRect().bottom") <= height
    browser.run("at('settings').click()")
    box = browser.run("at('dialog').getBoundingClientRect().toJSON()")
    assert 0 <= box["left"] < box["right"] <= width
    assert 0 <= box["top"] < box["bottom"] <= height
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 3_000


def test_all_is_reached_by_keyboard_and_every_field_has_a_name(browser: Browser, url: str) -> None:
    careful(browser, url)
    browser.resize(1000, 700)
    unnamed = browser.run(
        "[...document.querySelectorAll('button, input, textarea')].filter(part => "
        "!part.textContent.trim() && !part.labels?.length && !part.ariaLabel).map(part => part.id)"
    )
    assert unnamed == []
    browser.run("at('reset').focus()")
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "settings"
    browser.press("Enter", 13, "\r")
    assert browser.run("at('dialog').open")
    browser.press("Escape", 27)
    assert not browser.run("at('dialog').open")


def test_an_answer_is_stopped_and_what_came_is_kept(browser: Browser) -> None:
    with serving(*slowed(0.1)) as url:
        careful(browser, url)
        for stop in ("at('stop').click()", None):
            say(browser, "Count")
            browser.wait("log.lastElementChild.lastElementChild.textContent.includes('two')")
            assert browser.run("at('stop').hidden") is False
            if stop:
                browser.run(stop)
            else:
                browser.press("Escape", 27)
            browser.wait("!running")
            assert ANSWERS["Count"].startswith(texts(browser)[-1])
            assert texts(browser)[-1] != ANSWERS["Count"]
        say(browser, "Count")
        browser.wait("running")
        browser.run("at('reset').click()")
        assert texts(browser) == []
        say(browser, "Hi")
        browser.wait(IDLE)
        assert texts(browser) == ["Hi", ANSWERS["Hi"]]


def test_the_page_asks_for_the_key(browser: Browser) -> None:
    with serving(*chat_model(), api_key="sesame") as url:
        browser.open(url)
        browser.wait("at('headline').textContent === 'This server asks for a key'")
        browser.run("at('settings').click(); at('key').value = 'sesame'; at('dialog').close()")
        browser.wait("model")
        browser.run("at('temperature').value = 0")
        say(browser, "Hi")
        browser.wait(IDLE)
        assert texts(browser) == ["Hi", ANSWERS["Hi"]]


def test_an_error_is_shown_and_the_message_may_be_sent_again(browser: Browser, url: str) -> None:
    careful(browser, url)
    say(browser, "far too long " * 40)
    browser.wait("log.querySelector('.error')")
    assert "exceed the 128 tokens" in texts(browser)[-1]
    assert browser.run("entry.value").startswith("far too long")


def test_a_model_of_plain_text_continues_it(browser: Browser) -> None:
    model, tokenizer = chat_model()
    with serving(GPT.from_config(model.config), tokenizer, chat=False) as url:  # type: ignore[arg-type]
        careful(browser, url)
        assert browser.run("at('headline').textContent") == "Write a beginning"
        browser.run("at('max_tokens').value = 20")
        say(browser, "Once upon")
        browser.wait(IDLE)
        first = texts(browser)
        assert len(first) == 1
        assert browser.run("log.querySelector('.given').textContent") == "Once upon"
        assert browser.run("at('send').textContent") == "Continue"
        browser.press("Enter", 13, "\r")
        browser.wait("!running")
        assert texts(browser)[0].startswith(first[0])
        assert len(texts(browser)[0]) > len(first[0])
