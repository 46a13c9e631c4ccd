# SPDX-License-Identifier: Apache-2.0
"""The agent with backend ebpf, ztunnel and plugin together: switched, ended, killed, and without what it needs."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakeztunnel import FakeZtunnel
from support.node import REPO, SECONDS, Node, NodePod, node, until

from agent.backends.ebpf import abi, object_files
from agent.backends.ebpf.pins import Pins
from agent.core.errors import SluiceError
from agent.kernel.bpf import bpffs
from agent.kernel.bpf import load as bpfload
from agent.kernel.bpf.map import Map
from agent.kernel.exec import run
from agent.kernel.netlink.sock_diag import cookies
from agent.kernel.netns import Netns
from agent.lab.account import account
from agent.lab.lab import Lab, down
from agent.lab.lab_spec import LabSpec, PodProgram, PodSpec
from agent.lab.node_services import LabBackend
from agent.lab.traffic import LabTraffic, relayed, settled
from agent.zds.messages import Ack, Add, Message, Request, SnapshotSent

pytestmark = pytest.mark.root
PREFIX, NODE_PREFIX, RATE, CALM = "slueb", "sluef", 150.0, 0.4
MORE = 64 << 20  # bytes; more than all buffers of a connection through two proxies hold
VERIFY = 0.5
WAYS = [
    (*pair, family) for pair in (("legacy/batch", "shop/web"), ("shop/client", "legacy/batch")) for family in (4, 6)
]
ORDER = (LabBackend.EBPF, LabBackend.NFTABLES, LabBackend.EBPF, LabBackend.IPTABLES, LabBackend.EBPF)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    down(PREFIX)
    echo = (PodProgram.ECHO,)
    pods = (
        PodSpec("node1", "shop", "web", enrolled=True, programs=echo),
        PodSpec("node1", "shop", "client", enrolled=True),
        PodSpec("node2", "shop", "db", enrolled=True, programs=echo),
        PodSpec("node2", "legacy", "batch", programs=echo),
    )
    lab = Lab(LabSpec(PREFIX, ("node1", "node2"), pods))
    lab.up(backend=LabBackend.EBPF)
    try:
        yield lab
    finally:
        down(PREFIX)


def transfer(lab: Lab, source: str, target: str, family: int) -> socket.socket:
    """A connection on which the server sends without end."""
    host, _, port = lab.pods.require(target).address(PodProgram.ECHO, family).rpartition(":")
    with Netns.open(lab.netns(source)) as inside:
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        made = inside.call(lambda: socket.socket(kind, socket.SOCK_STREAM))
    made.settimeout(SECONDS)
    made.connect((host.strip("[]"), int(port)))
    made.sendall(b"bulk 1000000000000\n")
    return made


def carries_on(made: socket.socket) -> bool:
    """Takes more than was under way. Raises OSError when it was reset or stands still."""
    left = MORE
    while left and (data := made.recv(min(left, 1 << 20))):
        left -= len(data)
    return not left


def test_switches_both_ways_and_deaths_break_nothing(lab: Lab) -> None:
    up = lab.pods.up()
    servers = ("shop/web", "shop/db", "legacy/batch")
    targets = [up[ref].address(PodProgram.ECHO, family) for ref in servers for family in (4, 6)]
    pairs = [("shop/client", ref) for ref in servers] + [("legacy/batch", "shop/web")]
    traffic = LabTraffic(lab, up["shop/client"], targets, rate=RATE)
    traffic.start()
    windows: dict[str, tuple[float, float]] = {}
    with contextlib.ExitStack() as stack:
        made = {(*pair, 4): stack.enter_context(transfer(lab, *pair, 4)) for pair in pairs}
        for number, backend in enumerate(ORDER):
            first = time.time()
            for name, each in lab.nodes.items():
                each.configure(backend, verify_seconds=VERIFY)
                (each.end if number % 2 else each.kill)()
                each.start_agent()
                status = lab.ask(name, "/v1/status")
                assert status["backend"] == str(backend), status
            until(lambda b=backend: by(lab) == {str(b)}, f"every pod is captured by {backend}")  # type: ignore[misc]
            windows[f"{number} {backend}"] = first, time.time()
            for pair, stream in made.items():
                assert carries_on(stream), (pair, backend)
            made |= {(*pair, 6 + number): stack.enter_context(transfer(lab, *pair, 6)) for pair in pairs[1:2]}
        time.sleep(CALM)
        load = traffic.stop()
    whole = settled(lab, load)
    assert (whole.escaped, whole.failed, whole.errors) == (0, 0, {}), (whole, windows)
    assert whole.captured_outbound == whole.opened == len(load)
    for name, window in windows.items():
        part = account(load, relayed(lab), window)
        assert part.opened > RATE / 4 * (window[1] - window[0]), name  # there was traffic all the time
    for name in lab.spec.nodes:
        until(lambda name=name: results(lab, name) == {"ok"}, f"{name} is right")  # type: ignore[misc]
    rules = lambda: run(["nft", "list", "ruleset"], netns=lab.netns("shop/client")).stdout  # noqa: E731
    until(lambda: "sluice" not in rules(), "the rules that served older connections are gone with them")


def test_without_a_ztunnel_nobody_gets_in_or_out(lab: Lab) -> None:
    """Over a server that listens, so that only the capture can refuse."""
    lab.nodes["node1"].kill("ztunnel")
    for source, target, family in WAYS:
        with pytest.raises(ConnectionRefusedError):
            transfer(lab, source, target, family).close()
    with transfer(lab, "legacy/batch", "shop/db", 4) as other:
        assert carries_on(other), "the other node has its ztunnel"
    lab.nodes["node1"].start_ztunnel()
    for way in WAYS:
        with until(lambda way=way: attempted(lab, *way), f"{way} works again") as again:  # type: ignore[misc]
            assert carries_on(again)


def attempted(lab: Lab, source: str, target: str, family: int) -> socket.socket | None:
    with contextlib.suppress(ConnectionRefusedError):
        return transfer(lab, source, target, family)
    return None


def by(lab: Lab) -> set[str]:
    rows = [row for name in lab.spec.nodes for row in lab.ask(name, "/v1/pods")]
    return {row["backend"] if row["state"] == "enabled" else row["state"] for row in rows if row["namespace"] == "shop"}


def results(lab: Lab, name: str) -> set[str]:
    return {row["result"] for row in lab.ask(name, "/v1/verify", all="true")}


def test_a_lab_is_removed_with_its_pins_also_when_its_records_are_missing() -> None:
    spec = LabSpec("slueg", ("node1",))
    pins = Pins.of(str(spec.bpf_dir("node1")))
    bpffs.mount(pins.mount)
    named = {"connect4": pins.node.path / "connect4", "connect6": pins.node.path / "connect6"}
    bpfload.load(object_files.path("connect"), pins.maps, named)
    other = Lab(spec)
    try:
        with pytest.raises(SluiceError, match="exists already"):
            other.up()
    finally:
        down("slueg")
    assert not pins.root.exists()


@pytest.fixture(scope="module")
def made() -> Iterator[Node]:
    with node(NODE_PREFIX) as made:
        made.processes.start_ztunnel()
        made.start(LabBackend.EBPF, verify_seconds=VERIFY)
        made.await_ztunnel()
        yield made


@pytest.fixture
def here(made: Node) -> Iterator[Node]:
    """With agent and ztunnel running before and after, on ebpf, and no pod left."""
    yield made
    assert made.ask("/v1/status")["backend"] == "ebpf"
    assert made.ask("/v1/pods") == []


def held(here: Node) -> dict[str, set[int]]:
    """Map, or place of pins -> cookies of the pods for which something is there."""
    pins = Pins.of(str(here.spec.bpf_dir("node1")))
    found: dict[str, set[int]] = {"pins": set(pins.pods())}
    for name in ("pods", "listeners", "beside"):
        found[name] = set()
        if (pins.maps / name).exists():
            with Map.open(pins.maps / name) as one:
                found[name] = {abi.uncookie(key[:8]) for key, _ in one.items()}
    found["policies"] = set()
    if (pins.maps / "policies").exists():
        with Map.open(pins.maps / "policies") as one:
            found["policies"] = {abi.prefix(key, value)[0] for key, value in one.items()}
    return found


def cookie(pod: NodePod) -> int:
    with Netns.open(pod.netns) as inside:
        return inside.id.cookie


def test_pods_that_come_and_go_leave_nothing(here: Node) -> None:
    stays = here.add(here.pod("stays"))
    assert here.captured(stays) and here.captured(stays, 6)
    before = held(here)
    assert before["pins"] == before["pods"] == before["listeners"] == {cookie(stays)}
    for number in range(4):
        pod = here.add(here.pod(f"goes{number}"))
        assert here.captured(pod) and cookie(pod) in held(here)["pods"]
        here.delete(pod)
        assert held(here) == before
    assert here.captured(stays)
    here.delete(stays)
    until(lambda: not any(held(here).values()), "the last pod's entries are gone")


def test_a_pod_that_dies_while_the_agent_is_away_is_swept(here: Node) -> None:
    gone, stays = here.add(here.pod("gone")), here.add(here.pod("stays"))
    number = cookie(gone)
    here.processes.kill()
    here.remove(gone)
    assert number in held(here)["pods"]
    here.start(LabBackend.EBPF, verify_seconds=VERIFY)
    until(lambda: not any(number in found for found in held(here).values()), "what the dead pod had is swept")
    assert here.captured(stays)
    here.delete(gone)
    here.delete(stays)


def test_capture_goes_on_without_the_agent(here: Node) -> None:
    pod = here.add(here.pod("alone"))
    for stop in (here.processes.end, here.processes.kill):
        stop()
        assert here.captured(pod) and here.captured(pod, 6)
        here.start(LabBackend.EBPF, verify_seconds=VERIFY)
        assert here.captured(pod)
        until(lambda: here.state(pod) == "enabled", "it is enabled")
        assert {row["repairs"] for row in here.ask("/v1/pods")} == {0}
    here.delete(pod)


@pytest.mark.parametrize("agent", [True, False], ids=["agent", "no-agent"])
def test_without_ztunnel_connections_are_refused_and_the_next_takes_them(here: Node, agent: bool) -> None:
    pod = here.add(here.pod("lost"))
    assert here.captured(pod)
    if not agent:
        here.processes.kill()
    here.processes.kill("ztunnel")
    assert here.refused(pod)
    here.processes.start_ztunnel()
    if not agent:
        here.start(LabBackend.EBPF, verify_seconds=VERIFY)
    here.await_ztunnel()
    until(lambda: not here.refused(pod), "the new ztunnel's listeners are known")
    assert here.captured(pod) and here.captured(pod, 6)
    assert here.ask("/v1/explain", pod=pod.key)["recent_repairs"] == [], "another ztunnel is no drift"
    here.delete(pod)


def test_connections_can_reach_a_new_ztunnel_before_it_has_its_whole_snapshot(here: Node) -> None:
    """With that Istio's is ready, and Kubernetes ends the one before it."""
    pod = here.add(here.pod("kept"))
    assert here.captured(pod)
    reached: set[int] = set()

    def answer(request: Request) -> Message:
        if isinstance(request, Add):
            here.ask("/v1/verify", pod=pod.key)  # so that the agent looked at the listeners just before these open
        elif isinstance(request, SnapshotSent):
            with Map.open(Pins.of(str(here.spec.bpf_dir("node1"))).maps / "listeners") as listeners:
                reached.update(int.from_bytes(value, "little") for _, value in listeners.items())
        return Ack()

    newer = FakeZtunnel(here.run_dir / "ztunnel.sock", answer)
    try:
        assert newer.complete.wait(SECONDS)
        opened = {cookies(one.fileno())[0] for one in newer.listeners[pod.uid]}
        assert len(opened) == 2 and opened <= reached
    finally:
        newer.close()
    until(lambda: here.ask("/v1/status")["ztunnel_connections"] == 1, "it has gone")
    assert here.captured(pod)
    here.delete(pod)


