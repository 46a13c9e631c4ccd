# SPDX-License-Identifier: Apache-2.0
"""`sluice verify --all` is wrong exactly when something is wrong: 0, then 1 for each fault made by hand, then 0 again.

Faults that the agent repairs at once would prove nothing here: each of these stays until it is put right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from support.node import until
from support.rehearsal import PATIENCE, SERVER, Node, node

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
STATIC = "/etc/sluice-pods.yaml"
LEGACY = "iptables-legacy"


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    # Legacy changes wake nobody, so they stay until the next look, which is far away.
    with node("sluav", backend=LEGACY, static_pods=STATIC, verify_seconds=3000.0) as made:
        made.put(STATIC, "pods: []\n")
        made.run("shop/web", SERVER)
        made.right()
        until(made.left_alone, "the agent has looked at it for the last time", PATIENCE)
        yield made


Fault = Callable[[Node], contextlib.AbstractContextManager[dict[str, str]]]


@contextlib.contextmanager
def rules_flushed(here: Node) -> Iterator[dict[str, str]]:
    inside = f"nsenter --net={here.netns('shop/web')}"
    here.on(f"{inside} iptables-legacy -t nat -F")
    try:
        yield {"shop/web": "iptables-legacy"}
    finally:
        here.verify("--repair")


@contextlib.contextmanager
def one_rule_gone(here: Node) -> Iterator[dict[str, str]]:
    here.on(f"nsenter --net={here.netns('shop/web')} ip6tables-legacy -t nat -D ISTIO_OUTPUT 1")
    try:
        yield {"shop/web": "iptables-legacy"}
    finally:
        here.verify("--repair")


@contextlib.contextmanager
def proxy_away(here: Node) -> Iterator[dict[str, str]]:
    here.on("systemctl stop sluice-ztunnel")
    until(lambda: here.status()["ztunnel_connections"] == 0, "the agent sees it")
    try:
        yield {"(ztunnel)": "no ztunnel is connected", "shop/web": "no ztunnel is connected"}
    finally:
        here.on("systemctl start sluice-ztunnel")


@contextlib.contextmanager
def static_file_damaged(here: Node) -> Iterator[dict[str, str]]:
    here.put(STATIC, "pods: [{namespace: shop}]\n")
    until(lambda: here.status()["static_pods"] != "ok", "the agent has read it")
    try:
        yield {"(sources of pods)": "name: is missing"}
    finally:
        here.put(STATIC, "pods: []\n")


@contextlib.contextmanager
def bypassed(here: Node) -> Iterator[dict[str, str]]:
    """P01: for a moment the primary's list is the first, and a pod is made by it."""
    with here.held() as names:
        here.on(f"rm {names['/etc/cni']}/net.d/02-sluice.conflist")
        until(lambda: "sluice" not in here.on("pod networks"), "the runtime has the primary's list alone")
        here.run("shop/astray")
    until(lambda: "(CNI installation)" not in here.verify().wrong, "it is installed again", PATIENCE)
    try:
        yield {"shop/astray": "its CNI configuration had no sluice-cni"}
    finally:
        here.stop("shop/astray")


@contextlib.contextmanager
def note_lost(here: Node) -> Iterator[dict[str, str]]:
    """The state of a pod that runs is gone."""
    here.run("shop/lost")
    until(lambda: "shop/lost" not in here.verify().wrong, "it is captured")
    here.on(f"systemctl stop sluice; rm /run/sluice/pods/{here.netns('shop/lost').rpartition('/')[2]}*")
    here.on("systemctl start sluice")
    here.await_ready()
    try:
        yield {"shop/lost": "its note is lost"}
    finally:
        here.stop("shop/lost")


@contextlib.contextmanager
def plugin_replaced(here: Node) -> Iterator[dict[str, str]]:
    with here.held() as names:
        here.on(f"cp /bin/true {names['/opt/cni/bin']}/sluice-cni")
        yield {"(CNI installation)": "install the plugin"}


@contextlib.contextmanager
def list_damaged(here: Node) -> Iterator[dict[str, str]]:
    with here.held() as names:
        here.on(f"truncate -s 40 {names['/etc/cni']}/net.d/02-sluice.conflist")
        yield {"(CNI installation)": "write 02-sluice.conflist"}


FAULTS: tuple[Fault, ...] = (
    rules_flushed, one_rule_gone, proxy_away, static_file_damaged, bypassed, note_lost, plugin_replaced, list_damaged,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_wrong_exactly_while_something_is_wrong(here: Node, fault: Fault) -> None:
    before = here.verify()
    assert (before.code, before.wrong) == (0, {}), before.table
    with fault(here) as wanted:
        found = here.verify()
        assert found.code == 1, found.table
        assert found.wrong.keys() == wanted.keys(), found.table
        for name, words in wanted.items():
            assert words in found.wrong[name]
            assert name.rpartition("/")[2] in found.table
    here.right()
    assert here.verify().wrong == {}


def test_p03_ztunnel_is_there_and_does_not_listen(here: Node) -> None:
    """The agent's own passes find that, too, and have ztunnel told anew: so it is asked at once, or again."""

    def told() -> bool:
        here.on(f"nsenter --net={here.netns('shop/web')} ss -ltK '( sport = :15001 or sport = :15006 )'")
        found = here.verify()
        return found.code == 1 and list(found.wrong) == ["shop/web"] and "nothing listens" in found.wrong["shop/web"]

    until(told, "verify says that nothing listens in the pod", PATIENCE)
    here.verify("--repair")
    here.right()


def test_the_agent_away_is_unknown(here: Node) -> None:
    here.on("systemctl stop sluice")
    found = here.verify()
    assert found.code == 2 and "cannot ask the agent" in found.table
    here.on("systemctl start sluice")
    here.await_ready()
    assert here.verify().code == 0
