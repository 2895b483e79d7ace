"""CORE against a loop that asks one text at a time and knows nothing of batches."""

import json
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinygpt import GPT, GPTConfig
from tinygpt.errors import ConfigError, DataError, NonFiniteError
from tinygpt.evals import CoreReport, EvalBundle, evaluate_core
from tinygpt.evals._prompts import render
from tinygpt.evals._scoring import Row, Scorer, evaluating
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer

BUNDLE = Path(__file__).parent.parent / "data_files" / "eval_bundle"
KINDS = {"everyday", "short_answers", "pronouns", "next_word", "brackets"}


def quietly(model: object, tokenizer: object, bundle: object = BUNDLE, **options: object) -> CoreReport:
    return evaluate_core(model, tokenizer, bundle, progress=False, **options)  # type: ignore[arg-type]


def prompt_of(task: dict[str, object], items: list[dict[str, object]], index: int) -> str:
    """Return what stands before the last item: its examples, drawn and joined as nanochat does."""
    generator = random.Random(1234 + index)
    others = [place for place in range(len(items)) if place != index]
    text = ""
    for place in generator.sample(others, task["num_fewshot"][0]):  # type: ignore[index]
        text += "\n\n".join([answered(task, items[place]), ""])
    return text


def delimiter_of(task: dict[str, object]) -> str:
    return str(task.get("continuation_delimiter", " "))


def answered(task: dict[str, object], item: dict[str, object]) -> str:
    delimiter = delimiter_of(task)
    match task["icl_task_type"]:
        case "multiple_choice":
            return item["query"] + delimiter + item["choices"][item["gold"]]  # type: ignore[operator,index]
        case "schema":
            return item["context_options"][item["gold"]] + delimiter + item["continuation"]  # type: ignore[index,operator]
    return item["context"].strip() + delimiter + item["continuation"]  # type: ignore[attr-defined,operator]


def token_losses(model: GPT, tokens: list[int]) -> list[tuple[float, bool]]:
    """Return loss and greediness of each token but the first, from one row by itself."""
    rows = model(torch.tensor([tokens]))[0].log_softmax(-1)
    return [(-float(row[token]), int(row.argmax()) == token) for row, token in zip(rows, tokens[1:], strict=False)]


