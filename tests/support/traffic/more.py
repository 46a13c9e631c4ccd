# SPDX-License-Identifier: Apache-2.0
"""Rows for what istio-cni cannot do: exclusions, resolvers, one family, traffic beside TCP, preservation."""

from __future__ import annotations

from support.traffic.row import DNS, IN, OUT, PEER, POD, ZT, rows
from support.traffic.world import APP, FIRST, INSIDE, LAST, OTHER

from agent.core.names import DNS_PORT, HBONE_PORT

EXCLUDED = [
    *rows(
        "excluded", "pod",
        ("to an excluded port", "tcp", "peer", 6379, "peer:6379"),
        ("just below an excluded range", "tcp", "peer", FIRST - 1, OUT),
        ("first of an excluded range", "tcp", "peer", FIRST, f"peer:{FIRST}"),
        ("inside an excluded range", "tcp", "peer", INSIDE, f"peer:{INSIDE}"),
        ("last of an excluded range", "tcp", "peer", LAST, f"peer:{LAST}"),
        ("just above an excluded range", "tcp", "peer", LAST + 1, OUT),
        ("to a port that is excluded inbound alone", "tcp", "peer", OTHER, OUT),
        ("to a port that is not excluded", "tcp", "peer", APP, OUT),
        ("of ztunnel to an excluded port", "tcp", "peer", 6379, "peer:6379", {"mark": ZT}),
        ("to its own excluded port", "tcp", "pod", FIRST, f"pod:{FIRST}"),
        ("to an excluded port", "udp", "peer", FIRST, f"peer:{FIRST}"),
        ("to an excluded network", "tcp", "net A", APP, PEER),
        ("to an excluded network's last address", "tcp", "net A's last", APP, PEER),
        ("to a network that is excluded inbound alone", "tcp", "net B", APP, OUT),
        ("of an excluded user", "tcp", "peer", APP, PEER, {"user": 1234}),
        ("of the user before", "tcp", "peer", APP, OUT, {"user": 1233}),
        ("of the user after", "tcp", "peer", APP, OUT, {"user": 1235}),
        ("of the first of excluded users", "tcp", "peer", APP, PEER, {"user": 2000}),
        ("of the last of excluded users", "tcp", "peer", APP, PEER, {"user": 2009}),
        ("of the user after them", "tcp", "peer", APP, OUT, {"user": 2010}),
        ("DNS of an excluded user", "udp", "resolver", 53, "peer:53", {"user": 1234}),
        ("DNS of an excluded user", "tcp", "resolver", 53, "peer:53", {"user": 1234}),
        ("DNS of another user", "udp", "resolver", 53, DNS, {"user": 1235}),
        ("by an excluded interface", "tcp", "peer's eth1", APP, PEER),
        ("DNS by an excluded interface", "udp", "peer's eth1", 53, "peer:53"),
        ("DNS by an excluded interface", "tcp", "peer's eth1", 53, "peer:53"),
        ("DNS to an excluded resolver", "udp", "resolver 2", 53, "peer:53"),
        ("DNS to an excluded resolver", "tcp", "resolver 2", 53, "peer:53"),
        ("DNS to an excluded network", "udp", "net A", 53, "peer:53"),
        ("DNS to another resolver", "udp", "resolver", 53, DNS),
        ("DNS to another resolver", "tcp", "resolver", 53, DNS),
    ),
    *rows(
        "excluded", "peer",
        ("to an excluded port", "tcp", "pod", OTHER, f"pod:{OTHER}"),
        ("just below an excluded range", "tcp", "pod", FIRST - 1, IN),
        ("first of an excluded range", "tcp", "pod", FIRST, f"pod:{FIRST}"),
        ("inside an excluded range", "tcp", "pod", INSIDE, f"pod:{INSIDE}"),
        ("last of an excluded range", "tcp", "pod", LAST, f"pod:{LAST}"),
        ("just above an excluded range", "tcp", "pod", LAST + 1, IN),
        ("to a port that is excluded outbound alone", "tcp", "pod", 6379, IN),
        ("from an excluded network", "tcp", "pod", APP, POD, {"source": "net B"}),
        ("from a network that is excluded outbound alone", "tcp", "pod", APP, IN, {"source": "net A"}),
        ("by an excluded interface", "tcp", "pod's eth1", APP, POD, {"source": "peer's eth1"}),
        ("closed port, by an excluded interface", "tcp", "pod's eth1", 4444, "refused", {"source": "peer's eth1"}),
        ("by the other interface", "tcp", "pod", APP, IN),
        ("HBONE", "tcp", "pod", HBONE_PORT, f"pod:{HBONE_PORT}"),
        ("a probe of the node", "tcp", "pod", APP, POD, {"source": "probe"}),
    ),
    *rows(
        "excluded", "vm",
        ("to an excluded port", "tcp", "peer", 6379, "peer:6379"),
        ("first of an excluded range", "tcp", "peer", FIRST, f"peer:{FIRST}"),
        ("last of an excluded range", "tcp", "peer", LAST, f"peer:{LAST}"),
        ("just above an excluded range", "tcp", "peer", LAST + 1, OUT),
        ("to an excluded network", "tcp", "net A", APP, PEER),
        ("DNS to an excluded resolver", "tcp", "resolver 2", 53, "peer:53"),
        ("to elsewhere", "tcp", "peer", APP, OUT),
    ),
]  # fmt: skip

