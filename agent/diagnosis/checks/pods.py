# SPDX-License-Identifier: Apache-2.0
"""Checks of the pods: captured as desired, no foreign rules before Sluice's, ports and sockets. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts, Row
from agent.diagnosis.remedies import start, ztunnel

_MOST_WAITING = 1000  # sockets of one pod in CLOSE_WAIT
_FULL = 0.8  # of the ports for outgoing connections
_NOT_CAPTURED = ("failed", "pending", "waiting", "stalled")  # states that check `pods` reports
# Rows of `sluice verify` that have a check of their own here.
_SEEN_BY_OTHERS = ("(probes of the node)", "(CNI installation)", "(ztunnel)")
_UNSUPPORTED = {"gvisor": ("runsc", "gVisor"), "kata": ("kata", "Kata Containers")}


def _key(row: Row) -> str:
    return f"{row['namespace']}/{row['name']}" if row["namespace"] else str(row["name"])


@check("pods", "each enrolled pod is captured", problems="P02 P05 P06 P54 P56 P60d", needs="agent")
def _states(facts: NodeFacts) -> Iterator[CheckLine]:
    rows = facts.agent.pods
    for row in rows:
        reason = row["error"] or row["reason"] or "not examined yet"
        advice = f"sluice explain {_key(row)}"
        match row["state"]:
            case "failed":
                yield wrong(f"{_key(row)}: {reason}", "the pod should be captured but is not", advice)
            case "pending":
                yield wrong(
                    f"{_key(row)}: {reason}",
                    "its rules are in place, but no ztunnel has it: connections are refused",
                    advice,
                )
            case "stalled":
                yield wrong(
                    f"{_key(row)}: {reason}",
                    "ztunnel listens in the pod, but its process hangs or is overloaded: connections get no answer",
                    f"{advice}; restart ztunnel: {ztunnel(facts)}",
                )
            case "waiting" if facts.agent.status["ready"]:
                yield warning(f"{_key(row)}: {reason}", "the pod is known, but its namespace was not found", advice)
    states: dict[str, int] = {}
    for row in rows:
        states[row["state"]] = states.get(row["state"], 0) + 1
    if not set(states) & set(_NOT_CAPTURED):
        yield ok(", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no pods here")


@check("pod-rules", "rules are in the right namespaces", problems="P02 P56", needs="pods")
def _bare(facts: NodeFacts) -> Iterator[CheckLine]:
    """Reports the state of the namespaces, with or without an agent."""
    noted = facts.pods.noted
    for pod in noted:
        if pod.error:
            yield warning(f"{pod.name}: {pod.error}", "its namespace cannot be examined", "sluice explain " + pod.name)
        elif pod.captured and not pod.ours and not pod.others:
            yield wrong(
                f"{pod.name}: no rules in {pod.origin}",
                "they were removed and not restored: the pod's traffic bypasses ztunnel",
                f"sluice verify {pod.name} --repair" if not facts.left.why else start(facts),
            )
    for pod in facts.pods.others:
        if pod.ours:
            yield warning(
                f"{pod.origin}: rules by Sluice ({', '.join(pod.ours)}), and no note names the pod",
                "its agent is gone or uses another run_dir; if no ztunnel has the pod, its connections are refused",
                f"sluice uncapture --all --netns {pod.origin}, if no agent maintains it",
            )
    right = [pod for pod in noted if pod.captured and (pod.ours or pod.others) and not pod.error]
    if len(right) == sum(pod.captured for pod in noted) and not any(pod.ours for pod in facts.pods.others):
        yield ok(f"{len(right)} captured pods, with rules in each")


@check("pods-verified", "the kernel has the desired state", problems="P02 P58", needs="agent")
def _verified(facts: NodeFacts) -> Iterator[CheckLine]:
    rows = [row for row in facts.agent.verify if row["name"] not in _SEEN_BY_OTHERS]
    for row in rows:
        differences = "; ".join(row["differences"]) or ("" if row["state"] in _NOT_CAPTURED else row["error"])
        if row["result"] == "drift" and differences:
            explain = f"sluice explain {_key(row)}; " if row["namespace"] else ""
            cause = "actual and desired state differ, and the agent has not repaired it yet"
            remedy = "sluice verify --all --repair"
            if row["differences"] and all(line.startswith("foreign: ") for line in row["differences"]):
                cause = "foreign rules before Sluice's divert new connections from ztunnel"
                remedy = "remove the named rules from the pod"
            yield wrong(f"{_key(row)}: {differences}", cause, explain + remedy)
        elif row["result"] == "unknown":
            yield unknown(f"{_key(row)}: {row['error']}")
    pods = sum(not row["name"].startswith("(") for row in rows)
    yield ok(f"{pods} pods verified")


@check(
    "foreign-rules",
    "no foreign rules in a pod come before Sluice's",
    problems="P60b P60p",
    needs="pods",
    fine="no foreign rules before Sluice's",
)
def _foreign(facts: NodeFacts) -> Iterator[CheckLine]:
    for pod in (*facts.pods.noted, *facts.pods.others):
        if not pod.ours:
            continue
        for rule in pod.foreign:
            yield warning(
                f"{pod.name}: {rule}",
                "foreign rules come before Sluice's and may divert the pod's traffic",
                f"nsenter --net={pod.origin} nft list ruleset; remove them, or exclude the traffic that they divert",
            )


@check(
    "probe-canary",
    "the node's connections reach the pods",
    problems="P37 P42 P43 P44 P45",
    needs="agent",
    fine="each probed pod was reached",
)
def _canary(facts: NodeFacts) -> Iterator[CheckLine]:
    seen = 0
    for row in facts.agent.pods:
        result = str(row.get("probe", ""))
        seen += bool(result)
        if ": failed" in result or ": captured" in result:
            yield wrong(
                f"{_key(row)}: {result}",
                "the node's own connection to the pod failed, or went through ztunnel: kubelet's probes will too",
                "sluice doctor probe-exemption probe-path reverse-path; allow 169.254.7.127/32 in network policies",
            )
        elif result.endswith("no listener"):
            seen -= 1
    if facts.settings.probe_canary == "off":
        yield unknown("the setting probe_canary is off")
    elif not seen:
        yield unknown("no pod that listens on a port was enrolled since the agent's start")


@check(
    "pod-runtimes",
    "no pod with a network stack of its own",
    problems="P11",
    needs="agent",
    fine="no captured pod is known to have a network stack of its own",
)
def _runtimes(facts: NodeFacts) -> Iterator[CheckLine]:
    shims = facts.node.shims
    excluded = [one for one in facts.agent.pods if "runtime" in one["reason"] and one["state"] == "excluded"]
    for name in facts.settings.unsupported_runtimes:
        if any(_UNSUPPORTED.get(name, (name,))[0] in shim for shim in shims) and not excluded and facts.agent.pods:
            yield warning(
                f"{', '.join(shims)} run, and no pod is excluded for its runtime class",
                "rules in the namespace of such a pod do not see its traffic",
                "kubectl get runtimeclass; name them in unsupported_runtimes",
            )
    if any("kata" in shim for shim in shims) and "kata" not in facts.settings.unsupported_runtimes:
        yield warning(
            "Kata Containers run here",
            "their connections begin in a virtual machine: inbound ones are captured, others as they leave it",
            "if that is not what you want: unsupported_runtimes: gvisor,kata",
        )


@check(
    "pod-ports",
    "pods do not listen where outgoing connections take ports",
    problems="P60g",
    needs="pods",
    fine="no captured pod listens on a port for outgoing connections",
)
def _listens(facts: NodeFacts) -> Iterator[CheckLine]:
    for pod in facts.pods.noted:
        if pod.ports and pod.captured:
            low, high = pod.range
            shown = ", ".join(map(str, pod.ports[:5]))
            yield warning(
                f"{pod.name}: listens on {shown}, within {low}-{high} from which outgoing connections take ports",
                "a connection of ztunnel or of the pod may have the port when the application wants to bind it",
                f"in the pod's securityContext: sysctl net.ipv4.ip_local_reserved_ports={shown.replace(' ', '')}",
            )


@check("pod-sockets", "sockets do not pile up", problems="P60f", needs="pods", fine="no pod has many leftover sockets")
def _sockets(facts: NodeFacts) -> Iterator[CheckLine]:
    for pod in facts.pods.noted:
        waiting = pod.states.get("CLOSE_WAIT", 0)
        used = sum(count for state, count in pod.states.items() if state != "LISTEN")
        room = pod.range[1] - pod.range[0] + 1
        if waiting > _MOST_WAITING:
            yield warning(
                f"{pod.name}: {waiting} sockets in CLOSE_WAIT",
                "a program in the pod, or ztunnel, does not close what its peer has closed",
                f"nsenter --net={pod.origin} ss -tanp state close-wait",
            )
        if used > room * _FULL:
            yield warning(
                f"{pod.name}: {used} sockets, {room} ports for outgoing connections",
                "with none left, connections fail with EADDRNOTAVAIL",
                "widen net.ipv4.ip_local_port_range in the pod, or let it reuse connections",
            )
