# SPDX-License-Identifier: Apache-2.0
"""Connections over the admin API: live ones, the latest ended ones, and future ones by long polling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod, PodTable
from agent.core.text import natural
from agent.export.following import Followers
from agent.flows.accounting import Accounting
from agent.flows.record import Fate
from agent.flows.resolved_record import ResolvedRecord
from agent.kernel.http import Request

_MOST = 500  # ended connections in an answer that asks for no number
_FATES = tuple(fate.word for fate in Fate)
Keep = Callable[[ResolvedRecord], bool]


class ConnectionsApi:
    """Answers GET /v1/connections. `accounting` is None if the setting is off."""

    def __init__(self, accounting: Accounting | None, table: PodTable) -> None:
        self._accounting = accounting
        self._table = table
        self._followers = Followers()

    async def connections(self, request: Request) -> dict[str, Any]:
        """Returns connections. Raises SluiceError.

        With `after` (a number) it returns the next ones that ended since then, and waits for them up to `wait` seconds.
        `pod` and `fate` filter; the newest `limit` ended ones are returned, and with live=false only those.
        """
        if self._accounting is None:
            raise SluiceError("connections are not accounted for: the setting accounting is off")
        query = request.query
        fate = query.get("fate", "")
        if fate and fate not in _FATES:
            raise SluiceError(f"no fate {fate!r}; there are {', '.join(_FATES)}")
        if "after" in query:
            name = query.get("pod", "")
            keep = _chosen(self._table.one(name), name, fate)
            return await self._followers.records(self._accounting.recent, query, keep, "ended")
        return await self._list(self._accounting, query, fate)

    async def totals(self) -> list[dict[str, Any]]:
        """Returns connections by direction, fate and reason; none without accounting. Raises SluiceError."""
        return [] if self._accounting is None else await asyncio.to_thread(self._accounting.totals)

    def close(self) -> None:
        """Answers all waiting requests now: the agent ends."""
        self._followers.close()

    async def _list(self, accounting: Accounting, query: Mapping[str, str], fate: str) -> dict[str, Any]:
        name = query.get("pod", "")
        limit = natural(query, "limit", _MOST)
        pod = self._table.one(name)  # None: connections may outlive their pod here
        await accounting.look()
        ended = accounting.recent.last(limit, _chosen(pod, name, fate))
        number = accounting.recent.number
        if name and pod is None and not accounting.recent.last(1, _chosen(None, name, "")):
            raise SluiceError(f"no pod {name!r} on this node, nor a connection of one; `sluice pods` lists them")
        live = list[dict[str, Any]]()
        if query.get("live") != "false" and not (name and pod is None):
            live = await asyncio.to_thread(accounting.live, pod)
        return {
            "collector": accounting.name,
            "live": [row for row in live if fate in ("", row["fate"])],
            "ended": [record.as_dict() for record in ended],
            "losses": dict(await asyncio.to_thread(accounting.losses)),
            "next": number,
        }


def _chosen(pod: Pod | None, name: str, fate: str) -> Keep:
    wanted = pod.key if pod else name

    def keep(record: ResolvedRecord) -> bool:
        if fate and record.connection.fate.word != fate:
            return False
        return not name or f"{record.namespace}/{record.pod}" == wanted or (pod is None and record.pod == name)

    return keep
