# SPDX-License-Identifier: Apache-2.0
"""What a namespace is like, as it changes: addresses, lo, and IPv6, of which nothing is asked where there is none."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.rules import Pod, layers
from support.rules import pod as made
from support.watched import SYSCTL, Spy, Watched, prepare, watch

from agent.backends.iptables.backend import IptablesBackend
from agent.backends.nftables.backend import NftablesBackend
from agent.backends.routing import RoutingBackend
from agent.core import names
from agent.core.model.redirect import Redirect
from agent.kernel import exec
from agent.kernel.pod_netns import NetnsFacts
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
WANT = Redirect()


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-dr-pod") as one:
        prepare(one)
        yield one


FACTS = [
    ("", NetnsFacts(ipv6=True, addresses=("10.9.0.2", "fd09::2"), loopback4=True, loopback6=True)),
    (
        f"{SYSCTL}.lo.disable_ipv6=1",
        NetnsFacts(ipv6=False, addresses=("10.9.0.2", "fd09::2"), loopback4=True, loopback6=False),
    ),
    (f"{SYSCTL}.all.disable_ipv6=1", NetnsFacts(ipv6=False, addresses=("10.9.0.2",), loopback4=True, loopback6=False)),
    (
        f"{SYSCTL}.lo.disable_ipv6=1; {SYSCTL}.lo.disable_ipv6=0",
        NetnsFacts(ipv6=True, addresses=("10.9.0.2", "fd09::2"), loopback4=True, loopback6=True),
    ),
    (
        "ip addr del ::1/128 dev lo",
        NetnsFacts(ipv6=True, addresses=("10.9.0.2", "fd09::2"), loopback4=True, loopback6=False),
    ),
    (
        "ip addr del 127.0.0.1/8 dev lo; ip addr del 10.9.0.2/24 dev eth0",
        NetnsFacts(ipv6=True, addresses=("fd09::2",), loopback4=False, loopback6=True),
    ),
    (
        "ip link set lo down",
        NetnsFacts(ipv6=True, addresses=("10.9.0.2", "fd09::2"), loopback4=False, loopback6=False, up=False),
    ),
    (
        "ip link set lo down; ip link set lo up",
        NetnsFacts(ipv6=True, addresses=("10.9.0.2", "fd09::2"), loopback4=True, loopback6=True),
    ),
]


@pytest.mark.parametrize(("change", "facts"), FACTS)
def test_p38_facts_follow_every_change(pod: Pod, change: str, facts: NetnsFacts) -> None:
    async def script(watched: Watched) -> None:
        await watched.told()
        assert pod.target.facts() == FACTS[0][1]
        causes = await watched.sh(change)
        assert pod.target.facts() == facts and bool(causes) == bool(change)

    watch(pod, script)


def test_lo_that_goes_down_is_told_of_also_without_ipv6(pod: Pod) -> None:
    pod.sh(f"{SYSCTL}.all.disable_ipv6=1")  # its ::1 would go too, of which is told as well

    async def script(watched: Watched) -> None:
        await watched.told()
        assert pod.target.facts().loopback4
        (cause, *_) = await watched.sh("ip link set lo down")
        assert re.fullmatch(r"ip\[\d+\]|process \d+|kernel", cause)
        assert not pod.target.facts().loopback4

    watch(pod, script)


@pytest.mark.parametrize("state", ["ip link set lo down", "ip addr del ::1/128 dev lo"])
def test_ipv6_that_goes_or_comes_without_a_notification_is_noticed(pod: Pod, state: str) -> None:
    pod.sh(state)

    async def script(watched: Watched) -> None:
        for value in (1, 0, 1):
            pod.target.has_ipv6()
            await watched.sh(f"{SYSCTL}.lo.disable_ipv6={value}")
            assert pod.target.has_ipv6() == (value == 0)

    watch(pod, script)


@pytest.mark.parametrize("choice", ["nftables", "iptables"])
def test_p36_without_ipv6_nothing_of_ipv6_is_asked_for_and_when_it_comes_it_is_captured(
    pod: Pod, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(watched: Watched) -> None:
        spy = Spy(monkeypatch)
        settle(pod.target, WANT, layers(choice))
        assert socket.AF_INET6 in spy.families, "the spy does not see what it is for"
        assert ("ip6tables-nft-restore" in spy.programs) == (choice == "iptables")
        settle(pod.target, None, layers(choice))
        await watched.sh(f"{SYSCTL}.all.disable_ipv6=1")
        spy.families.clear()
        spy.programs.clear()
        for used in (layers(choice), layers(choice)):
            # Also for who would have IPv6 captured, not knowing better.
            for want in (WANT.within(ipv6=pod.target.has_ipv6()), WANT, None, WANT):
                if want == WANT and choice == "nftables":
                    continue  # its rules name IPv6 when they are told to
                settle(pod.target, want, used)
                assert verify(pod.target, want, used) == {}
        probes = [RoutingBackend(), NftablesBackend(ipv6=False), IptablesBackend(ipv6=False)]
        before = list(spy.programs)
        assert all(backend.probe().ok for backend in probes)
        assert socket.AF_INET in spy.families and socket.AF_INET6 not in spy.families
        assert "ip6tables-nft-restore" not in spy.programs and len(spy.programs) > len(before)
        await watched.told()
        settle(pod.target, WANT.within(ipv6=False), used)  # known from here on
        causes = await watched.sh(f"{SYSCTL}.all.disable_ipv6=0")
        assert causes == ["kernel"] and pod.target.has_ipv6()
        assert "routing" in [plan.layer for plan in settle(pod.target, WANT, used).applied]
        assert verify(pod.target, WANT, layers(choice)) == {}

    watch(pod, script)


@pytest.mark.parametrize("choice", ["nftables", "iptables"])
def test_p36_rules_of_ipv6_made_earlier_go_when_the_setting_says_so(pod: Pod, choice: str) -> None:
    settle(pod.target, WANT, layers(choice))
    without = (RoutingBackend(), {"nftables": NftablesBackend, "iptables": IptablesBackend}[choice](ipv6=False))
    settle(pod.target, WANT.within(ipv6=False), without)
    assert "32764" not in pod.sh("ip -6 rule") and f"lookup {names.ROUTE_TABLE}" in pod.sh("ip rule")
    assert "ip6 " not in pod.sh("nft list ruleset")


def test_ip6tables_is_not_needed_where_nobody_wants_ipv6(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "iptables-nft-restore").symlink_to("/usr/sbin/iptables-nft-restore")
    monkeypatch.setattr(exec, "PATH", str(tmp_path))
    assert "ip6tables-nft-restore is not installed" in IptablesBackend().probe().missing
    assert IptablesBackend(ipv6=False).probe().ok


def test_a_pod_with_very_many_addresses_counts_with_some_of_them(pod: Pod) -> None:
    """What is made of them on the node, such as the exemption of probes, takes room and time of all."""
    more = "".join(f"addr add 10.{n // 250}.7.{n % 250 + 1}/32 dev eth0\\n" for n in range(300))
    pod.sh(f"printf '{more}' | ip -batch -")
    facts = pod.target.facts()
    assert len(facts.addresses) == 257 and {"10.9.0.2", "fd09::2"} <= {*facts.addresses}
    assert (facts.ipv6, facts.loopback4, facts.loopback6) == (True, True, True)
