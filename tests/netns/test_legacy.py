# SPDX-License-Identifier: Apache-2.0
"""The legacy variant of iptables in real namespaces: read by socket options, checked by iptables-legacy-save."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.rules import Pod
from support.rules import pod as made

from agent.backends.iptables import rendering
from agent.backends.iptables.legacy import IptablesLegacyBackend
from agent.backends.iptables.reading import TABLES
from agent.core.errors import CommandError
from agent.core.model.redirect import Redirect
from agent.kernel import exec, xtables
from agent.lab.links import links
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
WANT = Redirect()
FOREIGN = """
iptables-legacy -t nat -A OUTPUT -p tcp --dport 98 -j ACCEPT
iptables-legacy -t nat -N OTHER
iptables-legacy -t nat -A OTHER -m comment --comment 'not "ours"' -j RETURN
iptables-legacy -t nat -A PREROUTING -i eth7 -g OTHER
iptables-legacy -t mangle -P FORWARD DROP
iptables-legacy -t raw -A OUTPUT -p udp --dport 97 -j ACCEPT
iptables-legacy -t filter -A INPUT -p tcp --dport 96 -j DROP
ip6tables-legacy -t raw -A PREROUTING -p udp --dport 97 -j ACCEPT
ip6tables-legacy -t nat -N OTHER
ip6tables-legacy -t mangle -L >/dev/null
for n in 1 2 3; do echo x > /dev/udp/127.0.0.1/97; done
"""
EMPTY = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made() as one:
        yield one


@pytest.fixture
def backend() -> IptablesLegacyBackend:
    return IptablesLegacyBackend()


def bash(pod: Pod, script: str) -> None:
    exec.run(["bash", "-ec", script], netns=pod.path)


def save(pod: Pod, *, counters: bool = True) -> str:
    """As iptables shows it; an independent reader. Without the lines that hold the time.

    And without the counters of policies, which every change by any iptables-legacy program sets to zero.
    """
    text = pod.sh("iptables-legacy-save -c; echo; ip6tables-legacy-save -c")
    text = re.sub(r"^(:.*)\[\d+:\d+\]", r"\1[]", text, flags=re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return text if counters else re.sub(r"\[\d+:\d+\]", "[]", text)


def tables(pod: Pod) -> tuple[list[str], list[str]]:
    return tuple(sorted(pod.sh(f"cat /proc/net/{six}_tables_names").split()) for six in ("ip", "ip6"))  # type: ignore[return-value]


def lines(text: str) -> list[str]:
    """Each line of `save` with its family and table."""
    found, place = [], ""
    for number, part in enumerate(text.split("\n\n")):
        for line in part.splitlines():
            place = line if line.startswith("*") else place
            found.append(f"{number}{place} {line}")
    return found


def chains(text: str) -> dict[str, list[str]]:
    """Comments of our chains' rules in order, of one family of iptables-save's text."""
    table, found = "", {}
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":ISTIO"):
            found[f"{table} {line[1:].split()[0]}"] = []
        elif rule := re.match(r"\[\d+:\d+\] -A (ISTIO\w+) ", line):
            found[f"{table} {rule[1]}"].append(re.findall(r'--comment "?([^" ]+)', line)[0])
    return found


def wrong(pod: Pod, backend: IptablesLegacyBackend, want: Redirect | None = WANT) -> str:
    found = verify(pod.target, want, [backend])
    return "\n".join(line for lines, _ in found.values() for line in lines)


@pytest.mark.parametrize(
    "want",
    [
        WANT, Redirect(dns=False), Redirect(ipv6=False), Redirect(ingress_only=True), Redirect(ipv4=False),
        Redirect(virtual_interfaces=("eth1", "k6t-eth0")),
    ],
)  # fmt: skip
def test_what_was_applied_is_what_iptables_shows_and_is_applied_once(
    pod: Pod, backend: IptablesLegacyBackend, want: Redirect
) -> None:
    assert wrong(pod, backend, want)
    assert len(settle(pod.target, want, [backend]).applied) == 1
    assert wrong(pod, backend, want) == ""
    before = save(pod)
    for family, text in zip((4, 6), before.split("\n\n"), strict=True) if want.ipv4 and want.ipv6 else ():
        wanted = rendering.render(want, family).tables
        ours = {f"{table} {chain}": list(tags) for table, held in wanted.items() for chain, tags in held.chains}
        assert chains(text) == ours
    assert "-j REDIRECT" in before
    assert settle(pod.target, want, [backend]).applied == []
    assert not IptablesLegacyBackend().plan(want, IptablesLegacyBackend().read(pod.target))
    assert save(pod) == before


def test_a_variant_follows_another(pod: Pod, backend: IptablesLegacyBackend) -> None:
    bash(pod, FOREIGN)
    foreign = save(pod)
    for want in (WANT, Redirect(dns=False), Redirect(ipv6=False), Redirect(virtual_interfaces=("eth1",)), WANT):
        settle(pod.target, want, [backend])
        assert wrong(pod, IptablesLegacyBackend(), want) == ""
    settle(pod.target, None, [backend])
    left = save(pod)
    assert "ISTIO" not in left and "sluice:" not in left
    assert [line for line in lines(left) if line in lines(foreign)] == lines(foreign)


@pytest.mark.parametrize("present", ["", FOREIGN], ids=["empty", "foreign"])
def test_removal_leaves_tables_that_were_there_byte_for_byte(
    pod: Pod, backend: IptablesLegacyBackend, present: str
) -> None:
    bash(pod, "for t in raw mangle nat; do iptables-legacy -t $t -L; ip6tables-legacy -t $t -L; done")
    bash(pod, present)
    before = save(pod)
    assert not present or re.search(r"\[3:\d\d\] -A OUTPUT -p udp", before), "no counter of theirs to be kept"
    settle(pod.target, WANT, [backend])
    assert "ISTIO" in save(pod)
    pod.reopen()  # a fresh process knows what is ours
    fresh = IptablesLegacyBackend()
    settle(pod.target, None, [fresh])
    assert save(pod) == before
    assert settle(pod.target, None, [fresh]).applied == []


def test_removal_leaves_empty_tables_where_there_were_none(pod: Pod, backend: IptablesLegacyBackend) -> None:
    settle(pod.target, WANT, [backend])
    settle(pod.target, None, [backend])
    one = {f"*{table}\n" + "".join(f":{c} ACCEPT []\n" for c in held) + "COMMIT" for table, held in EMPTY.items()}
    for text in save(pod, counters=False).split("\n\n"):
        assert set(re.findall(r"\*.*?COMMIT", text, re.DOTALL)) == one


DAMAGE = [
    "iptables-legacy -t nat -F ISTIO_OUTPUT",
    "iptables-legacy -t nat -F; iptables-legacy -t nat -X",
    "iptables-legacy -t nat -D ISTIO_OUTPUT 2",
    "ip6tables-legacy -t mangle -F ISTIO_PRERT",
    "iptables-legacy -t nat -I ISTIO_OUTPUT -j ACCEPT",
    "iptables-legacy -t nat -A ISTIO_OUTPUT -p udp -j OTHER",
    "ip6tables-legacy -t nat -A OUTPUT -j ISTIO_OUTPUT",
    "iptables-legacy -t nat -A OTHER -j ISTIO_OUTPUT",
    "iptables-legacy -t nat -D OUTPUT 2",
    "iptables-legacy -t raw -F; iptables-legacy -t raw -X",
    "for verb in '-F OUTPUT' '-F ISTIO_OUTPUT' '-X ISTIO_OUTPUT'; do iptables-legacy -t mangle $verb; done",
    "r=$(iptables-legacy -t nat -S ISTIO_OUTPUT 1 | cut -d' ' -f2-); iptables-legacy -t nat -D ISTIO_OUTPUT 1;"
    " eval iptables-legacy -t nat -A $r",
    # The same comments on rules that do something else: tags alone would not tell.
    "iptables-legacy-save -t nat | sed 's/15001/15002/' | iptables-legacy-restore",
    "ip6tables-legacy-save -t nat | sed '/ISTIO_OUTPUT/s/-j ACCEPT/-j RETURN/' | ip6tables-legacy-restore",
    "iptables-legacy-save -t raw | sed 's/--zone-orig 1/--zone-orig 2/' | iptables-legacy-restore",
    # And the same comment on a jump that is taken by some packets only.
    "iptables-legacy-save -t nat | sed '/A OUTPUT.*ISTIO/s/-A OUTPUT/& -s 192.0.2.9/' | iptables-legacy-restore",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_repaired_and_foreign_rules_stay(
    pod: Pod, backend: IptablesLegacyBackend, damage: str
) -> None:
    bash(pod, FOREIGN)
    settle(pod.target, WANT, [backend])
    right = save(pod, counters=False)
    bash(pod, damage)
    damaged = save(pod, counters=False)
    assert damaged != right
    assert wrong(pod, backend)
    settle(pod.target, WANT, [backend])
    assert wrong(pod, backend) == ""
    repaired = save(pod, counters=False)
    # What the damage itself took from or did to others is not ours to repair, and nor is where in a base chain we are.
    for line in lines(right):
        if "ISTIO" in line or line in lines(damaged):
            assert lines(repaired).count(line) == lines(right).count(line), line


def test_what_was_learned_in_one_pod_holds_in_others(pod: Pod, backend: IptablesLegacyBackend) -> None:
    with made("slu-tt-other") as other:
        settle(other.target, WANT, [backend])
        bash(pod, FOREIGN)
        settle(pod.target, WANT, [IptablesLegacyBackend()])  # our predecessor: this one never applied anything here
        assert wrong(pod, backend) == ""
        bash(pod, "iptables-legacy-save -t nat | sed 's/15001/15002/' | iptables-legacy-restore")
        assert wrong(pod, IptablesLegacyBackend()) == "", "by tags alone it looks right"
        assert re.search(r"ISTIO_OUTPUT has \d+ rules, 1 of Sluice's are missing", wrong(pod, backend))
        assert wrong(other, backend) == ""


def test_foreign_rules_around_our_jumps_keep_their_order(pod: Pod, backend: IptablesLegacyBackend) -> None:
    bash(pod, "iptables-legacy -t nat -A OUTPUT -p tcp --dport 1 -j ACCEPT")
    settle(pod.target, WANT, [backend])
    bash(pod, "iptables-legacy -t nat -A OUTPUT -p tcp --dport 2 -j ACCEPT")
    bash(pod, "iptables-legacy -t nat -I OUTPUT -p tcp --dport 3 -j ACCEPT")
    # Theirs, though they lead into our chain: with a match, by goto, and with a comment of their own.
    bash(pod, "iptables-legacy -t nat -A OUTPUT -p tcp --dport 4 -j ISTIO_OUTPUT")
    bash(pod, "iptables-legacy -t nat -A OUTPUT -p tcp --dport 5 -g ISTIO_OUTPUT")
    bash(pod, "iptables-legacy -t nat -A OUTPUT -m comment --comment theirs -j ISTIO_OUTPUT")
    around = pod.sh("iptables-legacy -t nat -S OUTPUT")
    assert wrong(pod, backend) == ""
    settle(pod.target, Redirect(dns=False), [backend])
    assert pod.sh("iptables-legacy -t nat -S OUTPUT") == around
    bash(pod, "iptables-legacy -t nat -F ISTIO_OUTPUT")
    settle(pod.target, WANT, [backend])
    assert pod.sh("iptables-legacy -t nat -S OUTPUT") == around


def test_what_a_pod_wrote_never_gets_into_a_script(pod: Pod, backend: IptablesLegacyBackend) -> None:
    settle(pod.target, WANT, [backend])
    for comment in (
        'sluice:0" --modprobe=/evil -m nosuch "',
        "sluice:0\n--modprobe=/evil",
        "sluice:0123456789ab\n-F evil",
    ):
        pod.sh(f"iptables-legacy -t nat -A OUTPUT -m comment --comment '{comment}' -j ISTIO_OUTPUT")
        pod.sh(f"iptables-legacy -t nat -A ISTIO_OUTPUT -m comment --comment '{comment}' -j ACCEPT")
    plan = backend.plan(None, backend.read(pod.target))
    assert plan and "evil" not in str(plan)
    plan = backend.plan(WANT, backend.read(pod.target))
    assert plan.differences and "evil" not in str(plan)


def test_p30_reading_makes_no_table(pod: Pod, backend: IptablesLegacyBackend) -> None:
    for _ in range(5):
        for fresh in (backend, IptablesLegacyBackend()):
            have = fresh.read(pod.target)
            assert have.families == {4: {}, 6: {}} and not fresh.plan(None, have)
            assert fresh.plan(WANT, have)
    assert tables(pod) == ([], [])
    bash(pod, "ip6tables-legacy -t mangle -L")
    assert list(backend.read(pod.target).families[6]) == ["mangle"]
    settle(pod.target, None, [backend])
    assert tables(pod) == ([], ["mangle"])
    assert backend.probe().ok
    assert tables(pod) == ([], ["mangle"])


def test_p36_without_ipv6_no_call_of_ipv6_is_made(
    pod: Pod, backend: IptablesLegacyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    bash(pod, "ip6tables-legacy -t nat -N OTHER")  # makes an IPv6 table that could be read
    calls: list[Any] = []
    real_socket, real_option, real_run = socket.socket, xtables._getsockopt, exec.run
    monkeypatch.setattr(socket, "socket", lambda *a, **k: calls.append(a[0]) or real_socket(*a, **k))
    monkeypatch.setattr(xtables, "_getsockopt", lambda *a: calls.append(a[1]) or real_option(*a))
    monkeypatch.setattr(exec, "run", lambda argv, **k: calls.append(argv[0]) or real_run(argv, **k))
    settle(pod.target, WANT, [backend])
    six = {socket.AF_INET6, socket.IPPROTO_IPV6, "ip6tables-legacy-restore"}
    assert six <= set(calls), "the spies do not see what they are for"
    settle(pod.target, None, [backend])
    real_run(["sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=1"], netns=pod.path)
    assert not pod.target.has_ipv6()
    calls.clear()
    want = WANT.within(ipv6=False)
    for fresh in (backend, IptablesLegacyBackend()):
        settle(pod.target, want, [fresh])
        assert wrong(pod, fresh, want) == ""
    settle(pod.target, None, [backend])
    assert "iptables-legacy-restore" in calls and socket.AF_INET in calls
    assert not six & set(calls)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600) if path.parent == Path("/run") else os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def test_p22_the_lock_is_the_pods_own(
    pod: Pod, backend: IptablesLegacyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exec, "run", partial(_with_less_patience, exec.run))
    with made("slu-tt-other") as other, locked(Path("/run/xtables.lock")), locked(pod.path):
        settle(other.target, WANT, [backend])
        with pytest.raises(CommandError, match="no end after"):
            settle(pod.target, WANT, [backend])
        assert "ISTIO" in save(other) and "ISTIO" not in save(pod)
    settle(pod.target, WANT, [backend])
    assert "ISTIO" in save(pod)


def _with_less_patience(real: Any, argv: list[str], **options: Any) -> Any:
    return real(argv, **{**options, "seconds": 2 if "legacy-restore" in argv[0] else 30})


def test_pods_are_worked_on_side_by_side() -> None:
    backend = IptablesLegacyBackend()
    with contextlib.ExitStack() as stack:
        pods = [stack.enter_context(made(f"slu-tt-{number}")) for number in range(8)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                done = pool.map(lambda one: settle(one.target, WANT, [backend]).applied, pods)
                assert all(len(applied) == 1 for applied in done)
                assert len({save(one) for one in pods}) == 1
                list(pool.map(lambda one: settle(one.target, None, [backend]), pods))


def test_p40_reading_leaves_no_descriptor_behind(pod: Pod, backend: IptablesLegacyBackend) -> None:
    settle(pod.target, WANT, [backend])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(1000):
        backend.read(pod.target)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_backend_forgets_a_pod_that_is_gone(backend: IptablesLegacyBackend) -> None:
    with made() as one:
        settle(one.target, WANT, [backend])
        assert len(backend._last) == 1
    del one
    assert len(backend._last) == 0


def test_packets_go_where_the_rules_say(pod: Pod, backend: IptablesLegacyBackend) -> None:
    with links(pod.name) as inside:
        inside.veth("v", "w")
        inside.up("w")
        inside.add_addresses("v", "198.51.100.1/24")
    settle(pod.target, WANT, [backend])
    listener, client = pod.target.netns.call(lambda: (socket.socket(), socket.socket()))
    with listener, client:
        listener.bind(("0.0.0.0", 15001))
        listener.listen()
        listener.settimeout(5)
        client.settimeout(5)
        client.connect(("198.51.100.77", 80))
        accepted, peer = listener.accept()
        accepted.close()
        assert peer == client.getsockname()
    assert all(name in tables(pod)[0] for name in TABLES)
