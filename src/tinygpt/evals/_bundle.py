"""The public layout of the CORE evaluation bundle, read from a folder or a zip file."""

import csv
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

from tinygpt.errors import DataError, MissingDependencyError
from tinygpt.evals._fetch import download

TaskKind = Literal["multiple_choice", "schema", "language_modeling"]
_TASKS_FILE, _BASELINES_FILE, _DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
# Far above the 50 MB that the largest file of the public bundle has; below what would fill the memory.
_MAX_FILE_BYTES = 1 << 30


class EvalItem(NamedTuple):
    """One question of a task: its JSON object, and the file and line it stands on."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class EvalTask:
    """One task of a bundle.

    Attributes:
        label: Its name in `core.yaml`.
        kind: `"multiple_choice"`, `"schema"` (one end, several beginnings) or `"language_modeling"`.
        path: Its file under `eval_data`.
        num_fewshot: Answered items put before each one.
        delimiter: What stands between a question and its answer.
        baseline: Accuracy of guessing, 0 to 1.
        has_categories: Whether each item names a category.
    """

    label: str
    kind: TaskKind
    path: str
    num_fewshot: int
    delimiter: str
    baseline: float
    has_categories: bool


@dataclass(frozen=True)
class EvalBundle:
    """Tasks with their items, in the layout of the bundle that the DCLM paper's CORE metric is computed on.

    `EvalBundle.open` reads one: `core.yaml` lists the tasks under `icl_tasks`, each with `label`, `dataset_uri`,
    `num_fewshot` (a list of one number), `icl_task_type` and, where they differ from a space and `false`,
    `continuation_delimiter` and `has_categories`; `eval_meta_data.csv` has the columns `Eval Task` and
    `Random baseline`, in percent; `eval_data` holds a JSON object a line:

    - `multiple_choice`: `query`, `choices`, and `gold`, the index of the right one;
    - `schema`: `context_options`, `gold`, and the `continuation` that they share;
    - `language_modeling`: `context` and `continuation`.

    Attributes:
        location: Where it was read from.
        tasks: In the order of `core.yaml`.

    References:
        Li et al., [DataComp-LM](https://arxiv.org/abs/2406.11794), 2024; the layout is that of MosaicML's evaluation
        gauntlet.
    """

    location: str
    tasks: tuple[EvalTask, ...]
    _root: "Path | zipfile.Path" = field(repr=False)

    @classmethod
    def open(cls, location: str | Path, *, cache_dir: str | Path | None = None, progress: bool = True) -> "EvalBundle":
        """Read the tasks of a bundle; their items are read when they are needed.

        A zip file is read where it lies and never unpacked. The network is used for nothing but an address given here.

        Args:
            location: A folder, a `.zip` file of one, or the `https://` address of such a file.
            cache_dir: Where a fetched file is kept. None is a folder `tinygpt` in the Hub client's home (`HF_HOME`).
            progress: Whether fetching shows a bar on standard error.

        Raises:
            DataError: If there is no such bundle, it cannot be fetched, or a file of it is damaged or lacks something;
                the message names file and line.
            MissingDependencyError: If PyYAML is not installed.

        Example:
            ```python no-run: needs the bundle
            from tinygpt.evals import EvalBundle

            bundle = EvalBundle.open("eval_bundle.zip")
            print([task.label for task in bundle.tasks])
            ```
        """
        name = str(location)
        is_address = name.startswith(("https://", "http://"))
        path = download(name, cache_dir, progress=progress) if is_address else Path(location).expanduser()
        root = _find_root(path, name)
        baselines = _read_baselines(root / _BASELINES_FILE)
        return cls(name, tuple(_read_tasks(root / _TASKS_FILE, baselines)), root)

    def select(self, labels: Sequence[str]) -> "EvalBundle":
        """Return the bundle with these tasks alone, in its own order.

        Raises:
            DataError: If there is none, or the bundle lacks one of them.
        """
        known = [task.label for task in self.tasks]
        absent = [label for label in labels if label not in known]
        if absent or not labels:
            raise DataError(
                f"{self.location} has no task {', '.join(absent) or 'to select'}; it has {', '.join(known)}."
            )
        return EvalBundle(self.location, tuple(task for task in self.tasks if task.label in labels), self._root)

    def items(self, task: EvalTask) -> list[EvalItem]:
        """Read the items of a task.

        Raises:
            DataError: If the file is missing or empty, or a line is not an item of this kind; the message names file
                and line.
        """
        items = []
        path = self._root / _DATA_FOLDER / task.path
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                items.append(_check_item(line, task, f"{path}, line {number}"))
        if not items:
            raise DataError(f"{path} is empty; a task needs at least one item.")
        if task.num_fewshot >= len(items):
            raise DataError(
                f"{path} has {len(items)} items, and {task.label} puts {task.num_fewshot} others before each one; "
                f"it needs at least {task.num_fewshot + 1}."
            )
        return items

    def fingerprint(self, task: EvalTask) -> str:
        """Return a SHA-256 hex digest of a task's settings and items."""
        digest = hashlib.sha256(repr(task).encode())
        digest.update(_read_text(self._root / _DATA_FOLDER / task.path).encode())
        return digest.hexdigest()


def _find_root(path: Path, name: str) -> "Path | zipfile.Path":
    """Return the folder that holds core.yaml: the top, or the one folder in it."""
    root: Path | zipfile.Path
    if path.is_dir():
        root = path
    elif path.is_file():
        try:
            root = zipfile.Path(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} is neither a folder nor a zip file: {error}.") from None
    else:
        raise DataError(f"there is no evaluation bundle {name!r}; give a folder, a .zip file or an https:// address.")
    candidates = [root, *sorted((child for child in root.iterdir() if child.is_dir()), key=str)]
    for candidate in candidates:
        if (candidate / _TASKS_FILE).is_file():
            return candidate
    raise DataError(f"{name} is no evaluation bundle: it has no {_TASKS_FILE}.")


def _read_text(path: "Path | zipfile.Path") -> str:
    """Read a file, but no more than the limit: a small zip file can claim to hold anything."""
    try:
        with path.open("rb") as file:
            content: bytes = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: a password
        raise DataError(f"{path} cannot be read: {error}.") from None
    if len(content) > _MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {_MAX_FILE_BYTES:,} bytes and no file of an evaluation bundle.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: byte {error.start} is not UTF-8.") from None


def _read_baselines(path: "Path | zipfile.Path") -> dict[str, float]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    missing = {"Eval Task", "Random baseline"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(f"{path}, line 1: the column {' and '.join(sorted(missing))} is missing.")
    baselines = {}
    for row in reader:
        text = row["Random baseline"]
        try:
            percent = float(text)
        except (TypeError, ValueError):
            percent = -1.0
        if not 0 <= percent < 100:
            raise DataError(
                f"{path}, line {reader.line_num}: Random baseline is {text!r}; give percent, 0 to below 100."
            )
        baselines[row["Eval Task"]] = percent / 100
    return baselines


def _read_tasks(path: "Path | zipfile.Path", baselines: dict[str, float]) -> Iterator[EvalTask]:
    listed = _load_yaml(path)
    if not isinstance(listed, dict) or not isinstance(listed.get("icl_tasks"), list) or not listed["icl_tasks"]:
        raise DataError(f"{path} lists no tasks under icl_tasks.")
    seen: set[str] = set()
    for number, entry in enumerate(listed["icl_tasks"], start=1):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {number} of icl_tasks is {entry!r}; give label, dataset_uri and the rest.")
        where = f"{path}, line {entry['__line__']}"
        label, kind, uri = (_field(entry, key, str, where) for key in ("label", "icl_task_type", "dataset_uri"))
        if kind not in get_args(TaskKind):
            raise DataError(
                f"{where}: icl_task_type {kind!r} of {label} is not one of {', '.join(get_args(TaskKind))}."
            )
        shots = _field(entry, "num_fewshot", list, where)
        if len(shots) != 1 or type(shots[0]) is not int or shots[0] < 0:
            raise DataError(f"{where}: num_fewshot of {label} is {shots}; give a list of one number, such as [10].")
        if ".." in PurePosixPath(uri).parts or PurePosixPath(uri).is_absolute() or "\\" in uri or ":" in uri:
            raise DataError(f"{where}: dataset_uri {uri!r} of {label} lies outside {_DATA_FOLDER}.")
        if label not in baselines:
            raise DataError(f"{where}: {label} has no line in {_BASELINES_FILE}.")
        if label in seen:
            raise DataError(f"{where}: there are two tasks {label}.")
        seen.add(label)
        yield EvalTask(
            label=label,
            kind=kind,
            path=uri,
            num_fewshot=shots[0],
            delimiter=_field({"continuation_delimiter": " ", **entry}, "continuation_delimiter", str, where),
            baseline=baselines[label],
            has_categories=_field({"has_categories": False, **entry}, "has_categories", bool, where),
        )


def _load_yaml(path: "Path | zipfile.Path") -> Any:
    """Read YAML; every mapping gets a key `__line__`, the line it begins on."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError('reading core.yaml needs PyYAML: pip install "tinygpt[eval]".') from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return {**super().construct_mapping(node, deep=deep), "__line__": node.start_mark.line + 1}

    text = _read_text(path)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DataError(f"{path}{line}: this is not YAML: {getattr(error, 'problem', error)}.") from None


def _check_item(line: str, task: EvalTask, where: str) -> EvalItem:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this is not JSON: {error}.") from None
    if not isinstance(item, dict):
        raise DataError(f"{where}: an item is a JSON object, not {line[:40]!r}.")
    if task.kind == "language_modeling":
        _field(item, "context", str, where)
    else:
        options = "choices" if task.kind == "multiple_choice" else "context_options"
        texts, gold = _field(item, options, list, where), _field(item, "gold", int, where)
        if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{where}: {options} must be two or more texts, got {texts!r}.")
        if not 0 <= gold < len(texts):
            raise DataError(f"{where}: gold is {gold}, and there are {len(texts)} {options}.")
    text = _field(item, "query" if task.kind == "multiple_choice" else "continuation", str, where)
    if task.kind != "multiple_choice" and not text.strip():
        raise DataError(f"{where}: the continuation is empty, so there is nothing to predict.")
    if task.has_categories:
        _field(item, "category", str, where)
    return EvalItem(item, where)


def _field(entry: dict[str, Any], key: str, wanted: type, where: str) -> Any:
    value = entry.get(key)
    if type(value) is not wanted:
        given = "is missing" if key not in entry else f"is {value!r}"
        raise DataError(f"{where}: {key} {given}; it must be {wanted.__name__}.")
    return value
