# SPDX-License-Identifier: Apache-2.0
"""nf_tables messages: numbers of linux/netfilter/nf_tables.h and nfnetlink.h by name, and a command of a batch. Pure.

A test compares the numbers with the headers. Integers in nf_tables messages are in network order (unpack_be).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from agent.core.wire.netlink import attributes

NETLINK_NETFILTER = 12
NFGENMSG = struct.Struct(">BBH")  # family, version, resource id; before the attributes of each netfilter message
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NFPROTO = {4: NFPROTO_IPV4, 6: NFPROTO_IPV6}
GROUP_NFTABLES = 7  # NFNLGRP_NFTABLES

SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
BATCH_BEGIN, BATCH_END = 0x10, 0x11  # NFNL_MSG_BATCH_*
BATCH_GENID = 1  # NFNL_BATCH_GENID

_MESSAGES = SUBSYSTEM << 8
NEWTABLE, GETTABLE, DELTABLE = _MESSAGES | 0, _MESSAGES | 1, _MESSAGES | 2
NEWCHAIN, GETCHAIN, DELCHAIN = _MESSAGES | 3, _MESSAGES | 4, _MESSAGES | 5
NEWRULE, GETRULE = _MESSAGES | 6, _MESSAGES | 7
NEWSET, GETSET = _MESSAGES | 9, _MESSAGES | 10
NEWSETELEM, GETSETELEM, DELSETELEM = _MESSAGES | 12, _MESSAGES | 13, _MESSAGES | 14
NEWGEN, GETGEN = _MESSAGES | 15, _MESSAGES | 16

LIST_ELEM = 1  # NFTA_LIST_ELEM: the type of every element of a list
REG_VERDICT, REG_1 = 0, 1  # NFT_REG_*: registers that the expressions load and compare
SET_ELEM_INTERVAL_END = 1  # NFT_SET_ELEM_INTERVAL_END, of SetElem.FLAGS
BYTEORDER_HTON = 1  # NFT_BYTEORDER_HTON
REJECT_ICMPX_UNREACH = 2  # NFT_REJECT_ICMPX_UNREACH
ICMPX_ADMIN_PROHIBITED = 3  # NFT_REJECT_ICMPX_ADMIN_PROHIBITED


class Table(IntEnum):
    """NFTA_TABLE_*: attributes of a table."""

    NAME = 1
    FLAGS = 2
    USE = 3
    HANDLE = 4
    USERDATA = 6
    OWNER = 7


class TableFlag(IntEnum):
    """NFT_TABLE_F_*: the chains are not called; a foreign flush skips it; it stays when the owner's socket closes."""

    DORMANT = 1
    OWNER = 2
    PERSIST = 4


class Chain(IntEnum):
    """NFTA_CHAIN_*: attributes of a chain."""

    TABLE = 1
    NAME = 3
    HOOK = 4
    POLICY = 5
    USE = 6
    TYPE = 7
    USERDATA = 12


class Hook(IntEnum):
    """NFTA_HOOK_*: attributes nested in Chain.HOOK."""

    HOOKNUM = 1
    PRIORITY = 2


class Rule(IntEnum):
    """NFTA_RULE_*: attributes of a rule."""

    TABLE = 1
    CHAIN = 2
    EXPRESSIONS = 4
    USERDATA = 7


class Set(IntEnum):
    """NFTA_SET_*: attributes of a set."""

    TABLE = 1
    NAME = 2
    FLAGS = 3
    KEY_TYPE = 4
    KEY_LEN = 5
    DESC = 9
    ID = 10
    USERDATA = 13


class SetFlag(IntEnum):
    """NFT_SET_*: flags of a set."""

    ANONYMOUS = 1
    CONSTANT = 2
    INTERVAL = 4


class SetDesc(IntEnum):
    """NFTA_SET_DESC_*: attributes nested in Set.DESC."""

    SIZE = 1


class SetElemList(IntEnum):
    """NFTA_SET_ELEM_LIST_*: attributes of a message with elements of a set."""

    TABLE = 1
    SET = 2
    ELEMENTS = 3
    SET_ID = 4


class SetElem(IntEnum):
    """NFTA_SET_ELEM_*: attributes of an element of a set."""

    KEY = 1
    FLAGS = 3
    USERDATA = 6


class Gen(IntEnum):
    """NFTA_GEN_*: attributes of the generation."""

    ID = 1
    PROC_PID = 2
    PROC_NAME = 3


