# SPDX-License-Identifier: Apache-2.0
"""Pods of a real containerd: captured with real traffic from its annotation on, and gone without a trace."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cri import decode
from support.crinode import NETWORK, CriNode, CriPod, Sandbox, crinode, until

from agent.kernel.exec import run
from agent.kernel.netns import Netns

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def made() -> Iterator[CriNode]:
    with crinode("slucra") as made:
        made.start_containerd()
        made.start_ztunnel()
        made.start_agent()
        made.await_ztunnel()
        made.start_resolver()
        until(made.configured, "the runtime has our list")
        yield made


@pytest.fixture
def here(made: CriNode) -> Iterator[CriNode]:
    """With all daemons before, and without any trace of a pod before and after."""
    yield made
    made.nothing_left()
    assert made.ask("/v1/pods") == []


@pytest.fixture(scope="module")
def web(made: CriNode) -> str:
    """The address of a server on the node itself: of no pod, so that nothing of it is left between tests."""
    return made.start_web()


def test_annotation_enrols_through_the_runtime_and_nothing_is_left(here: CriNode) -> None:
    server, client, plain = (here.run(CriPod(name, enrolled=name != "plain")) for name in ("server", "client", "plain"))
    here.server(server)
    inside, outside = here.client(client), here.client(plain)
    assert (here.state(server.pod), here.state(client.pod)) == ("enabled", "enabled")
    assert here.captured(client, inside, server.ip)
    until(lambda: here.relayed(server, "inbound") == 1, "the server's side is taken, too")
    assert here.fetch(outside, server.ip) == "hello\n"
    until(lambda: here.relayed(server, "inbound") == 2, "inbound of a client that is not enrolled")
    assert here.relayed(plain) == 0
    assert here.rules(plain) == ""
    for sandbox in (client, server, plain):
        here.stop(sandbox)
        here.stop(sandbox)  # kubelets do
        here.remove(sandbox)


def test_dns_of_a_pod_is_captured(here: CriNode) -> None:
    client = here.run(CriPod("client"))
    inside = here.client(client)
    code, said = here.exec(inside, "nslookup", "answer.lab.test")
    assert (code, "192.0.2.99" in said) == (0, True), said
    until(lambda: here.relayed(client, kind="dns") >= 1, "the query is recorded by ztunnel")
    here.remove(client)


def test_excluded_and_host_network_pods(here: CriNode) -> None:
    """The runtime asks no plugin for a pod of the host's network; nothing may touch the node's own namespace."""
    before = run(["nft", "-s", "list", "ruleset"], netns=here.host.netns).stdout
    host = here.run(CriPod("proxy", host_network=True))
    system = here.run(CriPod("dns", namespace="kube-system"))
    assert (host.netns, host.ip) == ("", "")
    assert here.state(host.pod) == ""
    assert here.rules(system) == ""
    assert run(["nft", "-s", "list", "ruleset"], netns=here.host.netns).stdout == before
    here.remove(host)
    here.remove(system)


def test_many_at_once(here: CriNode, web: str) -> None:
    """How long 100 take: tests/bench/cri.py."""
    pods = [CriPod(f"many{number}") for number in range(12)]
    begun = [here.cri.begin("RunPodSandbox", [(1, pod.config(here.cgroup))]) for pod in pods]
    made = [here.inspect(pod, decode(one.result())[1][0].decode()) for pod, one in zip(pods, begun, strict=True)]
    assert {here.state(pod) for pod in pods} == {"enabled"}
    assert here.captured(made[-1], here.client(made[-1]), web)
    for verb in ("StopPodSandbox", "RemovePodSandbox"):
        for one in [here.cri.begin(verb, [(1, sandbox.id)]) for sandbox in made]:
            one.result()
    for pod in pods:
        here.remove_cgroups(pod)


def test_two_insertion_points(here: CriNode, web: str) -> None:
    """As with Multus in front of a list of ours: the second call has nothing left to do, and succeeds."""
    here.primary("01-twice.conflist", here.entry(), here.entry())
    until(here.configured, "the runtime has the list")
    try:
        pod = here.run(CriPod("twice"))
        assert here.captured(pod, here.client(pod), web)
        here.remove(pod)
    finally:
        here.path("/etc/cni/net.d/01-twice.conflist").unlink()
    until(here.configured, "the runtime has our list again")


def test_sandboxes_of_one_pod_one_after_another(here: CriNode, web: str) -> None:
    """The kubelet makes a new sandbox for a pod that it knows when the old one has ended."""
    pod = CriPod("again")
    first = here.run(pod)
    second = here.run(pod.again())  # before the old one's end: what is told of that later must not harm the new one
    here.stop(first)
    here.cri.call("RemovePodSandbox", [(1, first.id)])
    assert here.state(pod) == "enabled"
    assert here.captured(second, here.client(second), web)
    here.remove(second)


def test_runtime_killed_and_back_again(here: CriNode, web: str) -> None:
    pod = here.run(CriPod("stays"))
    inside = here.client(pod)
    here.host.kill_containerd()
    here.start_containerd()
    until(here.configured, "the runtime has our list")
    assert here.captured(pod, inside, web)
    here.remove(pod)


@pytest.mark.parametrize("gone", ["ztunnel", "both and /run/sluice"])
def test_p19_del_with_nothing_running_always_succeeds(here: CriNode, gone: str) -> None:
    """Address and namespace are free again at once, not when the agent is back."""
    pods = [here.run(CriPod(f"gone{number}")) for number in range(2)]
    names = ["agent", "ztunnel"] if "both" in gone else [gone]
    for name in names:
        here.kill(name)
    if "run" in gone:
        shutil.rmtree(here.path("/run/sluice"), ignore_errors=True)
        for pin in pins(here):
            here.host.run(["umount", pin])
        shutil.rmtree(here.path("/run/sluice"), ignore_errors=True)
    for pod in pods:
        here.remove(pod)
    own = ("note", "pin", "mount /run/sluice")
    until(lambda: [what for what in here.left() if not what.startswith(own)] == [], "all but the agent's is gone")
    if "ztunnel" in names:
        here.start_ztunnel()
    if "agent" in names:
        here.start_agent()
    here.await_ztunnel()
    again = here.run(CriPod("after"))
    assert here.state(again.pod) == "enabled"
    here.remove(again)


def pins(here: CriNode) -> list[str]:
    lines = Path(f"/proc/{here.pid('init')}/mountinfo").read_text().splitlines()
    return [point for point in (line.split()[4] for line in lines) if point.startswith("/run/sluice/")]


def call(here: CriNode, verb: str, config: dict[str, Any], **variables: str) -> tuple[int, Any]:
    """Runs the installed plugin as libcni would."""
    argv = ["env", "-i", f"CNI_COMMAND={verb}", "CNI_PATH=/opt/cni/bin", *(f"{k}={v}" for k, v in variables.items())]
    done = here.host.run([*argv, f"/opt/cni/bin/{config['type']}"], stdin=json.dumps(config), check=False)
    return done.returncode, json.loads(done.stdout or "{}")


def check(here: CriNode, sandbox: Sandbox) -> list[tuple[int, Any]]:
    """CHECK of the whole chain, with the result that the runtime's libcni cached: (exit code, answer) of each."""
    cached = json.loads(here.path(f"/var/lib/cni/results/{NETWORK}-{sandbox.id}-eth0").read_text())
    network = json.loads(here.path("/etc/cni/net.d/02-sluice.conflist").read_text())
    variables = {"CNI_CONTAINERID": sandbox.id, "CNI_NETNS": sandbox.netns,
                 "CNI_IFNAME": "eth0", "CNI_ARGS": ";".join(f"{k}={v}" for k, v in cached["cniArgs"])}  # fmt: skip
    common = {"cniVersion": network["cniVersion"], "name": NETWORK, "prevResult": cached["result"]}
    return [call(here, "CHECK", {**plugin, **common}, **variables) for plugin in network["plugins"]]


