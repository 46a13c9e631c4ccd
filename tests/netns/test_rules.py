# SPDX-License-Identifier: Apache-2.0
"""Rules in a real namespace, over both backends: applied, read back, damaged, repaired, switched, removed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from support.rules import CHOICES, Pod, layers
from support.rules import pod as made

from agent.backends.netfilter import ruleset_reader
from agent.backends.nftables.backend import NftablesBackend
from agent.core.errors import HostNetnsError, NetnsError, StaleError
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netns import Netns, unpin
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import add_namespace, remove_namespace
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
WANT = Redirect()
FOREIGN = """
nft add table inet mine
nft add chain inet mine out '{ type filter hook output priority 0; policy accept; }'
nft add rule inet mine out tcp dport 99 counter accept
iptables-nft -t nat -A OUTPUT -p tcp --dport 98 -j ACCEPT
iptables-nft -t mangle -N OTHER
ip6tables-nft -t raw -A PREROUTING -p udp --dport 97 -j ACCEPT
ip rule add fwmark 0x5 lookup 200 pref 500
ip route add local 192.0.2.0/24 dev lo table 200
"""


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made() as one:
        yield one


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def apply(pod: Pod, choice: str, want: Redirect | None = WANT, retired: str = "") -> list[str]:
    """Settles and returns the scripts that were needed."""
    old = layers(retired)[-1:] if retired else ()
    return [plan.script for plan in settle(pod.target, want, layers(choice), old).applied]


def wrong(pod: Pod, choice: str, want: Redirect | None = WANT) -> str:
    found = verify(pod.target, want, layers(choice))
    return "\n".join(line for lines, _ in found.values() for line in lines)


def generation(pod: Pod) -> int:
    return pod.target.nft.generation()


@pytest.mark.parametrize(
    "want",
    [
        WANT, Redirect(dns=False), Redirect(ipv6=False), Redirect(ingress_only=True),
        Redirect(virtual_interfaces=("eth1", "k6t-eth0")), Redirect(ipv4=False),
        Redirect(probe_ipv4="192.0.2.7", probe_ipv6="2001:db8::7"),
    ],
)  # fmt: skip
def test_what_was_applied_is_read_back_exactly_and_applied_once(pod: Pod, choice: str, want: Redirect) -> None:
    assert apply(pod, choice, want)
    assert wrong(pod, choice, want) == ""
    before = generation(pod), pod.dump()
    assert apply(pod, choice, want) == []
    assert (generation(pod), pod.dump()) == before


@pytest.mark.parametrize("foreign", ["", FOREIGN], ids=["empty", "foreign"])
def test_removal_leaves_no_trace(pod: Pod, choice: str, foreign: str) -> None:
    pod.sh(foreign)
    if choice == "iptables-legacy":  # whose tables the kernel cannot remove: they are there before
        pod.sh("for t in raw mangle nat; do for v in ip ip6; do ${v}tables-legacy -t $t -L >/dev/null; done; done")
    before = pod.dump()
    apply(pod, choice)
    assert pod.dump() != before
    pod.reopen()  # a fresh process knows what is ours
    apply(pod, choice, None)
    assert pod.dump() == before
    assert apply(pod, choice, None) == []


@pytest.mark.parametrize(
    ("choice", "damage", "whole"),
    [
        ("nftables", "nft flush chain inet istio-ambient-nat istio-output", "too large"),
        ("nftables", "nft delete table inet istio-ambient-nat", "torn"),
        ("iptables", "iptables-nft -t nat -F", "too large"),
        ("iptables", "iptables-nft -t nat -F ISTIO_OUTPUT", "torn"),
    ],
)
def test_a_pod_whose_own_rules_cannot_be_read_is_captured_and_repaired_all_the_same(
    pod: Pod, choice: str, damage: str, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod.sh(FOREIGN)
    used = layers(choice)
    for backend in used:
        if isinstance(backend, NftablesBackend):
            backend.owned = False
    if whole == "torn":  # somebody commits with each of our looks
        numbers = count()
        monkeypatch.setattr(NftSocket, "generation", lambda _: next(numbers))
    else:
        monkeypatch.setattr(ruleset_reader, "WHOLE", 8)
    done = settle(pod.target, WANT, used)
    assert any("is not known" in remark for remark in done.remarks)
    assert not verify(pod.target, WANT, used)
    pod.sh(damage)
    assert verify(pod.target, WANT, used)
    settle(pod.target, WANT, used)
    assert not verify(pod.target, WANT, used)
    settle(pod.target, None, used)
    left = pod.dump()
    assert "istio" not in left.lower() and "tcp dport 99" in left


DAMAGE = {
    "nftables": [
        "nft delete table inet istio-ambient-nat",
        "nft flush ruleset",
        "nft flush chain inet istio-ambient-nat istio-output",
        "nft flush chain inet istio-ambient-mangle output",
        "nft insert rule inet istio-ambient-nat istio-output accept",
        "nft add rule inet istio-ambient-raw istio-output counter",
        "nft add chain inet istio-ambient-nat other",
        "nft chain inet istio-ambient-nat output '{ policy drop; }'",
        "h=$(nft -a list chain inet istio-ambient-nat istio-output | sed -n 's/.*:15053.*handle //p' | head -1);"
        " nft delete rule inet istio-ambient-nat istio-output handle $h",
        # The same comment on a rule that does something else: tags alone would not tell.
        "nft -a list chain inet istio-ambient-nat istio-output | grep 'ip daddr.*15001' | while read rule; do"
        " h=${rule##*handle }; r=${rule%% # handle*}; r=$(echo \"$r\" | sed 's/:15001/:15002/;s/packets . bytes .//');"
        ' nft replace rule inet istio-ambient-nat istio-output handle $h "$r"; done',
    ],
    "iptables": [
        "iptables-nft -t nat -F ISTIO_OUTPUT",
        "nft flush ruleset",
        "iptables-nft -t nat -D ISTIO_OUTPUT 2",
        "ip6tables-nft -t mangle -F ISTIO_PRERT",
        "iptables-nft -t nat -I ISTIO_OUTPUT -j ACCEPT",
        "ip6tables-nft -t nat -A OUTPUT -j ISTIO_OUTPUT",
        "iptables-nft -t nat -D OUTPUT 2",
        "iptables-nft -t raw -F; iptables-nft -t raw -X",
        "r=$(iptables-nft -t nat -S ISTIO_OUTPUT 1 | cut -d' ' -f2-); iptables-nft -t nat -D ISTIO_OUTPUT 1;"
        " eval iptables-nft -t nat -A $r",
    ],
    "iptables-legacy": [
        "iptables-legacy -t nat -F ISTIO_OUTPUT",
        "iptables-legacy -t nat -D ISTIO_OUTPUT 2",
        "ip6tables-legacy -t mangle -F ISTIO_PRERT",
        "iptables-legacy -t nat -I ISTIO_OUTPUT -j ACCEPT",
        "ip6tables-legacy -t nat -A OUTPUT -j ISTIO_OUTPUT",
        "iptables-legacy -t raw -F; iptables-legacy -t raw -X",
    ],
}
ROUTING = ["ip rule del pref 32764", "ip -6 route flush table 100", "ip route flush table 100"]


@pytest.mark.parametrize(
    ("choice", "damage"), [(name, script) for name in CHOICES for script in DAMAGE[name] + ROUTING]
)
def test_damage_is_named_and_repaired_and_foreign_rules_stay(pod: Pod, choice: str, damage: str) -> None:
    flushes = "flush ruleset" in damage
    pod.sh("" if flushes else FOREIGN)
    used = layers(choice)
    for backend in used:
        if isinstance(backend, NftablesBackend):
            backend.owned = False  # owned tables cannot be damaged: shown below
    settle(pod.target, WANT, used)
    right = pod.dump()
    pod.sh(damage)
    assert pod.dump() != right
    assert verify(pod.target, WANT, used), damage
    settle(pod.target, WANT, used)
    assert verify(pod.target, WANT, used) == {}
    # Order within a foreign base chain may change by a repair; what is there may not.
    assert sorted(pod.dump().splitlines()) == sorted(right.splitlines())


def test_a_plan_for_another_generation_is_refused_and_changes_nothing(pod: Pod) -> None:
    backend = layers("nftables")[-1]
    plan = backend.plan(WANT, backend.read(pod.target))
    pod.sh("nft add table inet other")
    before = pod.dump()
    with pytest.raises(StaleError):
        backend.apply(pod.target, plan)
    assert pod.dump() == before


def test_owned_tables_survive_foreign_flushes_and_the_death_of_their_agent(pod: Pod) -> None:
    backend = layers("nftables")[-1]
    assert isinstance(backend, NftablesBackend)
    if not backend.owned:
        assert "no owned tables" in backend.probe().remarks[0], "a kernel before 6.9: nothing to show"
        return
    apply(pod, "nftables")
    before = pod.dump()
    pod.sh("nft flush ruleset")
    assert "not permitted" in run(
        ["nft", "delete", "table", "inet", "istio-ambient-nat"], netns=pod.path, check=False
    ).stderr  # fmt: skip
    assert pod.dump() == before
    pod.reopen()
    assert wrong(pod, "nftables") == ""
    (taken,) = apply(pod, "nftables")
    assert taken.count("take over the ownership") == 3
    pod.sh("nft flush ruleset")
    assert pod.dump() == before


def test_switching_leaves_exactly_one_rule_set(pod: Pod) -> None:
    empty = pod.dump()
    apply(pod, "nftables")
    nftables = pod.dump()
    apply(pod, "iptables", retired="nftables")
    assert wrong(pod, "iptables") == "" and "istio-ambient" not in pod.dump()
    apply(pod, "nftables", retired="iptables")
    assert pod.dump() == nftables
    apply(pod, "nftables", None)
    assert pod.dump() == empty


def test_dns_turned_off_drops_the_raw_table_in_the_same_transaction(pod: Pod) -> None:
    apply(pod, "nftables")
    before = generation(pod)
    assert len(apply(pod, "nftables", Redirect(dns=False))) == 1
    assert generation(pod) == before + 1
    assert "istio-ambient-raw" not in pod.dump()


def test_nft_reads_our_printed_text_as_what_our_messages_made(pod: Pod) -> None:
    backend = NftablesBackend(owned=False)
    want = Redirect(virtual_interfaces=("eth1",))
    settle(pod.target, want, [backend])
    with made("slu-tt-text") as other:
        text = str(backend.plan(want, backend.read(other.target)))
        run(["nft", "-f", "-"], stdin=text, netns=other.path)
        assert other.sh("nft list ruleset") == pod.sh("nft list ruleset")


def test_a_namespace_without_ipv6_gets_no_ipv6_rule(pod: Pod, choice: str) -> None:
    pod.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.lo.disable_ipv6=1")
    want = WANT.within(ipv6=pod.target.has_ipv6())
    assert not want.ipv6
    apply(pod, choice, want)
    assert "ip6" not in pod.sh("nft list ruleset")
    assert "32764" not in pod.sh("ip -6 rule")


@pytest.mark.parametrize("path", ["/proc/self/ns/net", "/proc/1/ns/net", "/proc/thread-self/ns/net"])
def test_p10_the_hosts_namespace_is_refused(path: str) -> None:
    # Where process 1 is hidden from us its namespace cannot even be opened.
    with pytest.raises(NetnsError if "/1/" in path else HostNetnsError, match=r"host's network namespace|denied"):
        Netns.open(path)


@pytest.mark.parametrize("path", ["/proc/self/ns/mnt", "/etc/hostname", "/run/netns/slu-tt-nowhere", "/run"])
def test_what_is_no_network_namespace_is_refused(path: str) -> None:
    with pytest.raises(NetnsError):
        Netns.open(path)


def test_a_call_that_fails_inside_comes_back_out(pod: Pod) -> None:
    home = Path("/proc/thread-self/ns/net").stat().st_ino
    with pytest.raises(ZeroDivisionError):
        pod.target.netns.call(lambda: 1 // 0)
    assert Path("/proc/thread-self/ns/net").stat().st_ino == home


def test_p40_handles_leave_no_descriptor_behind(pod: Pod) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(1000):
        target = PodNetns(Netns.open(pod.path))
        target.addresses()
        target.close()
        with pytest.raises(HostNetnsError):
            Netns.open("/proc/self/ns/net")
    assert descriptors() == before


def test_a_pin_outlives_its_path_and_is_proven_by_the_cookie(pod: Pod, tmp_path: Path) -> None:
    pin = tmp_path / "pins" / "uid"
    pod.target.netns.pin(pin)
    remove_namespace(pod.name)
    with Netns.open(pin) as found:
        assert found.id == pod.target.netns.id
    add_namespace(pod.name)
    with Netns.open(pod.path) as other:
        assert other.id.cookie != pod.target.netns.id.cookie
    unpin(pin)
    assert not pin.exists()
