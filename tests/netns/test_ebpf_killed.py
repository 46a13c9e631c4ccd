# SPDX-License-Identifier: Apache-2.0
"""An agent that is killed at any point leaves a node that the next one puts right; meanwhile nothing escapes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import bpftool
from support.ebpf_agents import Agent, agent, killed_before, other_build
from support.ebpf_pod import (
    APP,
    CAPTURE,
    FREE,
    PEER,
    SECONDS,
    Stage,
    accepted,
    carries,
    forget,
    from_client,
    original,
    stage,
    waiting,
)
from support.node import until

from agent.backends.ebpf import object_files
from agent.backends.ebpf.pins import pin
from agent.backends.ebpf.programs import NodeTarget
from agent.core.errors import StaleError
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.kernel.bpf.map import Map

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]
CHANGED = Redirect(
    exclude=Exclusions(outbound_ports=((FREE, FREE), (7000, 7002)), inbound_networks=("10.88.0.0/16",)), dns=False
)
MOST = 400  # steps of one act; more is an endless loop


@pytest.fixture(scope="module")
def node() -> Iterator[Stage]:
    with stage() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_waits(node: Stage) -> Iterator[None]:
    yield
    forget(node)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    yield other_build(tmp_path / "objects", monkeypatch)
    monkeypatch.undo()
    object_files.digest.cache_clear()


def captured(node: Stage) -> None:
    """Both ways; and what is excluded passes."""
    for kind in ("IPv4", "IPv6"):
        version = 4 if kind == "IPv4" else 6
        with node.pod.make(kind) as app:
            app.connect((PEER[version], APP))
            with accepted(node.ztunnel.outbound) as inner:
                assert original(inner, version) == (PEER[version], APP)
                carries(app, inner)
        near, inner = from_client(node, kind)
        with near, inner:
            carries(near, inner)
    with node.pod.make() as app:
        app.connect((PEER[4], FREE))
        accepted(node.free).close()


def entered(node: Stage) -> bool:
    """Whether the map has the pod."""
    pods = node.node.pins.maps / "pods"
    if not pods.exists():
        return False
    with Map.open(pods) as found:
        return found.lookup(node.pod.cookie.to_bytes(8, "little")) is not None


def none_escapes(node: Stage) -> None:
    """While the pod has an entry: a new connection is captured or refused, never passed."""
    if not entered(node):
        return
    with node.pod.make() as app:
        try:
            app.connect((PEER[4], APP))
        except (ConnectionRefusedError, PermissionError):
            pass
        else:
            accepted(node.ztunnel.outbound).close()
    assert not waiting(node.app), "a connection of an enrolled pod has escaped"


def left_of_the_pod(node: Stage) -> list[str]:
    """Pins and map entries."""
    root = node.node.pins.root
    found = [str(path.relative_to(root)) for path in root.glob("v1/pods/*/**/*") if not path.is_dir()]
    found += [str(path.relative_to(root)) for path in root.glob("v1/pods/*")]
    if node.node.pins.maps.exists():
        for name in ("pods", "policies", "listeners", "beside"):
            with Map.open(node.node.pins.maps / name) as each:
                found += [f"{name}: {key.hex()}" for key in each.keys()]  # noqa: SIM118 - it has no other
    return found


def at_every_step(
    node: Stage,
    prepare: Callable[[Agent], None],
    act: Callable[[Agent], None],
    check: Callable[[Agent], None],
) -> int:
    """Prepares, has an agent killed before one of its steps, repairs by `act` and checks; the number of steps."""
    for step in range(1, MOST):
        with agent(node) as before:
            prepare(before)
        died = killed_before(step, node, act)
        none_escapes(node)
        with agent(node) as after:
            act(after)
            check(after)
        if not died:
            return step
    raise AssertionError("it never ends")


def beside(node: Stage) -> None:
    """Something is counted for the pod, too."""
    with node.pod.make("IPv4", socket.SOCK_DGRAM) as sock:
        sock.sendto(b"1", (PEER[4], 123))


def enrolled(want: Redirect) -> Callable[[Agent], None]:
    def check(now: Agent) -> None:
        assert now.wrong(want) == {}
        captured(now.node)

    return check


@pytest.mark.slow
def test_enrolment_with_all_programs(node: Stage) -> None:
    def nothing(first: Agent) -> None:
        first.remove()
        first.remove_programs()

    steps = at_every_step(node, nothing, lambda now: now.enrol(CAPTURE), enrolled(CAPTURE))
    assert steps > 80


@pytest.mark.slow
def test_enrolment_of_one_pod(node: Stage) -> None:
    def programs_alone(first: Agent) -> None:
        first.enrol(CAPTURE)
        first.remove()

    assert at_every_step(node, programs_alone, lambda now: now.enrol(CAPTURE), enrolled(CAPTURE)) > 15


@pytest.mark.slow
def test_a_change_of_the_exclusions(node: Stage) -> None:
    def check(now: Agent) -> None:
        enrolled(CHANGED)(now)
        now.sweep(now.target)
        with Map.open(now.pins.maps / "pods") as pods:
            [entry] = [value for _, value in pods.items()]
        with Map.open(now.pins.maps / "policies") as policies:
            assert {key[8:16] for key in policies.keys()} == {entry[8:16]}, "prefixes of another policy are left"  # noqa: SIM118

    def prepare(first: Agent) -> None:
        first.enrol(CAPTURE)

    assert at_every_step(node, prepare, lambda now: now.enrol(CHANGED), check) > 5


@pytest.mark.slow
def test_a_change_that_is_taken_back_after_the_kill(node: Stage) -> None:
    """The next agent wants what was before: what the killed one had begun must not stay."""
    for step in range(1, MOST):
        with agent(node) as first:
            first.enrol(CAPTURE)
        died = killed_before(step, node, lambda now: now.enrol(CHANGED))
        with agent(node) as after:
            after.enrol(CAPTURE)
            assert after.wrong(CAPTURE) == {}
            after.remove()
            after.sweep()
        assert left_of_the_pod(node) == [], step
        if not died:
            return


@pytest.mark.slow
def test_removal_of_one_pod(node: Stage) -> None:
    def prepare(first: Agent) -> None:
        first.enrol(CAPTURE)
        beside(node)

    def check(now: Agent) -> None:
        assert now.wrong(None) == {}
        now.sweep()
        assert left_of_the_pod(node) == []
        with node.pod.make() as app:
            app.connect((PEER[4], APP))
            carries(app, accepted(node.app))

    assert at_every_step(node, prepare, lambda now: now.remove(), check) > 10


@pytest.mark.slow
def test_removal_of_all_programs(node: Stage) -> None:
    def prepare(first: Agent) -> None:
        first.enrol(CAPTURE)
        first.remove()

    def check(now: Agent) -> None:
        assert not now.pins.root.exists()
        with node.pod.make() as app:
            app.connect((PEER[4], APP))
            carries(app, accepted(node.app))

    assert at_every_step(node, prepare, lambda now: now.remove_programs(), check) > 40


# --- another build


def loaded() -> set[int]:
    return {one["id"] for one in bpftool.shown("prog", "list")}


def running(now: Agent) -> set[int]:
    """The programs that our links run."""
    found = set()
    for place in (now.pins.node.path, now.pins.pod(now.node.pod.cookie).path):
        for link in (place / "links").iterdir():
            found.add(int(bpftool.shown("link", "show", "pinned", str(link))["prog_id"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
def test_an_upgrade(node: Stage, builds: Callable[[bool], None], back: bool) -> None:
    """`back`: the next agent is of the old build again."""
    old: set[int] = set()

    def prepare(first: Agent) -> None:
        builds(False)
        first.enrol(CAPTURE)
        old.clear()
        old.update(running(first))
        builds(True)

    def act(now: Agent) -> None:
        now.enrol(CAPTURE)

    def check(now: Agent) -> None:
        enrolled(CAPTURE)(now)
        mine = {pin(program) for program in (*object_files.NODE, *object_files.POD)}
        names = {path.name for path in now.pins.root.glob("v1/**/programs/*")}
        assert names == mine, "programs of another build are pinned"
        if not back:
            assert not running(now) & old
            until(lambda: not loaded() & old, "the old programs are unloaded")

    if not back:
        assert at_every_step(node, prepare, act, check) > 40
        return
    for step in range(1, MOST):
        with agent(node) as first:
            prepare(first)
        died = killed_before(step, node, act)
        none_escapes(node)
        builds(False)
        with agent(node) as after:
            act(after)
            check(after)
        if not died:
            return


@pytest.mark.slow
def test_an_upgrade_under_a_client_that_never_pauses(node: Stage, builds: Callable[[bool], None]) -> None:
    """Ten builds, one after the other: no connection escapes, none fails, and each is told its destination."""
    with agent(node) as now:
        builds(False)
        now.enrol(CAPTURE)
        with clients(node) as counted:
            for turn in range(10):
                before = counted["done"]
                builds(turn % 2 == 0)
                now.enrol(CAPTURE)
                until(lambda before=before: counted["done"] > before + 20, "connections go on")
    assert (counted["wrong"], counted["failed"]) == ([], [])
    assert not waiting(node.app), "a connection has escaped"


@contextlib.contextmanager
def clients(node: Stage) -> Iterator[dict[str, Any]]:
    """Connects in a child without pause; ztunnel's side is a thread of this process."""
    counted: dict[str, Any] = {"done": 0, "wrong": [], "failed": []}
    ended, tell = threading.Event(), os.pipe()
    child = os.fork()
    if not child:
        os.close(tell[0])
        enough = threading.Event()  # between two connections: one that is cut off has said nothing, which looks wrong
        signal.signal(signal.SIGTERM, lambda *_: enough.set())
        node.pod.target.netns.call(lambda: connect_until(enough, tell[1]))
        os._exit(0)
    os.close(tell[1])

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                inner = accepted(node.ztunnel.outbound)
                with inner:
                    said = inner.recv(100)
                    try:
                        found = original(inner, 4)
                    except OSError as error:
                        found = ("", error.errno or 0)
                    counted["done"] += 1
                    if said != f"{found[0]} {found[1]}".encode():
                        counted["wrong"].append((said, found))

    node.ztunnel.outbound.settimeout(0.2)
    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield counted
    finally:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        ended.set()
        serving.join(SECONDS)
        node.ztunnel.outbound.settimeout(SECONDS)
        with os.fdopen(tell[0]) as failures:
            counted["failed"] = failures.read().splitlines()


def connect_until(enough: threading.Event, tell: int) -> None:
    number = 0
    while not enough.is_set():
        number += 1
        to = PEER[4], 10000 + number % 5000
        try:
            with socket.socket() as app:
                app.settimeout(SECONDS)
                app.connect(to)
                app.sendall(f"{to[0]} {to[1]}".encode())
                app.recv(1)
        except OSError as error:
            os.write(tell, f"{to} {error!r}\n".encode())


def test_two_pods_at_once_do_not_attach_the_nodes_programs_twice() -> None:
    """A second program would take what the first has rewritten for what the application wanted."""
    with stage() as node:
        programs, target = node.node.programs, node.pod.target
        programs.apply(NodeTarget(), programs.plan(None, programs.read(NodeTarget())))
        first, second = (programs.plan(node.want, programs.read(target)) for _ in range(2))
        programs.apply(target, first)
        with pytest.raises(StaleError):
            programs.apply(target, second)
        assert not programs.plan(node.want, programs.read(target))
