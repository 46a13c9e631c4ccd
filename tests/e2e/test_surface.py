# SPDX-License-Identifier: Apache-2.0
"""What the agent shows and leaves in the file system, and what the plugin does while it is away."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fakeztunnel import FakeZtunnel
from support.node import Node, node, until

from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.node_services import LabBackend
from agent.zds.messages import Hello, encode

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("slued") as made:
        # iptables: its tables cannot be owned, so that drift can be made; verification is too rare to see it.
        made.start(LabBackend.IPTABLES, verify_seconds=3000.0, exclude_namespaces=["kube-system", "quiet"])
        fake = FakeZtunnel(made.run_dir / "ztunnel.sock")
        yield made
        fake.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_sockets_and_files_are_roots_alone(here: Node) -> None:
    pod = here.add(here.pod("modes"))
    for name in ("cni.sock", "agent.sock", "ztunnel.sock"):
        assert mode(here.run_dir / name) == 0o600, name
    for name in ("pods", "netns", "exempt"):
        assert mode(here.run_dir / name) == 0o700, name
        for path in (here.run_dir / name).iterdir():
            if name == "netns":
                # What shows is the namespace itself, mounted there.
                assert path.stat().st_ino == pod.netns.stat().st_ino
            else:
                assert mode(path) == 0o600, path
    here.delete(pod)


def test_nobody_else_is_heard(here: Node) -> None:
    """Even if the modes were changed: the peer's user counts."""
    sockets = [here.run_dir / name for name in ("cni.sock", "ztunnel.sock")]
    assert [as_nobody(path) for path in sockets] == [b"PermissionError"] * 2
    opened = [*sockets, here.run_dir, here.run_dir.parent]
    before = [mode(path) for path in opened]
    try:
        for path in opened:
            path.chmod(0o777)
        cni, zds = (as_nobody(path) for path in sockets)
    finally:
        for path, bits in zip(opened, before, strict=True):
            path.chmod(bits)
    assert json.loads(cni[4:])["code"] == 7
    assert b"only root" in cni
    assert zds in (b"", b"ConnectionResetError")  # dropped without a word
    assert here.ask("/v1/status")["ztunnel_connections"] == 1


def as_nobody(path: Path) -> bytes:
    """What the socket says to a process of user 65534, or the name of the error."""
    kind = socket.SOCK_SEQPACKET if path.name == "ztunnel.sock" else socket.SOCK_STREAM
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.settimeout(10)
                sock.connect(str(path))
                with contextlib.suppress(OSError):
                    sock.send(encode(Hello()))
                theirs.sendall(sock.recv(4096))
        except Exception as error:  # noqa: BLE001  # its name is the result
            theirs.sendall(type(error).__name__.encode())
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        ours.settimeout(20)
        said = ours.recv(4096)
    os.waitpid(child, 0)
    return said


