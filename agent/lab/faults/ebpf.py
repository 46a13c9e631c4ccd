# SPDX-License-Identifier: Apache-2.0
"""Faults of the eBPF backend: programs detached without the agent, and switches of backend to and from eBPF.

The kernel does not announce a detachment: the agent finds it when it verifies, every verify_seconds or on request.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial

from agent.backends.ebpf.pins import PinDirectory, Pins
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.lab.checks import Accounts, Checks, During
from agent.lab.lab import Lab
from agent.lab.node_services import LabBackend
from agent.lab.restarts import switch

NODE = "node1"


@dataclass(frozen=True, slots=True)
class Detached:
    """`found` are the differences that verify reported, `remaining` those after the repair, `seconds` later."""

    window: str
    found: list[str]
    remaining: list[str]
    seconds: float


class Detaching:
    """Detaches programs. Call `act` under traffic, then `report`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._done = list[Detached]()
        self._pins = Pins.of(str(lab.spec.bpf_dir(NODE)))

    def act(self, during: During) -> None:
        server = self._pins.pod(self._cookie("shop/web"))
        for pod, place, link, owner in (
            ("shop/client", self._pins.node, "connect4", "of the node"),
            ("shop/web", server, "lookup", "of shop/web"),
        ):
            window = f"bpftool link detach: {link} {owner}"
            during(window, partial(self._detach, window, pod, place, link), hitless=False)
        during("backend ebpf to nftables", lambda: switch(self._lab, LabBackend.NFTABLES))
        during("backend nftables to ebpf", lambda: switch(self._lab, LabBackend.EBPF))

    def report(self, check: Checks, accounts: Accounts) -> None:
        """Checks the repairs. `accounts` are those of the windows in which connections may bypass the proxy."""
        for one in self._done:
            check(f"{one.window}: verify finds it", bool(one.found), "; ".join(one.found))
            check(f"{one.window}: verify --repair puts it back", not one.remaining, "; ".join(one.remaining))
            passed = accounts[one.window]
            after = f"{one.seconds * 1e3:.0f} ms"
            print(
                f"       put back after {after}; {passed.escaped} connections bypassed the client's proxy, "
                f"{passed.missed_inbound} by the server's, {passed.failed} failed"
            )

    def _cookie(self, ref: str) -> int:
        with Netns.open(self._lab.netns(ref)) as inside:
            return inside.id.cookie

    def _detach(self, window: str, pod: str, place: PinDirectory, link: str) -> None:
        shown = run(["bpftool", "-j", "link", "show", "pinned", str(place.link(link))]).stdout
        started = time.monotonic()
        run(["bpftool", "link", "detach", "id", str(json.loads(shown)["id"])])
        found = self._verify(pod)
        remaining = self._verify(pod, "POST")
        self._done.append(Detached(window, found, remaining, time.monotonic() - started))

    def _verify(self, pod: str, method: str = "GET") -> list[str]:
        (row,) = self._lab.ask(NODE, "/v1/verify", method, pod=pod)
        differences: list[str] = row["differences"] or [row["error"]] * bool(row["error"])
        return differences
