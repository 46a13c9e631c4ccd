# SPDX-License-Identifier: Apache-2.0
"""What the rules beside TCP have counted in a pod, read with each mechanism's own tool."""

from __future__ import annotations

import re

from support import bpftool
from support.ebpf import EbpfNode
from support.rules import Pod

CHAINS = {"nftables": ("istio-output", "istio-prerouting"), "xtables": ("ISTIO_OUTPUT", "ISTIO_PRERT")}


def counted(pod: Pod, mechanism: str, family: int, node: EbpfNode | None = None) -> tuple[int, int]:
    """Packets outbound and inbound. The rule that counts is the last of its chain and family."""
    if node:
        return _of_map(node, pod.target.netns.id.cookie)
    if mechanism == "nftables":
        out, into = (pod.sh(f"nft list chain inet istio-ambient-mangle {chain}") for chain in CHAINS["nftables"])
        wanted = re.compile(rf"meta nfproto ipv{family} counter packets (\d+) ")
        return int(wanted.findall(out)[-1]), int(wanted.findall(into)[-1])
    program = f"{'ip' if family == 4 else 'ip6'}tables-{'legacy' if mechanism == 'iptables-legacy' else 'nft'}"
    out, into = (pod.sh(f"{program} -t mangle -L {chain} -v -x -n") for chain in CHAINS["xtables"])
    return _last(out), _last(into)


def _last(listing: str) -> int:
    return int(listing.strip().splitlines()[-1].split()[0])


def _of_map(node: EbpfNode, cookie: int) -> tuple[int, int]:
    """As bpftool shows it: a value for each CPU."""
    found = [0, 0]
    for each in bpftool.shown("map", "dump", "pinned", str(node.pins.maps / "beside")):
        key = each["formatted"]["key"]
        if key["cookie"] == cookie:
            found[key["direction"]] += sum(one["value"]["packets"] for one in each["formatted"]["values"])
    return found[0], found[1]
