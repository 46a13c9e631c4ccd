# SPDX-License-Identifier: Apache-2.0
"""Fates of connections, by what dumps and the notification of their end have shown."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from agent.core.model.redirect import Redirect
from agent.core.model.sockets import Endpoint, TcpSocket, TcpState
from agent.core.model.topology import PodTopology
from agent.core.names import ZTUNNEL_MARK
from agent.core.wire.tcp_info import NOTHING, TcpReport
from agent.flows.inet_diag.pod_flows import PodFlows
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.record import Direction, Fate, Reason

OWN, CLIENT, SERVER = "10.0.0.2", ("10.9.9.9", 5555), ("10.9.9.10", 80)


Replies = dict[tuple[Endpoint, Endpoint], tuple[Endpoint, Endpoint]]
ZTUNNEL = ("127.0.0.1", 15001)


def flows(replies: Replies | None = None) -> PodFlows:
    return PodFlows(
        1,
        verdicts=Verdicts(Redirect(), PodTopology(addresses=(ip_address(OWN),))),
        held=lambda inodes: (),
        replies=lambda client, service: (replies or {}).get((client, service)),
        captured=True,
    )


def end(
    cookie: int, local: Endpoint, remote: Endpoint, *, acked: int = 5, unacked: int = 0, **counts: int
) -> TcpReport:
    info = replace(NOTHING, **{"acked": acked, "sent": 4, "segments_out": 5, "segments_in": 5, **counts})
    return TcpReport(
        socket=TcpSocket(4, local, remote, TcpState.CLOSE, cookie), ends=bytes(36), unread=0, unacked=unacked, info=info
    )


def accepted(cookie: int, client: Endpoint) -> TcpReport:
    """ztunnel's end of a connection with the four bytes and the FIN of `end`."""
    return end(cookie, ZTUNNEL, client, acked=1, sent=0, received=5, data_in=1)


def alive(one: TcpReport, mark: int = 0) -> TcpReport:
    shown = replace(one.socket, state=TcpState.ESTABLISHED, uid=1000, inode=one.socket.cookie, mark=mark)
    return replace(one, socket=shown, info=replace(one.info, acked=5))


def test_ztunnels_end_that_reset_itself_is_known_by_what_is_left_of_it() -> None:
    made = flows()
    made.ended(end(1, (OWN, 80), CLIENT), 1.0)
    made.ended(end(2, ("0.0.0.0", CLIENT[1]), (OWN, 0), unacked=9), 1.0)
    made.dumped((), {}, 2.0)
    records = made.settle(10.0, all_of_it=True)
    assert [(one.direction, one.fate) for one in records] == [(Direction.INBOUND, Fate.CAPTURED)]


@pytest.mark.parametrize("acked", [5, 6])  # 6: the SYN, four bytes and the FIN
def test_what_no_dump_saw_may_be_ztunnels_however_it_ended(acked: int) -> None:
    made = flows()
    made.ended(end(3, (OWN, 40000), SERVER, acked=acked), 1.0)
    made.dumped((), {}, 2.0)
    assert [one.fate for one in made.settle(10.0, all_of_it=True)] == [Fate.UNDECIDED]


DIRECT: Replies = {((OWN, 40000), SERVER): (SERVER, (OWN, 40000))}
OTHER_PORT: Replies = {((OWN, 40000), SERVER): (ZTUNNEL, (OWN, 2222))}


@pytest.mark.parametrize(
    ("replies", "strays", "fate"),
    [
        (DIRECT, [], Fate.LEAKED),
        (DIRECT, [(OWN, 2222)], Fate.LEAKED),
        ({}, [], Fate.LEAKED),
        ({}, [(OWN, 2222)], Fate.UNDECIDED),
        (OTHER_PORT, [], Fate.UNDECIDED),
        (OTHER_PORT, [(OWN, 2222)], Fate.CAPTURED),
        (OTHER_PORT, [(OWN, 2223)], Fate.UNDECIDED),
        (OTHER_PORT, [(OWN, 0)], Fate.CAPTURED),  # ztunnel has reset it
    ],
)
def test_what_an_application_holds_has_leaked_if_ztunnel_cannot_have_accepted_it(
    replies: Replies, strays: list[Endpoint], fate: Fate
) -> None:
    made = flows(replies)
    one = end(3, (OWN, 40000), SERVER, acked=6)
    made.dumped([alive(one)], {}, 1.0)
    assert made.settle(1.0) == []
    for number, client in enumerate(strays):
        made.ended(accepted(10 + number, client), 1.5)
    made.ended(one, 2.0)
    made.dumped((), {}, 2.0)
    assert [one.fate for one in made.settle(10.0, all_of_it=True)] == [fate]


