"""How answers are written: whole or in chunks, for completions and for chats."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from tinygpt.generate import TokenEvent, TokenLogprobs
from tinygpt.tokenizer import Tokenizer


class _Shape:
    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def _whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}


class CompletionShape(_Shape):
    """The JSON of `/v1/completions`."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Return nothing: the first chunk is text."""
        return None

    def chunk(self, choice: int, event: TokenEvent, offset: int) -> dict[str, Any]:
        """Return what one step adds to a text; `offset` characters of it came before."""
        return self._chunk(self._choice(choice, [event], offset))

    def whole(self, texts: Sequence[Sequence[TokenEvent]], usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer in one piece."""
        return self._whole([self._choice(number, events, 0) for number, events in enumerate(texts)], usage)

    def _choice(self, index: int, events: Sequence[TokenEvent], offset: int) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        logprobs = self._logprobs(events, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}

    def _logprobs(self, events: Sequence[TokenEvent], offset: int) -> dict[str, Any] | None:
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, found in _drawn(events):
            token = _spelled(self._tokenizer, token_id)
            top = {_spelled(self._tokenizer, other): logprob for other, logprob in found.top}
            columns["tokens"].append(token)
            columns["token_logprobs"].append(found.logprob)
            columns["top_logprobs"].append({**top, token: found.logprob} if top else None)  # with the one drawn
            columns["text_offset"].append(offset)
            offset += len(self._tokenizer.decode([token_id]))
        return columns if columns["tokens"] else None


class ChatShape(_Shape):
    """The JSON of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Return who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": choice, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunk(self, choice: int, event: TokenEvent, offset: int) -> dict[str, Any]:
        """Return what one step adds to an answer."""
        delta = {"content": event.text} if event.text else {}
        return self._chunk(
            {
                "index": choice,
                "delta": delta,
                "logprobs": self._logprobs([event]),
                "finish_reason": event.finish_reason,
            }
        )

    def whole(self, texts: Sequence[Sequence[TokenEvent]], usage: dict[str, int]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = []
        for index, events in enumerate(texts):
            content = "".join(event.text for event in events)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": content, "refusal": None},
                    "logprobs": self._logprobs(events),
                    "finish_reason": events[-1].finish_reason,
                }
            )
        return self._whole(choices, usage)

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        entries = [
            {**self._entry(token_id, found.logprob), "top_logprobs": [self._entry(*other) for other in found.top]}
            for token_id, found in _drawn(events)
        ]
        return {"content": entries, "refusal": None} if entries else None

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.decode_bytes([token_id])
        return {"token": _spelled(self._tokenizer, token_id), "logprob": logprob, "bytes": list(data)}


Shape = CompletionShape | ChatShape


def usage_of(prompts: Sequence[Sequence[int]], num_new: int) -> dict[str, int]:
    """Return the numbers of tokens: each prompt once, however many texts continue it."""
    num_prompt = sum(map(len, prompts))
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


def _drawn(events: Sequence[TokenEvent]) -> list[tuple[int, TokenLogprobs]]:
    """Return the tokens that were drawn, with their probabilities where these were asked for."""
    return [(e.token_id, e.logprobs) for e in events if e.token_id is not None and e.logprobs is not None]


def _spelled(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return a token as text; one that is no whole characters as `bytes:\x..`, so that no two look alike."""
    data = tokenizer.decode_bytes([token_id])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
