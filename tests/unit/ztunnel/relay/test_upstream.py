# SPDX-License-Identifier: Apache-2.0
"""Sockets towards a server: how many are counted, and when another port is tried."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from agent.ztunnel.relay import upstream
from agent.ztunnel.relay.upstream import Upstream

THERE = ("127.0.0.1", 80)


class Fake(socket.socket):
    """Connects to nothing; `words` is what connecting returns."""

    words = 0

    def connect_ex(self, address: Any) -> int:
        return self.words


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> tuple[Upstream, list[Fake]]:
    made, there = list[Fake](), Upstream(None)  # type: ignore[arg-type]

    def take(self: Upstream, destination: object, kind: int) -> Fake:
        made.append(Fake(socket.AF_INET, socket.SOCK_STREAM))
        return made[-1]

    monkeypatch.setattr(Upstream, "take", take)
    monkeypatch.setattr(upstream, "take_source", lambda *_, **__: None)
    return there, made


def test_what_connects_as_a_client_is_held_and_released_as_any_other(
    sockets: tuple[Upstream, list[Fake]],
) -> None:
    there, made = sockets
    there.connect(THERE)
    there.connect_as(("192.0.2.1", 40000), THERE)
    assert there._held == {THERE: 2}
    there.release(THERE)
    assert there._held == {THERE: 1}, "one that came in does not make room for one that goes out"
    there.release(THERE)
    assert not there._held
    for one in made:
        one.close()


def test_only_a_port_in_use_is_a_reason_to_try_another(
    sockets: tuple[Upstream, list[Fake]], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, made = sockets
    monkeypatch.setattr(upstream, "keep_source", lambda *_, **__: None)
    for refused, tries in ((errno.EADDRINUSE, upstream.TRIES), (errno.ENETUNREACH, 1)):
        monkeypatch.setattr(Fake, "words", refused)
        made.clear()
        with pytest.raises(OSError, match=rf"\[Errno {refused}\]"):
            there.connect(THERE, ("127.0.0.1", 700))
        assert len(made) == tries + 1, "then as if no address was to be kept"