FAMILIES = [
    row
    for variant, free, held in (
        ("IPv4 excluded", 4, 6), ("IPv6 excluded", 6, 4), ("IPv6 alone", 4, 6), ("IPv4 alone", 6, 4),
    )
    for row in (
        *rows(
            variant, "pod",
            ("to another pod", "tcp", "peer", APP, {free: PEER, held: OUT}),
            ("DNS", "udp", "resolver", 53, {free: "peer:53", held: DNS}),
            ("DNS", "tcp", "resolver", 53, {free: "peer:53", held: DNS}),
            ("UDP", "udp", "peer", APP, PEER),
        ),
        *rows(
            variant, "peer",
            ("plain", "tcp", "pod", APP, {free: POD, held: IN}),
            ("a probe of the node", "tcp", "pod", APP, POD, {"source": "probe"}),
        ),
    )
]  # fmt: skip

FAMILIES += [
    row
    for variant, free, held in (("virtual, IPv6 alone", 4, 6), ("virtual, IPv4 alone", 6, 4))
    for row in rows(variant, "vm", ("to elsewhere", "tcp", "peer", APP, {free: PEER, held: OUT}))
]

RESOLVERS = [
    *rows(
        "own probe", "peer",
        ("a probe of the address that is set", "tcp", "pod", APP, POD, {"source": "own probe"}),
        ("from the usual probe address", "tcp", "pod", APP, IN, {"source": "probe"}),
    ),
    *rows(
        "own probe", "pod",
        ("to the probe address that is set", "tcp", "own probe", APP, PEER),
        ("to the usual probe address", "tcp", "probe", APP, OUT),
    ),
    *rows(
        "DNS to", "pod",
        ("DNS to a resolver", "udp", "resolver", 53, DNS),
        ("DNS to a resolver", "tcp", "resolver", 53, DNS),
        ("DNS to the other resolver", "udp", "resolver 2", 53, DNS),
        ("DNS to another server", "udp", "peer", 53, "peer:53"),
        ("DNS to another server", "tcp", "peer", 53, OUT),
        ("DNS of ztunnel to a resolver", "udp", "resolver", 53, "peer:53", {"mark": ZT}),
        ("DNS of ztunnel to a resolver", "tcp", "resolver", 53, "peer:53", {"mark": ZT}),
        ("another port of a resolver", "tcp", "resolver", APP, OUT),
        ("another port of a resolver", "udp", "resolver", APP, PEER),
        ("DNS to its own address", "tcp", "pod", 53, "pod:53"),
        ("DNS to loopback", "udp", "loopback", 53, "pod:53"),
    ),
    *rows(
        "DNS to IPv4", "pod",
        ("DNS to a resolver", "udp", "resolver", 53, {4: DNS, 6: "peer:53"}),
        ("DNS to a resolver", "tcp", "resolver", 53, {4: DNS, 6: OUT}),
        ("DNS to another server", "udp", "resolver 2", 53, "peer:53"),
        ("to another pod", "tcp", "peer", APP, OUT),
    ),
    *rows(
        "DNS to, excluded", "pod",
        ("DNS to a resolver", "udp", "resolver", 53, DNS),
        ("DNS to an excluded resolver", "udp", "resolver 2", 53, "peer:53"),
        ("DNS to an excluded resolver", "tcp", "resolver 2", 53, "peer:53"),
    ),
]  # fmt: skip

