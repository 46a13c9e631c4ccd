# SPDX-License-Identifier: Apache-2.0
"""The account as an operator sees it: status, connections, log and metrics of a real agent, over its restarts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.leaking import marking
from support.node import PORT, REPO, SECONDS, Node, NodePod, node, until

from agent.backends.ebpf.pins import Pins
from agent.cli.uncapture import leftovers
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root
PREFIX = "sluac"
BACKENDS = (LabBackend.NFTABLES, LabBackend.IPTABLES, LabBackend.EBPF)
Totals = Counter[tuple[str, str, str]]


@pytest.fixture(params=BACKENDS)
def alone(request: pytest.FixtureRequest) -> Iterator[tuple[Node, LabBackend]]:
    with node(PREFIX) as made:
        yield made, request.param


def up(made: Node, backend: LabBackend, **changes: Any) -> NodePod:
    """An agent, a ztunnel, and one pod that is accounted for in full."""
    made.start(backend, **changes)
    made.processes.start_ztunnel()
    made.await_ztunnel()
    pod = made.add(made.pod("client"))
    until(lambda: made.state(pod) == "enabled", "the pod is captured")
    return pod


def totals(made: Node) -> Totals:
    rows = made.ask("/v1/status")["connections"]
    return Totals({(row["direction"], row["fate"], row["reason"]): row["connections"] for row in rows})


def become(made: Node, wanted: Totals) -> None:
    """What ztunnel itself opens is left aside."""

    def now() -> Totals:
        return Totals({key: count for key, count in totals(made).items() if key[2] != "ztunnel"})

    until(lambda: now() == wanted, f"the account is {dict(wanted)}", seconds=SECONDS / 2)


def with_the_mark(made: Node, pod: NodePod) -> None:
    """A pod that forges ztunnel's mark."""
    with Netns.open(pod.netns) as inside:
        forged = inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with forged:
        forged.settimeout(SECONDS)
        with marking(pod.netns, f"tcp dport {PORT}"):
            forged.connect((made.host(pod), PORT))
        while forged.recv(4096):
            pass


def page(made: Node) -> str:
    """/metrics, as anybody on the network reads it."""
    script = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:15014/metrics').read().decode())"
    return run([sys.executable, "-c", script], netns=made.netns).stdout


def samples(made: Node, name: str) -> dict[tuple[str, ...], float]:
    """Of sluice_connections_total by fate and reason."""
    found = {}
    for family in text_string_to_metric_families(page(made)):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels["fate"], sample.labels["reason"]] = sample.value
    return found


CAPTURED, LEAKED = ("outbound", "captured", ""), ("outbound", "leaked", "")


def test_status_connections_and_metrics_say_the_same_over_restarts(alone: tuple[Node, LabBackend]) -> None:
    made, backend = alone
    pod = up(made, backend)
    forged = backend is not LabBackend.EBPF  # where the mark alone convinces nobody
    wanted = Totals({CAPTURED: 3})
    for _ in range(3):
        pod.connect(made.host(pod))
    become(made, wanted)
    with_the_mark(made, pod)
    wanted += Totals({LEAKED if forged else CAPTURED: 1})
    become(made, wanted)
    rows = made.ask("/v1/connections", pod=pod.key)["ended"]
    assert Counter((row["direction"], row["fate"], row["reason"]) for row in rows) == wanted
    assert {row["remote"] for row in rows} == {f"{made.host(pod)}:{PORT}"}
    assert "leaked" in made.log if forged else "leaked" not in made.log
    assert samples(made, "sluice_connections_total")["captured", "none"] == wanted[CAPTURED]

    made.processes.end()
    for _ in range(2):  # nobody is there: the programs are
        pod.connect(made.host(pod))
    made.start(backend)
    wanted += Totals({CAPTURED: 2})
    become(made, wanted)
    assert samples(made, "sluice_connections_total") == {("captured", "none"): 2} | ztunnels(made)

    made.processes.kill()
    pod.connect(made.host(pod))
    made.start(backend)
    become(made, wanted + Totals({CAPTURED: 1}))


def ztunnels(made: Node) -> dict[tuple[str, ...], float]:
    found = samples(made, "sluice_connections_total")
    return {key: value for key, value in found.items() if key[1] == "ztunnel"}


def test_the_log_the_list_and_a_follower_have_each_connection(alone: tuple[Node, LabBackend], tmp_path: Path) -> None:
    made, backend = alone
    log = tmp_path / "connections.jsonl"
    pod = up(made, backend, connection_log=str(log))
    number = made.ask("/v1/connections")["next"]
    command = [sys.executable, "-m", "agent", "connections", "--follow", "-o", "json", "--run-dir", str(made.run_dir)]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    try:
        ports = {int(pod.connect(made.host(pod))[0].rpartition(":")[2]) for _ in range(20)}
        answer = until(
            lambda: (found := made.ask("/v1/connections", after=str(number)))["next"] >= number + 20 and found, "20"
        )
        assert {int(row["local"].rpartition(":")[2]) for row in answer["ended"]} == ports and answer["lost"] == 0
        until(lambda: log.exists() and len(log.read_text().splitlines()) >= 20, "they are written")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert {int(row["local"].rpartition(":")[2]) for row in rows} == ports
        assert {(row["namespace"], row["pod"], row["fate"], row["established"]) for row in rows} == {
            ("shop", "client", "captured", True)
        }
        assert log.stat().st_mode & 0o777 == 0o600
    finally:
        follower.terminate()
        follower.communicate(timeout=SECONDS)


