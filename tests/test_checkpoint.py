import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tinygpt
from tinygpt import manifest
from tinygpt.checkpoint import (
    RunLock,
    SnapshotMemory,
    checkpoint_folder,
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    load_state,
    load_tensors,
    mark_latest,
    remove_old_checkpoints,
    save_state,
    set_aside,
    take_apart,
    verify,
)
from tinygpt.errors import CheckpointError, ConfigError

STATE = {
    "step": 3,
    "ratio": 0.1 + 0.2,
    "name": "ünï",
    "nothing": None,
    "flag": True,
    "pair": (1, (2.5, "x")),
    "list": [1, [2]],
    "numbered": {0: "zero", 1: {"deep": torch.arange(3)}},
    "optimizer": {"a.weight": {"momentum": torch.randn(4, 5), "step": 7}},
    "views": [torch.arange(12).view(3, 4)[1], torch.arange(12).view(3, 4).T],
}


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_any_state_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "a" / "step-000003", STATE)
    assert equal(load_state(folder), STATE)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "state.safetensors",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["step-000003"]


def test_saving_again_under_the_same_name_replaces_it_whole(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "step-000003", {"old": torch.ones(2)})
    save_state(folder, {"new": torch.zeros(2)})
    assert load_state(folder).keys() == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_what_json_and_tensors_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="set is none of them"):
        save_state(tmp_path / "step-000001", {"bad": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "step-000003", {"old": 1})

    def disk_full(folder: Path) -> None:
        (folder / "half").write_text("half a mod")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
        save_state(folder, {"new": 2}, write_files=disk_full)
    assert load_state(folder) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path: Path) -> None:
    original = save_state(tmp_path / "good", STATE)
    draw = random.Random(0)
    for trial in range(120):
        folder = shutil.copytree(original, tmp_path / f"bad-{trial}")
        path = draw.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        kind = draw.choice(["flip", "cut", "remove"])
        if kind == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(content))
        elif kind == "cut":
            path.write_bytes(bytes(content[: draw.randrange(len(content))]))
        else:
            path.unlink()
        if path.name == "manifest.json" and kind == "flip":
            # A bit of its white space may change nothing: then nothing may have changed.
            with contextlib.suppress(CheckpointError):
                assert equal(load_state(folder), STATE)
        else:
            with pytest.raises(CheckpointError, match=folder.name):
                load_state(folder)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", r"manifest\.json is damaged"),
        ('{"format_version": 2, "files": {}}', "format version 2"),
        ('{"format_version": 1, "files": {}}', "it lists no files"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, document: str, message: str) -> None:
    folder = save_state(tmp_path / "step-000001", STATE)
    (folder / "manifest.json").write_text(document)
    with pytest.raises(CheckpointError, match=message):
        verify(folder)


