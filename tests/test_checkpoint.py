import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from tinygpt.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    list_checkpoints,
    load_state,
    remove_old_checkpoints,
    save_state,
    verify,
)
from tinygpt.errors import CheckpointError

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
