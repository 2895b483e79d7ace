"""What goes into the engine and what comes out of it."""

import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tinygpt.errors import ConfigError
from tinygpt.generate._config import GenerationConfig
from tinygpt.generate._text import TextStream

FinishReason = Literal["stop", "length"]
"""Why a text ended: at a stop token or string, or at `max_new_tokens`."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one position, of the model itself: before penalty, temperature and filters.

    Attributes:
        logprob: That of the token that was chosen.
        top: The most likely tokens and theirs, best first; as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """One step of one text.

    Attributes:
        request_id: What `Engine.add` returned.
        sample: Which of the request's texts, from 0.
        token_id: The new token; `None` where a stop token ended the text, and where no token was asked for.
        text: Text that became certain with it, `""` without a tokenizer. All of a text's pieces together are its text.
        logprobs: If asked for.
        finish_reason: `None` while the text goes on.
    """

    request_id: int
    sample: int
    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """A whole text.

    Attributes:
        token_ids: The new tokens. With a stop string they include the tokens that spelled it.
        text: Their text up to a stop string; `""` without a tokenizer.
        finish_reason: Why it ended.
        logprobs: One entry a token, if asked for.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None


@dataclass
class Request:
    """A prompt that waits for slots."""

    id: int
    prompt: list[int]
    config: GenerationConfig
    num_samples: int
    seed: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.seed = self.config.seed
        if self.seed is None and not self.config.greedy:
            self.seed = int(torch.randint(2**62, ()))


class Row:
    """A text being written.

    Args:
        request: Where it comes from.
        sample: Which of its texts.
        stop_tokens: Ids that end it.
        stream: Makes text of its tokens, if there is a tokenizer.
    """

    def __init__(self, request: Request, sample: int, stop_tokens: frozenset[int], stream: TextStream | None) -> None:
        self.request_id = request.id
        self.sample = sample
        self.config = request.config
        self.tokens = list(request.prompt)
        self.num_new = 0
        self.stop_tokens = stop_tokens
        self.stream = stream
        c = request.config
        self.options = (c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty)  # equal: chosen alike
        self._random = random.Random(None if request.seed is None else request.seed + sample)

    def draw(self) -> float:
        """Return this row's next random number in [0, 1); whoever else is in the batch has no part in it."""
        return 0.0 if self.config.greedy else self._random.random()

    @property
    def remaining(self) -> int:
        """Tokens it may still write."""
        return self.config.max_new_tokens - self.num_new

    def event(
        self,
        token_id: int | None = None,
        text: str = "",
        logprobs: TokenLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> TokenEvent:
        """Return an event of this row."""
        return TokenEvent(self.request_id, self.sample, token_id, text, logprobs, finish_reason)

    def take(self, token: int, data: bytes | None, logprobs: TokenLogprobs | None) -> TokenEvent:
        """Add a chosen token, given with its bytes if there is a tokenizer, and return what came of it."""
        if token in self.stop_tokens:
            return self.event(text=self._rest(), finish_reason="stop")
        self.tokens.append(token)
        self.num_new += 1
        text = "" if self.stream is None or data is None else self.stream.push(data)
        reason: FinishReason | None = None
        if self.stream is not None and self.stream.stopped:
            reason = "stop"
        elif not self.remaining:
            text += self._rest()
            reason = "length"
        return self.event(token, text, logprobs, reason)

    def _rest(self) -> str:
        return "" if self.stream is None else self.stream.finish()


def check_prompt(token_ids: Sequence[int], vocab_size: int | None) -> list[int]:
    """Return a prompt as a list of ids.

    Raises:
        ConfigError: If it is empty, text, or holds anything but ids of the vocabulary.
    """
    if isinstance(token_ids, str | bytes):
        raise ConfigError(
            "the prompt is text; give token ids, or use stream_text(model, tokenizer, prompt) or an Engine with a "
            "tokenizer."
        )
    try:
        ids = [operator.index(token) for token in token_ids]
    except TypeError:
        raise ConfigError(f"a prompt is a sequence of token ids, whole numbers, not {token_ids!r:.80}.") from None
    if not ids:
        raise ConfigError("the prompt is empty: give at least one token, usually the tokenizer's bos_token_id.")
    if min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ConfigError(f"token id {wrong} of the prompt lies outside the vocabulary of {vocab_size}.")
    return ids


def check_length(num_tokens: int, config: GenerationConfig, context: int) -> None:
    """Refuse a request that does not fit and must not slide.

    Raises:
        ConfigError: If it is too long, or the context too short to slide in.
    """
    if num_tokens + config.max_new_tokens <= context:
        return
    if config.overflow == "error":
        raise ConfigError(
            f"{num_tokens} prompt tokens and {config.max_new_tokens} new ones exceed the model's context of {context}; "
            f"ask for at most {max(0, context - num_tokens)}, shorten the prompt, or pass overflow='slide'."
        )
    if context < 4:
        raise ConfigError(f"a context of {context} is too short to slide in; 4 is the least.")


def slid(tokens: list[int], remaining: int, context: int) -> list[int]:
    """Return what stays of a text too long for the context: the first token, and the newest that make sense to keep."""
    keep = max(context // 2, context - remaining)
    return tokens if len(tokens) <= keep else [tokens[0], *tokens[len(tokens) - keep + 1 :]]
