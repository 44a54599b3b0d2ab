"""A small stand-in for the Hugging Face Hub, for tests without a network.

It speaks as much of the Hub's HTTP interface as `huggingface_hub` needs to create a repository, commit to it (text in
the commit itself, weights through Git LFS) and download it again: enough for `push_to_hub` and `from_pretrained`.
Repositories live in memory; every commit keeps its own files, and there is one branch, `main`. Anyone may do anything,
except to repositories in `read_only`.
Xet storage is not spoken (clients set HF_HUB_DISABLE_XET=1), nor are multi-part uploads.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".mp4", ".model")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Repository:
    """Commits of whole trees: path -> content."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.commits: dict[str, dict[str, bytes]] = {}
        self.head = ""
        self.commit({".gitattributes": b""})

    def commit(self, changes: Mapping[str, bytes | None]) -> str:
        """A new commit on `main`, with files added or replaced, and those that are `None` deleted."""
        tree = {**self.commits.get(self.head, {}), **changes}
        tree = {path: content for path, content in sorted(tree.items()) if content is not None}
        digest = hashlib.sha1(f"{len(self.commits)} {self.head}".encode())
        for path, content in tree.items():
            digest.update(path.encode() + b"\0" + content)
        self.head = digest.hexdigest()
        self.commits[self.head] = tree
        return self.head

    def resolve(self, revision: str) -> str:
        """The commit of a branch or of a commit's own hash; KeyError if there is none."""
        sha = self.head if revision == "main" else revision
        if sha not in self.commits:
            raise KeyError(revision)
        return sha


def git_blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_blob_sha1(content)


class HubServer:
    """The server. Use it as a context manager; `url` is what HF_ENDPOINT should be, or HTTP_PROXY."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.read_only: set[str] = set()  # repositories, there or not, that nobody may create or write to
        self.requests: list[tuple[str, str]] = []  # (method, path), in the order they came
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository: path -> content."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]

    def commit(self, repo_id: str, changes: Mapping[str, bytes | None]) -> str:
        """Commit without a client, creating the repository if there is none. Returns the commit's hash."""
        return self.repositories.setdefault(repo_id, Repository(repo_id)).commit(changes)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # by which each answer's body would wait 40 ms for the client to confirm its head
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Say nothing: the requests are in `HubServer.requests`."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path, body = unquote(urlsplit(self.path).path), self._read_body()
        self.hub.requests.append((method, path))
        matches = ((re.fullmatch(pattern, path), answer) for methods, pattern, answer in ROUTES if method in methods)
        match, answer = next(((match, answer) for match, answer in matches if match), (None, None))
        if match is None:
            return self._error(404, "EntryNotFound", f"no such page: {method} {path}")
        values = match.groupdict()
        if "repo" in values:
            if values["repo"] not in self.hub.repositories:
                return self._error(404, "RepoNotFound", f"no repository {values['repo']}")
            values["repo"] = self.hub.repositories[values["repo"]]
        if "revision" in values:
            try:
                values["revision"] = values["repo"].resolve(values["revision"] or "main")
            except KeyError:
                return self._error(404, "RevisionNotFound", f"no revision {values['revision']}")
        return answer(self, body, **values)

    @property
    def _address(self) -> str:
        """Where the client takes this server to be; if this is its proxy, at an address of the client's own."""
        return f"http://{self.headers['Host']}"

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content_Type": "application/octet-stream", "Content_Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, *, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status=status, Content_Type="application/json", **headers)

    def _error(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status=status, X_Error_Code=code, X_Error_Message=message)

    def create(self, body: bytes) -> None:
        wish = json.loads(body)
        repo_id = f"{wish.get('organization') or 'user'}/{wish['name']}"
        if repo_id in self.hub.read_only:
            return self._error(403, "Forbidden", f"you may not create {repo_id}")
        existed = repo_id in self.hub.repositories
        self.hub.repositories.setdefault(repo_id, Repository(repo_id))
        answer = {"url": f"{self._address}/{repo_id}"}
        return self._json({**answer, "error": "exists"} if existed else answer, status=409 if existed else 200)

    def may_write(self, _: bytes, repo: Repository) -> None:
        if repo.repo_id in self.hub.read_only:
            return self._error(403, "Forbidden", f"you may not write to {repo.repo_id}")
        return self._json({})

    def validate_card(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, _: bytes, repo: Repository, revision: str) -> None:
        siblings = [{"rfilename": path} for path in repo.commits[revision]]
        self._json({"id": repo.repo_id, "modelId": repo.repo_id, "sha": revision, "siblings": siblings, "tags": []})

    def tree(self, _: bytes, repo: Repository, revision: str) -> None:
        entries = []
        for path, content in repo.commits[revision].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob_sha1(content)}
            if is_lfs(path):
                entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def resolve(self, _: bytes, repo: Repository, revision: str, path: str) -> None:
        if path not in repo.commits[revision]:
            return self._error(404, "EntryNotFound", f"no file {path}")
        content = repo.commits[revision][path]
        return self._send(content, ETag=f'"{etag(path, content)}"', X_Repo_Commit=revision)

    def preupload(self, body: bytes, repo: Repository, revision: str) -> None:
        tree = repo.commits[revision]
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            oid = etag(path, tree[path]) if path in tree else None
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, repo: Repository) -> None:
        answers = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self._address}/lfs/{wanted['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "BadDigest", f"{len(body)} bytes that are not {oid}")
        self.hub.lfs_objects[oid] = body
        return self._send(b"")

    def commit(self, body: bytes, repo: Repository, revision: str) -> None:
        changes: dict[str, bytes | None] = {}
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                changes[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif kind == "deletedFile":
                changes[value["path"]] = None
            elif kind == "deletedFolder":
                changes |= dict.fromkeys(path for path in repo.commits[revision] if path.startswith(value["path"]))
        sha = repo.commit(changes)
        self._json({"commitUrl": f"{self._address}/{repo.repo_id}/commit/{sha}", "commitOid": sha})


ROUTES = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate_card),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (("GET",), rf"/api/models/{REPO}/auth-check/write", _Handler.may_write),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
]
