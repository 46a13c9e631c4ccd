# SPDX-License-Identifier: Apache-2.0
"""What a pod could try against the eBPF backend gains nothing, and every way out of the programs is counted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dialling import DIAL, REFUSED, as_ztunnel, dial, process
from support.ebpf_pod import (
    APP,
    KINDS,
    OTHER,
    PEER,
    POD,
    RESOLVERS,
    Stage,
    Ztunnel,
    accepted,
    carries,
    family,
    original,
    stage,
    waiting,
)

from agent.backends.ebpf.abi import ExitCause
from agent.core.names import INBOUND_PORT, OUTBOUND_PORT, ZTUNNEL_MARK
from agent.kernel.bpf import bpffs
from agent.kernel.process import Process
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
# Listens on a port with SO_REUSEPORT as a user, and tells what it gets.
SQUAT = """
import os, socket, sys
user, port, host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if user:
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind((host, port))
sock.listen(64)
print("ready", flush=True)
while True:
    made, who = sock.accept()
    print("got", who[0], flush=True)
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = bpffs.cgroup_root() / f"slu-hostile-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


# --- listening on the proxy's ports


@pytest.mark.parametrize("user", [0, 1234])
@pytest.mark.parametrize("early", [False, True])
def test_a_pod_that_listens_on_the_proxys_ports_gets_nothing(user: int, early: bool) -> None:
    """Also in the same SO_REUSEPORT group (the same user), at better addresses, and before ztunnel does."""
    with stage(ztunnel=False) as node, contextlib.ExitStack() as made:

        def squat() -> None:
            for port in (OUTBOUND_PORT, INBOUND_PORT):
                for host in ("::", POD[4], POD[6], *(("127.0.0.1", "::1") if port == OUTBOUND_PORT else ())):
                    made.enter_context(process(node.pod.path, SQUAT, user, port, host))

        def listen() -> Ztunnel:
            ztunnel = Ztunnel(node.pod, reuse=True)
            made.callback(ztunnel.close)
            return ztunnel

        if user and not early:
            ztunnel = listen()  # another user cannot join the group: it fails with EADDRINUSE
            with pytest.raises(AssertionError):
                made.enter_context(process(node.pod.path, SQUAT, user, OUTBOUND_PORT, "::"))
        elif user:
            squat()
            with pytest.raises(OSError, match="Address already in use"):
                listen()
            for kind in KINDS:  # so ztunnel cannot serve: nobody does
                assert dial(node.pod, kind, PEER) == REFUSED and dial(node.peer, kind, POD) == REFUSED
            return
        elif early:
            squat()
            ztunnel = listen()
        else:
            ztunnel = listen()
            squat()
        node.settle()
        for kind in KINDS:
            for _ in range(20):  # a group would have shared them out
                assert dial(node.pod, kind, PEER) == dial(node.peer, kind, POD) == "connected"
                accepted(ztunnel.outbound).close()
                accepted(ztunnel.inbound).close()


@pytest.mark.parametrize("kind", KINDS)
def test_who_listens_without_a_ztunnel_gets_nothing(kind: str) -> None:
    with stage(ztunnel=False) as node, contextlib.ExitStack() as made:
        assert dial(node.pod, kind, PEER) == REFUSED
        for port in (OUTBOUND_PORT, INBOUND_PORT):
            made.enter_context(process(node.pod.path, SQUAT, 0, port, "::"))
        node.settle()
        with node.counts(ExitCause.NO_LISTENER, 2):
            assert dial(node.pod, kind, PEER) == REFUSED
            assert dial(node.peer, kind, POD) == REFUSED
        assert not waiting(node.app)


def test_when_ztunnel_closes_its_listeners_all_is_refused() -> None:
    with stage(ztunnel=False) as node:
        ztunnel = Ztunnel(node.pod)
        app = node.pod.listen(APP)
        node.settle()
        assert dial(node.pod, "IPv4", PEER) == dial(node.peer, "IPv4", POD) == "connected"
        ztunnel.close()
        for kind in KINDS:
            assert dial(node.pod, kind, PEER) == dial(node.peer, kind, POD) == REFUSED
        assert not waiting(app) and not waiting(node.app)
        app.close()


