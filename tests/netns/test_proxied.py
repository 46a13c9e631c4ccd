# SPDX-License-Identifier: Apache-2.0
"""What ztunnel carries is found in the pod's namespace and reset at both ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from support.rules import pod as made

from agent.core import names
from agent.kernel.pod_netns import PodNetns
from agent.sources.ztunnel_connections import ZtunnelConnections

pytestmark = pytest.mark.root


@pytest.fixture
def pod() -> Iterator[PodNetns]:
    with made("slu-proxied") as one:
        yield one.target


def connected(pod: PodNetns, family: int, host: str, port: int) -> tuple[socket.socket, socket.socket]:
    listener, client = (pod.netns.call(lambda: socket.socket(family)) for _ in range(2))
    with listener:
        listener.bind((host, port))
        listener.listen()
        client.connect((host, port))
        return client, listener.accept()[0]


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_both_ends_hear_of_the_end_and_nobody_else_does(pod: PodNetns, family: int, host: str) -> None:
    proxied, found = connected(pod, family, host, names.OUTBOUND_PORT), ZtunnelConnections()
    others = connected(pod, family, host, 8080)
    assert {one.local for one in found.there(pod)} == {end.getsockname()[:2] for end in proxied}
    found.reset(pod)
    for end in proxied:
        end.settimeout(10)
        with pytest.raises(ConnectionError):
            end.recv(1)
    assert found.there(pod) == ()
    others[0].sendall(b"x")
    assert others[1].recv(1) == b"x"
    for end in (*proxied, *others):
        end.close()
