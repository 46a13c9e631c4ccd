# SPDX-License-Identifier: Apache-2.0
"""Everything goes wrong on a node, on purpose; a real Prometheus with the shipped rules tells it, and its end.

The rules are the shipped ones with durations a hundred times shorter (support.prometheus.hastened), else to the letter.
Not to be had here: SluiceAgentMemory (300 MB for an hour), SluiceNotReady (a start that hangs). promtool shows these.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import apiserver_objects as objects
from support import dashboard
from support.apiserver import ApiServer
from support.apiserver_inside import served
from support.field import Inside
from support.installing import CALICO, text
from support.leaking import marking
from support.node import PLUGIN, PORT, Node, NodePod, node, until
from support.prometheus import RULES, Prometheus, discovered, hastened, prometheus, rules
from support.resolver import Resolver, ask

from agent.core import names
from agent.kernel.exec import run, start
from agent.kernel.netns import Netns

pytestmark = pytest.mark.root
FASTER, SCRAPED = 100, "127.0.0.1:15014"
AMBIENT = {names.DATAPLANE_MODE: "ambient"}
PROBES = "istio-ambient-nat"  # the node's table, of the exemption of its probes
NO_DATA = {"sluice_ebpf_exits_total"}  # of backend ebpf alone
NEVER_HERE = {"SluiceAgentMemory", "SluiceNotReady"}


class World:
    """The node with an API server in it, a Prometheus, and directories of a runtime."""

    def __init__(self, here: Node, api: ApiServer, server: Prometheus, directory: Path) -> None:
        self.here, self.api, self.server, self.directory = here, api, server, directory
        self.conf = here.spec.run_dir / "host/etc/cni/net.d"
        self.loops: list[threading.Event] = []

    @property
    def agent(self) -> int:
        child = self.here.children.get("node1.agent")
        assert child is not None
        return child.pid

    def start(self, **changes: Any) -> None:
        """A new agent; the one before is ended."""
        last = self.began()
        self.here.processes.end()
        server = self.api
        access = {"kube_server": server.url, "kube_token_file": server.token_file, "kube_ca_file": server.ca_file}
        installing = {"cni_install": "own", "host_root": str(self.conf.parents[2]), "cni_plugin": str(PLUGIN)}
        places = {"cni_conf_dir": "/etc/cni/net.d", "cni_bin_dir": "/opt/cni/bin", "own_namespace": "sluice-system"}
        often = {"verify_seconds": 1.0, "add_seconds": 1.0}
        self.here.start(**{**access, **installing, **places, **often, **changes})
        until(lambda: self.began() not in (0, last), "the new agent is scraped")

    def began(self) -> float:
        """When the agent that Prometheus saw last was started; 0 while there is none."""
        return self.server.value("process_start_time_seconds and on (job, instance) sluice_agent_info")

    def told(self, name: str) -> NodePod:
        """Told of by the API server, not added yet."""
        pod = self.here.pod(name)
        self.api.put(objects.pod(name, namespace="shop", uid=pod.uid, address=pod.ipv4))
        return pod

    def again_and_again(self, what: Any, pause: float) -> threading.Event:
        """In a thread, until the event is set; what it raises is of no matter."""
        stop = threading.Event()

        def run_() -> None:
            while not stop.wait(pause):
                with contextlib.suppress(OSError, AssertionError):
                    what()

        threading.Thread(target=run_, daemon=True).start()
        self.loops.append(stop)
        return stop

    def fires(self, name: str, **labels: str) -> None:
        """Waits until the alert fires for these labels."""
        assert name in {rule["alert"] for rule in rules()}

        def there() -> bool:
            return any(labels.items() <= one.items() for one in self.server.firing().get(name, ()))

        until(there, f"{name} {labels} fires; these do: {sorted(self.server.firing())}", 40)
        SEEN.add(name)

    def ends(self, *names: str) -> None:
        for name in names:
            until(lambda name=name: name not in self.server.firing(), f"{name} has ended", 40)  # type: ignore[misc]


SEEN: set[str] = set()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("alerts")
    (directory / "rules.yaml").write_text(hastened(RULES.read_text(), FASTER))
    with node("slueal") as here, served(here.netns, directory / "api") as api:
        api.put(objects.namespace("shop", **AMBIENT))
        at = directory / "prometheus"
        with prometheus(here.children, here.netns, at, SCRAPED, directory / "rules.yaml") as server:
            made = World(here, api, server, at)
            made.conf.mkdir(parents=True)
            (made.conf.parents[2] / "opt/cni/bin").mkdir(parents=True)
            (made.conf / "10-calico.conflist").write_bytes(text(CALICO))
            try:
                here.processes.start_ztunnel()
                made.start()
                yield made
            finally:
                for stop in made.loops:
                    stop.set()


@pytest.fixture(scope="module")
def pods(world: World) -> Iterator[dict[str, NodePod]]:
    """Four that talk all the time, each in its own way; one of them asks a resolver of the node."""
    made = {name: world.here.add(world.told(name)) for name in ("client", "careless", "narrow", "touched")}
    run(["sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40009"], netns=made["narrow"].netns)
    world.again_and_again(lambda: made["client"].connect(world.here.host(made["client"])), 0.1)
    world.again_and_again(lambda: made["touched"].connect(made["client"].ipv4, 9), 0.1)  # nobody is there
    listener = Inside(made["touched"].netns).listen("0.0.0.0", PORT)
    world.again_and_again(lambda: listener.accept()[0].close(), 0.0)
    world.again_and_again(lambda: made["client"].connect(made["touched"].ipv4), 0.2)
    with Netns.open(made["client"].netns) as inside:
        datagrams = inside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    world.again_and_again(lambda: datagrams.sendto(b"x", (made["touched"].ipv4, 9)), 0.3)
    with Netns.open(world.here.netns) as outside:
        resolver = Resolver(outside, world.here.host(made["client"]))
    with contextlib.closing(resolver):
        asking(world, made["client"], "fine.test", 0.2)
        yield made


def asking(world: World, pod: NodePod, name: str, pause: float) -> threading.Event:
    """Queries of the pod, again and again."""
    inside, resolver = Netns.open(pod.netns), world.here.host(pod)
    return world.again_and_again(lambda: ask(inside, resolver, name), pause)


def test_a_healthy_node_is_silent(world: World, pods: dict[str, NodePod]) -> None:
    captured = 'sluice_connections_total{fate="captured"}'
    until(lambda: world.server.value(captured) > 3, "traffic is counted")
    until(lambda: not world.server.firing(), "what was told before the agent ran is over")
    judged(world, 4)
    (info,) = (one["metric"] for one in world.server.ask("query", query="sluice_agent_info")["result"])
    assert info.keys() - {"__name__", "job", "instance"} == set(dashboard.ABOUT)
    assert world.server.firing() == {}


def judged(world: World, times: int) -> None:
    """Until the rules have been looked at so often, without an error."""
    (group,) = world.server.ask("rules")["groups"]
    for _ in range(times):
        before = group["lastEvaluation"]
        until(lambda: world.server.ask("rules")["groups"][0]["lastEvaluation"] != before, "an evaluation")  # noqa: B023
        (group,) = world.server.ask("rules")["groups"]
    assert [rule["lastError"] for rule in group["rules"] if rule["health"] != "ok"] == []


def test_what_goes_wrong_beside_each_other_is_told_each_by_its_alert(world: World, pods: dict[str, NodePod]) -> None:
    here, api = world.here, world.api
    # A leak: an application's packets bear ztunnel's mark.
    leak = Inside(pods["client"].netns).make("10.0.0.1")
    with marking(pods["client"].netns, f"tcp dport {PORT}"):
        leak.connect((here.host(pods["client"]), PORT))
    # All TCP of a pod is marked, ztunnel's too.
    vpn = pods["careless"]
    with marking(vpn.netns, "meta l4proto tcp", 0x1):
        world.fires("SluiceForeignRules", namespace="shop", pod=vpn.name)
        (line,) = (one for one in here.sluice("status").splitlines() if one.startswith("Foreign rules:"))
        assert f"1 pod: {vpn.key};" in line
        (row,) = here.ask("/v1/verify", pod=vpn.key)
        assert [one for one in row["differences"] if "mark set 0x1" in one and "inet own out" in one], row
    # Somebody takes a routing rule away as often as it comes back.
    rule = ["ip", "rule", "del", "pref", "32764"]
    fight = world.again_and_again(lambda: run(rule, netns=pods["touched"].netns, check=False), 0.1)
    # Somebody removes our CNI configuration as often as it comes back.
    ours = world.conf / names.CNI_CONF
    rewriting = world.again_and_again(lambda: ours.rename(ours.with_suffix(".cilium_bak")), 0.1)
    # A pod runs, by the API server's word, and nobody here has ever heard of it.
    api.put(objects.pod("nowhere", namespace="shop", uid="uid-nowhere", address="10.99.250.2"))
    # The pod's resolver fails.
    failing = asking(world, pods["client"], "broken.test", 0.05)
    # The agent may have hardly more descriptors than it has.
    limits = resource.prlimit(world.agent, resource.RLIMIT_NOFILE)
    opened = int(world.server.value("max_over_time(process_open_fds[3s])"))
    resource.prlimit(world.agent, resource.RLIMIT_NOFILE, (opened * 11 // 10, limits[1]))

    world.fires("SluiceConnectionsLeaked", workload="client", direction="outbound")
    leak.close()
    world.fires("SluiceDrift", backend="routing")
    world.fires("SluiceRulesFoughtOver")
    fight.set()
    world.fires("SluiceDnsServfail")
    failing.set()
    world.fires("SluicePodFailed")
    world.fires("SluiceAgentDescriptors")
    resource.prlimit(world.agent, resource.RLIMIT_NOFILE, limits)
    world.fires("SluiceInstallationFoughtOver")
    rewriting.set()
    world.fires("SluicePodNotCaptured", namespace="shop", pod="nowhere")
    api.delete("Pod", "shop", "nowhere")
    world.ends("SluiceForeignRules", "SluicePodFailed", "SluicePodNotCaptured", "SluiceAgentDescriptors")


def test_what_the_agent_depends_on_is_away(world: World, pods: dict[str, NodePod]) -> None:
    here = world.here
    # The node's own connections to pods are refused on their way: its probes, too.
    for words in (
        "add table inet test",
        "add chain inet test out { type filter hook output priority 0; }",
        "add rule inet test out tcp dport 8080 reject with tcp reset",
    ):
        run(["nft", words], netns=here.netns)
    probed = world.told("probed")
    with Inside(probed.netns).listen("0.0.0.0", 8080):
        here.add(probed)
        world.fires("SluiceProbesFail", verdict="failed")
    run(["nft", "delete", "table", "inet", "test"], netns=here.netns)
    with here.ztunnel_stopped(), Inside(pods["touched"].netns).connect(here.host(pods["touched"]), PORT):
        unanswered = asking(world, pods["client"], "silent.test", 0.05)
        world.fires("SluiceZtunnelStalled", state="stalled")
        world.fires("SluiceDnsNoAnswer")
        unanswered.set()
    world.ends("SluiceZtunnelStalled")
    # No ztunnel, no API server, no directory of plugins.
    here.processes.end("ztunnel")
    plugins = world.conf.parents[2] / "opt/cni/bin"
    kept = plugins.rename(plugins.with_name("kept"))
    plugins.write_text("no directory")
    refused = world.told("refused")
    adding = world.again_and_again(lambda: here.cni("ADD", refused), 0.2)
    world.api.down()
    world.fires("SluiceNoZtunnel")
    world.fires("SluiceNotInstalled")
    world.fires("SluiceApiServerAway", path="/api/v1/pods")
    world.fires("SluicePodsDoNotStart", verb="ADD")
    adding.set()
    here.processes.start_ztunnel()
    plugins.unlink()
    kept.rename(plugins)
    world.api.up()
    world.ends("SluiceNoZtunnel", "SluicePodsDoNotStart", "SluiceApiServerAway", "SluiceNotInstalled")


def test_the_agent_itself_fails(world: World, pods: dict[str, NodePod]) -> None:
    here, agent = world.here, world.agent
    os.kill(agent, signal.SIGSTOP)
    try:
        world.fires("SluiceAgentDown")
    finally:
        os.kill(agent, signal.SIGCONT)
    world.ends("SluiceAgentDown")
    # A file system that hangs, below its notes: the one worker waits in open().
    note = here.run_dir / "pods" / f"{pods['touched'].uid}.new"
    os.mkfifo(note)
    world.api.put(objects.pod("touched", namespace="shop", uid=pods["touched"].uid, address=pods["touched"].ipv4,
                              labels={"app": "renamed"}))  # fmt: skip
    world.fires("SluiceVerificationStale")
    here.processes.kill()
    note.unlink()


def test_what_a_new_agent_finds(world: World, pods: dict[str, NodePod]) -> None:
    here = world.here
    here.processes.end()
    # Another program has the table of the probes' exemption, and nobody else may touch it.
    run(["nft", "delete", "table", "inet", PROBES], netns=here.netns)
    owner = start(["nft", "-i"], netns=here.netns, stdin=-1)
    assert owner.stdin is not None
    owner.stdin.write(f"add table inet {PROBES} {{ flags owner; }}\n".encode())
    owner.stdin.flush()
    try:
        until(lambda: "flags owner" in run(["nft", "list", "ruleset"], netns=here.netns).stdout, "its table")
        world.start(backend="ebpf", bpf_dir="/dev/null/no/bpf")  # where no file system of BPF can be
        world.fires("SluiceBackendFellBack", backend="nftables", setting="ebpf")
        world.fires("SluiceProbesCaptured")
    finally:
        owner.kill()
        owner.wait()
    world.ends("SluiceProbesCaptured")
    for _ in range(3):
        world.start()
    # Sockets that nobody closes, and ports that run out; both are counted when an agent begins.
    held = [hold(pods["careless"], here) for _ in range(60)]
    with contextlib.suppress(OSError):
        while True:
            held.append(hold(pods["narrow"], here))
    world.start(connection_log="/dev/full", metrics_label_sets=1)
    world.fires("SluiceAgentRestarts")
    world.fires("SluiceRecordsLost", cause="log_failed")
    world.fires("SluiceEphemeralPorts", pod="narrow")
    world.fires("SluiceCloseWaitGrowth", pod="careless")
    world.fires("SluiceMetricsOverflow")
    for one in held:
        one.close()


def hold(pod: NodePod, here: Node) -> socket.socket:
    """A connection that the server has closed, and the application has not."""
    made = Inside(pod.netns).connect(here.host(pod), PORT)
    while made.recv(4096):
        pass
    return made


def test_every_panel_and_every_choice_of_the_dashboard_has_had_data(world: World) -> None:
    """At some moment of what was done above."""
    now, empty = time.time(), []
    for expr in dashboard.queries("10s", "1m"):
        found = world.server.ask("query_range", query=expr, start=str(now - 600), end=str(now), step="2")["result"]
        values = [float(value) for one in found for _, value in one["values"]]
        if not any(value == value for value in values):  # there are some, and not all are NaN
            empty.append(expr)
    assert [expr for expr in empty if not any(name in expr for name in NO_DATA)] == []
    assert all(any(name in expr for expr in empty) for name in NO_DATA)
    for series, label in dashboard.variables().values():
        found = world.server.ask("series", **{"match[]": series, "start": str(now - 600)})
        assert found and all(label in one for one in found), series


def test_every_alert_was_seen_that_can_be(world: World) -> None:
    discovered(world.directory)
    world.fires("SluiceAgentsAbsent")
    assert {rule["alert"] for rule in rules()} - SEEN == NEVER_HERE
