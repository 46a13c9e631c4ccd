# SPDX-License-Identifier: Apache-2.0
"""The primary CNI's configuration is rewritten in each way known from docs/field-problems.md.

First the agent can only look: `sluice verify --all` must say what is wrong. Then it may repair, and all must be right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from support.node import until
from support.rehearsal import BIN, PATIENCE, Node, node

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
INSTALLATION = "(CNI installation)"


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node("sluap") as made:
        made.run("shop/web")
        made.right()
        yield made


def changed(here: Node, number: int) -> str:
    """The primary's list after an upgrade of it."""
    value = json.loads(here.on("cat /etc/cni/net.d/10-lab.conflist"))
    value["plugins"] = [value["plugins"][0], {"type": "tuning", "mtu": 1400 + number}]
    return json.dumps(value)


# Each is given the directory's other name and the new list.
def truncated(here: Node, at: str, text: str) -> None:
    here.on(f"cat >{at}/net.d/10-lab.conflist", stdin=text)


def moved(here: Node, at: str, text: str) -> None:
    here.on(f"cat >{at}/net.d/.new && mv {at}/net.d/.new {at}/net.d/10-lab.conflist", stdin=text)


def created(here: Node, at: str, text: str) -> None:
    here.on(f"rm {at}/net.d/10-lab.conflist; cat >{at}/net.d/10-lab.conflist", stdin=text)


def directory(here: Node, at: str, text: str) -> None:
    here.on(f"rm -r {at}/net.d; mkdir {at}/net.d; cat >{at}/net.d/10-lab.conflist", stdin=text)


def linked(here: Node, at: str, text: str) -> None:
    here.on(f"mkdir -p {at}/of-primary; cat >{at}/of-primary/list", stdin=text)
    here.on(f"ln -s ../of-primary/list {at}/net.d/.new && mv -T {at}/net.d/.new {at}/net.d/10-lab.conflist")


def ours_dropped(here: Node, at: str, text: str) -> None:
    """As aws-node writes its own list anew and drops who was chained (P08), where that list is ours."""
    here.on(f"cat >{at}/net.d/02-sluice.conflist", stdin=text)


def ours_removed(here: Node, at: str, text: str) -> None:
    """As Cilium does with whatever it does not know."""
    here.on(f"mv {at}/net.d/02-sluice.conflist {at}/net.d/02-sluice.conflist.cilium_bak")


def first(here: Node, at: str, text: str) -> None:
    """A second CNI, whose list the runtime would take before ours."""
    here.on(f"cat >{at}/net.d/00-second.conflist", stdin=text)


Way = Callable[[Node, str, str], None]
WAYS: tuple[Way, ...] = (truncated, moved, created, directory, linked, ours_dropped, ours_removed, first)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_p07_p08_told_while_it_is_wrong_and_repaired(here: Node, way: Way) -> None:
    text = changed(here, WAYS.index(way))
    with here.held() as names:
        way(here, names["/etc/cni"], text)
        found = here.verify()
        assert found.code == 1
        assert list(found.wrong) == [INSTALLATION], found.table
        row = found.rows[INSTALLATION]
        assert (row["state"], row["result"]) == ("own", "drift")
        assert any("write 0" in line for line in row["differences"]), row
        assert INSTALLATION in found.table and "drift" in found.table
    here.right()
    assert here.wrapped()
    here.on("rm -f /etc/cni/net.d/00-second.conflist")
    here.right()
    until(here.wrapped, "our list wraps the primary one", PATIENCE)


def test_the_binary_is_gone(here: Node) -> None:
    with here.held() as names:
        here.on(f"rm {names[BIN]}/sluice-cni")
        found = here.verify()
        assert found.code == 1
        assert found.wrong == {INSTALLATION: "cni: install the plugin"}
    here.right()
    assert here.code(f"test -x {BIN}/sluice-cni") == 0


def test_without_the_agent_nobody_can_tell_and_install_check_does(here: Node) -> None:
    here.on("systemctl stop sluice")
    here.on("cat >/etc/cni/net.d/10-lab.conflist", stdin=changed(here, 99))
    found = here.verify()
    assert (found.code, found.rows) == (2, {})
    assert "is it running" in found.table
    check = here.machine.on("sluice install --check --config /etc/sluice.yaml", check=False)
    assert check.returncode == 1 and "write 02-sluice.conflist" in check.stdout
    here.on("systemctl start sluice")
    here.await_ready()
    here.right()
    assert here.wrapped()