def test_of_two_ztunnels_the_newest_gets_all() -> None:
    """When it ends the older one gets all again, without the agent's doing anything; then nobody."""
    with stage(ztunnel=False) as node, contextlib.ExitStack() as made:
        running = []
        for _ in range(2):
            one = made.enter_context(process(node.pod.path, SQUAT, 0, OUTBOUND_PORT, "::"))
            node.node.ztunnels.arrived(Process(one.pid, os.pidfd_open(one.pid)))
            node.settle()
            running.append(one)
            assert dial(node.pod, "IPv4", PEER) == "connected" and one.line().startswith("got")
        for one in reversed(running):
            for kind in KINDS:
                for _ in range(10):
                    assert dial(node.pod, kind, PEER) == "connected"
                    assert one.line().removeprefix("got ").removeprefix("::ffff:") == POD[family(kind)]
            one.end()
        for kind in KINDS:
            assert dial(node.pod, kind, PEER) == REFUSED
        assert not waiting(node.app)


# --- marks


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("own_cgroup", [False, True])
@pytest.mark.parametrize("mark", [ZTUNNEL_MARK, 0x7000 | ZTUNNEL_MARK, 0x111])
def test_a_mark_proves_nothing(node: Stage, cgroup: Path, version: int, own_cgroup: bool, mark: int) -> None:
    """Another process with CAP_NET_ADMIN, in the same cgroup as ztunnel or in one of its own."""
    times = 0 if mark == 0x111 else 1
    with process(node.pod.path, DIAL, mark, PEER[version], APP, "") as app:
        if own_cgroup:
            (cgroup / "cgroup.procs").write_text(str(app.pid))
        with node.counts(ExitCause.FORGED_MARK, times), node.counts(ExitCause.CAPTURED_OUTBOUND, 1):
            assert app.go_on() == f"connected {PEER[version]}"
        with accepted(node.ztunnel.outbound) as inner:
            assert original(inner, version) == (PEER[version], APP)
    assert not waiting(node.app)


def test_a_process_that_ztunnel_has_forked_is_ztunnel(node: Stage) -> None:
    """The opposite of what it executes, as above."""
    with node.counts(ExitCause.FORGED_MARK, 0), node.counts(ExitCause.CAPTURED_OUTBOUND, 0):
        if not (worker := os.fork()):
            with contextlib.suppress(OSError):
                as_ztunnel(node)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(worker, 0)[1] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_forged_mark_binds_no_foreign_address(node: Stage, version: int) -> None:
    """It is captured with it, and nobody is shown that address instead of what is real."""
    with (
        process(node.pod.path, DIAL, ZTUNNEL_MARK, POD[version], APP, OTHER[version]) as app,
        node.pod.listen(APP) as own,
    ):
        with node.counts(ExitCause.FORGED_MARK), node.counts(ExitCause.SPEAKS_AS, 0):
            assert app.go_on() == "TimeoutError", "the answers leave the pod"
        assert not waiting(own)


def test_a_forged_mark_on_dns_is_captured(node: Stage) -> None:
    script = """
import socket, sys
print("ready", flush=True)
sys.stdin.readline()
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
sock.sendto(b"1", (sys.argv[1], 53))
print("sent", flush=True)
sys.stdin.readline()
"""
    with process(node.pod.path, script, RESOLVERS[4][0]) as app, node.counts(ExitCause.FORGED_MARK, 1):
        assert app.go_on() == "sent"
        assert node.ztunnel.dns.recv(10) == b"1"
    assert not waiting(node.resolver)


# --- a connection that is older


def test_what_is_captured_stays_so_when_the_agent_settles_again(node: Stage) -> None:
    with node.pod.make() as app:
        app.connect((PEER[4], APP))
        with accepted(node.ztunnel.outbound) as inner:
            for _ in range(3):
                settle(node.pod.target, node.want, node.node.layers)
                carries(app, inner)
