# SPDX-License-Identifier: Apache-2.0
"""Fates of connections of which no dump showed a socket, only the notification of its end."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from agent.core.model.redirect import Redirect
from agent.core.model.sockets import Endpoint, TcpSocket, TcpState
from agent.core.model.topology import PodTopology
from agent.core.names import ZTUNNEL_MARK
from agent.core.wire.tcp_info import NOTHING, TcpReport
from agent.flows.inet_diag.pod_flows import PodFlows
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.record import Direction, Fate, Reason

OWN, CLIENT, SERVER = "10.0.0.2", ("10.9.9.9", 5555), ("10.9.9.10", 80)


def flows() -> PodFlows:
    wiring = PodTopology(addresses=(ip_address(OWN),))
    return PodFlows(1, verdicts=Verdicts(Redirect(), wiring), held=lambda inodes: (), captured=True)


def end(cookie: int, local: Endpoint, remote: Endpoint, *, acked: int = 5, unacked: int = 0) -> TcpReport:
    info = replace(NOTHING, acked=acked, sent=4, segments_out=5, segments_in=5)
    return TcpReport(
        socket=TcpSocket(4, local, remote, TcpState.CLOSE, cookie), ends=bytes(36), unread=0, unacked=unacked, info=info
    )


def test_ztunnels_end_that_reset_itself_is_known_by_what_is_left_of_it() -> None:
    made = flows()
    made.ended(end(1, (OWN, 80), CLIENT), 1.0)
    made.ended(end(2, ("0.0.0.0", CLIENT[1]), (OWN, 0), unacked=9), 1.0)
    made.dumped((), {}, 2.0)
    records = made.settle(10.0, all_of_it=True)
    assert [(one.direction, one.fate) for one in records] == [(Direction.INBOUND, Fate.CAPTURED)]


def test_what_was_cut_off_unseen_may_be_ztunnels_and_what_ended_in_order_has_leaked() -> None:
    fates = []
    for acked in (5, 6):  # 6: the SYN, four bytes and the FIN
        made = flows()
        made.ended(end(3, (OWN, 40000), SERVER, acked=acked), 1.0)
        made.dumped((), {}, 2.0)
        fates += [one.fate for one in made.settle(10.0, all_of_it=True)]
    assert fates == [Fate.UNDECIDED, Fate.LEAKED]


def test_what_ebpf_captured_waits_for_ztunnels_end_before_it_is_called_loopback() -> None:
    """Else ztunnel's connection onwards would be left over, as a leak."""
    application, ztunnel = ("127.0.0.1", 40000), ("127.0.0.1", 15001)
    made = flows()
    made.ended(end(1, application, ztunnel, acked=6), 1.0)
    made.dumped((), {}, 1.0)
    assert made.settle(1.0) == []
    made.ended(end(2, ztunnel, application), 1.1)
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
    application, answered = (OWN, 40000), {"received": 10, "data_in": 1}
    made = flows()
    made.ended(end(1, application, SERVER, acked=6), 1.0)
    made.ended(end(2, ("127.0.0.1", 15001), application), 1.1)
    onward = end(3, (OWN, 40001), SERVER, acked=6)
    made.ended(replace(onward, info=replace(onward.info, **answered)), 1.2)
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
