# SPDX-License-Identifier: Apache-2.0
"""Whatever replaces a rule set, no connection of the pod escapes or fails, and transfers keep all their bytes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations

import pytest
from support import istio, older
from support.load import Account, Load, Place, place
from support.node import until
from support.pair import HOST4, pair, rules
from support.rules import CHOICES, Pod, layers

from agent.backends.registry import mechanisms
from agent.cli.handback import strip
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.kernel.grace import await_packets
from agent.reconciler import converge as settling
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
WANT, NO_DNS = Redirect(), Redirect(dns=False)
ROUNDS = 3
# None of them is about a port or network of the load.
EXCLUDED = Exclusions(
    outbound_ports=((9000, 9009),),
    inbound_ports=((9443, 9443),),
    outbound_networks=("192.0.2.0/24",),
    inbound_networks=("2001:db8::/32",),
    users=((12, 12),),
    interfaces=("eth7",),
)
VARIANTS = (
    ("DNS off", NO_DNS),
    ("DNS on", WANT),
    ("DNS of one resolver", Redirect(dns_to=("192.0.2.53",))),
    ("exclusions added", Redirect(exclude=EXCLUDED)),
    ("exclusions gone", WANT),
    ("older connections preserved", Redirect(preserve=True)),
    ("no longer preserved", WANT),
    ("other than TCP refused", Redirect(refuse_non_tcp=True)),
    ("a virtual interface", Redirect(virtual_interfaces=("eth7",))),
    ("other probe addresses", Redirect(probe_ipv4="192.0.2.7", probe_ipv6="2001:db8::7")),
    ("as at first", WANT),
)


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        yield made


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def go(pod: Pod, choice: str, want: Redirect = WANT) -> list[str]:
    """To that mechanism from whichever is there, as an agent goes that has just started; the scripts that it took."""
    pod.reopen()
    used = layers(choice)
    names = {one.name for one in used}
    retired = [one for name, one in mechanisms().items() if name not in names]
    scripts = [plan.script for plan in settle(pod.target, want, used, retired).applied]
    assert verify(pod.target, want, used, retired) == {}
    return scripts


def hitless(load: Load, parts: dict[str, Account]) -> None:
    """Nothing escaped or failed, in no part and not between them, and in each part there were connections."""
    whole, said = load.stop()
    assert (whole.escaped, whole.failed) == (0, 0), (parts, said)
    assert all(part.captured >= 100 and min(part.transferred) > 0 for part in parts.values()), parts


def run_through(here: Place, steps: dict[str, Callable[[], object]]) -> None:
    parts = {}
    with here.load() as load:
        for name, step in steps.items():
            _, parts[name] = load.during(step)
        hitless(load, parts)


@pytest.mark.parametrize(("old", "new"), list(permutations(CHOICES, 2)))
def test_a_switch_of_mechanism_is_hitless(here: Place, old: str, new: str) -> None:
    go(here.pod, old)
    steps = {
        f"{number} to {choice}": partial(go, here.pod, choice) for number in range(ROUNDS) for choice in (new, old)
    }  # fmt: skip
    run_through(here, steps | {"at last": partial(go, here.pod, new)})
    dump = here.pod.dump()
    assert ("istio-ambient" in dump) == (new == "nftables")


@pytest.mark.parametrize("old", ["iptables", "iptables-legacy"])
def test_a_packet_under_way_when_mechanisms_change_is_captured(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor may be taken from a connect() between two hooks, for longer than the change takes.

    Here a chain that is asked before all others keeps its SYN there, for seconds, until the old rules are about to go.
    """
    with pair() as nodes, nodes.host.listen(HOST4, 7000), nodes.pod.listen("0.0.0.0", 15001) as ztunnel:
        pod, new = Pod(nodes.pod.name), layers("nftables")
        for _ in range(3):
            go(pod, "nftables")
            go(pod, old)
            rules(nodes.pod, _slow(20000))
            client = nodes.pod.make()
            connecting = threading.Thread(target=client.connect, args=((HOST4, 7000),))
            connecting.start()
            until(lambda: "packets 0" not in pod.sh("nft list chain ip slow output"), "the SYN is in the first chain")
            held_up: list[bool] = []
            released = threading.Event()

            def release() -> None:
                rules(nodes.pod, "add chain ip slow another")  # takes longer than a wait that does not wait
                released.set()  # noqa: B023
                # The packet goes on with the rules of its generation until the second change from then.
                rules(nodes.pod, "flush chain ip slow inner")
                rules(nodes.pod, "delete chain ip slow another")

            def wait() -> None:
                held_up.append(connecting.is_alive())  # noqa: B023
                releasing.start()  # noqa: B023
                await_packets()
                held_up.append(released.is_set())  # noqa: B023

            releasing = threading.Thread(target=release)

            monkeypatch.setattr(settling, "await_packets", wait)
            settle(pod.target, WANT, new, [mechanisms()[old]])
            monkeypatch.undo()
            connecting.join()
            if held_up:
                releasing.join()
            assert ztunnel.accept()[1] == client.getsockname()
            client.close()
            rules(nodes.pod, "delete table ip slow")
            if held_up[:1] == [True]:
                break
        assert held_up[:1] == [True], "on no try the packet was under way for long enough to show anything"
        assert held_up == [True, True], "the wait ended while the packet was still under way"
        pod.target.close()


