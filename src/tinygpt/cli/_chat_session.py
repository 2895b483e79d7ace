"""The state of a conversation: what was said, how answers are drawn, and what still fits the model's context."""

import json
from collections.abc import Iterator
from pathlib import Path

from tinygpt._disk import write_text
from tinygpt.errors import ConfigError, DataError, TinyGPTError
from tinygpt.generate import Engine, GenerationConfig
from tinygpt.model import GPT
from tinygpt.tokenizer import ChatTemplate, Message, Tokenizer


class Session:
    """A conversation; or, with a model that only continues text, one text after the other.

    Args:
        model: The model.
        tokenizer: The one it was trained with.
        config: How answers are drawn. With a seed, each answer takes the next one.
        chat: Converse, or continue text.
        system: What the model is told before the conversation.
        weights: Passed on to the engine.

    Attributes:
        messages: What was said. Of a model that continues text, what was typed and what it made of it.
        num_forgotten: Messages at the beginning that no longer fit when the last answer was written.

    Raises:
        ConfigError: If there is a system message and the model only continues text.
        DataError: If the tokenizer has no marks of a conversation and shall converse.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        *,
        chat: bool,
        system: str | None = None,
        weights: str | None = None,
    ) -> None:
        self._engine = Engine(
            model,
            tokenizer=tokenizer,
            num_slots=1,
            weights=weights,  # type: ignore[arg-type]
            keep_prefix=True,
        )
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if chat else None
        self.config = config
        self.messages: list[Message] = []
        self.num_forgotten = 0
        self._num_answers = 0
        self._system: str | None = None
        self.system = system

    @property
    def chat(self) -> bool:
        """Whether this is a conversation."""
        return self._template is not None

    @property
    def system(self) -> str | None:
        """What the model is told before the conversation."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not self.chat:
            raise ConfigError("a system message needs a model that was trained on conversations.")
        self._system = text

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a message, or what continues a text; an empty one continues the last.

        What was yielded is kept, also if the caller stops early; with nothing yielded it is as if nothing was asked.

        Raises:
            ConfigError: If the message is empty in a conversation, or there is no text to go on with.
            DataError: If the message alone is too long.
        """
        if self._template is not None:
            return self._converse(self._template, text)
        return self._continue(text)

    def retry(self) -> Iterator[str]:
        """Yield another answer to the last message, in place of the last one, which stays if nothing is yielded.

        Raises:
            ConfigError: If there is none.
        """
        if not self.messages:
            raise ConfigError("there is nothing to answer again.")
        before, question = self.messages, self.messages[-2].content
        self.messages = before[:-2]
        try:
            pieces = self.answer(question)
        except TinyGPTError:
            self.messages = before
            raise

        def written() -> Iterator[str]:
            try:
                yield from pieces
            finally:
                if len(self.messages) < len(before):
                    self.messages = before

        return written()

    def reset(self) -> None:
        """Forget what was said; options and system message stay."""
        self.messages = []
        self.num_forgotten = 0

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, in the form of the messages of OpenAI's API.

        Raises:
            DataError: If the file exists or cannot be written.
        """
        if path.exists():
            raise DataError(f"{path} exists; choose another name.")
        said = [{"role": message.role, "content": message.content} for message in self._with_system(self.messages)]
        try:
            write_text(path, json.dumps({"messages": said}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}; choose another name.") from None

    def load(self, path: Path) -> None:
        """Go on with a conversation that `save` wrote.

        Raises:
            DataError: If the file cannot be read or is no such conversation.
        """
        try:
            said = json.loads(path.read_text("utf-8"))["messages"]
            messages = [Message(message["role"], message["content"]) for message in said]
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(f"{path} is no conversation that /save wrote.") from None
        system = messages.pop(0).content if messages and messages[0].role == "system" else None
        roles = ["user", "assistant"] * (len(messages) // 2)
        if [message.role for message in messages] != roles or not all(
            isinstance(text, str) for text in (system or "", *(message.content for message in messages))
        ):
            raise DataError(f"{path} is no conversation that /save wrote: user and assistant must take turns.")
        self.system = system
        self.messages = messages
        self.num_forgotten = 0

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return messages if self.system is None else [Message("system", self.system), *messages]

    def _converse(self, template: ChatTemplate, text: str) -> Iterator[str]:
        if not text.strip():
            raise ConfigError("the message is empty.")
        context = self._engine.max_seq_len
        room = context - min(self.config.max_new_tokens, context // 2)  # an answer gets half of the context at least
        messages = self._with_system([*self.messages, Message("user", text)])
        kept = template.newest(messages, room)
        self.num_forgotten = len(messages) - len(kept)
        token_ids = template.render(kept)
        config = self.config.replace(
            max_new_tokens=min(self.config.max_new_tokens, context - len(token_ids)), stop_tokens=template.stop_tokens
        )
        return self._write(Message("user", text), "", token_ids, config)

    def _continue(self, text: str) -> Iterator[str]:
        so_far = ""
        if not text:
            if not self.messages:
                raise ConfigError("there is no text to go on with; type a beginning.")
            last, question = self.messages[-1], self.messages[-2]
            self.messages = self.messages[:-2]
            text, so_far = question.content, last.content
        token_ids = [self._tokenizer.bos_token_id, *self._tokenizer.encode(text + so_far)]
        return self._write(Message("user", text), so_far, token_ids, self.config.replace(overflow="slide"))

    def _write(self, question: Message, so_far: str, token_ids: list[int], config: GenerationConfig) -> Iterator[str]:
        if config.seed is not None:
            config = config.replace(seed=(config.seed + self._num_answers) % 2**63)
        self._num_answers += 1
        request_id = self._engine.add(token_ids, config)
        pieces = [so_far]

        def written() -> Iterator[str]:
            whole = False
            try:
                for event in self._engine.run():
                    if event.text:
                        pieces.append(event.text)
                        yield event.text
                whole = True
            finally:
                self._engine.cancel(request_id)
                if whole or any(pieces):
                    self.messages += [question, Message("assistant", "".join(pieces))]

        return written()
