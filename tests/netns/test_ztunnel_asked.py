# SPDX-License-Identifier: Apache-2.0
"""DNS that reaches ztunnel without conntrack: the agent's map tells which resolver was asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ztunnel import PEER4, RESOLVER4, RESOLVER6, Lab

from agent.core.names import DNS_PORT
from agent.kernel.bpf.asked_resolvers import encode
from agent.kernel.bpf.map import Map
from agent.kernel.exec import run

pytestmark = pytest.mark.root
QUERY = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\1a\4test\0\0\1\0\1"
ANSWER = QUERY[:2] + b"\x81\x80" + QUERY[4:]
V4_MAPPED = bytes(10) + b"\xff\xff"


@pytest.fixture
def bpf_dir(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of the test's own."""
    place = tmp_path / "bpf"
    place.mkdir()
    run(["mount", "-t", "bpf", "bpf", str(place)])
    try:
        yield place
    finally:
        run(["umount", str(place)])


def pin(bpf_dir: Path) -> Path:
    place = bpf_dir / "v1/maps"
    place.mkdir(parents=True, exist_ok=True)
    path = place / "resolvers"
    run(["bpftool", "map", "create", str(path), "type", "lru_hash", "key", "16", "value", "24", "entries", "64",
         "name", "resolvers"])  # fmt: skip
    return path


def value(host: str) -> bytes:
    address = socket.inet_pton(socket.AF_INET6, host) if ":" in host else V4_MAPPED + socket.inet_aton(host)
    return address + (53).to_bytes(2, "big") + bytes(6)


def ask(lab: Lab, path: Path | None, resolver: str) -> socket.socket:
    """A query that reached ztunnel's port as the programs would lead it there, when there is a map."""
    six = ":" in resolver
    asking = lab.pod.make(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
    lab.close_later(asking)
    asking.bind(("::1" if six else "127.0.0.1", 0))
    if path is not None:
        with Map.open(path) as remembers:
            remembers.update(encode(lab.pod.netns.id.cookie, asking.getsockname()[1]), value(resolver))
    asking.sendto(QUERY, ("::1" if six else "127.0.0.1", DNS_PORT))
    return asking


@pytest.mark.parametrize("host", [RESOLVER4, RESOLVER6])
def test_the_query_goes_to_the_resolver_of_the_map_and_the_answer_back(lab: Lab, bpf_dir: Path, host: str) -> None:
    path = pin(bpf_dir)
    lab.serve(settings=f"bpf_dir={str(bpf_dir)!r}")
    with lab.peer.listen(host, 53, socket.SOCK_DGRAM) as server:
        asking = ask(lab, path, host)
        query, ztunnel = server.recvfrom(100)
        server.sendto(ANSWER, ztunnel)
        answer, source = asking.recvfrom(100)
    assert (query, answer, source[1]) == (QUERY, ANSWER, DNS_PORT)
    assert lab.ztunnel.wait_record(kind="dns", close="fin")["destination"] in (f"{host}:53", f"[{host}]:53")


def test_the_map_may_come_later_go_and_come_back(lab: Lab, bpf_dir: Path) -> None:
    lab.serve(settings=f"bpf_dir={str(bpf_dir)!r}")
    ask(lab, None, RESOLVER4)
    assert "eBPF" in lab.ztunnel.wait_record(kind="dns", close="error")["error"]
    for _ in range(2):
        path = pin(bpf_dir)
        with lab.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as server:
            ask(lab, path, RESOLVER4)
            assert server.recvfrom(100)[0] == QUERY
        path.unlink()


def test_one_pods_queries_say_nothing_of_anothers(lab: Lab, bpf_dir: Path) -> None:
    path = pin(bpf_dir)
    lab.serve(settings=f"bpf_dir={str(bpf_dir)!r}")
    with lab.pod.make(socket.AF_INET, socket.SOCK_DGRAM) as asking, Map.open(path) as remembers:
        asking.bind(("127.0.0.1", 0))
        remembers.update(encode(lab.peer.netns.id.cookie, asking.getsockname()[1]), value(PEER4))
        asking.sendto(QUERY, ("127.0.0.1", DNS_PORT))
        assert "knows the resolver that was asked" in lab.ztunnel.wait_record(kind="dns", close="error")["error"]
