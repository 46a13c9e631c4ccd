# SPDX-License-Identifier: Apache-2.0
"""Probes the node's network namespace: its tables, the probe exemption, misplaced rules of pods, the agent's port."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil

from agent.backends import layer_ownership
from agent.backends.hostprobes.layers import layers
from agent.backends.hostprobes.nft_rendering import TABLE
from agent.core import names
from agent.core.errors import KernelError
from agent.core.model.host import HostView
from agent.core.model.ownership import Owner
from agent.core.model.sockets import text
from agent.core.settings import Settings
from agent.diagnosis.node_facts import NetworkFacts
from agent.kernel import exec, host_view
from agent.kernel.host_netns import HostNetns
from agent.kernel.netlink.nf_tables import NftSocket

_POD_TABLES = frozenset(f"{names.NFT_TABLE_PREFIX}{word}" for word in ("nat", "mangle", "raw")) - {TABLE}
_POD_CHAINS = frozenset((names.XT_PREROUTING, names.XT_OUTPUT, names.NFT_PREROUTING, names.NFT_OUTPUT))


def probe(settings: Settings, agent: int) -> NetworkFacts:
    """Reads the calling thread's namespace. Raises KernelError or OSError."""
    view = host_view.read_host_view()
    with contextlib.closing(HostNetns()) as target:
        programmed = []
        for layer in layers("off")[1]:
            with contextlib.suppress(KernelError):  # a mechanism that this kernel has not
                if layer_ownership.host_layer_owner(layer.name, layer.read(target)) is not Owner.NONE:
                    programmed.append(layer.name)
    port, is_own = _port(settings.metrics_address, agent)
    return NetworkFacts(view, probes=tuple(programmed), pod_rules=tuple(_pod_rules(view)), port=port, port_ours=is_own)


def _pod_rules(view: HostView) -> Iterator[str]:
    if view.nft:
        with contextlib.closing(NftSocket()) as nft:
            for table, chain in nft.chains():
                if table in _POD_TABLES or chain in _POD_CHAINS:
                    yield f"chain {chain} of table {table}"
    if view.legacy and any(one.name == "nat" for one in view.legacy) and view.has("iptables-legacy-restore"):
        saved = exec.run(["iptables-legacy-save", "-t", "nat"], check=False).stdout
        yield from (f"chain {name} of legacy nat" for name in sorted(_POD_CHAINS) if f":{name} " in saved)


def _port(address: str, agent: int) -> tuple[str, bool]:
    """Returns who listens on the port of the setting, and whether it is the agent; "" when no process does."""
    port = address.rpartition(":")[2]
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and str(one.laddr.port) == port:
            if agent and one.pid == agent:
                return f"the agent on {text(one.laddr)}", True
            return f"{_name(one.pid)} on {text(one.laddr)}", False
    return "", False


def _name(pid: int | None) -> str:
    with contextlib.suppress(psutil.Error):
        if pid:
            return f"{psutil.Process(pid).name()}[{pid}]"
    return "an unknown process"
