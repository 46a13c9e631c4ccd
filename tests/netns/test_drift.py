# SPDX-License-Identifier: Apache-2.0
"""Drift as the kernel tells it: real changes by others wake the pod, are named, seen and repaired; noise does not."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.rules import Pod, layers
from support.rules import pod as made
from support.watched import Spy, Watched, prepare, watch

from agent.backends.nftables.backend import NftablesBackend
from agent.backends.nftables.rendering import TABLES, table_command
from agent.core import names
from agent.core.model.redirect import Redirect
from agent.core.wire.nftables import GROUP_NFTABLES, NETLINK_NETFILTER, NEWGEN, TableFlag
from agent.kernel.netlink import notifications
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netlink.notifications import Notifications
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
WANT = Redirect()
IP = r"(ip\[\d+\]|process \d+)"  # it may have ended before we look


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-dr-pod") as one:
        prepare(one)
        yield one


def unowned(choice: str) -> tuple[Any, ...]:
    """Layers whose tables others may damage."""
    used = layers(choice)
    for backend in used:
        if isinstance(backend, NftablesBackend):
            backend.owned = False
    return used


DAMAGE = [
    ("ip rule del pref 32764", IP),
    ("ip -6 rule del pref 32764", IP),
    ("ip route flush table 100", IP),
    ("ip -6 route flush table 100", IP),
    ("ip link set lo down; ip link set lo up", IP + "|kernel"),
    ("ip addr del 127.0.0.1/8 dev lo; ip addr add 127.0.0.1/8 dev lo", IP),
    ("nft flush ruleset", r"nft\[\d+\]"),
    ("iptables-nft -t nat -N X; iptables-nft -t nat -F", r"iptables\S*\[\d+\]"),
]


HARMLESS = {"nftables": {DAMAGE[-1][0]}, "iptables": set[str]()}


@pytest.mark.parametrize("choice", ["nftables", "iptables"])
@pytest.mark.parametrize(("damage", "cause"), DAMAGE)
def test_damage_wakes_the_pod_names_the_culprit_and_is_repaired(pod: Pod, choice: str, damage: str, cause: str) -> None:
    used = unowned(choice)

    async def script(watched: Watched) -> None:
        settle(pod.target, WANT, used)
        await watched.told()
        assert settle(pod.target, WANT, used).applied == [], "known by now without asking"
        causes = await watched.sh(damage)
        assert causes and re.fullmatch(cause, causes[0]), causes
        fresh = unowned(choice)  # has seen nothing before
        damaged = verify(pod.target, WANT, fresh)
        assert {plan.layer for plan in settle(pod.target, WANT, used).applied} == set(damaged)
        assert verify(pod.target, WANT, unowned(choice)) == {}
        assert damaged or damage in HARMLESS[choice]

    watch(pod, script)


def test_routes_that_go_without_a_word_with_the_last_address_are_missed(pod: Pod) -> None:
    used = unowned("nftables")
    routes = pod.target.netns.call(lambda: Notifications(socket.NETLINK_ROUTE, [7]))

    async def script(watched: Watched) -> None:
        settle(pod.target, WANT, used)
        await watched.told()
        assert verify(pod.target, WANT, used) == {}
        routes.take()
        (cause, *_) = await watched.sh("ip addr del 127.0.0.1/8 dev lo")
        assert re.fullmatch(IP, cause)
        assert all(message.body[4] != names.ROUTE_TABLE for message in routes.take()[0]), "then it would be simpler"
        assert "routing" in verify(pod.target, WANT, used)

    try:
        watch(pod, script)
    finally:
        routes.close()


def test_what_nobody_has_read_yet_counts_as_changed(pod: Pod) -> None:
    used = unowned("nftables")

    async def script(watched: Watched) -> None:
        settle(pod.target, WANT, used)
        await watched.told()
        assert verify(pod.target, WANT, used) == {}
        for damage in ("ip rule del pref 32764", "nft flush chain inet istio-ambient-nat istio-output"):
            pod.sh(damage)  # on the loop's own thread: it cannot have read of it
            assert len(settle(pod.target, WANT, used).applied) == 1
        pod.sh("ip addr add 10.9.0.7/24 dev eth0")
        assert "10.9.0.7" in pod.target.addresses()

    watch(pod, script)


def test_what_we_do_ourselves_wakes_nobody(pod: Pod) -> None:
    async def script(watched: Watched) -> None:
        await watched.told()
        watched.causes.clear()
        for choice in ("nftables", "iptables"):
            assert settle(pod.target, WANT, layers(choice)).applied
            assert settle(pod.target, None, layers(choice)).applied
        await watched.told()
        assert watched.causes == []

    watch(pod, script)


@pytest.mark.parametrize(
    "noise",
    [
        "ip route add 192.0.2.0/24 dev lo table 200; ip route flush table 200",
        "ip route add 192.0.2.0/24 dev eth0; ip -6 route add fd08::/64 dev eth0",
        "ip link set eth0 mtu 1400",
        "nft list ruleset; iptables-nft -S; ip rule",
    ],
)
def test_noise_wakes_nobody(pod: Pod, noise: str) -> None:
    async def script(watched: Watched) -> None:
        assert await watched.sh(noise) == []
        assert await watched.sh("ip rule add fwmark 5 lookup 200 pref 500") != [], "it is deaf"

    watch(pod, script)


@pytest.mark.parametrize(("name", "shown"), [(b"ip", "ip"), (b"\x1b]0;P\x07\n\xffEVIL", "\\x1b]0;P\\x07\\n\ufffdEVIL")])
def test_a_program_that_still_runs_is_named(pod: Pod, tmp_path: Path, name: bytes, shown: str) -> None:
    program = tmp_path / os.fsdecode(name)
    shutil.copy(shutil.which("ip") or "ip", program)

    async def script(watched: Watched) -> None:
        await watched.told()
        ip = await asyncio.create_subprocess_exec(
            "nsenter", f"--net={pod.path}", "--", program, "-batch", "-", stdin=subprocess.PIPE
        )
        assert ip.stdin is not None
        try:
            watched.causes.clear()
            ip.stdin.write(b"rule add fwmark 5 lookup 200 pref 500\n")
            await ip.stdin.drain()
            await watched.reads()
            assert watched.causes == [f"{shown}[{ip.pid}]"]
        finally:
            ip.stdin.close()
            await ip.wait()

    watch(pod, script)


def test_lost_notifications_wake_the_pod(pod: Pod) -> None:
    async def script(watched: Watched) -> None:
        await watched.told()
        watched.causes.clear()
        pod.target.route_events.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        mark = pod.target.route_events.mark()
        # Of routes that do not concern us, on the loop's own thread: so none is read before some are lost.
        pod.sh("for i in $(seq 60); do echo route add 192.0.2.$i/32 dev lo table 200; done | ip -batch -")
        await watched.told()
        while "unknown" not in watched.causes:  # before it the kernel may tell of an address of its own
            await watched.reads()
        assert not pod.target.route_events.unchanged_since(mark)

    watch(pod, script)


def test_of_a_transaction_only_its_generation_is_received(pod: Pod) -> None:
    everything = pod.target.netns.call(lambda: Notifications(NETLINK_NETFILTER, [GROUP_NFTABLES]))
    try:
        pod.target.events.take()
        pod.sh("nft add table inet other; nft delete table inet other")
        assert [message.kind for message in pod.target.events.take()[0]] == [NEWGEN, NEWGEN]
        assert len(everything.take()[0]) > 2
    finally:
        everything.close()


@pytest.mark.parametrize("choice", ["nftables", "iptables"])
def test_to_verify_what_has_not_changed_asks_for_a_generation_and_nothing_else(
    pod: Pod, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = layers(choice)

    async def script(watched: Watched) -> None:
        settle(pod.target, WANT, used)
        await watched.told()
        spy = Spy(monkeypatch)
        for _ in range(2):
            spy.asked.clear()
            pod.target.facts()
            assert settle(pod.target, WANT, used).applied == []
        assert spy.asked == []
        monkeypatch.setattr(notifications, "BELIEVED", 0.0)  # so long, that all is looked at again
        pod.target.facts()
        assert verify(pod.target, WANT, used) == {}
        assert {"dump", "read addresses", "read policy rules", "read routes"} <= set(spy.asked)

    watch(pod, script)


def test_a_table_that_another_owns_may_go_without_a_new_generation(pod: Pod) -> None:
    backend = NftablesBackend()
    other = pod.target.netns.call(NftSocket)
    other.commit("another owner", [table_command(name, TableFlag.OWNER) for name in TABLES], None)

    async def script(watched: Watched) -> None:
        await watched.told()
        assert len(backend.read(pod.target).tables) == len(TABLES)
        generation = pod.target.nft.generation()
        other.close()
        await watched.told()
        assert pod.target.nft.generation() == generation, "then it would need no care"
        assert backend.read(pod.target).tables == ()

    watch(pod, script)
