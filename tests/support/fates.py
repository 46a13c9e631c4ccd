# SPDX-License-Identifier: Apache-2.0
"""What became of one connection of an accounted pod, outward or inward; and that there was no other."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from support.accounting import Account
from support.applications import answer, answers, asks, receive
from support.ebpf_pod import APP, CAPTURE, DNS, FREE, POD, SECONDS, Where, accepted, family

from agent.core.model.exclusions import Exclusions
from agent.flows.record import Connection, Direction, Fate, Reason

OUT, IN = Direction.OUTBOUND, Direction.INBOUND
PORT, OPEN, USER = 9000, 9001, 4242  # of the pod's application: captured, excluded; a user who is excluded
NETWORKS = ("10.77.0.9/32", "fd77::9/128")  # OTHER, which the peer has too
TUNED = replace(
    CAPTURE,
    exclude=Exclusions(
        outbound_ports=((FREE, FREE),), inbound_ports=((OPEN, OPEN),), outbound_networks=NETWORKS,
        inbound_networks=NETWORKS, users=((USER, USER),),
    ),
)  # fmt: skip
EXCLUDED = OUT, Fate.EXEMPT, Reason.EXCLUDED_PORT


class Served(Account):
    """The peer listens, too."""

    def serve(self) -> None:
        self.app, self.free, self.resolver = (self.peer.listen(port) for port in (APP, FREE, DNS))
        for one in (self.app, self.free, self.resolver):
            self.made.callback(one.close)


@contextlib.contextmanager
def served(mode: str) -> Iterator[Served]:
    with contextlib.ExitStack() as made:
        account = Served(made, mode, TUNED)
        account.serve()
        yield account


def outward(account: Account, to: socket.socket, kind: str, where: Where, **options: Any) -> Connection:
    """Of an application that connects, and reaches `to`."""
    child = account.application(lambda: asks(kind, where, **options))
    answer(accepted(to))
    return told(account, child.result(), sent=100, received=50)


def inward(account: Account, connect: Callable[[], socket.socket], port: int = PORT) -> Connection:
    """Of an application that accepts."""
    child = account.serving(answers, port=port)
    sock = connect()
    sock.settimeout(SECONDS)
    sock.sendall(b"x" * 100)
    assert receive(sock, 1000) == 50
    sock.close()
    return told(account, child.result(), sent=50, received=100)


def told(account: Account, number: int, **wanted: Any) -> Connection:
    found = account.record(number)
    assert {key: getattr(found, key) for key in wanted} == wanted
    return found


def fate(one: Connection) -> tuple[Direction, Fate, Reason]:
    return one.direction, one.fate, one.reason


def only(account: Account, *wanted: tuple[Direction, Fate, Reason]) -> None:
    """That often, in records as in totals, without ztunnel's own; and nothing else."""
    assert Counter(map(fate, account.read())) == Counter(wanted)
    account.refresh()
    counted = Counter[tuple[Direction, Fate, Reason]]()
    for one in account.deltas:
        if one.reason is not Reason.ZTUNNEL:
            counted[one.direction, one.fate, one.reason] += one.opened + one.failed
    assert counted == Counter(wanted)
    assert account.losses() == 0


def from_outside(account: Account, kind: str, port: int = PORT) -> socket.socket:
    made = account.peer.make(kind)
    made.connect((POD[family(kind)], port))
    return made