# An application with CAP_NET_ADMIN can set any mark. Rules believe it; eBPF asks whose process it is.
FORGED = [
    *rows(
        "default", "pod",
        ("with ztunnel's mark, by another process", "tcp", "peer", APP, PEER,
         {"mark": ZT, "forked": True, "ebpf": {4: OUT, 6: OUT}}),
        ("the same to a service address", "tcp", "service", APP, PEER,
         {"mark": ZT, "forked": True, "ebpf": {4: OUT, 6: OUT}}),
        ("with the connection's mark, to another pod", "tcp", "peer", APP, {4: "ENETUNREACH", 6: POD},  # local
         {"mark": 0x111, "ebpf": {4: OUT, 6: OUT}}),
        ("DNS with ztunnel's mark, by another process", "udp", "resolver", 53, "peer:53",
         {"mark": ZT, "forked": True, "ebpf": {4: DNS, 6: DNS}}),
        ("by another process", "tcp", "peer", APP, OUT, {"forked": True}),
    ),
]  # fmt: skip

COUNTED = [
    *rows(
        "default", "pod",
        ("UDP is counted, and its answer", "udp", "peer", APP, PEER, {"counts": (1, 1)}),
        ("SCTP is counted", "sctp", "peer", APP, "peer:sctp", {"counts": (1, 0)}),
        ("UDP to loopback is not counted", "udp", "loopback", APP, POD, {"counts": (0, 0)}),
        ("UDP to itself is not counted", "udp", "pod", APP, POD, {"counts": (0, 0)}),
        ("ping is not counted", "icmp", "peer", 0, "answered", {"counts": (0, 0)}),
        ("captured DNS is not counted", "udp", "resolver", 53, DNS, {"counts": (0, 0)}),
        ("DNS of ztunnel is not counted", "udp", "resolver", 53, "peer:53", {"mark": ZT, "counts": (0, 0)}),
        ("TCP is not counted", "tcp", "peer", APP, OUT, {"counts": (0, 0)}),
    ),
    *rows(
        "default", "peer",
        ("UDP is counted, and its answer", "udp", "pod", APP, POD, {"counts": (1, 1)}),
        ("SCTP is counted", "sctp", "pod", APP, "pod:sctp", {"counts": (0, 1)}),
        ("ping is not counted", "icmp", "pod", 0, "answered", {"counts": (0, 0)}),
        ("TCP is not counted", "tcp", "pod", APP, IN, {"counts": (0, 0)}),
    ),
    *rows("no DNS", "pod", ("DNS is counted, and its answer", "udp", "peer", 53, "peer:53", {"counts": (1, 1)})),
    *rows("DNS to", "pod", ("DNS to another server is counted", "udp", "peer", 53, "peer:53", {"counts": (1, None)})),
]  # fmt: skip

