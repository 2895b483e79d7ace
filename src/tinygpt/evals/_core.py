"""The CORE metric of the DCLM paper: how far above guessing a base model is on a bundle of small tasks."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinygpt.errors import ConfigError, DataError
from tinygpt.evals._bundle import EvalBundle, EvalItem, EvalTask
from tinygpt.evals._progress import progress_bar
from tinygpt.evals._prompts import crop, render, to_rows
from tinygpt.evals._results import TaskResults, model_fingerprint
from tinygpt.evals._scoring import LogitsModel, Row, Score, Scorer, check_vocabulary, context_of, evaluating
from tinygpt.tokenizer import Tokenizer

# What nanochat shuffles with before it takes the first items.
_SHUFFLE_SEED = 1337
# Items that are turned into tokens together: enough to sort by length, few enough to hold.
_BLOCK_ITEMS = 256


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task.

    Attributes:
        label: The task.
        kind: Its kind.
        num_fewshot: Answered items before each question.
        num_items: Items that were asked.
        accuracy: Share of right answers.
        baseline: Accuracy of guessing.
        centered: `(accuracy - baseline) / (1 - baseline)`: 0 is guessing, 1 is perfect.
        interval: 95 % of the bootstrapped centered accuracies lie between these two.
        num_cropped: Items whose prompt was longer than the model's context and lost its beginning.
        categories: Accuracy of each category, where the task has them.
    """

    label: str
    kind: str
    num_fewshot: int
    num_items: int
    accuracy: float
    baseline: float
    centered: float
    interval: tuple[float, float]
    num_cropped: int
    categories: dict[str, float]


@dataclass(frozen=True)
class CoreReport:
    """The CORE metric and what it is the mean of; `print` shows a table.

    Attributes:
        core: Mean of the centered accuracies of all tasks.
        interval: 95 % of the bootstrapped means lie between these two. It tells how far other questions of the same
            kind would move the figure, not how far another training run would.
        tasks: One score a task, in the order of the bundle.
    """

    core: float
    interval: tuple[float, float]
    tasks: tuple[TaskScore, ...]

    def __getitem__(self, label: str) -> TaskScore:
        """Return the score of a task by its label."""
        return {task.label: task for task in self.tasks}[label]

    def __str__(self) -> str:
        width = max(len("task"), *(len(task.label) for task in self.tasks))
        lines = [f"{'task':{width}}  shots   items  accuracy  guessing  centered  95 % interval"]
        lines += [
            f"{task.label:{width}}  {task.num_fewshot:5}  {task.num_items:6,}  {task.accuracy:8.4f}  "
            f"{task.baseline:8.4f}  {task.centered:8.4f}  {_span(task.interval)}"
            for task in self.tasks
        ]
        lines.append(f"{'CORE':{width}}  {'':33}  {self.core:8.4f}  {_span(self.interval)}")
        if cropped := sum(task.num_cropped for task in self.tasks):
            lines.append(f"{cropped:,} prompts were longer than the context and lost their beginning.")
        return "\n".join(lines)


