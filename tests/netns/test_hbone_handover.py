# SPDX-License-Identifier: Apache-2.0
"""A new ztunnel takes over from an old one in a mesh, at either end: no new connection fails, old ones have time."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from pathlib import Path

import pytest
from support.echo import Echo
from support.hbone import two_nodes
from support.second_stack import OwnClient
from support.ztunnel import PEER4, SECONDS

pytestmark = pytest.mark.root
STREAMS = 8
DRAIN_SECONDS = 1.5
CANCEL = 8


@pytest.mark.parametrize("whose", ["client", "server"])
def test_the_old_one_keeps_its_streams_until_the_deadline(tmp_path: Path, whose: str) -> None:
    with two_nodes(tmp_path) as (web, shop), contextlib.ExitStack() as opened:
        for each in (web, shop):
            each.start(drain=DRAIN_SECONDS)
        ends = []
        listener = opened.enter_context(shop.pod.listen(PEER4, 8081))
        for _ in range(STREAMS):
            client = opened.enter_context(web.pod.connect(PEER4, 8081))
            server, _ = listener.accept()
            server.settimeout(SECONDS)
            ends.append((client, opened.enter_context(server)))
        traffic = Echo(shop.pod, web.pod, PEER4, pause=0.02)
        try:
            traffic.wait_more(20)
            changed = web if whose == "client" else shop
            old, link = changed.ztunnel, opened.enter_context(changed.agent.link)
            new = changed.start("new", drain=DRAIN_SECONDS)
            old.terminate()
            said = time.monotonic()
            link.settimeout(SECONDS)
            while time.monotonic() < said + DRAIN_SECONDS:
                for client, server in ends:
                    client.sendall(b"?")
                    assert server.recv(1) == b"?"
                time.sleep(0.05)
            assert old.process.wait(SECONDS) == 0
            for end in (end for pair in ends for end in pair):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
            traffic.wait_more(20)
        finally:
            traffic.close()
        assert traffic.failures == []
        assert Counter(one["close"] for one in old.records())["drained"] == STREAMS
        assert new.wait_record(kind="hbone", close="fin")
        assert "the drain time is over" in Path(f"{old.path}.err").read_text()


def test_an_old_server_says_goaway_and_still_takes_what_is_on_the_way(tmp_path: Path) -> None:
    with two_nodes(tmp_path) as (web, shop), contextlib.ExitStack() as made:
        shop.start(drain=DRAIN_SECONDS, workers=1)
        client = OwnClient(web, shop, tmp_path, made)
        busy, idle = client.session(), client.session()
        long, application = client.stream(busy)
        idle.idle(0.1)
        shop.ztunnel.terminate()
        busy.pump(lambda: busy.goaway)
        assert busy.goaway == ((1 << 31) - 1, 0)
        late, other = client.stream(idle)  # sent before it reads that the server drains
        idle.send(late, b"late", end=True)
        idle.pump(lambda: idle.goaway and not late.sending)
        assert other.recv(5) == b"late"
        other.close()
        idle.pump(lambda: late.closed == 0)
        busy.send(long, b"still")
        busy.pump(lambda: not long.sending)
        assert application.recv(5) == b"still"
        busy.pump(lambda: long.closed is not None)
        assert long.closed == CANCEL
        assert shop.ztunnel.process.wait(SECONDS) == 0
