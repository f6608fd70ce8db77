"""A stand-in for the hub: an HTTP server with the few calls of its API that an upload makes. It keeps what it gets."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "planted" * 5


@dataclass
class Hub:
    """Holds the content of the stand-in, and the requests that it got.

    Attributes:
        objects: large files by their SHA-256.
        repositories: of each repository, whether it is private, and its files.
        commits: the message of each commit.
        calls: method and path of every request.
        breaks_at: the upload of a large file, counted from 1, with which the hub breaks down; 0 for never.
        cards: of other models, the front matter of their cards.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    breaks_at: int = 0
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    address: str = ""
    _uploads: int = 0

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Returns the status and the content of an answer."""
        self.calls.append((method, path))
        parts = path.partition("?")[0].strip("/").split("/")
        if method == "PUT":  # a large file, which is sent to a signed address without a token
            self._uploads += 1
            if self.breaks_at and self._uploads >= self.breaks_at:
                return 403, {"error": "the hub has broken down"}
            self.objects[parts[-1]] = body
            assert hashlib.sha256(body).hexdigest() == parts[-1]
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "who are you?"}
        content = json.loads(body) if body and "/commit/" not in path else {}
        if parts == ["api", "whoami-v2"]:
            return 200, {"name": "ann", "type": "user", "orgs": []}
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            return self._create(content)
        name = "/".join(parts[2:4])
        if "auth-check" in parts:
            return (403, {"error": "You may only read this"}) if name == "others/theirs" else (200, {})
        if parts[:2] == ["api", "models"] and len(parts) == 4 and name == "others/theirs":
            return 200, {"id": name}
        if method == "GET" and parts[:2] == ["api", "models"] and name in self.cards:
            return 200, {"id": name, "cardData": self.cards[name]}
        if parts[-1] == "batch":
            return 200, {"transfer": "basic", "objects": [self._object(asked) for asked in content["objects"]]}
        if "preupload" in parts:
            return 200, {"files": [self._mode(file) for file in content["files"]]}
        if "commit" in parts:
            return self._commit(name, body)
        return 404, {"error": f"no {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if asked.get("organization") == "others":
            return 403, {"error": "You don't have the rights to create a model under the namespace others"}
        name = f"{asked['organization'] or 'ann'}/{asked['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, {"visibility": asked.get("visibility"), "files": {}})
        return status, {"url": f"{self.address}/{name}", "id": name, "name": name}

    @staticmethod
    def _mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors") or file["size"] > 100_000
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.objects:
            return asked  # without an address: it is here
        return {**asked, "actions": {"upload": {"href": f"{self.address}/objects/{asked['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        kept = self.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                kept[value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{len(self.commits):040x}", "commitOid": f"{1:040x}"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves a hub inside the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = hub.answer(self.command, self.path, body, self.headers.get("Authorization", ""))
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
