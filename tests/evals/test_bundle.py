"""Reading a bundle: what is in it, and an error with file and line for what is wrong with it."""

import json
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tinygpt.errors import DataError, MissingDependencyError
from tinygpt.evals import EvalBundle, EvalTask

BUNDLE = Path(__file__).parent.parent / "data_files" / "eval_bundle"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path / "eval_bundle"))


def make_zip(folder: Path, target: Path, top: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return target


def test_tasks_are_read_with_their_settings_and_baselines(bundle: EvalBundle) -> None:
    assert bundle.tasks[1] == EvalTask(
        label="short_answers",
        kind="multiple_choice",
        path="reasoning/short_answers.jsonl",
        num_fewshot=3,
        delimiter='\nAnswer: "',
        baseline=0.5,
        has_categories=True,
    )
    assert [(task.label, task.delimiter) for task in bundle.tasks[2:4]] == [("pronouns", " "), ("next_word", " ")]
    item = bundle.items(bundle.tasks[0])[1]
    assert item.fields["choices"] == ["igloo", "oven", "attic", "engine"]
    assert item.where.endswith("everyday.jsonl, line 2")


@pytest.mark.parametrize("top", ["", "eval_bundle/"])
def test_a_zip_file_reads_as_the_folder_and_is_not_unpacked(bundle: EvalBundle, tmp_path: Path, top: str) -> None:
    zipped = EvalBundle.open(make_zip(BUNDLE, tmp_path / "bundle.zip", top))
    assert zipped.tasks == bundle.tasks
    for task in bundle.tasks:
        assert [item.fields for item in zipped.items(task)] == [item.fields for item in bundle.items(task)]
        assert zipped.fingerprint(task) == bundle.fingerprint(task)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]


def test_the_fingerprint_follows_settings_and_items(bundle: EvalBundle, copy: Path) -> None:
    file = copy / "eval_data" / "symbols" / "brackets.jsonl"
    file.write_text(file.read_text("utf-8").replace("open: [ ( )", "open: [ [ ]"), "utf-8")
    core = copy / "core.yaml"
    core.write_text(core.read_text("utf-8").replace("num_fewshot: [3]", "num_fewshot: [4]"), "utf-8")
    changed = EvalBundle.open(copy)
    same = [
        bundle.fingerprint(one) == changed.fingerprint(two)
        for one, two in zip(bundle.tasks, changed.tasks, strict=True)
    ]
    assert same == [True, False, True, True, False]


