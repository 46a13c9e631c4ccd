# SPDX-License-Identifier: Apache-2.0
"""Advises in one line what to do about a pod, from the findings of `sluice explain`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.core import names
from agent.flows.outcome import UNKNOWN_WORKLOAD

Answer = Mapping[str, Any]
_FEW = 3  # connections that ztunnel cut off; fewer may be a server that was away
_CAUSES = 3  # of the latest repairs, by name
_AMBIENT = f"{names.DATAPLANE_MODE}=ambient"


def advise(answer: Answer, *, kubernetes: bool, static: str) -> str:
    """Returns the advice, "" if nothing has to be done. `static` is the file of static pods, "" for none."""
    if answer["decision"] == "excluded":
        return _kept_out(answer) or _enrol(answer, kubernetes=kubernetes, static=static)
    return _broken(answer, kubernetes=kubernetes) or _watch(answer)


def _name(answer: Answer) -> str:
    return f"{answer['namespace']}/{answer['name']}"


def _broken(answer: Answer, *, kubernetes: bool) -> str:
    """Advises on a pod with traffic that is not captured as desired."""
    name = _name(answer)
    ztunnel = answer["ztunnel"]
    if answer["state"] == "waiting":
        return "the agent has not examined the pod yet; ask again in a moment"
    if answer["state"] == "failed" and answer["probe"] and answer["error"].startswith("rolled back"):
        return "let the node's probes through (`sluice doctor`), then restart the pod"
    if answer["state"] == "failed" or answer["inspect_error"]:
        return f"remove the cause that the error names, then run `sluice verify {name} --repair` to retry at once"
    if answer["state"] == "pending" and not ztunnel["connections"]:
        see = f"kubectl -n istio-system get pods -l app=ztunnel -o wide | grep {answer['node']}"
        return f"start ztunnel on this node: {see if kubernetes else 'systemctl start sluice-ztunnel'}"
    if answer["state"] == "pending":
        return "see ztunnel's log: it is connected, but has not accepted this pod"
    if answer["in_kernel"] == "drifted":
        return _repair(answer)
    if ztunnel["foreign"]:
        return "a process of the pod listens on a port of ztunnel: make it use another port; see docs/limits.md"
    if ztunnel["silent"]:
        return f"restart ztunnel: it does not listen in the pod on {', '.join(map(str, ztunnel['silent']))}"
    if answer["foreign"]:
        return "remove the foreign rules that the notes name: they come before Sluice's, and Sluice does not touch them"
    if answer["state"] == "stalled":
        again = f"delete its pod on node {answer['node']}" if kubernetes else "systemctl restart sluice-ztunnel"
        return f"ztunnel hangs, or has too little CPU: see its log and its CPU limit, then {again}"
    return ""


def _repair(answer: Answer) -> str:
    """Advises on drift. The cause of earlier repairs may cause it again."""
    repair = f"run `sluice verify {_name(answer)} --repair`"
    causes = dict.fromkeys(one["cause"] for one in reversed(answer["recent_repairs"]) if one["cause"] != "unknown")
    if not causes:
        return f"{repair}; the process that changed it is shown below after the repair"
    return f"{repair}; if it drifts again, stop what changes it: {', '.join(list(causes)[:_CAUSES])} (see Repaired)"


def _watch(answer: Answer) -> str:
    """Advises on a captured pod with other problems."""
    name = _name(answer)
    exemption = answer["exemption"]
    annotation = answer["annotation"]
    if exemption and exemption["error"]:
        return "the node's probes are being captured; run `sluice verify --all --repair`, then `sluice status`"
    if answer["probe"] and not answer["probe"].endswith(": ok"):
        return "the node's probes do not reach the application as they should; run `sluice doctor`"
    if any(row["fate"] == "leaked" for row in answer["connections"]["fates"]):
        return f"connections bypassed ztunnel; see `sluice connections {name} --fate leaked`"
    if (behind := answer["connections"]["behind"]) and behind["failed"] >= _FEW and behind["destinations"]:
        worst = behind["destinations"][0]
        if UNKNOWN_WORKLOAD <= worst["seconds"] < 2 * UNKNOWN_WORKLOAD:
            return _unknown(answer)
        return (
            f"ztunnel takes its connections to {worst['remote']}, and cuts them off: {worst['cause']}; look there, and "
            "see ztunnel's log"
        )
    if (dns := answer["dns"]) and sum(dns["silent"].values()) * 2 >= max(dns["queries"], 2 * _FEW):
        return f"no answer from resolver {_silent(dns)}: see whether it runs and can be reached; `sluice dns {name}`"
    if answer["outside"]:
        return "restart the pod if its pre-existing connections must be captured, too"
    if annotation and answer["state"] == "enabled" and annotation["value"] != "enabled":
        return f"its annotation {annotation['key']} is not written yet; if that lasts, see the agent's log"
    return ""


def _silent(dns: Answer) -> str:
    return ", ".join(name or "unknown" for name in dns["silent"])


def _unknown(answer: Answer) -> str:
    sent = answer["ztunnel"]["identity"] or {"service_account": ""}
    names = f"{_name(answer)} with service account {sent['service_account'] or '(none)'}"
    return (
        f"ztunnel ends its connections after a wait: it seems not to know the workload {names}; give the pod "
        "the names that ztunnel's control plane or local file has, and see ztunnel's log"
    )


def _kept_out(answer: Answer) -> str:
    """Says what must change about a pod that its labels alone cannot enrol."""
    fact = next(fact for fact in answer["facts"] if fact["decides"])
    key = fact["key"]
    source = f" ({fact['place']})" if fact["place"] else ""
    namespace = answer["namespace"]
    return {
        "host network": "to capture it, give it a network of its own (hostNetwork: false)",
        names.SIDECAR_STATUS: "to capture it, re-create it without its sidecar (label sidecar.istio.io/inject=false)",
        "app": "none: ztunnel's own traffic is never captured",
        "exclude_namespaces": f"to capture it, remove {namespace} from that setting{source} and restart the agent",
        "own_namespace": "to capture it, run it in another namespace",
        "exempt_pods": f"to capture it, remove it from that setting{source} and restart the agent",
        "unsupported_runtimes": "to capture it, run it with another runtime class",
        "ended": "none: the pod has ended",
        "enablement_selectors": f"to capture it, give it the labels of one of the selectors{source}; see Decision",
    }.get(key, "")


def _enrol(answer: Answer, *, kubernetes: bool, static: str) -> str:
    """Says how to enrol the pod, by its label or its namespace's."""
    namespace, name = answer["namespace"], answer["name"]
    if not kubernetes:
        means = f"its sandbox the annotation {_AMBIENT}, or list it in {static or 'a file for the setting static_pods'}"
        return f"to capture it, give {means}"
    fact = next(fact for fact in answer["facts"] if fact["decides"])
    if fact["origin"] == "pod annotation":
        return f"to capture it: kubectl -n {namespace} annotate pod {name} {_AMBIENT} --overwrite"
    if fact["origin"] == "pod label":
        return f"to capture it: kubectl -n {namespace} label pod {name} {_AMBIENT} --overwrite"
    whole = f"kubectl label namespace {namespace} {_AMBIENT} --overwrite"
    return f"to capture it: kubectl -n {namespace} label pod {name} {_AMBIENT}; or all of its namespace: {whole}"
