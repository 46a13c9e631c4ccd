# SPDX-License-Identifier: Apache-2.0
"""The version before this one, this one, and back, under traffic: no connection fails or escapes.

Nothing counts as a repair, because each version reads the rules and notes of the other. Each has its own rules in the
end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from support.node import until
from support.rehearsal import PATIENCE, SERVER, Node, node
from support.rehearsalnodes import dist, previous

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
CLIENT = "shop/client"


@pytest.fixture(scope="module")
def first(here: Node) -> str:
    """The rules of the version before this one."""
    return rules(here)


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sluan", previous()) as made:
        made.traffic(CLIENT, made.run("shop/web", SERVER))
        made.more(CLIENT)
        yield made


def rules(here: Node) -> str:
    """Returns the client's rules and routes without counters, and without leftovers of an older version.

    Those are the route and the rule for sockets that are bound to an interface.
    """
    shown = here.on(f"nsenter --net={here.netns(CLIENT)} sh -c 'nft -s list ruleset; ip rule; ip route show table 100'")
    return re.sub(r"^(local default dev .* metric .*|.*from all to 127\.0\.0\.0/8 lookup .*)\n", "", shown, flags=re.M)


def switch(here: Node, archive_name: str) -> None:
    version = archive_name.removeprefix("sluice-").removesuffix(".tar.gz")
    here.on("systemctl restart sluice")
    until(lambda: here.code("sluice status") == 0 and here.status()["version"] == version, f"{version} runs", PATIENCE)
    here.await_ready()
    here.on("systemctl start sluice-ztunnel@next")
    ztunnels(here, 2)
    here.on("systemctl restart sluice-ztunnel")
    ztunnels(here, 2)
    here.on("systemctl stop sluice-ztunnel@next")
    ztunnels(here, 1)


def ztunnels(here: Node, number: int) -> None:
    def there() -> bool:
        status = here.status()
        return status["ztunnel_connections"] == number and not status["ztunnel_unacknowledged"]

    until(there, f"{number} ztunnels have every pod", PATIENCE)


@pytest.mark.parametrize("step", range(2))
def test_p58_forward_and_back(here: Node, first: str, step: int) -> None:
    archive = previous() if step % 2 else dist()
    here.deploy(archive)
    switch(here, archive.name)
    here.right()
    here.more(CLIENT)
    if step % 2:
        assert rules(here) == first
    status = here.status()
    assert status["damaged_state_files"] == []
    assert status["pods"] == {"enabled": 2}
    assert [row["repairs"] for row in json.loads(here.on("sluice pods -o json"))] == [0, 0]
    assert here.count(CLIENT)[1] == 0
    assert here.leaked() == 0
