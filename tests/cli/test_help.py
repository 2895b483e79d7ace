"""Help that does not wait, and mistakes that are answered in one line with status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinygpt
from tinygpt.cli import main
from tinygpt.cli._main import build_parser
from tinygpt.tokenizer import ByteTokenizer

COMMANDS = build_parser()[1]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinygpt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def test_no_help_waits_for_torch() -> None:
    lines = [[command, "--help"] for command in COMMANDS] + [
        ["tokenizer", "train", "--help"],
        ["--help"],
        ["--version"],
    ]
    script = (
        "import sys\nfrom tinygpt.cli import main\n"
        f"for line in {lines!r}:\n"
        "    try: main(line)\n"
        "    except SystemExit as stop: assert not stop.code, line\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'huggingface_hub', 'shtab'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed_and_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: tinygpt {command}")
    assert len(printed.splitlines()) > 5
    with pytest.raises(SystemExit):
        main(["--help"])
    assert command in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_the_parser_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    with pytest.raises(SystemExit):
        main([command, "--help"])
    _, _, example = " ".join(capsys.readouterr().out.split()).partition("example: tinygpt ")
    assert example
    parser, _ = build_parser()
    arguments = shlex.split(example)
    assert parser.parse_args(arguments[: arguments.index(">")] if ">" in arguments else arguments).run


MISTAKES: list[tuple[list[str], str]] = [
    (["trian"], "there is no command 'trian'; did you mean train?"),
    (["abacus"], "there is no command 'abacus' (see tinygpt --help)"),
    ([], "the following arguments are required: COMMAND"),
    (["train"], "give either a recipe file or --depth N"),
    (["train", "--depht", "2"], "such as --depth 4; did you mean --depth?"),
    (["train", "x.toml", "--depth", "2"], "give either a recipe file or --depth N"),
    (["train", "absent.toml"], "the recipe absent.toml cannot be read: No such file or directory"),
    (["train", "--depth", "two"], "argument --depth: invalid int value: 'two'"),
    (["train", "--depth", "0"], "from_depth needs positive numbers"),
    (["train", "--depth", "1", "--sead", "3"], "a recipe has no field 'sead'; did you mean seed?"),
    (["train", "--depth", "1", "--quit"], "--quit is no option of this command, and as a field of a recipe it needs a"),
    (["train", "--depth", "1", "--accept", "all"], "argument --accept: invalid choice: 'all'"),
    (["train", "--depth", "1", "--data.train", "absent.txt", "--out", "r"], "absent.txt does not exist"),
    (
        ["train", "--depth", "1", "--device", "abacus", "--out", "r"],
        "device='abacus' cannot be used: it is none that torch knows; give",
    ),
    (
        ["train", "--depth", "1", "--data.train", "words.txt", "--out", "r"],
        r"unless a separator parts it. Give --data.separator '\n\n' if blank lines part your documents",
    ),
    (["train", "--depth", "1", "--data.rows", "100000000", "--num-steps", "3"], "not a multiple of the loader's batch"),
    (
        ["plan", "--depth", "1", "--data.rows", "100000000", "--batch-tokens", "none"],
        "25,600,000,000 at a time, and no more than 1,048,576 are planned for; choose 4,096 rows or fewer.",
    ),
    (
        [
            "train",
            "--depth",
            "1",
            "--matmul-precision",
            "int8",
            "--model.head-dim",
            "16",
            "--model.width-per-layer",
            "16",
        ],
        "32 wide, as int8 products need; take a wider model, or leave --matmul-precision out.",
    ),
    (
        ["train", "--depth", "1", "--data.train", "words.txt", "--data.separator", "@@@"],
        "Parted by '@@@' the text has 1 document. Give another --data.separator, or --data.validation TEXT.",
    ),
    (["tokenize", "embedded", "words.txt/out", "--tokenizer", "bytes"], "out cannot be read or written: "),
    (["tokenizer", "train", "words.txt", "--vocab-size", "270", "--out", "words.txt/out"], "lies in a file"),
    (
        ["tokenizer", "train", "words.txt", "--vocab-size", "270", "--out", "out", "--validation", "a.jsonl"],
        "a.jsonl line 1 has no key 'text'",
    ),
    (["push", "absent", "user/repo", "--dry-run", "--tag", "x y"], "'x y' is no name for a tag or branch"),
    (["push", "absent", "user/repo", "--dry-run", "--branch", "x y"], "'x y' is no name for a tag or branch"),
    (["train", "--depth", "1", "--batch-tokens", "1000"], "batch_tokens=1000 is not a multiple of the loader's batch"),
    (
        ["train", "--depth", "1", "--batch-tokens", "3000", "--out", "r"],
        "a multiple of the loader's batch of 8 x 256 = 2048 tokens; choose 2048 or 4096.",
    ),
    (["train", "--depth", "1", "--num-steps", "5", "--schedules.lr.warmup-steps", "9"], "fit a run of 5 steps; choose"),
    (["train", "--depth", "1", "--data.train", "notes.md", "--out", "r"], "give the file the ending of what it holds."),
    (["train", "--depth", "1", "--data.train", "mixed", "--out", "r"], "put each kind into a folder of its own"),
    (["train", "--depth", "1", "--data.train", "a.jsonl", "--out", "r"], "choose one with --data.text-key."),
    (["train", "--depth", "1", "--data.validation", "absent", "--out", "r"], "absent does not exist."),
    (["train", "--depth", "1", "--tracker", "abacus"], "argument --tracker: invalid choice: 'abacus'"),
    (["train", "words.txt"], "words.txt is text and no recipe; try --depth 4 --data.train words.txt"),
    (["tokenize", "a.jsonl", "s", "--tokenizer", "t"], "no tokenizer can be read from t: tokenizer_config.json"),
    (["tokenizer", "train", "a.jsonl", "--vocab-size", "300", "--out", "t", "--quiet"], "choose one with --text-key."),
    (["train", "--depth", "100000"], "num_layers=100000: input should be less than or equal to 1000. GPTConfig.dim="),
    (["train", "--depth", "1", "--tokens-per-parameter", "nan"], "--tokens-per-parameter nan is not a positive number"),
    (["train", "--depth", "1", "--data.train", "", "--out", "r"], "DataRecipe.train='': string should have at least 1"),
    (["train", "--depth", "1", "--tokenizer", "", "--out", "r"], "folder='': string should have at least 1 character"),
    (["train", "--depth", "1", "--out", ""], "argument --out: the path is empty; is a variable of the shell not set?"),
    (["train", "--depth", "1", "--from", ""], "argument --from: the path is empty"),
    (["train", ""], "argument RECIPE: the path is empty"),
    (["train", "leaves.py"], "leaves.py failed with SystemExit: 0"),
    (["train", "--depth", "1", "--rewarm-steps", "0", "--out", "r"], "--rewarm-steps 0 is not a number of steps"),
    (
        ["train", "--depth", "1", "--data.train", "https://a.b/c.txt", "--out", "r"],
        "https://a.b/c.txt is an address; give a file or a folder, downloaded first, or hf://datasets/USER/NAME/",
    ),
    (
        ["train", "--depth", "1", "--data.seq-len", "512", "--out", "r"],
        "data.seq_len=512 is longer than model.max_seq_len=256; choose shorter rows, or a model with a longer context.",
    ),
    (["train", "--depth", "1", "--push.repo", "nonsense", "--out", "r"], "'nonsense' is not a Hub name; give 'user/re"),
    (["train", "--depth", "1", "--device", "mps", "--out", "r"], "device='mps' cannot be used: "),
    (["resume"], "the following arguments are required: RUN"),
    (["resume", ""], "argument RUN: the path is empty"),
    (["resume", "absent"], "there is no run absent; tinygpt train begins one"),
    (["resume", "."], "holds no recipe.json, so it is no run that was made from a recipe"),
    (["plan", "--depth", "2", "--gpu", "Abacus"], "the peak of 'Abacus' in bfloat16 is not known"),
    (["plan", "--depth", "2", "--mfu", "2"], "mfu=2.0 is not a share"),
    (["tokenizer"], "the following arguments are required: ACTION"),
    (["tokenizer", "trian"], "invalid choice: 'trian'"),
    (["tokenizer", "train", "absent", "--vocab-size", "300", "--out", "t"], "absent does not exist"),
    (["tokenizer", "train", "embedded", "--vocab-size", "9", "--out", "t"], "vocab_size=9 has no room for 256 bytes"),
    (
        ["tokenizer", "train", "embedded", "--vocab-size", "99999999999", "--out", "t"],
        "vocab_size=99999999999 is more than a model takes; choose 16,777,216 or less.",
    ),
    (
        ["tokenizer", "train", "embedded", "--vocab-size", "300", "--max-characters", "0", "--out", "t"],
        "max_characters=0 is not positive",
    ),
    (
        ["tokenizer", "train", "embedded", "--vocab-size", "300", "--out", "words.txt/t"],
        "--out words.txt/t is or lies in a file, and a tokenizer is a folder",
    ),
    (["serve", "absent", "--allow-origin", "a.b"], "'a.b', which no browser sends; write https://example.org, without"),
    (["eval", "absent"], "'absent' is neither an existing folder"),
    (["eval", "absent", "--tasks", "a"], "--tasks, --max-per-task and --results are about the questions of --core"),
    (["eval", "."], ". brings no validation set"),
    (["eval", "absent", "--domains", "x"], "--domains x has no name; write NAME=TEXT"),
    (["eval", "absent", "--validation", "embedded"], "'absent' is neither an existing folder"),
    (["eval", "", "--validation", "a.txt"], "argument RUN_OR_REPO: the path is empty"),
    (["eval", "absent", "--domains", "x="], "--domains x= has no text; write NAME=TEXT"),
    (["eval", "absent", "--domains", "x=a.txt", "x=b.txt"], "--domains has two texts of one name; give each a name of"),
    (["eval", "absent", "--validation", "a.safetensors", "--max-tokens", "9"], "a saved validation set is measured as"),
    (["eval", "absent", "--validation", "embedded", "--max-tokens", "0"], "--max-tokens 0 is not positive; choose 1"),
    (
        ["generate", "empty", "--revision", "main", "-p", "x"],
        "--revision is for a repository of the Hub, and empty is a",
    ),
    (["generate", "absent", "-p", "x"], "'absent' is neither an existing folder"),
    (["generate", "empty", "-p", "x"], "empty is an empty folder; give a run (its newest whole checkpoint)"),
    (["generate", "mixed", "-p", "x"], "mixed holds no model but a.jsonl, words.txt; give a run"),
    (["generate", "theirs", "-p", "x"], "theirs holds a checkpoint of nanochat, which tinygpt import reads; give"),
    (["generate", "runs", "-p", "x"], "runs holds runs, and no model itself: runs/one; give a run"),
    (["generate", "runs/one/checkpoints", "-p", "x"], "holds the checkpoints of the run runs/one; give a run"),
    (["generate", "absent", "--temprature", "3"], "did you mean --temperature?"),
    (["generate", "absent", "--temp", "3"], "did you mean --temperature?"),
    (["generate", "absent", "-p", "x", "--device", "abacus"], "device='abacus' cannot be used"),
    (["chat", "absent", "--temperature", "-1", "--top-p", "0"], "greater than or equal to 0. GenerationConfig.top_p="),
    (["export", "absent", "out"], "'absent' is neither an existing folder"),
    (["import", "absent", "out"], "'absent' is neither an existing folder"),
    (["import", "absent", "out", "--step", "3"], "--step and --tokenizer are for checkpoints of nanochat"),
    (["import", "absent", "out", "--format", "nanochat"], "there is no folder absent"),
    (
        ["import", "empty", "out"],
        "empty is an empty folder; give a folder of transformers (config.json, *.safetensors)",
    ),
    (["import", "runs/one", "out"], "runs/one is of tinygpt itself; the other commands read it as it is."),
    (["push", "runs/one", "nonsense"], "'nonsense' is not a Hub name; give 'user/repo'"),
    (["report", "words.txt"], "words.txt is a file; give the folder of a run."),
    (
        ["report", "metrics", "--out", "words.txt"],
        "words.txt: File exists; choose another folder with --out.",
    ),
    (["report", ""], "argument RUN: the path is empty"),
    (["report", "empty"], "empty has no metrics.jsonl; give the folder of a run."),
    (["compare", "empty"], "1 run cannot be compared; give 2 to 24."),
    (["import", "absent", "."], ". is there already; choose a new or empty folder"),
    (["info", "a", "b"], "'b' is more than this command takes"),
    (["train", "a.toml", "b.toml"], "'b.toml' is more than this command takes"),
    (["info", "absent"], "'absent' is neither an existing folder"),
    (["info", "."], ". is neither a run, a checkpoint, a model"),
    (["info", "words.txt"], "It is text to train on: tinygpt train --depth 4 --data.train words.txt"),
    (["info", "two words.txt"], "tinygpt train --depth 4 --data.train 'two words.txt'"),
    (["info", ""], "argument PATH_OR_REPO: the path is empty"),
    (["completion", "cmd"], "invalid choice: 'cmd'"),
    (["completion"], "the following arguments are required: shell"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) or "nothing" for a, _ in MISTAKES])
def test_a_mistake_is_one_line_with_status_2(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "file").write_text("")
    (here / "words.txt").write_text("one document")
    (here / "leaves.py").write_text("raise SystemExit(0)")
    (here / "two words.txt").write_text("one document")
    ByteTokenizer().save(here / "bytes")
    for folder in ("empty", "metrics", "mixed", "theirs", "runs/one/checkpoints/step-000001"):
        (here / folder).mkdir(parents=True)
    for name in (
        "notes.md",
        "metrics/metrics.jsonl",
        "mixed/words.txt",
        "theirs/model_000001.pt",
        "runs/one/checkpoints/step-000001/state.json",
    ):
        (here / name).write_text("one document")
    for name in ("a.jsonl", "mixed/a.jsonl"):
        (here / name).write_text('{"body": "one document"}\n')
    try:
        status: object = main(arguments)
    except SystemExit as stop:  # from the parser
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""  # a mistake is named before any plan is shown
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_what_is_refused_before_training_leaves_no_folder(here: Path) -> None:
    narrow = ["--model.head-dim", "16", "--model.width-per-layer", "16", "--matmul-precision", "int8"]
    assert main(["train", "--depth", "1", *narrow, "--out", "run"]) == 2
    Path("words.txt").write_text("too few words")
    tokenizer = ["tokenizer", "train", "words.txt", "--out", "tokenizer", "--quiet"]
    assert main([*tokenizer, "--vocab-size", "30000"]) == 2
    Path("bad.txt").write_bytes(b"caf\xe9")
    assert main([*tokenizer, "--vocab-size", "270", "--validation", "bad.txt"]) == 2
    assert sorted(path.name for path in here.iterdir()) == ["bad.txt", "words.txt"]


def test_validation_without_text_is_refused_before_the_tokenizer_is_trained(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("words.txt").write_text("some words")
    Path("blank.jsonl").write_text('{"text": ""}\n')
    line = ["tokenizer", "train", "words.txt", "--vocab-size", "270", "--out", "out", "--validation", "blank.jsonl"]
    assert main(line) == 2
    assert capsys.readouterr().err.startswith("error: --validation blank.jsonl has documents and no text in them")


def test_a_refused_device_is_named_in_few_words(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "absent", "-p", "x", "--device", "mps"]) == 2
    assert len(capsys.readouterr().err) < 200  # torch tells all that it could run on instead


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
@pytest.mark.skipif(sys.platform == "win32", reason="the shell of Windows closes no stream")
def test_a_closed_stream_is_no_traceback(finished_run: Path, closed: str) -> None:
    command = f"{sys.executable} -m tinygpt generate {finished_run} -p a -n 2 {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_text_that_the_output_cannot_show_is_replaced_there(finished_run: Path) -> None:
    done = run("generate", str(finished_run), "-p", "é 日", "-n", "0", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "? ?\n", "")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
@pytest.mark.parametrize("command", ["generate", "eval", "info"])
def test_too_little_memory_is_one_line(
    command: str, error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise error

    module = "_inspect.describe_path" if command == "info" else f"_{command}.load_source"
    monkeypatch.setattr(f"tinygpt.cli.{module}", run_out)
    rest = {"generate": ["-p", "x"], "eval": ["--validation", "embedded"], "info": []}[command]
    assert main([command, ".", *rest]) == 2
    assert capsys.readouterr().err.startswith("error: there is too little memory for this; take fewer rows")


def test_version_help_and_no_traceback_in_a_process_of_its_own() -> None:
    assert run("--version").stdout == f"tinygpt {tinygpt.__version__}\n"
    wrong = run("info", "absent")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Traceback" not in wrong.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m tinygpt plan --depth 2 --show-recipe | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 0 if everything fitted into the pipe before it was closed


def test_a_missing_package_names_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == 'error: completion scripts need shtab: pip install "tinygpt[cli]".\n'


def test_a_missing_tracker_names_its_extra_before_the_plan(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--depth", "1", "--tracker", "wandb", "--out", "run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith('pip install "tinygpt[wandb]".\n')
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "rewarm-steps", "max-new-tokens"):
        assert word in script


def test_the_bash_script_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = 'COMP_WORDS=(tinygpt tra); COMP_CWORD=1; _shtab_tinygpt; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"source {tmp_path / 'script'}; {ask}"], capture_output=True, text=True)
    assert done.stdout.split() == ["train"]
