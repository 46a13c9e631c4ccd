"""P03: ztunnel's listeners are seen in the pod, whichever way they are bound, and those of others are not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.podnetns import PodNetns
from agent.sources.listening import Listening

pytestmark = pytest.mark.root
PORTS = (15001, 15006, 15008)


@pytest.fixture
def pods() -> Iterator[list[PodNetns]]:
    names = [f"slu-listen{number}-{os.getpid()}" for number in range(2)]
    made = []
    try:
        for name in names:
            run(["ip", "netns", "add", name])
            run(["ip", "-n", name, "link", "set", "lo", "up"])
            made.append(PodNetns(Netns.open(f"/run/netns/{name}")))
        yield made
    finally:
        for pod in made:
            pod.close()
        for name in names:
            run(["ip", "netns", "del", name], check=False)


def listener(pod: PodNetns, family: int, host: str, port: int) -> socket.socket:
    made = pod.netns.call(lambda: socket.socket(family))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    made.listen()
    return made


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_p03_each_port_is_seen_and_missed(pods: list[PodNetns], family: int, host: str) -> None:
    listening, (pod, other) = Listening(PORTS), pods
    assert listening.missing(pod) == PORTS
    held = {port: listener(pod, family, host, port) for port in PORTS}
    assert listening.missing(pod) == ()
    assert listening.missing(other) == PORTS
    held[15006].close()
    assert listening.missing(pod) == (15006,)
    for one in held.values():
        one.close()
    assert listening.missing(pod) == PORTS


def test_p03_a_bound_socket_and_an_ended_connection_are_no_listeners(pods: list[PodNetns]) -> None:
    listening, pod = Listening((15001,)), pods[0]
    bound = pod.netns.call(lambda: socket.socket())
    bound.bind(("0.0.0.0", 15001))
    assert listening.missing(pod) == (15001,)
    bound.listen()
    client = pod.netns.call(lambda: socket.socket())
    client.connect(("127.0.0.1", 15001))
    accepted, _ = bound.accept()
    bound.close()
    assert listening.missing(pod) == (15001,)
    accepted.close()
    client.close()
    assert listening.missing(pod) == (15001,)
