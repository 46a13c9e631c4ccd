# SPDX-License-Identifier: Apache-2.0
"""The rows of `sluice verify --all` besides the pods': each is right, wrong or unknown for a reason that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from agent.core.errors import KernelError
from agent.core.model.pods import Pod
from agent.export import verifying
from agent.export.verifying import Part, Row
from agent.install.installer import Look
from agent.install.planning import InstallPlan, Remove
from agent.sources.cni.cache import CachedSandbox


def rows(part: Part, *, repair: bool = False) -> list[Row]:
    async def asked() -> list[Row]:
        return await part(repair)

    return asyncio.run(asked())


def said(part: Part, *, repair: bool = False) -> tuple[str, str, str]:
    (one,) = rows(part, repair=repair)
    assert one["name"].startswith("(") and one["namespace"] == ""
    assert set(one) == {"namespace", "name", "state", "result", "differences", "scripts", "error"}
    return one["state"], one["result"], one["error"] or "; ".join(one["differences"])


@dataclass
class FakeInstaller:
    found: Look
    mode: str = "own"
    steps: int = 0

    def look(self) -> Look:
        return self.found

    def step(self) -> None:
        self.steps += 1
        self.found = Look(verdict=InstallPlan(file="02-sluice.conflist"))


def installation(installer: FakeInstaller) -> Part:
    return partial(verifying.installation, installer)  # type: ignore[arg-type]


def test_installation() -> None:
    right = InstallPlan(file="02-sluice.conflist", primary="10-lab.conflist", remarks=("good to know",))
    assert said(installation(FakeInstaller(Look(verdict=right)))) == ("own", "ok", "")
    lacking = FakeInstaller(Look(binary=True, verdict=InstallPlan((Remove("x"),), file="02-sluice.conflist")))
    assert said(installation(lacking)) == ("own", "drift", "cni: install the plugin; cni: remove x")
    assert lacking.steps == 0
    assert said(installation(lacking), repair=True) == ("own", "ok", "")
    nothing = FakeInstaller(Look(verdict=InstallPlan(error="no CNI configuration found yet")))
    assert said(installation(nothing)) == ("own", "drift", "no CNI configuration found yet")
    assert said(installation(FakeInstaller(Look()))) == ("own", "drift", "Sluice's configuration is missing")
    assert said(installation(FakeInstaller(Look(error="refused")))) == ("own", "unknown", "refused")


@dataclass
class FakeZds:
    connections: int
    unacknowledged: int = 0
    path: str = "/z.sock"


def ztunnel(connections: int, unacknowledged: int = 0) -> tuple[str, str, str]:
    return said(partial(verifying.ztunnel, FakeZds(connections, unacknowledged)))  # type: ignore[arg-type]


def test_ztunnel() -> None:
    assert ztunnel(1) == ("1 connected", "ok", "")
    assert ztunnel(2) == ("2 connected", "ok", "")
    assert ztunnel(1, 2) == ("1 connected", "drift", "2 pods are not acknowledged yet")
    state, result, words = ztunnel(0)
    assert (state, result) == ("0 connected", "drift")
    assert words.startswith("no ztunnel is connected to /z.sock; start it")


def test_sources() -> None:
    assert said(partial(verifying.sources, lambda: "", lambda: "")) == ("", "ok", "")
    assert said(partial(verifying.sources, lambda: "", lambda: "pods.yaml:3: no")) == ("", "drift", "pods.yaml:3: no")
    assert said(partial(verifying.sources, lambda: "not synced", lambda: "x")) == ("", "unknown", "not synced")


def test_bypassing() -> None:
    def one(name: str, *, chained: bool) -> CachedSandbox:
        return CachedSandbox("id", Pod("u", "shop", name), chained)

    found = rows(partial(verifying.bypassing, lambda: [one("b", chained=True), one("a", chained=False)]))
    assert [(row["namespace"], row["name"], row["state"], row["result"]) for row in found] == [
        ("shop", "a", "bypassing", "drift"),
        ("shop", "b", "bypassing", "drift"),
    ]
    assert "no sluice-cni" in found[0]["error"] and "note is lost" in found[1]["error"]
    assert rows(partial(verifying.bypassing, list)) == []

    def fails() -> Iterable[Any]:
        raise KernelError("look up /proc/self/ns/net", 13, "Permission denied")

    assert said(partial(verifying.bypassing, fails))[1] == "unknown"