def test_check_gc_and_status_through_the_chain(here: CriNode) -> None:
    """By hand: containerd 1.6 calls none of them."""
    lost, stays = here.run(CriPod("lost")), here.run(CriPod("stays"))
    assert [code for code, _ in check(here, stays)] == [0, 0]
    with Netns.open(here.path(stays.netns)) as inside:
        run(["nft", "delete", "table", "inet", "nowhere"], within=inside, check=False)
        rules = here.rules(stays)
        run(["nft", "flush", "ruleset"], within=inside)
    until(lambda: here.rules(stays) == rules, "what was flushed is back")
    entry = {**here.entry(), "cniVersion": "1.1.0", "name": NETWORK}
    assert call(here, "STATUS", entry) == (0, {})
    valid = [{"containerID": stays.id, "ifname": "eth0"}]
    assert call(here, "GC", {**entry, "cni.dev/valid-attachments": valid}) == (0, {})
    assert (here.state(lost.pod), here.state(stays.pod)) == ("", "enabled")
    here.remove(lost)
    here.remove(stays)


def test_p29_descriptors_are_back_after_pods(here: CriNode) -> None:
    """Also of sandboxes that the runtime could not make: a plugin behind ours failed. 10,000 pods: make soak."""

    def open_now() -> int:
        return len(list(Path(f"/proc/{here.pid()}/fd").iterdir()))

    here.remove(here.run(CriPod("first")))
    until(lambda: here.ask("/v1/pods") == [], "the first is forgotten")
    before = open_now()
    for number in range(5):
        here.remove(here.run(CriPod(f"many{number}")))
    here.primary("01-broken.conflist", here.entry(), {"type": "tuning", "sysctl": {"net.core.nothing": "1"}})
    until(here.configured, "the runtime has the broken list")
    try:
        for number in range(5):
            assert "tuning" in here.refusal(CriPod(f"broken{number}"))
    finally:
        here.path("/etc/cni/net.d/01-broken.conflist").unlink()
    until(here.configured, "the runtime has our list again")
    until(lambda: open_now() <= before, f"descriptors are back at {before}")


