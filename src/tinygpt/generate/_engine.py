"""Many texts at once: requests come and go while the others go on."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.generate._config import GenerationConfig
from tinygpt.generate._readers import CachedReader, KeepingReader, Reader, UncachedReader
from tinygpt.generate._requests import Request, Row, TokenEvent, TokenLogprobs, check_length, check_prompt, slid
from tinygpt.generate._sampling import choose, log_probabilities, where_float64_is
from tinygpt.generate._text import TextStream
from tinygpt.generate._weights import Weights, needs_no_compiler, reading_copy
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer


class Engine:
    """Writes several texts at once; each step reads and draws one token of every text.

    A request waits until as many slots are free as it wants samples, is read once for all of them, and then goes
    along with the others. Requests are served in the order in which they came. All memory that texts take is
    there from the start: `cache_bytes`.

    A text depends on its own prompt, options and seed, and not on its neighbours, with one limit: products of a batch
    and of a row alone may differ in their last bits, so where two tokens are as good as equally likely, or a draw falls
    on the very edge between two, another one may be taken. Log-probabilities agree to about five digits.

    An engine belongs to one thread.

    Args:
        model: The model; left in the mode in which it is, and used as it is at each step unless `weights` is given.
        tokenizer: The one it was trained with: prompts may then be text, events carry text, only its ids are
            drawn, and stop strings work.
        num_slots: Texts at a time.
        max_seq_len: Longest text, prompt included; `None` for as long as the model takes.
        weights: Read a copy of the matrices, see `reading_copy`; `None` reads the model's own.
        compile: Compile the decoding of a step at one fixed shape, as suits a GPU: every step then computes all
            slots, and the first one waits for the compiler.
        use_cache: Keep keys and values of what was read; `False` reads every text from its start for each token.
        keep_prefix: Keep them when a text has ended, too, and read of the next prompt only what follows the beginning
            that both share, as in a conversation. Where a layer's window has let go of positions, a prompt must begin
            with all that was read, or is read whole. For one slot, and weights that do not change. What is read in
            other pieces is rounded differently, so that a text may then depend on what was read before.

    Raises:
        ConfigError: If an option is out of range, or the tokenizer has more ids than the model.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.generate import Engine, GenerationConfig
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        engine = Engine(model, tokenizer=ByteTokenizer(), num_slots=4)
        first = engine.add("Once", GenerationConfig(max_new_tokens=8, seed=0))
        second = engine.add("Twice", GenerationConfig(max_new_tokens=4, temperature=0), num_samples=2)
        texts = {}
        while engine.has_work:
            for event in engine.step():
                key = event.request_id, event.sample
                texts[key] = texts.get(key, "") + event.text
        ```
    """

    def __init__(
        self,
        model: GPT,
        *,
        tokenizer: Tokenizer | None = None,
        num_slots: int = 8,
        max_seq_len: int | None = None,
        weights: Weights | None = None,
        compile: bool = False,
        use_cache: bool = True,
        keep_prefix: bool = False,
    ) -> None:
        length = model.max_seq_len if max_seq_len is None else max_seq_len
        if length is None:
            raise ConfigError("this GPT has no config: give the engine the max_seq_len that its parts take.")
        if num_slots < 1 or length < 1 or (model.max_seq_len is not None and length > model.max_seq_len):
            raise ConfigError(
                f"an engine needs at least one slot and a length of 1 to {model.max_seq_len}; "
                f"got num_slots={num_slots} and max_seq_len={length}."
            )
        if compile and not use_cache:
            raise ConfigError("compile=True needs the cache, whose shapes do not change; drop use_cache=False.")
        if keep_prefix and (num_slots != 1 or not use_cache):
            raise ConfigError(
                "keep_prefix=True goes on from the cache of the one text before: give num_slots=1 and use_cache=True, "
                f"not {num_slots=} and {use_cache=}."
            )
        if compile and needs_no_compiler(model):
            raise ConfigError(
                "this copy's matrices lie in a layout that the compiler does not know: give the model itself and "
                "weights=..., or make the copy with for_compiler=True."
            )
        vocab_size = model.vocab_size
        if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocab_size={vocab_size}: use "
                "the tokenizer the model was trained with."
            )
        self._model = model if weights is None else reading_copy(model, weights, for_compiler=compile)
        self._tokenizer = tokenizer
        self.num_slots = num_slots
        self.max_seq_len = length
        self._reader: Reader
        if keep_prefix:
            self._reader = KeepingReader(self._model, length, compiled=compile)
        elif use_cache:
            self._reader = CachedReader(self._model, num_slots, length, compiled=compile)
        else:
            self._reader = UncachedReader(self._model, num_slots, length)
        self._rows: list[Row] = []  # row i lies in slot i
        self._waiting: deque[Request] = deque()
        self._next_id = 0
        self._seen: Tensor | None = None  # (num_slots, vocab): what a repetition penalty is for

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values, which does not grow."""
        return self._reader.nbytes

    @property
    def num_active(self) -> int:
        """Texts being written."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for slots."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._rows or self._waiting)

    def add(self, prompt: str | Sequence[int], config: GenerationConfig | None = None, *, num_samples: int = 1) -> int:
        """Ask for one text, or several that continue one prompt.

        Args:
            prompt: Token ids, at least one, as a rule with `<|bos|>` first; or, with a tokenizer, text, before which
                `<|bos|>` is put.
            config: The options; `None` for all defaults.
            num_samples: How many texts, not more than there are slots. The prompt is read once.

        Returns:
            The id that the events of this request carry.

        Raises:
            ConfigError: If the prompt is empty, too long or holds a wrong id, or the options do not suit the engine.
        """
        config = GenerationConfig() if config is None else config
        if not isinstance(config, GenerationConfig):
            raise ConfigError(f"options of a request are a GenerationConfig, not {config!r:.80}.")
        if not 1 <= num_samples <= self.num_slots:
            raise ConfigError(f"num_samples={num_samples} must lie between 1 and the engine's {self.num_slots} slots.")
        if self._tokenizer is not None and isinstance(prompt, str):
            prompt = [self._tokenizer.bos_token_id, *self._tokenizer.encode(prompt)]
        if self._tokenizer is None and config.stop_strings:
            raise ConfigError("stop_strings need an engine with a tokenizer; without one use stop_tokens.")
        token_ids = check_prompt(prompt, self._model.vocab_size)  # type: ignore[arg-type]
        check_length(len(token_ids), config, self.max_seq_len)
        request = Request(self._next_id, token_ids, config, num_samples)
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its slots, without an event; return whether it was there."""
        waiting = [request for request in self._waiting if request.id == request_id]
        for request in waiting:
            self._waiting.remove(request)
        slots = [slot for slot, row in enumerate(self._rows) if row.request_id == request_id]
        with torch.inference_mode():
            self._free(slots)
        return bool(waiting or slots)

    def step(self) -> list[TokenEvent]:
        """Draw one token of every text, begin waiting requests for which there is room, and return what happened.

        Whatever ends a step early, an error in the model or Ctrl-C, also ends the texts that were being written, as
        they may have been read halfway. Requests that wait stay, and the engine can go on.

        Raises:
            NonFiniteError: If the model gives logits that are not finite.
        """
        try:
            with torch.inference_mode(), _evaluating(self._model):
                events = self._decode() if self._rows else []
                while self._waiting and self._waiting[0].num_samples <= self.num_slots - len(self._rows):
                    events += self._begin(self._waiting.popleft())
        except BaseException:
            self._rows.clear()
            raise
        return events

    def run(self) -> Iterator[TokenEvent]:
        """Yield the events of all steps until nothing is left to do."""
        while self.has_work:
            yield from self.step()

    def _begin(self, request: Request) -> list[TokenEvent]:
        rows = [self._new_row(request, sample) for sample in range(request.num_samples)]
        if not request.config.max_new_tokens:
            return [row.event(finish_reason="length") for row in rows]
        first = len(self._rows)
        logits = where_float64_is(self._reader.prefill(first, self._fitting(request.prompt, rows[0])))
        for slot in range(first + 1, first + len(rows)):
            self._reader.copy(first, slot)
        self._rows += rows
        if request.config.repetition_penalty != 1:
            for slot in range(first, len(self._rows)):
                self._mark_prompt(slot, request.prompt, logits)
        return self._draw(logits.expand(len(rows), -1), first)

    def _new_row(self, request: Request, sample: int) -> Row:
        stops, stream = request.config.stop_tokens, None
        if self._tokenizer is not None:
            stream = TextStream(request.config.stop_strings)
            stops = (self._tokenizer.bos_token_id,) if stops is None else stops
        return Row(request, sample, frozenset(stops or ()), stream)

    def _decode(self) -> list[TokenEvent]:
        for slot, row in enumerate(self._rows):
            if self._reader.length(slot) == self.max_seq_len:
                self._reader.prefill(slot, self._fitting(row.tokens, row)[:-1])
        return self._draw(where_float64_is(self._reader.decode([row.tokens[-1] for row in self._rows])), 0)

    def _fitting(self, tokens: list[int], row: Row) -> list[int]:
        return tokens if len(tokens) <= self.max_seq_len else slid(tokens, row.remaining, self.max_seq_len)

    def _draw(self, logits: Tensor, first: int) -> list[TokenEvent]:
        """Choose a token for each row from slot `first` on, and drop the rows that end with it."""
        if self._tokenizer is not None:
            logits = logits[:, : self._tokenizer.vocab_size]
        rows = self._rows[first:]
        tokens = self._choose(rows, logits, None if self._seen is None else self._seen[first : first + len(rows)])
        # One transfer for both, in numbers that hold an id exactly.
        chosen, sums = torch.stack((tokens.double(), logits.sum(dim=-1, dtype=torch.float64))).tolist()
        if not all(map(_is_finite, sums)):
            raise NonFiniteError("the model's logits are not finite: its weights are damaged or diverged.")
        logprobs = self._logprobs(rows, logits, tokens)
        events = []
        for row, token, found in zip(rows, map(int, chosen), logprobs, strict=True):
            data = None if self._tokenizer is None else self._tokenizer.decode_bytes([token])
            events.append(row.take(token, data, found))
        self._free([first + index for index, event in enumerate(events) if event.finish_reason])
        return events

    def _choose(self, rows: Sequence[Row], logits: Tensor, seen: Tensor | None) -> Tensor:
        """Return a token for each row; rows with the same options are chosen together."""
        draws = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=logits.device)
        groups: dict[object, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.options, []).append(index)
        if len(groups) == 1:
            tokens = choose(logits, rows[0].config, draws, seen)
        else:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
            for group in groups.values():
                marked = None if seen is None else seen[group]
                tokens[group] = choose(logits[group], rows[group[0]].config, draws[group], marked)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _logprobs(self, rows: Sequence[Row], logits: Tensor, tokens: Tensor) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(rows)
        asking = [index for index, row in enumerate(rows) if row.config.logprobs is not None]
        if asking:
            most = max(rows[index].config.logprobs or 0 for index in asking)
            parts = [part.tolist() for part in log_probabilities(logits[asking], tokens[asking], most)]
            for index, logprob, values, ids in zip(asking, *parts, strict=True):
                top = tuple(zip(ids, values, strict=True))[: rows[index].config.logprobs]
                found[index] = TokenLogprobs(logprob, top)
        return found

    def _mark_prompt(self, slot: int, prompt: list[int], logits: Tensor) -> None:
        if self._seen is None:
            vocab = logits.shape[-1] if self._tokenizer is None else self._tokenizer.vocab_size
            self._seen = torch.zeros(self.num_slots, vocab, dtype=torch.bool, device=logits.device)
        self._seen[slot] = False
        self._seen[slot, [token for token in prompt if token < self._seen.shape[1]]] = True

    def _free(self, slots: Sequence[int]) -> None:
        """Drop rows; the last ones move into the gaps, so that a step reads no empty slot."""
        for slot in sorted(slots, reverse=True):
            last = len(self._rows) - 1
            if slot != last:
                self._rows[slot] = self._rows[last]
                self._reader.copy(last, slot)
                if self._seen is not None:
                    self._seen[slot] = self._seen[last]
            self._rows.pop()


def _is_finite(value: float) -> bool:
    return value - value == 0


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Call the model in evaluation mode, and put its mode back even where a part fails."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
