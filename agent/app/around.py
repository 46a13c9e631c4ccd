"""What `sluice explain` is told of a pod's surroundings, from the parts that know them."""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.listeners import Heard
from agent.export.explaining import Around
from agent.reconciler.host import HostLoop
from agent.sources import pathprograms
from agent.sources.listening import Listening
from agent.sources.namespaces import Namespaces
from agent.zds.server import ZdsServer


def around(
    zds: ZdsServer, namespaces: Namespaces, listening: Listening, host: HostLoop, places: Mapping[str, str]
) -> Around:
    """`places` as agent.cli.settings.places has it."""

    def heard(uid: str) -> Heard | None:
        target = namespaces.opened(uid)
        return None if target is None else listening.last(target)

    def place(uid: str) -> str:
        target = namespaces.opened(uid)
        return "" if target is None else target.netns.origin

    def programs(uid: str) -> tuple[str, ...]:
        target = namespaces.opened(uid)
        return () if target is None else pathprograms.others(target)

    return Around(zds.acknowledged, zds.sent, heard, lambda: host.status, host.claimed, place, programs, places)
