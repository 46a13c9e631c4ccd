# SPDX-License-Identifier: Apache-2.0
"""`sluice uncapture --all`: no agent, no API server, no state; whatever is there of ours goes, and nothing else.

Every call is restricted to namespaces that the test made (--netns); the search of the whole node is only looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import istio
from support.rules import CHOICES, Pod, layers
from support.rules import pod as made

from agent.__main__ import main
from agent.core.model.pods import Pod as Facts
from agent.core.model.redirect import Redirect
from agent.kernel.exec import start
from agent.kernel.netns import unpin
from agent.kernel.unix_socket import claim
from agent.reconciler.converge import settle, verify
from agent.sources.netns import existing
from agent.sources.state.notes import Note, Notes

pytestmark = pytest.mark.root
WANT = Redirect()
APART = """
nft add table inet mine
nft add chain inet mine out '{ type filter hook output priority 0; policy accept; }'
nft add rule inet mine out tcp dport 99 counter accept
ip rule add fwmark 0x5 lookup 200 pref 500
ip route add local 192.0.2.0/24 dev lo table 200
"""
FOREIGN = f"""{APART}
iptables-nft -t nat -A OUTPUT -p tcp --dport 98 -j ACCEPT
iptables-nft -t mangle -N OTHER
ip6tables-legacy -t nat -A PREROUTING -p udp --dport 97 -j ACCEPT
"""
# The kernel cannot remove tables of legacy iptables: where they count they are there before.
TABLES = "for t in raw mangle nat; do for v in ip ip6; do ${v}tables-legacy -t $t -L >/dev/null; done; done"


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-uc-pod") as one:
        yield one


@pytest.fixture(autouse=True)
def no_pin_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for pin in tmp_path.glob("netns/*"):
        unpin(pin)


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepare(pod: Pod, choice: str, script: str = "") -> str:
    """The dump that has to come back."""
    pod.sh(script + (TABLES if choice == "iptables-legacy" else ""))
    return pod.dump()


def capture(pod: Pod, choice: str, run_dir: Path | None = None, want: Redirect = WANT) -> None:
    """As an agent did it that is gone, with its note and its pin if there is a run directory."""
    settle(pod.target, want, layers(choice))
    if run_dir is not None:
        state = Notes(str(run_dir))
        state.save(
            Note(Facts("uid-1", "shop", "web", netns_path=str(pod.path)), captured=True, netns=pod.target.netns.id)
        )
        pod.target.netns.pin(state.pin("uid-1"))
    pod.reopen()


@pytest.fixture
def uncapture(pod: Pod, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, object]]]:
    """Runs the command on the pod; what it says of it."""

    def call(*more: str, code: int = 0) -> list[dict[str, object]]:
        words = ["uncapture", "--all", "-o", "json", "--run-dir", str(tmp_path), "--netns", str(pod.path), *more]
        capsys.readouterr()
        assert main(words) == code, capsys.readouterr()
        found: list[dict[str, object]] = json.loads(capsys.readouterr().out)["namespaces"]
        return found

    return call


Uncapture = Callable[..., list[dict[str, object]]]


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "no-state"])
@pytest.mark.parametrize("foreign", ["", FOREIGN], ids=["empty", "foreign"])
def test_p56_uncapture_needs_no_agent_and_leaves_no_trace(
    pod: Pod, choice: str, foreign: str, noted: bool, tmp_path: Path, uncapture: Uncapture
) -> None:
    before = prepare(pod, choice, foreign)
    capture(pod, choice, tmp_path if noted else None)
    assert pod.dump() != before
    (row,) = uncapture()
    assert (row["result"], row["found"]) == ("removed", "sluice")
    assert row["pod"] == ("shop/web" if noted else "")
    assert row["layers"] == [choice, "conntrack", "routing"], "redirections before the routing they rely on"
    assert pod.dump() == before
    assert not list(tmp_path.glob("pods/*")) and not list(tmp_path.glob("netns/*"))
    assert uncapture() == []


def test_all_mechanisms_at_once_go_at_once(pod: Pod, uncapture: Uncapture) -> None:
    before = prepare(pod, "iptables-legacy", FOREIGN)
    for choice in CHOICES:
        settle(pod.target, WANT, layers(choice))
    pod.reopen()
    (row,) = uncapture()
    assert row["layers"] == ["iptables-legacy", "iptables", "nftables", "conntrack", "routing"]
    assert pod.dump() == before


XT_DAMAGE = [
    "iptables-{0} -t nat -D OUTPUT 1",  # a chain without its jump
    "ip6tables-{0} -t nat -F PREROUTING; ip6tables-{0} -t nat -F ISTIO_PRERT; ip6tables-{0} -t nat -X ISTIO_PRERT",
    "iptables-{0} -t nat -F ISTIO_OUTPUT",  # a jump to a chain that holds nothing
    "iptables-{0} -t raw -F; iptables-{0} -t raw -X",
    "for t in raw mangle nat; do iptables-{0} -t $t -F; iptables-{0} -t $t -X; done",  # one family of two
    "for t in raw mangle; do for v in ip ip6; do ${{v}}tables-{0} -t $t -F; ${{v}}tables-{0} -t $t -X; done; done",
    "for t in raw mangle nat; do for v in ip ip6; do ${{v}}tables-{0} -t $t -F; done; done",  # chains alone
    "iptables-{0} -t nat -A OUTPUT -j ISTIO_OUTPUT",  # a second jump
]
DAMAGE = {
    "nftables": [
        "nft delete table inet istio-ambient-nat",
        "nft delete table inet istio-ambient-raw; nft delete table inet istio-ambient-mangle",
        "nft flush chain inet istio-ambient-nat istio-output",
        "for t in raw mangle; do nft flush table inet istio-ambient-$t; done",
        "nft add chain inet istio-ambient-nat other",
    ],
    "iptables": [line.format("nft") for line in XT_DAMAGE],
    "iptables-legacy": [line.format("legacy") for line in XT_DAMAGE],
}
ROUTING = [
    "ip rule del pref 32764",
    "ip route flush table 100",
    "ip -6 rule del pref 32764; ip -6 route flush table 100; ip route flush table 100",
]


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "no-state"])
@pytest.mark.parametrize(("choice", "damage"), [(name, one) for name in CHOICES for one in DAMAGE[name] + ROUTING])
def test_p56_half_removed_state_goes_all_the_same(
    pod: Pod, choice: str, damage: str, noted: bool, tmp_path: Path, uncapture: Uncapture
) -> None:
    before = prepare(pod, choice)
    capture(pod, choice, tmp_path if noted else None)
    right = pod.dump()
    pod.sh(damage)
    assert pod.dump() not in (right, before), damage
    assert [row["result"] for row in uncapture()] == ["removed"]
    assert pod.dump() == before


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "no-state"])
def test_routing_alone_is_ours_only_if_a_note_says_so(
    pod: Pod, noted: bool, tmp_path: Path, uncapture: Uncapture
) -> None:
    """It carries no tag, and equals that of istio-cni."""
    before = pod.dump()
    capture(pod, "nftables", tmp_path if noted else None)
    for table in ("nat", "mangle", "raw"):
        pod.sh(f"nft delete table inet istio-ambient-{table}")
    routing = pod.dump()
    assert [row["layers"] for row in uncapture()] == ([["conntrack", "routing"]] if noted else [])
    assert pod.dump() == (before if noted else routing)


@pytest.mark.parametrize("mechanism", istio.ISTIO)
def test_what_istio_cni_programmed_is_left_alone_unless_asked_for(
    pod: Pod, mechanism: str, uncapture: Uncapture
) -> None:
    istio.apply(pod, mechanism, WANT)
    before = pod.dump()
    (row,) = uncapture()
    assert (row["result"], row["found"]) == ("left alone", "another agent")
    assert pod.dump() == before
    (row,) = uncapture("--foreign")
    assert row["result"] == "removed"
    assert "ISTIO" not in pod.dump() and "istio" not in pod.dump() and "32764" not in pod.dump()


@pytest.mark.parametrize("choice", ["iptables", "iptables-legacy"])
def test_a_chain_that_somebody_else_jumps_to_keeps_nothing_but_itself(
    pod: Pod, choice: str, tmp_path: Path, uncapture: Uncapture
) -> None:
    """Its removal is refused, and told; traffic goes its own way all the same, and a note stays to try again."""
    prepare(pod, choice)
    capture(pod, choice, tmp_path)
    command = f"iptables-{'nft' if choice == 'iptables' else 'legacy'} -t nat"
    pod.sh(f"{command} -A OUTPUT -p tcp --dport 4711 -j ISTIO_OUTPUT")
    (row,) = uncapture(code=1)
    assert row["result"] == "remains" and "ISTIO_OUTPUT" in str(row["errors"])
    assert not any(word in pod.dump() for word in ("sluice:", "REDIRECT", "redirect", "0x111", "CONNMARK"))
    assert (tmp_path / "netns" / "uid-1").exists()
    pod.sh(f"{command} -D OUTPUT -p tcp --dport 4711 -j ISTIO_OUTPUT")
    assert [row["result"] for row in uncapture()] == ["removed"]
    assert "ISTIO" not in pod.dump() and not (tmp_path / "netns" / "uid-1").exists()


def test_tables_of_an_owner_that_lives_remain_and_are_told_of(pod: Pod, uncapture: Uncapture) -> None:
    """An agent with another run directory: the kernel refuses everybody else."""
    used = layers("nftables")
    settle(pod.target, WANT, used)
    before = pod.dump()
    if "owner" not in before:
        assert "no owned tables" in used[-1].probe().remarks[0]
        return
    (row,) = uncapture(code=1)
    assert row["result"] == "remains" and "not permitted" in str(row["errors"])
    assert "istio-ambient-nat" in pod.dump()
    pod.reopen()
    assert [row["result"] for row in uncapture()] == ["removed"]


def test_only_shown_it_changes_nothing_and_an_agent_may_run(
    pod: Pod, choice: str, tmp_path: Path, uncapture: Uncapture
) -> None:
    capture(pod, choice, tmp_path)
    before = pod.dump()
    agent = claim(tmp_path)
    try:
        (row,) = uncapture("--dry-run")
    finally:
        os.close(agent)
    assert row["result"] == "would be removed" and row["layers"] == [choice, "conntrack", "routing"]
    assert "istio-ambient-nat" in str(row["scripts"]) or "-X ISTIO_OUTPUT" in str(row["scripts"])
    assert pod.dump() == before
    assert (tmp_path / "netns" / "uid-1").exists() and (tmp_path / "pods" / "uid-1.json").exists()


def test_while_an_agent_runs_it_is_refused_and_said_what_to_do(
    pod: Pod, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lock of another process, which gives it back when it is killed."""
    capture(pod, choice, tmp_path)
    before = pod.dump()
    uses = "import sys; from pathlib import Path; from agent.kernel.unix_socket import claim"
    code = f"claim(Path({str(tmp_path)!r})); print(1, flush=True); sys.stdin.read()"
    agent = start(
        [sys.executable, "-c", f"{uses}; {code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert agent.stdout is not None and agent.stdout.readline() == b"1\n"
        words = ["uncapture", "--all", "--run-dir", str(tmp_path), "--netns", str(pod.path)]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"an agent runs on {tmp_path}" in line and "stop it first" in line
        assert pod.dump() == before
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.communicate()
    assert main(words) == 0
    assert "sluice:" not in pod.dump()


def test_damaged_notes_and_pins_of_nobody_are_in_nobodys_way(
    pod: Pod, choice: str, tmp_path: Path, uncapture: Uncapture
) -> None:
    before = prepare(pod, choice)
    capture(pod, choice, tmp_path)
    (tmp_path / "pods" / "uid-1.json").write_text('{"version": 1, "pod": ')
    (row,) = uncapture()
    assert (row["pod"], row["result"]) == ("uid-1", "removed"), "its pin tells the pod"
    assert pod.dump() == before
    assert not list(tmp_path.glob("pods/*")) and not list(tmp_path.glob("netns/*"))


def test_the_search_finds_pins_names_and_processes_and_each_namespace_once(pod: Pod, tmp_path: Path) -> None:
    """Only looked at: other namespaces of this machine are other people's."""
    capture(pod, "nftables", tmp_path)
    with made("slu-uc-proc") as other:
        inside = start(["nsenter", f"--net={other.path}", "sleep", "1000"])
        try:
            known = existing.known(str(tmp_path))
            places = existing.netns_paths(str(tmp_path), known)
            assert {tmp_path / "netns" / "uid-1", pod.path, other.path, Path(f"/proc/{inside.pid}/ns/net")} <= {*places}
            own = Path("/proc/self/ns/net").stat().st_ino
            mine = [path for path in places if _inode(path) in (own, _inode(pod.path), _inode(other.path))]
            assert any(_inode(path) == own for path in mine), "the host's own is met, and refused"
            problems: list[str] = []
            found = list(existing.namespaces(mine, problems))
            assert [one.id.inode for one in found] == [_inode(pod.path), _inode(other.path)] and not problems
            assert [existing.pod(one, str(tmp_path), known) for one in found] == [known[0], None]
            for one in found:
                one.close()
        finally:
            inside.kill()
            inside.wait()


def _inode(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_ino
    return 0


@pytest.mark.parametrize("seed", range(8))
def test_p56_sequences_of_enrol_and_unenrol_end_as_wanted(pod: Pod, seed: int, uncapture: Uncapture) -> None:
    """Any mechanism may follow any other, with damage in between; a step is what an agent does, or what goes wrong."""
    before, chance = prepare(pod, "iptables-legacy", APART), random.Random(seed)
    wants = [WANT, Redirect(dns=False), Redirect(ingress_only=True), Redirect(virtual_interfaces=("eth1",))]
    done = []
    for number in range(12):
        choice, want = chance.choice(CHOICES), chance.choice([*wants, None])
        step = chance.choice(["settle", "settle", "settle", "damage", "restart", "uncapture"])
        done.append((step, choice, want))
        if step == "damage":
            pod.sh(chance.choice(DAMAGE[choice] + ROUTING), check=False)
        elif step == "restart":
            pod.reopen()
        elif step == "uncapture":
            pod.reopen()
            uncapture()
            assert not any(word in pod.dump() for word in ("sluice:", "15001", "32764")), done
        if step == "settle" or number == 11:
            used = layers(choice)
            retired = [one for name in CHOICES if name != choice for one in layers(name)[-1:]]
            settle(pod.target, want, used, retired)
            assert verify(pod.target, want, used, retired) == {}, done
    pod.reopen()
    uncapture()
    assert pod.dump() == before, done
