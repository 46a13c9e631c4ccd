# SPDX-License-Identifier: Apache-2.0
"""Named numbers of netlink messages are those of the kernel's headers, asked of a C compiler."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

from agent.core.wire import nftables, rtnetlink
from agent.kernel.netlink import ctnetlink, ipset

PREFIXES: dict[type[IntEnum], str] = {
    rtnetlink.Rtm: "RTM_",
    rtnetlink.Group: "RTNLGRP_",
    rtnetlink.Ifla: "IFLA_",
    rtnetlink.LinkInfo: "IFLA_INFO_",
    rtnetlink.LinkXdp: "IFLA_XDP_",
    rtnetlink.Ifa: "IFA_",
    rtnetlink.Rta: "RTA_",
    rtnetlink.Fra: "FRA_",
    rtnetlink.Action: "FR_ACT_",
    rtnetlink.RouteType: "RTN_",
    rtnetlink.Table: "RT_TABLE_",
    rtnetlink.Scope: "RT_SCOPE_",
    nftables.Table: "NFTA_TABLE_",
    nftables.TableFlag: "NFT_TABLE_F_",
    nftables.Chain: "NFTA_CHAIN_",
    nftables.Hook: "NFTA_HOOK_",
    nftables.Rule: "NFTA_RULE_",
    nftables.Set: "NFTA_SET_",
    nftables.SetFlag: "NFT_SET_",
    nftables.SetDesc: "NFTA_SET_DESC_",
    nftables.SetElemList: "NFTA_SET_ELEM_LIST_",
    nftables.SetElem: "NFTA_SET_ELEM_",
    nftables.Gen: "NFTA_GEN_",
    nftables.Expr: "NFTA_EXPR_",
    nftables.Data: "NFTA_DATA_",
    nftables.Verdict: "NFTA_VERDICT_",
    nftables.VerdictCode: "NFT_",
    nftables.Immediate: "NFTA_IMMEDIATE_",
    nftables.Bitwise: "NFTA_BITWISE_",
    nftables.Byteorder: "NFTA_BYTEORDER_",
    nftables.Cmp: "NFTA_CMP_",
    nftables.CmpOp: "NFT_CMP_",
    nftables.Counter: "NFTA_COUNTER_",
    nftables.Ct: "NFTA_CT_",
    nftables.CtKey: "NFT_CT_",
    nftables.Lookup: "NFTA_LOOKUP_",
    nftables.Meta: "NFTA_META_",
    nftables.MetaKey: "NFT_META_",
    nftables.Nat: "NFTA_NAT_",
    nftables.NatType: "NFT_NAT_",
    nftables.Payload: "NFTA_PAYLOAD_",
    nftables.PayloadBase: "NFT_PAYLOAD_",
    nftables.Redir: "NFTA_REDIR_",
    nftables.Reject: "NFTA_REJECT_",
    nftables.XtMatch: "NFTA_MATCH_",
    nftables.XtTarget: "NFTA_TARGET_",
    ctnetlink.Cta: "CTA_",
    ctnetlink.Tuple: "CTA_TUPLE_",
    ctnetlink.Ip: "CTA_IP_",
    ctnetlink.Proto: "CTA_PROTO_",
    ctnetlink.ProtoInfo: "CTA_PROTOINFO_",
    ctnetlink.ProtoInfoTcp: "CTA_PROTOINFO_TCP_",
    ctnetlink.TcpConntrack: "TCP_CONNTRACK_",
    ipset.Attribute: "IPSET_ATTR_",
    ipset.MemberAttribute: "IPSET_ATTR_",
}
CONSTANTS = {
    "NETLINK_NETFILTER": nftables.NETLINK_NETFILTER,
    "NFPROTO_INET": nftables.NFPROTO_INET,
    "NFPROTO_IPV4": nftables.NFPROTO_IPV4,
    "NFPROTO_IPV6": nftables.NFPROTO_IPV6,
    "NFNLGRP_NFTABLES": nftables.GROUP_NFTABLES,
    "NFNL_MSG_BATCH_BEGIN": nftables.BATCH_BEGIN,
    "NFNL_MSG_BATCH_END": nftables.BATCH_END,
    "NFNL_BATCH_GENID": nftables.BATCH_GENID,
    "NFTA_LIST_ELEM": nftables.LIST_ELEM,
    "NFT_REG_VERDICT": nftables.REG_VERDICT,
    "NFT_REG_1": nftables.REG_1,
    "NFT_SET_ELEM_INTERVAL_END": nftables.SET_ELEM_INTERVAL_END,
    "NFT_BYTEORDER_HTON": nftables.BYTEORDER_HTON,
    "NFT_REJECT_ICMPX_UNREACH": nftables.REJECT_ICMPX_UNREACH,
    "NFT_REJECT_ICMPX_ADMIN_PROHIBITED": nftables.ICMPX_ADMIN_PROHIBITED,
    "NFNLGRP_CONNTRACK_NEW": ctnetlink.GROUP_NEW,
    "(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET)": ctnetlink.CT_GET,
    "(NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_DESTROY)": ipset.DESTROY,
    "(NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_LIST)": ipset.LIST,
    **{
        f"(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_{name})": value
        for name, value in vars(nftables).items()
        if name.startswith(("NEW", "GET", "DEL"))
    },
}
# Younger than the headers of Debian 12.
YOUNGER = {"FRA_DSCP", "FRA_FLOWLABEL", "NFT_TABLE_F_PERSIST"}
# Named otherwise in the headers.
OTHERWISE = {"FRA_IIFNAME": "FRA_IFNAME", "NFT_DROP": "NF_DROP", "NFT_ACCEPT": "NF_ACCEPT"}


def named() -> Iterator[tuple[str, int]]:
    for kind, prefix in PREFIXES.items():
        for member in kind:
            name = prefix + member.name
            yield OTHERWISE.get(name, name), member.value
    yield from CONSTANTS.items()


def test_every_number_is_the_kernels(tmp_path: Path) -> None:
    checks = [f'_Static_assert({name} == {value}, "{name}");' for name, value in named() if name not in YOUNGER]
    assert len(checks) > 200
    source = tmp_path / "numbers.c"
    netfilter = ("nfnetlink", "nf_tables", "nf_tables_compat", "nfnetlink_conntrack", "ipset/ip_set")
    headers = ["netlink", "rtnetlink", "fib_rules", "if_link", "if_addr", "netfilter", "netfilter/nf_conntrack_tcp"]
    headers += [f"netfilter/{name}" for name in netfilter]
    source.write_text("\n".join([*(f"#include <linux/{name}.h>" for name in headers), *checks, ""]))
    done = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