def evaluate_core(
    model: LogitsModel,
    tokenizer: Tokenizer,
    bundle: EvalBundle | str | Path,
    *,
    tasks: Sequence[str] | None = None,
    max_per_task: int | None = None,
    seed: int = _SHUFFLE_SEED,
    max_seq_len: int | None = None,
    batch_tokens: int = 16_384,
    share_prefixes: bool = True,
    results: str | Path | None = None,
    bootstrap_samples: int = 10_000,
    progress: bool = True,
) -> CoreReport:
    """Ask a model the questions of an evaluation bundle and return the CORE metric with its tasks.

    - Multiple choice takes the choice with the lowest mean loss, over the tokens from where the choices part.
    - A schema has one end and several beginnings; the beginning wins after which the common last tokens have the
      lowest mean loss.
    - Language modelling counts an answer as right if each of its tokens is the most likely one.

    An item has the same prompt whatever `max_per_task` is. Rows longer than the context lose their beginning.

    Args:
        model: A `GPT`, or anything called with token ids `(batch, seq)` that returns logits `(batch, seq, vocab)`.
        tokenizer: The model's tokenizer; every prompt starts with its `<|bos|>`.
        bundle: What `EvalBundle.open` returns or takes: a folder, a zip file, or an address, which alone is fetched.
        tasks: Labels of the tasks to take; None takes all, and only then is the mean the CORE metric of the bundle.
        max_per_task: Most items of a task; None for all.
        seed: Shuffles the items of each task before the first are taken, and seeds the bootstrap.
        max_seq_len: Longest row; None for the model's own `max_seq_len`, and no limit if it has none.
        batch_tokens: Most positions in one call of the model; lower it when memory runs out.
        share_prefixes: Whether a `GPT` reads only once what the rows of an item have in common. The figures stay
            the same but for rounding.
        results: Folder for a file a task, written as the evaluation goes; with the same model, tokenizer, bundle and
            settings a stopped evaluation goes on from it.
        bootstrap_samples: Draws for the intervals.
        progress: Whether to show a bar on standard error.

    Raises:
        ConfigError: If a number is out of range, the tokenizer does not fit the model, a block of a `GPT` with
            `share_prefixes` makes no use of its cache, or `results` is given for a model that is a plain function.
        DataError: If the bundle is damaged, an answer is longer than the model's context, or `results` holds those of
            another evaluation.
        NonFiniteError: If the model gives logits that are not a number.

    References:
        Section 3.5 and appendix G of Li et al., [DataComp-LM](https://arxiv.org/abs/2406.11794), 2024. Prompts, seeds
        and the tokens that are scored are those of nanochat's `core_eval`, except that few-shot examples come from all
        items also under `max_per_task`, that a choice which another begins with is scored by its last token, and
        that an answer whose first token joins the prompt's last is scored from there; nanochat stops at the last two.

    Example:
        ```python no-run: needs the bundle
        from tinygpt import GPT
        from tinygpt.evals import evaluate_core
        from tinygpt.tokenizer import load_tokenizer

        folder = "runs/d12/step-087000"
        report = evaluate_core(GPT.from_pretrained(folder), load_tokenizer(folder), "eval_bundle", max_per_task=500)
        print(report)
        ```
    """
    for name, value in (("max_per_task", max_per_task), ("bootstrap_samples", bootstrap_samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not positive; choose 1 or more.")
    check_vocabulary(model, tokenizer.vocab_size)
    context = context_of(model, max_seq_len)
    scorer = Scorer(model, batch_tokens, share_prefixes)
    bundle = bundle if isinstance(bundle, EvalBundle) else EvalBundle.open(bundle, progress=progress)
    if tasks is not None:
        bundle = bundle.select(tasks)
    folder = None if results is None else Path(results)
    shared_key: dict[str, int | str | None] = {"seed": seed, "max_per_task": max_per_task, "max_seq_len": context}
    if folder is not None:
        shared_key |= {"model": model_fingerprint(model), "tokenizer": tokenizer.fingerprint()}
    generator = np.random.default_rng(seed)
    scores, draws = [], []
    for task in bundle.tasks:
        asked = _Asked(task, bundle.items(task), seed, max_per_task)
        key = shared_key if folder is None else {**shared_key, "task": bundle.fingerprint(task)}
        found = TaskResults(folder, task.label, key, asked.num_items)
        done = asked.num_items - len(found.missing)
        with progress_bar(task.label, total=asked.num_items, done=done, enabled=progress) as advance:
            _answer(asked, scorer, tokenizer, context, found, advance)
        score, drawn = _summarize(asked, found, generator, bootstrap_samples)
        scores.append(score)
        draws.append(drawn)
    core = math.fsum(score.centered for score in scores) / len(scores)
    return CoreReport(core, _interval(np.mean(draws, axis=0)), tuple(scores))


class _Asked:
    """A task with its items in the order they are asked in."""

    def __init__(self, task: EvalTask, items: list[EvalItem], seed: int, max_items: int | None) -> None:
        random.Random(seed).shuffle(items)
        self.task = task
        self.items = items
        self.num_items = len(items) if max_items is None else min(max_items, len(items))

    def is_right(self, index: int, scores: list[Score]) -> bool:
        if self.task.kind == "language_modeling":
            return scores[0].greedy
        means = [score.nats / score.num_tokens for score in scores]
        return means.index(min(means)) == self.items[index].fields["gold"]


def _answer(
    asked: _Asked,
    scorer: Scorer,
    tokenizer: Tokenizer,
    context: int | None,
    found: TaskResults,
    advance: Callable[[int], object],
) -> None:
    """Ask the items that `found` lacks."""
    missing = found.missing
    for first in range(0, len(missing), _BLOCK_ITEMS):
        block = missing[first : first + _BLOCK_ITEMS]
        groups, cropped = _rows(asked, block, tokenizer, context)
        with evaluating(scorer.model):
            for index, scores in scorer.score(groups):
                found.correct[block[index]] = asked.is_right(block[index], scores)
                found.num_cropped += cropped[index]
                found.write()
                advance(1)
    found.write(now=bool(missing))


def _rows(
    asked: _Asked, indices: list[int], tokenizer: Tokenizer, context: int | None
) -> tuple[list[list[Row]], list[bool]]:
    """Return the rows of each item, and whether any of them was too long."""
    texts = [render(asked.task, asked.items, index) for index in indices]
    encoded = iter(tokenizer.encode_batch([text for group in texts for text in group]))
    groups, cropped = [], []
    for index, group in zip(indices, texts, strict=True):
        whole = to_rows(asked.task, [[tokenizer.bos_token_id, *next(encoded)] for _ in group])
        rows = whole if context is None else [crop(row, context) for row in whole]
        kept = [row for row in rows if row is not None]
        if len(kept) < len(rows):
            raise DataError(
                f"{asked.items[index].where}: an answer of {asked.task.label} has more tokens than fit into the "
                f"model's context of {context}; leave the task out with tasks=[...]."
            )
        groups.append(kept)
        cropped.append(any(len(row.tokens) < len(full.tokens) for row, full in zip(kept, whole, strict=True)))
    return groups, cropped


def _summarize(
    asked: _Asked, found: TaskResults, generator: np.random.Generator, samples: int
) -> tuple[TaskScore, npt.NDArray[np.float64]]:
    """Return the score of an answered task and bootstrapped centered accuracies, `(samples,)`."""
    task, right = asked.task, [bool(correct) for correct in found.correct]
    accuracy = sum(right) / len(right)
    # Drawing as many right and wrong answers with replacement makes their number binomial: no need to draw each.
    drawn = generator.binomial(len(right), accuracy, size=samples) / len(right)
    centered = (drawn - task.baseline) / (1 - task.baseline)
    categories: dict[str, list[bool]] = {}
    if task.has_categories:
        for item, correct in zip(asked.items, right, strict=False):
            categories.setdefault(item.fields["category"], []).append(correct)
    score = TaskScore(
        label=task.label,
        kind=task.kind,
        num_fewshot=task.num_fewshot,
        num_items=len(right),
        accuracy=accuracy,
        baseline=task.baseline,
        centered=(accuracy - task.baseline) / (1 - task.baseline),
        interval=_interval(centered),
        num_cropped=found.num_cropped,
        categories={name: sum(answers) / len(answers) for name, answers in sorted(categories.items())},
    )
    return score, centered


def _interval(draws: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:7.4f} to {interval[1]:6.4f}"
