"""Each command for real, on a run of seconds."""

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_folder import write_example
from small_runs import everything
from tinygpt import GPT, manifest
from tinygpt.cli import main
from tinygpt.data import TextDocuments, ValidationSet, tokenize_documents
from tinygpt.evals import evaluate_bpb
from tinygpt.generate import stream_text
from tinygpt.metrics import read_metrics
from tinygpt.recipe import Recipe
from tinygpt.tokenizer import ByteTokenizer, load_tokenizer

Captured = pytest.CaptureFixture[str]
BUNDLE = Path(__file__).parents[1] / "data_files" / "eval_bundle"


def run(*arguments: str) -> int:
    return main([*arguments])


def run_json(capsys: Captured, *arguments: str) -> Any:
    """Run a command that prints JSON and nothing else."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def checkpoint(out: Path, steps: int = 6) -> Path:
    return out / "checkpoints" / f"step-{steps:06d}"


def test_train_prints_the_plan_first_and_the_same_command_goes_on(
    here: Path, recipe_file: Path, capsys: Captured
) -> None:
    command = ["train", str(recipe_file), "--evaluate-every", "3", "--save-every=2"]
    assert run(*command) == 0
    printed = capsys.readouterr()
    assert printed.out.index("parameters: token embedding") < printed.out.index("runs/tiny: 6 steps, loss")
    assert "step 3: validation" in printed.err
    assert "6/6" in printed.err  # the progress bar
    assert run(*command, "--quiet") == 0
    assert "runs/tiny: all 6 steps are done" in capsys.readouterr().out
    saved = Recipe.load("runs/tiny")
    assert (saved.evaluate_every, saved.save_every, saved.data.rows) == (3, 2, 2)


def test_a_depth_is_enough(here: Path, capsys: Captured) -> None:
    small = ["--model.max-seq-len", "32", "--data.rows", "2", "--batch-tokens", "64", "--data.validation-tokens", "99"]
    assert run("train", "--depth", "1", "--num-steps", "2", *small, "--samples.every", "none", "--quiet") == 0
    model = GPT.from_pretrained("runs/d1/checkpoints/step-000002")
    assert model.config is not None
    assert (model.config.num_layers, model.config.head_dim, model.config.vocab_size) == (1, 64, 257)
    assert Path("runs/d1/report/report.html").exists()


def test_own_text_and_a_separator_typed_in_a_shell(here: Path, recipe_file: Path) -> None:
    Path("books.txt").write_text("\n\n".join(f"whale {number} swam past" for number in range(60)))
    data = ["--data.train", "books.txt", "--data.separator", r"\n\n", "--data.held-out", "0.3"]
    assert run("train", str(recipe_file), *data, "--out", "run", "--quiet") == 0
    recipe = Recipe.load("run")
    assert recipe.data.separator == "\n\n"
    assert ValidationSet.load("run/validation.safetensors").num_bytes < 60 * 19


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one child process")
def test_stopped_by_ctrl_c_and_resumed_it_ends_bit_for_bit_the_same(here: Path, recipe_file: Path) -> None:
    arguments = [str(recipe_file), "--num-steps", "100", "--seed", "3", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinygpt", "train", *arguments, "--out", "stopped"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while len(read_metrics("stopped/metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "the state is saved in stopped/checkpoints/step-" in errors
    assert "; to go on: tinygpt resume stopped\n" in errors
    assert "trainer.resume" not in errors
    assert "Traceback" not in errors
    done = len(read_metrics("stopped/metrics.jsonl"))
    assert done < 100
    assert run("resume", "stopped", "--quiet") == 0
    assert run("train", *arguments, "--out", "whole") == 0
    assert everything(checkpoint(here / "stopped", 100)) == everything(checkpoint(here / "whole", 100))


def test_a_longer_run_is_refused_with_its_ways_on_until_it_is_meant(
    here: Path, recipe_file: Path, capsys: Captured
) -> None:
    assert run("train", str(recipe_file), "--out", "run", "--quiet") == 0
    capsys.readouterr()
    assert run("resume", "run", "--num-steps", "9", "--quiet") == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("error: this run would go on differently")
    assert ways(refusal) == {
        "keep the settings of the checkpoint": "tinygpt resume run",
        "go over gradually": "tinygpt resume run --num-steps 9 --rewarm-steps 3",
        "accept it knowingly": "tinygpt resume run --num-steps 9 --accept schedule",
        "begin another run": "tinygpt train run --num-steps 9 --out run-new",
    }
    assert run("train", str(recipe_file), "--model.depth", "2", "--out", "run", "--quiet") == 2
    assert ways(capsys.readouterr().err) == {
        "keep the settings of the checkpoint": "tinygpt resume run",
        "begin another run": f"tinygpt train {recipe_file} --model.depth 2 --out run-new",
    }
    assert run("resume", "run", "--model.dim", "32", "--quiet") == 2  # weights of other shapes cannot be accepted
    assert ways(capsys.readouterr().err) == {
        "keep the settings of the checkpoint": "tinygpt resume run",
        "begin another run": "tinygpt train run --model.dim 32 --out run-new",
    }
    assert Recipe.load("run").num_steps == 6
    assert run("resume", "run", "--num-steps", "9", "--rewarm-steps", "2", "--quiet") == 0
    assert run("resume", "run", "--num-steps", "12", "--accept", "schedule", "--quiet") == 0
    assert Recipe.load("run").num_steps == 12
    assert run("resume", "run", "--quiet") == 0
    assert run("train", "run", "--out", "again", "--quiet") == 0
    assert checkpoint(here / "again", 12).is_dir()


def ways(refusal: str) -> dict[str, str]:
    """Return the commands that a refused resume offers."""
    return dict(re.findall(r"^  - (.*?): (.*)$", refusal, re.MULTILINE))


def test_every_way_on_can_be_typed_as_it_is_printed(here: Path, recipe_file: Path, capsys: Captured) -> None:
    assert run("train", str(recipe_file), "--save-every", "2", "--keep-last", "none", "--out", "run", "--quiet") == 0
    capsys.readouterr()
    assert run("resume", "run", "--num-steps", "9", "--quiet") == 2
    offered = ways(capsys.readouterr().err)
    branch = offered["branch from before the decay, where no rate jumps"]
    assert branch == "tinygpt train run --num-steps 9 --from run/checkpoints/step-000002 --out run-branch"
    keep, gradually, accept, begin = (
        offered[way]
        for way in (
            "keep the settings of the checkpoint",
            "go over gradually",
            "accept it knowingly",
            "begin another run",
        )
    )
    shutil.copytree("run", "spare")
    for command in (keep, gradually, accept.replace(" run ", " spare "), branch, begin):
        assert run(*shlex.split(command)[1:], "--quiet") == 0, command
    for folder in ("run", "spare", "run-branch", "run-new"):
        assert checkpoint(here / folder, 9).is_dir()
    resumed = [line for line in read_metrics("run-branch/metrics.jsonl") if line["event"] == "resume"]
    assert [(line["step"], line["checkpoint"]) for line in resumed] == [(1, "run/checkpoints/step-000002")]
    shutil.rmtree("run")  # the branch goes on without what it came from
    capsys.readouterr()
    assert run("resume", "run-branch", "--quiet") == 0
    assert "run-branch: all 9 steps are done" in capsys.readouterr().out


def test_a_branch_from_nowhere_makes_no_folder(here: Path, recipe_file: Path, capsys: Captured) -> None:
    assert run("train", str(recipe_file), "--from", "absent", "--out", "run") == 2
    assert capsys.readouterr().err == "error: there is no checkpoint folder absent.\n"
    assert not Path("run").exists()


def test_a_branch_that_could_not_begin_is_refused_and_makes_no_folder(
    here: Path, finished_run: Path, recipe_file: Path, capsys: Captured
) -> None:
    last = str(finished_run / "checkpoints" / "step-000006")
    assert run("train", str(recipe_file), "--from", last, "--out", str(finished_run)) == 2
    assert "is of the run" in capsys.readouterr().err
    assert run("train", str(recipe_file), "--from", last, "--out", "run") == 2
    assert "stands at step 6 and this run ends at 6, so nothing is left to train" in capsys.readouterr().err
    line = ["train", str(recipe_file), "--from", last, "--num-steps", "9", "--rewarm-steps", "4", "--out", "run"]
    assert run(*line) == 2
    assert "--rewarm-steps 4 is longer than what is left of the run, 3 steps." in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_branch_may_come_from_a_folder_of_any_name(
    here: Path, finished_run: Path, recipe_file: Path, capsys: Captured
) -> None:
    shutil.copytree(finished_run / "checkpoints" / "step-000006", "good one")
    command = ["train", str(recipe_file), "--from", "good one", "--num-steps", "9", "--out", "a run"]
    assert run(*command, "--quiet") == 2
    gradually = ways(capsys.readouterr().err)["go over gradually"]
    assert gradually.endswith("--out 'a run' --from 'good one' --num-steps 9 --rewarm-steps 3")
    assert run(*shlex.split(gradually)[1:], "--quiet") == 0
    assert "next: tinygpt generate 'a run' -p 'The '" in capsys.readouterr().out
    assert run(*command, "--quiet") == 0
    assert "a run has checkpoints of its own and goes on from them" in capsys.readouterr().err


def test_a_branch_from_before_the_decay_accepts_what_no_branch_undoes(
    here: Path, recipe_file: Path, capsys: Captured
) -> None:
    assert run("train", str(recipe_file), "--save-every", "2", "--keep-last", "none", "--out", "run", "--quiet") == 0
    capsys.readouterr()
    assert run("resume", "run", "--num-steps", "9", "--batch-tokens", "64", "--quiet") == 2
    branch = ways(capsys.readouterr().err)["branch from before the decay, where no rate jumps"]
    assert " --batch-tokens 64 --accept schedule --from run/checkpoints/step-000004 " in branch
    assert run(*shlex.split(branch)[1:], "--quiet") == 0


def test_the_name_of_a_run_that_no_tracker_takes_is_refused_before_any_work(
    here: Path, recipe_file: Path, capsys: Captured
) -> None:
    pytest.importorskip("tensorboard")
    assert run("train", str(recipe_file), "--tracker", "tensorboard", "--out", "a run") == 2
    assert capsys.readouterr().err.startswith("error: run='a run': the name of a run in a tracker")
    assert not Path("a run").exists()


@pytest.mark.parametrize("step", [3, 6])
def test_a_stop_says_how_to_go_on_and_after_the_last_step_that_there_is_nothing_left(
    step: int, here: Path, recipe_file: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")

    def measure(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)  # as if Ctrl-C were pressed while the step is being measured
        return evaluate_bpb(*arguments, **options)

    monkeypatch.setattr("tinygpt.recipe._build.evaluate_bpb", measure)
    with pytest.raises(SystemExit) as stop:
        run("train", str(recipe_file), "--evaluate-every", str(step), "--out", "run", "--quiet")
    assert stop.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    if step == 6:
        assert last == "stopped after step 5: that was the last one, training is complete."
    else:
        saved = checkpoint(Path("run"), 3)
        assert last == f"stopped after step 2: the state is saved in {saved}; to go on: tinygpt resume run"


def test_numbers_go_to_a_tracker_and_a_resume_goes_on_with_its_run(here: Path, recipe_file: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = ["train", str(recipe_file), "--evaluate-every", "3", "--tracker", "tensorboard", "--out", "run"]
    assert run(*command, "--quiet") == 0
    assert Recipe.load("run").trackers == ["tensorboard"]
    assert run("resume", "run", "--num-steps", "9", "--rewarm-steps", "2", "--quiet") == 0
    assert run("resume", "run", "--quiet") == 0  # nothing is left to send
    events = EventAccumulator("run/tensorboard/tinygpt/run").Reload()
    steps = [line for line in read_metrics("run/metrics.jsonl") if line["event"] == "step"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in steps
    ]
    assert [e.step for e in events.Scalars("validation/bpb")] == [2, 5, 8]


def test_a_run_that_is_past_the_steps_asked_for_says_so_and_stays_as_it_is(
    finished_run: Path, recipe_file: Path, capsys: Captured
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished_run.rglob("*"))
    for command in (["resume", str(finished_run)], ["train", str(recipe_file), "--out", str(finished_run)]):
        assert run(*command, "--num-steps", "3", "--quiet") == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"error: {finished_run} stands at step 6, past the 3 steps asked for")
        assert f"go on as it was by tinygpt resume {finished_run}" in said.err
    assert sorted((path, path.stat().st_mtime_ns) for path in finished_run.rglob("*")) == before


def test_what_a_depth_makes_of_a_model_can_be_changed_beside_it(capsys: Captured) -> None:
    for option, heads, dim in (("--model.head-dim=32", 4, 128), ("--model.width-per-layer=32", 1, 64)):
        assert run("plan", "--depth", "2", option, "--show-recipe") == 0
        model = json.loads(capsys.readouterr().out)["model"]
        assert (model["num_layers"], model["num_heads"], model["dim"], model["max_seq_len"]) == (2, heads, dim, 256)


def test_plan_as_text_as_json_and_as_a_recipe(here: Path, recipe_file: Path, capsys: Captured) -> None:
    assert run("plan", str(recipe_file), "--gpu", "RTX 4070", "--mfu", "0.25") == 0
    assert "on one RTX 4070, if it reaches 25% of its peak" in capsys.readouterr().out
    plan = run_json(capsys, "plan", str(recipe_file))
    assert (plan["num_steps"], plan["tokens"], plan["seconds"]) == (6, 768, None)
    assert plan["advice"] is plan["fits"] is None
    assert run("plan", "--depth", "12", "--gpu", "RTX 4070", "--show-recipe") == 0
    Path("own.json").write_text(capsys.readouterr().out)
    assert Recipe.load("own.json").model.dim == 768
    assert list(here.iterdir()) == [here / "own.json"]


def test_a_tokenizer_is_trained_measured_and_used(here: Path, capsys: Captured) -> None:
    Path("a.txt").write_text("a whale is no fish\n" * 99)
    Path("b.jsonl").write_text('{"text": "a ship is no whale"}\n' * 99)
    command = ["tokenizer", "train", "a.txt", "b.jsonl", "--vocab-size", "280", "--quiet"]
    assert run(*command, "--out", "small", "--validation", "embedded") == 0
    assert "a sample of validation, cut into tokens" in capsys.readouterr().out
    figures = run_json(capsys, *command, "--out", "again")
    tokenizer = load_tokenizer("small")
    assert figures["fingerprint"] == tokenizer.fingerprint() == load_tokenizer("again").fingerprint()
    assert figures["train"]["documents"] == 100
    assert figures["train"]["bytes_per_token"] > 1
    assert run("tokenizer", "train", "embedded", "--vocab-size", "300", "--out", "book", "--quiet") == 0
    assert "300 token ids" in capsys.readouterr().out


def test_generate_writes_what_the_library_writes(finished_run: Path, capsys: Captured) -> None:
    folder = checkpoint(finished_run)
    model, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    options = {"max_new_tokens": 8, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}
    expected = {prompt: "".join(stream_text(model, tokenizer, prompt, **options)) for prompt in ("Call me", "A")}
    arguments = ["-n", "8", "--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--seed", "3"]
    capsys.readouterr()
    for source in (finished_run, folder):
        assert run("generate", str(source), "-p", "Call me", *arguments) == 0
        assert capsys.readouterr().out == "Call me" + expected["Call me"] + "\n"
    assert run("generate", str(finished_run), "-p", "Call me", "-p", "A", *arguments, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["prompt"]: line["text"] for line in lines} == expected


def test_generate_reads_prompts_from_standard_input(
    finished_run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert run("generate", str(finished_run), "-n", "2", "--seed", "1") == 0
    parts = capsys.readouterr().out.split("--------\n")
    assert [part[:3] for part in parts] == ["one", "two"]
    terminal = io.StringIO("")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert run("generate", str(finished_run)) == 2
    assert "there is no prompt; give -p TEXT" in capsys.readouterr().err


def test_generate_stops_slides_and_reads_other_weights(finished_run: Path, capsys: Captured) -> None:
    long = ["generate", str(finished_run), "-p", "Call me", "-n", "60", "--temperature", "0"]
    assert run(*long) == 2
    assert "or pass --overflow slide." in capsys.readouterr().err
    assert run(*long, "--overflow", "slide", "--weights", "float32") == 0
    text = capsys.readouterr().out
    assert run(*long, "--overflow", "slide", "--stop", text[12]) == 0
    assert len(capsys.readouterr().out) < len(text)
    assert run(*long, "--temperature", "-1") == 2
    assert "temperature" in capsys.readouterr().err


def test_eval_measures_what_the_library_measures(finished_run: Path, here: Path, capsys: Captured) -> None:
    model = GPT.from_pretrained(checkpoint(finished_run))
    own = ValidationSet.load(finished_run / "validation.safetensors")
    expected = evaluate_bpb(model, own)
    found = run_json(capsys, "eval", str(finished_run))
    assert (found["bpb"], found["data_hash"]) == (expected.bpb, expected.data_hash)
    Path("a.txt").write_text("Call me Ishmael.\n\nSome years ago.")
    source = TextDocuments(["Call me Ishmael.", "Some years ago."])
    other = ValidationSet.from_source(source, ByteTokenizer(), rows=8, seq_len=32)
    cut = ["--separator", r"\n\n"]
    found = run_json(capsys, "eval", str(finished_run), "--validation", "a.txt", *cut)
    assert (found["bpb"], found["data_hash"]) == (evaluate_bpb(model, other).bpb, other.hash)
    domains = ["--domains", "whales=a.txt", "book=embedded", "--max-tokens", "300", "--quiet", *cut]
    found = run_json(capsys, "eval", str(finished_run), *domains)["domains"]
    assert found["whales"]["bpb"] == evaluate_bpb(model, other).bpb
    assert found["mean_bpb"] == pytest.approx((found["whales"]["bpb"] + found["book"]["bpb"]) / 2)
    assert run("eval", str(finished_run), *domains) == 0
    assert "all, by bytes" in capsys.readouterr().out


def test_eval_refuses_what_a_saved_set_cannot_follow(finished_run: Path, capsys: Captured) -> None:
    for option in (["--max-tokens", "9"], ["--text-key", "body"], ["--separator", r"\n"]):
        assert run("eval", str(finished_run), *option) == 2
        assert capsys.readouterr().err.endswith("a saved validation set is measured as it is.\n")


def test_eval_looks_at_the_folder_of_results_before_it_asks(finished_run: Path, here: Path, capsys: Captured) -> None:
    (here / "file").write_text("")
    assert run("eval", str(finished_run), "--core", str(BUNDLE), "--results", "file") == 2
    assert "file is a file, and results are kept in a folder; choose another name." in capsys.readouterr().err


def test_eval_asks_the_questions_of_a_bundle(finished_run: Path, capsys: Captured) -> None:
    pytest.importorskip("yaml")
    asked = ["--core", str(BUNDLE), "--max-per-task", "2", "--quiet"]
    found = run_json(capsys, "eval", str(finished_run), *asked, "--tasks", "brackets")["core"]
    assert [task["label"] for task in found["tasks"]] == ["brackets"]
    assert found["tasks"][0]["num_items"] == 2
    assert run("eval", str(finished_run), *asked, "--tasks", "absent") == 2
    assert "has no task absent" in capsys.readouterr().err


def test_export_and_import_give_the_model_back(finished_run: Path, here: Path, capsys: Captured) -> None:
    found = run_json(capsys, "export", str(finished_run), "exported")
    assert found["architecture"] is None  # smear, backout and value embeddings exist in no class of transformers
    assert run("export", str(finished_run), "exported") == 2
    assert "choose another folder or give --overwrite." in capsys.readouterr().err
    assert run("export", str(finished_run), "exported", "--overwrite", "--dtype", "float32") == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    found = run_json(capsys, "import", "exported", "back")
    model, back = GPT.from_pretrained(checkpoint(finished_run)), GPT.from_pretrained("back")
    assert found["parameters"] == back.num_parameters().total
    assert all(bool((a == b).all()) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    assert load_tokenizer("back").encode("Call") == ByteTokenizer().encode("Call")


def test_import_reads_nanochat_by_itself(here: Path, capsys: Captured) -> None:
    write_example(Path("nanochat"))
    assert run("import", "nanochat/base_checkpoints/d12", "model") == 0
    assert "with a tokenizer\nstep 100" in capsys.readouterr().out
    assert run("generate", "model", "-p", "whale", "-n", "3") == 0
    assert run("import", "nanochat/base_checkpoints/d12", "other", "--step", "99") == 2
    assert "has no step 99; it has 100" in capsys.readouterr().err


def test_info_knows_everything_that_is_written(finished_run: Path, here: Path, capsys: Captured) -> None:
    folder = checkpoint(finished_run)
    tokenize_documents(TextDocuments(["one", "two"]), ByteTokenizer(), "shards", processes=1)
    GPT.from_pretrained(folder).save_pretrained("model")
    write_example(Path("nanochat"))
    recipe = run_json(capsys, "info", str(finished_run / "recipe.json"))
    assert (recipe["kind"], recipe["recipe"]["num_steps"]) == ("recipe", 6)
    found = run_json(capsys, "info", str(finished_run))
    assert (found["kind"], found["steps done"], found["checkpoints"]) == ("run", 6, {"step-000006": "whole"})
    assert found["parameters"]["total"] == found["weights"]
    assert found["bpb"] > 0
    found = run_json(capsys, "info", str(folder))
    assert (found["kind"], found["state"], found["step"], found["tokens"]) == ("checkpoint", "whole", 6, 768)
    assert found["tokenizer fingerprint"] == ByteTokenizer().fingerprint()
    assert run_json(capsys, "info", "model")["kind"] == "model"
    assert run_json(capsys, "info", "shards")["tokens"] == 6
    assert run_json(capsys, "info", str(finished_run / "tokenizer"))["vocab size"] == 257
    assert run_json(capsys, "info", str(finished_run / "validation.safetensors"))["text bytes"] == 500
    assert run_json(capsys, "info", "nanochat/base_checkpoints/d12")["steps"] == [100]
    for path in (finished_run, folder, "shards"):
        assert run("info", str(path)) == 0
        assert "whole" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_damaged_is_begun_anew_by_a_command_that_there_is(
    finished_run: Path, here: Path, capsys: Captured
) -> None:
    shutil.copytree(finished_run, "run")
    weights = checkpoint(here / "run") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint"):
        assert run("resume", "run", "--quiet") == 2
    assert "choose another folder, by tinygpt train run --out NEW, to start over." in capsys.readouterr().err
    assert run("train", "run", "--out", "NEW", "--quiet") == 0


def test_info_sees_damage(finished_run: Path, here: Path, capsys: Captured) -> None:
    shutil.copytree(finished_run, "run")
    weights = checkpoint(Path("run")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "damaged" in run_json(capsys, "info", "run")["checkpoints"]["step-000006"]
    assert "damaged" in run_json(capsys, "info", str(checkpoint(Path("run"))))["state"]
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint"):
        assert run("generate", "run", "-p", "x") == 2
    assert "every checkpoint of the run run is damaged; tinygpt train run --out NEW" in capsys.readouterr().err
    assert run("push", "run", "user/tiny", "--dry-run") == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    shutil.rmtree("run/checkpoints")
    assert run("generate", "run", "-p", "x") == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    tokenize_documents(TextDocuments(["one", "two"]), ByteTokenizer(), "shards", processes=1)
    tokens = next(Path("shards").glob("*.tokens*"), None) or next(Path("shards").glob("*tokens*"))
    tokens.write_bytes(b"\x01" * tokens.stat().st_size)
    assert "damaged" in run_json(capsys, "info", "shards")["state"]


def test_info_without_a_path_is_about_this_machine(capsys: Captured) -> None:
    found = run_json(capsys, "info")
    assert found["device"] in ("cpu", "cuda")
    assert {"torch", "python", "threads", "precision", "extras"} <= found.keys()
    assert run("info") == 0
    assert "extras" in capsys.readouterr().out


def test_nothing_is_coloured_where_there_is_no_terminal(finished_run: Path, capsys: Captured) -> None:
    for command in (["info", str(finished_run)], ["plan", str(finished_run)], ["eval", str(finished_run)]):
        assert run(*command) == 0
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err


def test_plan_says_what_to_choose_in_a_budget(recipe_file: Path, capsys: Captured) -> None:
    plan = run_json(capsys, "plan", str(recipe_file), "--memory", "6.5 GiB")
    assert plan["memory_budget"] == 6.5 * 2**30
    assert plan["fits"] is True
    advice = plan["advice"]
    assert advice["memory"]["total"] == sum(plan["memory_bytes"].values())
    assert run("plan", str(recipe_file), "--memory", "1MB") == 0
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "nothing fits 1 MiB" in text
    options = ["--micro-batch-rows", "1", "--loss-chunk-tokens", "16", "--activation-checkpointing", "mlp"]
    leaner = run_json(capsys, "plan", str(recipe_file), *options)
    assert sum(leaner["memory_bytes"].values()) < sum(plan["memory_bytes"].values())


def test_a_plan_without_a_gpu_is_one_for_this_machine(recipe_file: Path, capsys: Captured) -> None:
    here, there = (
        run_json(capsys, "plan", str(recipe_file), "--device", "cpu", "--memory", "5GB", *more)
        for more in ((), ("--gpu", "RTX 4070"))
    )
    assert (here["precision"], there["precision"]) == ("float32", "bfloat16")
    assert here["memory_bytes"]["overhead"] > there["memory_bytes"]["overhead"] == 0
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "without --gpu it is this machine's" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_gpu_without_memory_left_is_told_the_way_on_that_costs_least(
    here: Path, recipe_file: Path, command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"tinygpt.cli._{command}.train", full)
    Recipe.load(recipe_file).save("run")
    assert run(command, "run") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU has too little memory; --micro-batch-rows auto computes as many rows")
    assert "Traceback" not in said


@pytest.mark.parametrize("size", ["much", "0GB", "-1GB", "8 bytes"])
def test_plan_refuses_a_size_that_is_none(recipe_file: Path, capsys: Captured, size: str) -> None:
    assert run("plan", str(recipe_file), f"--memory={size}") == 2
    assert f"--memory {size!r} is no size; write a number and a unit" in capsys.readouterr().err


def test_plan_names_near_cards_for_one_that_is_not_known(recipe_file: Path, capsys: Captured) -> None:
    assert run("plan", str(recipe_file), "--gpu", "RTX 4075") == 2
    assert "'RTX 4070'" in capsys.readouterr().err


def test_info_hashes_each_checkpoint_of_a_run_once(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    hashed: list[Path] = []
    hash_part = manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", lambda part: hashed.append(part[0]) or hash_part(part))
    run_json(capsys, "info", str(finished_run))
    assert hashed
    assert len(hashed) == len(set(hashed))
