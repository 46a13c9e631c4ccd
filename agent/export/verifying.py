# SPDX-License-Identifier: Apache-2.0
"""The parts of the node that `sluice verify --all` checks in addition to the pods, one row each.

A row has the shape of a pod's: `result` is ok, drift (`differences` or `error` say what is wrong) or unknown (it could
not be examined). Its name is in brackets, which no pod's name can have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from agent.core.errors import SluiceError
from agent.reconciler.host_loop import HostLoop
from agent.sources.cni.cache import CachedSandbox
from agent.zds.server import ZdsServer

if TYPE_CHECKING:
    from agent.install.installer import Installer

Row = dict[str, Any]
Found = Mapping[str, tuple[tuple[str, ...], str]]  # what differs, per layer: lines, and the script that puts it right
# A function of this module with its first arguments; called with whether to repair what differs first.
Part = Callable[[bool], Awaitable[list[Row]]]


def row(name: str, state: str, differences: Found | None = None, error: str = "", *, unknown: bool = False) -> Row:
    differences = differences or {}
    return {
        "namespace": "",
        "name": name,
        "state": state,
        "result": "unknown" if unknown else "drift" if differences or error else "ok",
        "differences": lines(differences),
        "scripts": {layer: script for layer, (_, script) in differences.items()},
        "error": error,
    }


def lines(by_layer: Found) -> list[str]:
    return [f"{layer}: {line}" for layer, (differences, _) in by_layer.items() for line in differences]


async def probes(host: HostLoop, repair: bool) -> list[Row]:
    """Verifies the exemption of the node's probes."""
    name = "(probes of the node)"
    try:
        if repair:
            await host.settled()
        return [row(name, host.status.mechanism, await host.inspect(), host.status.error)]
    except (SluiceError, OSError) as failure:
        return [row(name, host.status.mechanism, error=str(failure), unknown=True)]


async def installation(installer: Installer, repair: bool) -> list[Row]:
    """Verifies the plugin's binary and Sluice's list: the runtime's first, derived from the present primary CNI."""
    if repair:
        installer.step()
    look = installer.look()
    todo = (*(("install the plugin",) if look.binary else ()), *map(str, look.verdict.actions))
    error = look.error or look.verdict.error or ("" if look.right or todo else "Sluice's configuration is missing")
    differences = {"cni": (todo, "")} if todo else {}
    return [row("(CNI installation)", installer.mode, differences, error, unknown=bool(look.error))]


async def ztunnel(zds: ZdsServer, _: bool) -> list[Row]:
    """Verifies the proxy's connection. Each pod's row says whether it listens there."""
    late = zds.unacknowledged
    error = ""
    if not zds.connections:
        refused = "new pods wait, and connections of pods in which none listens are refused"
        error = f"no ztunnel is connected to {zds.path}; start it: {refused}"
    elif late:
        error = f"{late} pod{'s are' if late > 1 else ' is'} not acknowledged yet"
    return [row("(ztunnel)", f"{zds.connections} connected", error=error)]


async def sources(missing: Callable[[], str], failing: Callable[[], str], _: bool) -> list[Row]:
    """Verifies the sources of pods.

    `missing`: why not all pods are known; `failing`: what is out of date or not done.
    """
    reason = missing()
    return [row("(sources of pods)", "", error=reason or failing(), unknown=bool(reason))]


async def bypassing(find: Callable[[], Iterable[CachedSandbox]], _: bool) -> list[Row]:
    """Lists running pods that should be captured but are unknown to the agent. `find` blocks."""
    try:
        pods = sorted(await asyncio.to_thread(lambda: list(find())), key=lambda one: one.pod.key)
    except (SluiceError, OSError) as error:
        return [row("(unannounced pods)", "", error=str(error), unknown=True)]
    return [
        {**row(one.pod.name, "bypassing", error=_KNOWN if one.chained else _MADE), "namespace": one.pod.namespace}
        for one in pods
    ]


_ANEW = "stop the pod so that it is re-created"
_MADE = f"not captured: its CNI configuration had no sluice-cni; {_ANEW}"
_KNOWN = f"runs, but the agent does not know it: its note is lost; {_ANEW}"
