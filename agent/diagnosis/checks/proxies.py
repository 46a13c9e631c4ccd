# SPDX-License-Identifier: Apache-2.0
"""Checks of ztunnel: connected, once, and listening in each captured pod. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.core.names import DNS_PORT
from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.remedies import restart, ztunnel


@check("ztunnel", "one ztunnel is connected and has every pod", problems="P03 P16 P17")
def _connected(facts: NodeFacts) -> Iterator[CheckLine]:
    path = facts.settings.zds_socket
    left = facts.left
    if left.zds and left.zds != "socket":
        yield wrong(f"{path} is {left.zds}", "ztunnel cannot connect there", f"rm -r {path}; {restart(facts)}")
        return
    if left.why:
        yield unknown("no agent responds")
        return
    status = facts.agent.status
    count, waiting = status["ztunnel_connections"], status["ztunnel_unacknowledged"]
    if not count and not left.zds:
        yield wrong(
            f"{path} is not there",
            "another agent removed the socket when it ended (istio-cni does): ztunnel cannot reconnect",
            restart(facts),
        )
    elif not count:
        yield wrong(
            f"no ztunnel is connected to {path}",
            "new pods wait, and pods in which none listens refuse connections; it does not run, or uses another socket",
            ztunnel(facts),
        )
    elif count > 1:
        yield warning(
            f"{count} ztunnels are connected to {path}",
            "normal for some minutes during a rollout; later a ztunnel hangs, or two are installed",
            "pgrep -a ztunnel; end the older one",
        )
    if count and waiting:
        yield warning(f"{waiting} pods wait for ztunnel's acknowledgement", "ztunnel is busy, or hangs", ztunnel(facts))
    if count == 1 and not waiting:
        yield ok(f"one ztunnel is connected to {path} and has every pod")


@check(
    "ztunnel-listening",
    "ztunnel listens in each captured pod",
    problems="P03 P11 P38",
    needs="pods",
    fine="no captured pod",
)
def _listening(facts: NodeFacts) -> Iterator[CheckLine]:
    captured = [pod for pod in facts.pods.noted if pod.captured and not pod.error]
    for pod in captured:
        if pod.silent:
            ports = ", ".join(map(str, pod.silent))
            yield wrong(
                f"{pod.name}: nothing listens on {ports}",
                "rules send the pod's connections to ztunnel, which does not listen (it restarted, or could not bind)",
                f"see ztunnel's log for the pod; sluice verify {pod.name} --repair; {ztunnel(facts)}",
            )
    if captured and not any(pod.silent for pod in captured):
        ports = ", ".join(facts.settings.ztunnel_ports)
        yield ok(f"{len(captured)} captured pods; ztunnel listens in each on {ports}")


@check(
    "pod-loopback",
    "lo of each captured pod has its addresses",
    problems="P36 P38",
    needs="pods",
    fine="lo is up in each captured pod, with its addresses",
)
def _loopback(facts: NodeFacts) -> Iterator[CheckLine]:
    for pod in facts.pods.noted:
        if pod.error or not pod.captured:
            continue
        if not pod.loopback4:
            yield wrong(
                f"{pod.name}: lo is down, or has no 127.0.0.1",
                "redirection ends at lo: no connection of the pod can be captured",
                "in the pod: ip link set lo up",
            )
        elif pod.ipv6 and not pod.loopback6:
            yield warning(
                f"{pod.name}: lo has no ::1",
                f"ztunnel cannot bind [::1]:{DNS_PORT}: DNS of this pod is not captured",
                "in the pod: ip -6 address add ::1/128 dev lo; or set disable_ipv6 there",
            )
        elif not pod.ipv6 and (ipv6 := [one for one in pod.addresses if ":" in one]):
            yield warning(
                f"{pod.name}: IPv6 is off for lo, and another interface has {ipv6[0]}",
                "its IPv6 traffic cannot be captured",
                "in the pod: sysctl net.ipv6.conf.lo.disable_ipv6=0",
            )
