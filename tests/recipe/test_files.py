"""Recipes as files: TOML, JSON and Python, values laid over them, and files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import ConfigError, HubError
from tinygpt.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
MINIMAL = "num_steps = 6\n"


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


def test_a_saved_recipe_is_read_back_equal(tmp_path: Path) -> None:
    for number, recipe in enumerate((Recipe.from_depth(3, small=True), Recipe.load(EXAMPLES / "d12-rtx4070.toml"))):
        path = recipe.save(tmp_path / str(number))
        assert Recipe.load(path) == Recipe.load(path.parent) == recipe
        assert [file.name for file in path.parent.iterdir()] == ["recipe.json"]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    prompts=st.lists(st.text(), max_size=3),
    rates=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)),
    weights=st.dictionaries(st.text(min_size=1), st.floats(0, 1e9), max_size=3),
    name=st.text(),
)
def test_any_recipe_survives_json(prompts: list[str], rates: Any, weights: dict[str, float], name: str) -> None:
    recipe = Recipe(
        samples={"prompts": prompts},
        optimizer={"matrix_lr": rates[0], "weight_decay": rates[1]},
        data={"mixture": weights},
        phases=[{"steps": 3, "name": name}],
    )
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_documented_recipe_is_the_documented_run() -> None:
    recipe = Recipe.load(EXAMPLES / "d12-rtx4070.toml")
    plan = recipe.replace(data=recipe.data.replace(train="absent")).plan()
    assert (plan.num_parameters, plan.num_steps, plan.step_tokens) == (286_261_730, 87_000, 65_536)
    first = plan.phases[0]["rates"]["first"]
    assert first["weight_decay"] == pytest.approx(0.099, abs=1e-4)
    assert first["lr"] * 40 == pytest.approx(0.02 * 8**-0.5, rel=1e-9)


def test_its_commented_phases_are_the_jump_that_ran(tmp_path: Path) -> None:
    text = (EXAMPLES / "d12-rtx4070.toml").read_text("utf-8").replace("num_steps = 87_000\n", "")
    head, marker, rest = text.partition("# [[phases]]")
    path = write(tmp_path, head + (marker + rest).replace("\n# ", "\n").replace("\n#\n", "\n\n")[2:])
    plan = Recipe.load(path).plan()
    before, after = plan.phases[0]["rates"]["last"], plan.phases[1]["rates"]["first"]
    assert after["lr"] / before["lr"] == pytest.approx(20, rel=0.01)
    assert before["weight_decay"] < 1e-6 < 0.09 < after["weight_decay"]
    assert (before["momentum"], after["momentum"]) == (pytest.approx(0.90, abs=1e-4), pytest.approx(0.97))


def test_the_demo_recipe_is_the_demo_of_the_example() -> None:
    recipe = Recipe.load(EXAMPLES / "demo.toml")
    plan = recipe.plan()
    assert (plan.num_parameters, plan.num_steps, plan.step_tokens) == (5_243_010, 250, 2_048)


def test_toml_says_none_for_what_is_off(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, MINIMAL + 'keep_last = "none"\n[model]\nsoft_cap = "none"\n'))
    assert (recipe.keep_last, recipe.model.soft_cap) == (None, None)


def test_a_tokenizer_may_be_named_in_a_word(tmp_path: Path) -> None:
    assert Recipe.load(write(tmp_path, MINIMAL + 'tokenizer = "bytes"')).tokenizer.folder is None
    assert Recipe.load(write(tmp_path, MINIMAL + 'tokenizer = "my/folder"')).tokenizer.folder == "my/folder"


def test_a_python_recipe_is_run_when_it_is_named(tmp_path: Path) -> None:
    code = "from tinygpt.recipe import Recipe\nrecipe = Recipe(num_steps=2 * 3, model={'depth': 2})\n"
    recipe = Recipe.load(write(tmp_path, code, "mine.py"), overrides={"seed": "4"})
    assert (recipe.num_steps, recipe.model.num_layers, recipe.seed) == (6, 2, 4)
    assert "vocab_size" not in recipe.model.model_fields_set  # still the tokenizer's
    for text, message in (
        ("x = 1", r"sets no recipe = Recipe\(\.\.\.\)"),
        ("recipe = 3", "sets no recipe"),
        ("1 / 0", "failed with ZeroDivisionError"),
        ("def (", "failed with SyntaxError"),
        ("from tinygpt.recipe import Recipe\nrecipe = Recipe(num_steps=0)", "num_steps=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe.load(write(tmp_path, text, "mine.py"))


OVERRIDES: list[tuple[str, str, Any]] = [
    ("model.num-layers", "6", 6),
    ("model.num_layers", "6", 6),
    ("batch-tokens", "4_096", 4096),
    ("data.train", "corpus.txt", "corpus.txt"),
    ("data.train", "2024", "2024"),
    ("data.train", "none", None),
    ("data.mixture", '{"a-b.txt" = 0.5, c = 1.0}', {"a-b.txt": 0.5, "c": 1.0}),
    ("grad-clip", "1", 1.0),
    ("grad-clip", "none", None),
    ("model.soft-cap", "none", None),
    ("model.smear", "false", False),
    ("compile", "true", True),
    ("compile", "auto", "auto"),
    ("precision", "bfloat16", "bfloat16"),
    ("samples.prompts", '["a", "b"]', ["a", "b"]),
    ("schedules.lr.final", "0.25", 0.25),
    ("schedules.lr.warmup-steps", "3", 3),
    ("phases.1.steps", "5", 5),
    ("phases.0.lr.kind", "cosine", "cosine"),
    ("tokenizer.vocab-size", "512", 512),
    ("tokenizer", "some/folder", None),
    ("push.repo", "user/name", "user/name"),
    ("data.shuffle-seed", "3", 3),
]


@pytest.mark.parametrize(("name", "text", "value"), OVERRIDES, ids=[f"{n}={t}" for n, t, _ in OVERRIDES])
def test_a_dotted_name_reaches_its_field(tmp_path: Path, name: str, text: str, value: Any) -> None:
    path = write(tmp_path, 'tokenizer = "bytes"\n[[phases]]\nsteps = 4\n[[phases]]\nsteps = 4\n')
    found: Any = Recipe.load(path, overrides={name: text})
    if name == "tokenizer":
        assert found.tokenizer.folder == "some/folder"
        return
    for part in name.replace("-", "_").split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_depth_and_what_it_decides_may_be_laid_over_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, "num_steps = 6\n[model]\ndepth = 4\nhead_dim = 64\nsmear = false\n")
    wider = Recipe.load(path, overrides={"model.num-layers": "3", "model.dim": "512"}).model
    assert (wider.num_layers, wider.dim, wider.num_heads, wider.smear) == (3, 512, 4, False)
    deeper = Recipe.load(path, overrides={"model.depth": "6"}).model
    assert (deeper.num_layers, deeper.dim, deeper.head_dim) == (6, 384, 64)
    Recipe.load(path).save(tmp_path)  # without a depth from here on
    again = Recipe.load(tmp_path, overrides={"model.depth": "6"}).model
    assert (again.num_layers, again.dim, again.smear) == (6, 384, False)


WRONG: list[tuple[str, str, str]] = [
    ("sead", "3", "a recipe has no field 'sead'; did you mean seed"),
    ("xyz", "3", "a recipe has no field 'xyz'; its fields are model, tokenizer"),
    ("model.num-layer", "3", "GPTConfig has no field 'num_layer'; did you mean num_layers"),
    ("model..x", "3", "GPTConfig has no field ''"),
    ("", "3", "a recipe has no field ''"),
    ("__class__", "3", "a recipe has no field '__class__'"),
    ("model.num-layers", "six", "num_layers='six'"),
    ("model.num-layers", "true", "num_layers=True"),
    ("model.num-layers", "1\nseed = 5", "num_layers='1"),
    ("model.num-layers", "1e9", "num_layers=1000000000.0"),
    ("seed", "1979-05-27", "seed='1979-05-27'"),
    ("seed.x", "1", "seed"),
    ("grad-clip", "nan", "grad_clip"),
    ("grad-clip", "inf", "grad_clip"),
    ("phases.7.steps", "1", "'7' is none of 1 phases, counted from 0"),
    ("phases.first.steps", "1", "'first' is none of 1 phases"),
    ("samples.0.x", "1", "has no samples to change"),
    ("seed", "[" * 5000, "seed="),
]


@pytest.mark.parametrize(("name", "text", "message"), WRONG, ids=[f"{n}={t[:9]!r}" for n, t, _ in WRONG])
def test_wrong_overrides_are_named_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, "[[phases]]\nsteps = 4\n")
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.load(path, overrides={name: text})
    assert len(str(caught.value).splitlines()) == 1 or "\n" in text


HOSTILE: list[tuple[str, str]] = [
    ("num_steps = 6\nnum_steps = 7", "not valid TOML"),
    ("num_steps = ", "not valid TOML"),
    ("\x00", "not valid TOML"),
    ("num_steps = 99999999999999999999999999999999999999999999", "num_steps"),
    ("num_steps = 6\n[model]\nnum_layers = 999999999", "num_layers=999999999"),
    ("num_steps = 6\n[model]\ndepth = 99999999", "num_layers"),
    ("num_steps = 6\n[model]\ndim = 1e400", "dim=inf"),
    ("num_steps = inf", "num_steps=inf"),
    ("num_steps = nan", "num_steps=nan"),
    ("num_steps = 1979-05-27", "num_steps"),
    ("num_steps = '6'", "num_steps='6'"),
    ("num_steps = [6]", "num_steps"),
    ("model = 3\nnum_steps = 6", "model"),
    ("[[model]]\nnum_steps = 6", "model"),
    ("num_steps = 6\n[data]\ntrain = 3", "train=3"),
    ("num_steps = 6\n[data.mixture]\na = 'x'", "mixture"),
    ("num_steps = 6\n[optimizer]\nmatrix_lr = -1.0", "matrix_lr"),
    ("num_steps = 6\n[schedules.lr]\nkind = '__import__'", "kind"),
    ("num_steps = 6\n['__proto__']\nx = 1", "__proto__"),
    ("num_steps = 6\nphases = [[[[]]]]", "phases"),
    ("phases = 3", "phases=3"),
    ("a = " + "[" * 3000 + "]" * 3000, "deep|not valid TOML"),
    ("a." * 3000 + "b = 1", "nested too deeply|no field|not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=[text[:30] for text, _ in HOSTILE])
def test_hostile_values_are_refused_and_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.load(write(tmp_path, text))


def test_a_file_may_begin_with_the_byte_order_mark_of_windows(tmp_path: Path) -> None:
    for name, text in (("a.toml", "num_steps = 6"), ("a.json", '{"num_steps": 6}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert Recipe.load(tmp_path / name).num_steps == 6


def test_a_recipe_of_python_that_leaves_the_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="failed with SystemExit: 3"):
        Recipe.load(write(tmp_path, "raise SystemExit(3)", "leaves.py"))


def test_empty_paths_are_refused_before_they_mean_something_else(tmp_path: Path) -> None:
    for name in ("data.train", "data.validation", "tokenizer", "tokenizer.folder"):
        with pytest.raises(ConfigError, match="='': string should have at least 1 character"):
            Recipe.load(write(tmp_path, "num_steps = 1"), overrides={name: ""})


def test_rows_longer_than_the_context_are_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.seq_len=64 is longer than model\.max_seq_len=32; choose shorter"):
        Recipe.load(write(tmp_path, "num_steps = 1"), overrides={"data.seq_len": "64", "model.max_seq_len": "32"})


def test_a_repository_without_a_name_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, "num_steps = 1"), overrides={"push.repo": "nonsense"})
    with pytest.raises(HubError, match="'nonsense' is not a Hub name"):
        recipe.check(tmp_path / "run")


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large.toml").write_text("#" * (1 << 21))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "notes.yaml").write_text("num_steps: 6")
    for name, message in (
        ("binary.toml", "not valid TOML"),
        ("large.toml", "larger than 1,048,576 bytes"),
        ("list.json", "holds a list, not named values"),
        ("deep.json", "nested too deeply|not valid JSON"),
        ("notes.yaml", "give a .toml, .json or .py file"),
        ("absent.toml", "cannot be read: No such file"),
        ("", "holds no recipe.json, so it is no run"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe.load(tmp_path / name)


def test_a_recipe_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Recipe(num_steps=1).save(tmp_path / "file" / "run")
    path = Recipe(num_steps=1).save(tmp_path)
    assert json.loads(path.read_text("utf-8"))["num_steps"] == 1
