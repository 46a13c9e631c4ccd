# SPDX-License-Identifier: Apache-2.0
"""Asks the node's ztunnels how connections went on, when a user asks: the pages are read by the command."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from agent.core.errors import SluiceError
from agent.core.names import ZTUNNEL_ADMIN_PORT, ZTUNNEL_STATS_PORT
from agent.flows.wire_evidence import WireEvidence, wire_evidence
from agent.kernel.admin_socket import ask
from agent.kernel.process_http import page

Dump = Mapping[str, Any]


class ZtunnelPages:
    """The pages of all ztunnels of a node. `error` says why they are not known; "" if they are."""

    def __init__(self, run_dir: str) -> None:
        """Reads them; never raises."""
        self.dumps = list[Dump]()
        self.error = ""
        read = time.time()
        pages = list[tuple[Dump, str]]()
        try:
            status = ask(run_dir, "/v1/status")
            for pid in _separate(status["ztunnel_processes"]):
                dump = json.loads(page(pid, ZTUNNEL_ADMIN_PORT, "/config_dump"))
                pages.append((dump, page(pid, ZTUNNEL_STATS_PORT, "/stats/prometheus").decode(errors="replace")))
            self.evidence = wire_evidence(pages, status["ztunnels_since"], read)
            self.dumps = [dump for dump, _ in pages]
        except (SluiceError, OSError) as error:
            self.error = " ".join(str(error).split())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.error = f"cannot read ztunnel's pages, their format is unknown: {type(error).__name__} {error}"
        if self.error:
            self.evidence = WireEvidence(since=read, read=read)

    def add_to(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the connection with `wire` ("" unless ztunnel took it), `identity` and `remote_identity`."""
        found = self.evidence.carriage(row)
        wire = found.wire.value if row["fate"] == "captured" else ""
        return {**row, "wire": wire, "identity": found.identity, "remote_identity": found.remote_identity}

    def certificate(self, namespace: str, service_account: str) -> dict[str, str]:
        """Returns identity, state and expiry of the account's certificate; empty if ztunnel has none."""
        account = f"/ns/{namespace}/sa/{service_account}"
        for one in (one for dump in self.dumps for one in dump.get("certificates", ())):
            if one["identity"].endswith(account):
                chain = one.get("certChain") or [{}]
                return {
                    "identity": one["identity"],
                    "state": one["state"],
                    "until": chain[0].get("expirationTime", ""),
                }
        return {}

    def facts(self, account: Mapping[str, str] | None, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns what `explain` shows of the mesh: the certificate of `account`, and how connections went on."""
        captured = ((row, self.evidence.carriage(row)) for row in rows if row["fate"] == "captured")
        counts = Counter((row["direction"], found.wire.value, found.remote_identity) for row, found in captured)
        return {
            "error": self.error,
            "certificate": self.certificate(account["namespace"], account["service_account"]) if account else {},
            "carried": [
                {"direction": direction, "wire": wire, "remote_identity": identity, "connections": count}
                for (direction, wire, identity), count in counts.most_common()
            ],
        }


def _separate(pids: Iterable[int]) -> list[int]:
    """Returns the processes. Raises SluiceError for none, and if two of them have one pair of ports."""
    pids = sorted(pids)
    spaces = {os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids}  # noqa: PTH116 - as text in errors
    if not pids:
        raise SluiceError("no ztunnel is connected to the agent")
    if len(spaces) != len(pids):
        numbers = ", ".join(map(str, pids))
        raise SluiceError(f"ztunnels {numbers} share a network namespace, and only one of them has its ports")
    return pids