@torch.no_grad()
def reference_accuracies(model: GPT, tokenizer: ByteTokenizer | BPETokenizer) -> dict[str, float]:
    import yaml

    accuracies = {}
    for task in yaml.safe_load((BUNDLE / "core.yaml").read_text("utf-8"))["icl_tasks"]:
        lines = (BUNDLE / "eval_data" / task["dataset_uri"]).read_text("utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(items)
        right = 0
        for index, item in enumerate(items):
            before, delimiter = prompt_of(task, items, index), delimiter_of(task)
            bos = [tokenizer.bos_token_id]
            if task["icl_task_type"] == "language_modeling":
                whole = bos + tokenizer.encode(before + item["context"].strip() + delimiter + item["continuation"])
                prompt = bos + tokenizer.encode((before + item["context"].strip() + delimiter).strip())
                assert whole[: len(prompt)] == prompt
                right += all(greedy for _, greedy in token_losses(model, whole)[len(prompt) - 1 :])
                continue
            if task["icl_task_type"] == "multiple_choice":
                texts = [before + item["query"] + delimiter + choice for choice in item["choices"]]
            else:
                texts = [before + context + delimiter + item["continuation"] for context in item["context_options"]]
            rows = [bos + tokenizer.encode(text) for text in texts]
            common = 0
            step = 1 if task["icl_task_type"] == "multiple_choice" else -1
            while len({tuple(row[::step][: common + 1]) for row in rows}) == 1:
                common += 1
            means = []
            for row in rows:
                losses = [loss for loss, _ in token_losses(model, row)]
                scored = losses[common - 1 :] if step == 1 else losses[len(losses) - common :]
                means.append(sum(scored) / len(scored))
            right += int(np.argmin(means)) == item["gold"]
        accuracies[task["label"]] = right / len(items)
    return accuracies


def test_bytes_score_as_in_a_loop_over_single_texts(byte_model: GPT) -> None:
    report = quietly(byte_model, ByteTokenizer())
    assert {task.label: task.accuracy for task in report.tasks} == reference_accuracies(byte_model, ByteTokenizer())
    assert len({task.accuracy for task in report.tasks}) > 2  # and not all right or all wrong


def test_byte_pairs_score_as_in_a_loop_over_single_texts(bpe_model: GPT, bpe: BPETokenizer) -> None:
    report = quietly(bpe_model, bpe)
    assert {task.label: task.accuracy for task in report.tasks} == reference_accuracies(bpe_model, bpe)


def test_core_is_the_mean_of_accuracies_centered_on_guessing(byte_model: GPT) -> None:
    report = quietly(byte_model, ByteTokenizer())
    baselines = {"everyday": 0.25, "short_answers": 0.5, "pronouns": 0.5, "next_word": 0.0, "brackets": 0.0}
    centered = [(report[label].accuracy - guess) / (1 - guess) for label, guess in baselines.items()]
    assert [task.centered for task in report.tasks] == pytest.approx(centered)
    assert report.core == pytest.approx(sum(centered) / 5)


@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_sharing_prefixes_changes_no_score_but_by_rounding(byte_model: GPT, batch_tokens: int) -> None:
    generator = random.Random(0)
    groups = []
    for length, rows in ((40, 3), (17, 2), (90, 4), (3, 2), (60, 1), (91, 5)):
        prefix = [256, *(generator.randrange(256) for _ in range(length))]
        ends = [[first, *(generator.randrange(256) for _ in range(generator.randrange(1, 9)))] for first in range(rows)]
        groups.append([Row(prefix + end, len(prefix)) for end in ends])
    with evaluating(byte_model):
        plain = dict(Scorer(byte_model, 10**6, share_prefixes=False).score(groups))
        shared = dict(Scorer(byte_model, batch_tokens).score(groups))
    for index, group in enumerate(groups):
        for row, one, other in zip(group, plain[index], shared[index], strict=True):
            assert other.nats == pytest.approx(one.nats, rel=1e-5)
            assert (other.num_tokens, other.greedy) == (len(row.tokens) - row.start, one.greedy)


def test_sharing_reads_a_common_prefix_once(byte_model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = []
    plain = GPT.hidden_states

    def counted(model: GPT, token_ids: Tensor, **options: object) -> Tensor:
        positions.append(token_ids.numel())
        return plain(model, token_ids, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(GPT, "hidden_states", counted)
    rows = [Row([256, *range(100), end, end], 101) for end in range(10)]
    with evaluating(byte_model):
        list(Scorer(byte_model, 10_000).score([rows]))
    assert positions == [100, 10 * 2]


class Average(nn.Module):
    """Mixes what came before by its mean, and has no use for a cache."""

    def forward(self, x: Tensor, *, token_ids: Tensor, cache: object = None) -> Tensor:
        return x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]


def test_a_part_that_keeps_nothing_in_the_cache_is_refused_unless_nothing_is_shared() -> None:
    model = GPT.from_config(tiny(max_seq_len=512), attention=lambda config, layer: Average())
    with pytest.raises(ConfigError, match=r"keeps nothing in its cache, .* give share_prefixes=False"):
        quietly(model, ByteTokenizer())
    assert len(quietly(model, ByteTokenizer(), share_prefixes=False).tasks) == 5


def test_the_report_is_the_same_for_any_batch_and_without_sharing(byte_model: GPT) -> None:
    tokenizer = ByteTokenizer()
    report = quietly(byte_model, tokenizer)
    assert quietly(byte_model, tokenizer, batch_tokens=1) == report
    assert quietly(byte_model, tokenizer, share_prefixes=False) == report


def test_any_callable_that_gives_logits_is_a_model(byte_model: GPT) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = byte_model

        def forward(self, token_ids: Tensor) -> Tensor:
            return self.inner(token_ids)

    report = quietly(byte_model, ByteTokenizer())
    byte_model.eval()
    assert quietly(Wrapped(), ByteTokenizer(), max_seq_len=512) == report
    assert quietly(lambda token_ids: byte_model(token_ids), ByteTokenizer()) == report


def test_the_mode_of_the_model_is_put_back(byte_model: GPT) -> None:
    for mode in (True, False):
        byte_model.train(mode)
        quietly(byte_model, ByteTokenizer(), tasks=["brackets"])
        assert byte_model.training is mode


def test_a_subset_asks_the_first_items_with_the_prompts_they_have_in_the_whole(
    bundle: EvalBundle, byte_model: GPT, tmp_path: Path
) -> None:
    def marks(folder: str, **options: object) -> dict[str, str]:
        quietly(byte_model, ByteTokenizer(), bundle, results=tmp_path / folder, **options)
        files = sorted((tmp_path / folder).iterdir())
        return {file.name: json.loads(file.read_text("utf-8"))["correct"] for file in files}

    whole, first = marks("whole"), marks("first", max_per_task=4)
    assert {name: answers[:4] for name, answers in whole.items()} == first
    assert sum(map(len, first.values())) == 4 * len(KINDS)
    task = bundle.tasks[1]
    assert len({render(task, bundle.items(task), index)[0] for index in range(3)}) == 3


def test_the_seed_decides_which_items_are_taken(byte_model: GPT, bundle: EvalBundle) -> None:
    asked = []

    def model(token_ids: Tensor) -> Tensor:
        asked.append(token_ids.tolist())
        return torch.zeros(*token_ids.shape, 257)

    for seed in (1, 1, 2):
        quietly(model, ByteTokenizer(), bundle, tasks=["everyday"], max_per_task=2, seed=seed)
    assert asked[0] == asked[1] != asked[2]


def test_intervals_hold_the_bootstrap_of_single_answers(byte_model: GPT) -> None:
    report = quietly(byte_model, ByteTokenizer(), bootstrap_samples=20_000)
    task = report["everyday"]
    generator = np.random.default_rng(0)
    answers = np.arange(10) < round(10 * task.accuracy)
    drawn = generator.choice(answers, size=(20_000, 10)).mean(axis=1)
    expected = np.quantile((drawn - 0.25) / 0.75, (0.025, 0.975))
    assert task.interval == pytest.approx(expected, abs=1e-9)
    assert report.interval[0] < report.core < report.interval[1]
    assert report.interval[1] - report.interval[0] < task.interval[1] - task.interval[0]
    assert quietly(byte_model, ByteTokenizer(), bootstrap_samples=20_000) == report  # seeded


def test_the_table_shows_every_task_and_the_mean(byte_model: GPT) -> None:
    report = quietly(byte_model, ByteTokenizer())
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["task", *(task.label for task in report.tasks), "CORE"]
    assert f"{report['everyday'].accuracy:.4f}" in lines[1]
    assert f"{report.core:.4f}" in lines[-1]
    cropped = replace(report, tasks=(replace(report.tasks[0], num_cropped=3),))
    assert str(cropped).endswith("3 prompts were longer than the context and lost their beginning.")


def test_accuracy_is_told_by_category(byte_model: GPT) -> None:
    task = quietly(byte_model, ByteTokenizer())["short_answers"]
    assert list(task.categories) == ["animals", "sums"]
    assert sum(task.categories.values()) / 2 == pytest.approx(task.accuracy)  # four items each


def test_long_prompts_lose_their_beginning_and_are_counted() -> None:
    seen: list[int] = []

    def model(token_ids: Tensor) -> Tensor:
        seen.append(token_ids.shape[1])
        return torch.zeros(*token_ids.shape, 257)

    report = quietly(model, ByteTokenizer(), tasks=["short_answers"], max_seq_len=40)
    assert report["short_answers"].num_cropped == 8
    assert max(seen) == 39  # the last of 40 tokens is only predicted
    assert quietly(model, ByteTokenizer(), tasks=["short_answers"])["short_answers"].num_cropped == 0


def test_a_model_reads_the_last_tokens_of_a_cropped_prompt(bundle: EvalBundle) -> None:
    rows = []

    def model(token_ids: Tensor) -> Tensor:
        rows.extend(token_ids.tolist())
        return torch.zeros(*token_ids.shape, 257)

    quietly(model, ByteTokenizer(), tasks=["brackets"], max_seq_len=30, max_per_task=1)
    task = next(task for task in bundle.tasks if task.label == "brackets")
    items = bundle.items(task)
    random.Random(1337).shuffle(items)
    text = render(task, items, 0)[1]
    assert rows == [list(text.encode()[-30:-1])]


def test_an_answer_longer_than_the_context_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"everyday.jsonl, line 10: an answer of everyday has more tokens .* of 12"):
        quietly(GPT.from_config(tiny(max_seq_len=12)), ByteTokenizer(), tasks=["everyday"])


def tiny(**fields: int) -> GPTConfig:
    return GPTConfig(**{"vocab_size": 257, "max_seq_len": 64, "num_layers": 1, "num_heads": 1, "dim": 8, **fields})


def test_what_cannot_be_is_refused(byte_model: GPT, bpe: BPETokenizer) -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(ConfigError, match="max_per_task=0 is not positive"):
        quietly(byte_model, tokenizer, max_per_task=0)
    with pytest.raises(ConfigError, match="bootstrap_samples=0 is not positive"):
        quietly(byte_model, tokenizer, bootstrap_samples=0)
    with pytest.raises(ConfigError, match="batch_tokens=0 is not positive"):
        quietly(byte_model, tokenizer, batch_tokens=0)
    with pytest.raises(ConfigError, match="max_seq_len=1024 must lie between 2 and the model's context, 512"):
        quietly(byte_model, tokenizer, max_seq_len=1024)
    with pytest.raises(ConfigError, match="more than the model's vocab_size=257"):
        quietly(byte_model, bpe)
    with pytest.raises(DataError, match="has no task arc; it has everyday, short_answers"):
        quietly(byte_model, tokenizer, tasks=["arc"])
    with pytest.raises(DataError, match="has no task to select"):
        quietly(byte_model, tokenizer, tasks=[])
    with pytest.raises(ConfigError, match=r"results are kept for an nn\.Module alone"):
        quietly(lambda token_ids: byte_model(token_ids), tokenizer, results="anywhere")
    assert not Path("anywhere").exists()


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        quietly(lambda token_ids: torch.full((*token_ids.shape, 257), float("nan")), ByteTokenizer())


class Stopping(nn.Module):
    """A model that is interrupted at its n-th call."""

    def __init__(self, inner: GPT, calls: int) -> None:
        super().__init__()
        self.inner = inner
        self.left = calls

    def forward(self, token_ids: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(token_ids)


def test_an_evaluation_goes_on_where_it_was_stopped(
    byte_model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt.evals._results._SECONDS_BETWEEN_WRITES", 0.0)
    options = {"batch_tokens": 1, "max_seq_len": 512}  # an item a call: 38 in all
    whole = Stopping(byte_model, 1000)
    report = quietly(whole, ByteTokenizer(), **options)
    calls, stops, resumed = 1000 - whole.left, 0, None
    while resumed is None:
        try:
            resumed = quietly(Stopping(byte_model, 7), ByteTokenizer(), results=tmp_path, **options)
        except KeyboardInterrupt:
            stops += 1
    assert resumed == report
    assert stops == calls // 7  # no call was made twice
    nothing_left = quietly(Stopping(byte_model, 0), ByteTokenizer(), results=tmp_path, **options)
    assert nothing_left == report


def test_a_killed_process_leaves_whole_files_and_the_next_one_goes_on(byte_model: GPT, tmp_path: Path) -> None:
    byte_model.save_pretrained(tmp_path / "model")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from tinygpt import GPT
        from tinygpt.evals import evaluate_core
        from tinygpt.evals import _results
        from tinygpt.tokenizer import ByteTokenizer

        _results._SECONDS_BETWEEN_WRITES = 0.0
        folder, bundle, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
        model = GPT.from_pretrained(folder + "/model")
        plain = model.hidden_states
        def hidden_states(*arguments, **options):
            global calls
            calls -= 1
            if calls < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)
        model.hidden_states = hidden_states
        evaluate_core(model, ByteTokenizer(), bundle, batch_tokens=1, results=folder + "/results")
        """
    )

    command = [sys.executable, "-c", script, str(tmp_path), str(BUNDLE), "12"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "everyday" in killed.stderr  # the bar
    written = [json.loads(file.read_text("utf-8"))["correct"] for file in (tmp_path / "results").glob("*.json")]
    assert any("." in marks for marks in written)  # stopped in the middle of a task
    report = quietly(byte_model, ByteTokenizer(), batch_tokens=1, results=tmp_path / "results")
    assert report == quietly(byte_model, ByteTokenizer(), batch_tokens=1)


def test_results_of_another_evaluation_are_refused(byte_model: GPT, tmp_path: Path) -> None:
    options = {"tasks": ["brackets"], "results": tmp_path}
    quietly(byte_model, ByteTokenizer(), **options)
    other = GPT.from_config(tiny(max_seq_len=512))
    with pytest.raises(DataError, match="was written with another model; give results another folder"):
        quietly(other, ByteTokenizer(), **options)
    with pytest.raises(DataError, match="was written with another max_per_task, seed"):
        quietly(byte_model, ByteTokenizer(), seed=5, max_per_task=6, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ('{"format_version": 1}', "is damaged .*'key'"),
        ('{"format_version": 2, "key": {}, "correct": "", "num_cropped": 0}', "has format version 2"),
    ],
)
def test_damaged_results_are_refused(byte_model: GPT, tmp_path: Path, content: str, message: str) -> None:
    quietly(byte_model, ByteTokenizer(), tasks=["brackets"], results=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content, "utf-8")
    with pytest.raises(DataError, match=message):
        quietly(byte_model, ByteTokenizer(), tasks=["brackets"], results=tmp_path)


def test_results_with_other_answers_than_the_task_has_are_refused(byte_model: GPT, tmp_path: Path) -> None:
    quietly(byte_model, ByteTokenizer(), tasks=["brackets"], results=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text("utf-8").replace('"correct": "', '"correct": "0'), "utf-8")
    with pytest.raises(DataError, match="its answers do not fit the task"):
        quietly(byte_model, ByteTokenizer(), tasks=["brackets"], results=tmp_path)
    file.write_text(file.read_text("utf-8").replace('"num_cropped": 0', '"num_cropped": "many"'), "utf-8")
    with pytest.raises(DataError, match=r"is damaged .*many"):
        quietly(byte_model, ByteTokenizer(), tasks=["brackets"], results=tmp_path)


@pytest.mark.gpu
def test_a_gpu_gives_the_answers_of_the_cpu(byte_model: GPT) -> None:
    import copy

    report = quietly(byte_model, ByteTokenizer())
    on_gpu = quietly(copy.deepcopy(byte_model).cuda(), ByteTokenizer())
    assert [task.accuracy for task in on_gpu.tasks] == [task.accuracy for task in report.tasks]