def http_get(here: Node, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    with Netns.open(here.netns) as inside:
        made = inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.settimeout(10)
    made.connect(("127.0.0.1", 15014))
    connection = http.client.HTTPConnection("127.0.0.1", 15014)
    connection.sock = made
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, {key.lower(): value for key, value in response.getheaders()}


def test_metrics_parse_and_count(here: Node) -> None:
    pod = here.add(here.pod("counted"))
    status, body, headers = http_get(here, "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        (s.name, tuple(sorted(s.labels.items()))): s.value for f in families.values() for s in f.samples
    }
    assert samples["sluice_pods", (("state", "enabled"),)] == 1
    assert samples["sluice_ztunnel_connections", ()] == 1
    assert samples["sluice_cni_requests_total", (("code", "0"), ("verb", "ADD"))] >= 1
    assert samples["sluice_cni_seconds_count", (("verb", "ADD"),)] >= 1
    assert samples["sluice_reconcile_seconds_count", ()] >= 1
    assert samples["process_resident_memory_bytes", ()] > 0
    compressed = http_get(here, "/metrics", **{"Accept-Encoding": "gzip"})
    assert compressed[2]["content-encoding"] == "gzip"
    assert len(compressed[1]) < len(body)
    here.delete(pod)


def test_health_and_nothing_private_on_tcp(here: Node) -> None:
    assert http_get(here, "/healthz")[0] == 200
    assert http_get(here, "/readyz")[0] == 200
    for path in ("/v1/pods", "/v1/status", "/debug", "/../v1/pods"):
        assert http_get(here, path)[0] == 404


def test_verify_by_exit_code_and_repair(here: Node) -> None:
    right, wrong, lost = (here.add(here.pod(name)) for name in ("right", "wrong", "lost"))
    assert "ok" in here.sluice("verify", "--all")
    # Of legacy tables nobody is told: their drift stays to be seen until the next comparison.
    here.restart(LabBackend.LEGACY)
    until(lambda: here.state(wrong) == "pending", "it has its rules")
    before = wrong.rules()
    here.processes.end()
    run(["iptables-legacy", "-t", "nat", "-F", "ISTIO_OUTPUT"], netns=wrong.netns)
    here.start(LabBackend.LEGACY)
    fake = FakeZtunnel(here.run_dir / "ztunnel.sock")
    until(lambda: {here.state(pod) for pod in (right, wrong, lost)} == {"enabled"}, "all are enabled again")
    assert wrong.rules() == before  # its start has repaired it
    run(["iptables-legacy", "-t", "nat", "-F", "ISTIO_OUTPUT"], netns=wrong.netns)
    shown = json.loads(here.sluice("verify", "--all", "-o", "json", code=1))
    results = {row["name"]: row["result"] for row in shown}
    assert [name for name, result in results.items() if result != "ok"] == ["wrong"]
    assert {"right", "lost", "(ztunnel)", "(probes of the node)", "(sources of pods)"} < set(results)
    assert "-A ISTIO_OUTPUT" in here.sluice("diff", wrong.key, code=1)
    assert "drifted" in here.sluice("explain", wrong.key)
    here.sluice("verify", wrong.key, "--repair")
    assert wrong.rules() == before
    here.sluice("verify", "--all")
    run(["ip", "-n", lost.netns.name, "address", "flush", "dev", "eth0"])
    here.sluice("verify", "--all", code=2)
    here.sluice("verify", right.key)
    here.sluice("verify", "nobody", code=2)
    here.sluice("verify", code=2)
    for pod in (right, wrong, lost):
        here.delete(pod)
    fake.close()


def test_verify_covers_the_nodes_own_rules(here: Node) -> None:
    """The value is of earlier versions. Drift cannot be made here: where this test runs the table is owned."""
    here.restart(LabBackend.IPTABLES, host_probes="iptables-legacy", verify_seconds=300.0)
    until(lambda: here.ask("/v1/status")["host_probes"]["ok"], "the exemption is in place")
    status = here.ask("/v1/status")
    assert status["host_probes"]["mechanism"] == "nftables" and "earlier versions" in status["host_probes_reason"]
    fake = FakeZtunnel(here.run_dir / "ztunnel.sock")
    assert fake.complete.wait(20)
    shown = json.loads(here.sluice("verify", "--all", "-o", "json"))
    assert [row["result"] for row in shown if row["name"] == "(probes of the node)"] == ["ok"]
    fake.close()
    here.restart(LabBackend.IPTABLES)


def test_check_tells_the_difference(here: Node) -> None:
    here.restart(LabBackend.LEGACY)  # whose drift nobody is told of
    fake = FakeZtunnel(here.run_dir / "ztunnel.sock")
    assert fake.complete.wait(20)
    pod = here.add(here.pod("checked"))
    assert here.cni("CHECK", pod).error == 0
    run(["iptables-legacy", "-t", "nat", "-F", "ISTIO_OUTPUT"], netns=pod.netns)
    outcome = here.cni("CHECK", pod)
    assert outcome.error >= 100
    assert "chain ISTIO_OUTPUT has 0 rules" in outcome.words
    until(lambda: here.cni("CHECK", pod).error == 0, "CHECK had it repaired")
    here.delete(pod)
    assert here.cni("CHECK", here.pod("unknown")).error == 3
    fake.close()
    here.restart(LabBackend.IPTABLES)


def test_plugin_while_the_agent_is_away(here: Node) -> None:
    here.restart(LabBackend.IPTABLES, exclude_namespaces=["kube-system", "quiet"])
    here.processes.end()
    excluded = [here.pod("quiet", namespace="quiet", enrolled=False), here.pod("dns", namespace="kube-system")]
    assert [here.cni("ADD", excluded[0]).error] == [0]
    # One that asks for capture itself is not for the plugin to judge; one that its configuration excludes is.
    assert here.cni("ADD", excluded[1]).error == 11
    assert here.cni("ADD", excluded[1], excludeNamespaces=["kube-system"]).error == 0
    for pod in (here.pod("asks"), here.pod("plain", enrolled=False)):
        outcome = here.cni("ADD", pod)
        assert (outcome.error, pod.key in outcome.words) == (11, True)
        assert outcome.seconds < 5
        assert here.cni("DEL", pod).code == 0
    assert here.cni("STATUS", excluded[0]).error == 50
    assert here.cni("VERSION", excluded[0]).answer["supportedVersions"][-1] == "1.1.0"
    assert "cannot ask the agent" in here.sluice("status", code=2)
    here.start(LabBackend.IPTABLES)


def test_agent_that_is_there_but_does_not_answer(here: Node) -> None:
    """A plugin is given its time limit, not more."""
    here.processes.end()
    path = here.run_dir / "cni.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        outcome: Any = here.cni("ADD", here.pod("waits"), timeoutSeconds=1)
    assert outcome.error == 11
    assert 1 <= outcome.seconds < 5
    here.start(LabBackend.IPTABLES)
