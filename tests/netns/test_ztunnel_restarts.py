# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel ends and another one takes over: no connection fails."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from support.echo import Echo
from support.ztunnel import PEER4, SECONDS, Lab, read_all, wait_listening

pytestmark = pytest.mark.root


@pytest.mark.parametrize("inbound", [False, True])
def test_rolling_restart_fails_no_connection(served: Lab, inbound: bool) -> None:
    traffic = Echo.through(served, inbound)
    try:
        long_lived, server = served.outbound(port=8081)
        old, old_link = served.ztunnel, served.agent.link
        for round_ in range(3):
            traffic.wait_more(50)
            new = served.serve(f"records-{round_}")
            old.terminate()
            if round_ == 0:
                wait_new = new.wait_record(close="fin")
                assert wait_new["uid"] == "uid-1"
                long_lived.sendall(b"through the old one")
                assert server.recv(30) == b"through the old one"
                long_lived.close()
                assert read_all(server) == b""
                server.close()
            assert old.process.wait(SECONDS) == 0
            old_link.close()
            old, old_link = new, served.agent.link
        traffic.wait_more(50)
    finally:
        traffic.close()
    assert traffic.failures == []


def test_restart_loses_nothing_that_waits_for_the_old_one(served: Lab) -> None:
    """The old instance stands still: what came before is its to accept, what comes after goes to the new one."""
    listener = served.peer.listen(PEER4, 8080)
    served.close_later(listener)

    def connect(number: int) -> list[socket.socket]:
        made = [served.pod.connect(PEER4, 8080) for _ in range(number)]
        served.close_later(*made)
        return made

    def all_reach_the_server(clients: list[socket.socket]) -> None:
        for client in clients:
            client.sendall(b"?")
        for _ in clients:
            server, _ = listener.accept()
            server.settimeout(SECONDS)
            with server:
                assert server.recv(1) == b"?"
        for client in clients:
            assert client.recv(1) == b""

    old = served.ztunnel.process
    standing = (old.pid, *served.ztunnel.workers())
    for pid in standing:
        os.kill(pid, signal.SIGSTOP)
    before = connect(300)
    served.serve("new")
    all_reach_the_server(connect(100))
    os.kill(old.pid, signal.SIGTERM)
    for pid in standing:
        os.kill(pid, signal.SIGCONT)
    all_reach_the_server(before)
    for client in before:
        client.close()
    assert old.wait(SECONDS) == 0


def test_end_waits_for_connections_and_a_second_signal_does_not(lab: Lab) -> None:
    lab.serve(drain=3600)
    client, server = lab.outbound()
    lab.ztunnel.terminate()
    wait_listening(lab.pod, False)
    assert "about to end" in lab.agent.add(lab.pod, "uid-2")
    client.sendall(b"draining")
    assert server.recv(10) == b"draining"
    lab.ztunnel.terminate()
    assert lab.ztunnel.process.wait(SECONDS) == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    ended = [one for one in lab.ztunnel.records() if one["received"] or one["sent"]]  # of two workers, in any order
    assert [one["close"] for one in ended] == ["drained"]
