"""A Hub on this machine: the few endpoints that a client asks, repositories in memory, and a list of what was asked.

``with FakeHub() as hub: hub.add("a/b", {"config.json": b"{}"})``; clients find it by ``HF_ENDPOINT=hub.url``. Large files (weights) are
listed with their sha256, small ones with git's sha1, as the real Hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".parquet")


@dataclass
class Repo:
    """``files`` at ``revision``. ``gated``: 401 for all. ``cut``: file -> bytes sent once before the line goes dead; then 503.

    ``closed``: files that are listed, but answered with 403.
    """

    files: dict[str, bytes]
    revision: str = "a" * 40
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    """sha256 that the listing claims for a file, where it is not the true one."""
    closed: set[str] = field(default_factory=set)

    def tree(self) -> list[dict[str, Any]]:
        """Files and folders, as the file system of the Hub's client asks for them."""
        folders = {str(parent) for name in self.files for parent in PurePosixPath(name).parents} - {"."}
        out: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        for one in self.siblings():
            lfs = {"lfs": {**one["lfs"], "oid": one["lfs"]["sha256"]}} if "lfs" in one else {}
            out.append({"type": "file", "oid": one["blobId"], "size": one["size"], "path": one["rfilename"], **lfs})
        return out

    def siblings(self) -> list[dict[str, Any]]:
        out = []
        for name, content in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
            if name.endswith(LARGE):
                sha256 = self.listed.get(name, hashlib.sha256(content).hexdigest())
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            out.append(entry)
        return out


class FakeHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, Range header) of every request."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], **facts: Any) -> Repo:
        self.repos[repo] = Repo(dict(files), **facts)
        return self.repos[repo]

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        listing = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        file = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(?:tree|paths-info)/([^/]+)(?:/(.+))?", path)
        found = listing or file or tree
        repo = self.hub.repos.get(found.group(1)) if found else None
        if repo is None:
            return self._no(404, "RepoNotFound")
        if repo.gated:
            return self._no(401, "GatedRepo")
        if found is None or found.group(2) not in (None, "main", repo.revision):
            return self._no(404, "RevisionNotFound")
        if listing:
            about = {"id": listing.group(1), "sha": repo.revision, "siblings": repo.siblings(), "tags": [], "private": False}
            return self._send(json.dumps(about).encode())
        if tree:
            return self._tree(repo, unquote(tree.group(3) or ""))
        name = found.group(3)
        if name in repo.closed:
            return self._no(403, "Forbidden")
        if name not in repo.files:
            return self._no(404, "EntryNotFound")
        self._file(repo, name)

    do_HEAD = do_POST = do_GET

    def _tree(self, repo: Repo, folder: str) -> None:
        entries = repo.tree()
        if self.command == "POST":  # the client names the paths that it wants to know about
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            return self._send(json.dumps([entry for entry in entries if entry["path"] in body["paths"]]).encode())
        deep = "recursive=true" in self.path.lower()
        inside = [entry for entry in entries if entry["path"].startswith(f"{folder}/") or not folder]
        if folder and not inside:
            return self._no(404, "EntryNotFound")
        near = [entry for entry in inside if deep or str(PurePosixPath(entry["path"]).parent) == (folder or ".")]
        self._send(json.dumps(near).encode())

    def _file(self, repo: Repo, name: str) -> None:
        content, wanted = repo.files[name], self.headers.get("Range")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "bytes=0-")
        start, last = int(asked.group(1)), min(int(asked.group(2) or len(content)), len(content) - 1)
        extra = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repo.revision, "Accept-Ranges": "bytes"}
        if wanted:
            extra["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        content = content[: last + 1]
        end = min(repo.cut.get(name, len(content)), len(content))
        if end <= start and repo.files[name]:
            return self._no(503, "Unavailable")
        if name in repo.cut:
            repo.cut[name] = 0
        self._send(content[start:], 206 if wanted else 200, extra, end - start)

    def _send(self, body: bytes, status: int = 200, extra: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None and sent < len(body):
            self.close_connection = True

    def _no(self, status: int, code: str) -> None:
        self._send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""
