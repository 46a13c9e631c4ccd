# SPDX-License-Identifier: Apache-2.0
"""istio-cni's rules for the same pod, written by hand from docs/design/istio-cni.md (2.3, 2.4 and 2.6), not rendered.

Knows the variants that istio-cni has: DNS capture, bypass of inbound capture, virtual interfaces; always IPv4 and IPv6.
"""

from __future__ import annotations

import socket
from pathlib import Path

from support.rules import Pod

from agent.core.model.redirect import Redirect
from agent.core.wire.rtnetlink import LOOPBACK_INDEX
from agent.kernel.exec import run
from agent.lab.links import links

ISTIO = ("istio-iptables", "istio-nftables")
_PROBE = {4: "169.254.7.127/32", 6: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}
_LOOPBACK = {4: "127.0.0.1/32", 6: "::1/128"}


def apply(pod: Pod, mechanism: str, want: Redirect) -> None:
    """Into a pod without rules."""
    route_marked(pod.path)
    if mechanism == "istio-nftables":
        run(["nft", "-f", "-"], netns=pod.path, stdin=nftables(want))
        return
    for family, program in ((4, "iptables-nft-restore"), (6, "ip6tables-nft-restore")):
        run([program, "--noflush"], netns=pod.path, stdin=iptables(want, family))


def route_marked(namespace: str | Path) -> None:
    """Delivers what ztunnel has marked to lo, in both families."""
    with links(namespace) as inside:
        for family in (socket.AF_INET, socket.AF_INET6):
            inside.rtnl.rule("add", family=family, fwmark=0x111, fwmask=0xFFF, table=100, priority=32764)
            way = {"type": "local", "scope": "host", "proto": "boot", "oif": LOOPBACK_INDEX}
            inside.rtnl.route("add", family=family, table=100, **way)


def remove(pod: Pod, mechanism: str) -> None:
    pod.sh("ip rule del pref 32764; ip -6 rule del pref 32764; ip route flush table 100; ip -6 route flush table 100")
    if mechanism == "istio-nftables":
        for table in ("nat", "mangle", "raw"):
            pod.sh(f"nft add table inet istio-ambient-{table}; nft delete table inet istio-ambient-{table}")
        return
    for family in (4, 6):  # tables of iptables-nft are nf_tables' own
        for table in ("nat", "mangle", "raw"):
            pod.sh(f"nft delete table {'ip6' if family == 6 else 'ip'} {table}", check=False)


def iptables(want: Redirect, family: int) -> str:
    """Input of iptables-restore --noflush."""
    probe, loopback = _PROBE[family], _LOOPBACK[family]
    nat = [":ISTIO_OUTPUT - [0:0]", ":ISTIO_PRERT - [0:0]", "-A OUTPUT -j ISTIO_OUTPUT", "-A PREROUTING -j ISTIO_PRERT"]
    for interface in want.virtual_interfaces:
        nat.append(f"-A ISTIO_PRERT -i {interface} -p tcp -j REDIRECT --to-ports 15001")
        nat.append(f"-A ISTIO_PRERT -i {interface} -p tcp -j RETURN")
    if not want.ingress_only:
        nat.append(f"-A ISTIO_PRERT -s {probe} -p tcp -m tcp -j ACCEPT")
    nat.append(f"-A ISTIO_OUTPUT -d {probe} -p tcp -m tcp -j ACCEPT")
    if not want.ingress_only:
        nat.append(f"-A ISTIO_PRERT ! -d {loopback} -p tcp ! --dport 15008"
                   " -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006")  # fmt: skip
    if want.dns:
        nat.append("-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff"
                   " -m udp --dport 53 -j REDIRECT --to-port 15053")  # fmt: skip
        nat.append(f"-A ISTIO_OUTPUT ! -d {loopback} -p tcp --dport 53"
                   " -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053")  # fmt: skip
    nat.append("-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT")
    nat.append(f"-A ISTIO_OUTPUT ! -d {loopback} -o lo -j ACCEPT")
    nat.append(f"-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001")
    text = _MANGLE + "\n".join(["*nat", *nat, "COMMIT", ""])
    return text + (_RAW if want.dns else "")


_MANGLE = """*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
"""
_RAW = """*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
"""


