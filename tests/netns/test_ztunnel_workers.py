# SPDX-License-Identifier: Apache-2.0
"""Worker processes of ztunnel: they share the pods, and the death of one costs only its own connections."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from support.echo import Echo
from support.hbone import PORTLESS
from support.node import until
from support.ztunnel import PEER4, RESOLVER4, SECONDS, Lab, Place, question

from agent.zds.messages import Delete

pytestmark = pytest.mark.root
STREAMS = 8
PODS = 60


@pytest.mark.parametrize("inbound", [False, True])
def test_streams_are_shared_evenly(served: Lab, inbound: bool) -> None:
    for _ in range(2):  # each worker has sockets in stock then
        served.inbound() if inbound else served.outbound()
    before = served.ztunnel.workers()
    for port in range(9000, 9000 + STREAMS):
        client, server = served.inbound(port=port) if inbound else served.outbound(port=port)
        client.sendall(b"hello")
        assert server.recv(5) == b"hello"
    more = [count - before[worker] for worker, count in served.ztunnel.workers().items()]
    assert len(more) == 2 and min(more) >= STREAMS // 4, more


def test_a_worker_that_is_killed_costs_its_own_connections_and_no_new_one(served: Lab) -> None:
    streams = [served.outbound(port=port) for port in range(9000, 9000 + STREAMS)]
    for client, server in streams:
        client.sendall(b"1")
        assert server.recv(1) == b"1"
    traffic = Echo.through(served, inbound=False)
    try:
        traffic.wait_more(200)
        for _ in range(3):
            asked = traffic.made
            served.ztunnel.kill_worker()
            traffic.wait_more(300)
            assert traffic.made > asked
    finally:
        traffic.close()
    # What the worker had accepted ends with it: at most one connection of each client, at each of the three times.
    assert len(traffic.failures) <= 6, traffic.failures
    lost = 0
    for client, server in streams:
        try:
            client.sendall(b"2")
            lost += server.recv(1) != b"2"
        except OSError:
            lost += 1
    assert 0 < lost <= STREAMS
    assert served.outbound(port=9999)


def test_connections_that_wait_outlive_all_workers(served: Lab) -> None:
    before = served.ztunnel.workers()
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    with served.peer.listen(PEER4, 8080) as listener:
        clients = [served.pod.connect(PEER4, 8080) for _ in range(200)]
        served.close_later(*clients)
        for client in clients:
            client.sendall(b"hello")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for _ in clients:
            server, _ = listener.accept()
            served.close_later(server)
            server.settimeout(SECONDS)
            server.sendall(server.recv(5))
        assert all(client.recv(5) == b"hello" for client in clients)
    assert not before.keys() & served.ztunnel.workers().keys()


def test_queries_are_answered_after_the_death_of_their_reader(served: Lab) -> None:
    with (
        served.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as resolver,
        served.pod.make(kind=socket.SOCK_DGRAM) as client,
    ):
        resolver.settimeout(SECONDS)
        for _ in range(4):
            client.sendto(question(0x1234), (RESOLVER4, 53))
            asked, source = resolver.recvfrom(2000)
            resolver.sendto(asked, source)
            assert client.recv(2000) == asked
            served.ztunnel.kill_worker()


def test_pods_come_and_go_while_workers_are_replaced(served: Lab) -> None:
    other = Place(f"slu-zt-{os.getpid()}-other")
    try:
        for _ in range(3):
            for worker in served.ztunnel.workers():
                os.kill(worker, signal.SIGKILL)
            assert served.agent.add(other, "uid-2") == ""
            for _ in range(4):  # by either worker: this is no captured connection
                with pytest.raises(ConnectionResetError), other.connect("127.0.0.1", 15001) as client:
                    client.recv(1)
            for worker in served.ztunnel.workers():
                os.kill(worker, signal.SIGKILL)
            assert served.agent.ask(Delete("uid-2")) == ""
            until(lambda: refuses(other), "no process has the pod's listeners")
        assert served.outbound()
    finally:
        other.remove()


def refuses(place: Place) -> bool:
    try:
        place.connect("127.0.0.1", 15001).close()
    except ConnectionRefusedError:
        return True
    return False


def test_workers_end_with_their_supervisor(served: Lab) -> None:
    pid = served.ztunnel.process.pid
    before = served.ztunnel.workers()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(psutil.pid_exists, before)), "they have ended")
    assert refuses(served.pod)


def test_one_worker_is_the_process_itself(lab: Lab) -> None:
    lab.serve(settings="workers=1")
    assert lab.ztunnel.workers() == {}
    assert lab.outbound()


def test_a_worker_that_always_dies_is_replaced_with_backoff(served: Lab) -> None:
    killed = set()
    until_ = time.monotonic() + 2
    while time.monotonic() < until_:
        for worker in served.ztunnel.workers():
            killed.add(worker)
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.01)
    assert 6 <= len(killed) <= 20, len(killed)  # 0.1, 0.2, 0.4, 0.8 seconds apart, two of them
    assert served.outbound()


def test_the_process_ends_at_once_while_it_waits_for_its_mesh(lab: Lab) -> None:
    lab.start(settings=f"mesh={str(lab.folder / 'none')!r}, identities='development:{lab.folder}/ca', {PORTLESS}")
    until(lambda: "does not exist" in Path(f"{lab.ztunnel.path}.err").read_text(), "it has looked for the mesh")
    lab.ztunnel.terminate()
    assert lab.ztunnel.process.wait(3) == 0


def test_twenty_pods_a_second_come_and_go_under_traffic(served: Lab) -> None:
    """Of each pod that is left behind workers would keep ten descriptors."""
    traffic = Echo.through(served, inbound=False)
    other = Place(f"slu-zt-{os.getpid()}-other")
    try:
        traffic.wait_more(50)
        before = served.ztunnel.fds()
        for number in range(PODS):
            assert served.agent.add(other, f"other-{number}") == ""
            with contextlib.suppress(ConnectionResetError):  # it is taken, and reset: this is no captured connection
                other.connect("127.0.0.1", 15001).close()
            time.sleep(0.05)
            assert served.agent.ask(Delete(f"other-{number}")) == ""
        until(lambda: served.ztunnel.fds() < before + PODS, "the pods' descriptors are closed")
        until(lambda: refuses(other), "no process has the pods' listeners")
        assert [psutil.Process(worker).num_threads() for worker in served.ztunnel.workers()] == [1, 1]
        traffic.wait_more(50)
    finally:
        traffic.close()
        other.remove()
    assert traffic.failures == []