def test_a_manifest_cannot_reach_outside_or_through_links(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "step-000001", STATE)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify(folder)
    del manifest["files"]["../secret"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    elsewhere = tmp_path / "elsewhere.json"
    (folder / "state.json").rename(elsewhere)
    (folder / "state.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"state\.json is a link"):
        verify(folder)


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        load_state(tmp_path / "step-000009")
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_the_latest_whole_checkpoint_is_found_and_damage_is_said(tmp_path: Path) -> None:
    for step in (5, 200, 1_000_000):
        save_state(checkpoint_folder(tmp_path, step), {"step": step})
    (tmp_path / "notes").mkdir()
    newest = tmp_path / "step-1000000"
    assert latest_checkpoint(tmp_path) == newest
    (newest / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"passing over a damaged checkpoint.*step-1000000"):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-000200"


def test_a_death_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "step-000005", {"step": 5})
    os.rename(folder, tmp_path / ".step-000005.old")
    (tmp_path / ".step-000005.tmp").mkdir()
    assert latest_checkpoint(tmp_path) == folder
    assert load_state(folder) == {"step": 5}


def test_old_checkpoints_and_leftovers_are_removed(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_state(checkpoint_folder(tmp_path, step), {"step": step})
    (tmp_path / ".step-000009.tmp").mkdir()
    remove_old_checkpoints(tmp_path, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_manifest_names_the_versions_that_wrote_it(tmp_path: Path) -> None:
    manifest = json.loads((save_state(tmp_path / "step-000001", STATE) / "manifest.json").read_text())
    versions = {key: value for key, value in manifest.items() if key != "files"}
    assert versions == {
        "format_version": 1,
        "tinygpt_version": tinygpt.__version__,
        "torch_version": torch.__version__,
    }


def edit(folder: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """Change a file and make the manifest fit, as only somebody with bad intent would."""
    content = change((folder / name).read_bytes())
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def state_of(value: str) -> Callable[[bytes], bytes]:
    return lambda _: f'{{"format_version": 1, "state": {value}}}'.encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state.json", state_of("[" * 900 + "]" * 900), "readable state|does not hold a state|damaged"),
        ("state.json", state_of("[" * 100_000 + "]" * 100_000), r"state\.json is damaged: maximum recursion"),
        ("state.json", state_of("1" * 6000), r"state\.json is damaged"),
        ("state.json", state_of('{"$tensor": ["x"]}'), "readable state"),
        ("state.json", state_of('{"a": {"$items": [[[], 1]]}}'), "readable state"),
        ("state.json", state_of('{"a": {"$tensor": "absent"}}'), "readable state: KeyError 'absent'"),
        ("state.json", state_of("3"), "does not hold a state"),
        ("state.json", lambda _: b'{"format_version": 9, "tinygpt_version": "3.0"}', "written by tinygpt 3.0, this is"),
        ("state.json", lambda content: content + b" " * (33 * 2**20), "more than 33,554,432 are not read"),
        ("state.safetensors", lambda _: b"", "missing or damaged"),
        ("state.safetensors", lambda content: (2**62).to_bytes(8, "little") + content[8:], "declares a header of 4,6"),
        ("state.safetensors", lambda content: content + b"more", r"state\.safetensors is damaged"),
        (
            "optimizer.safetensors",
            lambda _: (
                (h := b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}')
                and len(h).to_bytes(8, "little") + h
            ),
            r"optimizer\.safetensors is damaged",
        ),
    ],
)
def test_what_an_attacker_made_fit_is_refused_quickly(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    folder = edit(save_state(tmp_path / "step-000001", STATE), name, change)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load_state(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "missing or cannot be read"),
        ({}, "missing or cannot be read"),
        ({"size": -1}, "bytes instead of -1"),
        ({"size": None, "sha256": None}, "bytes instead of None"),
    ],
)
def test_a_manifest_of_nonsense_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    folder = save_state(tmp_path / "step-000001", STATE)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        verify(folder)
    for name in ("", "a\0b", "x" * 300, "/etc/hostname", "."):
        manifest["files"] = {name: {"size": 1, "sha256": ""}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"cannot be read|no file|outside"):
            verify(folder)


def test_a_state_too_large_to_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json would have .* put long lists into tensors"):
        save_state(tmp_path / "step-000001", {"text": "x" * (33 * 2**20)})
    assert list(tmp_path.iterdir()) == []


def test_tensors_read_from_a_file_are_ours_to_change(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "step-000001", {"ones": torch.ones(3)})
    load_state(folder)["ones"].zero_()
    assert torch.equal(load_state(folder)["ones"], torch.ones(3))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_tensors(folder / "nothing.safetensors")


def test_a_snapshot_stays_as_it_was_and_its_memory_is_used_again() -> None:
    weights = {"a": torch.randn(8, 8), "b": torch.randn(16)[::2]}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    memory = SnapshotMemory()
    copies = memory.copy(weights)
    for tensor in weights.values():
        tensor.zero_()
    assert all(torch.equal(copies[name], before[name]) for name in weights)
    again = memory.copy(weights)
    assert [again[name].data_ptr() for name in weights] == [copies[name].data_ptr() for name in weights]
    with pytest.raises(MemoryError, match=r"MiB are needed|allocate|memory"):
        memory.copy({"huge": torch.empty(1).expand(2**50)})


def test_a_snapshot_is_written_as_the_state_it_was_taken_of(tmp_path: Path) -> None:
    document, tensors = take_apart(STATE)
    snapshot = type(take_apart(STATE))(document, {name: tensor.clone() for name, tensor in tensors.items()})
    assert equal(load_state(save_state(tmp_path / "step-000001", snapshot)), STATE)


def test_latest_names_the_newest_and_is_no_more_than_a_hint(tmp_path: Path) -> None:
    for step in (4, 8):
        mark_latest(save_state(checkpoint_folder(tmp_path, step), {"step": step}))
    assert (tmp_path / "latest").read_text() == "step-000008\n"
    newest = tmp_path / "step-000008"
    for content in (b"step-000004\n", b"../../etc\n", b"/etc/step-000009", b"\xff\0", b"", b"step-" + b"9" * 4000):
        (tmp_path / "latest").write_bytes(content)
        assert latest_checkpoint(tmp_path) == newest
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == newest
    (tmp_path / "latest").mkdir()
    assert latest_checkpoint(tmp_path) == newest
    with pytest.raises(CheckpointError, match="latest could not be written"):
        mark_latest(newest)


def test_a_checkpoint_that_latest_names_and_that_is_gone_is_said(tmp_path: Path) -> None:
    for step in (4, 8):
        mark_latest(save_state(checkpoint_folder(tmp_path, step), {"step": step}))
    shutil.rmtree(tmp_path / "step-000008")
    with pytest.warns(UserWarning, match="names step-000008, which is gone, and the newest whole one is step-000004"):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-000004"
    shutil.rmtree(tmp_path / "step-000004")
    with pytest.warns(UserWarning, match="names step-000008, which is gone, and there is no other"):
        assert latest_checkpoint(tmp_path) is None


def test_what_is_damaged_is_set_aside_under_a_free_name(tmp_path: Path) -> None:
    for _ in range(3):
        set_aside(save_state(tmp_path / "step-000004", {"step": 4}))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged-step-000004", "damaged-step-000004-2", "damaged-step-000004-3"]
    with pytest.raises(CheckpointError, match="could not be renamed"):
        set_aside(tmp_path / "step-000009")


def test_a_name_that_is_no_checkpoints_is_refused() -> None:
    for name in ("notes", "step-5", "step-" + "9" * 5000, "step-00000٣"):
        with pytest.raises(CheckpointError, match="not named like a checkpoint"):
            checkpoint_step(name)


def test_every_nth_and_protected_checkpoints_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        checkpoint_folder(tmp_path, step).mkdir()
    remove_old_checkpoints(tmp_path, keep_last=2, keep_every=4, protect={3})
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 4, 8, 9]
    with pytest.raises(ConfigError, match="keep_every=0 must be at least 1"):
        remove_old_checkpoints(tmp_path, keep_last=2, keep_every=0)


