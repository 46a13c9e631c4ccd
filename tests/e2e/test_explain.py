# SPDX-License-Identifier: Apache-2.0
"""`sluice explain` as on-call reads it: the first three lines name the cause, whatever it is."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Iterator

import pytest
from support.fakeztunnel import FakeZtunnel
from support.node import PORT, SECONDS, Node, NodePod, node, until

from agent.core.names import DATAPLANE_MODE, DNS_CAPTURE, REROUTE_INTERFACES
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.node_services import LabBackend

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("slude") as made:
        # Legacy tables tell nobody of a change, and verification is too rare to see it: drift stays.
        made.start(LabBackend.LEGACY, verify_seconds=3000.0, exclude_namespaces=["kube-system", "quiet"])
        made.processes.start_ztunnel()
        made.await_ztunnel()
        yield made


def verdict(here: Node, pod: NodePod) -> dict[str, str]:
    """The first three lines."""
    lines = here.sluice("explain", pod.key).splitlines()[:3]
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_captured_pod(here: Node) -> None:
    pod = here.add(here.pod("right"))
    until(lambda: here.state(pod) == "enabled", "it is captured")
    assert here.captured(pod)
    said = verdict(here, pod)
    assert said["Pod"].startswith(f"{pod.key}  (UID {pod.uid}, node node1)")
    assert said["Captured"] == f"yes by iptables-legacy: the pod says {DATAPLANE_MODE}=ambient"
    assert said["Action"] == "none"
    told = here.ask("/v1/explain", pod=pod.key)
    assert [one["key"] for one in told["facts"] if one["decides"]] == [DATAPLANE_MODE]
    (excluded,) = [one for one in told["facts"] if one["key"] == "exclude_namespaces"]
    assert excluded["value"] == "kube-system, quiet" and excluded["place"].startswith(
        str(here.run_dir / "sluice.yaml:")
    )
    assert [one["place"] for one in told["facts"] if one["key"] == "exempt_pods"] == ["default"]
    assert {one["layer"]: one["in_sync"] for one in told["layers"]} == {
        "routing": True, "conntrack": True, "iptables-legacy": True,
    }  # fmt: skip
    assert told["ztunnel"] == {
        "connections": 1, "acknowledged": True, "listening": [15001, 15006], "silent": [], "error": "", "foreign": [],
        "identity": {"namespace": "shop", "name": "right", "service_account": "default"},
    }  # fmt: skip
    assert told["exemption"]["ok"] and set(told["exemption"]["addresses"]) == {pod.ipv4, pod.ipv6}
    fates = {(one["direction"], one["fate"], one["reason"]) for one in told["connections"]["fates"]}
    assert ("outbound", "captured", "") in fates
    here.delete(pod)


def test_a_connection_that_failed_is_shown_with_its_peer_and_process(here: Node) -> None:
    pod = here.add(here.pod("failing"))
    until(lambda: here.state(pod) == "enabled", "it is captured")
    run(["iptables-legacy", "-I", "OUTPUT", "-p", "tcp", "--dport", "15001", "-j", "REJECT"], netns=pod.netns)
    with Netns.open(pod.netns), pytest.raises(OSError):
        pod.connect(here.host(pod))
    (wrong,) = until(lambda: here.ask("/v1/explain", pod=pod.key)["connections"]["wrong"], "it is accounted for")
    assert (wrong["remote"], wrong["established"]) == (f"{here.host(pod)}:{PORT}", False)
    assert f"{here.host(pod)}:{PORT}" in here.sluice("explain", pod.key)
    here.delete(pod)


def test_an_excluded_pod_is_told_what_would_enrol_it(here: Node) -> None:
    plain, quiet = here.add(here.pod("plain", enrolled=False)), here.add(here.pod("q", namespace="quiet"))
    said = verdict(here, plain)
    assert said["Captured"].startswith("no, excluded: neither the pod nor its namespace says")
    assert said["Action"].startswith(f"to capture it, give its sandbox the annotation {DATAPLANE_MODE}=ambient")
    said = verdict(here, quiet)
    assert "exclude_namespaces" in said["Captured"] and f"{here.run_dir}/sluice.yaml:" in said["Action"]
    for pod in (plain, quiet):
        here.delete(pod)


def test_drift_and_its_repair(here: Node) -> None:
    pod = here.add(here.pod("drifted"))
    until(lambda: here.state(pod) == "enabled", "it is captured")
    run(["iptables-legacy", "-t", "nat", "-F", "ISTIO_OUTPUT"], netns=pod.netns)
    said = verdict(here, pod)
    assert said["Captured"].startswith("NOT as it should be by iptables-legacy: ")
    assert said["Action"].startswith(f"run `sluice verify {pod.key} --repair`")
    assert "chain ISTIO_OUTPUT has 0 rules" in here.sluice("explain", pod.key)
    here.sluice(*said["Action"].split("`")[1].split()[1:])  # as it says
    assert verdict(here, pod)["Captured"].startswith("yes")
    (repair,) = here.ask("/v1/explain", pod=pod.key)["recent_repairs"]
    assert repair["layer"] == "iptables-legacy" and "Repaired" in here.sluice("explain", pod.key)
    here.delete(pod)


def test_an_annotation_and_a_mistake_in_one(here: Node) -> None:
    pod = here.pod("annotated")
    marks = {DATAPLANE_MODE: "ambient", DNS_CAPTURE: "false", "traffic.sluice.io/exclude-outbound-ports": "x"}
    done = here.cni("ADD", pod, runtimeConfig={"io.kubernetes.cri.pod-annotations": marks})
    assert done.code == 0
    options = {one["option"]: one for one in here.ask("/v1/explain", pod=pod.key)["options"]}
    assert (options["dns"]["value"], options["dns"]["key"]) == (False, DNS_CAPTURE)
    assert options["ipv6"] == {
        "option": "ipv6", "value": True, "origin": "setting", "key": "ipv6", "place": "default",
    }  # fmt: skip
    assert "'x' is not a port or range" in here.sluice("explain", pod.key)
    here.delete(pod)


def test_no_such_pod(here: Node) -> None:
    pod = here.add(here.pod("web-5d9f"))
    for name in ("web", "shop/web"):
        words = here.sluice("explain", name, code=2)
        assert words.startswith(f"sluice: no pod '{name}' on this node; did you mean {pod.key}?")
        assert words.count("\n") == 1
    assert (
        here.sluice("explain", pod.name, "-n", "shop").splitlines()[:3]
        == here.sluice("explain", pod.key).splitlines()[:3]
    )
    here.delete(pod)


def test_ztunnel_away_deaf_or_refusing(here: Node) -> None:
    pod = here.add(here.pod("proxied"))
    until(lambda: here.state(pod) == "enabled", "it is captured")
    here.processes.end("ztunnel")
    until(lambda: here.state(pod) == "pending", "ztunnel is missed")
    said = verdict(here, pod)
    assert said["Captured"].startswith("not yet: its rules are in place, but no ztunnel has it")
    assert said["Action"] == "start ztunnel on this node: systemctl start sluice-ztunnel"
    fake = FakeZtunnel(here.run_dir / "ztunnel.sock")
    assert fake.complete.wait(SECONDS)
    until(lambda: here.state(pod) == "enabled", "it is captured again")
    fake.deafen(pod.uid, 15006)
    said = verdict(here, pod)
    assert "ztunnel does not listen in it" in said["Captured"]
    assert said["Action"] == "restart ztunnel: it does not listen in the pod on 15006"
    assert "15001; MISSING: 15006" in here.sluice("explain", pod.key)
    fake.close()
    here.processes.start_ztunnel()
    here.await_ztunnel()
    here.delete(pod)


FOREIGN = """table ip foreign {
    chain out { type nat hook output priority -150; tcp dport 7000 redirect to :9; }
}"""


def test_foreign_rules_before_ours_are_told(here: Node) -> None:
    here.restart(LabBackend.NFTABLES)
    pod = here.add(here.pod("shadowed"))
    until(lambda: here.state(pod) == "enabled", "it is captured")
    run(["nft", "-f", "-"], netns=pod.netns, stdin=FOREIGN)
    here.ask("/v1/verify", "POST", pod=pod.key)
    notes = [line for line in here.sluice("explain", pod.key).splitlines() if line.startswith("Note:")]
    assert notes and "foreign" in notes[0], notes
    (row,) = here.ask("/v1/verify", pod=pod.key)
    assert row["result"] == "drift", "connections to port 7000 escape"
    assert row["differences"][0].startswith("foreign: chain ip foreign out")
    here.delete(pod)


DOCKER = """sysctl -qw net.ipv4.ip_forward=1
ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up"""


def test_containers_within_a_pod_are_noted_until_an_annotation_names_their_bridge(here: Node) -> None:
    pod = here.add(here.pod("nesting"))
    until(lambda: here.state(pod) == "enabled", "it is captured")
    run(["sh", "-ec", DOCKER], netns=pod.netns)
    until(lambda: "behind the bridge docker0 cannot connect" in here.sluice("explain", pod.key), "it is noted")
    assert f"{REROUTE_INTERFACES}=docker0 captures them" in here.sluice("explain", pod.key)
    here.delete(pod)
    pod = here.pod("nesting-too")
    marks = {DATAPLANE_MODE: "ambient", REROUTE_INTERFACES: "docker0"}
    assert here.cni("ADD", pod, runtimeConfig={"io.kubernetes.cri.pod-annotations": marks}).code == 0
    run(["sh", "-ec", DOCKER], netns=pod.netns)
    here.ask("/v1/verify", "POST", pod=pod.key)
    assert "behind the bridge" not in here.sluice("explain", pod.key)
    here.delete(pod)


def cut_off(listener: socket.socket) -> None:
    """As a ztunnel that does not know the pod, only at once: it accepts, and resets."""
    with contextlib.suppress(OSError):
        while True:
            taken, _ = listener.accept()
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            taken.close()


def test_connections_that_ztunnel_cuts_off_are_told_with_the_names_that_it_was_sent() -> None:
    with node("sludc") as one:
        one.start()
        ztunnel = FakeZtunnel(one.run_dir / "ztunnel.sock")
        one.await_ztunnel()
        pod = one.add(one.pod("stranger"))
        until(lambda: one.state(pod) == "enabled", "it is captured")
        (listener, _) = ztunnel.listeners[pod.uid]
        threading.Thread(target=cut_off, args=(listener,), daemon=True).start()
        client = f"import socket; socket.create_connection(('{one.host(pod)}', {PORT})).recv(1)"
        for _ in range(3):  # in a process of its own: this one is ztunnel
            assert "reset" in run([sys.executable, "-c", client], netns=pod.netns, check=False).stderr

        def counted() -> bool:
            return (one.ask("/v1/explain", pod=pod.key)["connections"]["behind"] or {}).get("failed") == 3

        until(counted, "all of them are accounted for")
        said = one.sluice("explain", pod.key)
        assert "ztunnel took and cut off 3" in said and "Action:    ztunnel takes its connections to" in said
        assert "has the pod as shop/stranger, service account default" in said
        ztunnel.socket.shutdown(socket.SHUT_RDWR)
