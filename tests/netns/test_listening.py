# SPDX-License-Identifier: Apache-2.0
"""P03: ztunnel's listeners are seen in the pod, whichever way they are bound, and those of others are not."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.holders import Holder
from support.rules import pod as made

from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core.model.port_listeners import PortListeners
from agent.core.policy.accept_queue import NOTHING_WAITS
from agent.kernel.pod_netns import PodNetns
from agent.sources.ztunnel_ports import ZtunnelPorts

pytestmark = pytest.mark.root
PORTS = (15001, 15006, 15008)


@pytest.fixture
def pods() -> Iterator[list[PodNetns]]:
    with made("slu-listen0") as one, made("slu-listen1") as other:
        yield [one.target, other.target]


def listener(pod: PodNetns, family: int, host: str, port: int) -> socket.socket:
    made = pod.netns.call(lambda: socket.socket(family))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    made.listen()
    return made


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_p03_each_port_is_seen_and_missed(pods: list[PodNetns], family: int, host: str) -> None:
    listening, (pod, other) = ZtunnelPorts(PORTS), pods
    assert listening.heard(pod).missing == PORTS
    held = {port: listener(pod, family, host, port) for port in PORTS}
    assert listening.heard(pod).missing == ()
    assert listening.heard(other).missing == PORTS
    held[15006].close()
    assert listening.heard(pod).missing == (15006,)
    for one in held.values():
        one.close()
    assert listening.heard(pod).missing == PORTS


def test_p03_a_bound_socket_and_an_ended_connection_are_no_listeners(pods: list[PodNetns]) -> None:
    listening, pod = ZtunnelPorts((15001,)), pods[0]
    bound = pod.netns.call(lambda: socket.socket())
    bound.bind(("0.0.0.0", 15001))
    assert listening.heard(pod).missing == (15001,)
    bound.listen()
    client = pod.netns.call(lambda: socket.socket())
    client.connect(("127.0.0.1", 15001))
    accepted, _ = bound.accept()
    bound.close()
    assert listening.heard(pod).missing == (15001,)
    accepted.close()
    client.close()
    assert listening.heard(pod).missing == (15001,)


def test_what_the_pods_own_processes_listen_on_is_not_ztunnels(pods: list[PodNetns], tmp_path: Path) -> None:
    """They are named; one of them on 15008 ends what is exempt there, and nobody at all leaves it as it was."""
    pod, ztunnels = pods[0], Ztunnels()
    listening = ZtunnelPorts(PORTS, ztunnels)
    with contextlib.ExitStack() as made:
        inside = ("ip", "netns", "exec", pod.netns.origin.rpartition("/")[2])
        ztunnel, application, older = (made.enter_context(held(tmp_path, how)) for how in ((), inside, ()))
        for port in PORTS:
            ztunnel.keep(listener(pod, socket.AF_INET6, "::", port))
        application.keep(listener(pod, socket.AF_INET, "127.0.0.1", 15001))
        assert listening.heard(pod) == PortListeners(), "nobody has come: nobody can tell"
        ztunnels.arrived(ztunnel.process())
        command = Path(f"/proc/{application.pid}/comm").read_text().strip()
        words = f"{command}[{application.pid}] listens on 127.0.0.1:15001, where only ztunnel may"
        assert listening.heard(pod) == PortListeners((), (words,), (words,))
        older.keep(listener(pod, socket.AF_INET, "127.0.0.2", 15008))  # one that has not come to this agent yet
        assert listening.heard(pod).hbone
        application.keep(listener(pod, socket.AF_INET, "127.0.0.3", 15008))
        found = listening.heard(pod)
        assert (len(found.foreign), found.taken, found.hbone) == (2, (words,), False)
        application.end()
        assert listening.heard(pod) == PortListeners()
        ztunnel.end()
        older.end()
        assert listening.heard(pod) == PortListeners(PORTS), "a replacement changes no rules"


def test_what_waits_is_what_no_ztunnel_has_accepted(pods: list[PodNetns], tmp_path: Path) -> None:
    pod, ztunnels = pods[0], Ztunnels()
    listening = ZtunnelPorts(PORTS, ztunnels)
    with contextlib.ExitStack() as made:
        ztunnel = made.enter_context(held(tmp_path, ()))
        outbound = made.enter_context(listener(pod, socket.AF_INET6, "::", 15001))
        ztunnel.keep(outbound.dup())
        ztunnels.arrived(ztunnel.process())
        slow = made.enter_context(listener(pod, socket.AF_INET, "0.0.0.0", 8080))  # of an application
        made.enter_context(connected(pod, 8080))
        assert listening.waiting(pod) == NOTHING_WAITS
        taken = made.enter_context(connected(pod, 15001))
        assert [queue.waiting for queue in listening.waiting(pod).queues] == [1]
        far = pod.diag.find(("127.0.0.1", 15001), taken.getsockname())
        assert far is not None and listening.waiting(pod).waiting == {far.cookie}
        taken.shutdown(socket.SHUT_WR)
        assert listening.waiting(pod).waiting == {far.cookie}, "its client has given up, and it waits on"
        made.enter_context(outbound.accept()[0])
        assert listening.waiting(pod) == NOTHING_WAITS
        made.enter_context(slow.accept()[0])


def test_no_process_of_the_pod_can_make_ztunnel_seem_stalled(pods: list[PodNetns], tmp_path: Path) -> None:
    pod, ztunnels = pods[0], Ztunnels()
    listening = ZtunnelPorts(PORTS, ztunnels)
    with contextlib.ExitStack() as made:
        inside = ("ip", "netns", "exec", pod.netns.origin.rpartition("/")[2])
        ztunnel, application = (made.enter_context(held(tmp_path, how)) for how in ((), inside))
        ztunnel.keep(listener(pod, socket.AF_INET6, "::", 15001))
        ztunnels.arrived(ztunnel.process())
        application.keep(listener(pod, socket.AF_INET6, "::", 15008))
        made.enter_context(connected(pod, 15008))
        assert listening.waiting(pod) == NOTHING_WAITS
        made.enter_context(connected(pod, 15001))
        (queue,) = listening.waiting(pod).queues
        assert (queue.port, len(listening.waiting(pod).waiting)) == (15001, 1)


def connected(pod: PodNetns, port: int) -> socket.socket:
    made = pod.netns.call(lambda: socket.socket())
    made.connect(("127.0.0.1", port))
    return made


def test_where_15008_is_not_expected_only_ztunnels_process_is_believed(pods: list[PodNetns], tmp_path: Path) -> None:
    pod, ztunnels = pods[0], Ztunnels()
    listening = ZtunnelPorts((15001, 15006), ztunnels)
    assert not listening.heard(pod).hbone
    with held(tmp_path, ()) as ztunnel:
        ztunnel.keep(listener(pod, socket.AF_INET6, "::", 15008))
        assert not listening.heard(pod).hbone
        ztunnels.arrived(ztunnel.process())
        assert listening.heard(pod).hbone


@contextlib.contextmanager
def held(folder: Path, prefix: tuple[str, ...]) -> Iterator[Holder]:
    made = Holder(folder, prefix)
    try:
        yield made
    finally:
        made.end()
