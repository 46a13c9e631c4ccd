# SPDX-License-Identifier: Apache-2.0
"""A relayed connection begins with short exchanges and becomes a stream: with relay.so, and without it."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from support.ztunnel import Lab, abort, read_all

pytestmark = pytest.mark.root
WITHOUT = "from agent.kernel import pair_copier\npair_copier.LIBRARY = pair_copier.LIBRARY / 'none'"
EXCHANGES = 100
STREAM = os.urandom(4 << 20)


@pytest.fixture(params=["", WITHOUT], ids=["with", "without"])
def served(lab: Lab, request: pytest.FixtureRequest) -> Lab:
    lab.serve(first=request.param)
    return lab


def exchange(one: socket.socket, other: socket.socket) -> None:
    for number in range(EXCHANGES):
        one.sendall(b"q%03d" % number)
        assert other.recv(10) == b"q%03d" % number
        other.sendall(b"answer")
        assert one.recv(10) == b"answer"


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
@pytest.mark.parametrize("sender", [0, 1])
def test_short_exchanges_then_a_stream_to_a_slow_reader(served: Lab, direction: str, sender: int) -> None:
    ends = getattr(served, direction)()
    exchange(*ends)
    one, other = ends[sender], ends[1 - sender]
    sending = threading.Thread(target=lambda: (one.sendall(STREAM), one.shutdown(socket.SHUT_WR)))
    sending.start()
    other.sendall(b"meanwhile")  # nobody reads the stream yet
    assert one.recv(9, socket.MSG_WAITALL) == b"meanwhile"
    assert read_all(other) == STREAM
    sending.join()
    other.sendall(b"after the end")
    other.close()
    assert read_all(one) == b"after the end"
    one.close()
    up, down = 4 * EXCHANGES, 6 * EXCHANGES
    more = (len(STREAM), len(b"meanwhileafter the end"))
    sent, received = (up + more[sender], down + more[1 - sender])
    assert served.ztunnel.wait_record(close="fin", sent=sent, received=received)


@pytest.mark.parametrize("first", [0, 1])
def test_a_reset_after_short_exchanges_passes(served: Lab, first: int) -> None:
    ends = served.outbound()
    exchange(*ends)
    abort(ends[first])
    with pytest.raises(ConnectionResetError):
        ends[1 - first].recv(1)
    record = served.ztunnel.wait_record(close="reset")
    assert (record["sent"], record["received"]) == (4 * EXCHANGES, 6 * EXCHANGES)
