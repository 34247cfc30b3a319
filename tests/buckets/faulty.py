"""A proxy between a client and a server of buckets that does what networks and servers do."""

import http.client
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)


class Asked(NamedTuple):
    """A request, and how many came before it; `wanted`: the range; `headers`: in small letters."""

    number: int
    method: str
    path: str
    conditional: bool
    wanted: str | None
    headers: dict[str, str]


Fault = Callable[[Asked], str | None]
"""What is done to a request: 500, 503, slow, held (until the proxy's `go` is set), cut (the answer, in the middle),
lost (the answer to what was done), unconditional (If-None-Match is not looked at), moved (it is
elsewhere), CODE (an error 403 of that code),
"400 CODE" (one of another status); None: nothing."""


class Proxy(ThreadingHTTPServer):
    """`asked` has all requests, `sent` the bytes that went out of each path, `done` the faults."""

    daemon_threads = True
    request_queue_size = 128  # else clients that come side by side wait a second, and on a busy machine give up

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = urlsplit(server).netloc
        self.fault: Fault = lambda asked: None
        self.asked: list[Asked] = []
        self.done: list[str] = []
        self.sent: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.go = threading.Lock(), threading.Event()

    def hold_the_end(self) -> None:
        """No run that is written through here is over before `go` is set: its manifest is held."""
        self.fault = lambda asked: "held" if asked.method == "PUT" and asked.path.endswith("manifest.json") else None

    def told(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        with self.lock:
            conditional = "if-none-match" in headers
            asked = Asked(len(self.asked), method, path, conditional, headers.get("range"), headers)
            self.asked.append(asked)
            fault = self.fault(asked)
            if fault:
                self.done.append(fault)
            return fault

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        fault = self.server.told(
            self.command, unquote(self.path), {name.lower(): value for name, value in self.headers.items()}
        )
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault in ("500", "503"):
            return self._answer(int(fault), {}, SLOW_DOWN)
        if fault == "moved":
            return self._answer(307, {"Location": f"http://{self.server.server}{self.path}"}, b"")
        if fault and fault.split()[-1][0].isupper():
            status, _, code = fault.rpartition(" ")
            return self._answer(int(status or 403), {}, SLOW_DOWN.replace(b"SlowDown", code.encode()))
        if fault == "slow":
            threading.Event().wait(0.2)
        if fault == "held":
            self.server.go.wait()
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        if fault == "unconditional":
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        connection = http.client.HTTPConnection(self.server.server)
        try:
            connection.request(self.command, self.path, body, {**headers, "Host": self.server.server})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        told = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date", "server")
        }
        if fault == "lost":
            self.close_connection = True
            return None
        if self.command == "GET":
            with self.server.lock:
                self.server.sent[unquote(self.path)] += len(data)
        return self._answer(answer.status, told, data, cut=fault == "cut")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any
