"""A server on loopback that speaks what huggingface_hub asks of the Hub, and remembers it all."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

TOKEN = "hf_open_sesame"

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Hub:
    """Repositories: a list of commits each, and each commit is all its files."""

    address: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        history = self.commits[repo]
        return history[-1 if revision == "main" else int(revision, 16) - 1]

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        self.asked.append(f"{method} {path}")
        if path.startswith("/large/"):
            return self._large(method, path[len("/large/") :], body)
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return refuse(401, "RepoNotFound", "Invalid username or password.")
        for pattern, handle in self._routes().items():
            wanted, route = pattern.split(" ")
            if (found := re.fullmatch(route, path)) and method in wanted.split("|"):
                repo, *rest = found.groups() or ("",)
                if repo and repo not in self.commits:
                    return refuse(404, "RepoNotFound", "Repository not found")
                return handle(repo, *rest, body)
        return refuse(404, "EntryNotFound", f"no such thing: {method} {path}")

    def _routes(self) -> dict[str, Callable[..., Answer]]:
        repo = r"([\w.-]+/[\w.-]+)"
        return {
            "POST /api/repos/create": self._create,
            "POST /api/validate-yaml": self._validate,
            f"GET /api/models/{repo}": self._info,
            f"GET /api/models/{repo}/revision/([^/]+)": self._info,
            f"GET /api/models/{repo}/tree/([^/?]+).*": self._tree,
            f"POST /api/models/{repo}/preupload/main.*": self._preupload,
            f"POST /{repo}\\.git/info/lfs/objects/batch": self._batch,
            f"POST /api/models/{repo}/commit/main.*": self._commit,
            f"GET|HEAD /{repo}/resolve/([^/]+)/(.+)": self._resolve,
        }

    def _create(self, _: str, body: bytes) -> Answer:
        asked = json.loads(body)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        if repo in self.commits:
            return refuse(409, "", "You already created this model repo", url=self._url(repo))
        self.commits[repo], self.private[repo] = [{}], is_private
        return as_json({"url": self._url(repo), "name": repo})

    def _validate(self, _: str, body: bytes) -> Answer:
        text = json.loads(body)["content"]
        faults = [] if text.startswith("---\nlibrary_name: ") else [{"message": "no header"}]
        return as_json({"errors": faults, "warnings": []})

    def _url(self, repo: str) -> str:
        return f"{self.address}/{repo}"

    def _sha(self, repo: str, revision: str) -> str:
        return f"{len(self.commits[repo]):040x}" if revision == "main" else revision

    def _info(self, repo: str, revision: str = "main", *_: object) -> Answer:
        if revision != "main" and not re.fullmatch("[0-9a-f]{40}", str(revision)):
            return refuse(404, "RevisionNotFound", f"Invalid rev id: {revision!s}")
        siblings = [{"rfilename": name} for name in self.files(repo, revision)]
        sha = self._sha(repo, revision)
        return as_json({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings})

    def _tree(self, repo: str, revision: str, _: bytes) -> Answer:
        listed = [
            {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
            for name, content in self.files(repo, revision).items()
        ]
        return as_json(listed)

    def _preupload(self, repo: str, body: bytes) -> Answer:
        del repo
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return as_json({"files": modes})

    def _batch(self, repo: str, body: bytes) -> Answer:
        del repo
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/large/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return as_json({"transfer": "basic", "objects": objects})

    def _large(self, method: str, oid: str, body: bytes) -> Answer:
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            self.large[oid] = body
            return 200, {}, b""
        return 200, {}, self.large[oid]

    def _commit(self, repo: str, body: bytes) -> Answer:
        files = dict(self.files(repo))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    self.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
                case other:
                    return refuse(400, "", f"unknown operation {other}")
        self.commits[repo].append(files)
        sha = self._sha(repo, "main")
        url = f"{self._url(repo)}/commit/{sha}"
        return as_json({"success": True, "commitOid": sha, "commitUrl": url})

    def _resolve(self, repo: str, revision: str, path: str, _: bytes) -> Answer:
        files = self.files(repo, revision)
        if unquote(path) not in files:
            return refuse(404, "EntryNotFound", "Entry not found")
        content = files[unquote(path)]
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": self._sha(repo, revision)}
        return 200, headers, content


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def as_json(value: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def refuse(status: int, code: str, message: str, **more: str) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return status, headers, json.dumps({"error": message, **more}).encode()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            chunked = self.headers.get("Transfer-Encoding") == "chunked"
            n_bytes = int(self.headers.get("Content-Length", 0))
            body = b"".join(self._chunks()) if chunked else self.rfile.read(n_bytes)
            given = {name.lower(): value for name, value in self.headers.items()}
            status, headers, content = hub.answer(self.command, self.path, given, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _chunks(self) -> Iterator[bytes]:
            while n_bytes := int(self.rfile.readline(), 16):
                yield self.rfile.read(n_bytes)
                self.rfile.readline()
            self.rfile.readline()

        do_GET = do_HEAD = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
