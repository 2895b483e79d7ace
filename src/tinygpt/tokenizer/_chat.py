"""A conversation as token ids: who speaks is said by special tokens, which no text can spell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinygpt.errors import DataError
from tinygpt.tokenizer._base import Tokenizer

_MARKS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")


@dataclass(frozen=True)
class Message:
    """What one side of a conversation said.

    Attributes:
        role: `"system"` for what the model shall know or how it shall behave, `"user"`, or `"assistant"` for the model.
        content: The text.
    """

    role: Literal["system", "user", "assistant"]
    content: str


class ChatTemplate:
    """Turns a conversation into token ids: `<|bos|>`, then each message between the marks of who said it.

    What was said is encoded as plain text. A user who types `<|assistant_start|>` gets these characters and never the
    special token, so no message can pass for one of the other side.

    There are no marks for a system message: its text stands before the first user message, with an empty line
    between.

    Args:
        tokenizer: One with `<|user_start|>`, `<|user_end|>`, `<|assistant_start|>` and `<|assistant_end|>`.

    Attributes:
        stop_tokens: Ids that end an answer, for `GenerationConfig`: `<|assistant_end|>`, and what only stands
            outside an answer.

    Raises:
        DataError: If the tokenizer lacks a mark; `ChatTemplate.fits` asks before.

    References:
        The tokens and their order are those of [nanochat](https://github.com/karpathy/nanochat). Its marks of a Python
        tool are not used: nothing here runs what a model writes.

    Example:
        ```python
        from tinygpt.tokenizer import ChatTemplate, Message, train_bpe

        template = ChatTemplate(train_bpe(["a few words"], vocab_size=270))
        token_ids = template.render([Message("user", "Hello!")])
        ```
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = _special_tokens(tokenizer)
        absent = [mark for mark in _MARKS if mark not in special]
        if absent:
            raise DataError(
                f"this tokenizer has no {' '.join(absent)} and cannot write a conversation; let the model continue "
                "plain text, or train with a tokenizer that reserves them, as train_bpe does."
            )
        self._tokenizer = tokenizer
        self._user = special["<|user_start|>"], special["<|user_end|>"]
        self._assistant = special["<|assistant_start|>"], special["<|assistant_end|>"]
        self.stop_tokens = (self._assistant[1], tokenizer.bos_token_id, *self._user, self._assistant[0])

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Return whether a tokenizer has the marks. A model need not have been trained with them for all that."""
        return set(_MARKS) <= set(_special_tokens(tokenizer))

    def render(self, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
        """Return the token ids of a conversation.

        Args:
            messages: At most one system message, then user and assistant in turn, user first.
            reply: End with `<|assistant_start|>`, so that the model answers; the last message is then the user's.

        Raises:
            DataError: If there is no message, they are out of turn, or a text holds a surrogate.
        """
        system, turns = _split(messages)
        wrong = next((i for i, turn in enumerate(turns) if turn.role != ("user", "assistant")[i % 2]), None)
        if wrong is not None:
            raise DataError(
                f"message {wrong + len(messages) - len(turns) + 1} is of the {turns[wrong].role}, out of turn: a "
                "conversation is at most one system message, then user and assistant in turn, user first."
            )
        if not turns or (reply and turns[-1].role != "user"):
            raise DataError("a conversation that the model shall answer ends with a message of the user.")
        token_ids = [self._tokenizer.bos_token_id]
        for number, turn in enumerate(turns):
            text = f"{system.content}\n\n{turn.content}" if system is not None and number == 0 else turn.content
            start, end = self._user if turn.role == "user" else self._assistant
            token_ids += [start, *self._tokenizer.encode(text), end]
        return [*token_ids, self._assistant[0]] if reply else token_ids

    def newest(self, messages: Sequence[Message], max_tokens: int) -> list[Message]:
        """Return the conversation without as many of its oldest exchanges as it takes to fit.

        The system message stays, and the last message of the user. An exchange is dropped whole, question and answer.

        Args:
            messages: As for `render`, to be answered.
            max_tokens: Most ids that `render` may give.

        Raises:
            DataError: If what must stay is too long, or as in `render`.
        """
        system, turns = _split(messages)
        fixed = [] if system is None else [system]
        length = len(self.render(messages))
        while length > max_tokens:
            if len(turns) < 3:
                raise DataError(
                    f"the message takes {length} tokens and at most {max_tokens} fit beside the answer; shorten it."
                )
            turns = turns[2:]
            length = len(self.render([*fixed, *turns]))
        return [*fixed, *turns]


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of special tokens; a tokenizer of the user's own need not tell them."""
    return dict(getattr(tokenizer, "special_tokens", {}))


def _split(messages: Sequence[Message]) -> tuple[Message | None, list[Message]]:
    if messages and messages[0].role == "system":
        return messages[0], list(messages[1:])
    return None, list(messages)
