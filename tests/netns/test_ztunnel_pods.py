# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel and its agent: pods come and go, snapshots, garbage, descriptors; what a pod may lack."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ztunnel import PEER4, RESOLVER4, Lab, read_all, wait_listening

from agent.zds.messages import Add, Delete, Keep, SnapshotSent

pytestmark = pytest.mark.root


def test_add_again_keep_and_delete(served: Lab) -> None:
    client, server = served.outbound()
    assert served.agent.add(served.pod) == ""  # the same pod in the same namespace: nothing happens
    client.sendall(b"still here")
    assert server.recv(20) == b"still here"
    assert served.agent.ask(Delete("never heard of")) == ""
    assert served.agent.ask(Delete("uid-1")) == ""
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_listening(served.pod, False)
    assert served.ztunnel.wait_record(close="drained")["sent"] == 10
    assert served.agent.add(served.pod) == ""
    served.outbound()


def test_another_namespace_under_the_same_uid(served: Lab) -> None:
    assert served.agent.add(served.peer) == ""
    wait_listening(served.peer, True)
    wait_listening(served.pod, False)


def test_snapshot_drops_what_is_not_named(served: Lab) -> None:
    assert served.agent.add(served.peer, "uid-2") == ""
    client, server = served.outbound(port=15008)
    served.agent.link.close()
    served.agent.accept()
    assert served.agent.ask(Keep("uid-1")) == ""
    wait_listening(served.peer, True)  # not yet: the snapshot is not complete
    assert served.agent.ask(SnapshotSent()) == ""
    wait_listening(served.peer, False)
    client.sendall(b"kept")
    assert server.recv(10) == b"kept"
    assert "after SnapshotSent" in served.agent.ask(Keep("uid-1"))


def test_failed_start_is_refused_and_tried_again(lab: Lab) -> None:
    lab.start()
    lab.agent.accept()
    squatter = lab.pod.listen("0.0.0.0", 15006)
    assert "in use" in lab.agent.add(lab.pod)
    assert lab.agent.ask(SnapshotSent()) == ""
    wait_listening(lab.pod, False)
    squatter.close()
    wait_listening(lab.pod, True)
    lab.outbound()


def test_agent_dies_and_comes_back(served: Lab) -> None:
    client, server = served.outbound()
    served.agent.close()
    served.outbound(port=8081)  # new connections meanwhile
    served.agent = type(served.agent)(served.agent.path)
    served.agent.accept_with(served.pod)
    client.sendall(b"same connection")
    assert server.recv(20) == b"same connection"


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\x7fshort", b"x" * 1500, b"\x22\x00"])
def test_garbage_from_the_agent(served: Lab, garbage: bytes) -> None:
    client, server = served.outbound()
    with pytest.raises(AssertionError):  # an error is acknowledged, then the connection is dropped
        assert served.agent.ask_raw(garbage) == ""
    served.agent.accept_with(served.pod)
    client.sendall(b"same connection")
    assert server.recv(20) == b"same connection"


def test_descriptors_where_none_or_one_belongs(served: Lab) -> None:
    one = (served.pod.netns.fd,)
    for _ in range(2):  # each worker serves the pod then
        served.outbound()
    before = served.ztunnel.fds()
    add = Add("uid-9", "web", "shop", "default")
    for request, fds in ((add, ()), (add, one * 2), (Delete("uid-9"), one)):
        assert "descriptors" in served.agent.ask(request, fds)
        served.agent.accept_with(served.pod)
    with Path("/dev/null").open() as other:
        assert "not a namespace" in served.agent.ask(add, (other.fileno(),))
    assert served.agent.add(served.pod) == ""
    assert served.ztunnel.fds() == before


def test_ipv6_switched_off(lab: Lab) -> None:
    lab.pod.call(lambda: Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1"))
    lab.serve()
    client, server = lab.outbound()
    client.sendall(b"v4")
    assert server.recv(2) == b"v4"
    lab.outbound(RESOLVER4, 53)


def test_records_that_cannot_be_written_stop_nothing(lab: Lab) -> None:
    (lab.folder / "full").symlink_to("/dev/full")
    lab.serve("full")
    for _ in range(3):
        client, server = lab.outbound()
        client.close()
        assert read_all(server) == b""
        server.close()


def test_a_pod_beyond_its_share_is_refused_at_once_and_named(lab: Lab) -> None:
    lab.serve(settings="share=2, workers=1")
    (one, server), _ = lab.outbound(), lab.inbound()
    # The reset may come before connect() returns.
    with lab.peer.listen(PEER4, 8081), pytest.raises(ConnectionResetError), lab.pod.connect(PEER4, 8081) as third:
        third.recv(1)
    record = lab.ztunnel.wait_record(close="refused")
    assert record["pod"] == "shop/web" and "its limit of 2 connections" in record["error"]
    one.close()
    server.close()
    lab.ztunnel.wait_record(close="fin")
    lab.outbound()