def test_ztunnel_may_have_closed_a_socket_before_it_was_asked() -> None:
    for dumps, fate in ((1, Fate.UNDECIDED), (2, Fate.LEAKED)):
        made = flows(DIRECT)
        one = end(3, (OWN, 40000), SERVER, acked=6)
        for number in range(dumps):
            made.dumped([alive(one, ZTUNNEL_MARK)], {}, 1.0)
            made.settle(1.0)
            assert made.doubtful == (number == 0)
        made.ended(one, 2.0)
        made.dumped((), {}, 2.0)
        assert [one.fate for one in made.settle(10.0, all_of_it=True)] == [fate]


def test_of_two_connections_from_one_port_conntrack_knows_which_ztunnel_accepted() -> None:
    other = ("10.9.9.11", 80)
    made = flows({**OTHER_PORT, ((OWN, 40000), other): (ZTUNNEL, (OWN, 40000))})
    made.ended(end(1, (OWN, 40000), SERVER, acked=6), 1.0)
    made.ended(end(2, (OWN, 40000), other, acked=6), 1.0)
    made.ended(accepted(3, (OWN, 40000)), 1.0)
    made.ended(accepted(4, (OWN, 2222)), 1.0)
    made.dumped((), {}, 1.0)
    assert [one.fate for one in made.settle(10.0, all_of_it=True)] == [Fate.CAPTURED] * 2


def test_what_ebpf_captured_waits_for_ztunnels_end_before_it_is_called_loopback() -> None:
    """Else ztunnel's connection onwards would be left over, as a leak."""
    application = ("127.0.0.1", 40000)
    made = flows()
    made.ended(end(1, application, ZTUNNEL, acked=6), 1.0)
    made.dumped((), {}, 1.0)
    assert made.settle(1.0) == []
    made.ended(accepted(2, application), 1.1)
    made.ended(end(3, (OWN, 40001), SERVER, acked=6), 1.2)
    made.dumped((), {}, 1.3)
    assert [one.fate for one in made.settle(10.0, all_of_it=True)] == [Fate.CAPTURED]


def test_what_really_stays_within_the_pod_is_exempt_in_the_end() -> None:
    made = flows()
    made.ended(end(1, ("127.0.0.1", 40000), ("127.0.0.1", 15001), acked=6), 1.0)
    made.dumped((), {}, 1.0)
    assert [(one.fate, one.reason) for one in made.settle(10.0)] == [(Fate.EXEMPT, Reason.LOOPBACK)]


def test_an_application_that_closes_before_the_answer_leaves_no_leak() -> None:
    """ztunnel's connection onwards then received more than the application did."""
    application = (OWN, 40000)
    made = flows()
    made.ended(end(1, application, SERVER, acked=6), 1.0)
    made.ended(accepted(2, application), 1.1)
    made.ended(end(3, (OWN, 40001), SERVER, acked=6, received=10, data_in=1), 1.2)
    made.dumped((), {}, 1.3)
    assert [one.fate for one in made.settle(10.0, all_of_it=True)] == [Fate.CAPTURED]


def test_ztunnel_is_asked_once_for_all_sockets_of_a_dump() -> None:
    """For a socket that it has closed meanwhile, all of its descriptors are read."""
    asked = list[set[int]]()
    made = PodFlows(
        1,
        verdicts=Verdicts(Redirect(), PodTopology()),
        held=lambda inodes: (asked.append({*inodes}), {7})[1],
        captured=True,
    )
    ours = [
        TcpReport(
            socket=TcpSocket(
                4, (OWN, 40000 + inode), SERVER, TcpState.ESTABLISHED, inode, inode=inode, mark=ZTUNNEL_MARK
            ),
            ends=bytes(36),
            unread=0,
            unacked=0,
            info=NOTHING,
        )
        for inode in (7, 8, 9)
    ]
    for now in (1.0, 2.0):
        made.dumped(iter(ours), {}, now)
    assert asked == [{7, 8, 9}, {8, 9}], "what is known to be ztunnel's is not asked for again"
    assert len([*made.live()]) == 2