def test_a_connection_that_lives_is_listed_with_its_bytes(alone: tuple[Node, LabBackend]) -> None:
    made, backend = alone
    pod = up(made, backend)
    with Netns.open(made.netns) as inside:
        listener = inside.call(lambda: socket.create_server(("0.0.0.0", 7100)))
    with Netns.open(pod.netns) as inside:
        app = inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with listener, app:
        app.settimeout(SECONDS)
        app.connect((made.host(pod), 7100))
        far, _ = listener.accept()
        with far:
            app.sendall(b"x" * 12345)
            far.sendall(b"y" * 77)
            assert app.recv(77, socket.MSG_WAITALL) == b"y" * 77

            def listed() -> bool:
                rows = made.ask("/v1/connections", pod=pod.key)["live"]
                return [(r["fate"], r["sent_bytes"], r["received_bytes"]) for r in rows] == [("captured", 12345, 77)]

            until(listed, "it is listed")


def test_off_and_what_cannot_be_had(alone: tuple[Node, LabBackend]) -> None:
    made, backend = alone
    pod = up(made, backend, accounting="off")
    pod.connect(made.host(pod))
    status = made.ask("/v1/status")
    assert (status["accounting"], status["connections"]) == ("off", [])
    assert "accounting is off" in made.sluice("connections", code=2)
    assert not made.spec.bpf_dir("node1").with_name(f"{made.spec.bpf_dir('node1').name}-accounting").exists()
    made.restart(backend, accounting="inet_diag")
    for _ in range(10):  # ztunnel's own ends are gone before a dump shows whose they were
        pod.connect(made.host(pod))
    become(made, Totals({CAPTURED: 10}))
    assert made.ask("/v1/status")["accounting"] == "inet_diag"


def test_uncapture_takes_the_programs_away(alone: tuple[Node, LabBackend]) -> None:
    """Its part that is the node's: the whole command looks into every namespace of the machine."""
    made, backend = alone
    up(made, backend)
    pins = Pins.of(str(made.spec.bpf_dir("node1")))
    made.processes.end()
    would = [row for row in leftovers(pins, dry_run=True) if row.removal and row.removal.layers == ("accounting",)]
    assert [row.removal.result for row in would if row.removal] == ["would be removed"]
    assert pins.accounting.root.exists()
    done = [row for row in leftovers(pins, dry_run=False) if row.removal and row.removal.layers == ("accounting",)]
    assert [row.removal.result for row in done if row.removal] == ["removed"]
    assert not pins.accounting.root.exists() and leftovers(pins, dry_run=True) == []


def test_connections_from_before_the_enrolment_are_followed_to_their_end(alone: tuple[Node, LabBackend]) -> None:
    made, backend = alone
    up(made, backend)
    pod = made.pod("older")
    with Netns.open(made.netns) as inside:
        listener = inside.call(lambda: socket.create_server(("0.0.0.0", 7100)))
    with Netns.open(pod.netns) as inside:
        app = inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with listener, app:
        app.connect((made.host(pod), 7100))
        far, _ = listener.accept()
        with far:
            app.sendall(b"x" * 1000)
            assert len(far.recv(1000, socket.MSG_WAITALL)) == 1000
            enrol(made, pod)
            until(lambda: (pod.name, "enabled") in states(made), "the pod is captured")
            app.sendall(b"y" * 500)
            assert len(far.recv(500, socket.MSG_WAITALL)) == 500
            until(lambda: rows(made, pod, "live") == [("exempt", "before", 1500)], "it is followed")
            pod.connect(made.host(pod))
            until(lambda: ("captured", "", 0) in rows(made, pod, "ended"), "so are newer ones")
            app.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
        assert app.recv(1) == b""
    until(lambda: ("exempt", "before", 1500) in rows(made, pod, "ended"), "its end is told")
    become(made, Totals({CAPTURED: 1, ("outbound", "exempt", "before"): 1}))


def enrol(made: Node, pod: NodePod) -> None:
    """Without an ADD, which would take it for new: named in the static file."""
    text = f"pods:\n- {{namespace: {pod.namespace}, name: {pod.name}, netns: {pod.netns}, addresses: [{pod.ipv4}]}}\n"
    (made.run_dir / "static.yaml").write_text(text)
    made.restart(LabBackend(made.ask("/v1/status")["backend"]), static_pods=str(made.run_dir / "static.yaml"))


def states(made: Node) -> set[tuple[str, str]]:
    return {(row["name"], row["state"]) for row in made.ask("/v1/pods")}


def rows(made: Node, pod: NodePod, kind: str) -> list[tuple[str, str, int]]:
    found = made.ask("/v1/connections", pod=pod.key)[kind]
    return [(row["fate"], row["reason"], row["sent_bytes"]) for row in found]
