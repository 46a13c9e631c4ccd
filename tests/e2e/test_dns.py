# SPDX-License-Identifier: Apache-2.0
"""The account of DNS queries as an operator sees it, by real packets of a pod under a real agent and ztunnel."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.node import REPO, Node, NodePod, node, until
from support.resolver import ADDRESS, Resolver, ask, query

from agent.core.errors import SluiceError
from agent.flows.dns.dns_account import KEPT
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
PREFIX = "sludn"
BACKENDS = (LabBackend.NFTABLES, LabBackend.IPTABLES, LabBackend.EBPF)
LATE = 10  # seconds for what takes five


class Asking:
    """A node with one pod and its resolver, of both families."""

    def __init__(self, made: Node, backend: LabBackend, *, captured: bool = True, **settings: Any) -> None:
        self.node = made
        made.start(backend, dns_capture=captured, **settings)
        made.processes.start_ztunnel()
        made.await_ztunnel()
        self.pod: NodePod = made.add(made.pod("client"))
        until(lambda: made.state(self.pod) == "enabled", "the pod is captured")
        self.inside = Netns.open(self.pod.netns)
        self.resolvers = made.host(self.pod, 4), made.host(self.pod, 6)
        with Netns.open(made.netns) as outside:
            self.server = Resolver(outside, *self.resolvers)

    def close(self) -> None:
        self.server.close()
        self.inside.close()

    def queries(self, count: int) -> list[dict[str, Any]]:
        def found() -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = self.node.ask("/v1/dns", pod=self.pod.key)["queries"]
            return rows if len(rows) >= count else []

        rows = until(found, f"{count} queries are known", seconds=LATE + 10)
        assert len(rows) == count
        return list(rows)


@contextlib.contextmanager
def asking(backend: LabBackend, **options: Any) -> Iterator[Asking]:
    with node(PREFIX) as made, contextlib.closing(Asking(made, backend, **options)) as one:
        yield one


def rows_by_name(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    assert all((row["latency_seconds"] is None) == (row["rcode"] == "no answer") for row in rows)
    keys = ("type", "rcode", "resolver", "captured", "protocol")
    return {row["name"]: tuple(row[key] for key in keys) for row in rows}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("captured", [True, False])
def test_each_query_is_told_once_with_its_fate(backend: LabBackend, captured: bool) -> None:
    with asking(backend, captured=captured) as one:
        wanted = dict[str, tuple[Any, ...]]()
        for resolver, family in zip(one.resolvers, (4, 6), strict=True):
            for connected in (True, False):
                end = f"{family}.{'connected' if connected else 'unconnected'}.test"
                for first, code in (
                    ("fine", "NOERROR"),
                    ("absent", "NXDOMAIN"),
                    ("broken", "SERVFAIL"),
                    ("silent", "no answer"),
                ):  # fmt: skip
                    ask(one.inside, resolver, f"{first}.{end}", connected=connected)
                    code = "SERVFAIL" if captured and code == "no answer" else code  # ztunnel's, in its place
                    wanted[f"{first}.{end}"] = ("A", code, resolver, captured, "udp")
            ask(one.inside, resolver, f"fine.{family}.tcp.test", tcp=True)
            if captured:  # else it is a captured connection as any other
                known = "" if backend is LabBackend.EBPF else resolver
                wanted[f"fine.{family}.tcp.test"] = ("A", "NOERROR", known, True, "tcp")
        rows = one.queries(len(wanted))
        assert rows_by_name(rows) == wanted
        assert {tuple(row["addresses"]) for row in rows if row["rcode"] == "NOERROR"} == {(ADDRESS,)}
        counts = Counter(row["rcode"] for row in rows)
        summary = one.node.ask("/v1/dns", pod=one.pod.key)["summary"]
        assert summary["rcodes"] == counts and summary["lost"] == 0
        assert summary["silent"] == dict.fromkeys(one.resolvers, 2)
        assert summary["around"] == (0 if captured else len(wanted))


@pytest.mark.parametrize("backend", [LabBackend.NFTABLES, LabBackend.EBPF])
def test_a_hung_ztunnel_is_silence_of_a_known_resolver(backend: LabBackend) -> None:
    with asking(backend) as one:
        with stopped(one.node):
            for resolver, family in zip(one.resolvers, (4, 6), strict=True):
                ask(one.inside, resolver, f"silent.{family}.test")
            rows = one.queries(2)
        told = {
            f"silent.{family}.test": ("A", "no answer", resolver, True, "udp")
            for resolver, family in zip(one.resolvers, (4, 6), strict=True)
        }
        assert rows_by_name(rows) == told
        with stopped(one.node):
            for number in range(6):
                ask(one.inside, one.resolvers[0], f"silent.{number}.test")
            one.queries(8)
        shown = one.node.sluice("explain", one.pod.key)
        assert f"No answer from: {one.resolvers[0]} (7), {one.resolvers[1]} (1)" in shown
        assert f"no answer from resolver {one.resolvers[0]}" in one.node.ask("/v1/explain", pod=one.pod.key)["advice"]
        ask(one.inside, one.resolvers[0], "fine.test")
        one.queries(9)
        page = run(["curl", "-s", "http://127.0.0.1:15014/metrics"], netns=one.node.netns).stdout
        for line in (
            'sluice_dns_queries_total{captured="yes",rcode="no_answer",type="A"} 8.0',
            'sluice_dns_queries_total{captured="yes",rcode="NOERROR",type="A"} 1.0',
            'sluice_dns_latency_seconds_count{captured="yes"} 1.0',
            "sluice_dns_lost_total 0.0",
        ):
            assert line in page


@contextlib.contextmanager
def stopped(made: Node) -> Iterator[None]:
    """ztunnel and its workers stand still."""
    ztunnel = made.children.get("node1.ztunnel")
    assert ztunnel
    family = [ztunnel.pid, *(child.pid for child in psutil.Process(ztunnel.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in family:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("backend", [LabBackend.NFTABLES, LabBackend.EBPF])
def test_hostile_messages_harm_nobody(backend: LabBackend) -> None:
    """Names with line breaks and escapes are shown escaped; what is no DNS is nobody's query."""
    with asking(backend) as one:
        resolver = one.resolvers[0]
        with one.inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
            for data in (
                b"",
                b"\0" * 11,
                b"\xff" * 600,
                query("x")[:-1],
                query("x")[:4] + b"\xff\xff" + query("x")[6:],
            ):
                client.sendto(data, (resolver, 53))
        ask(one.inside, resolver, b"fine\n\x1b[31m.\xff.test")
        rows = one.queries(1)
        assert rows[0]["name"] == r"fine\n\x1b[31m.\xff.test"
        shown = one.node.sluice("dns", one.pod.key)
        assert r"fine\n\x1b[31m.\xff.test" in shown and "\x1b" not in shown
        lines = one.node.sluice("dns", "-o", "jsonl").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_a_follower_sees_each_query(tmp_path: Path) -> None:
    with asking(LabBackend.NFTABLES) as one:
        argv = [sys.executable, "-m", "agent", "dns", "--run-dir", str(one.node.run_dir), "-f"]
        argv += ["--last", "100", "-o", "jsonl"]  # it may start after the queries
        with (tmp_path / "out").open("w") as out, subprocess.Popen(argv, cwd=REPO, stdout=out) as follower:
            try:
                until(lambda: one.node.ask("/v1/dns") and follower.poll() is None, "the agent answers")
                for number in range(40):
                    ask(one.inside, one.resolvers[0], f"fine{number}.test")
                wanted = {f"fine{number}.test" for number in range(40)}

                def told() -> set[str]:
                    whole, _, _ = (tmp_path / "out").read_text().rpartition("\n")
                    return {json.loads(line)["name"] for line in whole.splitlines()}

                until(lambda: told() == wanted, "all queries are printed")
            finally:
                follower.kill()


