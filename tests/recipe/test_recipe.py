"""A run built from a recipe is the run built by hand, and what a run saved repeats it."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import everything
from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig, trackers
from tinygpt.checkpoint import claim_run_folder
from tinygpt.data import (
    BatchLoader,
    TextDocuments,
    TokenShards,
    ValidationSet,
    embedded_corpus,
    hash_split,
    open_source,
    tokenize_documents,
)
from tinygpt.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from tinygpt.metrics import read_metrics
from tinygpt.optim import MuonAdamW, nanochat_rules, param_groups
from tinygpt.recipe import Recipe, RecipeRun, ScheduleRecipe, resolve_device
from tinygpt.scaling import lr_factor
from tinygpt.schedules import cosine, cosine_weight_decay, muon_momentum, warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer, train_bpe
from tinygpt.trainer import Phase, resolve_precision

TINY: dict[str, Any] = {
    "model": {"depth": 1, "head_dim": 16, "width_per_layer": 16, "max_seq_len": 32},
    "data": {"rows": 2, "validation_tokens": 500},
    "batch_tokens": 128,
    "num_steps": 6,
    "report": False,
}
PARAGRAPHS = [f"Whale number {n} swam past the ship, and nobody said a word about it." for n in range(60)]


def tiny(**fields: Any) -> Recipe:
    return Recipe(**{**TINY, **fields})


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if record["event"] == "step"]


def last_state(out: Path, steps: int = 6) -> dict[str, Any]:
    return everything(out / "checkpoints" / f"step-{steps:06d}")


def fit(run: RecipeRun, **options: Any) -> RecipeRun:
    run.fit(progress=False, **options)
    return run


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "books.txt").write_text("\n\n".join(PARAGRAPHS), "utf-8", newline="\n")
    return tmp_path / "books.txt"


def test_a_run_built_from_a_recipe_is_the_one_built_by_hand_bit_for_bit(tmp_path: Path) -> None:
    decay = {"kind": "warmup_stable_decay", "warmup_steps": 2, "decay_fraction": 0.5, "final": 0.1}
    recipe = tiny(
        schedules={"lr": decay},
        optimizer={"matrix_lr": 0.03, "weight_decay": 0.2},
        data={**TINY["data"], "shuffle_seed": 3, "overflow": "concat"},
        evaluate_every=2,
        samples={"every": 3, "prompts": ["Call"], "max_new_tokens": 4},
        grad_clip=1.0,
        seed=7,
    )
    fit(recipe.build(tmp_path / "recipe"))

    torch.manual_seed(7)
    config = GPTConfig.from_depth(1, head_dim=16, width_per_layer=16, max_seq_len=32, vocab_size=257)
    model = GPT.from_config(config)
    scale = lr_factor(128)
    rules = nanochat_rules(model_dim=16, batch_lr_scale=scale, matrix_lr=0.03, weight_decay=0.2 * scale)
    loader = BatchLoader(embedded_corpus(), ByteTokenizer(), rows=2, seq_len=32, overflow="concat", seed=3)
    validation = ValidationSet.from_source(
        embedded_corpus("validation"), ByteTokenizer(), rows=2, seq_len=32, max_tokens=500
    )
    trainer = Trainer(
        model,
        MuonAdamW(param_groups(model, rules)),
        loader,
        TrainerConfig(num_steps=6, batch_tokens=128, grad_clip=1.0, out_dir=str(tmp_path / "hand")),
        schedules={
            "lr": warmup_stable_decay(6, warmup_steps=2, decay_fraction=0.5, final=0.1),
            "muon.momentum": muon_momentum(6),
            "muon.weight_decay": cosine_weight_decay(6),
        },
        validation=validation,
    )
    trainer.fit(progress=False)
    assert losses(tmp_path / "recipe") == losses(tmp_path / "hand")
    assert last_state(tmp_path / "recipe") == last_state(tmp_path / "hand")


def test_a_run_can_be_repeated_from_what_it_saved(tmp_path: Path) -> None:
    first = fit(tiny(evaluate_every=3).build(tmp_path / "first"))
    again = fit(Recipe.load(tmp_path / "first").build(tmp_path / "again"))
    assert again.recipe == first.recipe
    assert last_state(tmp_path / "first") == last_state(tmp_path / "again")
    records = [
        [
            (r["step"], r["bpb"], r["data_hash"])
            for r in read_metrics(out / "metrics.jsonl")
            if r["event"] == "evaluation"
        ]
        for out in (tmp_path / "first", tmp_path / "again")
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 2


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_run_that_was_killed_goes_on_from_its_own_recipe_bit_for_bit(tmp_path: Path, killed_after: int) -> None:
    recipe = tiny(save_every=2, samples={"every": 2, "max_new_tokens": 4})
    fit(recipe.build(tmp_path / "whole"))
    run = recipe.build(tmp_path / "killed")
    run.recipe.save(run.out_dir)
    for step in run.trainer:
        if step.index == killed_after:
            break
    fit(Recipe.load(tmp_path / "killed").build(tmp_path / "killed"))
    assert last_state(tmp_path / "whole") == last_state(tmp_path / "killed")


def test_what_is_saved_is_the_recipe_with_nothing_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("notes.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in PARAGRAPHS))
    data = {**TINY["data"], "train": "notes.jsonl", "text_key": "body", "held_out": 0.2}
    fit(tiny(data=data).build("run"))
    saved = Recipe.load(tmp_path / "here" / "run")
    assert saved.data.train == str(tmp_path / "here" / "notes.jsonl")
    assert (saved.model.vocab_size, saved.model.num_layers, saved.data.seq_len) == (257, 1, 32)
    monkeypatch.chdir(tmp_path)
    assert saved.build("here/run").trainer.resume() == []


def test_text_is_split_a_tokenizer_trained_and_both_kept_with_the_run(
    tmp_path: Path, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**TINY["data"], "train": str(books), "separator": "\n\n", "held_out": 0.2, "validation_tokens": None}
    recipe = tiny(data=data, tokenizer={"vocab_size": 300})
    built = recipe.build(tmp_path / "run", progress=False)
    assert capsys.readouterr().err == ""
    run = fit(built)
    train, held_out = hash_split(open_source(books, separator="\n\n"), validation_fraction=0.2)
    tokenizer = train_bpe(train, vocab_size=300)
    assert run.trainer.tokenizer is not None
    assert run.trainer.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert run.recipe.model.vocab_size == 300
    expected = ValidationSet.from_source(held_out, tokenizer, rows=2, seq_len=32)
    assert run.validation is not None
    assert run.validation.hash == expected.hash
    books.write_text("another text\n\n" * 9)  # the run goes on with what it began with, or says what changed
    with pytest.raises(CheckpointError, match="source_fingerprint"):
        fit(recipe.build(tmp_path / "run"))


def test_token_shards_bring_their_tokenizer_and_validation_is_a_file(tmp_path: Path) -> None:
    tokenizer = train_bpe(embedded_corpus("validation"), vocab_size=300)
    shards = tokenize_documents(TextDocuments(PARAGRAPHS), tokenizer, tmp_path / "shards", processes=1)
    texts = TextDocuments(PARAGRAPHS[:5])
    ValidationSet.from_source(texts, tokenizer, rows=4, seq_len=32).save(tmp_path / "val.safetensors")
    data = {"rows": 2, "train": str(tmp_path / "shards"), "validation": str(tmp_path / "val.safetensors")}
    run = fit(tiny(data=data, evaluate_every=3).build(tmp_path / "run"))
    assert isinstance(shards, TokenShards)
    assert run.recipe.model.vocab_size == 300
    assert Recipe.load(tmp_path / "run").plan().parameters["head"] == 320 * 16
    with pytest.raises(ConfigError, match=r"token shards cannot be split.*give data.validation"):
        tiny(data={"rows": 2, "train": str(tmp_path / "shards")}, evaluate_every=3).build(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"token shards bring their tokenizer; leave tokenizer\.vocab_size out"):
        tiny(data=data, tokenizer={"vocab_size": 300}).build(tmp_path / "other")
    unmeasured = tiny(data={"rows": 2, "train": str(tmp_path / "shards")}).build(tmp_path / "third")
    assert (unmeasured.validation, unmeasured.hooks) == (None, ())


def test_several_texts_are_mixed_by_weight(tmp_path: Path, books: Path) -> None:
    data = {"rows": 2, "mixture": {str(books): 0.5, "embedded": 1.5}, "validation": "embedded", "validation_tokens": 99}
    run = fit(tiny(data=data).build(tmp_path / "run"))
    assert run.trainer.loader.source.weights == {str(books): 0.5, "embedded": 1.5}
    again = fit(Recipe.load(tmp_path / "run").build(tmp_path / "again"))
    assert last_state(run.out_dir) == last_state(again.out_dir)


def test_phases_have_their_own_data_batch_and_schedules(tmp_path: Path, books: Path) -> None:
    half = {"kind": "cosine", "final": 0.5}
    phases = [
        {"steps": 2, "name": "book", "lr": half},
        {"steps": 4, "name": "whales", "lr": half, "train": str(books), "batch_tokens": 64},
    ]
    recipe = tiny(num_steps=None, phases=phases, data={**TINY["data"], "validation": "embedded"})
    run = fit(recipe.build(tmp_path / "recipe"))
    assert [phase.name for phase in run.trainer.phases] == ["book", "whales"]
    assert run.trainer.tokens == 2 * 128 + 4 * 64

    torch.manual_seed(0)
    model = GPT.from_config(run.recipe.model)
    scale = lr_factor(128)
    rules = nanochat_rules(model_dim=16, batch_lr_scale=scale, weight_decay=0.28 * scale)
    loaders = [
        BatchLoader(source, ByteTokenizer(), rows=2, seq_len=32, overflow="carry")
        for source in (embedded_corpus(), open_source(books))
    ]
    schedules = {
        "lr": cosine(6, final=0.5),
        "muon.momentum": muon_momentum(6),
        "muon.weight_decay": cosine_weight_decay(6),
    }
    trainer = Trainer(
        model,
        MuonAdamW(param_groups(model, rules)),
        loaders[0],
        TrainerConfig(num_steps=6, batch_tokens=128, out_dir=str(tmp_path / "hand")),
        phases=[
            Phase(2, schedules, name="book"),
            Phase(4, schedules, name="whales", loader=loaders[1], batch_tokens=64),
        ],
        validation=run.validation,
    )
    trainer.fit(progress=False)
    assert last_state(tmp_path / "recipe") == last_state(tmp_path / "hand")


def test_what_is_held_out_of_the_text_is_held_out_of_a_phase_too(tmp_path: Path, books: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("\n\n".join([*PARAGRAPHS, "something new"]), "utf-8", newline="\n")
    data = {**TINY["data"], "train": str(books), "separator": "\n\n", "held_out": 0.3}
    phases = [{"steps": 2}, {"steps": 4, "train": str(more)}]
    run = tiny(num_steps=None, phases=phases, data=data).build(tmp_path / "run")
    kept, _ = hash_split(open_source(more, separator="\n\n"), validation_fraction=0.3)
    assert run.trainer.course.loaders[1].state_dict()["source_fingerprint"] == kept.fingerprint()
    own, _ = hash_split(open_source(books, separator="\n\n"), validation_fraction=0.3)
    assert run.trainer.loader.state_dict()["source_fingerprint"] == own.fingerprint()


def test_a_run_goes_on_when_the_tokenizer_it_was_made_with_is_gone(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tokenizer")
    fit(tiny(tokenizer=str(tmp_path / "tokenizer")).build(tmp_path / "run"))
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    saved = Recipe.load(tmp_path / "run")
    assert saved.plan().num_steps == 6
    assert saved.build(tmp_path / "run").trainer.resume() == []
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        tiny(tokenizer=str(tmp_path / "tokenizer")).plan()


def test_samples_and_evaluations_are_in_the_run_s_record(tmp_path: Path) -> None:
    samples = {"every": 3, "prompts": ["Call me", "x" * 29], "max_new_tokens": 4}
    fit(tiny(evaluate_every=2, samples=samples).build(tmp_path))
    records = read_metrics(tmp_path / "metrics.jsonl")
    found = [(r["step"], r["prompt"]) for r in records if r["event"] == "sample"]
    assert found == [(2, "Call me"), (2, "x" * 29), (5, "Call me"), (5, "x" * 29)]
    assert [r["step"] for r in records if r["event"] == "evaluation"] == [1, 3, 5]


def test_checkpoints_are_kept_as_the_recipe_says(tmp_path: Path) -> None:
    kept = {"keep_last": 1, "keep_every": 3, "keep_best": 1}
    fit(tiny(save_every=1, evaluate_every=1, num_steps=8, **kept).build(tmp_path))
    found = {int(folder.name[-6:]) for folder in (tmp_path / "checkpoints").glob("step-*")}
    assert {3, 6, 8} <= found
    assert len(found) <= 4
    with pytest.raises(ConfigError, match="keep_best has no effect with keep_last=None"):
        tiny(keep_last=None, keep_best=1).build(tmp_path / "other")


def test_a_prompt_without_room_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'xxx.*' takes 32 tokens with <.bos.>, and the model's context has 32"):
        tiny(samples={"every": 3, "prompts": ["fine", "x" * 31]}).build(tmp_path)


def test_the_report_is_written_at_the_end(tmp_path: Path) -> None:
    fit(tiny(report=True).build(tmp_path))
    assert "6" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_a_folder_belongs_to_one_seed_tokenizer_and_validation_text(tmp_path: Path) -> None:
    fit(tiny().build(tmp_path))
    for changed in ({"seed": 1}, {"tokenizer": {"vocab_size": 300}}, {"data": {"rows": 2, "validation_tokens": 499}}):
        with pytest.raises(CheckpointError, match=r"belongs to another run.*Choose another folder"):
            tiny(**changed).build(tmp_path)


def test_a_first_attempt_that_fails_claims_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match="too small for vocab_size"):
        tiny(tokenizer={"vocab_size": 900_000}).build(out)
    assert not out.exists()
    fit(tiny().build(out))


def test_a_changed_recipe_is_saved_only_once_the_run_went_on_with_it(tmp_path: Path) -> None:
    fit(tiny().build(tmp_path))
    with pytest.raises(CheckpointError, match="would go on differently"):
        fit(tiny(num_steps=12).build(tmp_path))
    assert Recipe.load(tmp_path).num_steps == 6
    fit(tiny(num_steps=12).build(tmp_path), rewarm_steps=2)
    assert Recipe.load(tmp_path).num_steps == 12
    assert len(losses(tmp_path)) == 12


def test_a_branch_and_a_later_tracker_take_no_other_run_of_their_name_for_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, list[int]] = {}

    class Server:
        """Keeps runs by name for all folders, as wandb, MLflow and trackio do."""

        def __init__(self, project: str, run: str, folder: Path | None, settings: dict[str, Any], resume: bool) -> None:
            if run in sent and not resume:
                raise ConfigError(f"there is a run {run!r} already")
            self.steps = sent.setdefault(run, [])

        def log(self, values: Mapping[str, float], step: int) -> None:
            self.steps.extend([step] if "train/loss" in values else [])

        def close(self) -> None:
            pass

    monkeypatch.setitem(trackers._OPENERS, "wandb", Server)
    monkeypatch.setattr(trackers, "check_tracker", lambda *_: None)
    recipe = tiny(trackers=["wandb"], save_every=2, keep_every=2)
    fit(recipe.build(tmp_path / "a" / "run"))
    start = tmp_path / "a" / "run" / "checkpoints" / "step-000002"
    for _ in range(2):  # that it was tried once must not count as begun
        with pytest.raises(ConfigError, match="there is a run 'run' already"):
            fit(recipe.build(tmp_path / "b" / "run"), branch_from=start)
    fit(tiny(num_steps=4).build(tmp_path / "c" / "run"), branch_from=start, accept=["schedule"])
    with pytest.raises(ConfigError, match="there is a run 'run' already"):  # begun there without a tracker
        fit(recipe.build(tmp_path / "c" / "run"), accept=["schedule"])
    fit(recipe.build(tmp_path / "branch"), branch_from=start)
    assert sent == {"run": [0, 1, 2, 3, 4, 5], "branch": [2, 3, 4, 5]}
    fit(tiny(trackers=["wandb"], num_steps=8).build(tmp_path / "branch"), accept=["schedule"])
    assert sent["branch"] == [2, 3, 4, 5, 6, 7]


def test_nothing_is_left_to_do_in_a_run_that_is_complete(tmp_path: Path) -> None:
    fit(tiny().build(tmp_path))
    assert tiny().build(tmp_path).fit(progress=False) is None


def test_the_plan_of_the_documented_run_has_its_known_figures() -> None:
    plan = Recipe.from_depth(12, batch_tokens=65_536, num_steps=87_000).plan(device_name="RTX 4070", mfu=0.85)
    assert plan.num_parameters == sum(plan.parameters.values()) == 286_261_730
    assert plan.tokens == 87_000 * 65_536
    assert plan.seconds == pytest.approx(28.4 * 3600, rel=0.01)  # 28.4 hours at 49 of 58 TFLOP/s
    assert plan.tokens_per_second == pytest.approx(55_670, rel=0.01)  # as it was measured
    assert plan.memory_budget == 11 * 2**30
    assert plan.fits
    assert plan.advice is not None
    assert plan.advice.rows == 8
    assert plan.phases[0]["rates"]["first"]["lr"] == pytest.approx(0.02 * lr_factor(65_536) / 40)
    assert json.loads(json.dumps(plan.to_dict()))["precision"] == "bfloat16"
    for part in ("286,261,730 parameters", "5,701,632,000 in 87,000 steps", "28.4 hours on one RTX 4070", "85%"):
        assert part in str(plan)


def test_a_card_without_bfloat16_is_planned_in_float32() -> None:
    plan = tiny().plan(device_name="Tesla T4")
    assert (plan.precision, plan.memory_budget) == ("float32", 14 * 2**30)
    assert plan.seconds is not None
    with pytest.raises(ConfigError, match="the peak of 'T5' in bfloat16 is not known"):
        tiny().plan(device_name="T5")


def test_an_apple_chip_is_planned_in_float32_and_its_memory_is_not_known() -> None:
    plan = tiny().plan(device_name="Apple M2 Max 38-core GPU", mfu=0.5)
    assert plan.precision == "float32"
    assert plan.memory_budget is None
    assert plan.tokens_per_second == pytest.approx(0.5 * 13.6e12 / plan.flops_per_token, rel=0.01)
    with pytest.raises(ConfigError, match=r"the peak of 'Apple M2 Max' in bfloat16 is not known; .*30-core GPU"):
        tiny().plan(device_name="Apple M2 Max")


def test_the_memory_of_a_plan_is_that_of_the_phase_with_the_largest_batch() -> None:
    phases = [{"steps": 2}, {"steps": 2, "batch_tokens": 256}]
    accumulating = tiny(batch_tokens=256).plan().memory_bytes
    assert tiny(batch_tokens=None, num_steps=None, phases=phases).plan().memory_bytes == accumulating
    assert tiny(batch_tokens=None).plan().memory_bytes != accumulating


def test_a_plan_reads_no_text_and_needs_no_gpu() -> None:
    plan = tiny(data={"rows": 2, "train": "absent.txt", "validation": "absent too"}).plan()
    assert plan.seconds is None
    assert plan.step_tokens == 128
    for arguments, message in (
        ({"device_name": "Abacus"}, "the peak of 'Abacus' in bfloat16 is not known"),
        ({"mfu": 0.0}, "mfu=0.0 is not a share"),
        ({"mfu": 1.5}, "mfu=1.5 is not a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny().plan(**arguments)


def test_depth_on_a_gpu_follows_the_scaling_rules() -> None:
    recipe = Recipe.from_depth(6)
    assert recipe.batch_tokens is not None
    assert recipe.batch_tokens * (recipe.num_steps or 0) == pytest.approx(
        12 * (6 * 12 * 384**2 + 32_768 * 384), rel=0.01
    )
    assert recipe.model == GPTConfig.from_depth(6)
    assert Recipe.from_depth(2, small=True, num_steps=4).plan().num_steps == 4
    with pytest.raises(ConfigError, match="depth=0"):
        Recipe.from_depth(0)


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device='{name}' cannot be used"):
            resolve_device(name)


def test_schedules_refuse_what_they_do_not_take() -> None:
    with pytest.raises(ConfigError, match="the schedule cosine has no decay_fraction; it takes total_steps, warmup"):
        ScheduleRecipe(kind="cosine", decay_fraction=0.5)
    assert repr(ScheduleRecipe(kind="cosine").build(9)) == repr(cosine(9))
    with pytest.raises(ConfigError, match="warmup_steps=12 does not fit a run of 9 steps; choose 0 to 8"):
        ScheduleRecipe(kind="cosine", warmup_steps=12).build(9)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_steps": None}, "a run needs num_steps, or phases that have steps"),
    ({"phases": [{"steps": 2}]}, "the phases have 2 = 2 steps and num_steps=6"),
    (
        {"schedules": {"lr": {"warmup_steps": 9}}},
        r"schedules\.lr\.warmup_steps=9 does not fit a run of 6 steps; choose 0 to 6",
    ),
    ({"phases": [{"steps": 6, "lr": {"kind": "cosine", "warmup_steps": 7}}]}, r"phases\.0\.lr\.warmup_steps=7"),
    ({"schedules": {"lr": {"kind": "linear"}}}, "kind='linear'"),
    ({"model": {"depth": 2, "dim": 64}}, "depth decides dim as well; give either"),
    ({"model": {"head_dim": 64}}, "head_dim and width_per_layer say what a depth makes of a model; give depth as well"),
    ({"model": {"depth": 1.5}}, "depth=1.5 is not a whole number"),
    ({"model": {"depth": True}}, "depth=True is not"),
    ({"model": {"num_layer": 2}}, "has no field 'num_layer'; did you mean num_layers"),
    ({"tokenizer": {"folder": "x", "vocab_size": 300}}, "give one of them"),
    ({"data": {"train": "x", "mixture": {"y": 1.0}}}, "train is one source and mixture are several"),
    ({"data": {"held_out": 1.0}}, "held_out=1.0"),
    ({"seed": -1}, "seed=-1"),
    ({"num_steps": True}, "num_steps=True"),
    ({"batch_tokens": "4096"}, "batch_tokens='4096'"),
    ({"epochs": 3}, "has no field 'epochs'"),
    ({"grad_clip": float("nan")}, "grad_clip"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_recipes_that_make_no_run_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**fields)


def test_a_model_with_fewer_ids_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    small = {**TINY["model"], "vocab_size": 100}
    with pytest.raises(ConfigError, match=r"257 ids, more than model.vocab_size=100; leave model.vocab_size out"):
        tiny(model=small).build(tmp_path)


def test_an_empty_recipe_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("", "utf-8")
    with pytest.raises(ConfigError, match=r"empty\.toml is empty; name at least one field"):
        Recipe.load(tmp_path / "empty.toml")


def test_a_file_in_the_place_of_the_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", "utf-8")
    with pytest.raises(CheckpointError, match="run is a file; a run needs a folder of its own"):
        claim_run_folder(tmp_path / "run", {"seed": 0})


def test_what_is_not_there_is_named_before_any_work(
    tmp_path: Path, books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    tokenize_documents(TextDocuments(PARAGRAPHS), ByteTokenizer(), shards, processes=1)
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": {"rows": 2, "train": "absent"}}, DataError, "absent does not exist"),
        ({"data": {"rows": 2, "validation": "absent"}}, DataError, "absent does not exist"),
        ({"data": {"rows": 2, "train": str(books)}}, DataError, "no document falls to validation"),
        ({"data": {"rows": 2, "mixture": {str(shards): 1.0}}}, ConfigError, "data.mixture mixes text"),
        ({"num_steps": None, "phases": [{"steps": 6, "train": "absent"}]}, DataError, "absent does not exist"),
    ]
    for fields, kind, message in refused:
        with pytest.raises(kind, match=message):
            tiny(**fields).check(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[wandb\]"'):
        tiny(trackers=["wandb"]).check(tmp_path / "run")
    tiny(data={"rows": 2, "train": str(shards)}).check(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    saved = {"rows": 2, "validation": str(books), "validation_tokens": 500}
    fit(tiny(data=saved).build(tmp_path / "run"))
    books.unlink()
    tiny(data=saved).check(tmp_path / "run")  # it is in the run's folder


def test_a_run_branches_from_a_checkpoint_of_another_one_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(tiny(save_every=2, keep_last=None).build(tmp_path / "whole"))
    start = whole.out_dir / "checkpoints" / "step-000002"
    branch = tiny().build(tmp_path / "branch")
    branch.fit(branch_from=start, progress=False)
    assert last_state(whole.out_dir) == last_state(branch.out_dir)
    shutil.rmtree(whole.out_dir)
    assert tiny().build(branch.out_dir).fit(branch_from=start, progress=False) is None


def test_what_saves_memory_reaches_model_and_trainer(tmp_path: Path) -> None:
    options = {"micro_batch_rows": 1, "activation_checkpointing": "block", "loss_chunk_tokens": 32}
    run = tiny(**options).build(tmp_path / "run")
    plain = tiny().build(tmp_path / "plain")
    assert run.trainer.model.activation_checkpointing == "block"
    assert run.trainer.model.head.chunk_tokens == 32
    assert run.trainer.micro_batch_rows == 1
    found, expected = (each.fit(progress=False) for each in (run, plain))
    assert found is not None
    assert expected is not None
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert Recipe.load(tmp_path / "run").micro_batch_rows == 1


def test_rows_may_be_left_to_the_machine(tmp_path: Path) -> None:
    run = tiny(micro_batch_rows="auto").build(tmp_path / "run")
    run.fit(progress=False)
    assert run.trainer.micro_batch_rows == run.recipe.data.rows


def test_no_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory_bytes=0 is no memory to train in"):
        tiny().plan(memory_bytes=0)


def test_a_manifest_of_another_program_makes_a_folder_of_text_no_shards(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("text " * 100)
    for content in ("[]", "no JSON", '{"kind": "of another"}'):
        (folder / "manifest.json").write_text(content)
        tiny(data={**TINY["data"], "train": str(folder), "validation": "embedded"}).check(tmp_path / "run")
    tokenize_documents(TextDocuments(["some text"]), ByteTokenizer(), tmp_path / "shards", processes=1)
    (tmp_path / "shards" / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json is damaged or from another version"):
        tiny(data={**TINY["data"], "train": str(tmp_path / "shards")}).check(tmp_path / "run")


def test_the_license_to_push_with_is_looked_at_before_any_work(tmp_path: Path) -> None:
    recipe = tiny(push={"repo": "user/tiny", "license": "MIT License"})
    with pytest.raises(ConfigError, match="license='MIT License' is not an identifier"):
        recipe.check(tmp_path / "run")
    assert not (tmp_path / "run").exists()
