"""What to do about a pod, in one line, from what `sluice explain` found. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.core import names

Told = Mapping[str, Any]
PATIENCE = 4.5  # seconds; ztunnel waits 5 for a workload of the names that it was told
_FEW = 3  # connections in a row that ztunnel cut off; fewer may be a server that was away
_DENIED = "ztunnel resets its connections: the other end refuses them, or a policy does; see ztunnel's log"
_AMBIENT = f"{names.DATAPLANE_MODE}=ambient"


def advise(told: Told, *, kubernetes: bool, static: str) -> str:
    """ "" when nothing has to be done. `static` is the file of static pods, "" for none."""
    if told["decision"] == "excluded":
        return _kept_out(told) or _enrol(told, kubernetes=kubernetes, static=static)
    return _broken(told, kubernetes=kubernetes) or _watch(told)


def _name(told: Told) -> str:
    return f"{told['namespace']}/{told['name']}"


def _broken(told: Told, *, kubernetes: bool) -> str:
    """Its traffic is not where it should be."""
    name = _name(told)
    ztunnel = told["ztunnel"]
    if told["state"] == "waiting":
        return "the agent has not looked at it yet: ask again in a moment"
    if told["state"] == "failed" and told["probe"] and told["error"].startswith("rolled back"):
        return "let the node's probes through (`sluice doctor`), then restart the pod"
    if told["state"] == "failed" or told["inspect_error"]:
        return f"remove the cause that the error names; `sluice verify {name} --repair` then tries again at once"
    if told["state"] == "pending" and not ztunnel["connections"]:
        see = f"kubectl -n istio-system get pods -l app=ztunnel -o wide | grep {told['node']}"
        return f"start ztunnel on this node: {see if kubernetes else 'systemctl start sluice-ztunnel'}"
    if told["state"] == "pending":
        return "see ztunnel's log for this pod: it is connected, but did not take it"
    if told["in_kernel"] == "drifted":
        return f"sluice verify {name} --repair; who changed it is told below, once that is done"
    if ztunnel["foreign"]:
        return "a process of the pod listens on a port of ztunnel: let it use another one; see docs/limits.md"
    if ztunnel["silent"]:
        return f"restart ztunnel: nothing listens in the pod on {', '.join(map(str, ztunnel['silent']))}"
    if told["foreign"]:
        return "take out of the pod what the notes name: it comes before our rules, which leave it untouched"
    return ""


def _watch(told: Told) -> str:
    """It is captured; what else is not as it should be."""
    name = _name(told)
    exemption = told["exemption"]
    annotation = told["annotation"]
    if exemption and exemption["error"]:
        return "the node's probes are taken for strangers': sluice verify --all --repair, then sluice status"
    if told["probe"] and not told["probe"].endswith(": ok"):
        return "probes of the node do not reach the application as they should: sluice doctor"
    if any(row["fate"] == "leaked" for row in told["connections"]["fates"]):
        return f"connections went around ztunnel: sluice connections {name} --fate leaked"
    if (cut := told["connections"]["cut"]) and cut["connections"] >= _FEW:
        return _unknown(told) if cut["seconds"] >= PATIENCE else _DENIED
    if told["outside"]:
        return "restart the pod, if those of its connections that are older than its enrolment must be captured, too"
    if annotation and told["state"] == "enabled" and annotation["value"] != "enabled":
        return f"its annotation {annotation['key']} is not written yet: see the agent's log if that lasts"
    return ""


def _unknown(told: Told) -> str:
    sent = told["ztunnel"]["identity"] or {"service_account": ""}
    names = f"{_name(told)} with service account {sent['service_account'] or '(none)'}"
    return (
        f"ztunnel ends its connections after waiting: it seems to know no workload {names}; give the pod "
        "the names that ztunnel's control plane or local file has, and see ztunnel's log"
    )


def _kept_out(told: Told) -> str:
    """What would have to change about a pod that its labels alone cannot enrol."""
    fact = next(fact for fact in told["facts"] if fact["decides"])
    key = fact["key"]
    place = f" ({fact['place']})" if fact["place"] else ""
    namespace = told["namespace"]
    return {
        "host network": "to capture it, give it a network of its own (hostNetwork: false)",
        names.SIDECAR_STATUS: "to capture it, make it anew without its sidecar (label sidecar.istio.io/inject=false)",
        "app": "nothing: ztunnel's own traffic is never captured",
        "exclude_namespaces": f"to capture it, take {namespace} out of that setting{place} and restart the agent",
        "own_namespace": "to capture it, run it in another namespace",
        "exempt_pods": f"to capture it, take it out of that setting{place} and restart the agent",
        "unsupported_runtimes": "to capture it, run it with another runtime class",
        "ended": "nothing: it runs no more",
        "enablement_selectors": f"to capture it, label it as one of the selectors wants{place}; see Decision",
    }.get(key, "")


def _enrol(told: Told, *, kubernetes: bool, static: str) -> str:
    """By its label, or its namespace's."""
    namespace, name = told["namespace"], told["name"]
    if not kubernetes:
        words = f"its sandbox the annotation {_AMBIENT}, or list it in {static or 'a file for the setting static_pods'}"
        return f"to capture it, give {words}"
    fact = next(fact for fact in told["facts"] if fact["decides"])
    if fact["origin"] == "pod annotation":
        return f"to capture it: kubectl -n {namespace} annotate pod {name} {_AMBIENT} --overwrite"
    if fact["origin"] == "pod label":
        return f"to capture it: kubectl -n {namespace} label pod {name} {_AMBIENT} --overwrite"
    whole = f"kubectl label namespace {namespace} {_AMBIENT} --overwrite"
    return f"to capture it: kubectl -n {namespace} label pod {name} {_AMBIENT}; or all of its namespace: {whole}"
