"""Stands in for the Hugging Face Hub over HTTP: repositories, uploads of files as Git or LFS objects, and downloads.

It speaks the part of the Hub's interface that `huggingface_hub` uses to create a repository, commit files to it, and
read one file of a revision. Everything is in memory. A private repository and every write need TOKEN.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_test"


class Server(ThreadingHTTPServer):
    """Holds the repositories: the files of each commit, by name; and the large objects, by hash."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, revision: str = "main") -> int | None:
        """Returns the number of the commit that a revision names; a commit's hash is its number."""
        if revision == "main":
            return len(self.commits[name]) - 1
        return int(revision, 16) if re.fullmatch("[0-9a-f]{40}", revision) else None

    def files(self, name: str) -> dict[str, bytes]:
        """Returns the files of the newest commit."""
        return self.commits[name][-1]


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":  # the metadata of the card
            about = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self._answer(200, {"errors": [], "warnings": []} if isinstance(about, dict) else {"errors": ["no"]})
        if not (found := re.fullmatch(r"(?:/api/models)?/([^/]+/[^/.]+)[./](.+)", self.path)):
            return self._answer(404, {"error": "Not found"})
        name, action = found.groups()
        if action == "git/info/lfs/objects/batch":
            return self._batch(json.loads(body))
        if action.startswith("preupload/"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if action.startswith("commit/"):
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": "Not found"})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)):
            return self._answer(404, {"error": "Not found"})
        name, revision, path = found.groups()
        hidden = name in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if name not in self.server.commits or hidden:
            return self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        number = self.server.commit(name, revision)
        if number is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files, headers = self.server.commits[name][number], {"X-Repo-Commit": f"{number:040x}"}
        if path not in files:
            return self._answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        content = files[path]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(200, content, headers)

    def _create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.commits:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        self.server.commits[name] = [{}]
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(name)
        return self._answer(200, {"url": url})

    def _batch(self, wanted: dict) -> None:
        objects = [
            {
                **what,
                "actions": {} if what["oid"] in self.server.objects else {"upload": {"href": f"{self.server.url}/put"}},
            }
            for what in wanted["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict]) -> None:
        files = dict(self.server.commits[name][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.server.commits[name].append(files)
        oid = f"{len(self.server.commits[name]) - 1:040x}"
        self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """Serves an empty Hub until the block ends."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
