# SPDX-License-Identifier: Apache-2.0
"""Processes by pidfd: what a live one shows, and that an ended one shows nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.errors import KernelError
from agent.kernel import process
from agent.kernel.process import Process

CHILD = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "sock"))
        made.listen()
        made.settimeout(20)
        yield made


@pytest.fixture
def child(listener: socket.socket) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process, and our end of the connection that it made."""
    with subprocess.Popen([sys.executable, "-c", CHILD, listener.getsockname()]) as running:
        link, _ = listener.accept()
        with link:
            yield running, link
            running.kill()


@pytest.fixture
def me() -> Iterator[Process]:
    left, right = socket.socketpair()
    with left, right, contextlib.closing(Process.of_peer(left)) as made:
        yield made


def descriptors() -> set[str]:
    return {str(one) for one in Path("/proc/self/fd").iterdir()}


def end(running: subprocess.Popen[bytes]) -> None:
    """It has ended, but nobody has reaped it."""
    os.kill(running.pid, signal.SIGKILL)
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)


def without_peerpidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SO_PEERPIDFD", 9999)


@pytest.mark.parametrize("old_kernel", [False, True])
def test_the_peer_is_the_process_that_connected(
    child: tuple[subprocess.Popen[bytes], socket.socket], old_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old_kernel:
        without_peerpidfd(monkeypatch)
    running, link = child
    before = descriptors()
    held = Process.of_peer(link)
    assert held.pid == running.pid and held.alive()
    assert held.started == int(Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[19])
    end(running)
    assert not held.alive()  # although its number is still taken
    assert held.sockets() == {}
    with pytest.raises(KernelError, match="the process has ended") as raised:
        held.take(0)
    assert raised.value.errno == errno.ESRCH
    with pytest.raises(KernelError, match="the process has ended"):
        held.cgroup_id()
    held.close()
    held.close()
    assert not held.alive() and descriptors() == before


@pytest.mark.parametrize("reaped", [False, True])
@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_peer_that_has_ended_is_refused(
    child: tuple[subprocess.Popen[bytes], socket.socket],
    old_kernel: bool,
    reaped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old_kernel:
        without_peerpidfd(monkeypatch)
    running, link = child
    end(running)
    if reaped:
        running.wait()
    before = descriptors()
    with pytest.raises(KernelError, match=rf"pid {running.pid}|/proc/{running.pid}") as raised:
        Process.of_peer(link)
    assert raised.value.errno == errno.ESRCH and "ended" in str(raised.value)
    assert descriptors() == before


def test_a_number_that_another_process_got_is_refused(
    child: tuple[subprocess.Popen[bytes], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before SO_PEERPIDFD: the peer has ended and its number is ours now."""
    without_peerpidfd(monkeypatch)
    running, link = child
    end(running)
    monkeypatch.setattr(process, "peer", lambda sock: (os.getpid(), 0))
    before = descriptors()
    with pytest.raises(KernelError, match="ended"):
        Process.of_peer(link)
    assert descriptors() == before


def test_nothing_is_read_of_whoever_has_the_number_now(
    child: tuple[subprocess.Popen[bytes], socket.socket],
) -> None:
    running, link = child
    held = Process.of_peer(link)
    end(running)
    held.pid = os.getpid()  # as if we had got its number
    assert held.sockets() == {}
    with pytest.raises(KernelError, match="ended"):
        held.cgroup_id()
    with pytest.raises(KernelError, match="ended"):
        held.take(0)
    held.close()


def test_a_process_that_our_pid_namespace_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "peer", lambda sock: (0, 0))
    left, right = socket.socketpair()
    with left, right, pytest.raises(KernelError, match="hostPID: true"):
        Process.of_peer(left)


def test_a_descriptor_is_taken_and_closed_on_exec(me: Process) -> None:
    with socket.socket() as mine:
        taken = me.take(mine.fileno())
        assert taken != mine.fileno() and os.fstat(taken).st_ino == os.fstat(mine.fileno()).st_ino
        assert not os.get_inheritable(taken)
        os.close(taken)
    with pytest.raises(KernelError, match="Bad file descriptor") as raised:
        me.take(mine.fileno() if mine.fileno() >= 0 else 1 << 19)
    assert raised.value.errno == errno.EBADF


def test_its_sockets_by_inode(me: Process, tmp_path: Path) -> None:
    with socket.socket() as one, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as two, (tmp_path / "x").open("w"):
        found = me.sockets()
        for made in (one, two):
            assert found[os.fstat(made.fileno()).st_ino] == made.fileno()
        for inode, number in found.items():
            assert str(Path(f"/proc/self/fd/{number}").readlink()) == f"socket:[{inode}]"
    assert not {(tmp_path / "x").stat().st_ino} & set(found)


def test_sockets_that_are_wanted_end_the_search_and_new_ones_come_first(me: Process) -> None:
    with socket.socket() as old:
        before = me.sockets()
        with socket.socket() as fresh:
            inodes = [os.fstat(one.fileno()).st_ino for one in (old, fresh)]
            assert me.sockets({inodes[1]}, before.values()) == {inodes[1]: fresh.fileno()}
            assert before.items() >= {inodes[0]: old.fileno()}.items()
            found = me.sockets(set(inodes), before.values())
            assert set(inodes) <= set(found) <= set(me.sockets())
            assert me.sockets({*inodes, 1}, before.values()) == me.sockets()  # one that is nowhere


def test_a_closed_one_answers_like_an_ended_one(me: Process) -> None:
    me.close()
    assert (me.alive(), me.sockets()) == (False, {})
    with pytest.raises(KernelError, match="ended"):
        me.take(0)
    with pytest.raises(KernelError, match="ended"):
        me.cgroup_id()


def test_what_is_refused_says_what_to_do() -> None:
    assert "CAP_SYS_PTRACE" in process._cause(errno.EPERM)
    assert "CAP_SYS_PTRACE" in process._cause(errno.EACCES)
    assert "CAP_SYS_PTRACE" not in process._cause(errno.EBADF)
