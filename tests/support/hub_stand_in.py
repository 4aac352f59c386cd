"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP interface as circuit files need.

`huggingface_hub` itself talks to it. Commits are kept as whole dictionaries of files. `lies` make it misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


class StandIn:
    """One hub: per repository (`models/org/name`) its commits and its branches."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.objects: Files = {}
        self.lies: dict[str, Any] = {}
        self.asked: list[str] = []
        self.endpoint = ""

    def create(self, repo: str) -> None:
        self.commits[repo], self.branches[repo] = {}, {}
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, repo: str, branch: str, files: Files) -> str:
        """The new commit: the files of the branch with these added or replaced."""
        before = self.branches[repo].get(branch, "")
        content = {**self.commits[repo].get(before, {}), **files}
        named = json.dumps([before, {name: hashlib.sha1(data).hexdigest() for name, data in content.items()}])
        oid = hashlib.sha1(named.encode()).hexdigest()
        self.commits[repo][oid] = content
        self.branches[repo][branch] = oid
        return oid

    def resolve(self, repo: str, revision: str) -> str | None:
        commits = self.commits[repo]
        return revision if revision in commits else self.branches[repo].get(revision)


def blob_sha1(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def running() -> Iterator[StandIn]:
    """A hub that answers at `endpoint` until the block ends."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = self._parts()
        if "endless" in self.hub.lies:
            self._endless(self.hub.lies["endless"])
        elif "page" in self.hub.lies:
            self._send(self.hub.lies["page"], 200, {"Content-Type": "text/html"})
        elif parts[0] == "api":  # /api/models/org/name[/revision/main]
            repo, rest = "/".join(parts[1:4]), parts[4:]
            found = self._commit(repo, rest[1] if rest else "main")
            if found is not None:
                siblings = [{"rfilename": name} for name in self.hub.commits[repo][found]]
                siblings += [{"rfilename": name} for name in self.hub.lies.get("names", ())]
                self._json({"id": "/".join(parts[2:4]), "sha": found, "siblings": siblings})
        else:
            self._file(parts)

    def _endless(self, seconds: float) -> None:
        """Send blocks of an answer, so many seconds apart, until the other side has had enough."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            while True:
                self.wfile.write(b" " * 2**16)
                time.sleep(seconds)

    def _file(self, parts: list[str]) -> None:
        """Answer [datasets/]org/name/resolve/revision/path."""
        kind = "datasets" if parts[0] == "datasets" else "models"
        org, name, _, revision, *path = parts[1:] if kind == "datasets" else parts
        repo = f"{kind}/{org}/{name}"
        found = self._commit(repo, revision)
        if found is None:
            return
        data = self.hub.commits[repo][found].get("/".join(path))
        if data is None:
            self._error(404, "EntryNotFound")
            return
        data = self.hub.lies.get("bytes", {}).get("/".join(path), data)
        self._send(data, 200, {"X-Repo-Commit": found, "ETag": f'"{blob_sha1(data)}"'})

    def do_POST(self) -> None:
        body, parts = self.rfile.read(int(self.headers["Content-Length"])), self._parts()
        if parts[-1] == "batch":  # git's large file storage: where to upload
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
            return
        repo, action, revision = "/".join(parts[1:4]), parts[4], parts[5]
        found = self._commit(repo, revision)
        if found is None:
            return
        if "status" in self.hub.lies and action != "paths-info":
            self._error(self.hub.lies["status"], "")
            return
        files = self.hub.commits[repo][found]
        if action == "preupload":
            entries = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": entry["path"] in self.hub.lies.get("ignored", ()),
                    "oid": self._oid(entry["path"], files),
                }
                for entry in json.loads(body)["files"]
            ]
            self._json({"files": entries})
        elif action == "paths-info":
            names = parse_qs(body.decode())["paths"]
            sizes = {name: len(files[name]) for name in names if name in files} | {
                name: size for name, size in self.hub.lies.get("sizes", {}).items() if name in names
            }
            self._json([{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()])
        elif action == "commit":
            added: Files = {}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    added[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    added[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            oid = self.hub.commit(repo, unquote(revision), added)
            self._json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def _oid(self, name: str, files: Files) -> str | None:
        if name not in files:
            return None
        lfs = name.endswith(".safetensors")
        return hashlib.sha256(files[name]).hexdigest() if lfs else blob_sha1(files[name])

    def _parts(self) -> list[str]:
        self.hub.asked.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _commit(self, repo: str, revision: str) -> str | None:
        if repo not in self.hub.commits:
            self._error(404, "RepoNotFound")
            return None
        found = self.hub.resolve(repo, revision)
        if found is None:
            self._error(404, "RevisionNotFound")
        return found

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(header, text)
        self.end_headers()
        self.wfile.write(data)
