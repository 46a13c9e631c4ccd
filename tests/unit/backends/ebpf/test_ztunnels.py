# SPDX-License-Identifier: Apache-2.0
"""Listeners of other processes on ztunnel's ports: who holds one is looked up once, not at each look."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from agent.backends.ebpf import ztunnels
from agent.backends.ebpf.ztunnels import Ztunnels

NETNS: Any = SimpleNamespace(device=1, inode=2)
OURS, NGINX, LATER = (SimpleNamespace(cookie=n, inode=100 + n) for n in (1, 2, 3))


class Ztunnel:
    """A process that holds one socket; each reading of all its descriptors is counted."""

    def __init__(self, pid: int, inode: int) -> None:
        self.pid, self.started, self.inode, self.looks, self.lives = pid, pid, inode, 0, True

    def alive(self) -> bool:
        return self.lives

    def sockets(self, wanted: Any = (), known: Any = ()) -> dict[int, int]:
        self.looks += 1
        return {self.inode: 7}

    def workers(self, known: Any = ()) -> list[Any]:
        return []

    def close(self) -> None:
        self.lives = False


def test_the_holder_of_a_foreign_listener_is_looked_up_until_another_ztunnel_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[int]] = []  # one walk through /proc each

    def holders(inodes: Iterable[int], netns: Any) -> dict[int, str]:
        asked.append(sorted(inodes))
        return dict.fromkeys({NGINX.inode}.intersection(asked[-1]), "nginx[4711]")

    monkeypatch.setattr(ztunnels.proc, "holders", holders)
    known, sockets, first = Ztunnels(), (OURS, NGINX, LATER), Ztunnel(1, OURS.inode)
    assert known.foreign(sockets, NETNS) == {}, "no ztunnel is known"
    known.arrived(first)  # type: ignore[arg-type]
    assert known.foreign(sockets, NETNS) == {NGINX.cookie: "nginx[4711]"}
    looks = first.looks
    assert known.foreign(sockets, NETNS) == {NGINX.cookie: "nginx[4711]"}
    assert (first.looks, asked) == (looks, [[NGINX.inode, LATER.inode]])
    known.arrived(Ztunnel(2, LATER.inode))  # type: ignore[arg-type]
    assert known.foreign(sockets, NETNS) == {NGINX.cookie: "nginx[4711]"}
    assert asked[1:] == [[NGINX.inode]]
