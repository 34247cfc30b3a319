"""A little Hugging Face hub on loopback: what its client needs to find and read the files of datasets."""

import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3
"""Files in one answer of a listing: there are always several."""


@dataclass
class Repo:
    """A dataset: `revisions` name commits, each of which has files; `gated` for those without the token."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Hub:
    """What it has, and what it was asked for: `asked` has the bytes of all ranges by path, `requests` all paths.

    `faults`: what the next requests for content meet, first to last: a status, or "cut", or "reset".
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[object] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def commit(self, dataset, files, revision="main"):
        """Set what a revision is, and give the commit."""
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        revisions = self.repos.setdefault(dataset, Repo()).revisions
        revisions[revision] = revisions[sha] = dict(files)
        return sha


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refused(Exception):
    def __init__(self, status, code):
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(self._get)

    def do_HEAD(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._paths_info)

    def _answer(self, function):
        self.path_only = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(self.path_only)}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        try:
            function()
        except _Refused as refused:
            self._send(refused.status, b"", {"X-Error-Code": refused.code} if refused.code else {})

    def _send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, headers=None):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _files(self, dataset, revision):
        repo = self.hub.repos.get(dataset)
        if repo is None:
            raise _Refused(404, "RepoNotFound")
        if repo.gated and self.headers.get("Authorization") != "Bearer hf_good":
            raise _Refused(403, "GatedRepo")
        if unquote(revision) not in repo.revisions:
            raise _Refused(404, "RevisionNotFound")
        return repo.revisions[unquote(revision)]

    def _get(self):
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.path_only):
            dataset, revision = found.groups()
            files = self._files(dataset, revision or "main")
            sha = next(
                name for name, each in self.hub.repos[dataset].revisions.items() if each == files and len(name) == 40
            )
            self._json({"id": dataset, "sha": sha, "siblings": [], "tags": [], "private": False})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self.path_only):
            self._tree(*found.groups())
        elif found := re.fullmatch(r"/(?:cdn/)?datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", self.path_only):
            self._content(*found.groups())
        else:
            raise _Refused(404, "")

    def _tree(self, dataset, revision, folder):
        files, query = self._files(dataset, revision), parse_qs(urlsplit(self.path).query)
        front = f"{unquote(folder)}/" if folder else ""
        below = {name: data for name, data in files.items() if name.startswith(front)}
        if front and not below:
            raise _Refused(404, "EntryNotFound")
        items = [_item(name, data) for name, data in below.items()]
        folders = {name[: at + len(front)] for name in below for at, end in enumerate(name[len(front) :]) if end == "/"}
        items += [{"type": "directory", "path": path, "oid": oid(path.encode())} for path in folders]
        if query.get("recursive", [""])[0].lower() != "true":
            items = [item for item in items if "/" not in item["path"][len(front) :]]
        items.sort(key=lambda item: item["path"][::-1])  # in no order that anybody relies on
        at = int(query.get("cursor", ["0"])[0])
        more = {}
        if at + PAGE < len(items):
            rest = "&".join(f"{name}={each[0]}" for name, each in query.items() if name != "cursor")
            more = {"Link": f'<{self.hub.url}{self.path_only}?{rest}&cursor={at + PAGE}>; rel="next"'}
        self._json(items[at : at + PAGE], more)

    def _paths_info(self):
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", self.path_only)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        files = self._files(*found.groups())
        items = []
        for path in parse_qs(body)["paths"]:
            if path in files:
                items.append(_item(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                items.append({"type": "directory", "path": path, "oid": oid(path.encode())})
        self._json(items)

    def _content(self, dataset, revision, path):
        files = self._files(dataset, revision)
        path = unquote(path)
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        if not self.path_only.startswith("/cdn"):  # as the hub does for large files
            self._send(302, b"", {"Location": f"{self.hub.url}/cdn{self.path_only}?signed=secret"})
            return
        fault = self.hub.faults.pop(0) if self.hub.faults else None
        if isinstance(fault, int):
            raise _Refused(fault, "")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        data = files[path][start : stop + 1]
        self.hub.asked[path] = self.hub.asked.get(path, 0) + len(data)
        size = len(files[path])
        headers = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{size}", "Content-Length": len(data)}
        if fault == "cut":
            self.close_connection = True
            data = data[: len(data) // 2]
        self._send(206, data, headers)


def _item(path, data):
    return {"type": "file", "path": path, "size": len(data), "oid": oid(data)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # else clients that come side by side wait a second, and on a busy machine give up


@contextmanager
def serving():
    """A hub that runs in the block."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
