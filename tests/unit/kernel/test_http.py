# SPDX-License-Identifier: Apache-2.0
"""The HTTP server with clients that behave in every way; real sockets."""

from __future__ import annotations

import asyncio
import gzip
import os
import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.kernel import http
from agent.kernel.http import HttpServer, Request, Response

BIG = b"sluice " * 1000


async def handler(request: Request) -> Response:
    match request.path:
        case "/big":
            return Response(200, BIG)
        case "/defect":
            raise ZeroDivisionError
        case "/json":
            return Response.json({"query": request.query, "method": request.method}, 400)
    return Response.text(f"{request.method} {request.path}")


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., tuple[int, dict[str, str], bytes]]:
    """Sends bytes; (status, headers, body). The status is 0 when the server closed without an answer."""

    async def run(sent: bytes, end: bool) -> bytes:
        server = await asyncio.start_unix_server(HttpServer(handler), tmp_path / "s")
        async with server:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            writer.write(sent)
            if end:
                writer.write_eof()
            try:
                return await asyncio.wait_for(reader.read(), 20)
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

    def call(sent: bytes, end: bool = False) -> tuple[int, dict[str, str], bytes]:
        head, _, body = asyncio.run(run(sent, end)).partition(b"\r\n\r\n")
        if not head:
            return 0, {}, b""
        first, *lines = head.decode().split("\r\n")
        return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body

    return call


def get(target: str, method: str = "GET", headers: str = "") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


def test_an_answer_and_then_the_connection_ends(ask: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
    status, headers, body = ask(get("/a?x=1"))
    assert (status, body) == (200, b"GET /a\n")
    assert headers["connection"] == "close" and headers["content-length"] == "7"


def test_json_and_the_query(ask: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
    status, headers, body = ask(get("/json?pod=shop%2Fweb&all=true", "POST"))
    assert (status, headers["content-type"]) == (400, "application/json")
    assert body == b'{"query": {"pod": "shop/web", "all": "true"}, "method": "POST"}\n'


def test_head_has_the_length_and_no_body(ask: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
    status, headers, body = ask(get("/big", "HEAD"))
    assert (status, headers["content-length"], body) == (200, str(len(BIG)), b"")


def test_compressed_only_where_accepted_and_worth_it(ask: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
    accepted = "Accept-Encoding: deflate, gzip\r\n"
    _, headers, body = ask(get("/big", headers=accepted))
    assert headers["content-encoding"] == "gzip" and gzip.decompress(body) == BIG and len(body) < len(BIG)
    assert int(headers["content-length"]) == len(body)
    for sent in (get("/big"), get("/small", headers=accepted)):
        assert "content-encoding" not in ask(sent)[1]


def test_a_defect_is_an_answer(ask: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
    assert ask(get("/defect"))[0] == 500


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"", 0),
        (b"GET / HTTP/1.1\r\nHo", 400),
    ],
    ids=range(9),
)
def test_bad_requests(ask: Callable[..., tuple[int, dict[str, str], bytes]], sent: bytes, status: int) -> None:
    got, _, body = ask(sent, end=True)
    assert got == status
    assert body.startswith(b"bad request: ") == bool(status)


def test_a_slow_client_is_bounded(
    ask: Callable[..., tuple[int, dict[str, str], bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "SECONDS", 0.05)
    assert ask(b"GET / HTTP/1.1\r\n")[0] == 0


def serving(script: Callable[[tuple[str, int]], Awaitable[None]], **limits: int) -> None:
    """Runs `script` with the address of a server that listens everywhere."""

    async def run() -> None:
        listener = socket.create_server(("0.0.0.0", 0))
        task = asyncio.create_task(HttpServer(handler).serve(listener, **limits))
        try:
            await asyncio.wait_for(script(("127.0.0.1", listener.getsockname()[1])), 30)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


async def answer(place: tuple[str, int], of: str, sent: bytes = b"") -> bytes:
    """What comes over a connection from that address; nothing when it is reset."""
    reader, writer = await asyncio.open_connection(*place, local_addr=(of, 0))
    try:
        writer.write(sent or get("/x"))
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_an_address_and_all_together_have_so_many_connections_and_the_node_itself_is_never_kept_out() -> None:
    async def script(place: tuple[str, int]) -> None:
        silent = [await asyncio.open_connection(*place, local_addr=(of, 0)) for of in ("127.0.0.2", "127.0.0.3")]
        assert b"200" in await answer(place, "127.0.0.1"), "the listener's own address, as the kubelet's probes"
        assert await answer(place, "127.0.0.2") == b"", "one of each address"
        assert await answer(place, "127.0.0.4") == b"", "two in all"
        for _, writer in silent:
            writer.write(get("/x"))
        assert [b"200" in await reader.read() for reader, _ in silent] == [True, True]
        assert b"200" in await answer(place, "127.0.0.4"), "there is room again"
        for _, writer in silent:
            writer.close()

    serving(script, most=2, each=1)


def test_a_client_that_never_reads_is_cut_off_with_all_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SECONDS", 0.2)
    large = Response(200, os.urandom(1 << 23))

    async def run() -> None:
        async def page(_: Request) -> Response:
            return large

        listener = socket.create_server(("127.0.0.1", 0))
        task = asyncio.create_task(HttpServer(page).serve(listener))
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(listener.getsockname())
        client.sendall(get("/"))
        poll = select.poll()
        poll.register(client, 0)  # errors and the end of both directions are told all the same
        ((_, events),) = await asyncio.to_thread(poll.poll, 20_000)
        assert events & select.POLLERR, "reset: a close would leave the kernel's buffer to it"
        client.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 30))
