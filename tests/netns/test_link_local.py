# SPDX-License-Identifier: Apache-2.0
"""An IPv6 address of the link is reached from an enrolled pod as from a plain one: ztunnel is not told which link."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from support.ebpf import EbpfNode
from support.pair import pair
from support.rules import CHOICES, layers

from agent.backends.base import PodLayer
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root


@contextlib.contextmanager
def mechanism(choice: str) -> Iterator[tuple[PodLayer, ...]]:
    if choice != "ebpf":
        yield layers(choice)
        return
    node = EbpfNode()
    try:
        yield node.layers
    finally:
        node.close()


@pytest.mark.parametrize("choice", [*CHOICES, "ebpf"])
def test_the_gateways_link_local_address_is_reached(choice: str) -> None:
    with pair() as nodes, mechanism(choice) as used:
        settle(nodes.target, Redirect(marks=choice != "ebpf"), used)
        shown = run(["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"], netns=nodes.host.path).stdout
        gateway = shown.split()[3].partition("/")[0]
        index = nodes.pod.call(lambda: socket.if_nametoindex("eth0"))
        with nodes.host.listen("::", 8122) as server, nodes.pod.make(socket.AF_INET6) as client:
            client.connect((gateway, 8122, 0, index))
            accepted, _ = server.accept()
            accepted.close()
        settle(nodes.target, None, used)
