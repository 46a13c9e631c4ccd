"""What `sluice verify --all` asks of the node besides its pods, joined from the agent's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.core.desired import decide
from agent.core.pods import Pod, PodTable
from agent.core.settings import Settings
from agent.export import verifying
from agent.install.hostroot import HostRoot
from agent.reconciler.host import HostLoop
from agent.sources import bypassing
from agent.sources.watchfile import StaticFile
from agent.zds.server import ZdsServer

if TYPE_CHECKING:
    from agent.app.kubernetes import Kubernetes
    from agent.install.installer import Installer


def parts(
    settings: Settings,
    table: PodTable,
    kubernetes: Kubernetes | None,
    static: StaticFile,
    installer: Installer | None,
    zds: ZdsServer,
    host: HostLoop,
) -> list[verifying.Part]:
    def unknown(pod: Pod) -> bool:
        return table.get(pod.uid) is None and decide(pod, settings).enrolled

    notes = HostRoot(settings.host_root)
    return [
        verifying.bypassing(lambda: bypassing.find(notes.path(bypassing.RESULTS), unknown)),
        verifying.sources(
            lambda: kubernetes.missing if kubernetes else "",
            lambda: static.error or (kubernetes.error if kubernetes else ""),
        ),
        *([verifying.installation(installer)] if installer else []),
        verifying.ztunnel(zds),
        verifying.probes(host),
    ]
