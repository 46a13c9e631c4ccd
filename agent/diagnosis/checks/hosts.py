# SPDX-License-Identifier: Apache-2.0
"""Checks of the node's own namespace: Sluice's rules, misplaced rules, programs that flush them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.remedies import start

_FLUSHES = {
    "firewalld": "its reload empties every table that it can",
    "kube-router": "it writes whole tables with iptables-restore",
    "nftables": "its restart begins with flush ruleset",
    "ufw": "its reload removes and adds all chains of its own",
}


@check(
    "host-rules",
    "no rules of pods in the node's own namespace",
    problems="P10 P53",
    needs="host",
    fine="no rules of pods in the node's own namespace",
)
def _pod_rules(facts: NodeFacts) -> Iterator[CheckLine]:
    if facts.host.pod_rules:
        yield wrong(
            f"in the node's own namespace: {', '.join(facts.host.pod_rules)}",
            "an agent mistook it for a pod's: the node's own traffic goes to a proxy that does not exist",
            "nft list ruleset; iptables-save | grep ISTIO; remove these chains, then find out which agent it was",
        )


@check("probe-exemption", "the node's probes bypass ztunnel", problems="P12 P13 P35", needs="host")
def _exemption(facts: NodeFacts) -> Iterator[CheckLine]:
    exemption: Mapping[str, object] = facts.agent.status.get("host_probes", {})
    reason = facts.agent.status.get("host_probes_reason", "")
    if exemption.get("mechanism") == "off":
        yield warning(
            f"the node's probes are captured ({reason})",
            "host_probes is off: kubelet's probes go through ztunnel, and fail where it needs an identity",
            "set host_probes: auto, unless this is intended",
        )
    elif exemption.get("error"):
        yield wrong(
            f"{exemption['mechanism']}: {exemption['error']}",
            "probes of the node reach ztunnel instead of the pod, and pods are restarted",
            "sluice verify --all --repair; sluice preflight",
        )
    elif exemption:
        yield ok(f"{exemption.get('members')} addresses by {exemption.get('mechanism')} ({reason})")
    elif facts.pods.noted and not facts.host.probes:
        yield wrong(
            "pods are captured, but the node has no probe exemption",
            "it was flushed, and no agent runs to restore it",
            start(facts),
        )
    elif facts.host.probes:
        yield ok(f"by {', '.join(facts.host.probes)}; no agent maintains it")
    else:
        yield unknown("no agent and no captured pod: no exemption needed")


@check(
    "firewall",
    "programs that flush the host's rules",
    problems="P12",
    needs="node",
    fine=f"none of {', '.join(_FLUSHES)} is active",
)
def _firewall(facts: NodeFacts) -> Iterator[CheckLine]:
    mechanism = facts.agent.status.get("host_probes", {}).get("mechanism", "")
    for name in facts.node.firewalls:
        yield warning(
            f"{name} is active: {_FLUSHES[name]}",
            f"the agent restores flushed rules{'' if mechanism == 'nftables' else ', but cannot prevent the flush'}",
            "none, while an agent runs; host_probes: nftables protects Sluice's table (Linux 6.9)",
        )


@check(
    "probe-path",
    "other data paths that divert the node's probes",
    problems="P42 P43 P45",
    needs="node",
    fine="no known setting of Cilium or Calico diverts probes",
)
def _paths(facts: NodeFacts) -> Iterator[CheckLine]:
    """Reports what diverts the node's probes, in addition to the canary; alone only where it always does."""
    values = facts.node.cilium
    if values.get("enable-bpf-masquerade") == "true":
        yield warning(
            "Cilium: enable-bpf-masquerade is true",
            "Cilium answers for the node's addresses before netfilter sees the reply to the probe address",
            "sluice doctor probe-canary; if probes fail: helm upgrade cilium --set bpf.masquerade=false",
        )
    if facts.node.felix_bpf:
        yield warning(
            "Calico: FELIX_BPFENABLED is true",
            "before Calico 3.29 its programs drop replies to the probe address",
            "use Calico 3.29 or newer; sluice doctor probe-canary",
        )


@check(
    "reverse-path",
    "filters that drop replies to probes",
    problems="P42",
    needs="node host",
    fine="no reverse path filter drops replies to probes",
)
def _filters(facts: NodeFacts) -> Iterator[CheckLine]:
    values = facts.node.sysctls
    strict = [name for name in ("all", "default") if values.get(f"net.ipv4.conf.{name}.rp_filter") == "1"]
    if strict and any("branch-eni" in name for name in facts.host.probes):
        yield warning(
            f"rp_filter is 1 (strict) for {', '.join(strict)}, and pods hang on branch interfaces",
            "replies to probes arrive on another interface than that of the route, and are dropped",
            "sysctl -w net.ipv4.conf.all.rp_filter=2",
        )


@check("ipv6", "IPv6 of the node and the setting agree", problems="P36 P37", needs="host", fine="IPv6 is on")
def _ipv6(facts: NodeFacts) -> Iterator[CheckLine]:
    if facts.node.ipv6_off or not facts.host.view.ipv6:
        how = "ipv6.disable=1 on the kernel's command line" if facts.node.ipv6_off else "the kernel has no IPv6"
        if facts.settings.ipv6:
            yield ok(f"{how}: pods are captured for IPv4 only; IPv6 is not programmed")
        return
    if not facts.settings.ipv6:
        with_ipv6 = [pod.name for pod in facts.pods.noted if pod.ipv6 and any(":" in one for one in pod.addresses)]
        if with_ipv6:
            yield wrong(
                f"ipv6 is false, and {len(with_ipv6)} pods have addresses of IPv6 ({with_ipv6[0]})",
                "their IPv6 traffic is not captured",
                "set ipv6: true, and restart the agent",
            )
