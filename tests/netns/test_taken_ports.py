# SPDX-License-Identifier: Apache-2.0
"""A process of the pod has ztunnel's ports: it gets nothing of what rules would redirect, and nothing escapes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.ebpf_pod import PEER, POD, Namespace, accepted, carries, pair, waiting

from agent.backends.base import PodLayer
from agent.backends.choose import LAYERS
from agent.backends.registry import mechanisms
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.names import HBONE_PORT, INBOUND_PORT, ZTUNNEL_MARK
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
APP, FREE = 8080, 6379
WANT = Redirect(exclude=Exclusions(outbound_ports=((FREE, FREE),), inbound_ports=((FREE, FREE),)))
BLOCKED = replace(WANT, blocked=True)


@pytest.fixture(scope="module")
def pods() -> Iterator[tuple[Namespace, Namespace]]:
    with contextlib.ExitStack() as made:
        yield pair(made, "slu-taken")


def connect(one: Namespace, kind: str, host: str, port: int, seconds: float = 10) -> socket.socket:
    made = one.make(kind)
    made.settimeout(seconds)
    made.connect((host, port))
    made.settimeout(10)
    return made


@pytest.mark.parametrize("backend", ["nftables", "iptables", "iptables-legacy"])
def test_it_gets_nothing_and_nothing_escapes(pods: tuple[Namespace, Namespace], backend: str) -> None:
    pod, peer = pods
    layers: list[PodLayer] = list(mechanisms(LAYERS[backend]).values())
    with contextlib.ExitStack() as made:
        made.callback(settle, pod.target, None, layers)
        thieves = [made.enter_context(pod.listen(port)) for port in (15001, 15006, 15053)]
        apps = {one: made.enter_context(one.listen(APP)) for one in pods}
        free = {one: made.enter_context(one.listen(FREE)) for one in pods}
        before = made.enter_context(connect(pod, "IPv4", PEER[4], APP))
        other_end = made.enter_context(accepted(apps[peer]))
        settle(pod.target, replace(BLOCKED, preserve=True), layers)  # as a running pod is enrolled
        settle(pod.target, BLOCKED, layers)
        for kind, version in (("IPv4", 4), ("IPv6", 6)):
            for one, host, port in ((pod, PEER, APP), (pod, PEER, 53), (peer, POD, APP)):
                with pytest.raises(OSError):
                    connect(one, kind, host[version], port, seconds=1)  # dropped: nothing answers
            for one, host, listener in (
                (pod, PEER, free[peer]),
                (peer, POD, free[pod]),
                (pod, POD, apps[pod]),  # by lo
            ):
                with connect(one, kind, host[version], listener.getsockname()[1]) as near, accepted(listener) as far:
                    carries(near, far)
        carries(before, other_end)
        assert not any(map(waiting, (*thieves, *apps.values())))
        settle(pod.target, WANT, layers)
        with connect(pod, "IPv4", PEER[4], APP), accepted(thieves[0]):
            pass  # without it they would get what is redirected


@pytest.mark.parametrize("backend", ["nftables", "iptables", "iptables-legacy"])
def test_an_application_on_the_port_of_hbone_gets_nothing_unless_ztunnel_has_it(
    pods: tuple[Namespace, Namespace], backend: str
) -> None:
    pod, peer = pods
    layers: list[PodLayer] = list(mechanisms(LAYERS[backend]).values())
    with pod.listen(INBOUND_PORT, mark=ZTUNNEL_MARK) as ztunnel, pod.listen(HBONE_PORT) as app:
        for hbone in (False, True, False):
            settle(pod.target, Redirect(hbone=hbone), layers)
            for version in (4, 6):
                with connect(peer, f"IPv{version}", POD[version], HBONE_PORT), accepted(app if hbone else ztunnel):
                    assert not waiting(ztunnel) and not waiting(app)
        settle(pod.target, None, layers)
