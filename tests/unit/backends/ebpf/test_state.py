# SPDX-License-Identifier: Apache-2.0
"""The plan for one pod: in an order in which nothing escapes, and nothing when all is right."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest

from agent.backends.ebpf import object_files, state
from agent.backends.ebpf.attachments import Attach, Attached, Detach, Load, Unpin
from agent.backends.ebpf.compiling import entries
from agent.backends.ebpf.object_files import POD, BpfProgram
from agent.backends.ebpf.state import (
    DropCounters,
    DropPins,
    DropPod,
    DropPolicy,
    EndOlder,
    Listen,
    PodEntries,
    PutPod,
    PutPolicy,
    Unlisten,
    plan,
)
from agent.backends.ebpf.ztunnels import Listener, Role
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.model.topology import Link, PodTopology, Route
from agent.kernel.bpf.link import LinkInfo

COOKIE = 99
ROUTES = tuple(Route(ip_network(default), 2, 0) for default in ("0.0.0.0/0", "::/0"))
WIRING = PodTopology(links=(Link(2, "eth0"),), addresses=(ip_address("10.0.0.5"),), routes=ROUTES)
PLAIN, PORTS = Redirect(), Redirect(exclude=Exclusions(outbound_ports=((80, 82),)))
NETWORKS = Redirect(exclude=Exclusions(outbound_networks=("10.0.0.0/8",)))
LINKS: dict[str, BpfProgram] = {
    "lookup": object_files.LOOKUP,
    "ingress-2": object_files.INGRESS,
    "egress-2": object_files.EGRESS,
}


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the objects are built here or not."""
    monkeypatch.setattr(object_files, "digest", lambda name: f"of-{name}")


def listener(cookie: int) -> Listener:
    return Listener(cast(TcpSocket, _Socket(cookie)), COOKIE, cast(Any, None))


class _Socket:
    def __init__(self, cookie: int) -> None:
        self.cookie = cookie


def synced(redirect: Redirect, **changes: Any) -> PodEntries:
    """What a pod is like that was brought to that."""
    want = entries(redirect, WIRING, COOKIE)
    ids = {program.name: n for n, program in enumerate(POD, 1)}
    links = {name: LinkInfo(n, ids[program.name], 5) for n, (name, program) in enumerate(LINKS.items())}
    offered = {Role.OUTBOUND: (listener(11),), Role.INBOUND: (listener(12),)}
    listening = {(Role.OUTBOUND, 0): 11, (Role.INBOUND, 0): 12}
    attached = Attached(ids, links)
    have = PodEntries(
        COOKIE,
        wiring=WIRING,
        pod=want.pod,
        prefixes=frozenset(want.prefixes),
        attached=attached,
        listening=listening,
        offered=offered,
        left=True,
    )
    return replace(have, **changes)


def changes(want: Redirect | None, have: PodEntries) -> list[Any]:
    return [step.payload for step in plan(want, have).steps]


def kinds(want: Redirect | None, have: PodEntries) -> list[type]:
    return [type(change) for change in changes(want, have)]


@pytest.mark.parametrize("want", [PLAIN, PORTS, NETWORKS])
def test_nothing_is_done_when_all_is_right(want: Redirect) -> None:
    assert not plan(want, synced(want)) and plan(want, synced(want)).differences == ()
    assert not plan(None, PodEntries(COOKIE)), "nor where nothing is and nothing is wanted"


def test_enrolment_ends_with_the_entry_and_with_what_is_older() -> None:
    """Everything that serves a captured connection is there before the first one is captured."""
    have = PodEntries(COOKIE, wiring=WIRING, offered=synced(PORTS).offered)
    order = kinds(PORTS, have)
    assert order == [PutPolicy, Load, Load, Attach, Attach, Attach, Listen, Listen, PutPod, EndOlder]
    assert "its map entry is missing" in plan(PORTS, have).differences


def test_older_connections_run_on_where_they_are_to() -> None:
    assert EndOlder in kinds(PLAIN, PodEntries(COOKIE, wiring=WIRING))
    assert EndOlder not in kinds(replace(PLAIN, preserve=True), PodEntries(COOKIE, wiring=WIRING))
    assert EndOlder not in kinds(PORTS, synced(PLAIN)), "a change captures nothing anew"


