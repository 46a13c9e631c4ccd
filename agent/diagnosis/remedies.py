# SPDX-License-Identifier: Apache-2.0
"""Commands for the agent and ztunnel, as this node runs them: pods of a cluster, or systemd units. Pure."""

from __future__ import annotations

from agent.diagnosis.node_facts import NodeFacts

_AGENTS = "-l app.kubernetes.io/name=sluice,app.kubernetes.io/component=agent"


def _kubectl(facts: NodeFacts) -> tuple[str, str]:
    """Returns kubectl in the namespace of the agent's pods, and the selector of this node's; ("", "") outside a pod."""
    settings = facts.settings
    if not settings.own_namespace:
        return "", ""
    node = facts.agent.status.get("node") or settings.node_name or "NODE"
    return f"kubectl -n {settings.own_namespace}", f"{_AGENTS} --field-selector spec.nodeName={node}"


def start(facts: NodeFacts) -> str:
    kubectl, pods = _kubectl(facts)
    return f"{kubectl} describe pods {pods}" if kubectl else "systemctl start sluice"


def restart(facts: NodeFacts) -> str:
    kubectl, pods = _kubectl(facts)
    return f"{kubectl} delete pods {pods}" if kubectl else "systemctl restart sluice"


def log(facts: NodeFacts) -> str:
    kubectl, pods = _kubectl(facts)
    return f"{kubectl} logs $({kubectl} get pods {pods} -o name) --tail=50" if kubectl else "journalctl -u sluice -n 50"


def ztunnel(facts: NodeFacts) -> str:
    kubectl, _ = _kubectl(facts)
    if not kubectl:
        return "systemctl restart sluice-ztunnel"
    own = f"{kubectl} get pods -l app.kubernetes.io/component=ztunnel -o wide"
    return f"kubectl -n istio-system get pods -l app=ztunnel -o wide; of the embedded one: {own}"
