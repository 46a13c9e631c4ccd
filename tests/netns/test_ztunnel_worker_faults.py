# SPDX-License-Identifier: Apache-2.0
"""Workers of ztunnel that hang, and processes that run out of descriptors."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time

import psutil
import pytest
from support.echo import Echo
from support.node import until
from support.ztunnel import PEER4, RESOLVER4, SECONDS, Lab, question

pytestmark = pytest.mark.root
HANG_SECONDS = 30.0


def test_a_worker_that_hangs_is_replaced(served: Lab) -> None:
    before = served.ztunnel.workers()
    for pid in before:  # both: one of them reads the pod's queries
        os.kill(pid, signal.SIGSTOP)
    until(lambda: not before.keys() & served.ztunnel.workers().keys(), "they are replaced", seconds=HANG_SECONDS)
    assert served.outbound()
    with (
        served.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as resolver,
        served.pod.make(kind=socket.SOCK_DGRAM) as client,
    ):
        resolver.settimeout(SECONDS)
        client.sendto(question(0x1234), (RESOLVER4, 53))
        asked, source = resolver.recvfrom(2000)
        resolver.sendto(asked, source)
        assert client.recv(2000) == asked
    assert "has not answered" in (served.folder / "records.err").read_text()


def test_a_worker_that_hangs_takes_no_connections_away(served: Lab) -> None:
    os.kill(next(iter(served.ztunnel.workers())), signal.SIGSTOP)
    time.sleep(0.1)
    traffic = Echo.through(served, inbound=False)
    try:
        traffic.wait_more(200)
    finally:
        traffic.close()
    assert not traffic.failures


def test_a_worker_is_replaced_once_the_supervisor_has_descriptors_again(served: Lab) -> None:
    pid = served.ztunnel.process.pid
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    killed = min(served.ztunnel.workers())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    os.kill(killed, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(killed), "its end is noticed")
    time.sleep(0.5)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    until(lambda: len(served.ztunnel.workers()) == 2, "it is replaced")


def test_workers_without_descriptors_say_so_once_and_live_on(served: Lab) -> None:
    held, server = served.outbound()
    log = served.folder / "records.err"
    limits = {}
    for worker, used in served.ztunnel.workers().items():
        limits[worker] = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (used + 4, limits[worker][1]))
    with served.peer.listen(PEER4, 8081) as listener:
        listener.settimeout(SECONDS)
        clients = [served.pod.connect(PEER4, 8081) for _ in range(100)]
        served.close_later(*clients)
        until(lambda: "new connections wait: Too many open files" in log.read_text(), "it is logged")
        held.sendall(b"still")
        assert server.recv(5) == b"still"
        assert limits.keys() == served.ztunnel.workers().keys()
        for worker, limit in limits.items():
            resource.prlimit(worker, resource.RLIMIT_NOFILE, limit)
        for _ in clients:  # those that have waited, too
            served.close_later(listener.accept()[0])
    assert served.outbound()
    assert log.read_text().count("Too many open files") <= len(limits)
