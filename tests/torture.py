"""Kill a training run at random moments, damage checkpoints in random ways, and count what comes of it.

    python tests/torture.py --kills 50 --corruptions 500 --seed 0

Every killed run is resumed, and must end with the weights and moments of a run that nobody disturbed, bit for bit.
Every damaged checkpoint must be refused by name and passed over by `resume`; where the damage comes with a manifest
made to fit, as only an attacker would do, it may load, but runs no code and raises nothing but our own errors.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tinygpt import GPT, GPTConfig, Trainer, TrainerConfig
from tinygpt.checkpoint import latest_checkpoint, list_checkpoints, load_state
from tinygpt.data import BatchLoader, TextDocuments
from tinygpt.errors import CheckpointError, TinyGPTError
from tinygpt.optim import MuonAdamW
from tinygpt.schedules import warmup_stable_decay
from tinygpt.tokenizer import ByteTokenizer

NUM_STEPS, SAVE_EVERY = 16, 2
TEXTS = [f"document {number} " * (number % 7 + 1) for number in range(40)]


def make_trainer(out: Path, **settings: Any) -> Trainer:
    """Return a trainer of a tiny model whose run can be repeated."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(2, head_dim=16, width_per_layer=16, vocab_size=257, max_seq_len=16)
    model = GPT.from_config(config)
    loader = BatchLoader(TextDocuments(TEXTS), ByteTokenizer(), rows=2, seq_len=16, buffer_documents=8)
    fields = {"num_steps": NUM_STEPS, "save_every": SAVE_EVERY, "keep_last": 2, "keep_every": 8, "keep_best": 1}
    return Trainer(
        model,
        MuonAdamW.for_model(model),
        loader,
        TrainerConfig(out_dir=str(out), **{**fields, **settings}),
        schedules={"lr": warmup_stable_decay(NUM_STEPS, warmup_steps=2, decay_fraction=0.5)},
    )


def train(out: str) -> None:
    """Go on with the run in a folder to its end; what a child process does until it is killed."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(action="error"):  # a kill must not even leave a damaged checkpoint behind
        trainer = make_trainer(Path(out))
        trainer.resume()
        for step in trainer:
            trainer.record("evaluation", bpb=step.loss, data_hash="training loss")


def start(out: Path) -> ForkServerProcess:
    """Train in a new process, made from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torture", "tinygpt.trainer"])
    process = context.Process(target=train, args=(str(out),))
    process.start()
    return process


def run_to_end(out: Path) -> float:
    """Train without disturbance and return the seconds it took."""
    began = time.monotonic()
    process = start(out)
    process.join()
    assert process.exitcode == 0, f"the undisturbed run ended with {process.exitcode}"
    return time.monotonic() - began


def final_files(out: Path) -> list[bytes]:
    """Return weights and moments of the finished run."""
    folder = out / "checkpoints" / f"step-{NUM_STEPS:06d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def kill(folder: Path, kills: int, draw: random.Random, say: Callable[[str], None]) -> Counter[str]:
    """Kill runs that often, resume each, and compare every finished one; return what the killed were doing."""
    seconds = run_to_end(folder / "undisturbed")
    expected = final_files(folder / "undisturbed")
    seen: Counter[str] = Counter()
    done, runs = 0, 0
    while done < kills:
        out, runs = folder / f"run-{runs}", runs + 1
        alive = True
        while alive:
            process = start(out)
            if done < kills and draw.random() < 0.5:
                wait_for_writing(process, out)
                process.join(draw.uniform(0, 0.05))
            else:
                process.join(draw.uniform(0, seconds) if done < kills else None)
            alive = process.is_alive()
            if alive:
                process.kill()
                process.join()
                done += 1
                seen[doing(out)] += 1
                say(f"{done} of {kills} kills")
            assert process.exitcode in (0, -9), f"a resumed run ended with {process.exitcode}, see above"
        assert final_files(out) == expected, f"{out} ended with other weights or moments than the undisturbed run"
        shutil.rmtree(out)
        seen["runs finished, bit-identical"] += 1
    return seen


def wait_for_writing(process: ForkServerProcess, out: Path) -> None:
    """Return when a checkpoint is being written, or the process has ended: else few kills would meet that."""
    while process.is_alive() and not any((out / "checkpoints").glob(".step-*")):
        time.sleep(0.0005)