class Expr(IntEnum):
    """NFTA_EXPR_*: attributes of an expression of a rule."""

    NAME = 1
    DATA = 2


class Data(IntEnum):
    """NFTA_DATA_*: attributes of a value that an expression holds."""

    VALUE = 1
    VERDICT = 2


class Verdict(IntEnum):
    """NFTA_VERDICT_*: attributes nested in Data.VERDICT."""

    CODE = 1
    CHAIN = 2


class VerdictCode(IntEnum):
    """NF_* and NFT_*: codes of verdicts."""

    DROP = 0
    ACCEPT = 1
    JUMP = -3
    GOTO = -4
    RETURN = -5

    @property
    def unsigned(self) -> int:
        """Returns the code as the u32 of a message."""
        return self & 0xFFFFFFFF


class Immediate(IntEnum):
    """NFTA_IMMEDIATE_*: attributes of expression immediate."""

    DREG = 1
    DATA = 2


class Bitwise(IntEnum):
    """NFTA_BITWISE_*: attributes of expression bitwise."""

    SREG = 1
    DREG = 2
    LEN = 3
    MASK = 4
    XOR = 5
    OP = 6


class Byteorder(IntEnum):
    """NFTA_BYTEORDER_*: attributes of expression byteorder."""

    SREG = 1
    DREG = 2
    OP = 3
    LEN = 4
    SIZE = 5


class Cmp(IntEnum):
    """NFTA_CMP_*: attributes of expression cmp."""

    SREG = 1
    OP = 2
    DATA = 3


class CmpOp(IntEnum):
    """NFT_CMP_*: operators of expression cmp."""

    EQ = 0
    NEQ = 1


class Counter(IntEnum):
    """NFTA_COUNTER_*: attributes of expression counter."""

    BYTES = 1
    PACKETS = 2


class Ct(IntEnum):
    """NFTA_CT_*: attributes of expression ct."""

    DREG = 1
    KEY = 2
    DIRECTION = 3
    SREG = 4


class CtKey(IntEnum):
    """NFT_CT_*: keys of expression ct."""

    STATE = 0
    STATUS = 2
    MARK = 3
    ZONE = 17


class Lookup(IntEnum):
    """NFTA_LOOKUP_*: attributes of expression lookup."""

    SET = 1
    SREG = 2
    SET_ID = 4
    FLAGS = 5


class Meta(IntEnum):
    """NFTA_META_*: attributes of expression meta."""

    DREG = 1
    KEY = 2
    SREG = 3


class MetaKey(IntEnum):
    """NFT_META_*: keys of expression meta."""

    MARK = 3
    IIFNAME = 6
    OIFNAME = 7
    SKUID = 10
    NFPROTO = 15
    L4PROTO = 16


class Nat(IntEnum):
    """NFTA_NAT_*: attributes of expression nat."""

    TYPE = 1
    FAMILY = 2
    REG_ADDR_MIN = 3
    REG_ADDR_MAX = 4
    FLAGS = 7


class NatType(IntEnum):
    """NFT_NAT_*: types of expression nat."""

    SNAT = 0
    DNAT = 1


class Payload(IntEnum):
    """NFTA_PAYLOAD_*: attributes of expression payload."""

    DREG = 1
    BASE = 2
    OFFSET = 3
    LEN = 4


class PayloadBase(IntEnum):
    """NFT_PAYLOAD_*: headers that expression payload loads from."""

    NETWORK_HEADER = 1
    TRANSPORT_HEADER = 2


class Redir(IntEnum):
    """NFTA_REDIR_*: attributes of expression redir."""

    REG_PROTO_MIN = 1
    REG_PROTO_MAX = 2
    FLAGS = 3


class Reject(IntEnum):
    """NFTA_REJECT_*: attributes of expression reject."""

    TYPE = 1
    ICMP_CODE = 2


class XtMatch(IntEnum):
    """NFTA_MATCH_*: attributes of a match of xtables within a rule."""

    NAME = 1
    INFO = 3


class XtTarget(IntEnum):
    """NFTA_TARGET_*: attributes of a target of xtables within a rule."""

    NAME = 1
    INFO = 3


@dataclass(frozen=True, slots=True)
class Command:
    """One message of a batch: a type such as NEWRULE, NLM_F_* flags, the family and the attributes."""

    kind: int
    flags: int
    family: int
    body: bytes


def fields(body: bytes) -> dict[int, bytes]:
    """Returns the attributes of a netfilter message, by type, from its body."""
    return dict(attributes(body[NFGENMSG.size :]))
