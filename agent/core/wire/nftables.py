"""nf_tables messages: numbers of linux/netfilter/nf_tables.h and nfnetlink.h, and a command of a batch. Pure."""

from __future__ import annotations

from dataclasses import dataclass

NETLINK_NETFILTER = 12
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES

_SUBSYSTEM = 10 << 8
NEWTABLE, GETTABLE, DELTABLE = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
NEWCHAIN, GETCHAIN, DELCHAIN = _SUBSYSTEM | 3, _SUBSYSTEM | 4, _SUBSYSTEM | 5
NEWRULE, GETRULE = _SUBSYSTEM | 6, _SUBSYSTEM | 7
NEWSET, GETSET, DELSET = _SUBSYSTEM | 9, _SUBSYSTEM | 10, _SUBSYSTEM | 11
NEWSETELEM, GETSETELEM, DELSETELEM = _SUBSYSTEM | 12, _SUBSYSTEM | 13, _SUBSYSTEM | 14
NEWGEN, GETGEN = _SUBSYSTEM | 15, _SUBSYSTEM | 16


@dataclass(frozen=True, slots=True)
class Command:
    """One message of a batch: a type such as NEWRULE, NLM_F_* flags, the family and the attributes."""

    kind: int
    flags: int
    family: int
    body: bytes
