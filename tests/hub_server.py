"""A Hugging Face Hub in one small local server, so that tests push and pull for real and without a network.

It keeps repositories in memory and speaks the part of the HTTP API that `huggingface_hub` 1 and 2 use for model
repositories of plain files and for reading dataset repositories, which are named `datasets/user/name` here and whose
files are all large ones (LFS) but those that end in `.txt`; in a model repository files are large from `large_from`
bytes on. `fail` makes it answer the next requests of a kind with an error, `cut` and `shorten` break off downloads,
`corrupt` sends other bytes, `drop` hangs up in the middle of a request or before its answer, and `stall` waits.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files, title: str = "") -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.titles[oid] = title
        self.parents[oid] = self.branches.get(branch)
        self.branches[branch] = oid
        return oid

    def history(self, revision: str) -> list[str]:
        """Return the commits that lead to a revision, the newest first."""
        found: list[str] = []
        oid: str | None = self.find(revision)
        while oid is not None:
            found.append(oid)
            oid = self.parents[oid]
        return found

    def find(self, revision: str) -> str:
        return self.branches.get(revision) or self.tags.get(revision) or revision

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.find(revision)]


@dataclass
class Failure:
    method: str
    part: str
    status: int
    left: int
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # wait first; status 0 then answers as usual, -1 hangs up, -2 does so after the work is done


@dataclass
class Damage:
    part: str
    keep: float | None  # share of the bytes that is sent; None sends all, one of them changed
    left: int
    announced: bool = False  # whether the length of what is left is given, so that the client misses nothing


class HubServer:
    """What the tests hold: the address, the repositories, the requests seen, and the failures to play."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.ranges: list[int] = []  # where downloads that went on in the middle of a file started
        self.large_from = 10**12
        self.objects: dict[str, bytes] = {}  # uploads of large files, by SHA-256
        self._failures: list[Failure] = []
        self._damages: list[Damage] = []
        self._lock = threading.Lock()

    def add(self, repo_id: str, files: Files, *, private: bool = False) -> str:
        """Put a repository with one commit on its main branch; return the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        return repo.commit("main", files)

    def fail(
        self, method: str, part: str, *, status: int, times: int = 10**9, headers: dict[str, str] | None = None
    ) -> None:
        """Answer the next `times` requests of `method` whose path holds `part` with `status`."""
        self._failures.append(Failure(method, part, status, times, headers or {}))

    def stall(self, method: str, part: str, *, seconds: float, times: int = 1) -> None:
        """Answer the next `times` such requests as usual, but late."""
        self._failures.append(Failure(method, part, 0, times, seconds=seconds))

    def drop(self, method: str, part: str, *, times: int = 1, done: bool = False) -> None:
        """Hang up in the middle of the next `times` such requests, or after doing what they ask, without a word."""
        self._failures.append(Failure(method, part, -2 if done else -1, times))

    def heal(self) -> None:
        """Forget all failures and damages that were ordered."""
        self._failures.clear()
        self._damages.clear()

    def cut(self, part: str, *, keep: float, times: int = 1) -> None:
        """Break the connection in the next `times` downloads whose path holds `part`, after a share of the bytes."""
        self._damages.append(Damage(part, keep, times))

    def shorten(self, part: str, *, keep: float, times: int = 1) -> None:
        """Send only a share of the bytes in the next `times` downloads, and call that the whole file."""
        self._damages.append(Damage(part, keep, times, announced=True))

    def corrupt(self, part: str, *, times: int = 10**9) -> None:
        """Send one other byte in the next `times` downloads whose path holds `part`."""
        self._damages.append(Damage(part, None, times))

    def left_to_fail(self) -> int:
        """Return how many of the ordered failures were not played yet."""
        return sum(failure.left for failure in self._failures)

    def count(self, method: str, part: str) -> int:
        """Return how many requests of `method` had a path that holds `part`."""
        return sum(line.startswith(f"{method} ") and part in line for line in self.requests)

    def failure(self, method: str, path: str) -> Failure | None:
        """Note a request; return how it must fail, if it must."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for failure in self._failures:
                if failure.left and failure.method == method and failure.part in path:
                    failure.left -= 1
                    return failure
        return None

    def damage(self, path: str) -> Damage | None:
        """Return what must go wrong in a download, if anything."""
        with self._lock:
            for damage in self._damages:
                if damage.left and damage.part in path:
                    damage.left -= 1
                    return damage
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    silent = False  # do what is asked and hang up

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (http.server looks these names up)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        failure = self.hub.failure(self.command, path)
        if failure and failure.status == -1:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if failure:
            time.sleep(failure.seconds)
        if failure and failure.status > 0:
            return self._error(failure.status, "", "made to fail", failure.headers)
        self.silent = failure is not None and failure.status == -2
        return self._route(path, body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _route(self, path: str, body: bytes) -> None:
        if self.command == "POST" and "Authorization" not in self.headers:
            return self._error(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = yaml_errors(json.loads(body)["content"])
            return self._json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)
        if path == "/api/whoami-v2":
            return self._json({"name": "user", "type": "user", "orgs": []})
        if path.startswith("/api/datasets/"):
            path = path.removeprefix("/api")
        if path.startswith("/objects/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/objects/")
            self.hub.objects[path.removeprefix("/objects/")] = body
            return self._json({})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json({"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]})
        match = re.fullmatch(r"(?:/api/models)?/((?:datasets/)?[^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path)
        if match is None:
            return self._error(404, "EntryNotFound", f"no route {path}")
        name, action, rest = match.groups()
        if name not in self.hub.repos:
            return self._error(401, "RepoNotFound", "Repository not found")
        return self._repo(self.hub.repos[name], name, action or "revision", rest or "main", body)

    def _place(self, item: dict[str, object]) -> dict[str, object]:
        """Say where a large file is to be sent; nowhere if it is here."""
        actions = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}
        return item if item["oid"] in self.hub.objects else {**item, "actions": actions}

    def _create(self, request: dict[str, object]) -> None:
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        if name in self.hub.repos:
            return self._json({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
        visible = request.get("visibility") == "private"  # newer clients name it so
        self.hub.add(name, {".gitattributes": b""}, private=visible or bool(request.get("private")))
        return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _repo(self, repo: Repo, name: str, action: str, rest: str, body: bytes) -> None:
        revision, _, file = rest.partition("/")
        oid = repo.find(revision)
        if action == "branch":
            if revision in repo.branches:
                return self._error(409, "", "exists")
            repo.branches[revision] = repo.branches["main"]
            return self._json({})
        if action == "refs":
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
            tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in repo.tags.items()]
            return self._json({"branches": branches, "tags": tags, "converts": []})
        if oid not in repo.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if action == "tag":
            tag = json.loads(body)["tag"]
            if tag in repo.tags:
                return self._error(409, "", "Tag reference exists already")
            repo.tags[tag] = oid
            return self._json({})
        if action == "commits":
            day = "2026-01-01T00:00:00.000Z"
            commits = [{"id": c, "title": repo.titles[c], "message": "", "date": day} for c in repo.history(revision)]
            return self._json([commit | {"authors": [{"user": "user"}]} for commit in commits])
        files = repo.commits[oid]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            info = {"_id": "0", "id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings}
            return self._json(info | {"tags": [], "downloads": 0, "likes": 0})
        if action == "tree":
            return self._json([self._entry(name, path, data) for path, data in files.items()])
        if action == "paths-info":
            wanted = parse_qs(body.decode())["paths"] if b"paths=" in body else json.loads(body)["paths"]
            return self._json([self._entry(name, path, files[path]) for path in wanted if path in files])
        if action == "preupload":
            return self._json({"files": [self._upload_mode(files, item) for item in json.loads(body)["files"]]})
        if action == "commit":
            oid = repo.commit(revision, *self._apply(files, body))
            return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})
        if action == "resolve" and file in files:
            return self._file(files[file], oid, large=self._is_large(name, file, files[file]))
        return self._error(404, "EntryNotFound", f"{action} {rest}")

    def _file(self, data: bytes, oid: str, *, large: bool) -> None:
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            self.hub.ranges.append(start)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], headers)
        return self._send(200, data, headers)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        standard = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"{}", standard | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if self.silent:
            return self._hang_up()
        damage = self.hub.damage(unquote(self.path)) if "/resolve/" in self.path and self.command == "GET" else None
        if damage and damage.announced and damage.keep is not None:
            data = data[: int(len(data) * damage.keep)]
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if damage is None or damage.announced:
            self.wfile.write(data)
        elif damage.keep is None:
            self.wfile.write(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            self.wfile.write(data[: int(len(data) * damage.keep)])
            self.wfile.flush()
            self._hang_up()
        return None

    def _is_large(self, repo: str, path: str, data: bytes) -> bool:
        if repo.startswith("datasets/"):
            return not path.endswith(".txt")
        return len(data) >= self.hub.large_from

    def _entry(self, repo: str, path: str, data: bytes) -> dict[str, object]:
        """Describe a file in a listing."""
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
        if self._is_large(repo, path, data):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _upload_mode(self, files: Files, item: dict[str, Any]) -> dict[str, object]:
        """Say how a file is to be sent, and what is there under its name."""
        large = item["size"] >= self.hub.large_from
        mode: dict[str, object] = {"path": item["path"], "uploadMode": "lfs" if large else "regular"}
        if (data := files.get(item["path"])) is not None:
            mode["oid"] = hashlib.sha256(data).hexdigest() if large else _oid(data)
        return mode | {"shouldIgnore": False}

    def _apply(self, files: Files, body: bytes) -> tuple[Files, str]:
        """Apply the lines of a commit request to a copy of the files; return them and the commit's title."""
        changed, title = dict(files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del changed[value["path"]]
        return changed, title


def _oid(data: bytes) -> str:
    """Git's name for a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def yaml_errors(content: str) -> list[str]:
    """Return what is wrong with the metadata of a card, by the rules of the Hub that concern what we write."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)]
    errors = [f"{key!r} must be a string" for key in ("license", "library_name") if not _is_text(data.get(key, "x"))]
    if "license" in data and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(data["license"])):
        errors.append(f'"license" must be one of the known ones, not {data["license"]!r}')
    for key in ("tags", "datasets", "language"):
        values = data.get(key, [])
        if not isinstance(values, list) or not all(map(_is_text, values)):
            errors.append(f"{key!r} must be a list of strings")
    for model in data.get("model-index", []):
        for result in model["results"]:
            metrics = result["metrics"]
            complete = all(_is_text(result[part].get("type")) for part in ("task", "dataset"))
            numbers = all(_is_text(m.get("type")) and isinstance(m.get("value"), float) for m in metrics)
            if not (complete and _is_text(result["dataset"].get("name")) and metrics and numbers):
                errors.append(f"a result is not complete: {result}")
    return errors


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Run a hub on a free local port for the length of a `with` block."""

    class BoundHandler(Handler):
        """Handlers are made by the server, so the hub they serve is a class attribute."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
    server.daemon_threads = True
    hub = BoundHandler.hub = HubServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
