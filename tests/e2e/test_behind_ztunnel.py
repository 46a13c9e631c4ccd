# SPDX-License-Identifier: Apache-2.0
"""What a record and `sluice explain` say when ztunnel takes a connection and cannot reach the other end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.field import Inside
from support.node import PORT, Node, NodePod, node, until

from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
BY_EBPF = [(LabBackend.NFTABLES, "ebpf"), (LabBackend.EBPF, "ebpf")]
# By inet_diag a connection that was reset before a dump has shown it is undecided: its other end is not known any more.
WAYS = [*BY_EBPF, (LabBackend.NFTABLES, "inet_diag")]


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def here(request: pytest.FixtureRequest) -> Iterator[Node]:
    backend, accounting = request.param
    with node("slubz") as made:
        made.start(backend, accounting=accounting)
        made.processes.start_ztunnel()
        made.await_ztunnel()
        yield made


def request(pod: NodePod, host: str, port: int) -> None:
    """Connects and asks as an application does. ztunnel takes the connection, and ends it."""
    with contextlib.suppress(OSError), Inside(pod.netns).connect(host, port) as made:  # it may be reset at any point
        made.sendall(b"request")
        assert made.recv(1) == b""


def outcomes(here: Node, pod: NodePod, host: str, port: int, wanted: list[str]) -> None:
    """Returns when the pod's connections to that endpoint, live ones included, have these outcomes in any order."""

    def there() -> bool:
        told: dict[str, Any] = json.loads(here.sluice("connections", pod.key, "-n", "100", "-o", "json"))
        rows = [row for row in (*told["ended"], *told["live"]) if row["remote"] == f"{host}:{port}"]
        return sorted(row["outcome"] for row in rows) == wanted

    until(there, f"outcomes {wanted}")


@pytest.mark.parametrize("here", BY_EBPF, ids="-".join, indirect=True)
def test_a_server_that_refuses_is_told_and_that_it_serves_again(here: Node) -> None:
    pod = here.add(here.pod("client"))
    host = here.host(pod)
    assert here.captured(pod)
    outcomes(here, pod, host, PORT, ["ok"])
    for _ in range(3):
        request(pod, host, PORT + 1)
    outcomes(here, pod, host, PORT + 1, ["cut off"] * 3)
    told = here.sluice("explain", pod.key)
    assert "of the last 4 captured outbound ones, ztunnel took and cut off 3:" in told
    assert f"3 to {host}:{PORT + 1} after " in told
    assert "refused there, no route to it, or denied by a policy" in told
    assert f"Action:    ztunnel takes its connections to {host}:{PORT + 1}, and cuts them off" in told
    assert "cut off" in here.sluice("connections", pod.key)
    with Inside(here.netns).listen("0.0.0.0", PORT + 1) as server, Inside(pod.netns).connect(host, PORT + 1) as made:
        with server.accept()[0] as taken:
            taken.sendall(b"answer")
        assert made.recv(6) == b"answer"
    outcomes(here, pod, host, PORT + 1, [*["cut off"] * 3, "ok"])
    told = here.sluice("explain", pod.key)
    assert "cut off 3" in told
    assert "Action:    none" in told, "the last one to that server went well"
    here.delete(pod)


def test_a_server_that_is_slow(here: Node) -> None:
    pod = here.add(here.pod("patient"))
    host = here.host(pod)
    with contextlib.ExitStack() as kept:
        server = kept.enter_context(Inside(here.netns).listen("0.0.0.0", PORT + 2))
        made = kept.enter_context(Inside(pod.netns).connect(host, PORT + 2))
        taken = kept.enter_context(server.accept()[0])
        made.sendall(b"request")
        assert taken.recv(7) == b"request"
        outcomes(here, pod, host, PORT + 2, ["no answer yet"])
        until(lambda: "1 live: sent something, and no answer yet" in here.sluice("explain", pod.key), "it is told")
        taken.sendall(b"answer")
        assert made.recv(6) == b"answer"
        outcomes(here, pod, host, PORT + 2, ["open"])
    outcomes(here, pod, host, PORT + 2, ["ok"])
    here.delete(pod)


@pytest.mark.parametrize("here", BY_EBPF, ids="-".join, indirect=True)
def test_an_address_without_a_host(here: Node) -> None:
    pod = here.add(here.pod("lost"))
    nowhere = pod.ipv4.rpartition(".")[0] + ".77"
    request(pod, nowhere, PORT)
    outcomes(here, pod, nowhere, PORT, ["cut off"])
    assert "no host has the address" in here.sluice("explain", pod.key)
    here.delete(pod)