def doing(out: Path) -> str:
    """Tell from what lies there what a killed process was doing."""
    names = [path.name for path in (out / "checkpoints").glob(".*")]
    if any(name.endswith(".deleted") for name in names):
        return "killed while deleting a checkpoint"
    if any(name.startswith(".step-") for name in names):
        return "killed while writing a checkpoint"
    if names:
        return "killed while naming the latest"
    return "killed elsewhere"


# What happens to a file of a checkpoint: (content, random numbers) -> content.
DAMAGE: dict[str, Callable[[bytearray, random.Random], bytearray]] = {}


def damage(function: Callable[[bytearray, random.Random], bytearray]) -> Callable[..., bytearray]:
    DAMAGE[function.__name__.replace("_", " ")] = function
    return function


@damage
def flip_a_bit(content: bytearray, draw: random.Random) -> bytearray:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


@damage
def cut_short(content: bytearray, draw: random.Random) -> bytearray:
    return content[: draw.randrange(len(content))]


@damage
def zero_a_block(content: bytearray, draw: random.Random) -> bytearray:
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.choice([1, 64, 4096]))
    content[begin:end] = bytes(end - begin)
    return content


@damage
def append_bytes(content: bytearray, draw: random.Random) -> bytearray:
    return content + draw.randbytes(draw.choice([1, 8, 4096]))


VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 10**12, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 5000, "../../x", "\0",
    [], [[]], {}, [1] * 1000, {"$tensor": "absent"}, {"$tensor": []}, {"$tuple": 3}, {"$items": [[[], 1]]},
]  # fmt: skip


def edit_json(content: bytearray, draw: random.Random) -> bytearray:
    """Replace, remove or deepen a random value."""
    document = json.loads(content)
    holder, key = _place(document, draw)
    what = draw.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.2:
        return bytearray(json.dumps(document).replace("1", "[" * 3000 + "1" + "]" * 3000, 1), "utf-8")
    else:
        holder[key] = copy.deepcopy(draw.choice([*VALUES, _place(document, draw)[0]]))
    return bytearray(json.dumps(document), "utf-8")


def _place(document: Any, draw: random.Random) -> tuple[Any, Any]:
    """Walk down at random, so that the many numbers of a random state do not draw all the damage."""
    while True:
        key = draw.choice(list(document) if isinstance(document, dict) else range(len(document)))
        below = document[key]
        if not isinstance(below, dict | list) or not below or draw.random() < 0.2:
            return document, key
        document = below


