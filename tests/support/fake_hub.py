"""A small HuggingFace hub on 127.0.0.1: the endpoints that an upload calls, with real storage."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Iterator

# The hub keeps smaller text files in git, and all others in large file storage.
_SMALL = (".json", ".md", ".txt")


@dataclass
class FakeHub:
    """What the hub holds, and what it was asked."""

    url: str = ""
    """Address of the server."""
    refuses: tuple[str, int, str] | None = None
    """Part of a path, status and message of requests that are refused."""
    repos: dict[str, bool] = field(default_factory=dict)
    """Whether a repository is private, by name with owner."""
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """Files by name, by repository and branch."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    messages: list[str] = field(default_factory=list)
    """Titles of the commits."""
    calls: list[str] = field(default_factory=list)
    """Method and path of each request."""
    authorization: str | None = None
    """What the latest request with a token sent."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Answer a request: status, and JSON."""
        if self.refuses is not None and self.refuses[0] in path:
            return self.refuses[1], {"error": self.refuses[2]}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        return self._about_files(method, [unquote(p) for p in path.split("/") if p], body)

    def _about_files(
        self, method: str, parts: list[str], body: bytes
    ) -> tuple[int, dict[str, Any]]:
        if method == "PUT" and parts[0] == "objects":
            is_whole = hashlib.sha256(body).hexdigest() == parts[1]
            self.objects.update({parts[1]: body} if is_whole else {})
            return (200 if is_whole else 422), {}
        if method == "HEAD" and "resolve" in parts:
            at = parts.index("resolve")
            files = self.branches.get(("/".join(parts[:at]), parts[at + 1]), {})
            return (200 if "/".join(parts[at + 2 :]) in files else 404), {}
        repo = "/".join(parts[2:4])
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        return self._in_repo(repo, parts[4], parts[5], body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        is_new = name not in self.repos
        if is_new:
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.repos[name] = bool(is_private)
            self.branches[name, "main"] = {}
        found = {"url": f"{self.url}/{name}", "name": name, "id": name}
        return (200 if is_new else 409), found

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {
                **one,
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}},
            }
            for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _in_repo(
        self, repo: str, what: str, branch: str, body: bytes
    ) -> tuple[int, dict[str, Any]]:
        if what == "branch":
            is_new = (repo, branch) not in self.branches
            self.branches.setdefault((repo, branch), {})
            return (200 if is_new else 409), {}
        if what == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "regular" if one["path"].endswith(_SMALL) else "lfs",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if what == "commit":
            return self._commit(self.branches[repo, branch], repo, body)
        return 404, {"error": f"no {what} here"}

    def _commit(
        self, files: dict[str, bytes], repo: str, body: bytes
    ) -> tuple[int, dict[str, Any]]:
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                self.messages.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                return 400, {"error": f"the fake hub cannot do {kind}"}
        oid = f"{len(self.messages):040x}"
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Run a hub for the body of the `with` statement."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Keep the output of the tests clean."""

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.calls.append(f"{self.command} {path}")
            hub.authorization = self.headers.get("Authorization", hub.authorization)
            status, value = hub.answer(self.command, path, body)
            data = b"" if self.command == "HEAD" else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.command == "HEAD" and status == 200:
                self.send_header("ETag", '"x"')
                self.send_header("X-Repo-Commit", "0" * 40)
            if status == 404:
                is_file = "/resolve/" in path
                self.send_header("X-Error-Code", "EntryNotFound" if is_file else "RepoNotFound")
            if status == 403:
                self.send_header("X-Error-Message", value["error"])
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 - the names of http.server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