REFUSED = [
    *rows(
        "refused", "pod",
        ("UDP", "udp", "peer", APP, "EPERM", {"counts": (1, 0)}),
        ("UDP to another pod's 15053", "udp", "peer", DNS_PORT, "EPERM", {"counts": (1, 0)}),
        # tcx drops as a queue does, which raw sockets of IPv4 are not told of.
        ("SCTP", "sctp", "peer", APP, "EPERM", {"counts": (1, 0), "ebpf": {4: "lost", 6: "ENOBUFS"}}),
        ("UDP to loopback", "udp", "loopback", APP, POD),
        ("UDP to itself", "udp", "pod", APP, POD),
        ("ping", "icmp", "peer", 0, "answered", {"counts": (0, 0)}),
        ("DNS", "udp", "peer", 53, DNS, {"counts": (0, 0)}),
        ("DNS to a resolver", "udp", "resolver", 53, DNS),
        ("DNS", "tcp", "resolver", 53, DNS),
        ("DNS of ztunnel", "udp", "resolver", 53, "peer:53", {"mark": ZT, "counts": (0, 0)}),
        ("TCP", "tcp", "peer", APP, OUT),
        ("UDP to an excluded port, and its answer", "udp", "peer", FIRST, f"peer:{FIRST}"),
        ("UDP just above an excluded range", "udp", "peer", LAST + 1, "EPERM"),
        ("UDP to an excluded network, and its answer", "udp", "net A", APP, PEER),
        ("DNS to an excluded network, and its answer", "udp", "net A", 53, "peer:53"),
        ("UDP of an excluded user, and its answer", "udp", "peer", APP, PEER, {"user": 1234}),
        ("UDP of another user", "udp", "peer", APP, "EPERM", {"user": 1235}),
        ("UDP by an excluded interface, and its answer", "udp", "peer's eth1", APP, PEER),
    ),
    *rows(
        "refused", "peer",
        ("UDP", "udp", "pod", APP, "lost", {"counts": (0, 1)}),
        ("DNS", "udp", "pod", 53, "lost", {"counts": (0, 1)}),
        ("UDP from port 53, not asked for", "udp", "pod", APP, "lost", {"from_port": 53, "counts": (0, 1)}),
        ("SCTP", "sctp", "pod", APP, "lost", {"counts": (0, 1)}),
        ("ping", "icmp", "pod", 0, "answered", {"counts": (0, 0)}),
        ("TCP", "tcp", "pod", APP, IN),
        ("a probe of the node", "tcp", "pod", APP, POD, {"source": "probe"}),
        ("UDP to an excluded port, and its answer", "udp", "pod", FIRST, f"pod:{FIRST}"),
        ("UDP just above an excluded range", "udp", "pod", LAST + 1, "lost"),
        ("UDP from an excluded network, and its answer", "udp", "pod", APP, POD, {"source": "net B"}),
        ("UDP by an excluded interface, and its answer", "udp", "pod's eth1", APP, POD, {"source": "peer's eth1"}),
    ),
    *rows("refused", "vm", ("UDP", "udp", "peer", APP, "lost", {"counts": (0, 1)})),
    *rows(
        "refused, no DNS", "pod",
        ("DNS", "udp", "resolver", 53, "EPERM", {"counts": (1, 0)}),
        ("DNS", "tcp", "resolver", 53, OUT),
        ("UDP to loopback", "udp", "loopback", 53, "pod:53"),
    ),
]  # fmt: skip

OLDER = [
    *rows(
        "preserve", "pod",
        ("a connection that is older than the rules", "tcp", "peer", 0, "survives"),
        ("to another pod", "tcp", "peer", APP, OUT),
        ("of ztunnel", "tcp", "peer", APP, PEER, {"mark": ZT}),
        ("DNS", "udp", "resolver", 53, DNS),
        ("DNS", "tcp", "resolver", 53, DNS),
        ("to its own address", "tcp", "pod", APP, POD),
    ),
    *rows(
        "preserve", "peer",
        ("a connection that is older than the rules", "tcp", "pod", 0, "survives"),
        ("plain", "tcp", "pod", APP, IN),
        ("HBONE", "tcp", "pod", HBONE_PORT, f"pod:{HBONE_PORT}"),
        ("a probe of the node", "tcp", "pod", APP, POD, {"source": "probe"}),
    ),
    *rows("abrupt", "pod", ("a connection that is older than the rules", "tcp", "peer", 0, "breaks")),
    *rows("abrupt", "peer", ("a connection that is older than the rules", "tcp", "pod", 0, "breaks")),
]  # fmt: skip
