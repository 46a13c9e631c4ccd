# SPDX-License-Identifier: Apache-2.0
"""The report's texts of links, addresses, routes and rules have what `ip` made in a namespace."""

from __future__ import annotations

import pytest

from agent.diagnosis import network
from agent.kernel import scratch
from agent.kernel.exec import run

pytestmark = pytest.mark.root
COMMANDS = """
link add v0 type veth peer name v1
link set v0 up
link set v1 up
addr add 10.7.0.1/24 dev v0
route add 10.8.0.0/16 via 10.7.0.2
route add 10.9.0.0/16 nexthop via 10.7.0.3 nexthop via 10.7.0.4
route add local 0.0.0.0/0 dev v0 table 300
rule add from 10.0.0.0/8 fwmark 0x111/0xfff lookup 100 pref 700
rule add goto 700 pref 600
neigh add 10.7.0.9 lladdr 02:00:00:00:00:09 dev v0
"""


def test_texts_of_a_namespace() -> None:
    def read() -> dict[str, str]:
        run(["ip", "-batch", "-"], stdin=COMMANDS)
        run(["ip", "-6", "rule", "add", "iif", "v0", "blackhole", "pref", "601"])
        return {kind: network.show(kind) for kind in network.READERS}

    shown = scratch.call(read)
    assert "table 100 priority 700 fwmark 0x111 fwmask 0xfff src 10.0.0.0/8 family ipv4" in shown["rules"]
    assert "priority 600 goto 700 family ipv4 action FR_ACT_GOTO" in shown["rules"]
    assert "iifname v0 priority 601 family ipv6 action FR_ACT_BLACKHOLE" in shown["rules6"]
    assert "table 254 dst 10.8.0.0/16 gateway 10.7.0.2 oif v0 family ipv4 proto boot type unicast" in shown["routes"]
    assert "gateway 10.7.0.3" in shown["routes"] and "gateway 10.7.0.4" in shown["routes"]
    assert "table 300 oif v0 family ipv4" in shown["routes"]
    assert "dst fe80::/64" in shown["routes6"]
    assert "ifname v0" in shown["addresses"] and "(info_kind veth)" in shown["addresses"]
    assert "address 10.7.0.1 local 10.7.0.1" in shown["addresses"]
    assert "dst 10.7.0.9 lladdr 02:00:00:00:00:09" in shown["neighbours"]
