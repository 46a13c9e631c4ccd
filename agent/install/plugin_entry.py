"""Our plugin's entry in a list, from the settings. Pure."""

from __future__ import annotations

import re
from typing import Final

from agent.core.names import CNI_TYPE
from agent.core.settings import Settings
from agent.install.conflists import Json

TIMEOUT: Final = 20  # seconds; a kubelet waits minutes for a sandbox
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # sluice-cni refuses a list with anything else in it


def plugin_entry(settings: Settings) -> Json:
    """Nothing in it expires, and what it refers to may be absent: the socket, until an agent runs."""
    excluded = dict.fromkeys((*settings.exclude_namespaces, settings.own_namespace))
    return {
        "type": CNI_TYPE,
        "capabilities": {"io.kubernetes.cri.pod-annotations": True, "dns": True},
        "socket": settings.cni_socket,
        "excludeNamespaces": [name for name in excluded if _NAMESPACE.fullmatch(name)],
        "exemptPods": list(settings.exempt_pods),
        "timeoutSeconds": TIMEOUT,
    }
