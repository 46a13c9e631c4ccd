# SPDX-License-Identifier: Apache-2.0
"""Checks of the agent itself: it responds, its state is intact, it loses no records. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent import __version__
from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.remedies import log, restart, start

_MEMORY = 150 << 20  # bytes; what an agent of 250 pods may take (P60h)
_PER_POD = 6  # descriptors (agent.app.root.main)
_LEAST = 128  # descriptors of an agent without pods


@check("agent", "the agent runs, responds and is ready", problems="P02 P18", needs="cni")
def _agent(facts: NodeFacts) -> Iterator[CheckLine]:
    left = facts.left
    if not left.why:
        status = facts.agent.status
        if not status["ready"]:
            yield wrong(f"the agent is not ready: {status['problem']}", "new pods wait until it is", log(facts))
        elif status["problem"]:
            yield warning(
                status["problem"],
                "the agent captures pods, but a part of it does not work",
                "sluice status; " + log(facts),
            )
        else:
            yield ok(f"version {status['version']}, ready, backend {status['backend']}")
        return
    listed = any(one.ours for one in facts.cni.files)
    if not listed and not left.noted:
        yield unknown(f"{left.why}; nothing of Sluice is installed here", "sluice install, or the chart")
        return
    what = [*(["new pods cannot start"] if listed else []), *(["rules are not repaired"] if left.noted else [])]
    yield wrong(left.why, f"no agent runs: {', '.join(what)}", f"{start(facts)}; {log(facts)}")


@check("agent-version", "the running agent is the installed one", problems="P58", needs="agent")
def _version(facts: NodeFacts) -> Iterator[CheckLine]:
    running = facts.agent.status["version"]
    if running == __version__:
        yield ok(f"agent and command are {running}")
        return
    yield warning(
        f"the agent is {running}, this command is {__version__}",
        "an upgrade installed new files and the agent was not restarted, or this is another copy",
        f"{restart(facts)} (rules stay while it starts)",
    )


@check("agent-state", "no note of a pod is damaged", problems="P29", fine="all notes of pods can be read")
def _state(facts: NodeFacts) -> Iterator[CheckLine]:
    damaged = dict.fromkeys((*facts.left.damaged, *facts.agent.status.get("damaged_state_files", ())))
    if damaged:
        yield wrong(
            f"damaged: {', '.join(damaged)}",
            "the note of a pod could not be read: the pod keeps its rules, but the agent may not know the pod",
            f"sluice pods; restart the pod if it is not there; rm {facts.settings.run_dir}/pods/*.damaged",
        )


@check("agent-resources", "descriptors and memory of the agent", problems="P29 P40 P41 P60h P60m", needs="agent")
def _resources(facts: NodeFacts) -> Iterator[CheckLine]:
    agent = facts.agent
    if not agent.pid:
        yield unknown(
            "the agent's process cannot be seen from here", "as root, in the node's PID namespace: sluice doctor"
        )
        return
    expected = _LEAST + _PER_POD * len(agent.pods)
    room = agent.most_descriptors
    if room and agent.descriptors > room * 8 // 10:
        yield wrong(
            f"{agent.descriptors} of {room} descriptors are open",
            "without free descriptors no pod can be verified",
            f"raise its limit of open files (sluice.service: LimitNOFILE=1048576); {restart(facts)}",
        )
    elif agent.descriptors > 2 * expected:
        yield warning(
            f"{agent.descriptors} descriptors are open for {len(agent.pods)} pods; some {expected} are usual",
            "descriptors leak",
            f"run sluice report and file an issue; {restart(facts)} (frees them, rules stay)",
        )
    if agent.resident > _MEMORY:
        yield warning(
            f"{agent.resident >> 20} MiB resident",
            "more than 150 MiB: a very large cluster with kube_peers, or a leak",
            "set metrics_label_sets lower, or kube_peers: false; run sluice report and file an issue",
        )
    if agent.descriptors <= 2 * expected and agent.resident <= _MEMORY:
        yield ok(f"process {agent.pid}: {agent.resident >> 20} MiB, {agent.descriptors} of {room} descriptors")


@check("kubernetes", "the agent reaches the API server", problems="P09 P14", needs="agent")
def _kubernetes(facts: NodeFacts) -> Iterator[CheckLine]:
    state = facts.agent.status.get("kubernetes", "not set")
    if state in ("ok", "not set"):
        yield ok(
            "no API server is configured" if state == "not set" else "the API server responds, and all pods are known"
        )
        return
    yield wrong(
        state,
        "labels in the API server decide enrolment: without it, pods that may be enrolled do not start",
        "check kube_server, the token file and the agent's ClusterRole; sluice status",
    )


@check("static-pods", "the file of static pods is valid", needs="agent")
def _static(facts: NodeFacts) -> Iterator[CheckLine]:
    state = facts.agent.status.get("static_pods", "not set")
    if state in ("ok", "not set"):
        yield ok("no file is configured" if state == "not set" else f"{facts.settings.static_pods} is read")
        return
    yield wrong(state, "the file of static pods is invalid; its previous content stays in force", "repair the file")


@check("leaks", "no connection of an enrolled pod bypassed ztunnel", problems="P02 P05", needs="agent")
def _fates(facts: NodeFacts) -> Iterator[CheckLine]:
    rows = facts.agent.status.get("connections", [])
    leaked = [row for row in rows if row["fate"] == "leaked" and row["connections"]]
    if leaked:
        reasons = ", ".join(f"{row['connections']} {row['reason'] or row['direction']}" for row in leaked)
        yield warning(
            f"leaked so far: {reasons}",
            "connections of enrolled pods bypassed ztunnel: rules were missing, or the connections are pre-existing",
            "sluice connections --fate leaked; the count is per node and does not fall after the cure",
        )
        return
    counted = sum(row["connections"] for row in rows)
    yield ok(f"{counted} connections counted, none leaked" if counted else "no connection counted yet")


@check("records", "no record of a connection was lost", problems="P60e", needs="agent", fine="no record was lost")
def _records(facts: NodeFacts) -> Iterator[CheckLine]:
    lost = {name: count for name, count in facts.agent.losses.items() if count}
    if lost:
        yield warning(
            "lost: " + ", ".join(f"{count} {name}" for name, count in lost.items()),
            "more connections ended at once than could be read in time: totals are right, single records are missing",
            "set bpf_sizes: records=16777216, and restart the agent",
        )
