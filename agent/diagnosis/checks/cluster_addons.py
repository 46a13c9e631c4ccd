# SPDX-License-Identifier: Apache-2.0
"""Checks of foreign components that interfere: socket load balancers, SELinux and AppArmor. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import AttachedProgram, NodeFacts

_CILIUM = ("cil_sock", "sock4_", "sock6_")
_CALICO = ("calico_", "cali_")


@check(
    "socket-balancer",
    "no other CNI replaces addresses at connect",
    problems="P43 P60n",
    needs="sockets node",
    fine="no foreign program on the root cgroup changes connections",
)
def _balancer(facts: NodeFacts) -> Iterator[CheckLine]:
    taking = [one for one in facts.sockets if one.hook.startswith(("connect", "sendmsg"))]
    values = facts.node.cilium
    host_only = values.get("bpf-lb-sock-hostns-only") == "true"
    if taking:
        listed = ", ".join(f"{one.name or one.id} ({one.hook})" for one in taking)
        program = _vendor(taking)
        observation = f"on the root cgroup: {listed}" + ("; bpf-lb-sock-hostns-only is true" if host_only else "")
        if host_only:
            yield ok(f"{observation}: connections of pods are not affected")
            return
        yield warning(
            observation,
            f"{program} replaces a service's address when the socket connects, before rules and ztunnel see it: "
            "policies by service do not apply",
            "Cilium: helm upgrade cilium --set socketLB.hostNamespaceOnly=true; Calico: bpfConnectTimeLoadBalancing: "
            "Disabled"
            if program != "a program"
            else f"bpftool prog show id {taking[0].id}",
        )
    elif values.get("kube-proxy-replacement") in ("true", "strict") and not host_only:
        yield warning(
            "Cilium: kube-proxy-replacement is true, bpf-lb-sock-hostns-only is not",
            "its socket load balancer replaces services' addresses before ztunnel sees them",
            "helm upgrade cilium --set socketLB.hostNamespaceOnly=true",
        )


def _vendor(programs: list[AttachedProgram]) -> str:
    if any(one.name.startswith(_CILIUM) for one in programs):
        return "Cilium's socket load balancer"
    return (
        "Calico's connect-time load balancer" if any(one.name.startswith(_CALICO) for one in programs) else "a program"
    )


@check("security", "SELinux and AppArmor let Sluice work", problems="P60j", needs="security")
def _security(facts: NodeFacts) -> Iterator[CheckLine]:
    security = facts.security
    for line in security.denials:
        if "apparmor" in line:
            remedy = "run the agent unconfined (appArmorProfile: Unconfined, which the chart sets)"
            yield wrong(line, "AppArmor denied an operation of Sluice", remedy)
        else:
            yield wrong(
                line,
                "SELinux denied an operation of Sluice: the agent needs the type spc_t, its files on the node bin_t",
                "seLinuxOptions: {type: spc_t} (the chart sets it); restorecon -v /opt/cni/bin/sluice-cni",
            )
    if (
        security.selinux == "enforcing"
        and security.context
        and "spc_t" not in security.context
        and "unconfined" not in security.context
    ):
        yield warning(
            f"SELinux is enforcing, and the agent runs as {security.context}",
            "a confined type may not enter other namespaces",
            "seLinuxOptions: {type: spc_t} (the chart sets it)",
        )
    if security.denials:
        return
    if security.unread:
        yield unknown(f"denials cannot be read: {security.unread}", "ausearch -m avc -ts recent; dmesg | grep DENIED")
        return
    state = security.selinux or "off"
    yield ok(
        f"SELinux {state}, AppArmor {'on' if security.apparmor else 'off'}, no denial of Sluice in the kernel's log"
    )
