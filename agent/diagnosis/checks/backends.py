# SPDX-License-Identifier: Apache-2.0
"""Checks of the backend: which one, what the kernel lacks for it, one rule set per pod. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.core.model.host import Variant
from agent.diagnosis.finding import CheckLine, check, ok, unknown, warning, wrong
from agent.diagnosis.node_facts import NodeFacts
from agent.diagnosis.remedies import restart


@check("backend", "which backend captures, and why", problems="P30 P31 P60o", needs="host")
def _backend(facts: NodeFacts) -> Iterator[CheckLine]:
    status = facts.agent.status
    left = facts.left
    name, reason = status.get("backend", left.backend), status.get("backend_reason", "as recorded")
    if not name:
        yield unknown("no backend was chosen here yet", "sluice preflight")
        return
    if status and left.backend and left.backend != name:
        yield warning(
            f"the agent uses {name}, but {left.backend} is recorded on disk",
            "the record could not be written, or another agent wrote it: the next start may choose another backend",
            f"ls -la {facts.settings.run_dir}/backend.json; df {facts.settings.run_dir}",
        )
    wanted = facts.settings.backend
    if wanted not in ("auto", name):
        yield warning(f"{name}: {reason}", f"the setting is {wanted}, which cannot be used here", "sluice preflight")
    elif left.release and left.release != facts.host.view.release:
        yield warning(
            f"{name} was chosen under kernel {left.release}, this is {facts.host.view.release}",
            "the kernel was upgraded and the agent has not started since",
            restart(facts),
        )
    else:
        yield ok(f"{name}: {reason}")


@check("preflight", "the kernel supports the backend", problems="P31 P34 P36 P60o", needs="preflight")
def _preflight(facts: NodeFacts) -> Iterator[CheckLine]:
    preflight = facts.preflight
    if not preflight.choice:
        yield wrong(preflight.reason, "no backend works on this kernel: no pod can be captured", "sluice preflight")
        return
    for failure in preflight.selftest:
        yield wrong(
            f"{preflight.choice}: {failure}",
            "the kernel accepts the rules, but packets are not captured",
            "sluice preflight; set backend to another one",
        )
    for one in preflight.features:
        if one.lacking:
            yield wrong(f"missing: {one.name} ({one.words})", f"{preflight.choice} needs it", one.remedy)
        elif not one.present:
            yield warning(f"missing: {one.name} ({one.words})", one.without, one.remedy)
    if not preflight.selftest and all(one.present for one in preflight.features):
        yield ok(f"{preflight.choice}: {len(preflight.features)} features, and packets are captured in a self-test")


@check("host-tables", "the host uses one variant of iptables", problems="P30 P31 P39", needs="host")
def _host_tables(facts: NodeFacts) -> Iterator[CheckLine]:
    view = facts.host.view
    modern, legacy = view.xtables_rules(Variant.NFT), view.xtables_rules(Variant.LEGACY)
    if view.nft is None or view.legacy is None:
        yield unknown("; ".join(view.remarks) or "the host's tables cannot be read without loading modules")
        return
    if modern and legacy:
        yield warning(
            f"{modern} rules of iptables-nft and {legacy} of legacy iptables on the host",
            "two variants at once: one program uses another iptables than the rest; their order is undefined",
            "find the program that uses the other variant (update-alternatives --display iptables)",
        )
        return
    used = view.iptables
    if (used is Variant.LEGACY and modern) or (used is Variant.NFT and legacy):
        held = "iptables-nft" if modern else "legacy iptables"
        yield warning(
            f"the host's iptables is the {used.value} one, and its {modern or legacy} rules are of {held}",
            "programs with an iptables of their own write rules that the host's does not show",
            "update-alternatives --config iptables",
        )
        return
    yield ok(f"iptables: {used.value}; {modern} rules of iptables-nft, {legacy} of legacy iptables")


@check("rule-sets", "one rule set in each pod", problems="P30 P32 P58", needs="pods")
def _rule_sets(facts: NodeFacts) -> Iterator[CheckLine]:
    count = 0
    for pod in (*facts.pods.noted, *facts.pods.others):
        count += bool(pod.ours)
        if len(pod.ours) > 1:
            yield wrong(
                f"{pod.name}: rules by {' and '.join(pod.ours)}",
                "an older agent with another backend left its rules; each diverts the traffic before the other sees it",
                f"sluice verify {pod.name} --repair",
            )
        if pod.ours and pod.others:
            yield wrong(
                f"{pod.name}: rules by Sluice ({pod.ours[0]}) and by another agent ({', '.join(pod.others)})",
                "istio-cni's agent also programmed the pod, or did so before Sluice",
                f"sluice verify {pod.name} --repair; if istio-cni still runs: sluice migrate --check",
            )
        elif pod.others and pod.captured:
            yield warning(
                f"{pod.name}: rules by another agent alone ({', '.join(pod.others)})",
                "Sluice has a note of the pod, but istio-cni programmed it, or a person did",
                f"sluice verify {pod.name} --repair",
            )
        if pod.sidecar and pod.ours:
            yield wrong(
                f"{pod.name}: a sidecar's rules next to Sluice's", "pods with a sidecar are excluded", "restart the pod"
            )
    if not any(pod.others or len(pod.ours) > 1 for pod in (*facts.pods.noted, *facts.pods.others)):
        yield ok(f"{count} namespaces with rules, one rule set in each")
