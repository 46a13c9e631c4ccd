"""Somebody detaches our eBPF programs behind the agent's back; and switches of backend to and from eBPF.

The kernel announces no detaching: the agent finds it when it verifies (verify_seconds), or when it is told to.
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
    """`found` are the differences that verifying told, `left` those after the repair; `seconds` until that."""

    window: str
    found: list[str]
    left: list[str]
    seconds: float


class Detaching:
    """`act` under traffic, then `report`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._done = list[Detached]()
        self._pins = Pins.of(str(lab.spec.bpf_dir(NODE)))

    def act(self, during: During) -> None:
        server = self._pins.pod(self._cookie("shop/web"))
        for pod, place, link, words in (
            ("shop/client", self._pins.node, "connect4", "of the node"),
            ("shop/web", server, "lookup", "of shop/web"),
        ):
            window = f"bpftool link detach: {link} {words}"
            during(window, partial(self._detach, window, pod, place, link), hitless=False)
        during("backend ebpf to nftables", lambda: switch(self._lab, LabBackend.NFTABLES))
        during("backend nftables to ebpf", lambda: switch(self._lab, LabBackend.EBPF))

    def report(self, check: Checks, accounts: Accounts) -> None:
        """`accounts` are those of the windows in which connections may pass by."""
        for one in self._done:
            check(f"{one.window}: verify finds it", bool(one.found), "; ".join(one.found))
            check(f"{one.window}: verify --repair puts it back", not one.left, "; ".join(one.left))
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
        left = self._verify(pod, "POST")
        self._done.append(Detached(window, found, left, time.monotonic() - started))

    def _verify(self, pod: str, method: str = "GET") -> list[str]:
        (row,) = self._lab.ask(NODE, "/v1/verify", method, pod=pod)
        words: list[str] = row["differences"] or [row["error"]] * bool(row["error"])
        return words
