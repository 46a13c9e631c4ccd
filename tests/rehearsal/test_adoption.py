# SPDX-License-Identifier: Apache-2.0
"""Rules as istio-cni leaves them in a pod that runs and has traffic: adopted in one step that no connection notices."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support import istio
from support.rehearsal import SERVER, Node, node

from agent.core.model.redirect import Redirect

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
CLIENT = "shop/client"
TABLES = ("nat", "mangle", "raw")


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sluai") as made:
        made.traffic(CLIENT, made.run("shop/web", SERVER))
        made.more(CLIENT)
        yield made


def place(here: Node, inside: str, mechanism: str) -> None:
    """istio-cni's rules for ours while no agent runs: routing is the same for both, so it stays."""
    want = Redirect(dns=True)
    ours = "".join(f"delete table inet istio-ambient-{name}\n" for name in TABLES)
    if mechanism == "istio-nftables":
        here.on(f"{inside} nft -f -", stdin=ours + istio.nftables(want))
        return
    for family, program in ((4, "iptables-nft-restore"), (6, "ip6tables-nft-restore")):
        here.on(f"{inside} {program} --noflush", stdin=istio.iptables(want, family))
    here.on(f"{inside} nft -f -", stdin=ours)


@pytest.mark.parametrize("mechanism", istio.ISTIO)
def test_adopted_under_traffic(here: Node, mechanism: str) -> None:
    inside = f"nsenter --net={here.netns(CLIENT)}"
    here.on("systemctl stop sluice")
    place(here, inside, mechanism)
    listing = f"{inside} nft -s list ruleset"
    assert "sluice:" not in here.on(listing)
    here.more(CLIENT)
    here.on("systemctl start sluice")
    here.await_ready()
    here.right()
    assert here.on(listing).count("table inet istio-ambient-") == len(TABLES)
    assert "ISTIO_" not in here.on(listing) and "sluice:" in here.on(listing)
    here.more(CLIENT)
    told = json.loads(here.on(f"sluice explain {CLIENT} -o json"))
    assert told["in_kernel"] == "as desired"
    assert here.count(CLIENT)[1] == 0
    assert here.leaked() == 0