def _slow(size: int) -> str:
    """A chain of NAT that comes before all others; size * size rules for one destination port."""
    output = ("type nat hook output priority -101", "tcp dport 7000 counter jump outer")
    chains = {"inner": ("meta mark 0x7777 return",) * size, "outer": ("jump inner",) * size, "output": output}
    texts = [f"chain {name} {{\n{chr(10).join(lines)}\n}}" for name, lines in chains.items()]
    return "\n".join(("table ip slow {", *texts, "}"))


def test_a_change_of_variant_is_hitless_and_one_change(here: Place, choice: str) -> None:
    used = layers(choice)
    settle(here.pod.target, WANT, used)

    def change(name: str, want: Redirect) -> None:
        generation = here.pod.target.nft.generation()
        scripts = [plan.script for plan in settle(here.pod.target, want, used).applied]
        raw = re.search(r"istio-ambient-raw|^\*raw(?=[^*]*ISTIO)|^table ip6? raw", here.pod.dump(), re.MULTILINE)
        assert bool(raw) == want.dns, name
        if choice == "nftables":
            assert here.pod.target.nft.generation() == generation + 1, name
            assert len(scripts) == 1, name
        assert verify(here.pod.target, want, used) == {}
        for program in ("iptables", "ip6tables"):  # at most one process per family
            assert sum(script.count(f"# {program}-") for script in scripts) <= 1, (name, scripts)

    run_through(here, {name: partial(change, name, want) for name, want in VARIANTS})


@pytest.mark.parametrize("release", older.RELEASES)
@pytest.mark.parametrize("variant", ["default", "no-dns"])
@pytest.mark.parametrize("old", ["nftables", "iptables"])
def test_an_upgrade_and_the_way_back_are_hitless(here: Place, release: str, old: str, variant: str) -> None:
    older.write(here.pod, release, old, variant)
    want = NO_DNS if variant == "no-dns" else WANT
    before = unowned(here.pod.dump())

    def upgrade() -> None:
        generation = here.pod.target.nft.generation()
        assert go(here.pod, old, want)
        if old == "nftables":
            assert here.pod.target.nft.generation() == generation + 1

    def downgrade() -> None:
        here.pod.target.close()
        older.replace(here.pod, release, old, variant)
        here.pod.reopen()

    steps = {"up": upgrade, "down": downgrade, "up again": upgrade, "down again": downgrade}
    run_through(here, steps)
    assert unowned(here.pod.dump()) == before


def unowned(dump: str) -> list[str]:
    """Returns the dump table by table, without empty lines, and without flags, which nft 1.0.6 cannot write.

    It also lacks state that only Sluice sets: timeouts, and routes and rules for sockets bound to an interface.
    """
    bound = r"local default dev .* metric .*|.*from all to (127\.0\.0\.0/8|::1) lookup .*"
    text = re.sub(rf"^(\s*(flags .*)?|/proc/sys/.*|{bound})\n", "", dump, flags=re.MULTILINE)
    return sorted(re.split(r"^(?=table )", text, flags=re.MULTILINE))


@pytest.mark.parametrize("peer", [*istio.ISTIO, "istio-iptables on legacy"])
def test_adoption_from_istio_cni_is_hitless(here: Place, choice: str, peer: str) -> None:
    as_istio(here.pod, peer)
    used = layers(choice)
    assert verify(here.pod.target, WANT, used)
    run_through(here, {"adopted": partial(go, here.pod, choice)})


def as_istio(pod: Pod, peer: str) -> None:
    if not peer.endswith("legacy"):
        istio.apply(pod, peer, WANT)
        return
    istio.route_marked(pod.path)
    for family, word in ((4, "ip"), (6, "ip6")):
        run([f"{word}tables-legacy-restore", "--noflush"], netns=pod.path, stdin=istio.iptables(WANT, family))


def test_the_transaction_of_istio_cni_takes_our_tables_back_hitless(here: Place) -> None:
    """nftables only: how pods of xtables are handed back is in test_handback.

    The flag PERSIST refuses whoever says the table anew without it (nf_tables_updtable), as istio-cni does: `sluice
    handback` takes it away, and until then our rules stay.
    """
    istio.apply(here.pod, "istio-nftables", WANT)
    before = unowned(here.pod.dump())
    (routing, _, nftables), refused = layers("nftables"), "Operation not supported"

    def back() -> None:
        here.pod.target.close()  # our agent ends
        argv, text = ["nft", "-f", "-"], istio.nftables(WANT)
        done = run(argv, netns=here.pod.path, stdin=text, check=False)
        here.pod.reopen()
        if refused in done.stderr:
            settle(here.pod.target, WANT, (routing, nftables))
            strip(here.pod.target, nftables, WANT)
            here.pod.target.close()
            done = run(argv, netns=here.pod.path, stdin=text)
            here.pod.reopen()
        assert done.returncode == 0, done.stderr

    go(here.pod, "nftables")
    assert "sluice:" in here.pod.dump()
    run_through(here, {"back": back, "adopted": partial(go, here.pod, "nftables"), "back again": back})
    assert unowned(here.pod.dump()) == before


def test_the_measure_sees_what_escapes_and_breaks_between_two_transactions(here: Place, choice: str) -> None:
    """The control: rules deleted, then added. Each test above would fail."""
    used = layers(choice)
    settle(here.pod.target, WANT, used)
    with here.load() as load:
        settle(here.pod.target, None, used)
        load.goes_on(10)
        settle(here.pod.target, WANT, used)
        load.goes_on(10)
        whole, said = load.stop()
    assert whole.escaped, whole
    assert whole.failed >= 2 and said.count("transfer to") == 2, (whole, said)
