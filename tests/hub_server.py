"""A small Hugging Face hub on 127.0.0.1, for tests: repositories in memory, spoken to over real HTTP.

It speaks the part of the hub's API that `huggingface_hub` uses to look at, download, create and commit to
model repositories (uploads of large files go the Git LFS way, so clients set `HF_HUB_DISABLE_XET=1`). Point a
process at it with `HF_ENDPOINT`, which is read when `huggingface_hub` is imported.

    with HubServer() as hub:
        commit = hub.add("team/model", {"config.json": b"{}"})
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path)})
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

USER = "tester"
TOKEN = "hf_local_test_token"
_LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """One model repository: its commits (sha -> files) and what its branches and tags point at."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str, message: str = "") -> str:
        content = repr((len(self.commits), sorted(files.items()))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = dict(files)
        self.messages[sha] = message
        self.refs[ref] = sha
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(ref, ref)]


class HubServer:
    """The server, running in a thread while the `with` block lasts.

    Attributes:
        repositories: by id.
        renamed: old id -> new id; requests for the old one are redirected.
        requests: every request so far, as "METHOD path".
        status: answer every request with this status instead of serving it; 0 serves.
        broken: path in a repository -> after how many bytes the connection is reset, each time it is downloaded.
        interrupted: path in a repository -> after how many bytes the connection ends, the first time.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[str] = []
        self.status = 0
        self.broken: dict[str, int] = {}
        self.interrupted: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self,
        model_id: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit these files (and no others) to a branch of a repository, made if it is new; the commit's sha."""
        repository = self.repositories.setdefault(model_id, Repository())
        repository.private, repository.gated = private, gated
        return repository.commit(files, revision)

    def downloads(self) -> list[str]:
        """The files that were sent, by their path in the repository."""
        return [line.split("/resolve/")[1].split("/", 1)[1] for line in self.requests if _is_download(line)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _is_download(line: str) -> bool:
    return line.startswith("GET ") and "/resolve/" in line


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class _Problem(Exception):
    """An answer that is an error, with the code that the hub puts in its headers."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    # --- one request -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        hub = self.server.hub
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        try:
            if hub.status:
                raise _Problem(hub.status, message="as the test asked")
            for old, new in hub.renamed.items():
                if f"/{old}/" in f"{path}/":
                    self._send(b"", HTTPStatus.TEMPORARY_REDIRECT, Location=self.path.replace(f"/{old}", f"/{new}", 1))
                    return
            parts = path.strip("/").split("/")
            if self.command in ("GET", "HEAD"):
                self._read(parts)
            else:
                self._write(parts, body)
        except _Problem as problem:
            content = json.dumps({"error": problem.message}).encode()
            headers = {"X-Error-Code": problem.code, "X-Error-Message": problem.message}
            self._send(content, problem.status, **{name: text for name, text in headers.items() if text})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, Content_Type="application/json")

    # --- looking and downloading -----------------------------------------------------------------------

    def _read(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "models"]:
            model_id, repository, rest = self._repository(parts[2:])
            if rest[:1] == ["tree"]:
                self._send_json([_tree_entry(*item) for item in _files(repository, rest[1]).items()])
            elif not rest or rest[0] == "revision":
                self._send_json(_model_info(model_id, repository, rest[1] if rest else "main"))
            else:
                raise _Problem(404)
        elif "resolve" in parts:
            _, repository, rest = self._repository(parts)
            if repository.gated and not self._logged_in():
                raise _Problem(403, "GatedRepo", "access to this model is restricted")
            self._send_file(repository, rest[1], "/".join(rest[2:]))
        else:
            raise _Problem(404)

    def _repository(self, parts: list[str]) -> tuple[str, Repository, list[str]]:
        """The repository that a path begins with, and the rest of the path."""
        logged_in = self._logged_in()
        for length in (2, 1):
            repository = self.server.hub.repositories.get("/".join(parts[:length]))
            if repository is not None and (not repository.private or logged_in):
                return "/".join(parts[:length]), repository, parts[length:]
        # The hub does not say whether what one may not see exists.
        raise _Problem(404 if logged_in else 401, "RepoNotFound", "Repository not found")

    def _logged_in(self) -> bool:
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            raise _Problem(401, message="Invalid credentials in Authorization header")
        return token is not None

    def _send_file(self, repository: Repository, revision: str, path: str) -> None:
        files = _files(repository, revision)
        if path not in files:
            raise _Problem(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {
            "ETag": f'"{_oid(path, content)}"',
            "X_Repo_Commit": repository.refs.get(revision, revision),
            "Accept_Ranges": "bytes",
        }
        status, start = HTTPStatus.OK, 0
        wanted = self.headers.get("Range")
        if wanted is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        hub = self.server.hub
        if self.command == "GET" and path in hub.broken:
            self._send_some(content[start:], hub.broken[path], status, headers)
            # Without lingering, to close is to reset: what was not yet read is lost to the client.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif self.command == "GET" and path in hub.interrupted:
            self._send_some(content[start:], hub.interrupted.pop(path), status, headers)
        else:
            self._send(content[start:], status, **headers)

    def _send_some(self, content: bytes, cut: int, status: int, headers: dict[str, str]) -> None:
        """Promise all of the content and send the beginning of it; the connection ends after that."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = True

    # --- creating and committing -----------------------------------------------------------------------

    def _write(self, parts: list[str], body: bytes) -> None:
        # Where a large file goes is an address of its own, and whoever was given it may write there.
        if parts[0] != "lfs" and not self._logged_in():
            raise _Problem(401, message="Invalid username or password.")
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._send_json({"errors": [], "warnings": []})
        elif parts[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                raise _Problem(400, message="the content does not have the promised checksum")
            self.server.hub.uploads[parts[1]] = body
            self._send(b"")
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self._send_json({"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]})
        else:
            model_id, repository, rest = self._repository(parts[2:])
            if rest[0] == "branch":
                self._branch(repository, rest[1])
            elif rest[0] == "preupload":
                self._send_json({"files": [_upload_mode(item["path"]) for item in json.loads(body)["files"]]})
            elif rest[0] == "commit":
                self._commit(model_id, repository, rest[1], body)
            else:
                raise _Problem(404)

    def _create(self, request: dict[str, Any]) -> None:
        model_id = f"{request.get('organization') or USER}/{request['name']}"
        repositories = self.server.hub.repositories
        status = HTTPStatus.CONFLICT if model_id in repositories else HTTPStatus.OK
        if status == HTTPStatus.OK:
            private = request.get("private") or request.get("visibility") == "private"
            repositories[model_id] = Repository(private=bool(private))
            repositories[model_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        self._send_json({"url": f"{self.server.hub.url}/{model_id}", "id": model_id}, status)

    def _branch(self, repository: Repository, branch: str) -> None:
        if branch in repository.refs:
            raise _Problem(409, message="the branch exists")
        repository.refs[branch] = repository.refs["main"]
        self._send_json({})

    def _lfs(self, item: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.hub.url}/lfs/{item['oid']}"
        return {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": href}}}

    def _commit(self, model_id: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(_files(repository, branch))
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.hub.uploads[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Problem(400, message=f"unknown operation {key}")
        sha = repository.commit(files, branch, message)
        self._send_json({"commitUrl": f"{self.server.hub.url}/{model_id}/commit/{sha}", "commitOid": sha})


def _files(repository: Repository, revision: str) -> dict[str, bytes]:
    sha = repository.refs.get(revision, revision)
    if sha not in repository.commits:
        raise _Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return repository.commits[sha]


def _oid(path: str, content: bytes) -> str:
    """What the hub knows a file by: its SHA-256 if it is large, its Git blob id if it is not."""
    if path.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
    return entry


def _model_info(model_id: str, repository: Repository, revision: str) -> dict[str, Any]:
    files = _files(repository, revision)
    return {
        "id": model_id,
        "modelId": model_id,
        "sha": repository.refs.get(revision, revision),
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "siblings": [{"rfilename": path} for path in sorted(files)],
        "tags": [],
        "downloads": 0,
    }


def _upload_mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}
