# SPDX-License-Identifier: Apache-2.0
"""Pods replaced one after another under traffic: no connection fails, since rules stay while a container runs."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from support.cri import Cri
from support.crinode import CriNode, CriPod, Sandbox, running, until

from agent.kernel.netns import Netns

pytestmark = pytest.mark.root
ROUNDS, CLIENTS, PORT = 3, 2, 7000
WHILE_ENDING = 20  # connections that an old pod still gets after it was told to end
# Told to end it serves on, as a preStop hook has applications do; the test says when it may go.
SERVER = f"""
trap 'echo told >/tmp/told' TERM
nc -ll -p {PORT} -e /bin/cat &
until [ -e /tmp/go ]; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def here() -> Iterator[CriNode]:
    with running("slucro") as made:
        yield made


def echo(netns: Netns, ip: str) -> None:
    """One short connection, closed in order. Raises OSError when anything of it fails."""
    with netns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as made:
        made.settimeout(10)
        made.connect((ip, PORT))
        made.sendall(b"are you there\n")
        made.shutdown(socket.SHUT_WR)
        said = b""
        while part := made.recv(4096):
            said += part
    if said != b"are you there\n":
        raise OSError(f"half an echo: {said!r}")


class Traffic(threading.Thread):
    """Connections one after another, each to the endpoint of the moment."""

    def __init__(self, netns: Netns, ip: str) -> None:
        super().__init__(daemon=True)
        self.target, self.good, self.errors = ip, dict[str, int](), list[str]()
        self._netns, self._ended = netns, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            target = self.target
            try:
                echo(self._netns, target)
                self.good[target] = self.good.get(target, 0) + 1
            except OSError as error:
                self.errors.append(f"{target}: {error}")

    def close(self) -> None:
        self._ended.set()
        self.join(20)


def server(here: CriNode, inside: Netns, number: int) -> tuple[Sandbox, str]:
    """A new pod, ready as a readiness probe would find it."""

    def answers() -> bool:
        with contextlib.suppress(OSError):
            echo(inside, sandbox.ip)
            return True
        return False

    sandbox = here.run(CriPod(f"echo{number}"))
    container = here.container(sandbox, SERVER)
    until(answers, "the new pod answers")
    return sandbox, container


def test_p59_rollout_loop_without_an_error(here: CriNode) -> None:
    client = here.run(CriPod("client"))
    with Netns.open(here.path(client.netns)) as inside:
        old, container = server(here, inside, 0)
        traffic = [Traffic(inside, old.ip) for _ in range(CLIENTS)]
        for number in range(1, ROUNDS + 1):
            new, successor = server(here, inside, number)
            ending = threading.Thread(target=stop, args=(here.cri, container))
            ending.start()
            until(lambda at=container: here.exec(at, "cat", "/tmp/told")[0] == 0, "the old pod is told to end")
            enough = served(traffic, old) + WHILE_ENDING
            until(partial(reached, traffic, old, enough), "connections are served by the pod that ends")
            for each in traffic:  # only now, as in Kubernetes, where the endpoint changes late
                each.target = new.ip
            until(partial(all_at, traffic, new), "no connection of the old pod is under way")
            here.exec(container, "sh", "-c", ": >/tmp/go")
            ending.join(20)
            assert here.relayed(old, "inbound") >= enough
            here.remove(old)
            old, container = new, successor
        for each in traffic:
            each.close()
    assert [error for each in traffic for error in each.errors] == []
    for sandbox in (old, client):
        here.remove(sandbox)
    here.nothing_left()


def served(traffic: list[Traffic], pod: Sandbox) -> int:
    return sum(each.good.get(pod.ip, 0) for each in traffic)


def reached(traffic: list[Traffic], pod: Sandbox, enough: int) -> bool:
    return served(traffic, pod) >= enough


def all_at(traffic: list[Traffic], pod: Sandbox) -> bool:
    return all(each.good.get(pod.ip, 0) for each in traffic)


def stop(cri: Cri, container: str) -> None:
    """SIGTERM, and SIGKILL if it does not end."""
    cri.call("StopContainer", [(1, container), (2, 30)])