class Server:
    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *arguments: object) -> None:
                outer.requests.append(self.path)

            def copyfile(self, source: object, outputfile: object) -> None:
                content = source.read()  # type: ignore[attr-defined]
                cut = "cut" in self.path
                outputfile.write(content[: len(content) // 2] if cut else content)  # type: ignore[attr-defined]

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "www").mkdir()
    make_zip(BUNDLE, tmp_path / "www" / "bundle.zip")
    make_zip(BUNDLE, tmp_path / "www" / "cut.zip")
    found = Server(tmp_path / "www")
    yield found
    found.stop()


def test_an_address_is_fetched_once_and_kept(
    server: Server, tmp_path: Path, bundle: EvalBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        assert EvalBundle.open(f"{server.url}/bundle.zip", cache_dir=cache).tasks == bundle.tasks
    assert server.requests == ["/bundle.zip"]
    assert "fetching the bundle" in capsys.readouterr().err
    (kept,) = cache.iterdir()
    assert zipfile.is_zipfile(kept)
    EvalBundle.open(f"{server.url}/bundle.zip", cache_dir=tmp_path / "another", progress=False)
    assert capsys.readouterr().err == ""


def test_without_a_cache_dir_it_is_kept_in_the_client_s_home(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    EvalBundle.open(f"{server.url}/bundle.zip")
    assert len(list((tmp_path / "home" / "tinygpt").iterdir())) == 1


def test_what_cannot_be_fetched_leaves_nothing_behind(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"/none\.zip cannot be fetched: HTTP Error 404"):
        EvalBundle.open(f"{server.url}/none.zip", cache_dir=cache)
    with pytest.raises(DataError, match=r"/cut\.zip (was cut off|cannot be fetched)"):
        EvalBundle.open(f"{server.url}/cut.zip", cache_dir=cache)
    monkeypatch.setattr("tinygpt.evals._fetch._MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(DataError, match="is larger than 1,000 bytes and no evaluation bundle"):
        EvalBundle.open(f"{server.url}/bundle.zip", cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_nothing_but_an_address_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no evaluation bundle 'eval_bundle'; give a folder"):
        EvalBundle.open("eval_bundle", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no evaluation bundle: it has no core\.yaml"):
        EvalBundle.open(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"no zip file")
    with pytest.raises(DataError, match=r"a\.zip is neither a folder nor a zip file"):
        EvalBundle.open(tmp_path / "a.zip")


def test_a_small_zip_file_cannot_unpack_to_a_huge_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinygpt.evals._bundle._MAX_FILE_BYTES", 100_000)
    path = make_zip(BUNDLE, tmp_path / "bundle.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("eval_data/language/next_word.jsonl", b" " * 10_000_000)
    opened = EvalBundle.open(path)
    with pytest.raises(DataError, match=r"next_word\.jsonl is larger than 100,000 bytes"):
        opened.items(opened.tasks[3])


def test_a_damaged_zip_file_is_refused(tmp_path: Path) -> None:
    path = make_zip(BUNDLE, tmp_path / "bundle.zip")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("eval_data/language/next_word.jsonl").header_offset + 80
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    opened = EvalBundle.open(path)
    with pytest.raises(DataError, match=r"next_word\.jsonl cannot be read"):
        opened.items(opened.tasks[3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("icl_tasks:", "tasks:", "core.yaml lists no tasks under icl_tasks"),
        ("label: everyday", "label: [", r"core.yaml, line \d+: this is not YAML"),
        ("  label: everyday\n", "", "core.yaml, line 4: label is missing; it must be str"),
        ("label: everyday", "label: 7", "core.yaml, line 4: label is 7; it must be str"),
        ("label: everyday", "label: brackets", "core.yaml, line 26: there are two tasks brackets"),
        ("label: everyday", "label: arc", r"core.yaml, line 4: arc has no line in eval_meta_data\.csv"),
        ("type: schema", "type: quiz", "core.yaml, line 16: icl_task_type 'quiz' of pronouns is not one of multiple_"),
        ("num_fewshot: [3]", "num_fewshot: 3", "core.yaml, line 9: num_fewshot is 3; it must be list"),
        (
            "num_fewshot: [3]",
            "num_fewshot: [0, 3]",
            r"line 9: num_fewshot of short_answers is \[0, 3\]; give a list of",
        ),
        ("num_fewshot: [3]", "num_fewshot: [-1]", r"line 9: num_fewshot of short_answers is \[-1\]"),
        ("has_categories: true", "has_categories: 1", "line 9: has_categories is 1; it must be bool"),
        ("reasoning/everyday", "../../everyday", "line 4: dataset_uri '../../everyday.jsonl' of everyday lies outside"),
        ("reasoning/everyday", "/etc/everyday", "line 4: dataset_uri '/etc/everyday.jsonl' of everyday lies outside"),
        ("-\n  label: everyday", "- 5\n-\n  label: everyday", "core.yaml: entry 1 of icl_tasks is 5"),
    ],
)
def test_wrong_tasks_are_refused_with_their_line(copy: Path, old: str, new: str, message: str) -> None:
    core = copy / "core.yaml"
    text = core.read_text("utf-8")
    assert old in text
    core.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(DataError, match=message):
        EvalBundle.open(copy)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Random baseline", "Guessing", "eval_meta_data.csv, line 1: the column Random baseline is missing"),
        (",25,,", ",many,,", "eval_meta_data.csv, line 2: Random baseline is 'many'; give percent, 0 to below 100"),
        (",50,,Which", ",100,,Which", "eval_meta_data.csv, line 4: Random baseline is '100'"),
    ],
)
def test_wrong_baselines_are_refused_with_their_line(copy: Path, old: str, new: str, message: str) -> None:
    file = copy / "eval_meta_data.csv"
    file.write_text(file.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(DataError, match=message):
        EvalBundle.open(copy)


MULTIPLE_CHOICE = {"query": "q", "choices": ["a", "b"], "gold": 1}
SCHEMA = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        (0, "{", "this is not JSON"),
        (0, "[" * 100_000, "this is not JSON"),
        (0, "[1]", r"an item is a JSON object, not '\[1\]'"),
        (0, json.dumps({**MULTIPLE_CHOICE, "gold": 2}), "gold is 2, and there are 2 choices"),
        (0, json.dumps({**MULTIPLE_CHOICE, "gold": True}), "gold is True; it must be int"),
        (0, json.dumps({**MULTIPLE_CHOICE, "choices": ["a"]}), "choices must be two or more texts"),
        (0, json.dumps({**MULTIPLE_CHOICE, "choices": ["a", ""]}), "choices must be two or more texts"),
        (0, json.dumps({"choices": ["a", "b"], "gold": 1}), "query is missing; it must be str"),
        (1, json.dumps(MULTIPLE_CHOICE), "category is missing; it must be str"),
        (2, json.dumps({**SCHEMA, "context_options": "ab"}), "context_options is 'ab'; it must be list"),
        (2, json.dumps({**SCHEMA, "continuation": " "}), "the continuation is empty"),
        (3, json.dumps({"continuation": "c"}), "context is missing; it must be str"),
        (3, json.dumps({"context": "c", "continuation": ""}), "the continuation is empty"),
    ],
)
def test_wrong_items_are_refused_with_their_line(copy: Path, task: int, line: str, message: str) -> None:
    opened = EvalBundle.open(copy)
    file = copy / "eval_data" / opened.tasks[task].path
    lines = file.read_text("utf-8").splitlines()
    file.write_text("\n".join([*lines[:2], "", line, *lines[3:]]), "utf-8")
    with pytest.raises(DataError, match=rf"{file.name}, line 4: {message}"):
        opened.items(opened.tasks[task])


def test_files_that_are_missing_empty_or_no_text_are_refused(copy: Path) -> None:
    opened = EvalBundle.open(copy)
    task = opened.tasks[1]
    file = copy / "eval_data" / task.path
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join(lines[:3]))
    with pytest.raises(DataError, match="has 3 items, and short_answers puts 3 others before each one; it needs at le"):
        opened.items(task)
    file.write_bytes(lines[0] + b"\n\xff")
    with pytest.raises(DataError, match=r"short_answers\.jsonl, line 2: byte .* is not UTF-8"):
        opened.items(task)
    file.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"short_answers\.jsonl is empty"):
        opened.items(task)
    file.unlink()
    with pytest.raises(DataError, match=r"short_answers\.jsonl cannot be read"):
        opened.items(task)


def test_without_pyyaml_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[eval\]"'):
        EvalBundle.open(BUNDLE)