def edit_header(content: bytearray, draw: random.Random) -> bytearray:
    """Edit the JSON at the head of a safetensors file, or the length that it declares."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.2:
        return bytearray(draw.choice([0, 1, 2**20, 2**40, 2**64 - 1]).to_bytes(8, "little")) + content[8:]
    header = edit_json(content[8 : 8 + size], draw)
    return bytearray(len(header).to_bytes(8, "little")) + header + content[8 + size :]


def spoil(folder: Path, kind: str, other: Path, draw: random.Random) -> None:
    """Do one kind of damage to a random file of a checkpoint."""
    files = sorted(path for path in folder.iterdir())
    path = draw.choice([file for file in files if file.suffix == ".json"] if kind == "edit a JSON value" else files)
    if kind == "delete a file":
        path.unlink()
    elif kind == "swap a file with another checkpoint's":
        path = draw.choice([file for file in files if file.read_bytes() != (other / file.name).read_bytes()])
        shutil.copy(other / path.name, path)
    elif kind == "edit a JSON value":
        path.write_bytes(edit_json(bytearray(path.read_bytes()), draw))
    elif kind.startswith("attack"):
        path = draw.choice([file for file in files if file.name != "manifest.json"])
        edit = edit_json if path.suffix == ".json" else draw.choice([edit_header, *DAMAGE.values()])
        path.write_bytes(edit(bytearray(path.read_bytes()), draw))
        manifest = json.loads((folder / "manifest.json").read_bytes())
        content = path.read_bytes()
        manifest["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        path.write_bytes(DAMAGE[kind](bytearray(path.read_bytes()), draw))


ATTACK = "attack: edit, and fix the manifest"
KINDS = [*DAMAGE, "delete a file", "swap a file with another checkpoint's", "edit a JSON value", ATTACK]
# What a loader of pickles or a plug-in would have to do; sys.audit reports it whoever does it.
CODE = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "marshal.loads", "exec")


def corrupt(folder: Path, count: int, draw: random.Random, say: Callable[[str], None]) -> Counter[str]:
    """Damage checkpoints that often; return what came of it by kind."""
    original = folder / "original"
    list(make_trainer(original, num_steps=6))
    older, newest = list_checkpoints(original / "checkpoints")
    expected, seen = plain(load_state(newest)), Counter[str]()
    code: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in CODE:
            code.append(event)

    sys.addaudithook(watch)
    logging.getLogger("tinygpt").setLevel(logging.ERROR)
    shutil.copytree(original, folder / "warm")
    resume(folder / "warm")
    str(torch.ones(1))  # imports what prints a tensor, which an error may do
    for trial in range(count):
        kind = KINDS[trial % len(KINDS)]
        out = shutil.copytree(original, folder / f"trial-{trial}")
        target = out / "checkpoints" / newest.name
        spoil(target, kind, older, draw)
        watching = True
        try:
            seen[f"{kind}: {check(out, target, kind, expected)}"] += 1
        except Exception as error:
            raise AssertionError(f"trial {trial}, {kind}: {type(error).__name__}: {error}; see {out}") from error
        watching = False
        assert not code, f"trial {trial}, {kind}: loading ran code, {code}; see {out}"
        shutil.rmtree(out)
        say(f"{trial + 1} of {count} corruptions")
    return seen


def check(out: Path, target: Path, kind: str, expected: Any) -> str:
    """Load and resume a damaged checkpoint and say what came of it; raise if that must not be."""
    if kind == ATTACK:
        with contextlib.suppress(CheckpointError):
            GPT.from_pretrained(target)
        try:
            trainer = resume(out)
        except CheckpointError:
            return "refused"
        if not target.exists():
            return "refused, and resumed from the one before"
        trainer.config = trainer.config.replace(num_steps=trainer.next_step + 1, out_dir=None)
        with contextlib.suppress(TinyGPTError):
            next(iter(trainer))
        return "loaded as edited, no code ran"
    message = ""
    try:
        loaded = plain(load_state(target))
    except CheckpointError as error:
        message = str(error)
    if not message:
        assert loaded == expected, "a damaged state was loaded"
        return "nothing that counts had changed"
    assert str(out) in message, f"the error does not name the file: {message}"
    trainer = resume(out)
    assert trainer.next_step == 4, f"resumed at step {trainer.next_step}"
    assert latest_checkpoint(out / "checkpoints") == out / "checkpoints" / "step-000004"
    return "refused, and resumed from the one before"


def resume(out: Path) -> Trainer:
    """Resume a run, whatever differs."""
    trainer = make_trainer(out, num_steps=6)
    with warnings.catch_warnings(action="ignore"):
        assert trainer.resume(accept=["schedule", "data", "model"]) is not None
    return trainer


def plain(value: Any) -> Any:
    """Return a state with tensors as lists, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="(default 50)")
    parser.add_argument("--corruptions", type=int, default=500, help="(default 500)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--folder", type=Path, help="where to work; the system's folder for temporary files otherwise")
    args = parser.parse_args()

    def say(text: str) -> None:
        end = "\r" if sys.stderr.isatty() else "\n"
        if end == "\r" or text.split()[0].endswith(("0", "25", "75")):
            print(text, end=end, file=sys.stderr, flush=True)

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        seen = kill(folder / "kills", args.kills, random.Random(args.seed), say) if args.kills else Counter[str]()
        if args.corruptions:
            seen += corrupt(folder / "corruptions", args.corruptions, random.Random(args.seed), say)
    width = max(map(len, seen), default=0)
    for what in sorted(seen):
        print(f"| {what.ljust(width)} | {seen[what]:5,} |")
    print(f"{args.kills} kills and {args.corruptions} corruptions, seed {args.seed}: all well ", end="")
    print(f"in {time.monotonic() - began:,.0f} s")


if __name__ == "__main__":
    main()
