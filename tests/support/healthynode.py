# SPDX-License-Identifier: Apache-2.0
"""A node on which every check is right, and functions that spoil one part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agent import __version__
from agent.backends.kernel_features import Feature
from agent.core.model.host import HostTable, HostView, InKernel, Variant
from agent.core.settings import Settings
from agent.diagnosis.node_facts import (
    AgentFacts,
    AttachedProgram,
    Cni,
    HostFacts,
    Left,
    Listed,
    NetworkFacts,
    NodeFacts,
    PodFacts,
    PodsFacts,
    Preflight,
    Security,
)
from agent.install import planning

NFT = (HostTable("ip", "nat", xtables=True, nat=True, rules=4),)
LEGACY = (HostTable("ip", "nat", xtables=True, nat=True, rules=3),)
VIEW = HostView(
    release="6.18",
    ipv6=True,
    nf_tables=InKernel.LOADED,
    nft=NFT,
    legacy=(),
    programs=(("iptables", "x"),),
    iptables=Variant.NFT,
)
ROW = {"namespace": "shop", "name": "web", "uid": "u1", "state": "enabled", "reason": "labelled", "error": "",
       "probe": "probe from the node on 10.0.0.2:80: ok"}  # fmt: skip
RIGHT = {"namespace": "shop", "name": "web", "state": "enabled", "result": "ok", "differences": [], "error": ""}
STATUS: dict[str, Any] = {
    "node": "n1", "version": __version__, "ready": True, "problem": "", "backend": "nftables", "backend_reason": "auto",
    "host_probes": {"mechanism": "nftables", "ok": True, "error": "", "members": 2}, "host_probes_reason": "auto",
    "ztunnel_connections": 1, "ztunnel_unacknowledged": 0, "kubernetes": "ok", "static_pods": "not set",
    "connections": [{"direction": "outbound", "fate": "captured", "reason": "", "connections": 9}],
    "damaged_state_files": [],
}  # fmt: skip
POD = PodFacts("shop/web", "/run/sluice/netns/u1", captured=True, ours=("nftables",), addresses=("10.0.0.2", "fd00::2"))
OURS = Listed("02-sluice.conflist", ("ptp", "sluice-cni"), True)
ISTIOS = Listed("02-istio-cni.conflist", ("ptp", "istio-cni"))
PRIMARY = Listed("10-kindnet.conflist", ("ptp", "portmap"))
CNI = Cni(
    managed="own",
    directory="/etc/cni/net.d",
    directory_reason="containerd says so",
    plugins="/opt/cni/bin",
    plugins_reason="containerd says so",
    files=(OURS, PRIMARY),
    verdict=planning.InstallPlan(file=OURS.name, primary=PRIMARY.name),
    runtime="containerd (process 7)",
    watched=True,
)
SYSCTLS = {
    "fs.inotify.max_user_instances": "128", "fs.inotify.max_user_watches": "9",
    "net.netfilter.nf_conntrack_count": "5", "net.netfilter.nf_conntrack_max": "1000",
}  # fmt: skip
GOOD = NodeFacts(
    Settings(),
    "defaults",
    agent=AgentFacts(
        STATUS,
        pods=(ROW,),
        verify=(RIGHT,),
        losses={"records": 0},
        pid=7,
        resident=50 << 20,
        descriptors=44,
        most_descriptors=20000,
    ),
    left=Left(why="", backend="nftables", release="6.18", damaged=(), noted=1, zds="socket"),
    cni=CNI,
    pods=PodsFacts((POD,)),
    host=NetworkFacts(VIEW, probes=("nftables",), pod_rules=(), port="the agent on 0.0.0.0:15014", port_ours=True),
    preflight=Preflight("nftables", "in use", (Feature(name="nf_tables", needed_by=("nftables",), present=True),)),
    sockets=(),
    node=HostFacts(sysctls=SYSCTLS),
    security=Security(),
)
AWAY = replace(
    GOOD,
    agent=AgentFacts({}),
    left=replace(GOOD.left, why="cannot ask the agent at /run/sluice/agent.sock: Connection refused"),
    unseen={"agent": "cannot ask the agent"},
)


def status(**changes: Any) -> NodeFacts:
    return replace(GOOD, agent=replace(GOOD.agent, status={**STATUS, **changes}))


def agent(**changes: Any) -> NodeFacts:
    return replace(GOOD, agent=replace(GOOD.agent, **changes))


def cni(**changes: Any) -> NodeFacts:
    return replace(GOOD, cni=replace(CNI, **changes))


def pod(**changes: Any) -> NodeFacts:
    return replace(GOOD, pods=PodsFacts((replace(POD, **changes),)))


def view(**changes: Any) -> NodeFacts:
    return replace(GOOD, host=replace(GOOD.host, view=replace(VIEW, **changes)))


def node(**changes: Any) -> NodeFacts:
    return replace(GOOD, node=replace(GOOD.node, **changes))


def rows(**changes: Any) -> NodeFacts:
    return agent(pods=({**ROW, **changes},))


def sysctl(name: str, value: str) -> NodeFacts:
    return node(sysctls={**SYSCTLS, name: value})


def settings(**changes: Any) -> NodeFacts:
    return replace(GOOD, settings=replace(GOOD.settings, **changes))


def sockets(*found: AttachedProgram) -> NodeFacts:
    return replace(GOOD, sockets=found)


def feature(**changes: Any) -> NodeFacts:
    made = replace(
        Feature(
            name="meta mark",
            needed_by=("nftables",),
            present=False,
            words="Operation not supported",
            remedy="modprobe x",
        ),
        **changes,
    )
    return replace(GOOD, preflight=replace(GOOD.preflight, features=(made,)))
