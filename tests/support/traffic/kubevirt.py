# SPDX-License-Identifier: Apache-2.0
"""A KubeVirt pod: the machine hangs on a bridge, k6t-eth0, and the pod masquerades for it (nf_tables).

PLAIN is what virt-launcher sets up for the masquerade binding; AMBIENT is its layout for ambient meshes (proposed by
KubeVirt in 2026): its inbound chain comes behind the mesh's, HBONE stays in the pod, what the proxy sends to the pod's
own address goes on to the machine, and the machine's answers to it are marked as the mesh marks them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from support.traffic.world import ADDRESSES, BEHIND, World, sized, world

from agent.kernel.exec import run
from agent.lab.links import links

BRIDGE = "k6t-eth0"
PLAIN, AMBIENT = "plain", "ambient"
_NAT = """table {ip} nat {{
  chain prerouting {{ type nat hook prerouting priority {priority}; }}
  chain input {{ type nat hook input priority 100; }}
  chain output {{ type nat hook output priority -100; }}
  chain postrouting {{ type nat hook postrouting priority 100; }}
  chain KUBEVIRT_PREINBOUND {{ {hbone} counter dnat to {vm}; }}
  chain KUBEVIRT_POSTINBOUND {{ {ip} saddr {{ {loopback} }} counter snat to {gateway}; }}
}}
add rule {ip} nat postrouting {ip} saddr {vm} counter masquerade
add rule {ip} nat prerouting iifname "eth0" counter jump KUBEVIRT_PREINBOUND
add rule {ip} nat postrouting oifname "k6t-eth0" counter jump KUBEVIRT_POSTINBOUND
add rule {ip} nat output {ip} daddr {{ {own} }} counter dnat to {vm}
"""
_MARKS = """table {ip} kubevirt {{
  chain KUBEVIRT_AMBIENT_PREROUTING {{
    type filter hook prerouting priority -150;
    iifname "k6t-eth0" ct mark & 0xfff == 0x539 counter meta mark set 0x111
  }}
  chain KUBEVIRT_AMBIENT_POSTROUTING {{
    type filter hook postrouting priority -150;
    oifname "k6t-eth0" ct direction original meta mark & 0xfff == 0x539 counter ct mark set 0x539
  }}
}}
"""


@contextlib.contextmanager
def machine() -> Iterator[World]:
    """The world with its virtual machine on a bridge and hidden behind the pod; without any rules."""
    with world() as made:
        own = [sized("gateway", family) for family in (4, 6)]
        with links(made.pod.name) as pod:
            for address in own:
                pod.rtnl.addr("del", index=pod.index("k6t0"), address=address)
            pod.bridge(BRIDGE)
            pod.up("k6t0", master=BRIDGE)
            pod.add_addresses(BRIDGE, *own)
        with links(made.peer.name) as peer:
            for network in BEHIND.values():
                peer.rtnl.route("del", dst=network)
        yield made


def masquerade(made: World, layout: str) -> None:
    """What KubeVirt does when the machine starts, in both families."""
    for family, ip in ((4, "ip"), (6, "ip6")):
        loopback, pod = ADDRESSES["loopback"][family], ADDRESSES["pod"][family]
        words = {
            "ip": ip,
            "vm": ADDRESSES["vm"][family],
            "gateway": ADDRESSES["gateway"][family],
            "loopback": loopback,
            "own": f"{loopback}, {pod}" if layout == AMBIENT else loopback,
            "priority": -99 if layout == AMBIENT else -100,
            "hbone": "tcp dport 15008 counter return;" if layout == AMBIENT else "",
        }
        script = _NAT.format(**words) + (_MARKS.format(**words) if layout == AMBIENT else "")
        run(["nft", "-f", "-"], netns=made.pod.path, stdin=script)
