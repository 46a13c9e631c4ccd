# SPDX-License-Identifier: Apache-2.0
"""DNS queries over the admin API: the latest ones, their summary, and future ones by long polling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod, PodTable
from agent.core.text import natural
from agent.export.following import Followers
from agent.flows.dns.dns_account import KEPT, DnsAccount
from agent.flows.dns.queries import DnsQuery
from agent.flows.dns.summary import summary
from agent.kernel.http import Request

_OFF = "DNS queries are not accounted for: the setting dns_accounting is off, or the setting accounting"


class DnsApi:
    """Answers GET /v1/dns. `account` is None if the setting is off."""

    def __init__(self, account: DnsAccount | None, table: PodTable) -> None:
        self._account = account
        self._table = table
        self._followers = Followers()

    async def queries(self, request: Request) -> dict[str, Any]:
        """Returns queries. Raises SluiceError.

        With `after` (a number) it returns the next ones that ended since then, and waits for them up to `wait` seconds.
        `pod` filters; else the newest `limit` are returned, and a summary of all that are kept of that pod, or node.
        """
        if self._account is None:
            raise SluiceError(_OFF)
        query = request.query
        name = query.get("pod", "")
        pod = self._table.one(name)
        keep = _of(pod, name)
        if "after" in query:
            return await self._followers.records(self._account.recent, query, keep, "queries")
        limit = natural(query, "limit", KEPT)
        await self._account.look()
        number = self._account.recent.number
        lost = self._account.lost
        found = self._account.of(pod.uid) if pod else None
        if found:
            kept, lost = found
        else:  # of all pods, or of one that is gone
            kept = self._account.recent.last(number, keep)
        if name and not pod and not kept:
            raise SluiceError(f"no pod {name!r} on this node, nor a query of one; `sluice pods` lists them")
        shown = kept[-limit:] if limit else []
        return {"queries": [one.as_dict() for one in shown], "summary": summary(kept, lost), "next": number}

    async def summary(self, pod: Pod) -> dict[str, Any] | None:
        """Summarises the pod's last queries; None if they are not accounted for. Raises SluiceError."""
        if self._account is None:
            return None
        await self._account.look()
        found = self._account.of(pod.uid)
        return summary(*found) if found else None

    def close(self) -> None:
        """Answers all waiting requests now: the agent ends."""
        self._followers.close()


def _of(pod: Pod | None, name: str) -> Callable[[DnsQuery], bool]:
    if not name:
        return lambda _: True
    if pod:
        return lambda query: query.pod.uid == pod.uid
    return lambda query: name in (query.pod.name, query.pod.key, query.pod.uid)
