# SPDX-License-Identifier: Apache-2.0
"""Checks of the node's limits: notification queues, connection tracking, ports in use. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts

_INSTANCES, _WATCHES = "fs.inotify.max_user_instances", "fs.inotify.max_user_watches"
_COUNT, _MOST = "net.netfilter.nf_conntrack_count", "net.netfilter.nf_conntrack_max"
_FULL = 0.8


@check("inotify", "file event queues are available", problems="P07 P60m", needs="node")
def _inotify(facts: NodeFacts) -> Iterator[CheckLine]:
    node = facts.node
    raise_it = f"sysctl -w {_INSTANCES}=8192 {_WATCHES}=524288, and in /etc/sysctl.d"
    most = _number(node.sysctls, _INSTANCES)
    if node.inotify:
        yield wrong(
            node.inotify,
            f"root's queues of file events are used up ({_INSTANCES}={most}): changes are only found by polling",
            raise_it,
        )
    elif most and node.inotify_used > most * _FULL:
        yield warning(
            f"{node.inotify_used} of {most} queues of file events are in use", "soon no process gets one", raise_it
        )
    else:
        yield ok(f"{node.inotify_used} of {most} queues of file events are in use")


@check("conntrack", "connection tracking has room", needs="node")
def _conntrack(facts: NodeFacts) -> Iterator[CheckLine]:
    count, most = (_number(facts.node.sysctls, name) for name in (_COUNT, _MOST))
    if not most:
        yield unknown("the kernel tracks no connections (nf_conntrack is not loaded)")
    elif count > most * _FULL:
        yield warning(
            f"{count} of {most} entries of connection tracking are in use in the node's namespace",
            "with none left, new connections are dropped (backend ebpf needs none)",
            f"sysctl -w {_MOST}={2 * most}",
        )
    else:
        yield ok(f"{count} of {most} entries in use")


@check("metrics-port", "no other process has the agent's port", problems="P60i", needs="host")
def _port(facts: NodeFacts) -> Iterator[CheckLine]:
    address = facts.settings.metrics_address
    host = facts.host
    if not address:
        yield ok("metrics_address is empty")
    elif host.port and not host.port_ours:
        yield wrong(
            f"{address} is taken by {host.port}",
            "the agent does not start while another process has its port (istio-cni and istiod also use 15014)",
            "set metrics_address, or stop the process that has it",
        )
    elif not host.port and not facts.left.why:
        yield warning(
            f"nothing listens on {address} here",
            "the agent responds, but not there: it has another network namespace (as a lab's node), or lost the port",
            "run `sluice doctor` in the agent's network namespace (nsenter --net), else restart the agent",
        )
    else:
        yield ok(f"used by {host.port}" if host.port else f"{address} is free")


def _number(values: Mapping[str, str], name: str) -> int:
    word = values.get(name, "")
    return int(word) if word.isdecimal() else 0
