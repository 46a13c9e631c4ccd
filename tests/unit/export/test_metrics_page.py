# SPDX-License-Identifier: Apache-2.0
"""The page of /metrics through the HTTP server: one document of two parts, for many askers at once."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from agent.core.model.pods import Pod
from agent.export.metrics_page import ConnectionMetrics, Page, SharedTotals
from agent.flows.identity import Identities
from agent.flows.label_totals import LabelTotals
from agent.flows.record import Delta, Direction, Fate, Reason
from agent.kernel.http import HttpServer, Request, Response, takes_gzip

POD = Pod("u", "shop", "web")
OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}


def a_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("own", "The agent's.", registry=registry).inc(3)
    return registry


def connections(number: int = 1, losses: Mapping[str, int] | None = None) -> ConnectionMetrics:
    totals = SharedTotals(LabelTotals(Identities()))
    totals.add([delta(pod) for pod in range(number)], [], lambda n: Pod("u", "shop", f"web-{n}"), 5.0)
    return ConnectionMetrics(totals, lambda: losses or {})


def delta(pod: int) -> Delta:
    return Delta(
        pod=pod,
        direction=Direction.OUTBOUND,
        fate=Fate.CAPTURED,
        reason=Reason.NONE,
        remote="192.0.2.1",
        port=80,
        opened=2,
        socket=4,
    )


def asked(headers: Mapping[str, str]) -> Request:
    return Request("GET", "/metrics", {}, headers)


@pytest.mark.parametrize("headers", [{}, OPENMETRICS])
def test_one_document_of_both_parts(headers: Mapping[str, str]) -> None:
    async def run() -> None:
        response = await Page(a_registry(), connections(losses={"records": 7}))(asked(headers))
        text = response.body.decode()
        families = list(parse_openmetrics(text) if headers else parse_plain(text))
        values = {s.name: s.value for f in families for s in f.samples if not s.name.endswith("_created")}
        assert (values["own_total"], values["sluice_connections_total"]) == (3, 2)
        assert values["sluice_records_lost_total"] == 7
        assert text.count("# EOF") == bool(headers) and text.endswith("# EOF\n") == bool(headers)
        kind = "application/openmetrics-text; version=1.0.0" if headers else "text/plain; version=0.0.4"
        assert response.content_type == f"{kind}; charset=utf-8"

    asyncio.run(run())


@pytest.mark.parametrize("headers", [{}, OPENMETRICS])
def test_without_accounting_the_registry_alone(headers: Mapping[str, str]) -> None:
    async def run() -> None:
        text = (await Page(a_registry())(asked(headers))).body.decode()
        assert "own_total 3.0" in text and text.count("# EOF") == bool(headers)

    asyncio.run(run())


class Held(ConnectionMetrics):
    """Rendering waits until it is told to go on, or a test has failed."""

    def __init__(self) -> None:
        super().__init__(SharedTotals(LabelTotals(Identities())))
        self.entered, self.go, self.times = threading.Event(), threading.Event(), 0

    def render(self, openmetrics: bool) -> Iterator[bytes]:
        self.times += 1
        self.entered.set()
        assert self.go.wait(20)
        return super().render(openmetrics)


def test_the_loop_goes_on_while_a_page_is_written_and_many_share_it() -> None:
    async def run() -> None:
        held = Held()
        page = Page(a_registry(), held)
        first = [asyncio.create_task(page(asked({}))) for _ in range(20)]
        await asyncio.to_thread(held.entered.wait, 20)  # only the loop can come here: it is not held up
        first[0].cancel()
        held.go.set()
        done = await asyncio.gather(*first, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert held.times == 1 and len({id(one.body) for one in done[1:]}) == 1  # type: ignore[union-attr]
        await page(asked({}))
        assert held.times == 2, "the next one is a new page"

    asyncio.run(run())


def test_whoever_asks_again_and_again_does_not_take_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        clock = [loop.time()]
        monkeypatch.setattr(loop, "time", lambda: clock[0])
        page = Page(a_registry())

        def slow(openmetrics: bool) -> bytes:
            clock[0] += 0.1
            return b""

        monkeypatch.setattr(page, "own", slow)
        for _ in range(2):
            await page(asked({}))

    monkeypatch.setattr("agent.export.metrics_page.asyncio.sleep", sleep)
    asyncio.run(run())
    assert pauses[0] == 0 < pauses[1]


def test_a_page_that_fails_is_tried_anew() -> None:
    class Broken(ConnectionMetrics):
        def render(self, openmetrics: bool) -> Iterator[bytes]:
            raise ZeroDivisionError

    async def run() -> None:
        page = Page(a_registry(), Broken(SharedTotals(LabelTotals(Identities()))))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await page(asked({}))

    asyncio.run(run())


def test_adding_from_other_threads_while_pages_are_written() -> None:
    totals = SharedTotals(LabelTotals(Identities()))
    shown = ConnectionMetrics(totals)

    def work(base: int) -> None:
        for n in range(200):
            totals.add([delta(base + n)], [], lambda pod: Pod("u", "shop", f"web-{pod}"), float(n))

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        b"".join(shown.render(True))
    for thread in threads:
        thread.join()
    (family,) = (f for f in parse_plain(b"".join(shown.render(False)).decode()) if f.name == "sluice_connections")
    assert sum(sample.value for sample in family.samples) == 2 * 600


def test_over_the_wire_compressed(tmp_path: Path) -> None:
    """A page of megabytes, asked with the headers of Prometheus."""
    sent = (
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text;version=1.0.0\r\n"
        b"ACCEPT: text/plain;q=0.1\r\nAccept-Encoding: gzip\r\n\r\n"
    )

    async def ask(request: bytes) -> tuple[bytes, bytes]:
        server = await asyncio.start_unix_server(HttpServer(Page(a_registry(), connections(1500))), tmp_path / "s")
        async with server:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            writer.write(request)
            head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
            writer.close()
            return head, body

    head, body = asyncio.run(ask(sent))
    assert b"content-encoding: gzip" in head and b"application/openmetrics-text" in head
    plain_head, plain = asyncio.run(ask(sent.replace(b"gzip", b"gzip;q=0")))
    assert b"content-encoding" not in plain_head and f"content-length: {len(plain)}".encode() in plain_head
    assert len(plain) > 2_000_000 and 5 * len(body) < len(plain)
    assert sum(f.name.startswith("istio_tcp") for f in parse_openmetrics(gzip.decompress(body).decode())) == 5


def test_what_is_large_is_compressed_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress, where = gzip.compress, dict[int, str]()

    def watched(body: bytes, level: int) -> bytes:
        where[len(body)] = threading.current_thread().name
        return compress(body, level)

    async def answer(request: Request) -> Response:
        return Response(200, b"x" * int(request.path[1:]))

    async def ask(size: int) -> None:
        async with await asyncio.start_unix_server(HttpServer(answer), tmp_path / "s"):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            writer.write(f"GET /{size} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n".encode())
            _, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
            writer.close()
            assert gzip.decompress(body) == b"x" * size

    monkeypatch.setattr("agent.kernel.http.gzip.compress", watched)
    for size in (2000, 1_000_000):
        asyncio.run(ask(size))
    assert where[2000] == threading.main_thread().name != where[1_000_000]


@pytest.mark.parametrize(
    ("header", "takes"),
    [
        ("gzip", True),
        ("deflate, GZIP", True),
        ("x-gzip", True),
        ("gzip;q=0.001", True),
        ("*", True),
        ("br, *;q=0.1", True),
        ("", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip ; Q = 0", False),
        ("*, gzip;q=0", False),
        ("*;q=0", False),
        ("gzip;q=-1", False),
        ("gzipped, identity", False),
    ],
)
def test_accept_encoding(header: str, takes: bool) -> None:
    assert takes_gzip(header) is takes
