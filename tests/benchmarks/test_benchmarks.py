"""Every benchmark runs in its quick mode, prints its table and writes JSON that says where and how it ran."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_"))
# What each file measures beside the time; a script may write more than one file.
FILES = {
    "ablation": {"ablation": {"bpb", "mean_bpb", "spread_bpb", "change_bpb", "parameters"}},
    "attention": {"attention": {"extra_mib"}},
    "checkpoint": {"checkpoint": {"bytes", "share_of_torch"}},
    "compile": {"compile": {"cold_seconds", "warm_seconds", "graphs"}},
    "corpus_size": {"corpus_size": {"peak_mib", "cost_against_smallest"}},
    "decode": {
        "decode": {"tokens_per_second", "first_token_seconds"},
        "decode_position": {"milliseconds_per_token"},
        "decode_weights": {"bpb", "bpb_cost"},
    },
    "gpu_training": {"gpu_training_variants": {"tokens_per_second", "peak_mib", "mfu"}},
    "import_time": {"import_time": {"over_torch_seconds"}},
    "loader": {"loader": {"tokens_per_second"}},
    "loss": {"loss": {"extra_mib"}},
    "low_precision": {"low_precision": {"bpb", "change_bpb"}},
    "memory": {"memory": {"predicted_mib", "measured_mib", "error", "whole_error"}},
    "optimizer_step": {"optimizer_step": {"extra_mib", "extra_fraction"}},
    "packing": {"packing": {"rows_per_second", "lost_fraction"}},
    "training_step": {"training_step": set(), "training_step_peers": {"tokens_per_second", "peak_mib", "extra_mib"}},
}

SLOW = {"compile"}


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: a tiny model on a busy machine waits longer for its threads than it computes.
    # Compiled for no vectors: which kinds a processor has takes the compiler longer to try than the kernels take it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_every_benchmark_is_listed_here() -> None:
    assert {script.stem for script in SCRIPTS} == set(FILES)


@pytest.mark.parametrize(
    "script",
    [pytest.param(script, id=script.stem, marks=[pytest.mark.slow] * (script.stem in SLOW)) for script in SCRIPTS],
)
def test_a_quick_run_prints_a_table_and_writes_what_is_behind_it(script: Path, tmp_path: Path) -> None:
    finished = run(script, "--quick", "--results", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert {path.stem.removesuffix("-quick") for path in tmp_path.iterdir()} == set(FILES[script.stem])
    for path in tmp_path.iterdir():
        content = json.loads(path.read_text("utf-8"))
        assert set(content) == {"benchmark", "machine", "settings", "rounds", "rows"}
        assert set(content["machine"]) >= {"date", "cpu", "cores", "threads", "python", "torch", "tinygpt", "commit"}
        assert len(content["rows"]) >= 2
        assert any(row["speed"] == 1.0 for row in content["rows"]), "no row is the baseline"
        for row in content["rows"]:
            assert set(row) >= {"variant", "median_seconds", "quartile_seconds", "speed", "speed_quartiles"}
            assert set(row) >= FILES[script.stem][content["benchmark"]]
            assert len(row["seconds"]) == content["rounds"] == 2
            assert min(row["seconds"]) <= row["median_seconds"] <= max(row["seconds"])
            assert f"| {row['variant']} " in finished.stdout


def test_memory_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    # 64 MiB of ones in the child, and a gigabyte held by the parent, which must not count.
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import torch\n"
        "from _measure import peak_memory\n"
        "def build(mib):\n"
        "    return lambda: torch.ones(mib * 2**18).sum()\n"
        "if __name__ == '__main__':\n"
        "    held = torch.ones(1024 * 2**18)\n"
        "    print(*((m.extra_mib if m else -1) for m in (peak_memory(build, 64), peak_memory(build, 256))))\n"
    )
    finished = run(script)
    assert finished.returncode == 0, finished.stderr
    small, large = map(float, finished.stdout.split())
    if small < 0:
        pytest.skip("this system does not tell the memory of a process")
    assert 60 < small < 128
    assert 250 < large < 320


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120, check=True
    )


def test_of_the_gpu_set_one_that_fails_or_takes_too_long_stops_no_other() -> None:
    finished = run_code(
        "from _gpu_set import ROOT, Step, run, steps\n"
        "codes = ['', 'raise SystemExit(3)', 'import time; time.sleep(60)']\n"
        "print([run(Step(['-c', code], 0), 5)[0] for code in codes])\n"
        "scripts = [step.arguments[0] for name, step in steps().items() if name != 'tests']\n"
        "print(len(scripts), all((ROOT / script).exists() for script in scripts), steps()['tests'].arguments[-1])\n"
    )
    ends, rest = finished.stdout.splitlines()
    assert ends == "['', 'exit status 3', 'ran out of time']"
    assert rest == "8 True tests/test_gpu.py"


def test_a_case_of_gpu_training_that_fails_says_so_and_leaves_the_others_alone() -> None:
    finished = run_code(
        "import argparse\nfrom gpu_training import Case, GPTConfig, measured\n"
        "config = GPTConfig(num_layers=1, dim=40, num_heads=1, vocab_size=64, max_seq_len=8)\n"
        "cases = [Case('good', config, 1, compile=False), Case('odd', config, 1, compile=False, products='int8')]\n"
        "if __name__ == '__main__':\n"
        "    rows, left_out = measured(cases, argparse.Namespace(rounds=1, device='cpu', seconds=60, ahead=1))\n"
        "    print('', [row['variant'] for row in rows], left_out, sep='\\n')\n"
    )
    variants, left_out = finished.stdout.splitlines()[-2:]
    assert variants == "['good']"
    assert left_out.startswith("{'odd': 'ConfigError: int8 products need widths that are multiples of 16")


def test_a_copy_without_its_repository_is_told_the_commit() -> None:
    code = (
        "import os, _measure\n_measure.__file__ = sys.argv[0] + '/nowhere/benchmarks/x.py'\nprint(_measure._commit())\n"
        "os.environ['TINYGPT_COMMIT'] = ''\nprint(_measure._commit())\n"
    )
    assert run_code(code, TINYGPT_COMMIT="abc1234").stdout == "abc1234\nunknown\n"


def test_a_round_count_below_one_is_refused() -> None:
    finished = run(ROOT / "benchmarks" / "import_time.py", "--rounds", "0")
    assert finished.returncode == 2
    assert "0 is not positive" in finished.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_file_states_its_question_first(script: Path) -> None:
    question = ast.get_docstring(ast.parse(script.read_text("utf-8")))
    assert question is not None
    assert question.splitlines()[0].endswith("?")


def test_help_gives_the_question_and_the_options() -> None:
    help_text = run(ROOT / "benchmarks" / "import_time.py", "--help").stdout
    assert "How much does `import tinygpt` cost" in help_text
    assert all(option in help_text for option in ("--rounds", "--quick", "--results"))
