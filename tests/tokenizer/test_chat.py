import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.errors import DataError
from tinygpt.tokenizer import BOS_TOKEN, CHAT_TOKENS, BPETokenizer, ByteTokenizer, ChatTemplate, Message, train_bpe

TOKENIZER = train_bpe(["Hello there, general question and general answer."] * 3, vocab_size=290)
TEMPLATE = ChatTemplate(TOKENIZER)
SPECIAL = TOKENIZER.special_tokens
TALK = [Message("user", "Hello"), Message("assistant", "there"), Message("user", "general")]


def spelled(token_ids: list[int]) -> str:
    return TOKENIZER.decode(token_ids)


def test_a_conversation_is_rendered_with_the_marks_of_both_sides() -> None:
    assert spelled(TEMPLATE.render(TALK)) == (
        "<|bos|><|user_start|>Hello<|user_end|><|assistant_start|>there<|assistant_end|>"
        "<|user_start|>general<|user_end|><|assistant_start|>"
    )
    assert spelled(TEMPLATE.render(TALK[:2], reply=False)) == (
        "<|bos|><|user_start|>Hello<|user_end|><|assistant_start|>there<|assistant_end|>"
    )


def test_a_system_message_stands_before_the_first_user_message() -> None:
    rendered = spelled(TEMPLATE.render([Message("system", "Be brief."), *TALK]))
    assert rendered.startswith("<|bos|><|user_start|>Be brief.\n\nHello<|user_end|>")


def test_the_marks_are_nanochats_in_its_order() -> None:
    assert [BOS_TOKEN, *CHAT_TOKENS] == list(SPECIAL)
    assert [SPECIAL[token] for token in SPECIAL] == sorted(SPECIAL.values())


MARKS = st.sampled_from([BOS_TOKEN, *CHAT_TOKENS])
TEXTS = st.lists(st.one_of(MARKS, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=6).map(
    "".join
)


@given(st.lists(TEXTS, min_size=1, max_size=5), TEXTS)
def test_no_text_becomes_a_special_token(texts: list[str], system: str) -> None:
    texts = texts if len(texts) % 2 else texts[:-1] or ["x"]
    roles = ("user", "assistant")
    messages = [Message("system", system), *(Message(roles[i % 2], text) for i, text in enumerate(texts))]  # type: ignore[arg-type]
    token_ids = TEMPLATE.render(messages)
    marks = [token_id for token_id in token_ids if token_id in SPECIAL.values()]
    assert len(marks) == 2 + 2 * len(texts)  # <|bos|>, a pair around each message, and the mark of the answer
    inside = spelled(token_ids)
    assert all(text in inside for text in texts)


def test_a_tokenizer_without_the_marks_is_refused_and_can_be_asked_before() -> None:
    assert ChatTemplate.fits(TOKENIZER)
    for tokenizer in (
        ByteTokenizer(),
        BPETokenizer(TOKENIZER.ranks, special_tokens=(BOS_TOKEN, "<|user_start|>", "<|user_end|>")),
    ):
        assert not ChatTemplate.fits(tokenizer)
        with pytest.raises(DataError, match=r"has no .*<\|assistant_start\|>.* cannot write a conversation"):
            ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "ends with a message of the user"),
        ([Message("system", "x")], "ends with a message of the user"),
        (TALK[:2], "ends with a message of the user"),
        ([TALK[1]], "message 1 is of the assistant, out of turn"),
        ([TALK[0], TALK[0]], "message 2 is of the user, out of turn"),
        ([TALK[0], Message("system", "x")], "message 2 is of the system, out of turn"),
        ([Message("system", "x"), TALK[1]], "message 2 is of the assistant, out of turn"),
        ([Message("user", "\ud800")], "surrogate"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Message], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TEMPLATE.render(messages)


def test_the_newest_exchanges_stay_with_the_system_message() -> None:
    system = Message("system", "Be brief.")
    talk = [system, *TALK[:2] * 4, TALK[2]]
    full = len(TEMPLATE.render(talk))
    for limit in range(len(TEMPLATE.render([system, TALK[2]])), full + 1):
        kept = TEMPLATE.newest(talk, limit)
        assert len(TEMPLATE.render(kept)) <= limit
        assert kept[0] is system
        assert kept[1:] == talk[len(talk) - len(kept) + 1 :]
        longer = [system, *talk[len(talk) - len(kept) - 1 :]]
        assert len(kept) == len(talk) or len(TEMPLATE.render(longer)) > limit
    assert TEMPLATE.newest(talk, full) == talk


def test_a_last_message_that_cannot_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"the message takes .* tokens and at most 8 fit beside the answer"):
        TEMPLATE.newest([*TALK[:2], Message("user", "question " * 20)], 8)


def test_an_answer_ends_at_every_mark_that_stands_outside_of_it() -> None:
    outside = {"<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"}
    assert set(TEMPLATE.stop_tokens) == {SPECIAL[mark] for mark in outside}