links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


@links
def test_nothing_is_written_or_deleted_through_a_link(tmp_path: Path) -> None:
    outside = save_state(tmp_path / "outside" / "step-000001", {"step": 1})
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    run = tmp_path / "run"
    run.mkdir()
    for name in ("step-000001", ".step-000002.tmp", ".step-000003.deleted", ".step-000004.old"):
        (run / name).symlink_to(outside)
    (run / ".latest.tmp").symlink_to(outside / "state.json")
    with pytest.raises(CheckpointError, match="step-000001 is a link, and a checkpoint is not written through one"):
        save_state(run / "step-000001", {"step": 9})
    for step in (2, 3, 4):
        mark_latest(save_state(checkpoint_folder(run, step), {"step": step}))
    remove_old_checkpoints(run, keep_last=1)
    assert [path.name for path in list_checkpoints(run)] == ["step-000004"]
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    (run / "step-000009").symlink_to(outside)
    with pytest.warns(UserWarning, match="step-000009 is a link"):
        assert latest_checkpoint(run) == run / "step-000004"
    # A link that its owner names is followed.
    assert load_state(run / "step-000009") == {"step": 1}


@links
def test_a_folder_inside_a_checkpoint_must_not_lead_outside(tmp_path: Path) -> None:
    def with_folder(folder: Path) -> None:
        (folder / "extra").mkdir()
        (folder / "extra" / "file").write_text("x")

    folder = save_state(tmp_path / "step-000001", STATE, write_files=with_folder)
    assert "extra/file" in verify(folder)
    (folder / "extra").rename(tmp_path / "elsewhere")
    (folder / "extra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        verify(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_disk_that_is_full_at_any_file_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    import resource

    def many_files(folder: Path) -> None:
        for number in range(400):
            (folder / f"{number}").write_text("x" * 100)

    folder = save_state(tmp_path / "step-000001", {"old": 1})
    state = {"optimizer": {"a": torch.ones(1_000)}, "b": torch.ones(3_000), "text": "x" * 20_000}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Exceeded first by the many files, the optimizer's, the other tensors', state.json and manifest.json.
    for size in (50, 2_000, 8_000, 16_000, 30_000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            with pytest.raises(CheckpointError, match=r"step-000001 could not be written: .*File too large"):
                save_state(folder, state, write_files=many_files)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert load_state(folder) == {"old": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    save_state(folder, state, write_files=many_files)


HOLD = """
import sys, time
from tinygpt.checkpoint import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_uses_the_folder_and_a_dead_one_uses_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"{tmp_path.name} is in use by process {process.pid} on "):
            RunLock(tmp_path).__enter__()
        (tmp_path / ".lock-holder.json").write_text("[")
        with pytest.raises(CheckpointError, match="is in use by another process; wait until it ends"):
            RunLock(tmp_path).__enter__()
    finally:
        process.kill()
        process.communicate()
    with RunLock(tmp_path):
        pass


def test_a_lock_may_be_entered_twice_and_from_another_thread(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with lock, lock, pytest.raises(CheckpointError, match="in use by another Trainer of this process"):
        RunLock(tmp_path).__enter__()
    lock.__enter__()
    thread = threading.Thread(target=lock.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with RunLock(tmp_path):
        pass


@links
def test_a_run_does_not_write_through_links_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("checkpoints", "metrics.jsonl", ".lock", ".lock-holder.json"):
        run = tmp_path / f"run {name}"
        run.mkdir()
        (run / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=rf"{name} is a link, and a run does not write through one"):
            RunLock(run).__enter__()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    # The run's folder itself may be one: its owner named it.
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with RunLock(tmp_path / "link"):
        pass


@pytest.mark.parametrize("size", [0, 99, 100, 101, 250, 300])
def test_damage_in_any_block_of_a_large_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", 100)
    content = bytes(range(256)) * 2
    (tmp_path / "data").write_bytes(content[:size])
    manifest.write_manifest(tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text("utf-8"))["files"]["data"]
    assert len(entry.get("blocks", [])) == (-(-size // 100) if size > 100 else 0)
    assert entry["sha256"] == hashlib.sha256(content[:size]).hexdigest()
    assert manifest.check_manifest(tmp_path) == {"data"}
    for place in range(0, size, 50):
        damaged = bytearray(content[:size])
        damaged[place] ^= 1
        (tmp_path / "data").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="data is damaged: its sha256 is not the one"):
            manifest.check_manifest(tmp_path)


def test_blocks_that_do_not_fit_the_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", 100)
    (tmp_path / "data").write_bytes(bytes(250))
    document = json.loads(manifest.write_manifest(tmp_path).read_text("utf-8"))
    for wrong in ([], document["files"]["data"]["blocks"][:2], "blocks", None):
        document["files"]["data"]["blocks"] = wrong
        (tmp_path / "manifest.json").write_text(json.dumps(document), "utf-8")
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: the blocks of data do not fit its size"):
            manifest.check_manifest(tmp_path)
