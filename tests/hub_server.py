"""A Hugging Face Hub in one small local server, so that tests push and pull for real and without a network.

It keeps repositories in memory and speaks the part of the HTTP API that `huggingface_hub` 1 and 2 use for model
repositories of plain files and for reading dataset repositories, which are named `datasets/user/name` here and whose
files are all large ones (LFS) but those that end in `.txt`. `fail` makes it answer the next requests of a kind with
an error, `cut` break off downloads, and `corrupt` send other bytes.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


@dataclass
class Failure:
    method: str
    part: str
    status: int
    left: int


@dataclass
class Damage:
    part: str
    keep: float | None  # share of the bytes that is sent; None sends all, one of them changed
    left: int


class HubServer:
    """What the tests hold: the address, the repositories, the requests seen, and the failures to play."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.ranges: list[int] = []  # where downloads that went on in the middle of a file started
        self._failures: list[Failure] = []
        self._damages: list[Damage] = []
        self._lock = threading.Lock()

    def add(self, repo_id: str, files: Files, *, private: bool = False) -> str:
        """Put a repository with one commit on its main branch; return the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        return repo.commit("main", files)

    def fail(self, method: str, part: str, *, status: int, times: int = 10**9) -> None:
        """Answer the next `times` requests of `method` whose path holds `part` with `status`."""
        self._failures.append(Failure(method, part, status, times))

    def cut(self, part: str, *, keep: float, times: int = 1) -> None:
        """Break the connection in the next `times` downloads whose path holds `part`, after a share of the bytes."""
        self._damages.append(Damage(part, keep, times))

    def corrupt(self, part: str, *, times: int = 10**9) -> None:
        """Send one other byte in the next `times` downloads whose path holds `part`."""
        self._damages.append(Damage(part, None, times))

    def left_to_fail(self) -> int:
        """Return how many of the ordered failures were not played yet."""
        return sum(failure.left for failure in self._failures)

    def count(self, method: str, part: str) -> int:
        """Return how many requests of `method` had a path that holds `part`."""
        return sum(line.startswith(f"{method} ") and part in line for line in self.requests)

    def failure(self, method: str, path: str) -> int | None:
        """Note a request; return the status it must fail with, if any."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for failure in self._failures:
                if failure.left and failure.method == method and failure.part in path:
                    failure.left -= 1
                    return failure.status
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

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815 (http.server looks these names up)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if status := self.hub.failure(self.command, path):
            return self._error(status, "", "made to fail")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self._json({"name": "user", "type": "user", "orgs": []})
        if path.startswith("/api/datasets/"):
            path = path.removeprefix("/api")
        match = re.fullmatch(r"(?:/api/models)?/((?:datasets/)?[^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path)
        if match is None:
            return self._error(404, "EntryNotFound", f"no route {path}")
        name, action, rest = match.groups()
        if name not in self.hub.repos:
            return self._error(401, "RepoNotFound", "Repository not found")
        return self._repo(self.hub.repos[name], name, action or "revision", rest or "main", body)

    def _create(self, request: dict[str, object]) -> None:
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        if name in self.hub.repos:
            return self._json({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
        visible = request.get("visibility") == "private"  # newer clients name it so
        self.hub.add(name, {".gitattributes": b""}, private=visible or bool(request.get("private")))
        return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _repo(self, repo: Repo, name: str, action: str, rest: str, body: bytes) -> None:
        revision, _, file = rest.partition("/")
        oid = repo.branches.get(revision, revision)
        if action == "branch":
            if revision in repo.branches:
                return self._error(409, "", "exists")
            repo.branches[revision] = repo.branches["main"]
            return self._json({})
        if action == "refs":
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        if oid not in repo.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[oid]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            info = {"_id": "0", "id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings}
            return self._json(info | {"tags": [], "downloads": 0, "likes": 0})
        if action == "tree":
            return self._json([_entry(p, d, large=_is_large(name, p)) for p, d in files.items()])
        if action == "preupload":
            wanted = [item["path"] for item in json.loads(body)["files"]]
            return self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]})
        if action == "commit":
            oid = repo.commit(revision, _apply(files, body))
            return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})
        if action == "resolve" and file in files:
            return self._file(files[file], oid, large=_is_large(name, file))
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

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"{}", headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        damage = self.hub.damage(unquote(self.path)) if "/resolve/" in self.path else None
        if damage is None:
            self.wfile.write(data)
        elif damage.keep is None:
            self.wfile.write(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            self.wfile.write(data[: int(len(data) * damage.keep)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


def _is_large(repo: str, path: str) -> bool:
    return repo.startswith("datasets/") and not path.endswith(".txt")


def _entry(path: str, data: bytes, *, large: bool) -> dict[str, object]:
    """Describe a file in a listing."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
    if large:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _oid(data: bytes) -> str:
    """Git's name for a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _apply(files: Files, body: bytes) -> Files:
    """Apply the lines of a commit request to a copy of the files."""
    changed = dict(files)
    for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
            changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "deletedFile":
            del changed[line["value"]["path"]]
    return changed


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
