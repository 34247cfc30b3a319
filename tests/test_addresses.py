"""How a server is reached: queries, headers and proxies, and that no message holds what is secret in them."""

import asyncio
import errno
import os
import re
import sys

import msgspec
import pytest
from aiohttp import ClientProxyConnectionError
from aiohttp.client_reqrep import ConnectionKey
from helpers import cli, jsonl
from test_wire import tls
from wires import answering, body, http, told

from millstream.client.client import Client, Reply
from millstream.errors import RequestError
from millstream.llm.addresses import address_of, checked_headers
from millstream.llm.proxies import proxy_for
from millstream.llm.wire import Wire, WireError
from millstream.runs.ask.settings import AskSettings

SAID = http(msgspec.json.encode({"choices": [{"message": {"content": "Paris"}, "finish_reason": "stop"}]}))
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def heard_by(reply, base_url, **options):
    """What a server, or a proxy, heard of one attempt, and what that ended with; {} in the URL is its address."""

    async def main():
        async with answering(reply) as (address, heard):
            given = {name: value.format(address) if name == "proxy" else value for name, value in options.items()}
            async with Wire(base_url.format(address), **given) as wire:
                try:
                    ended = await wire.send(body("hello"))
                except WireError as error:
                    ended = error
                return heard[0].decode() if heard else "", ended, wire

    return asyncio.run(main())


# --- base URLs ---


@pytest.mark.parametrize(
    ("base", "asked"),
    [
        ("http://{}/v1", "/v1/chat/completions"),
        ("http://{}/v1/", "/v1/chat/completions"),
        ("http://{}/v1/chat/completions", "/v1/chat/completions"),
        ("http://{}/v1/chat/completions/", "/v1/chat/completions"),
        ("http://{}/v1/completions", "/v1/chat/completions"),
        ("http://{}/chat", "/chat/chat/completions"),
        (
            "http://{}/openai/deployments/gpt?api-version=2024-10-21",
            "/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
        ),
        ("http://{}/v1/chat/completions?api-version=1&x=y", "/v1/chat/completions?api-version=1&x=y"),
    ],
)
def test_where_a_request_goes(base, asked):
    heard, answer, _ = heard_by(SAID, base)
    assert heard.startswith(f"POST {asked} HTTP/1.1\r\n")
    assert answer.text == "Paris"
    assert "?" not in answer.server


def test_a_query_is_never_shown_unless_it_is_a_version():
    words = "no sk/1 and no sk%2F1 at 2024-10-21"
    refused = http(msgspec.json.encode({"error": {"message": words}}), "400 Bad Request")
    _, failed, wire = heard_by(refused, "http://{}/v1?key=sk%2F1&api-version=2024-10-21")
    assert "no *** and no *** at 2024-10-21" in str(failed)
    assert "sk" not in f"{failed} {wire!r} {wire.base_url}"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/v1?a=se@cret", "http://127.0.0.1/v1?secret#x", "http://x/?a=\nsecret"]
)
def test_a_query_that_is_none_is_refused_without_it(url):
    with pytest.raises(RequestError, match="base URL") as refused:
        address_of(url)
    assert "cret" not in str(refused.value)


# --- headers ---


def test_headers_are_sent_in_the_place_of_our_own():
    headers = {"api-key": "abc", "authorization": "Token xyz", "USER-AGENT": "mill/2", "Host": "model.example.org"}
    heard, answer, _ = heard_by(SAID, "http://{}/v1", api_key="sk-secret", headers=headers)
    assert answer.text == "Paris"
    for name, value in headers.items():
        assert len(re.findall(rf"(?im)^{name}: (.*)\r$", heard)) == 1
        assert re.search(rf"(?im)^{name}: {re.escape(value)}\r$", heard)
    assert "sk-secret" not in heard


def test_no_message_holds_a_header_that_a_server_echoes():
    words = "Bearer sk-hidden is wrong, sk-hidden is, and mill-of-mine is"
    refused = http(msgspec.json.encode({"error": {"message": words}}), "401 Unauthorized")
    given = {"Authorization": "Bearer sk-hidden", "X-Team": "mill-of-mine"}
    _, failed, wire = heard_by(refused, "http://{}/v1", headers=given)
    assert "*** is wrong, *** is, and *** is" in str(failed)
    assert not any(secret in f"{failed} {wire!r}" for secret in ("hidden", "mine"))


@pytest.mark.parametrize(
    "headers",
    [
        {"X: y": "hidden"},
        {"": "hidden"},
        {"X-Team": "hidden\r\nX: y"},
        {"X-Team": "h\u00eddden hidden"},
        {"content-length": "hidden"},
        {"Transfer-Encoding": "hidden"},
        {"X-Team": 5},
    ],
)
def test_headers_that_cannot_be_sent_are_refused_without_their_value(headers):
    with pytest.raises(RequestError, match="header") as refused:
        checked_headers(headers)
    assert "hidden" not in str(refused.value)


