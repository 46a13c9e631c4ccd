# SPDX-License-Identifier: Apache-2.0
"""The probe canary between a node and a pod, with the rules of both written by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.pair import HOST4, POD4, POD6, Pair, await_ipv6, pair, rules
from support.ztunnel import SECONDS

from agent.core import names
from agent.core.errors import NetnsError
from agent.core.model.sockets import TcpSocket
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.lab.links import links
from agent.sources.probe_canary import TRIES, ProbeCanary

pytestmark = pytest.mark.root
SNAT = f"""
table inet probes {{
  chain postrouting {{
    type nat hook postrouting priority 100;
    meta l4proto tcp ip daddr {POD4} snat ip to {names.PROBE_IPV4}MORE
    meta l4proto tcp ip6 daddr {POD6} snat ip6 to {names.PROBE_IPV6}
  }}
}}"""
# The pod's side of it: the probe address passes, all else goes to ztunnel.
INBOUND = f"""
table inet test {{
  chain prerouting {{
    type nat hook prerouting priority -100;
    ip saddr {names.PROBE_IPV4} accept
    ip6 saddr {names.PROBE_IPV6} accept
    meta l4proto tcp redirect to :15006
  }}
}}"""


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        with links(made.host.name) as host:
            host.add_addresses("lo", f"{names.PROBE_IPV4}/32", f"{names.PROBE_IPV6}/128")
        yield made


def probe(nodes: Pair, *addresses: str, ipv6: bool = True, **changes: Any) -> ProbeResult:
    canary = ProbeCanary(names.PROBE_IPV4, names.PROBE_IPV6, make=nodes.host.make, **changes)
    return asyncio.run(canary.probe(addresses or (POD4, POD6), nodes.target, ipv6=ipv6))


@pytest.mark.parametrize("address", [POD4, POD6])
@pytest.mark.parametrize("bound", ["address", "any", "both families"])
def test_through_snat_the_application_is_reached(nodes: Pair, address: str, bound: str) -> None:
    if ":" in address:
        await_ipv6(nodes)
    rules(nodes.host, SNAT.replace("MORE", ""))
    rules(nodes.pod, INBOUND)
    host = {"address": address, "any": "::" if ":" in address else "0.0.0.0", "both families": "::"}[bound]
    with nodes.pod.listen(host, 8080) as listener, nodes.pod.listen("0.0.0.0", 15006):
        finding = probe(nodes, address)
        assert finding == ProbeResult(ProbeVerdict.OK, (address, 8080))
        _, (source, *_) = listener.accept()
        assert source.removeprefix("::ffff:") in (names.PROBE_IPV4, names.PROBE_IPV6)


def test_a_source_port_that_was_changed_on_the_way_is_known_by_the_probe_address(nodes: Pair) -> None:
    rules(nodes.host, SNAT.replace("MORE", ":61000-61999"))
    rules(nodes.pod, INBOUND)
    with nodes.pod.listen("0.0.0.0", 8080) as listener, nodes.pod.listen("0.0.0.0", 15006):
        assert probe(nodes).verdict is ProbeVerdict.OK
        _, (source, port) = listener.accept()
        assert source == names.PROBE_IPV4 and 61000 <= port <= 61999


def test_an_application_that_is_not_captured_needs_no_snat(nodes: Pair) -> None:
    with nodes.pod.listen("0.0.0.0", 8080):
        assert probe(nodes).verdict is ProbeVerdict.OK


def test_p45_without_snat_it_is_ztunnel_that_is_reached(nodes: Pair) -> None:
    rules(nodes.pod, INBOUND)
    with nodes.pod.listen("0.0.0.0", 8080), nodes.pod.listen("0.0.0.0", 15006) as ztunnel:
        finding = probe(nodes)
        assert finding == ProbeResult(
            ProbeVerdict.CAPTURED, (POD4, 8080), f"redirected to port 15006, as coming from {HOST4}"
        )
        ztunnel.accept()
        rules(nodes.host, SNAT.replace("MORE", ""))
        assert probe(nodes).verdict is ProbeVerdict.OK


def test_captured_although_snat_worked(nodes: Pair) -> None:
    """The pod's rules do not let the probe address pass."""
    rules(nodes.host, SNAT.replace("MORE", ""))
    rules(nodes.pod, "\n".join(line for line in INBOUND.splitlines() if "saddr" not in line))
    with nodes.pod.listen("0.0.0.0", 8080), nodes.pod.listen("0.0.0.0", 15006):
        assert names.PROBE_IPV4 in probe(nodes).why


