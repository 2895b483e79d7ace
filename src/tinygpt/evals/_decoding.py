"""Writing on from many prompts at once, until each has met a stop string."""

from collections.abc import Sequence

import torch

from tinygpt.evals._scoring import LogitsModel, device_of
from tinygpt.generate import sample_token
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer


def decode_until(
    model: LogitsModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    stop_tokens: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> list[str]:
    """Return the text after each prompt, cut before the first stop string or token; other special tokens are left out.

    All rows are at the same position at any time. They start with the length of the shortest prompt; a row whose
    prompt is longer is given its own tokens until that ends. So no row is padded, and one cache serves all.
    """
    stops = [text.encode() for text in until]
    special = {token for token, size in enumerate(tokenizer.token_bytes()) if not size}
    writers = [_Writer(tokenizer, stops, stop_tokens, special - stop_tokens, max_new_tokens) for _ in prompts]
    longest = max(map(len, prompts)) + max_new_tokens
    tokens = torch.tensor([list(prompt[: min(map(len, prompts))]) for prompt in prompts], device=device_of(model))
    cache = model.new_cache(len(prompts), max_seq_len=longest) if isinstance(model, GPT) else None
    unread = tokens
    while not all(writer.done for writer in writers):
        if isinstance(model, GPT):
            logits = model.head(model.hidden_states(unread, cache=cache)[:, -1])
        else:
            logits = model(tokens)[:, -1]
        drawn = sample_token(logits, temperature=temperature, top_k=top_k, top_p=top_p).tolist()
        position = tokens.shape[1]
        for row, (prompt, writer) in enumerate(zip(prompts, writers, strict=True)):
            if position < len(prompt):
                drawn[row] = prompt[position]
            else:
                writer.add(drawn[row])
        unread = torch.tensor(drawn, device=tokens.device)[:, None]
        tokens = torch.cat((tokens, unread), dim=1)
    return [writer.text for writer in writers]


class _Writer:
    """The text one row has written so far, and whether it is done."""

    def __init__(
        self, tokenizer: Tokenizer, until: Sequence[bytes], stop_tokens: frozenset[int], silent: set[int], left: int
    ) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._stop_tokens = stop_tokens
        self._silent = silent
        self._left = left
        self._content = b""
        self.done = left == 0

    def add(self, token: int) -> None:
        if self.done:
            return
        if token in self._stop_tokens:
            self.done = True
            return
        piece = b"" if token in self._silent else self._tokenizer.decode_bytes([token])
        before = len(self._content)
        self._content += piece
        # A stop string ends in the new piece, or it would have been found before.
        places = [self._content.find(stop, max(0, before - len(stop) + 1)) for stop in self._until]
        found = [place for place in places if place >= 0]
        if found:
            self._content = self._content[: min(found)]
        self._left -= 1
        self.done = bool(found) or self._left == 0

    @property
    def text(self) -> str:
        return self._content.decode("utf-8", errors="replace")
