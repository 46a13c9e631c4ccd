# SPDX-License-Identifier: Apache-2.0
"""The pod's conntrack remembers a captured connection that one side has ended as long as the other may answer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.rules import CHOICES, layers
from support.rules import pod as made

from agent.core.model.redirect import Redirect
from agent.kernel import sysctl
from agent.kernel.exec import run
from agent.lab.links import links
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
LAST_ACK = "net/netfilter/nf_conntrack_tcp_timeout_last_ack"
SERVER = ("192.0.2.1", 8080)


def entries() -> list[list[str]]:
    """Protocol, number, seconds left and state of TCP entries with the server's port, in the current namespace."""
    lines = Path("/proc/thread-self/net/nf_conntrack").read_text().splitlines()
    return [line.split()[2:6] for line in lines if f"dport={SERVER[1]}" in line]


@pytest.mark.parametrize("choice", CHOICES)
def test_conntrack_remembers_a_half_closed_connection(choice: str) -> None:
    with made() as pod:
        with links(pod.name) as inside:
            inside.veth("d0", "d1")
            inside.up("d1")
            inside.add_addresses("d0", "192.0.2.2/24")
        used = layers(choice)
        settle(pod.target, Redirect(ipv6=False), used)
        inside = pod.target.netns.call
        with inside(lambda: socket.create_server(("127.0.0.1", 15001))) as listener, inside(socket.socket) as client:
            client.connect(SERVER)
            accepted, _ = listener.accept()
            with accepted:
                client.shutdown(socket.SHUT_WR)
                assert accepted.recv(1) == b""
                accepted.sendall(b"answer")
                assert client.recv(9) == b"answer"
                ((_, _, left, state),) = inside(entries)
                assert state == "CLOSE_WAIT" and int(left) > 400_000
        settle(pod.target, None, used)
        assert inside(lambda: sysctl.read("net/netfilter/nf_conntrack_tcp_timeout_close_wait")) == 60


def test_a_read_only_proc_does_not_keep_it_from_being_set() -> None:
    """As in a container without privileges."""
    with made() as pod:
        code = f"from agent.kernel import sysctl; sysctl.write({LAST_ACK!r}, 31)"
        script = (
            "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys /proc/sys\n"
            f"! echo 32 >/proc/sys/{LAST_ACK} || exit\n"
            f'cd {Path(__file__).parents[2]} && exec .venv/bin/python -c "{code}"'
        )
        run(["unshare", "-m", "sh", "-ec", script], netns=pod.path)
        assert pod.target.netns.call(lambda: sysctl.read(LAST_ACK)) == 31
