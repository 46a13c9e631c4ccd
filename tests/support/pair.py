# SPDX-License-Identifier: Apache-2.0
"""Two namespaces joined by a veth pair: a pod, and a node that is also the pod's way out."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from support.ztunnel import SECONDS, Place

from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import Port, join

POD4, HOST4 = "10.78.0.2", "10.78.0.1"
POD6, HOST6 = "fd78::2", "fd78::1"
_numbers = itertools.count()


@dataclass(frozen=True)
class Pair:
    pod: Place
    host: Place
    target: PodNetns  # the pod, as the agent holds it


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Without any rules."""
    prefix = f"slu-pr-{os.getpid()}-{next(_numbers)}"
    with contextlib.ExitStack() as made:
        pod = Place(f"{prefix}-pod")
        made.callback(pod.remove)
        host = Place(f"{prefix}-host")
        made.callback(host.remove)
        far = Port(host.name, "eth0", (f"{HOST4}/24", f"{HOST6}/64"))
        join(Port(pod.name, "eth0", (f"{POD4}/24", f"{POD6}/64"), (HOST4, HOST6)), far)
        target = PodNetns(Netns.open(pod.path))
        made.callback(target.close)
        yield Pair(pod, host, target)


def await_ipv6(nodes: Pair) -> None:
    """Returns when the pod answers over IPv6, which takes longer than its addresses do to appear."""
    with contextlib.suppress(ConnectionRefusedError):
        nodes.host.connect(POD6, 9).close()


def rules(place: Place, script: str) -> None:
    run(["nft", "-f", "-"], stdin=script, netns=place.path)


def stream(client: Place, server: Place, host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """An established connection: (client's end, server's end)."""
    with server.listen(host, port) as listener:
        near = client.connect(host, port)
        far, _ = listener.accept()
        far.settimeout(SECONDS)
        return near, far


def carries(left: socket.socket, right: socket.socket) -> bool:
    """Whether both directions work. Raises OSError when the connection is reset."""
    for sender, receiver in ((left, right), (right, left)):
        sender.sendall(b"hello")
        if receiver.recv(5, socket.MSG_WAITALL) != b"hello":
            return False
    return True