def test_p26_directory_deleted_and_made_again(here: CriNode, web: str) -> None:
    """containerd's watch is on the directory that has gone: it refuses all until it starts anew, and lets none pass."""
    directory = here.path("/etc/cni/net.d")
    kept = {path.name: path.read_bytes() for path in directory.iterdir()}
    shutil.rmtree(directory)
    until(lambda: here.load_status() != "OK", "the runtime says that it has no list")
    assert "cni plugin not initialized" in here.refusal(CriPod("early"))
    directory.mkdir()
    for name, data in kept.items():
        (directory / name).write_bytes(data)
    here.host.kill_containerd()
    here.start_containerd()
    until(here.configured, "the runtime has our list")
    here.clear()  # containerd keeps a sandbox whose plugins it could not call; the kubelet removes it
    pod = here.run(CriPod("late"))
    assert here.captured(pod, here.client(pod), web)
    here.remove(pod)


def test_p16_ztunnel_killed_hung_and_rolled(here: CriNode, web: str) -> None:
    """After each the next ADD succeeds, as soon as a ztunnel that answers is there."""
    here.kill("ztunnel")
    until(lambda: here.ask("/v1/status")["ztunnel_connections"] == 0, "the agent knows that it has gone")
    here.start_ztunnel()
    here.await_ztunnel()
    pods = [here.run(CriPod("killed"))]
    os.kill(here.pid("ztunnel"), signal.SIGSTOP)  # its socket is open, and nobody reads
    here.start_ztunnel("next")
    here.await_ztunnel(2)
    pods.append(here.run(CriPod("hung")))
    here.kill("ztunnel")
    here.await_ztunnel()
    here.start_ztunnel()
    here.await_ztunnel(2)
    pods.append(here.run(CriPod("two")))
    here.end("next")
    here.await_ztunnel()
    pods.append(here.run(CriPod("after")))
    for pod in pods:
        assert here.captured(pod, here.client(pod), web)
        here.remove(pod)


# As slow as it may be on a busy node: at an ADD until somebody else has brought lo up, at a DEL for long enough that an
# agent sees lo down before its own DEL comes.
SLOW_LOOPBACK = """#!/bin/sh
if [ "$CNI_COMMAND" = ADD ]; then
    tries=0
    until nsenter --net="$CNI_NETNS" ip link show lo | grep -q ",UP" || [ $((tries += 1)) -gt 30 ]; do sleep 0.1; done
    exec /usr/lib/cni/loopback
fi
/usr/lib/cni/loopback
code=$?
sleep 0.5
exit $code
"""


def test_lo_may_come_late_and_goes_first(here: CriNode, web: str) -> None:
    """The runtime runs loopback beside the chain, and before it when a sandbox ends."""
    plugin = here.path("/opt/cni/bin/loopback")
    plugin.unlink()
    plugin.write_text(SLOW_LOOPBACK)
    plugin.chmod(0o755)
    try:
        pod = here.run(CriPod("late"))
        client = here.client(pod)
        assert here.captured(pod, client, web)
        before = failures(here)
        with subprocess.Popen(["nsenter", f"--net={here.path(pod.netns)}", "sleep", "600"]) as outlives:
            try:
                here.remove(pod)
            finally:
                outlives.kill()
        assert failures(here) == before, "the end of a sandbox is no drift, also while a process is left in it"
    finally:
        plugin.unlink()
        plugin.symlink_to("/usr/lib/cni/loopback")


def failures(here: CriNode) -> str:
    connection = http.client.HTTPConnection("agent")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(here.path("/run/sluice/agent.sock")))
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return next(line for line in lines if line.startswith("sluice_reconcile_failures_total "))
