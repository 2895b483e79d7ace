"""One model to the Hub, with its card and the picture of its run."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tinygpt import hub
from tinygpt._disk import write_text
from tinygpt.checkpoint import STATE_FILE
from tinygpt.errors import CheckpointError, MissingDependencyError
from tinygpt.hub import MODEL_FILES
from tinygpt.manifest import MANIFEST_FILE, check_manifest
from tinygpt.publish._card import card_text, check_license
from tinygpt.publish._record import RunRecord, Step, choose_checkpoint, read_record, run_of

CARD_FILE = "README.md"
PICTURE_FILE = "curve.png"

# What only training needs; some of it matches the patterns of a model's files.
_TRAINING_FILES = (MANIFEST_FILE, STATE_FILE, "state*.safetensors", "optimizer*.safetensors", "run.json")
_EXTRA_FILES = (CARD_FILE, "LICENSE*", "*.png", "*.svg")

logger = logging.getLogger("tinygpt")


def files_to_push(model: str | Path) -> list[Path]:
    """Return the files of a model folder that belong on the Hub: weights, config, tokenizer, card, pictures.

    The state of a run that lies beside them in a checkpoint stays: optimizer, random state, manifest.

    Args:
        model: A checkpoint, or a folder that `save_pretrained` wrote.

    Raises:
        CheckpointError: If there is no such folder, or no model in it.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give a checkpoint or a saved model.")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and any(path.match(pattern) for pattern in MODEL_FILES + _EXTRA_FILES)
        and not any(path.match(pattern) for pattern in _TRAINING_FILES)
    )
    if missing := {"config.json", "model.safetensors"} - {path.name for path in files}:
        raise CheckpointError(f"{folder} is no model: it lacks {' and '.join(sorted(missing))}.")
    return files


def push_model(
    source: str | Path,
    repo_id: str,
    *,
    step: Step | None = None,
    private: bool = False,
    branch: str | None = None,
    commit_message: str | None = None,
    tags: str | Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    token: str | None = None,
    retries: int = 4,
) -> str:
    """Push a model with its tokenizer, card and learning curve in one commit; return its address.

    The files are compared with the checkpoint's manifest first, so that a damaged model is never published. A
    `README.md` or `curve.png` that lies beside the model goes as it is; otherwise one is made.

    Args:
        source: A run, a checkpoint, or a folder that `save_pretrained` wrote.
        repo_id: `user/repo`, made if it is missing.
        step: Which checkpoint of a run, see `choose_checkpoint`.
        private: Create the repository as private. An existing public one is refused, not made private.
        branch: Branch to commit to. `None` is the main branch.
        commit_message: First line of the commit.
        tags: One or several tags for the commit, such as `"step-87000"`.
        license: Identifier such as `"mit"` for the card; `None` names none.
        datasets: Names of data sets on the Hub for the card.
        token: Access token with write permission. `None` is the one the client is logged in with.
        retries: How often each request is tried again after a failure that may pass.

    Raises:
        CheckpointError: If there is no whole model.
        ConfigError: If `step` or `license` is wrong.
        DataError: If the run's `metrics.jsonl` is damaged.
        HubError: If a name is wrong, access is refused, a tag is taken, or the upload fails after bounded retries.

    Example:
        ```python
        from tinygpt.publish import push_model

        url = push_model("runs/d12", "user/d12", step="best", private=True, tags="best")
        ```
    """
    hub.check_repo_id(repo_id)
    tags = hub.check_tags(tags)
    check_license(license)
    model = choose_checkpoint(source, step)
    check_whole(model)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / model.resolve().name
        stage(model, staged, Path.symlink_to)
        write_card(staged, run=run_of(model), repo_id=repo_id, tags=tags, license=license, datasets=datasets)
        return hub.upload_folder(
            staged,
            repo_id,
            private=private,
            branch=branch,
            commit_message=commit_message,
            tags=tags,
            token=token,
            allow_patterns=[path.name for path in files_to_push(staged)],
            retries=retries,
        )


def check_whole(model: Path) -> None:
    """Compare the files to push with the checkpoint's manifest; a folder without one has nothing to compare with.

    Raises:
        CheckpointError: If one is missing or damaged.
    """
    names = [path.name for path in files_to_push(model) if any(path.match(pattern) for pattern in MODEL_FILES)]
    if (model / MANIFEST_FILE).exists():
        check_manifest(model, only=names)


def stage(model: Path, target: Path, link: Callable[[Path, Path], None]) -> None:
    """Put the files of a push and the record for its card into a new folder, as links, or copies where there are none.

    Args:
        model: The model's folder.
        target: The new folder.
        link: Called as `link(new, existing)`: `Path.symlink_to`, or `Path.hardlink_to` if the model may be deleted.
    """
    target.mkdir(parents=True)
    record = [path for path in (model / MANIFEST_FILE, model / STATE_FILE) if path.exists()]
    for path in [*files_to_push(model), *record]:
        try:
            link(target / path.name, path.resolve())
        except OSError:  # another disk, or a system without such links
            shutil.copy2(path, target / path.name)


def write_card(
    staged: Path,
    *,
    run: Path | None,
    repo_id: str,
    tags: Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Write card and learning curve beside a model, unless a card is there.

    Raises:
        CheckpointError: If there is no readable model.
        DataError: If the run's `metrics.jsonl` is damaged.
    """
    if (staged / CARD_FILE).exists():
        return
    record = read_record(staged, run=run)
    text = card_text(
        record,
        repo_id=repo_id,
        revision=tags[0] if tags else None,
        license=license,
        datasets=datasets,
        picture=PICTURE_FILE if _draw(record, staged) else None,
    )
    write_text(staged / CARD_FILE, text)


def _draw(record: RunRecord, folder: Path) -> bool:
    """Draw the run up to these weights, unless there is a picture; return whether there is one."""
    from tinygpt.report._run import draw_records, drawable_steps

    if (folder / PICTURE_FILE).exists():  # a link to the owner's, which drawing would write through
        return True
    if not drawable_steps(record.metrics):
        return False
    try:
        draw_records(record.metrics, folder / PICTURE_FILE, title=record.name)
    except MissingDependencyError as error:
        logger.info("the card gets no picture: %s", error)
        return False
    return True
