"""The log-likelihood of the ends of rows, in batches that share what rows have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinygpt.errors import ConfigError, NonFiniteError
from tinygpt.evals._prefix_cache import read_prefix
from tinygpt.model import GPT

LogitsModel = nn.Module | Callable[[Tensor], Tensor]
"""A `GPT`, or anything called with token ids `(batch, seq)` that returns logits `(batch, seq, vocab)`."""

# Below this a second call costs more than the positions it saves.
_LEAST_SHARED_TOKENS = 16
# Rows of logits that are held at once, so that a large vocabulary does not decide the peak of memory.
_LOGIT_ROWS = 1024


class Row(NamedTuple):
    """Token ids of which those from `start` on are scored; `start` is at least 1."""

    tokens: Sequence[int]
    start: int


class Score(NamedTuple):
    """What the scored tokens of a row cost in nats, how many they are, and whether each is the most likely one."""

    nats: float
    num_tokens: int
    greedy: bool


@dataclass(frozen=True)
class Scorer:
    """Scores groups of rows that may begin alike, such as the choices of one question.

    Args:
        model: What is measured.
        batch_tokens: Most positions in one call of the model, padding included; one group always fits.
        share_prefixes: Whether a `GPT` reads what the rows of a group have in common only once.
    """

    model: LogitsModel
    batch_tokens: int
    share_prefixes: bool = True

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens={self.batch_tokens} is not positive; choose 1 or more.")

    def score(self, groups: Sequence[Sequence[Row]]) -> Iterator[tuple[int, list[Score]]]:
        """Yield the index of each group with the scores of its rows, in an order that makes batches even.

        Raises:
            NonFiniteError: If the model gives logits that are not a number.
        """
        shared: list[tuple[int, int]] = []  # what decides how well a group fits into a batch, and its index
        alone: list[tuple[int, int]] = []
        for index, rows in enumerate(groups):
            prefix = _shared_tokens(rows)
            if self.share_prefixes and isinstance(self.model, GPT) and prefix >= _LEAST_SHARED_TOKENS:
                shared.append((prefix, index))
            else:
                alone.append((max(len(row.tokens) for row in rows), index))
        for sharing, members in ((True, shared), (False, alone)):
            for batch in self._batches(groups, sorted(members, reverse=True)):
                prefix = min(size for size, _ in batch) if sharing else 0
                indices = [index for _, index in batch]
                yield from zip(indices, self._score_batch([groups[i] for i in indices], prefix), strict=True)

    def _batches(
        self, groups: Sequence[Sequence[Row]], members: list[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int]]]:
        batch: list[tuple[int, int]] = []
        rows = longest = 0
        for member in members:
            group = groups[member[1]]
            longest_with = max(longest, *(len(row.tokens) for row in group))
            if batch and (rows + len(group)) * longest_with > self.batch_tokens:
                yield batch
                batch, rows = [], 0
                longest_with = max(len(row.tokens) for row in group)
            batch.append(member)
            rows, longest = rows + len(group), longest_with
        if batch:
            yield batch

    def _score_batch(self, groups: Sequence[Sequence[Row]], prefix: int) -> list[list[Score]]:
        rows = [row for group in groups for row in group]
        device = device_of(self.model)
        # The last token is only predicted; what fills a row up is read by no position that is scored.
        width = max(len(row.tokens) for row in rows) - 1
        inputs = torch.zeros(len(rows), width, dtype=torch.int64)
        scored = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            inputs[index, : len(row.tokens) - 1] = torch.tensor(row.tokens[:-1])
            scored[index, row.start - 1 : len(row.tokens) - 1] = True
        targets = torch.tensor([token for row in rows for token in row.tokens[row.start :]], device=device)
        inputs, scored = inputs.to(device), scored.to(device)
        if isinstance(self.model, GPT):
            cache = None
            if prefix:
                firsts = [sum(map(len, groups[:index])) for index in range(len(groups))]
                owners = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=device)
                cache = read_prefix(self.model, inputs[firsts, :prefix], owners)
            hidden = self.model.hidden_states(inputs[:, prefix:], cache=cache)
            hidden = hidden[scored[:, prefix:]]
            chunks: Iterable[Tensor] = (self.model.head(part) for part in torch.split(hidden, _LOGIT_ROWS))
        else:
            chunks = torch.split(self.model(inputs)[scored], _LOGIT_ROWS)
        nats, greedy = _compare(chunks, targets)
        scores: list[list[Score]] = []
        position = 0
        for group in groups:
            scores.append([])
            for row in group:
                end = position + len(row.tokens) - row.start
                scores[-1].append(
                    Score(float(nats[position:end].sum()), end - position, bool(greedy[position:end].all()))
                )
                position = end
        return scores


def _compare(chunks: Iterable[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each target costs in nats, float64, and whether it is the most likely token; both on the CPU."""
    nats, greedy = [], []
    position = 0
    for logits in chunks:
        part = targets[position : position + len(logits)]
        position += len(logits)
        picked = logits.float().log_softmax(dim=-1).gather(1, part[:, None])[:, 0]
        nats.append(-picked)
        greedy.append(logits.argmax(dim=-1) == part)
    costs = torch.cat(nats).cpu().double()
    if bool(costs.isnan().any()):
        raise NonFiniteError("the model's logits are not finite: its weights are damaged or diverged.")
    return costs, torch.cat(greedy).cpu()


def _shared_tokens(rows: Sequence[Row]) -> int:
    """Return how many leading tokens all rows have in common, up to the first position that must be read by each."""
    if len(rows) < 2:
        return 0
    return min(common_prefix([row.tokens for row in rows]), *(row.start - 1 for row in rows))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many leading tokens all sequences have in common."""
    for index, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return index
    return min(map(len, sequences))


def device_of(model: LogitsModel) -> torch.device:
    """Return where a model's parameters lie, and the CPU if it has none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def context_of(model: LogitsModel, max_seq_len: int | None) -> int | None:
    """Return the longest row a model may be given: what the caller said, else what the model says, else None.

    Raises:
        ConfigError: If it is too short to predict a token, or longer than the model says.
    """
    own = getattr(model, "max_seq_len", None)
    own = own if isinstance(own, int) else None
    if max_seq_len is None:
        return own
    if max_seq_len < 2 or (own is not None and max_seq_len > own):
        raise ConfigError(f"max_seq_len={max_seq_len} must lie between 2 and the model's context, {own or 'any'}.")
    return max_seq_len


def check_vocabulary(model: LogitsModel, vocab_size: int) -> None:
    """Raise `ConfigError` if a tokenizer makes ids that a model does not know."""
    config = getattr(model, "config", None)
    known = getattr(config, "vocab_size", None)
    if isinstance(known, int) and vocab_size > known:
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids, more than the model's vocab_size={known}: "
            "use the tokenizer the model was trained with."
        )


@contextmanager
def evaluating(model: LogitsModel) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients and compiled for no new shape; put its mode back after."""
    was_training = isinstance(model, nn.Module) and model.training
    # Rows have every length, and each would be compiled anew, until torch gives up and runs training eagerly as well.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        if isinstance(model, nn.Module):
            model.eval()
        try:
            yield
        finally:
            if isinstance(model, nn.Module):
                model.train(was_training)