def nftables(want: Redirect) -> str:
    """A script for nft -f."""
    text = _HEAD
    for name in want.virtual_interfaces:
        text += f'add rule {_NAT} istio-prerouting iifname "{name}" meta l4proto tcp counter redirect to :15001\n'
        text += f'add rule {_NAT} istio-prerouting iifname "{name}" meta l4proto tcp counter return\n'
    text += "" if want.ingress_only else _PROBE_SOURCE
    text += _PROBE_DESTINATION
    text += "" if want.ingress_only else _INBOUND
    text += _DNS if want.dns else ""
    return text + _OUTBOUND + _NFT_MANGLE + (_NFT_RAW if want.dns else "")


_NAT = "inet istio-ambient-nat"
_HEAD = f"""add table {_NAT}
flush table {_NAT}
add chain {_NAT} prerouting {{ type nat hook prerouting priority -100; }}
add chain {_NAT} output {{ type nat hook output priority -100; }}
add chain {_NAT} istio-prerouting
add chain {_NAT} istio-output
add rule {_NAT} output jump istio-output
add rule {_NAT} prerouting jump istio-prerouting
"""
_PROBE_SOURCE = f"""add rule {_NAT} istio-prerouting meta l4proto tcp ip saddr 169.254.7.127 counter accept
add rule {_NAT} istio-prerouting meta l4proto tcp ip6 saddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter accept
"""
_PROBE_DESTINATION = f"""add rule {_NAT} istio-output meta l4proto tcp ip daddr 169.254.7.127 counter accept
add rule {_NAT} istio-output meta l4proto tcp ip6 daddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter accept
"""
_MARKED, _UNMARKED = "meta mark & 0xfff == 0x539", "meta mark & 0xfff != 0x539"
_INBOUND = f"""\
add rule {_NAT} istio-prerouting ip daddr != 127.0.0.1/32 tcp dport != 15008 {_UNMARKED} counter redirect to :15006
add rule {_NAT} istio-prerouting ip6 daddr != ::1/128 tcp dport != 15008 {_UNMARKED} counter redirect to :15006
"""
_DNS = f"""add rule {_NAT} istio-output oifname != "lo" {_UNMARKED} udp dport 53 counter redirect to :15053
add rule {_NAT} istio-output ip daddr != 127.0.0.1/32 tcp dport 53 {_UNMARKED} counter redirect to :15053
add rule {_NAT} istio-output ip6 daddr != ::1/128 tcp dport 53 {_UNMARKED} counter redirect to :15053
"""
_OUTBOUND = f"""add rule {_NAT} istio-output meta l4proto tcp meta mark & 0xfff == 0x111 counter accept
add rule {_NAT} istio-output oifname "lo" ip daddr != 127.0.0.1/32 counter accept
add rule {_NAT} istio-output oifname "lo" ip6 daddr != ::1/128 counter accept
add rule {_NAT} istio-output meta l4proto tcp ip daddr != 127.0.0.1/32 {_UNMARKED} counter redirect to :15001
add rule {_NAT} istio-output meta l4proto tcp ip6 daddr != ::1/128 {_UNMARKED} counter redirect to :15001
"""
_TABLE = """add table inet istio-ambient-{0}
flush table inet istio-ambient-{0}
add chain inet istio-ambient-{0} prerouting {{ type filter hook prerouting priority {1}; }}
add chain inet istio-ambient-{0} output {{ type {2} hook output priority {1}; }}
add chain inet istio-ambient-{0} istio-prerouting
add chain inet istio-ambient-{0} istio-output
add rule inet istio-ambient-{0} prerouting jump istio-prerouting
add rule inet istio-ambient-{0} output jump istio-output
"""
_SET = "counter ct mark set ct mark & 0xfffff000 | 0x111"
_NFT_MANGLE = (
    _TABLE.format("mangle", -150, "route")
    + f"""\
add rule inet istio-ambient-mangle istio-prerouting {_MARKED} {_SET}
add rule inet istio-ambient-mangle istio-output ct mark & 0xfff == 0x111 counter meta mark set ct mark
"""
)
_NFT_RAW = (
    _TABLE.format("raw", -300, "filter")
    + f"""\
add rule inet istio-ambient-raw istio-output udp dport 53 {_MARKED} counter ct zone set 1
add rule inet istio-ambient-raw istio-prerouting udp sport 53 {_UNMARKED} counter ct zone set 1
"""
)