def test_a_change_puts_the_policy_in_before_the_entry_and_takes_the_old_one_out_after() -> None:
    have = synced(PORTS)
    old, new = (entries(want, WIRING, COOKIE) for want in (PORTS, NETWORKS))
    assert changes(NETWORKS, have) == [
        PutPolicy(new.pod.policy, new.prefixes), PutPod(new.pod), DropPolicy(old.pod.policy)
    ]  # fmt: skip
    assert kinds(PLAIN, have) == [PutPod, DropPolicy], "no policy any more"
    assert kinds(PORTS, synced(PLAIN)) == [PutPolicy, PutPod], "none before"


@pytest.mark.parametrize("left", [0, 1])
def test_a_policy_that_somebody_changed_is_put_in_again_and_stays(left: int) -> None:
    have = synced(PORTS)
    spoiled = replace(have, prefixes=frozenset(sorted(have.prefixes)[:left]))
    assert kinds(PORTS, spoiled) == [PutPolicy]
    assert plan(PORTS, spoiled).differences


def test_addresses_that_change_change_the_entry() -> None:
    have = synced(PLAIN, wiring=replace(WIRING, addresses=(ip_address("10.0.0.6"),)))
    assert kinds(PLAIN, have) == [PutPod]


def test_an_interface_that_comes_is_watched() -> None:
    have = synced(PLAIN, wiring=replace(WIRING, links=(*WIRING.links, Link(3, "eth1"))))
    assert [change.link for change in changes(PLAIN, have) if isinstance(change, Attach)] == ["ingress-3", "egress-3"]


def test_listeners_are_only_ever_put_in() -> None:
    """One that closes leaves by itself; one that cannot be seen for a moment may still serve."""
    assert changes(PLAIN, synced(PLAIN, offered={})) == []
    assert changes(PLAIN, synced(PLAIN, offered={Role.OUTBOUND: (), Role.INBOUND: ()})) == []
    newer, older = listener(21), listener(11)
    have = synced(PLAIN, offered={Role.OUTBOUND: (newer, older), Role.INBOUND: (listener(12),)})
    assert changes(PLAIN, have) == [Listen(Role.OUTBOUND, 0, newer), Listen(Role.OUTBOUND, 1, older)]
    assert plan(PLAIN, have).differences == (), "that ztunnel is another one is not somebody's doing"


def test_no_more_listeners_than_there_are_slots() -> None:
    many = tuple(listener(number) for number in range(30, 35))
    found = changes(PLAIN, synced(PLAIN, offered={Role.INBOUND: many}))
    assert found == [Listen(Role.INBOUND, slot, many[slot]) for slot in (0, 1)]


def test_removal_begins_with_the_entry_and_leaves_nothing() -> None:
    have = synced(PORTS)
    have = replace(have, attached=replace(have.attached, old=("lookup@old",)))
    found = changes(None, have)
    assert isinstance(found[0], DropPod)
    assert [one.link for one in found if isinstance(one, Detach)] == [*LINKS]
    assert {one.program for one in found if isinstance(one, Unpin)} == {
        "lookup@old", "lookup@of-lookup", "ingress@of-wire", "egress@of-wire"
    }  # fmt: skip
    assert [(one.role, one.slot) for one in found if isinstance(one, Unlisten)] == [*have.listening]
    assert DropPolicy(have.pod.policy if have.pod else 0) in found and DropCounters() in found


def test_prefixes_of_no_pod_are_dropped() -> None:
    """What an agent was killed over."""
    assert changes(None, PodEntries(0, stray=7)) == [DropPolicy(7)]


def test_removal_goes_on_where_an_earlier_one_ended() -> None:
    have = replace(synced(PORTS), pod=None, prefixes=frozenset())
    assert DropPod not in kinds(None, have)
    assert [one.link for one in changes(None, have) if isinstance(one, Detach)] == [*LINKS]
    assert changes(None, PodEntries(COOKIE, left=True)) == [DropPins()]


def test_counters_go_when_nobody_counts_any_more_and_before_the_last_that_tells_of_the_pod() -> None:
    order = kinds(None, synced(PORTS))
    at = order.index(DropCounters)
    assert Detach not in order[at:] and Unpin not in order[:at] and order[-1] == DropPins


def test_the_plan_is_text_for_people() -> None:
    text = str(plan(PORTS, PodEntries(COOKIE, wiring=WIRING, offered=synced(PORTS).offered)))
    for part in ("map policies:", "bpftool prog loadall lookup.bpf.o", "map pods: 99 =", "10.0.0.5", "socket 11"):
        assert part in text
    assert state.describe(entries(PLAIN, PodTopology(routes=ROUTES), COOKIE).pod).endswith("no address")