def test_somebody_else_answers(nodes: Pair) -> None:
    """The node's own DNAT takes the connection elsewhere."""
    with links(nodes.host.name) as host:
        host.add_addresses("lo", "10.78.9.9/32")
    chain = f"type nat hook output priority -100; ip daddr {POD4} tcp dport 8080 dnat to 10.78.9.9"
    rules(nodes.host, f"table ip elsewhere {{ chain output {{ {chain}; }}\n}}")
    with nodes.pod.listen("0.0.0.0", 8080), nodes.host.listen("10.78.9.9", 8080):
        finding = probe(nodes)
        assert (finding.verdict, finding.why) == (ProbeVerdict.CAPTURED, "connected, but not with the pod's listener")


def test_an_application_that_resets_at_once_is_not_called_captured(nodes: Pair) -> None:
    listener = nodes.pod.listen("0.0.0.0", 8080)
    resets = 0

    async def run(read: Callable[[], list[TcpSocket]]) -> list[TcpSocket]:
        nonlocal resets
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # as when the listeners are read
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            accepted.close()
            resets += 1
        return read()

    with listener:
        finding = probe(nodes, run=run)
    assert (finding.verdict, finding.why) == (ProbeVerdict.FAILED, "connected, then: Connection reset by peer")
    assert resets == TRIES


@pytest.mark.parametrize(
    ("verb", "why"),
    [
        ("drop", "no answer in 0.05 s"),
        ("reject with tcp reset", "Connection refused"),
        ("reject with icmpx type admin-prohibited", "No route to host"),
    ],
)
def test_a_node_that_cannot_reach_the_pod_fails_in_the_kernels_words(nodes: Pair, verb: str, why: str) -> None:
    chain = f"type filter hook output priority 0; meta l4proto tcp ip daddr {POD4} counter {verb}"
    rules(nodes.host, f"table inet wall {{ chain output {{ {chain}; }}\n}}")
    tries = threading.Semaphore(0)
    with nodes.pod.listen("0.0.0.0", 8080):
        canary = ProbeCanary(
            names.PROBE_IPV4, names.PROBE_IPV6, timeout=0.05, make=lambda f: (tries.release(), nodes.host.make(f))[1]
        )
        finding = asyncio.run(canary.probe((POD4,), nodes.target, ipv6=False))
    assert finding.verdict is ProbeVerdict.FAILED and finding.tried == (POD4, 8080)
    assert why in finding.why
    assert sum(tries.acquire(blocking=False) for _ in range(TRIES + 1)) == TRIES


def test_a_way_that_opens_while_it_tries_is_ok(nodes: Pair) -> None:
    rules(
        nodes.host,
        f"table inet wall {{ chain output {{ type filter hook output priority 0; ip daddr {POD4} reject; }}\n}}",
    )
    made = []

    def make(family: int) -> socket.socket:
        if made:
            rules(nodes.host, "delete table inet wall")
        made.append(family)
        return nodes.host.make(family)

    canary = ProbeCanary(names.PROBE_IPV4, names.PROBE_IPV6, make=make)
    with nodes.pod.listen("0.0.0.0", 8080):
        assert asyncio.run(canary.probe((POD4,), nodes.target, ipv6=False)).verdict is ProbeVerdict.OK
    assert len(made) == 2


def test_a_pod_with_nothing_to_probe(nodes: Pair) -> None:
    with nodes.pod.listen("127.0.0.1", 8080), nodes.pod.listen("0.0.0.0", 15006), nodes.pod.listen("::", 15008):
        assert probe(nodes) == ProbeResult(ProbeVerdict.NO_LISTENER)
        with nodes.pod.listen(POD6, 80):
            assert probe(nodes, ipv6=False) == ProbeResult(ProbeVerdict.NO_LISTENER)
            assert probe(nodes).tried == (POD6, 80)


def test_the_loop_goes_on_and_nothing_is_left_open_when_it_is_cancelled(nodes: Pair) -> None:
    rules(
        nodes.host,
        f"table inet wall {{ chain output {{ type filter hook output priority 0; ip daddr {POD4} drop; }}\n}}",
    )
    opened: list[socket.socket] = []
    reached = asyncio.Event()

    def make(family: int) -> socket.socket:
        opened.append(nodes.host.make(family))
        reached.set()
        return opened[-1]

    async def cancelled() -> None:
        canary = ProbeCanary(names.PROBE_IPV4, names.PROBE_IPV6, make=make, timeout=SECONDS)
        task = asyncio.create_task(canary.probe((POD4,), nodes.target, ipv6=False))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with nodes.pod.listen("0.0.0.0", 8080):
        asyncio.run(cancelled())
    assert [one.fileno() for one in opened] == [-1]


def test_a_pod_that_is_gone_is_an_error_not_a_finding(nodes: Pair) -> None:
    nodes.target.close()
    with pytest.raises(NetnsError):
        probe(nodes)