def test_a_flood_is_bounded_counted_and_another_pods_queries_stay() -> None:
    with asking(LabBackend.NFTABLES) as one:
        ask(one.inside, one.resolvers[0], "fine.before.test")
        one.queries(1)
        loud = one.node.add(one.node.pod("loud"))
        until(lambda: one.node.state(loud) == "enabled", "the pod is captured")
        with Netns.open(loud.netns) as inside, inside.call(
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ) as client:  # fmt: skip
            client.connect((one.node.host(loud), 53))
            for number in range(30_000):
                with contextlib.suppress(OSError):
                    client.send(query(f"silent.{number}.test", number % 65536))

        def counted() -> dict[str, Any]:
            answer: dict[str, Any] = one.node.ask("/v1/dns", pod=loud.key)
            return answer if answer["summary"]["lost"] else {}

        answer = until(counted, "the loss is counted")
        assert len(answer["queries"]) <= KEPT
        assert [row["name"] for row in one.queries(1)] == ["fine.before.test"]
        assert one.node.ask("/v1/dns", pod=one.pod.key)["summary"]["lost"] == 0
        one.node.delete(loud)
        until(lambda: not one.node.known(loud), "the pod is gone")
        ask(one.inside, one.resolvers[0], "fine.after.test")
        assert {row["name"] for row in one.queries(2)} == {"fine.before.test", "fine.after.test"}


def test_dns_accounting_off_taps_nothing_and_says_so() -> None:
    with asking(LabBackend.NFTABLES) as one:
        assert len(sockets(one)) == 2  # lo and eth0
    with asking(LabBackend.NFTABLES, dns_accounting=False) as one:
        ask(one.inside, one.resolvers[0], "fine.test")
        assert not sockets(one)
        with pytest.raises(SluiceError, match="dns_accounting is off"):
            one.node.ask("/v1/dns")


def sockets(one: Asking) -> list[str]:
    """The packet sockets in the pod's namespace."""
    return run(["cat", "/proc/net/packet"], netns=one.pod.netns).stdout.splitlines()[1:]