def test_the_command_sends_headers_and_never_shows_them(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(jsonl([{"prompt": "hello"}]))

    async def main():
        async with answering(http(b'{"error": {"message": "not hidden-1"}}', "401 Unauthorized")) as (address, heard):
            out = str(tmp_path / "out.jsonl")
            front = (sys.executable, "-m", "millstream", "ask", str(prompts), "--out", out, "--model", "m")
            rest = ("--base-url", f"http://{address}/v1", "--header", "X-Key: hidden-1", "--header", "X-Org:a:b")
            process = await asyncio.create_subprocess_exec(
                *front, *rest, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            shown, _ = await process.communicate()
            return process.returncode, shown.decode(), heard[0].decode()

    code, shown, heard = asyncio.run(main())
    assert code == 1
    assert "X-Key: hidden-1\r\n" in heard
    assert "X-Org: a:b\r\n" in heard
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "***" in shown
    assert "hidden" not in shown + kept.decode()


@pytest.mark.parametrize("header", ["hidden", ":hidden", "X\u00dc:hidden", "Content-Length:hidden", "X:hidden\n1"])
def test_the_command_refuses_a_header_without_showing_it(tmp_path, header):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(jsonl([{"prompt": "hello"}]))
    given = ("--base-url", "http://127.0.0.1:1/v1", "--model", "m", "--header", header)
    ended = cli("ask", prompts, "--out", tmp_path / "out.jsonl", *given)
    assert ended.returncode == 2
    assert "header" in ended.stderr
    assert "hidden" not in ended.stderr + ended.stdout


def test_settings_show_nothing_secret():
    secret = {
        "api_key": "hidden",
        "headers": {"X": "hidden"},
        "proxy": "http://a:hidden@b",
        "base_urls": ["http://a:hidden@b"],
    }
    assert "hidden" not in repr(AskSettings(**secret))


# --- proxies ---

FAR = "http://mill.invalid:8000/v1"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", None])
@pytest.mark.parametrize("login", ["", "ann:pass%40word@"])
def test_a_request_goes_through_the_proxy(monkeypatch, name, login):
    async def main():
        async with answering(SAID) as (address, heard):
            proxy = f"http://{login}{address}"
            if name:
                monkeypatch.setenv(name, proxy)
            async with Wire(FAR, "sk-secret", proxy=None if name else proxy) as wire:
                return (await wire.send(body("hello"))).text, heard[0].decode()

    text, heard = asyncio.run(main())
    assert text == "Paris"
    assert heard.startswith("POST http://mill.invalid:8000/v1/chat/completions HTTP/1.1\r\n")
    assert ("Proxy-Authorization: Basic YW5uOnBhc3NAd29yZA==\r\n" in heard) == bool(login)
    assert re.findall("(?m)^(.*): .*sk-secret", heard) == ["Authorization"]


@pytest.mark.parametrize("base", ["http://{}/v1", "http://localhost:1/v1"])
def test_this_machine_is_reached_without_a_proxy(monkeypatch, base):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    heard, ended, _ = heard_by(SAID, base)
    if "{}" in base:
        assert heard.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    else:
        assert "connection refused; is the server running?" in str(ended)
        assert "proxy" not in str(ended)


def test_no_proxy_spares_a_host(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert proxy_for(FAR).url == "http://127.0.0.1:9"
    assert proxy_for("https://mill.invalid/v1") is None  # that is HTTPS_PROXY's
    monkeypatch.setenv("NO_PROXY", "example.org,.invalid")
    assert proxy_for(FAR) is None
    assert proxy_for(FAR, "http://127.0.0.1:10").url == "http://127.0.0.1:10"  # what is given is meant


def test_a_proxy_that_is_not_there_or_refuses_is_told_apart_from_the_server():
    _, gone, _ = heard_by(SAID, FAR, proxy="http://ann:hidden@127.0.0.1:1")
    assert told(gone) == ("connection", None, True, False)
    assert "the proxy http://127.0.0.1:1 cannot be reached" in str(gone)
    assert gone.unpaid
    _, unknown, _ = heard_by(SAID, FAR, proxy="http://no-such-proxy.invalid:3128")
    assert (told(unknown), unknown.unpaid) == (("connection", None, True, False), True)
    assert "the proxy http://no-such-proxy.invalid:3128 cannot be reached" in str(unknown)
    _, refused, _ = heard_by(http(b"", "407 Proxy Authentication Required"), FAR, proxy="http://ann:hidden@{}")
    assert (refused.kind, refused.fatal, "the proxy's login" in str(refused)) == ("proxy", True, True)
    for status, ends in (("407 Who", ("proxy", None, False, True)), ("503 Busy", ("connection", None, True, False))):
        given = {"proxy": "http://ann:hidden@{}", "api_key": "sk-secret", "headers": {"X-Team": "mill-of-mine"}}
        heard, failed, _ = heard_by(http(b"", status), "https://mill.invalid/v1", **given)
        assert "sk-secret" not in heard
        assert "mill-of-mine" not in heard
        assert heard.startswith("CONNECT mill.invalid:443 HTTP/1.1\r\n")
        assert "Proxy-Authorization: Basic YW5uOmhpZGRlbg==\r\n" in heard
        assert told(failed) == ends
        assert failed.unpaid
        assert f"lets no request through: HTTP {status}" in str(failed)
        assert "hidden" not in str(failed)


def test_no_file_descriptor_for_the_way_to_the_proxy_is_no_attempt():
    key = ConnectionKey("mill.invalid", 8000, False, True, None, None, None)
    full = OSError(errno.EMFILE, "Too many open files")
    assert Wire(FAR, proxy="http://127.0.0.1:1")._lost(ClientProxyConnectionError(key, full)).no_place


@pytest.mark.parametrize("proxy", ["socks5://hidden:1", "http://", "http://ann:hid@den@x:99999", "ftp://hidden"])
def test_what_is_no_proxy_is_refused(monkeypatch, proxy):
    with pytest.raises(RequestError, match="--proxy") as refused:
        Wire(FAR, proxy=proxy)
    assert "hid" not in str(refused.value)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(RequestError, match="HTTP_PROXY"):
        Wire(FAR)


def test_a_socks_proxy_for_all_of_a_desktop_is_not_ours(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert proxy_for(FAR) is None


def test_tls_goes_through_the_tunnel_of_a_proxy(tmp_path):
    """A whole run of the command, with a proxy that tunnels to a server whose certificate is trusted."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(jsonl([{"prompt": "hello"}]))

    async def pump(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def main():
        async with answering(SAID, tls(tmp_path)) as (address, _):
            asked = []

            async def tunnel(reader, writer):
                asked.append(await reader.readuntil(b"\r\n\r\n"))
                far_reader, far_writer = await asyncio.open_connection(*address.split(":"))
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

            proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
            port = proxy.sockets[0].getsockname()[1]
            front = (sys.executable, "-m", "millstream", "ask", str(prompts), "--out", "-", "--model", "m")
            process = await asyncio.create_subprocess_exec(
                *front,
                *("--base-url", "https://localhost:8443/v1", "--proxy", f"http://ann:hidden@127.0.0.1:{port}"),
                env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "certificate.pem"), "OPENAI_API_KEY": "sk-secret"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            shown, told = await process.communicate()
            proxy.close()
            return shown, told, asked

    shown, said, asked = asyncio.run(main())
    assert msgspec.json.decode(shown)["text"] == "Paris"
    assert asked[0].startswith(b"CONNECT localhost:8443 HTTP/1.1\r\n")
    assert b"Basic YW5uOmhpZGRlbg==" in asked[0]
    assert b"sk-secret" not in asked[0]
    assert b"hidden" not in said


def test_netrc_is_never_read(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ann password hidden\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    heard, answer, _ = heard_by(SAID, "http://{}/v1")
    assert answer.text == "Paris"
    assert "Authorization" not in heard


def test_a_client_takes_headers_and_a_proxy():
    async def main():
        async with answering(SAID) as (address, heard):
            options = {"headers": {"X-Team": "mill"}, "proxy": f"http://{address}"}
            async with Client(FAR, model="m", **options) as client:
                return await client.ask("hello"), heard[0]

    reply, heard = asyncio.run(main())
    assert isinstance(reply, Reply)
    assert b"X-Team: mill\r\n" in heard


# --- files of prompts ---


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "prompts.jsonl"), ("utf-16-be", "prompts.txt"), ("utf-16-le", "-"), ("utf-32", "prompts.jsonl")],
)
def test_prompts_in_utf_16_are_refused(tmp_path, encoding, name):
    text = '{"prompt": "hello"}\n' * 3
    content = text.encode(encoding) if encoding in ("utf-16", "utf-32") else ("\ufeff" + text).encode(encoding)
    (tmp_path / "prompts.jsonl").write_bytes(content)
    (tmp_path / "prompts.txt").write_bytes(content)
    given = ("--out", "out.jsonl", "--base-url", "http://127.0.0.1:1/v1", "--model", "m")
    ended = cli("ask", name, *given, cwd=tmp_path, stdin=content)
    assert ended.returncode in (1, 2)
    assert "iconv" in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()
