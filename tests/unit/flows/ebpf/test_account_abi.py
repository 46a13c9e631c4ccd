# SPDX-License-Identifier: Apache-2.0
"""What the programs hand over, read: records, keys and totals; the layout itself is compared with C in tests/netns."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.flows.ebpf import account_abi
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Closer, Connection, Direction, Fate, How, Reason

IPV4 = bytes(10) + b"\xff\xff"
EPOCH = 1_700_000_000_000_000_000  # ns


def record(**given: Any) -> bytes:
    fields: dict[str, Any] = {
        "local": IPV4 + bytes((10, 0, 0, 1)), "remote": IPV4 + bytes((10, 0, 0, 2)), "peer": bytes(16), "pod": 7,
        "socket": 9, "opened": 1_500_000_000, "closed": 0, "sent": 1, "received": 2, "out": 3, "into": 4, "again": 5,
        "rtt": 250, "user": 1000, "process": 42, "command": b"curl", "local_port": b"\x9c\x40",
        "remote_port": b"\0\x50", "peer_port": b"\0\0", "direction": 0, "fate": 1,
        "reason": 0, "how": 0, "closer": 0, "established": 1,
    }  # fmt: skip
    return account_abi.RECORD.pack(*(fields | given).values())


def one(**given: Any) -> Connection:
    (found,) = account_abi.connections(record(**given), EPOCH)
    return found


def test_a_connection_that_lives() -> None:
    assert one() == Connection(
        pod=7,
        socket=9,
        direction=Direction.OUTBOUND,
        fate=Fate.CAPTURED,
        reason=Reason.NONE,
        local=("10.0.0.1", 40000),
        remote=("10.0.0.2", 80),
        opened=1_700_000_001.5,
        closed=None,
        peer=None,
        established=True,
        sent=1,
        received=2,
        segments_out=3,
        segments_in=4,
        retransmitted=5,
        rtt=0.00025,
        how=How.OPEN,
        closer=Closer.NONE,
        user=1000,
        process=42,
        command="curl",
    )


def test_what_was_never_measured_or_known_is_none() -> None:
    found = one(rtt=0, user=0xFFFFFFFF, process=0, command=b"", established=0)
    assert (found.rtt, found.user, found.process, found.command, found.failed) == (None, -1, 0, "", True)


def test_an_ended_one_whose_packets_went_elsewhere() -> None:
    found = one(closed=2_500_000_000, how=2, closer=2, peer=IPV4 + bytes((127, 1, 2, 3)), peer_port=b"\x3a\x99")
    assert (found.closed, found.peer) == (1_700_000_002.5, ("127.1.2.3", 15001))
    assert (found.how, found.closer) == (How.RESET, Closer.REMOTE)


def test_names_of_commands_need_not_be_text() -> None:
    assert one(command=b"a\0old rest").command == "a"
    assert one(command=b"\xff" * 16).command == "�" * 16


def test_records_come_one_after_the_other_and_only_whole() -> None:
    data = b"".join(record(socket=number) for number in range(5))
    assert [each.socket for each in account_abi.connections(data, EPOCH)] == list(range(5))
    with pytest.raises(struct.error):
        list(account_abi.connections(data[:-1], EPOCH))


@pytest.mark.parametrize(
    ("data", "text"),
    [(bytes(16), ""), (IPV4 + bytes((192, 0, 2, 1)), "192.0.2.1"), (bytes.fromhex("fd77" + "0" * 27 + "1"), "fd77::1")],
)
def test_addresses(data: bytes, text: str) -> None:
    assert account_abi.address(data) == text


@given(st.sampled_from(Direction), st.sampled_from(Fate), st.sampled_from(Reason))
def test_a_key_of_a_sort_names_no_pod_and_no_peer(direction: Direction, fate: Fate, reason: Reason) -> None:
    assert account_abi.tally_key(account_abi.sort_key(direction, fate, reason)) == (0, direction, fate, reason, "", 0)


def test_a_quality_is_what_was_added() -> None:
    def value(rtt: tuple[int, int], duration: tuple[int, int], *rest: int) -> bytes:
        buckets = [[0] * (len(bounds) + 1) for bounds in (RTT_BOUNDS, DURATION_BOUNDS)]
        for counts, (bucket, count) in zip(buckets, (rtt, duration), strict=True):
            counts[bucket] = count
        return account_abi.QUALITY.pack(*buckets[0], rest[0], *buckets[1], *rest[1:])

    key = account_abi.QUALITY_KEY.pack(7, 1)
    before, now = value((2, 3), (12, 4), 600, 9_000_000, 1, 10, 20), value((2, 5), (12, 4), 1000, 9_500_000, 1, 12, 25)
    whole, added = account_abi.quality(key, before, None), account_abi.quality(key, now, before)
    assert (whole.pod, whole.direction, whole.rtt[2], whole.duration[12]) == (7, Direction.INBOUND, 3, 4)
    assert (whole.rtt_sum, whole.duration_sum, whole.segments_in) == (0.0006, 9.0, 20)
    assert (added.rtt[2], sum(added.rtt), sum(added.duration)) == (2, 2, 0)
    assert (added.rtt_sum, added.duration_sum) == (0.0004, 0.5)
    assert (added.retransmitted, added.segments_out, added.segments_in) == (0, 2, 5)


def test_whether_it_ended_badly_is_read_without_the_rest_of_it() -> None:
    seen = set()
    for fate, how, established in itertools.product(Fate, How, (0, 1)):
        data = record(fate=fate, how=how, established=established)
        bad = account_abi.ended_badly(data)
        assert bad == next(account_abi.connections(data, 0)).ended_badly
        seen.add((bad, how))
    assert (False, How.FIN) in seen and (False, How.RESET) not in seen