def words(here: Node) -> str:
    return " ".join(here.sluice("status").split())


def test_status_tells_every_way_out(here: Node) -> None:
    pod = here.add(here.pod("counted"))
    assert here.captured(pod)
    said = words(here)
    assert "Backend: ebpf (setting backend=ebpf)" in said and "captured outbound" in said, said
    here.delete(pod)


def test_where_pins_cannot_be_nftables_is_taken_and_status_says_why(here: Node) -> None:
    here.restart(LabBackend.EBPF, bpf_dir="/proc/sluice/bpf")
    said = words(here)
    assert "Backend: nftables" in said and "ebpf cannot be used" in said and "/proc/sluice" in said, said
    pod = here.add(here.pod("other"))
    assert here.captured(pod) and "istio-ambient" in pod.ruleset()
    here.delete(pod)
    here.restart(LabBackend.EBPF, verify_seconds=VERIFY)


def test_an_installation_without_objects_takes_nftables_and_says_why(here: Node, tmp_path: Path) -> None:
    """And takes over pods that one with them had captured: what that left in the kernel goes."""
    copy = tmp_path / "agent"
    shutil.copytree(REPO / "agent", copy, ignore=shutil.ignore_patterns("*.bpf.o", "__pycache__"))
    before = here.add(here.pod("before"))
    here.processes.end()
    here.configure(LabBackend.EBPF, verify_seconds=VERIFY)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from agent.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "agent", "--config", str(here.run_dir / "sluice.yaml")]
    child = here.children.start("node1.agent", argv, here.netns, here.run_dir / "agent.log")
    here.processes.await_agent(child)
    here.await_ztunnel()
    said = words(here)
    assert "Backend: nftables" in said and "this installation has no" in said, said
    until(lambda: here.state(before) == "enabled", "the pod of the other installation is enabled")
    after = here.add(here.pod("after"))
    for pod in (before, after):
        assert here.captured(pod) and "istio-ambient" in pod.ruleset()
    until(lambda: not any(held(here).values()), "what the other installation had in the kernel is gone")
    for pod in (before, after):
        here.delete(pod)
    here.restart(LabBackend.EBPF, verify_seconds=VERIFY)
