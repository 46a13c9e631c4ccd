# SPDX-License-Identifier: Apache-2.0
"""Handing pods back to istio-cni: its exact rules, nothing of ours, and no connection beside ztunnel meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import istio
from support.node import until
from support.pair import HOST4, HOST6, POD4, Pair, await_ipv6, carries, pair, stream
from support.rules import CHOICES, Pod, layers
from support.rules import pod as made
from support.ztunnel import SECONDS, Place

from agent.__main__ import main
from agent.cli.handback import strip
from agent.core.model.exclusions import Exclusions
from agent.core.model.pods import Pod as Facts
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.kernel.netns import unpin
from agent.kernel.unix_socket import claim
from agent.reconciler.converge import settle, verify
from agent.sources.state.notes import Note, Notes

pytestmark = pytest.mark.root
VARIANTS = {
    "default": Redirect(),
    "no-dns": Redirect(dns=False),
    "ingress-only": Redirect(ingress_only=True),
    "virtual-interfaces": Redirect(virtual_interfaces=("eth1", "k6t-eth0")),
}
RESTORE = {"iptables": "tables-nft", "iptables-legacy": "tables-legacy"}
FAMILIES = {4: "ip", 6: "ip6"}
# Somebody's own rules on both sides of our jumps.
FIRST = "for v in ip ip6; do ${v}tables-%s -t nat -A OUTPUT -p tcp --dport 98 -j ACCEPT; done"
LAST = "for v in ip ip6; do ${v}tables-%s -t nat -A OUTPUT -p tcp --dport 99 -j ACCEPT; done"


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-hb-pod") as one:
        yield one


@pytest.fixture(autouse=True)
def no_pin_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for pin in tmp_path.glob("netns/*"):
        unpin(pin)


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text(pod: Pod, choice: str) -> str:
    """All rules of a pod as its mechanism's own program prints them, without counts, and its policy routing."""
    parts = [pod.sh("ip rule; ip -6 rule; ip route show table 100; ip -6 route show table 100")]
    parts[0] = parts[0].replace(" proto 83", "")  # whoever made the route; istio-cni replaces it in any case
    if choice == "nftables":
        rules = re.sub(r"packets \d+ bytes \d+", "packets N bytes N", pod.sh("nft list ruleset"))
        parts += rules.split("\n}\n")
    else:
        for word in FAMILIES.values():
            saved = re.sub(r"#.*\n|\[\d+:\d+\]", "", pod.sh(f"{word}{RESTORE[choice]}-save"))
            parts += [word + table for table in saved.split("COMMIT\n")]
    return "\n".join(sorted(parts))  # tables are in the order of their making


def program(pod: Pod, choice: str, want: Redirect) -> None:
    """What istio-cni does, written by hand."""
    if choice != "iptables-legacy":
        istio.apply(pod, f"istio-{choice}", want)
        return
    istio.apply(pod, "istio-nftables", want)  # for its routing
    pod.sh("nft flush ruleset")
    for family, word in FAMILIES.items():
        run([f"{word}tables-legacy-restore", "--noflush"], netns=pod.path, stdin=istio.iptables(want, family))


def capture(pod: Pod, choice: str, want: Redirect, run_dir: Path, **annotations: str) -> None:
    """As an agent did it that is gone."""
    settle(pod.target, want, layers(choice))
    said = {"istio.io/dataplane-mode": "ambient", **annotations}
    facts = Facts("uid-1", "shop", "web", netns_path=str(pod.path), annotations=said)
    state = Notes(str(run_dir))
    state.save(Note(facts, captured=True, netns=pod.target.netns.id))
    pod.target.netns.pin(state.pin("uid-1"))
    pod.reopen()


def give_back(pod: Pod, run_dir: Path, *more: str) -> int:
    return main(["handback", "--all", "--run-dir", str(run_dir), "--netns", str(pod.path), *more])


