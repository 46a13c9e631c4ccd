# SPDX-License-Identifier: Apache-2.0
"""Faults of the netfilter backends: all rules of a pod are flushed under each of them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from agent.kernel import exec
from agent.lab.checks import CALM, Accounts, Checks, During
from agent.lab.lab import Lab
from agent.lab.node_services import LabBackend
from agent.lab.restarts import switch

POD = "shop/client"


class Flushing:
    """Flushes rules. Call `act` under traffic, then `report`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._found = list[dict[str, Any]]()
        self._owned = lab.ask("node1", "/v1/status")["backends"]["nftables"] == "tables are owned"

    def act(self, during: During) -> None:
        owned = "owned" if self._owned else "not owned: kernel before 6.9"
        flushed = f"nft flush ruleset in {POD}, tables {owned}"
        during(flushed, partial(self._flush, repaired=not self._owned), hitless=self._owned)
        during("backend nftables to iptables", lambda: switch(self._lab, LabBackend.IPTABLES))
        flushed = f"nft flush ruleset in {POD}, rules by iptables"
        during(flushed, partial(self._flush, repaired=True), hitless=False)
        during("backend iptables to nftables", lambda: switch(self._lab, LabBackend.NFTABLES))

    def report(self, check: Checks, accounts: Accounts) -> None:
        """Checks the repairs. `accounts` are those of the windows in which connections may bypass the proxy."""
        nftables, plain = self._found
        if self._owned:
            untouched = not nftables["repairs"] and nftables["in_kernel"] == "as wanted"
            check("the flush did not touch our nftables tables (flags OWNER and PERSIST)", untouched)
        else:
            check("with nftables the flush was noticed and repaired", nftables["in_kernel"] == "as wanted")
        done = bool(plain["repairs"]) and plain["in_kernel"] == "as wanted"
        check("with iptables the flush was noticed and repaired", done)
        passed = sum(one.escaped for one in accounts.values())
        for repair in plain["repairs"]:
            gone = f"{repair['seconds'] * 1e3:.1f} ms"
            print(f"       {repair['cause']} did it; rules gone for {gone}; {passed} connections bypassed the proxy")
            check("the culprit is named", repair["cause"].startswith("nft["), repair["cause"])

    def _flush(self, *, repaired: bool) -> None:
        """Flushes the rules; keeps the state of the kernel afterwards and the new repairs.

        `repaired`: wait for a repair.
        """
        lab = self._lab
        noted = len(lab.ask("node1", "/v1/explain", pod=POD)["recent_repairs"])
        exec.run(["nft", "flush", "ruleset"], netns=lab.netns(POD))
        deadline = time.monotonic() + (5 if repaired else CALM)
        while True:
            answer = lab.ask("node1", "/v1/explain", pod=POD)
            repairs = answer["recent_repairs"][noted:]
            if (repairs and answer["in_kernel"] == "as wanted") or time.monotonic() > deadline:
                self._found.append({"in_kernel": answer["in_kernel"], "repairs": repairs})
                return
            time.sleep(0.02)