NOTED = {
    "default": {},
    "no-dns": {"ambient.istio.io/dns-capture": "false"},
    "ingress-only": {"ambient.istio.io/bypass-inbound-capture": "true"},
    "virtual-interfaces": {"istio.io/reroute-virtual-interfaces": "eth1,k6t-eth0"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_handed_back_is_what_istio_cni_writes(pod: Pod, choice: str, variant: str, tmp_path: Path) -> None:
    want = VARIANTS[variant]
    capture(pod, choice, want, tmp_path, **NOTED[variant])
    assert give_back(pod, tmp_path) == 0
    with made("slu-hb-istio") as other:
        program(other, choice, want)
        assert text(pod, choice) == text(other, choice)
    assert not list((tmp_path / "pods").iterdir()) and not list((tmp_path / "netns").iterdir())
    if choice != "nftables":
        finds_nothing(pod, choice, want)


def finds_nothing(pod: Pod, choice: str, want: Redirect) -> None:
    """istio-cni's comparison: as many rules in each chain, and each of its own is found by iptables -C."""
    for family, word in FAMILIES.items():
        command, table, counts = f"{word}{RESTORE[choice]}".removesuffix("-save"), "", dict[tuple[str, str], int]()
        for line in istio.iptables(want, family).splitlines():
            table = line[1:] if line.startswith("*") else table
            if line.startswith("-A "):
                chain = line.split()[1]
                counts[table, chain] = counts.get((table, chain), 0) + 1
                pod.sh(f"{command} -t {table} -C {line.removeprefix('-A ')}")
        for (table, chain), count in counts.items():
            listed = pod.sh(f"{command} -t {table} -S {chain}").splitlines()
            assert sum(line.startswith("-A") for line in listed) == count, (table, chain, listed)


@pytest.mark.parametrize("choice", ["iptables", "iptables-legacy"])
def test_our_jump_keeps_its_place_among_the_rules_of_others(pod: Pod, choice: str, tmp_path: Path) -> None:
    """Behind them, what they accept would pass us by; before them, what we redirect would no longer reach them."""
    pod.sh(FIRST % RESTORE[choice].removeprefix("tables-"))
    capture(pod, choice, Redirect(), tmp_path)
    pod.sh(LAST % RESTORE[choice].removeprefix("tables-"))
    assert give_back(pod, tmp_path) == 0
    for word in FAMILIES.values():
        found = pod.sh(f"{word}{RESTORE[choice]} -t nat -S OUTPUT").splitlines()[1:]
        assert [line.split()[-1] if "ISTIO" in line else line.split()[-3] for line in found] == [
            "98",
            "ISTIO_OUTPUT",
            "99",
        ]


def test_what_istio_cni_has_no_words_for_is_given_up_and_told_of(
    pod: Pod, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(
        pod,
        choice,
        Redirect(exclude=Exclusions(outbound_ports=((443, 443),)), preserve=True, refuse_non_tcp=True),
        tmp_path,
        **{"traffic.sluice.io/exclude-outbound-ports": "443"},
    )
    assert give_back(pod, tmp_path, "--non-tcp", "refuse") == 0
    told = capsys.readouterr().out
    assert "does not know exclusions" in told and "refusal of other than TCP" in told
    with made("slu-hb-istio") as other:
        program(other, choice, Redirect())
        assert text(pod, choice) == text(other, choice)


def test_a_damaged_pod_is_put_right_before_it_is_handed_back(pod: Pod, choice: str, tmp_path: Path) -> None:
    capture(pod, choice, Redirect(), tmp_path)
    if choice == "nftables":
        pod.sh("nft flush chain inet istio-ambient-nat istio-output; nft delete table inet istio-ambient-raw")
    else:
        pod.sh(f"ip{RESTORE[choice]} -t nat -F ISTIO_OUTPUT; ip6{RESTORE[choice]} -t nat -F OUTPUT")
    pod.sh("ip route flush table 100")
    assert give_back(pod, tmp_path) == 0
    with made("slu-hb-istio") as other:
        program(other, choice, Redirect())
        assert text(pod, choice) == text(other, choice)


def test_only_shown_it_changes_nothing(
    pod: Pod, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(pod, choice, Redirect(), tmp_path)
    before = pod.dump()
    assert give_back(pod, tmp_path, "--dry-run") == 0
    assert "15001" in capsys.readouterr().out
    assert pod.dump() == before and (tmp_path / "netns" / "uid-1").exists()


def test_a_pod_that_nobody_noted_is_left_as_it_is_and_the_command_is_named_that_frees_it(
    pod: Pod, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(pod.target, Redirect(), layers(choice))
    pod.reopen()
    before = pod.dump()
    assert give_back(pod, tmp_path) == 1
    assert pod.dump() == before
    command = f"sluice uncapture --all --netns {pod.path}"
    assert f"`{command}`" in capsys.readouterr().out
    assert main([*command.split()[1:], "--run-dir", str(tmp_path)]) == 0
    assert give_back(pod, tmp_path) == 0


def test_a_pod_that_the_settings_do_not_want_captured_is_left_as_it_is(
    pod: Pod, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(pod, choice, Redirect(), tmp_path)
    before = pod.dump()
    assert give_back(pod, tmp_path, "--exclude-namespaces", "shop") == 1
    assert "exclude_namespaces" in capsys.readouterr().out
    assert pod.dump() == before and (tmp_path / "netns" / "uid-1").exists()


def test_while_an_agent_runs_nothing_is_handed_back(
    pod: Pod, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(pod, choice, Redirect(), tmp_path)
    before, agent = pod.dump(), claim(tmp_path)
    try:
        assert give_back(pod, tmp_path) == 2
    finally:
        os.close(agent)
    assert "stop it first" in capsys.readouterr().err
    assert pod.dump() == before


class Traffic:
    """Connections without pause from the pod, and to it; whoever takes one says its name."""

    def __init__(self, nodes: Pair, made: contextlib.ExitStack) -> None:
        self.taken: Counter[str] = Counter()
        self.failures: list[str] = []
        self._quiet, self._closed = threading.Event(), threading.Event()
        self._servers: list[threading.Thread] = []
        self._clients: list[threading.Thread] = []
        listeners = {
            "ztunnel out": (nodes.pod, 15001),
            "ztunnel in": (nodes.pod, 15006),
            "server": (nodes.host, 7000),
            "application": (nodes.pod, 8080),
        }
        for name, (place, port) in listeners.items():
            arguments = (name, made.enter_context(place.listen("::", port)))
            self._servers.append(threading.Thread(target=self._serve, args=arguments))
        for place, host, port in ((nodes.pod, HOST4, 7000), (nodes.pod, HOST6, 7000), (nodes.host, POD4, 8080)):
            self._clients.append(threading.Thread(target=self._dial, args=(place, host, port)))
        for thread in (*self._servers, *self._clients):
            thread.start()
        made.callback(self.stop)

    def _serve(self, name: str, listener: socket.socket) -> None:
        listener.settimeout(0.05)
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                end, _ = listener.accept()
                self.taken[name] += 1
                with end, contextlib.suppress(OSError):
                    end.sendall(b".")

    def _dial(self, place: Place, host: str, port: int) -> None:
        while not self._quiet.is_set():
            try:
                with place.connect(host, port) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.recv(1)
            except OSError as error:
                self.failures.append(f"{host}:{port}: {error}")

    def more(self, count: int = 30) -> None:
        """Returns after that many more connections of each direction, or a failure."""
        goal = {name: self.taken[name] + count for name in ("ztunnel out", "ztunnel in")}
        until(lambda: self.failures or all(self.taken[n] >= number for n, number in goal.items()), f"{goal}")

    def stop(self) -> None:
        for event, threads in ((self._quiet, self._clients), (self._closed, self._servers)):
            event.set()
            for thread in threads:
                thread.join()


def test_under_load_no_connection_escapes_or_fails_there_and_back(choice: str) -> None:
    """To istio-cni's form, and adopted from it again: rules without tags are drift, and are replaced."""
    with contextlib.ExitStack() as kept:
        nodes = kept.enter_context(pair())
        await_ipv6(nodes)
        used = layers(choice)
        layer, want = used[-1], Redirect(dns=False)
        settle(nodes.target, want, used)
        traffic = Traffic(nodes, kept)
        traffic.more()
        for _ in range(5):
            assert strip(nodes.target, layer, want)
            assert verify(nodes.target, want, used), "without tags it is drift"
            traffic.more()
            settle(nodes.target, want, used)
            assert verify(nodes.target, want, used) == {}
            traffic.more()
        traffic.stop()
        assert not traffic.failures
        assert traffic.taken["server"] == traffic.taken["application"] == 0
        assert traffic.taken["ztunnel out"] >= 300 and traffic.taken["ztunnel in"] >= 300


def test_p55_streams_survive_there_and_back(choice: str) -> None:
    """One of before the capture, and a captured one."""
    with pair() as nodes, contextlib.ExitStack() as kept:
        used = layers(choice)
        old = [kept.enter_context(end) for end in stream(nodes.pod, nodes.host, HOST4, 7000)]
        settle(nodes.target, Redirect(preserve=True), used)
        assert carries(*old)
        settle(nodes.target, Redirect(), used)
        listener = kept.enter_context(nodes.pod.listen("0.0.0.0", 15001))
        near = kept.enter_context(nodes.pod.connect(HOST4, 7001))
        far = kept.enter_context(listener.accept()[0])
        far.settimeout(SECONDS)
        for _ in range(3):
            assert carries(*old) and carries(near, far)
            strip(nodes.target, used[-1], Redirect())
            assert carries(*old) and carries(near, far)
            settle(nodes.target, Redirect(), used)
